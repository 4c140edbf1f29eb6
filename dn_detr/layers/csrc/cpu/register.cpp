// The operators on the CPU: which instruction set, how the work is cut, and who does which part.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../arguments.h"
#include "kernels.h"
#include "memory.h"

namespace dn_detr::cpu {
namespace {

// The sets that this CPU has, the best first.
const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> sets = [] {
    std::vector<const Kernels*> found;
    for (const Kernels* set : {
#if defined(__x86_64__)
             avx512::kernels(), avx2::kernels(),
#endif
             generic::kernels()}) {
      if (set != nullptr) found.push_back(set);
    }
    return found;
  }();
  return sets;
}

size_t index_of(const std::string& name) {
  std::string names;
  for (size_t i = 0; i < available().size(); ++i) {
    if (name == available()[i]->name) return i;
    names += std::string(i ? ", " : "") + available()[i]->name;
  }
  TORCH_CHECK_VALUE(false, "CPU instructions: this CPU and build have ", names, ", not ", name);
}

// Index of the best set that may be used.
std::atomic<size_t>& best_allowed() {
  static std::atomic<size_t> index = [] {
    const char* name = std::getenv("DN_DETR_CPU_INSTRUCTIONS");
    return name != nullptr && *name != '\0' ? index_of(name) : size_t{0};
  }();
  return index;
}

std::string cpu_instructions(std::optional<c10::string_view> name) {
  if (name.has_value()) best_allowed() = index_of(std::string(name->data(), name->size()));
  return available()[best_allowed()]->name;
}

// Long vectors are no use for narrow heads: the first set whose vectors the channels fill.
const Kernels& kernels_for(const Problem& problem) {
  for (size_t i = best_allowed(); i < available().size(); ++i) {
    if (problem.channels % available()[i]->vector_floats == 0) return *available()[i];
  }
  return *available()[best_allowed()];
}

// Calls part(0) ... part(count - 1) on torch's threads. Whoever is free takes the next part, since
// cores may be slower or busy; no result depends on who takes it.
template <typename Part>
void in_parallel(int64_t count, const Part& part) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(at::get_num_threads(), count);
  at::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      for (int64_t i = next++; i < count; i = next++) part(i);
    }
  });
}

// Few samples on large maps hit rows that no cache holds.
bool rows_are_far(const Problem& problem) {
  return problem.queries * problem.points < 4 * problem.tokens;
}

at::Tensor empty_like(const at::Tensor& dense) { return empty(dense.sizes(), dense.options()); }

Call call_of(const Arguments& arguments) {
  TORCH_CHECK_VALUE(arguments.problem.tokens <= std::numeric_limits<int32_t>::max(),
                    "shapes: fewer than 2^31 tokens are needed, got ", arguments.problem.tokens);
  Call call = {};
  call.problem = arguments.problem;
  call.value = arguments.value.const_data_ptr();
  call.locations = arguments.locations.const_data_ptr();
  call.weights = arguments.weights.const_data_ptr();
  call.prefetch = rows_are_far(arguments.problem);
  return call;
}

at::Tensor forward(const at::Tensor& value, at::IntArrayRef shapes,
                   at::IntArrayRef points_per_level, const at::Tensor& locations,
                   const at::Tensor& weights) {
  const Arguments arguments(value, shapes, points_per_level, locations, weights);
  at::Tensor output = empty(arguments.output_sizes(), arguments.value.options());
  Call call = call_of(arguments);
  call.output = output.mutable_data_ptr();
  const Kernels& kernels = kernels_for(call.problem);
  // Parts of some 10 microseconds: more than handing one out costs, and enough of them.
  const Problem& p = call.problem;
  const int64_t work = std::max<int64_t>(1, p.heads * (p.points + 1) * p.channels);
  const int64_t chunk = std::max<int64_t>(1, (int64_t{1} << 16) / work);
  const int64_t queries = p.batch * p.queries;
  in_parallel((queries + chunk - 1) / chunk, [&](int64_t i) {
    kernels.forward(call, i * chunk, std::min(queries, (i + 1) * chunk));
  });
  return output;
}

// At least two slices for each thread. Several heads in one are faster, since the heads of a query
// look at the same region; where there are fewer heads than slices, each level gets one.
std::vector<Slice> slices_of(const Problem& problem) {
  const int64_t wanted = 2 * at::get_num_threads(), all_heads = problem.batch * problem.heads;
  const int64_t heads = std::max<int64_t>(1, std::min(all_heads / wanted, problem.heads));
  const int64_t levels = all_heads < wanted ? 1 : problem.num_levels;
  std::vector<Slice> slices;
  for (int64_t image = 0; image < problem.batch; ++image) {
    for (int64_t head = 0; head < problem.heads; head += heads) {
      for (int64_t level = 0; level < problem.num_levels; level += levels) {
        slices.push_back({image, head, std::min(head + heads, problem.heads), level,
                          level + levels});
      }
    }
  }
  return slices;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& gradient, const at::Tensor& value, at::IntArrayRef shapes,
    at::IntArrayRef points_per_level, const at::Tensor& locations, const at::Tensor& weights) {
  const Arguments arguments(value, shapes, points_per_level, locations, weights);
  const at::Tensor dense_gradient = arguments.checked_gradient(gradient);
  at::Tensor value_gradient = empty(arguments.value_sizes(), arguments.sum_options());
  at::Tensor location_gradient = empty_like(arguments.locations);
  at::Tensor weight_gradient = empty_like(arguments.weights);
  Call call = call_of(arguments);
  call.gradient = dense_gradient.const_data_ptr();
  call.value_gradient = value_gradient.mutable_data_ptr();
  call.location_gradient = location_gradient.mutable_data_ptr();
  call.weight_gradient = weight_gradient.mutable_data_ptr();
  const Kernels& kernels = kernels_for(call.problem);
  const std::vector<Slice> slices = slices_of(call.problem);
  in_parallel(slices.size(), [&](int64_t i) { kernels.backward(call, slices[i]); });
  return {value_gradient.to(value.scalar_type()), location_gradient, weight_gradient};
}

}  // namespace
}  // namespace dn_detr::cpu

TORCH_LIBRARY_FRAGMENT(dn_detr, library) {
  library.def("cpu_instructions(str? name) -> str", &dn_detr::cpu::cpu_instructions);
}

TORCH_LIBRARY_IMPL(dn_detr, CPU, library) {
  library.impl("multi_scale_deformable_attention", &dn_detr::cpu::forward);
  library.impl("multi_scale_deformable_attention_backward", &dn_detr::cpu::backward);
}
