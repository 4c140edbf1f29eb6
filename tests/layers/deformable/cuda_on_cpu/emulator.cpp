// Runs the threads of a block as fibers, and gives the kernels to Python.
#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"
#include "kernels.h"

namespace dn_detr {
namespace cuda {
alignas(16) unsigned char shared_memory[emulator::kSharedBytes];
}
}  // namespace dn_detr

namespace emulator {
namespace {

constexpr size_t kStackBytes = 128 * 1024;

struct Fiber {
  ucontext_t start;
  jmp_buf state;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool started;
  dim3 index;
};

// Threads that wait for each other: a block, or a warp.
struct Group {
  std::vector<int> waiting;
  Meeting meeting;
  int meetings = 0;
  uint64_t brought[2][kWarpSize];  // in turns: a thread may be at the next meeting already
};

std::mt19937_64 random_bits;
std::vector<Fiber> fibers(kMaxThreads);
std::vector<Group> warps;
Group block;
std::vector<int> runnable;
int current, num_threads, num_done;
bool broken;  // threads met that should not have
const std::function<void()>* kernel_of_fibers;
ucontext_t scheduler_start;
jmp_buf scheduler;

void run_fiber() {
  (*kernel_of_fibers)();
  ++num_done;
  _longjmp(scheduler, 1);
}

// Contexts are switched by _longjmp, which, unlike swapcontext, needs no system call.
void resume(int thread) {
  Fiber& fiber = fibers[current = thread];
  threadIdx = fiber.index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.start, run_fiber, 0);
  swapcontext(&scheduler_start, &fiber.start);
}

void meet(Group& group, Meeting meeting, int size) {
  if (group.waiting.empty()) group.meeting = meeting;
  broken = broken || group.meeting != meeting;
  group.waiting.push_back(current);
  if (int(group.waiting.size()) == size) {
    runnable.insert(runnable.end(), group.waiting.begin(), group.waiting.end());
    group.waiting.clear();
    ++group.meetings;
  }
  if (_setjmp(fibers[current].state) == 0) _longjmp(scheduler, 1);
}

// False where threads waited for others that never came.
bool run_block(size_t shared_bytes) {
  // as float NaN, as an integer an address far away; what was not asked for must stay as it is
  const uint32_t poison = 0x7fc00000u;
  auto* shared = reinterpret_cast<uint32_t*>(dn_detr::cuda::shared_memory);
  const size_t words = kSharedBytes / sizeof(poison);
  std::fill(shared, shared + words, poison);
  warps.assign(num_threads / kWarpSize, Group());
  block = Group();
  runnable.resize(num_threads);
  std::iota(runnable.begin(), runnable.end(), 0);
  num_done = 0;
  for (int thread = 0; thread < num_threads; ++thread) {
    const unsigned row = thread / blockDim.x;
    fibers[thread].started = false;
    fibers[thread].index = dim3(thread % blockDim.x, row % blockDim.y, row / blockDim.y);
  }
  while (!runnable.empty() && !broken) {
    std::swap(runnable[random_bits() % runnable.size()], runnable.back());
    const int next = runnable.back();
    runnable.pop_back();
    resume(next);
  }
  const bool overrun = std::any_of(shared + (shared_bytes + 3) / 4, shared + words,
                                   [&](uint32_t word) { return word != poison; });
  return num_done == num_threads && !broken && !overrun;
}

}  // namespace

void meet_block() { meet(block, Meeting::kSyncThreads, num_threads); }

const uint64_t* meet_warp(Meeting meeting, unsigned mask, uint64_t brought) {
  broken = broken || mask != 0xffffffffu;  // parts of a warp are not emulated
  Group& warp = warps[current / kWarpSize];
  uint64_t* all = warp.brought[warp.meetings % 2];
  all[current % kWarpSize] = brought;
  meet(warp, meeting, kWarpSize);
  return all;
}

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const dim3 grid = gridDim = config.gridDim, threads = blockDim = config.blockDim;
  num_threads = threads.x * threads.y * threads.z;
  if (num_threads == 0 || num_threads > kMaxThreads || num_threads % kWarpSize != 0 ||
      grid.x == 0 || grid.x > 0x7fffffffu || grid.y != 1 || grid.z != 1 ||
      config.dynamicSmemBytes > kSharedBytes) {
    return cudaErrorInvalidConfiguration;
  }
  kernel_of_fibers = &kernel;
  broken = false;
  std::vector<unsigned> blocks(grid.x);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), random_bits);
  for (unsigned index : blocks) {
    blockIdx = dim3(index, 0, 0);
    if (!run_block(config.dynamicSmemBytes)) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace emulator

extern "C" {

void set_seed(uint64_t seed) { emulator::random_bits.seed(seed); }

int64_t fixed_point_words(const dn_detr::Problem* problem) {
  return dn_detr::cuda::fixed_point_words(*problem);
}

int forward(const dn_detr::Problem* problem, const void* value, const void* locations,
            const void* weights, void* output) {
  return dn_detr::cuda::forward(*problem, value, locations, weights, output, nullptr);
}

int backward(const dn_detr::Problem* problem, const dn_detr::cuda::BackwardTensors* tensors) {
  return dn_detr::cuda::backward(*problem, *tensors, nullptr);
}
}
