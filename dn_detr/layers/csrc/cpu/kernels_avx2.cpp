// The kernels for x86 CPUs with AVX2.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

// From here on, and not for the standard library above, whose functions other files share.
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define DN_DETR_INSTRUCTIONS avx2
#define DN_DETR_VECTOR_BYTES 32
#include "kernels_impl.h"

namespace dn_detr::cpu {

const Kernels* avx2_kernels() {
  static const Kernels kernels = {"avx2", DN_DETR_VECTOR_BYTES / 4, avx2::forward_of_any_type,
                                  avx2::backward_of_any_type};
  // f16c is not asked for: older compilers do not know its name, and every CPU with AVX2 has it.
  const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return supported ? &kernels : nullptr;
}

}  // namespace dn_detr::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace dn_detr::cpu {

const Kernels* avx2_kernels() { return nullptr; }

}  // namespace dn_detr::cpu

#endif
