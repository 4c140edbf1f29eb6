#include "memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dn_detr::cpu {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
namespace {

constexpr size_t kMallocMaximum = size_t{32} << 20;  // glibc's DEFAULT_MMAP_THRESHOLD_MAX
constexpr size_t kHugePage = size_t{2} << 20;

struct Mapping {
  void* start;
  size_t bytes;
};

void unmap(void* context) {
  const auto* mapping = static_cast<const Mapping*>(context);
  munmap(mapping->start, mapping->bytes);
  delete mapping;
}

class HugePages final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    // Room to begin at the boundary of a huge page.
    const size_t mapped = bytes + kHugePage;
    void* start = bytes <= kMallocMaximum ? MAP_FAILED
                                          : mmap(nullptr, mapped, PROT_READ | PROT_WRITE,
                                                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return c10::GetCPUAllocator()->allocate(bytes);
    const size_t beyond = reinterpret_cast<uintptr_t>(start) % kHugePage;
    char* data = static_cast<char*>(start) + (beyond == 0 ? 0 : kHugePage - beyond);
    madvise(data, bytes, MADV_HUGEPAGE);  // a wish: small pages serve as well
    return {data, new Mapping{start, mapped}, &unmap, c10::Device(c10::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  static HugePages allocator;
  return at::detail::empty_generic(sizes, &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   options.dtype().toScalarType(), std::nullopt);
}
#else
at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::empty(sizes, options);
}
#endif

}  // namespace dn_detr::cpu
