#include "launch.cuh"

namespace dn_detr {
namespace cuda {
namespace {

// The four corners of a point: upper left, upper right, lower left, lower right. One that is outside
// of the map is replaced by its neighbour inside, with which it shares that weight: so every corner
// can be read, and only pixels that take part are. (A weight of 0 would turn infinity into NaN.)
template <typename R>
__device__ void find_corners(const Place<R>& place, R weight, Pack<R, 4>& weights,
                             Pack<int, 4>& tokens) {
  int left = place.column, right = left + 1, upper = place.row, lower = upper + 1;
  R weight_right = place.right, weight_left = 1 - weight_right;
  R weight_lower = place.lower, weight_upper = 1 - weight_lower;
  if (left < 0) left = right, weight_left = weight_right *= R(0.5);
  if (right >= place.map.width) right = left, weight_right = weight_left *= R(0.5);
  if (upper < 0) upper = lower, weight_upper = weight_lower *= R(0.5);
  if (lower >= place.map.height) lower = upper, weight_lower = weight_upper *= R(0.5);
  weight_upper *= weight;
  weight_lower *= weight;
  weights = {weight_upper * weight_left, weight_upper * weight_right, weight_lower * weight_left,
             weight_lower * weight_right};
  const int upper_row = place.map.first_token + upper * place.map.width;
  const int lower_row = place.map.first_token + lower * place.map.width;
  tokens = {upper_row + left, upper_row + right, lower_row + left, lower_row + right};
}

template <typename Value, typename Weight, int kChannels>
__global__ void __launch_bounds__(256)
    forward_kernel(const Layout layout, const Value* __restrict__ value,
                   const Real<Value>* __restrict__ locations, const Weight* __restrict__ weights,
                   Value* __restrict__ output) {
  using R = Real<Value>;
  using Channels = Pack<Value, kChannels>;
  const Item item = this_item(layout);
  const int pitch = item_pitch(item.lanes);
  auto* all_weights = reinterpret_cast<Pack<R, 4>*>(shared_memory);
  auto* all_tokens = reinterpret_cast<Pack<int, 4>*>(all_weights + blockDim.y * pitch);
  auto* corner_weights = all_weights + threadIdx.y * pitch;
  auto* corner_tokens = all_tokens + threadIdx.y * pitch;
  const unsigned thread = (threadIdx.y * item.lanes + item.lane) % kWarpSize;
  const unsigned threads_before = (1u << thread) - 1;
  const unsigned threads_of_item = (kWholeWarp >> (kWarpSize - item.lanes))
                                   << (thread - item.lane);

  for (int first_channel = 0; first_channel < layout.channels;
       first_channel += item.lanes * kChannels) {
    const int channel = first_channel + item.lane * kChannels;
    const bool has_channels = channel < layout.channels;
    // a lane without channels reads what the first one reads
    const char* source = reinterpret_cast<const char*>(
        value + item.batch * layout.value_batch_stride + int64_t(item.head) * layout.channels +
        (has_channels ? channel : 0));
    R sums[kChannels] = {};
    Sample<R> sample = read_sample(layout, item, item.lane, locations, weights);
    for (int first_point = 0; first_point < layout.points; first_point += item.lanes) {
      const int point = first_point + item.lane;
      const Place<R> place = locate(layout, point, sample.x, sample.y);
      const unsigned points_inside = __ballot_sync(kWholeWarp, place.inside) & threads_of_item;
      __syncwarp();  // the points before these have been read
      if (place.inside) {
        const int position = __popc(points_inside & threads_before);
        find_corners(place, sample.weight, corner_weights[position], corner_tokens[position]);
      }
      __syncwarp();
      sample = read_sample(layout, item, point + item.lanes, locations, weights);
      const int count = __popc(points_inside);
#pragma unroll 2
      for (int p = 0; p < count; ++p) {
        const Pack<R, 4> corner_weight = corner_weights[p];
        const Pack<int, 4> token = corner_tokens[p];
        Channels pixels[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          pixels[k] = *reinterpret_cast<const Channels*>(
              source + int64_t(token.at[k]) * layout.value_token_stride);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            sums[c] += corner_weight.at[k] * to_real(pixels[k].at[c]);
          }
        }
      }
    }
    if (item.exists && has_channels) {
      Channels result;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) store(&result.at[c], sums[c]);
      *reinterpret_cast<Channels*>(output + item.index * layout.channels + channel) = result;
    }
  }
}

template <typename Value, typename Weight, int kChannels>
cudaError_t launch_forward(const Problem& problem, const void* value, const void* locations,
                           const void* weights, void* output, cudaStream_t stream) {
  const Plan plan = make_plan(problem, kChannels, sizeof(Value), sizeof(Real<Value>));
  if (plan.error != cudaSuccess) return plan.error;
  return launch(plan, stream, forward_kernel<Value, Weight, kChannels>,
                static_cast<const Value*>(value), static_cast<const Real<Value>*>(locations),
                static_cast<const Weight*>(weights), static_cast<Value*>(output));
}

}  // namespace

cudaError_t forward(const Problem& problem, const void* value, const void* locations,
                    const void* weights, void* output, cudaStream_t stream) {
  if (problem.batch * problem.queries * problem.heads * problem.channels == 0) return cudaSuccess;
  return dispatch(problem, [&](auto value_type, auto weight_type) {
    using Value = typename decltype(value_type)::type;
    using Weight = typename decltype(weight_type)::type;
    const auto launch_kernel = can_use_packs(problem, sizeof(Value), {value, output})
                                   ? launch_forward<Value, Weight, kPackSize<Value>>
                                   : launch_forward<Value, Weight, 1>;
    return launch_kernel(problem, value, locations, weights, output, stream);
  });
}

}  // namespace cuda
}  // namespace dn_detr
