#include "launch.cuh"

namespace dn_detr {
namespace cuda {
namespace {

// The four corners of a point: upper left, upper right, lower left, lower right; their weights, and
// how many accesses they are away from token 0. One that is outside of the map is replaced by its
// neighbour inside, with which it shares that one's weight: so every corner can be read, and only
// pixels that take part are. (A weight of 0 would turn infinity into NaN.)
template <typename R>
__device__ void find_corners(const Place<R>& place, R weight, int token_stride,
                             Pack<R, 4>& weights, Pack<int, 4>& offsets) {
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
  offsets = {(upper_row + left) * token_stride, (upper_row + right) * token_stride,
             (lower_row + left) * token_stride, (lower_row + right) * token_stride};
}

// What the lanes of an item hand to each other: the corners of its points that are inside.
template <typename R>
struct Staged {
  Pack<R, 4>* weights;
  Pack<int, 4>* offsets;

  static constexpr size_t kBytesPerPoint = sizeof(Pack<R, 4>) + sizeof(Pack<int, 4>);

  __device__ explicit Staged(const Item& item) {
    const int pitch = item_pitch(item.lanes);
    auto* all_weights = reinterpret_cast<Pack<R, 4>*>(shared_memory);
    weights = all_weights + threadIdx.y * pitch;
    offsets = reinterpret_cast<Pack<int, 4>*>(all_weights + blockDim.y * pitch) +
              threadIdx.y * pitch;
  }
};

// Adds a sample, of this lane's channels.
template <typename R, typename Value, int kChannels>
__device__ void add_sample(const Staged<R>& staged, int point,
                           const Pack<Value, kChannels>* source, R (&sums)[kChannels]) {
  const Pack<R, 4> weights = staged.weights[point];
  const Pack<int, 4> offsets = staged.offsets[point];
  Pack<Value, kChannels> pixels[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) pixels[k] = source[offsets.at[k]];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    R numbers[kChannels];
    unpack(pixels[k], numbers);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) sums[c] += weights.at[k] * numbers[c];
  }
}

// Blocks of 256 threads that an SM must be able to hold: 5 allow 48 registers for a thread, 4 allow
// 64, 3 allow 80. The most with which no registers have to be kept in memory.
template <typename Value, int kLanes>
constexpr int kLeastBlocks = kLanes == 0 ? 3 : sizeof(Value) == 2 ? 4 : 5;

// With kLanes, heads have kLanes * kChannels channels.
template <typename Value, typename Weight, int kChannels, int kLanes>
__global__ void __launch_bounds__(256, kLeastBlocks<Value, kLanes>)
    forward_kernel(const Layout layout, const Value* __restrict__ value,
                   const Real<Value>* __restrict__ locations, const Weight* __restrict__ weights,
                   Value* __restrict__ output) {
  using R = Real<Value>;
  using Channels = Pack<Value, kChannels>;
  const Item item = this_item<kLanes>(layout);
  const Staged<R> staged(item);
  const int num_channels = kLanes != 0 ? kLanes * kChannels : layout.channels;
  locations += 2 * item.index * layout.points;
  weights += item.index * layout.points;
  value += item.batch * layout.value_batch_stride + int64_t(item.head) * num_channels;
  for (int first_channel = 0; first_channel < num_channels;
       first_channel += item.lanes * kChannels) {
    const int channel = first_channel + item.lane * kChannels;
    const bool has_channels = kLanes != 0 || channel < num_channels;
    // a lane without channels reads what the first one reads
    const auto* source = reinterpret_cast<const Channels*>(value + (has_channels ? channel : 0));
    R sums[kChannels] = {};
    Sample<R> sample = read_sample(layout, item, item.lane, locations, weights);
    for (int first_point = 0; first_point < layout.points; first_point += item.lanes) {
      const int point = first_point + item.lane;
      const Place<R> place = locate(layout, point, sample.x, sample.y);
      const unsigned inside = __ballot_sync(kWholeWarp, place.inside);
      __syncwarp();  // the points before these have been read
      if (place.inside) {
        const int position = __popc(inside & item.before);
        find_corners(place, sample.weight, layout.value_token_stride, staged.weights[position],
                     staged.offsets[position]);
      }
      __syncwarp();
      sample = read_sample(layout, item, point + item.lanes, locations, weights);
      const int count = __popc(inside & item.threads);
      if (kLanes != 0 && count == kLanes) {
#pragma unroll
        for (int p = 0; p < kLanes; ++p) add_sample(staged, p, source, sums);
      } else {
#pragma unroll kLanes != 0 ? 1 : 2
        for (int p = 0; p < count; ++p) add_sample(staged, p, source, sums);
      }
    }
    if (item.exists && has_channels) {
      Channels result;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) store(&result.at[c], sums[c]);
      *reinterpret_cast<Channels*>(output + item.index * num_channels + channel) = result;
    }
  }
}

template <typename Value, typename Weight, int kChannels, int kLanes>
cudaError_t launch_forward(const Problem& problem, const void* value, const void* locations,
                           const void* weights, void* output, cudaStream_t stream) {
  const Plan plan = make_plan(problem, kChannels, Staged<Real<Value>>::kBytesPerPoint);
  if (plan.error != cudaSuccess) return plan.error;
  return launch(plan, stream, forward_kernel<Value, Weight, kChannels, kLanes>,
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
    constexpr int kPack = kPackSize<Value>, kUsualLanes = kUsualChannels / kPack;
    const auto launch_kernel = !can_use_packs(problem, sizeof(Value), {value, output})
                                   ? launch_forward<Value, Weight, 1, 0>
                               : problem.channels == kUsualChannels
                                   ? launch_forward<Value, Weight, kPack, kUsualLanes>
                                   : launch_forward<Value, Weight, kPack, 0>;
    return launch_kernel(problem, value, locations, weights, output, stream);
  });
}

}  // namespace cuda
}  // namespace dn_detr
