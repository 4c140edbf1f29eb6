#include "memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dn_detr::cpu {
namespace {

// Undefined where malloc is to be used.
at::Tensor from_system(at::IntArrayRef sizes, const at::TensorOptions& options) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kMallocMaximum = size_t{32} << 20;  // glibc's DEFAULT_MMAP_THRESHOLD_MAX
  constexpr size_t kHugePage = size_t{2} << 20;
  size_t bytes = options.dtype().itemsize();
  for (int64_t size : sizes) bytes *= size;
  if (bytes <= kMallocMaximum) return {};
  // Room to begin at the boundary of a huge page.
  const size_t mapped = bytes + kHugePage;
  void* start = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return {};
  const size_t rest = reinterpret_cast<uintptr_t>(start) % kHugePage;
  char* data = static_cast<char*>(start) + (rest == 0 ? 0 : kHugePage - rest);
  madvise(data, bytes, MADV_HUGEPAGE);  // a wish: small pages serve as well
  return at::from_blob(data, sizes, [start, mapped](void*) { munmap(start, mapped); }, options);
#else
  return {};
#endif
}

}  // namespace

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const at::Tensor tensor = from_system(sizes, options);
  return tensor.defined() ? tensor : at::empty(sizes, options);
}

}  // namespace dn_detr::cpu
