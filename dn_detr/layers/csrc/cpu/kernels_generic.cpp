// The kernels for any CPU: vectors of 16 bytes.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#define DN_DETR_INSTRUCTIONS generic
#define DN_DETR_VECTOR_BYTES 16
#include "kernels_impl.h"

namespace dn_detr::cpu {

const Kernels* generic_kernels() {
  static const Kernels kernels = {"generic", DN_DETR_VECTOR_BYTES / 4, generic::forward_of_any_type,
                                  generic::backward_of_any_type};
  return &kernels;
}

}  // namespace dn_detr::cpu
