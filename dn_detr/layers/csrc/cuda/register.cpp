// The operators on CUDA devices.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "../arguments.h"
#include "kernels.h"

namespace dn_detr {
namespace cuda {
namespace {

void check(const Problem& problem) {
  TORCH_CHECK_VALUE(problem.num_levels <= kMaxLevels, "shapes: on CUDA there may be ", kMaxLevels,
                    " levels, got ", problem.num_levels);
}

at::Tensor forward_op(const at::Tensor& value, at::IntArrayRef shapes,
                      at::IntArrayRef points_per_level, const at::Tensor& locations,
                      const at::Tensor& weights) {
  const Arguments arguments(value, shapes, points_per_level, locations, weights);
  const c10::cuda::CUDAGuard guard(value.device());
  check(arguments.problem);
  at::Tensor output = at::empty(arguments.output_sizes(), arguments.value.options());
  C10_CUDA_CHECK(forward(arguments.problem, arguments.value.const_data_ptr(),
                         arguments.locations.const_data_ptr(), arguments.weights.const_data_ptr(),
                         output.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_op(
    const at::Tensor& gradient, const at::Tensor& value, at::IntArrayRef shapes,
    at::IntArrayRef points_per_level, const at::Tensor& locations, const at::Tensor& weights) {
  const Arguments arguments(value, shapes, points_per_level, locations, weights);
  const c10::cuda::CUDAGuard guard(value.device());
  check(arguments.problem);
  const at::Tensor dense_gradient = arguments.checked_gradient(gradient);
  const at::Tensor value_gradient = at::zeros(arguments.value_sizes(), arguments.sum_options());
  at::Tensor location_gradient = at::empty_like(arguments.locations);
  at::Tensor weight_gradient = at::empty_like(arguments.weights);
  at::Tensor fixed_point;
  if (at::globalContext().deterministicAlgorithms()) {
    fixed_point = at::zeros({fixed_point_words(arguments.problem)},
                            arguments.sum_options().dtype(at::kLong));
  }
  BackwardTensors tensors = {};
  tensors.gradient = dense_gradient.const_data_ptr();
  tensors.value = arguments.value.const_data_ptr();
  tensors.locations = arguments.locations.const_data_ptr();
  tensors.weights = arguments.weights.const_data_ptr();
  tensors.value_gradient = value_gradient.mutable_data_ptr();
  tensors.location_gradient = location_gradient.mutable_data_ptr();
  tensors.weight_gradient = weight_gradient.mutable_data_ptr();
  if (fixed_point.defined()) tensors.fixed_point = fixed_point.mutable_data_ptr<int64_t>();
  C10_CUDA_CHECK(backward(arguments.problem, tensors, c10::cuda::getCurrentCUDAStream()));
  return {value_gradient.to(value.scalar_type()), location_gradient, weight_gradient};
}

}  // namespace
}  // namespace cuda
}  // namespace dn_detr

TORCH_LIBRARY_IMPL(dn_detr, CUDA, library) {
  library.impl("multi_scale_deformable_attention", &dn_detr::cuda::forward_op);
  library.impl("multi_scale_deformable_attention_backward", &dn_detr::cuda::backward_op);
}
