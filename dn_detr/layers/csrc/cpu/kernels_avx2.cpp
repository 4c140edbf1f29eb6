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
// f16c is not asked for: older compilers do not know its name, and every CPU with AVX2 has it.
#define DN_DETR_SUPPORTED (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#include "kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
