// From tensors to the plain description that the kernels take.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "problem.h"

namespace dn_detr {

// The tensors of a call as the kernels need them (dense where they must be), and their Problem.
struct Arguments {
  at::Tensor value, locations, weights;
  std::vector<Level> levels;
  Problem problem;  // points into `levels`

  // Raises c10::ValueError or c10::TypeError where a kernel would read outside of a tensor. The
  // Python function has checked the same with more helpful words; this guards torch.ops and
  // exported programs, which come here directly.
  //
  //   shapes            h0, w0, h1, w1, ... of the levels
  //   points_per_level  number of points of every level
  Arguments(const at::Tensor& value, at::IntArrayRef shapes, at::IntArrayRef points_per_level,
            const at::Tensor& locations, const at::Tensor& weights);
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;

  // Size of the output: B, Q, H * D.
  std::vector<int64_t> output_sizes() const;

  // Size of value's gradient: B, S, H, D.
  std::vector<int64_t> value_sizes() const;

  // What gradients of value are summed up in: its type, but at least float.
  at::TensorOptions sum_options() const;

  // The gradient of the output, checked and dense.
  at::Tensor checked_gradient(const at::Tensor& gradient) const;
};

}  // namespace dn_detr
