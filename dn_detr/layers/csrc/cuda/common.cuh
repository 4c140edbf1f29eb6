// What the forward and the backward kernels share: number types, who computes what, and where a
// sampling point lies.
//
// An item is one (batch, query, head). It is served by `lanes` neighbouring threads of one warp,
// each of which holds kChannels neighbouring channels (16 bytes of them where memory is aligned).
// Every lane works out one sampling point at a time and hands it to the others through shared
// memory, so that this arithmetic is done once for a point instead of once for every channel. Items
// never cross warps: nothing but __syncwarp() is needed, and all threads of a warp reach all of
// them. A block takes consecutive queries of one head: in an encoder these read pixels near each
// other, which the L1 cache then serves.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace dn_detr {
namespace cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarpSize = 32;

// Of nearly all models; the kernels have an instance for this number of channels.
constexpr int kUsualChannels = 32;
// Up to this number, levels are looked through without a loop.
constexpr int kFewLevels = 4;

extern __shared__ __align__(16) unsigned char shared_memory[];

// The type that values of type T are computed in.
template <typename T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <typename T>
using Real = typename Arithmetic<T>::type;

__device__ inline float to_real(float number) { return number; }
__device__ inline double to_real(double number) { return number; }
__device__ inline float to_real(__half number) { return __half2float(number); }
__device__ inline float to_real(__nv_bfloat16 number) { return __bfloat162float(number); }

__device__ inline void store(float* target, float number) { *target = number; }
__device__ inline void store(double* target, double number) { *target = number; }
__device__ inline void store(__half* target, float number) { *target = __float2half_rn(number); }
__device__ inline void store(__nv_bfloat16* target, float number) {
  *target = __float2bfloat16_rn(number);
}

// Numbers that are read and written in one access.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount > 16 ? 16 : sizeof(T) * kCount) Pack {
  T at[kCount];
};

template <typename T, int kCount>
__device__ void unpack(const Pack<T, kCount>& pack, Real<T> (&numbers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) numbers[i] = to_real(pack.at[i]);
}

// A bfloat16 is the upper half of a float: one instruction each, where __bfloat162float takes two
// for every other number.
__device__ inline void unpack(const Pack<__nv_bfloat16, 8>& pack, float (&numbers)[8]) {
  unsigned pairs[4];
  memcpy(pairs, &pack, sizeof(pairs));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    numbers[2 * i] = __uint_as_float(pairs[i] << 16);
    numbers[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
  }
}

template <typename T>
constexpr int kPackSize = 16 / sizeof(T);  // the widest access there is

// Division by a number known to the host, of dividends below 2^31: n / d = (n * m / 2^32 + n) / 2^s
// with m from 2^32 * (2^s - d) / d, rounded up (Granlund and Montgomery, PLDI 1994).
struct Divisor {
  unsigned divisor, multiplier, shift;

  __device__ unsigned divide(unsigned dividend) const {
    return (__umulhi(dividend, multiplier) + dividend) >> shift;
  }
};

struct Map {
  int height, width, first_token, first_point;
};

// The Problem as a kernel parameter.
struct Layout {
  int64_t value_batch_stride;  // elements
  int value_token_stride;      // accesses, each of kChannels elements
  int gradient_token_stride;   // the same, of the dense gradient of value
  int tokens, heads, channels, queries, points, num_levels;
  Divisor by_heads, by_query_blocks;
  Map levels[kMaxLevels];  // those that are not there begin at point INT_MAX
};

// The item of this thread.
struct Item {
  int lane, lanes;           // this thread among those of the item
  unsigned threads, before;  // bits of the item's threads in the warp, and of those before this one
  int head;
  int64_t batch;
  int64_t index;  // in tensors [batch, query, head, ...]
  bool exists;    // the last block of an image may have items to spare
};

// kLanes is the number of lanes where the compiler knows it, otherwise 0.
template <int kLanes>
__device__ Item this_item(const Layout& layout) {
  const unsigned block = layout.by_heads.divide(blockIdx.x);
  const unsigned batch = layout.by_query_blocks.divide(block);
  const unsigned query_block = block - batch * layout.by_query_blocks.divisor;
  const unsigned query = query_block * blockDim.y + threadIdx.y;
  Item item;
  item.lane = threadIdx.x;
  item.lanes = kLanes != 0 ? kLanes : blockDim.x;
  const unsigned thread = (threadIdx.y * item.lanes + item.lane) % kWarpSize;
  item.threads = (kWholeWarp >> (kWarpSize - item.lanes)) << (thread - item.lane);
  item.before = item.threads & ((1u << thread) - 1);
  item.head = blockIdx.x - block * layout.by_heads.divisor;
  item.batch = batch;
  item.exists = query < layout.queries;
  item.index = (int64_t(batch) * layout.queries + query) * layout.heads + item.head;
  return item;
}

// A point's location and weight as they are stored; read before they are needed.
template <typename R>
struct Sample {
  R x, y, weight;
};

// `locations` and `weights` are those of the item. What is not there reads as a point that is
// outside of every map.
template <typename R, typename Weight>
__device__ Sample<R> read_sample(const Layout& layout, const Item& item, int point,
                                 const R* __restrict__ locations,
                                 const Weight* __restrict__ weights) {
  if (!item.exists || point >= layout.points) return {R(-1e30), R(-1e30), R(0)};
  const R* location = locations + 2 * int64_t(point);
  return {location[0], location[1], R(to_real(weights[point]))};
}

// A sampling point on its map; where it is not inside, the numbers are 0.
template <typename R>
struct Place {
  Map map;
  bool inside;      // has at least one corner on the map
  int row, column;  // of its upper left corner; -1 is outside
  R lower, right;   // bilinear weights of the lower and the right corners
};

template <typename R>
__device__ Place<R> locate(const Layout& layout, int point, R x, R y) {
  Place<R> place;
  int level = 0;
#pragma unroll
  for (int next = 1; next < kFewLevels; ++next) level += point >= layout.levels[next].first_point;
#pragma unroll 1
  for (int next = kFewLevels; next < layout.num_levels; ++next) {
    level += point >= layout.levels[next].first_point;
  }
  place.map = layout.levels[level];
  R column = x * place.map.width - R(0.5), row = y * place.map.height - R(0.5);
  // so written that NaN is inside
  place.inside = !(column < -1 || column >= place.map.width || row < -1 || row >= place.map.height);
  if (!place.inside) column = row = 0;
  place.right = column - floor(column);
  place.lower = row - floor(row);
  // the maximum of NaN and -1 is -1, which makes an address out of NaN
  place.column = static_cast<int>(fmax(floor(column), R(-1)));
  place.row = static_cast<int>(fmax(floor(row), R(-1)));
  return place;
}

// Where the points of an item begin in shared memory. The odd distance from an item to the next one
// puts the points that a warp reads together into different banks.
__host__ __device__ inline int item_pitch(int lanes) { return lanes | 1; }

}  // namespace cuda
}  // namespace dn_detr
