#include "launch.cuh"
#include "sums.cuh"

namespace dn_detr {
namespace cuda {
namespace {

// The four corners of a point: upper left, upper right, lower left, lower right; how many accesses
// they are away from token 0. Negative outside of the map.
template <typename R>
__device__ Pack<int, 4> find_offsets(const Place<R>& place, int token_stride) {
  const bool left = place.column >= 0, right = place.column + 1 < place.map.width;
  const bool upper = place.inside && place.row >= 0;
  const bool lower = place.inside && place.row + 1 < place.map.height;
  const int upper_left =
      (place.map.first_token + place.row * place.map.width + place.column) * token_stride;
  const int lower_left = upper_left + place.map.width * token_stride;
  return {upper && left ? upper_left : -1, upper && right ? upper_left + token_stride : -1,
          lower && left ? lower_left : -1, lower && right ? lower_left + token_stride : -1};
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
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      if (distance >= lanes) continue;
      weight += __shfl_xor_sync(kWholeWarp, weight, distance);
      x += __shfl_xor_sync(kWholeWarp, x, distance);
      y += __shfl_xor_sync(kWholeWarp, y, distance);
    }
  }
};

// What a lane hands to the others of its item.
template <typename R>
struct Staged {
  Position<R>* positions;
  Pack<int, 4>* value_offsets;
  Pack<int, 4>* gradient_offsets;

  static constexpr size_t kBytesPerPoint = sizeof(Position<R>) + 2 * sizeof(Pack<int, 4>);

  __device__ explicit Staged(const Item& item) {
    const int pitch = item_pitch(item.lanes), all = blockDim.y * pitch;
    auto* all_positions = reinterpret_cast<Position<R>*>(shared_memory);
    auto* all_offsets = reinterpret_cast<Pack<int, 4>*>(all_positions + all);
    positions = all_positions + threadIdx.y * pitch;
    value_offsets = all_offsets + threadIdx.y * pitch;
    gradient_offsets = value_offsets + all;
  }
};

// One point, for the channels of this lane: adds to the gradient of value, returns the slopes.
template <typename R, typename Value, int kChannels, typename Sum>
__device__ Slopes<R> visit_point(const Staged<R>& staged, int point,
                                 const Pack<Value, kChannels>* source,
                                 const R (&gradient)[kChannels], bool has_channels,
                                 const Sum& sum) {
  const Position<R> position = staged.positions[point];
  const Pack<int, 4> value_offset = staged.value_offsets[point];
  const Pack<int, 4> gradient_offset = staged.gradient_offsets[point];
  const R right = position.right, left = 1 - right, lower = position.lower, upper = 1 - lower;
  const R share[4] = {upper * left, upper * right, lower * left, lower * right};
  Pack<Value, kChannels> pixels[4] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (value_offset.at[k] >= 0) pixels[k] = source[value_offset.at[k]];
  }
  R dot[4] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    R numbers[kChannels], terms[kChannels];
    unpack(pixels[k], numbers);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      dot[k] += gradient[c] * numbers[c];
      terms[c] = share[k] * position.weight * gradient[c];
    }
    if (value_offset.at[k] >= 0 && has_channels) sum.add(gradient_offset.at[k], terms);
  }
  return {share[0] * dot[0] + share[1] * dot[1] + share[2] * dot[2] + share[3] * dot[3],
          upper * (dot[1] - dot[0]) + lower * (dot[3] - dot[2]),
          left * (dot[2] - dot[0]) + right * (dot[3] - dot[1])};
}

// Blocks of 256 threads that an SM must be able to hold: 4 allow 64 registers for a thread, 3 allow
// 80, 2 allow 128. The most with which no registers have to be kept in memory.
template <typename R, int kLanes>
constexpr int kLeastBlocks = sizeof(R) == sizeof(double) ? 2 : kLanes == 0 ? 3 : 4;

// With kLanes, heads have kLanes * kChannels channels.
template <typename Value, typename Weight, int kChannels, int kLanes, typename Sum>
__global__ void __launch_bounds__(256, kLeastBlocks<Real<Value>, kLanes>)
    backward_kernel(const Layout layout, const Value* __restrict__ gradient,
                    const Value* __restrict__ value, const Real<Value>* __restrict__ locations,
                    const Weight* __restrict__ weights, typename Sum::Target value_gradient,
                    Real<Value>* __restrict__ location_gradient,
                    Weight* __restrict__ weight_gradient) {
  using R = Real<Value>;
  using Channels = Pack<Value, kChannels>;
  const Item item = this_item<kLanes>(layout);
  const Staged<R> staged(item);
  const int num_channels = kLanes != 0 ? kLanes * kChannels : layout.channels;
  const int64_t first_sample = item.index * layout.points;
  value += item.batch * layout.value_batch_stride + int64_t(item.head) * num_channels;
  gradient += item.index * num_channels;
  const int64_t first_sum =
      (item.batch * layout.tokens * layout.heads + item.head) * num_channels;

  for (int first_point = 0; first_point < layout.points; first_point += item.lanes) {
    const int point = first_point + item.lane;
    const Sample<R> sample = read_sample(layout, item, point, locations + 2 * first_sample,
                                         weights + first_sample);
    const Place<R> place = locate(layout, point, sample.x, sample.y);
    const R weight = place.inside ? sample.weight : 0;  // outside it may be NaN
    __syncwarp();  // the points before these have been read
    staged.positions[item.lane] = {place.right, place.lower, weight};
    staged.value_offsets[item.lane] = find_offsets(place, layout.value_token_stride);
    staged.gradient_offsets[item.lane] = find_offsets(place, layout.gradient_token_stride);
    __syncwarp();
    Slopes<R> own = {};  // of the point that this lane has worked out
    const int count = min(item.lanes, layout.points - first_point);
    for (int first_channel = 0; first_channel < num_channels;
         first_channel += item.lanes * kChannels) {
      const int channel = first_channel + item.lane * kChannels;
      const bool has_channels = kLanes != 0 || channel < num_channels;
      R row[kChannels] = {};  // of the output's gradient
      if (item.exists && has_channels) {
        unpack(*reinterpret_cast<const Channels*>(gradient + channel), row);
      }
      // a lane without channels reads what the first one reads
      const int column = has_channels ? channel : 0;
      const auto* source = reinterpret_cast<const Channels*>(value + column);
      const Sum sum(value_gradient, first_sum + column);
#pragma unroll 1
      for (int p = 0; p < count; ++p) {
        Slopes<R> slopes = visit_point(staged, p, source, row, has_channels, sum);
        slopes.add_over_lanes(item.lanes);
        if (p == item.lane) own.weight += slopes.weight, own.x += slopes.x, own.y += slopes.y;
      }
    }
    if (!place.inside) own = {};  // whatever the gradient is
    if (item.exists && point < layout.points) {
      store(weight_gradient + first_sample + point, own.weight);
      R* of_location = location_gradient + 2 * (first_sample + point);
      of_location[0] = own.x * weight * place.map.width;
      of_location[1] = own.y * weight * place.map.height;
    }
  }
}

template <typename Value, typename Weight, int kChannels, int kLanes, typename Sum>
cudaError_t launch_backward(const Problem& problem, const BackwardTensors& tensors,
                            typename Sum::Target value_gradient, cudaStream_t stream) {
  const Plan plan = make_plan(problem, kChannels, Staged<Real<Value>>::kBytesPerPoint);
  if (plan.error != cudaSuccess) return plan.error;
  return launch(plan, stream, backward_kernel<Value, Weight, kChannels, kLanes, Sum>,
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
  constexpr int kPack = kPackSize<Value>;
  constexpr int kUsualLanes = kUsualChannels / kPack;
  const auto launch_kernel =
      !packs ? launch_backward<Value, Weight, 1, 0, FloatingSum<R, 1>>
      : problem.channels == kUsualChannels
          ? launch_backward<Value, Weight, kPack, kUsualLanes, FloatingSum<R, kPack>>
          : launch_backward<Value, Weight, kPack, 0, FloatingSum<R, kPack>>;
  return launch_kernel(problem, tensors, static_cast<R*>(tensors.value_gradient), stream);
}

// One channel for each thread: there are no wider atomics of 64-bit integers.
template <typename Value, typename Weight>
cudaError_t fixed_point_backward(const Problem& problem, const BackwardTensors& tensors,
                                 cudaStream_t stream) {
  const FixedPoint sums = make_fixed_point(problem, tensors.fixed_point);
  cudaError_t error = find_bounds(problem, tensors.gradient, tensors.weights, sums, stream);
  if (error != cudaSuccess) return error;
  error = launch_backward<Value, Weight, 1, 0, FixedPointSum>(problem, tensors, sums, stream);
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
