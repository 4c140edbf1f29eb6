// How a problem is spread over threads, blocks and shared memory.
#include "launch.cuh"

#include <climits>

namespace dn_detr {
namespace cuda {
namespace {

// Threads of a block. The kernels need no cooperation beyond a warp, but a big block gathers
// neighbouring queries on one SM (L1). Where few blocks result, as in a decoder, smaller ones
// spread the work over more SMs: 512 are about four for each SM of a large GPU.
constexpr int kMostThreads = 256, kFewestThreads = 64;
constexpr int64_t kEnoughBlocks = 512;

bool fits(int64_t number) { return number >= 0 && number <= INT_MAX - kMostThreads; }

int64_t blocks_of(const Problem& problem, int items) {
  return (problem.queries + items - 1) / items * problem.heads * problem.batch;
}

bool fill_layout(const Problem& problem, int channels_per_lane, Layout& layout) {
  // a single token has no next one, whatever its stride says
  const int64_t value_stride =
      problem.tokens > 1 ? problem.value_token_stride / channels_per_lane : 0;
  const int64_t gradient_stride = problem.heads * problem.channels / channels_per_lane;
  for (int64_t number : {problem.tokens, problem.heads, problem.channels, problem.queries,
                         problem.points, value_stride, gradient_stride}) {
    if (!fits(number)) return false;
  }
  if (!fits(problem.tokens * value_stride) || !fits(problem.tokens * gradient_stride) ||
      problem.num_levels > kMaxLevels) {
    return false;
  }
  layout.value_batch_stride = problem.value_batch_stride;
  layout.value_token_stride = static_cast<int>(value_stride);
  layout.gradient_token_stride = static_cast<int>(gradient_stride);
  layout.tokens = static_cast<int>(problem.tokens);
  layout.heads = static_cast<int>(problem.heads);
  layout.channels = static_cast<int>(problem.channels);
  layout.queries = static_cast<int>(problem.queries);
  layout.points = static_cast<int>(problem.points);
  layout.num_levels = static_cast<int>(problem.num_levels);
  for (Map& map : layout.levels) map = {1, 1, 0, INT_MAX};
  for (int l = 0; l < layout.num_levels; ++l) {
    const Level& level = problem.levels[l];
    layout.levels[l] = {static_cast<int>(level.height), static_cast<int>(level.width),
                        static_cast<int>(level.first_token), static_cast<int>(level.first_point)};
  }
  return true;
}

Divisor make_divisor(int64_t number) {
  unsigned shift = 0;
  while ((int64_t(1) << shift) < number) ++shift;
  const int64_t excess = (int64_t(1) << shift) - number;
  const int64_t multiplier = (excess << 32) / number + 1;
  return {static_cast<unsigned>(number), static_cast<unsigned>(multiplier), shift};
}

}  // namespace

Plan make_plan(const Problem& problem, int channels_per_lane, size_t bytes_per_point) {
  Plan plan = {};
  plan.error = cudaErrorInvalidValue;
  if (!fill_layout(problem, channels_per_lane, plan.layout)) return plan;

  int lanes = 1;
  while (lanes < kWarpSize && lanes * channels_per_lane < plan.layout.channels) lanes *= 2;
  int items = kMostThreads / lanes;
  while (items * lanes > kFewestThreads && blocks_of(problem, items) < kEnoughBlocks) items /= 2;

  const int64_t blocks = blocks_of(problem, items);
  if (blocks > INT_MAX) return plan;
  plan.layout.by_heads = make_divisor(problem.heads);
  plan.layout.by_query_blocks = make_divisor((problem.queries + items - 1) / items);
  plan.grid = dim3(static_cast<unsigned>(blocks));
  plan.block = dim3(lanes, items);
  plan.shared_bytes = items * item_pitch(lanes) * bytes_per_point;
  plan.error = cudaSuccess;
  return plan;
}

bool can_use_packs(const Problem& problem, int value_size,
                   std::initializer_list<const void*> addresses) {
  uintptr_t bits = uintptr_t(problem.channels * value_size) |
                   uintptr_t(problem.value_batch_stride * value_size) |
                   uintptr_t(problem.value_token_stride * value_size);
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  return bits % 16 == 0;
}

}  // namespace cuda
}  // namespace dn_detr
