// What the forward and the backward kernels share: number types, who computes what, and where a
// sampling point lies.
//
// An item is one (batch, query, head). It is served by `lanes` neighbouring threads of one warp,
// each of which holds kChannels neighbouring channels (16 bytes of them where memory is aligned).
// Every lane works out one sampling point at a time and hands it to the others through shared
// memory, so that this arithmetic is done once for a point instead of once for every channel. Items
// never cross warps: nothing but __syncwarp() is needed, and all threads of a warp reach all of
// them. A block takes consecutive queries of one head: in an encoder these read neighbouring pixels,
// which the L1 cache then serves.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels.h"

namespace dn_detr {
namespace cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarpSize = 32;

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

template <typename T>
constexpr int kPackSize = 16 / sizeof(T);  // the widest access there is

struct Map {
  int height, width, first_token, first_point;
};

// The Problem as a kernel parameter.
struct Layout {
  int64_t value_batch_stride;  // elements
  int value_token_stride;      // bytes
  int tokens, heads, channels, queries, points, query_blocks, num_levels;
  Map levels[kMaxLevels];
};

// The item of this thread.
struct Item {
  int lane, lanes;  // this thread among those of the item
  int head;
  int64_t batch;
  int64_t index;  // in tensors [batch, query, head, ...]
  bool exists;    // the last block of an image may have items to spare
};

__device__ inline Item this_item(const Layout& layout) {
  const unsigned block = blockIdx.x / layout.heads;
  const unsigned batch = block / layout.query_blocks;
  const unsigned query = (block - batch * layout.query_blocks) * blockDim.y + threadIdx.y;
  Item item;
  item.lane = threadIdx.x;
  item.lanes = blockDim.x;
  item.head = blockIdx.x - block * layout.heads;
  item.batch = batch;
  item.exists = query < layout.queries;
  item.index = (item.batch * layout.queries + query) * layout.heads + item.head;
  return item;
}

// A point's location and weight as they are stored; read before they are needed.
template <typename R>
struct Sample {
  R x, y, weight;
};

template <typename R, typename Weight>
__device__ Sample<R> read_sample(const Layout& layout, const Item& item, int point,
                                 const R* __restrict__ locations,
                                 const Weight* __restrict__ weights) {
  // what is not there reads as a point that is outside of every map
  if (!item.exists || point >= layout.points) return {R(-1e30), R(-1e30), R(0)};
  const int64_t index = item.index * layout.points + point;
  return {locations[2 * index], locations[2 * index + 1], R(to_real(weights[index]))};
}

// A sampling point on its map.
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
  place.map = layout.levels[0];
  for (int level = 1; level < layout.num_levels; ++level) {
    if (point >= layout.levels[level].first_point) place.map = layout.levels[level];
  }
  const R column = x * place.map.width - R(0.5), row = y * place.map.height - R(0.5);
  // so written that NaN is inside
  place.inside = !(column < -1 || column >= place.map.width || row < -1 || row >= place.map.height);
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
