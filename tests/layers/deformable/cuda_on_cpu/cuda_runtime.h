// Enough of CUDA for g++ to compile this project's .cu files and run them on a CPU: tests execute
// the kernels where there is no GPU.
//
// Blocks run one after the other. The threads of a block are fibers that run until they must wait
// for others (__syncthreads, and what works on a warp); which one goes on is drawn at random, so
// that a missing barrier shows with some seed. emulator.cpp has the machinery.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __host__
#define __device__
#define __global__
#define __shared__
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

using std::fabs, std::floor, std::fmax, std::frexp, std::isfinite, std::ldexp, std::max, std::min;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulator {

constexpr int kWarpSize = 32, kMaxThreads = 1024, kSharedBytes = 48 * 1024;
enum class Meeting { kSyncThreads, kSyncWarp, kBallot, kShuffle };

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);

// Waits until all threads of the block, or of the warp, are at a meeting of the same kind.
void meet_block();
// Returns what each of the 32 threads has brought.
const uint64_t* meet_warp(Meeting meeting, unsigned mask, uint64_t brought);

inline unsigned lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarpSize;
}

}  // namespace emulator

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return emulator::run(*config, [&] { kernel(arguments...); });
}

inline void __syncthreads() { emulator::meet_block(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulator::meet_warp(emulator::Meeting::kSyncWarp, mask, 0);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* brought =
      emulator::meet_warp(emulator::Meeting::kBallot, mask, predicate != 0);
  unsigned votes = 0;
  for (int lane = 0; lane < emulator::kWarpSize; ++lane) votes |= unsigned(brought[lane]) << lane;
  return votes;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* brought = emulator::meet_warp(emulator::Meeting::kShuffle, mask, bits);
  std::memcpy(&value, &brought[emulator::lane() ^ lane_mask], sizeof(T));
  return value;
}

template <typename T>
T atomicAdd(T* target, T term) {
  const T before = *target;
  *target += term;
  return before;
}

template <typename T>
T atomicMax(T* target, T other) {
  const T before = *target;
  *target = std::max(before, other);
  return before;
}

struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float4 atomicAdd(float4* target, float4 term) {
  const float4 before = *target;
  *target = {before.x + term.x, before.y + term.y, before.z + term.z, before.w + term.w};
  return before;
}

inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline long long __double2ll_rn(double number) { return std::llrint(number); }

inline long long __double_as_longlong(double number) {
  long long bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float number;
  std::memcpy(&number, &bits, sizeof(bits));
  return number;
}

inline double __longlong_as_double(long long bits) {
  double number;
  std::memcpy(&number, &bits, sizeof(bits));
  return number;
}
