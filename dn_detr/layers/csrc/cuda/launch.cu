// How a problem is spread over threads, blocks and shared memory.
#include "launch.cuh"

#include <climits>

namespace dn_detr {
namespace cuda {
namespace {

// Threads of a block. The kernels need no cooperation beyond a warp; a big block gathers
// neighbouring queries on one SM (L1). Where few blocks result, as in a decoder, smaller ones spread
// the work over more SMs: 512 is about four for each SM of a large GPU.
constexpr int kMostThreads = 256, kFewestThreads = 64;
constexpr int64_t kEnoughBlocks = 512;

bool fits(int64_t number) { return number >= 0 && number <= INT_MAX - kMostThreads; }

int64_t blocks_of(const Problem& problem, int items) {
  return (problem.queries + items - 1) / items * problem.heads * problem.batch;
}

bool fill_layout(const Problem& problem, int value_size, Layout& layout) {
  // a single token has no next one, whatever its stride says
  const int64_t token_stride = problem.tokens > 1 ? problem.value_token_stride * value_size : 0;
  const int64_t gradient_stride = problem.heads * problem.channels * int64_t(sizeof(int64_t));
  for (int64_t number : {problem.tokens, problem.heads, problem.channels, problem.queries,
                         problem.points, token_stride, gradient_stride}) {
    if (!fits(number)) return false;
  }
  if (problem.num_levels > kMaxLevels) return false;
  layout.value_batch_stride = problem.value_batch_stride;
  layout.value_token_stride = static_cast<int>(token_stride);
  layout.tokens = static_cast<int>(problem.tokens);
  layout.heads = static_cast<int>(problem.heads);
  layout.channels = static_cast<int>(problem.channels);
  layout.queries = static_cast<int>(problem.queries);
  layout.points = static_cast<int>(problem.points);
  layout.num_levels = static_cast<int>(problem.num_levels);
  for (int l = 0; l < layout.num_levels; ++l) {
    const Level& level = problem.levels[l];
    layout.levels[l] = {static_cast<int>(level.height), static_cast<int>(level.width),
                        static_cast<int>(level.first_token), static_cast<int>(level.first_point)};
  }
  return true;
}

}  // namespace

Plan make_plan(const Problem& problem, int channels_per_lane, int value_size, int real_size) {
  Plan plan = {};
  plan.error = cudaErrorInvalidValue;
  if (!fill_layout(problem, value_size, plan.layout)) return plan;

  int lanes = 1;
  while (lanes < kWarpSize && lanes * channels_per_lane < plan.layout.channels) lanes *= 2;
  int items = kMostThreads / lanes;
  while (items * lanes > kFewestThreads && blocks_of(problem, items) < kEnoughBlocks) items /= 2;

  const int64_t blocks = blocks_of(problem, items);
  if (blocks > INT_MAX) return plan;
  plan.layout.query_blocks = static_cast<int>((problem.queries + items - 1) / items);
  plan.grid = dim3(static_cast<unsigned>(blocks));
  plan.block = dim3(lanes, items);
  // four numbers and four tokens for one point of every thread
  plan.shared_bytes = size_t(items) * item_pitch(lanes) * 4 * (real_size + sizeof(int));
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
