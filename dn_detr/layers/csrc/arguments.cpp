#include "arguments.h"

namespace dn_detr {
namespace {

Scalar scalar_of(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Scalar::kFloat;
    case at::kDouble: return Scalar::kDouble;
    case at::kHalf: return Scalar::kHalf;
    case at::kBFloat16: return Scalar::kBFloat16;
    default: TORCH_CHECK_TYPE(false, name, ": no kernel for ", tensor.scalar_type());
  }
}

// Compares before it multiplies or adds, which might overflow.
std::vector<Level> levels_of(at::IntArrayRef shapes, at::IntArrayRef points_per_level,
                             int64_t tokens, int64_t points) {
  TORCH_CHECK_VALUE(shapes.size() == 2 * points_per_level.size(),
                    "shapes: two numbers for each of points_per_level are needed");
  std::vector<Level> levels;
  int64_t token = 0, point = 0;
  for (size_t l = 0; l < points_per_level.size(); ++l) {
    const int64_t height = shapes[2 * l], width = shapes[2 * l + 1], number = points_per_level[l];
    TORCH_CHECK_VALUE(height > 0 && width > 0, "shapes: level ", l, " has no pixels");
    TORCH_CHECK_VALUE(height <= (tokens - token) / width, "shapes: they need more tokens than the ",
                      tokens, " of value");
    TORCH_CHECK_VALUE(number >= 0, "points_per_level: negative at level ", l);
    TORCH_CHECK_VALUE(number <= points - point, "points_per_level: more points than the ", points,
                      " of locations");
    levels.push_back({height, width, token, point, number});
    token += height * width;
    point += number;
  }
  TORCH_CHECK_VALUE(token == tokens, "value: the level shapes add up to ", token, " tokens, got ",
                    tokens);
  TORCH_CHECK_VALUE(point == points, "locations: points_per_level adds up to ", point,
                    " points, got ", points);
  return levels;
}

// A view of value whose heads and channels are dense, copied only where they are not.
at::Tensor with_dense_heads(const at::Tensor& value) {
  const bool dense = (value.size(3) <= 1 || value.stride(3) == 1) &&
                     (value.size(2) <= 1 || value.stride(2) == value.size(3)) &&
                     value.stride(0) >= 0 && value.stride(1) >= 0;
  return dense ? value : value.contiguous();
}

}  // namespace

Arguments::Arguments(const at::Tensor& value_, at::IntArrayRef shapes,
                     at::IntArrayRef points_per_level, const at::Tensor& locations_,
                     const at::Tensor& weights_) {
  TORCH_CHECK_VALUE(value_.dim() == 4, "value: [B, S, H, D] is needed, got ", value_.sizes());
  TORCH_CHECK_VALUE(locations_.dim() == 5, "locations: [B, Q, H, points, 2] is needed, got ",
                    locations_.sizes());
  const int64_t batch = value_.size(0), heads = value_.size(2);
  const int64_t queries = locations_.size(1), points = locations_.size(3);
  levels = levels_of(shapes, points_per_level, value_.size(1), points);
  const std::vector<int64_t> weight_sizes = {batch, queries, heads, points};
  const std::vector<int64_t> location_sizes = {batch, queries, heads, points, 2};
  TORCH_CHECK_VALUE(locations_.sizes() == at::IntArrayRef(location_sizes), "locations: ",
                    at::IntArrayRef(location_sizes), " is needed, got ", locations_.sizes());
  TORCH_CHECK_VALUE(weights_.sizes() == at::IntArrayRef(weight_sizes), "weights: ",
                    at::IntArrayRef(weight_sizes), " is needed, got ", weights_.sizes());
  const Scalar value_type = scalar_of(value_, "value");
  const Scalar weight_type = scalar_of(weights_, "weights");
  TORCH_CHECK_TYPE(
      weight_type == value_type || (weight_type == Scalar::kFloat && value_type != Scalar::kDouble),
      "weights: value's type or float32 is needed, got ", weights_.scalar_type());
  const auto location_type = value_type == Scalar::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_TYPE(locations_.scalar_type() == location_type, "locations: ", location_type,
                   " is needed, got ", locations_.scalar_type());
  TORCH_CHECK_VALUE(
      locations_.device() == value_.device() && weights_.device() == value_.device(),
      "locations, weights: must be on value's device ", value_.device());

  value = with_dense_heads(value_);
  locations = locations_.contiguous();
  weights = weights_.contiguous();
  problem = {batch,       value.size(1), heads,
             value.size(3), queries,    points,
             value.stride(0), value.stride(1), levels.data(),
             static_cast<int64_t>(levels.size()), value_type, weight_type};
}

std::vector<int64_t> Arguments::output_sizes() const {
  return {problem.batch, problem.queries, problem.heads * problem.channels};
}

std::vector<int64_t> Arguments::value_sizes() const {
  return {problem.batch, problem.tokens, problem.heads, problem.channels};
}

at::TensorOptions Arguments::sum_options() const {
  return value.options().dtype(problem.value_type == Scalar::kDouble ? at::kDouble : at::kFloat);
}

at::Tensor Arguments::checked_gradient(const at::Tensor& gradient) const {
  TORCH_CHECK_VALUE(gradient.sizes() == at::IntArrayRef(output_sizes()) &&
                        gradient.scalar_type() == value.scalar_type() &&
                        gradient.device() == value.device(),
                    "gradient: size, type and device of the output are needed, got ",
                    gradient.toString(), gradient.sizes());
  return gradient.contiguous();
}

}  // namespace dn_detr
