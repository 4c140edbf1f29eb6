// What one call computes, in plain C++: for the CPU and the CUDA kernels, which know no torch.
#pragma once

#include <cstdint>

namespace dn_detr {

// How values and weights are stored. Arithmetic is float throughout, double for kDouble.
enum class Scalar { kFloat, kDouble, kHalf, kBFloat16 };

// One map of the pyramid, and the sampling points that lie on it.
struct Level {
  int64_t height;
  int64_t width;
  int64_t first_token;  // its rows lie one after the other in the token axis
  int64_t first_point;  // its points lie one after the other in the point axis
  int64_t num_points;
};

// Multi-scale deformable attention (Deformable DETR, Zhu et al., ICLR 2021, equation 3):
//
//   output[b, q, h, :] = sum over points p of weights[b, q, h, p] * sample(value[b, :, h, :], p)
//
// where a point at (x, y) in 0..1 of a map lies at pixel (x * width - 0.5, y * height - 0.5), and a
// sample is the bilinear mean of the (up to) four pixels around it; pixels outside of the map do
// not take part. A coordinate that is NaN makes the result NaN.
//
//   value      [batch, tokens, heads, channels]   Scalar; strided in batch and token
//   locations  [batch, queries, heads, points, 2] (x, y), float or (kDouble) double
//   weights    [batch, queries, heads, points]    Scalar, or float
//   output     [batch, queries, heads, channels]  Scalar
//
// All but value are dense; so is the gradient of value, [batch, tokens, heads, channels] in float
// or (kDouble) double, to which the backward kernels add.
struct Problem {
  int64_t batch, tokens, heads, channels, queries, points;
  int64_t value_batch_stride, value_token_stride;  // in elements
  const Level* levels;                             // in host memory
  int64_t num_levels;
  Scalar value_type;
  Scalar weight_type;  // value_type, or kFloat
};

}  // namespace dn_detr
