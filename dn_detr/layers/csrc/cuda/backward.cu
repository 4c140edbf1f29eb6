#include "launch.cuh"
#include "sums.cuh"

namespace dn_detr {
namespace cuda {
namespace {

// The tokens of the corners upper left, upper right, lower left, lower right; -1 outside of the map.
template <typename R>
__device__ Pack<int, 4> find_tokens(const Place<R>& place) {
  const bool left = place.column >= 0, right = place.column + 1 < place.map.width;
  const bool upper = place.inside && place.row >= 0;
  const bool lower = place.inside && place.row + 1 < place.map.height;
  const int upper_left = place.map.first_token + place.row * place.map.width + place.column;
  const int lower_left = upper_left + place.map.width;
  return {upper && left ? upper_left : -1, upper && right ? upper_left + 1 : -1,
          lower && left ? lower_left : -1, lower && right ? lower_left + 1 : -1};
}

// Where a point lies between its corners, and its weight.
template <typename R>
struct alignas(16) Position {
  R right, lower, weight;
};

// What a point's sample, multiplied by the gradient of the output, is; and its derivatives.
template <typename R>
struct Slopes {
  R weight, x, y;

  __device__ void add_over_lanes(int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      weight += __shfl_xor_sync(kWholeWarp, weight, distance);
      x += __shfl_xor_sync(kWholeWarp, x, distance);
      y += __shfl_xor_sync(kWholeWarp, y, distance);
    }
  }
};

// One point, for the channels of this lane: adds to the gradient of value, returns the slopes.
template <typename R, typename Value, int kChannels, typename Sum>
__device__ Slopes<R> visit_point(const Position<R>& position, const Pack<int, 4>& token,
                                 const char* source, int token_stride,
                                 const R (&gradient)[kChannels], bool has_channels,
                                 const Sum& sum) {
  const R right = position.right, left = 1 - right, lower = position.lower, upper = 1 - lower;
  const R share[4] = {upper * left, upper * right, lower * left, lower * right};
  R dot[4] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (token.at[k] < 0) continue;
    const auto pixel = *reinterpret_cast<const Pack<Value, kChannels>*>(
        source + int64_t(token.at[k]) * token_stride);
    R terms[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      dot[k] += gradient[c] * to_real(pixel.at[c]);
      terms[c] = share[k] * position.weight * gradient[c];
    }
    if (has_channels) sum.add(token.at[k], terms);
  }
  return {share[0] * dot[0] + share[1] * dot[1] + share[2] * dot[2] + share[3] * dot[3],
          upper * (dot[1] - dot[0]) + lower * (dot[3] - dot[2]),
          left * (dot[2] - dot[0]) + right * (dot[3] - dot[1])};
}

template <typename Value, typename Weight, int kChannels, typename Sum>
__global__ void __launch_bounds__(256)
    backward_kernel(const Layout layout, const Value* __restrict__ gradient,
                    const Value* __restrict__ value, const Real<Value>* __restrict__ locations,
                    const Weight* __restrict__ weights, typename Sum::Target value_gradient,
                    Real<Value>* __restrict__ location_gradient,
                    Weight* __restrict__ weight_gradient) {
  using R = Real<Value>;
  const Item item = this_item(layout);
  const int pitch = item_pitch(item.lanes);
  auto* all_positions = reinterpret_cast<Position<R>*>(shared_memory);
  auto* all_tokens = reinterpret_cast<Pack<int, 4>*>(all_positions + blockDim.y * pitch);
  auto* positions = all_positions + threadIdx.y * pitch;
  auto* tokens = all_tokens + threadIdx.y * pitch;
  const int head_channel = item.head * layout.channels;

  for (int first_point = 0; first_point < layout.points; first_point += item.lanes) {
    const int point = first_point + item.lane;
    const Sample<R> sample = read_sample(layout, item, point, locations, weights);
    const Place<R> place = locate(layout, point, sample.x, sample.y);
    __syncwarp();  // the points before these have been read
    // outside, coordinates and weight may be anything, NaN as well
    positions[item.lane] = place.inside ? Position<R>{place.right, place.lower, sample.weight}
                                        : Position<R>{};
    tokens[item.lane] = find_tokens(place);
    __syncwarp();
    Slopes<R> own = {};  // of the point that this lane has worked out
    const int count = min(item.lanes, layout.points - first_point);
    for (int first_channel = 0; first_channel < layout.channels;
         first_channel += item.lanes * kChannels) {
      const int channel = first_channel + item.lane * kChannels;
      const bool has_channels = channel < layout.channels;
      R row[kChannels] = {};  // of the output's gradient
      if (item.exists && has_channels) {
        const auto pack = *reinterpret_cast<const Pack<Value, kChannels>*>(
            gradient + item.index * layout.channels + channel);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) row[c] = to_real(pack.at[c]);
      }
      // a lane without channels reads what the first one reads
      const int column = head_channel + (has_channels ? channel : 0);
      const char* source = reinterpret_cast<const char*>(
          value + item.batch * layout.value_batch_stride + column);
      const int elements_per_token = layout.heads * layout.channels;
      const Sum sum(value_gradient,
                    item.batch * layout.tokens * elements_per_token + column, elements_per_token);
      for (int p = 0; p < count; ++p) {
        Slopes<R> slopes = visit_point<R, Value, kChannels>(
            positions[p], tokens[p], source, layout.value_token_stride, row, has_channels, sum);
        slopes.add_over_lanes(item.lanes);
        if (p == item.lane) own.weight += slopes.weight, own.x += slopes.x, own.y += slopes.y;
      }
    }
    if (item.exists && point < layout.points) {
      const int64_t index = item.index * layout.points + point;
      store(weight_gradient + index, own.weight);
      const R weight = place.inside ? sample.weight : 0;
      location_gradient[2 * index] = own.x * weight * place.map.width;
      location_gradient[2 * index + 1] = own.y * weight * place.map.height;
    }
  }
}

template <typename Value, typename Weight, int kChannels, typename Sum>
cudaError_t launch_backward(const Problem& problem, const BackwardTensors& tensors,
                            typename Sum::Target value_gradient, cudaStream_t stream) {
  const Plan plan = make_plan(problem, kChannels, sizeof(Value), sizeof(Real<Value>));
  if (plan.error != cudaSuccess) return plan.error;
  return launch(plan, stream, backward_kernel<Value, Weight, kChannels, Sum>,
                static_cast<const Value*>(tensors.gradient),
                static_cast<const Value*>(tensors.value),
                static_cast<const Real<Value>*>(tensors.locations),
                static_cast<const Weight*>(tensors.weights), value_gradient,
                static_cast<Real<Value>*>(tensors.location_gradient),
                static_cast<Weight*>(tensors.weight_gradient));
}

template <typename Value, typename Weight>
cudaError_t floating_backward(const Problem& problem, const BackwardTensors& tensors,
                              cudaStream_t stream) {
  using R = Real<Value>;
  const bool packs = can_use_packs(problem, sizeof(Value),
                                   {tensors.gradient, tensors.value, tensors.value_gradient});
  const auto launch_kernel =
      packs ? launch_backward<Value, Weight, kPackSize<Value>, FloatingSum<R>>
            : launch_backward<Value, Weight, 1, FloatingSum<R>>;
  return launch_kernel(problem, tensors, static_cast<R*>(tensors.value_gradient), stream);
}

// One channel for each thread: there are no wider atomics of 64-bit integers.
template <typename Value, typename Weight>
cudaError_t fixed_point_backward(const Problem& problem, const BackwardTensors& tensors,
                                 cudaStream_t stream) {
  const FixedPoint sums = make_fixed_point(problem, tensors.fixed_point);
  cudaError_t error = find_bounds(problem, tensors.gradient, tensors.weights, sums, stream);
  if (error != cudaSuccess) return error;
  error = launch_backward<Value, Weight, 1, FixedPointSum>(problem, tensors, sums, stream);
  if (error != cudaSuccess) return error;
  return convert_sums(problem, sums, tensors.value_gradient, stream);
}

}  // namespace

cudaError_t backward(const Problem& problem, const BackwardTensors& tensors, cudaStream_t stream) {
  if (problem.batch * problem.queries * problem.heads * problem.points == 0) return cudaSuccess;
  return dispatch(problem, [&](auto value_type, auto weight_type) {
    using Value = typename decltype(value_type)::type;
    using Weight = typename decltype(weight_type)::type;
    return tensors.fixed_point ? fixed_point_backward<Value, Weight>(problem, tensors, stream)
                               : floating_backward<Value, Weight>(problem, tensors, stream);
  });
}

}  // namespace cuda
}  // namespace dn_detr
