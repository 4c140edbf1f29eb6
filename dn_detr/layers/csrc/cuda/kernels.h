// Multi-scale deformable attention on CUDA devices (problem.h says what is computed).
//
// All pointers are device memory on the current device; work is queued on `stream`, nothing waits.
// The result is an error of the launch, or cudaErrorInvalidValue for what the kernels cannot index:
// more than kMaxLevels levels; about 2^31 or more points, queries, heads, channels, accesses in one
// image (of 16 bytes where memory is aligned, else of one channel), or blocks.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../problem.h"

namespace dn_detr {
namespace cuda {

constexpr int kMaxLevels = 64;  // they travel as kernel parameters, 16 bytes each

// Writes every element of `output`.
cudaError_t forward(const Problem& problem, const void* value, const void* locations,
                    const void* weights, void* output, cudaStream_t stream);

struct BackwardTensors {
  const void* gradient;  // of the output: same sizes and type
  const void* value;
  const void* locations;
  const void* weights;
  void* value_gradient;     // dense, float or (kDouble) double; zeros on entry
  void* location_gradient;  // type of locations; every element is written
  void* weight_gradient;    // type of weights; every element is written
  // fixed_point_words(problem) zeros for a gradient of value that is bitwise the same in every run
  // (sums.cuh tells its precision), or nullptr for floating-point atomics, which add in any
  // order. The other two gradients are the same in every run anyway.
  int64_t* fixed_point;
};

int64_t fixed_point_words(const Problem& problem);

cudaError_t backward(const Problem& problem, const BackwardTensors& tensors, cudaStream_t stream);

}  // namespace cuda
}  // namespace dn_detr
