// The host's side of a kernel: which instance of it, over which blocks and threads.
#pragma once

#include <initializer_list>

#include "common.cuh"

namespace dn_detr {
namespace cuda {

// How a problem is spread over threads; `error` is cudaSuccess, or why it cannot be.
struct Plan {
  cudaError_t error;
  Layout layout;
  dim3 grid, block;
  size_t shared_bytes;
};

// `bytes_per_point` is the shared memory for one point of one item.
Plan make_plan(const Problem& problem, int channels_per_lane, size_t bytes_per_point);

// Whether the channels of a token begin at multiples of 16 bytes in all tensors at these addresses.
bool can_use_packs(const Problem& problem, int value_size,
                   std::initializer_list<const void*> addresses);

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const Plan& plan, cudaStream_t stream, void (*kernel)(Layout, Parameters...),
                   Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = plan.grid;
  config.blockDim = plan.block;
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, plan.layout, arguments...);
}

template <typename T>
struct Type {
  using type = T;
};

// Calls `function(Type<Value>, Type<Weight>)` with the types of the problem.
template <typename Function>
cudaError_t dispatch(const Problem& problem, const Function& function) {
  const bool float_weights = problem.weight_type == Scalar::kFloat;
  switch (problem.value_type) {
    case Scalar::kFloat: return function(Type<float>(), Type<float>());
    case Scalar::kDouble: return function(Type<double>(), Type<double>());
    case Scalar::kHalf:
      return float_weights ? function(Type<__half>(), Type<float>())
                           : function(Type<__half>(), Type<__half>());
    case Scalar::kBFloat16:
      return float_weights ? function(Type<__nv_bfloat16>(), Type<float>())
                           : function(Type<__nv_bfloat16>(), Type<__nv_bfloat16>());
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace dn_detr
