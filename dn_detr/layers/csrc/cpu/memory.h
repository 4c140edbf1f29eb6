// Memory for large results.
#pragma once

#include <ATen/core/Tensor.h>

namespace dn_detr::cpu {

// A dense tensor, not initialised.
//
// Beyond 32 MiB, malloc takes fresh pages from the system on every call, and a decoder's backward
// pass would spend as much time on the faults of 4 KiB pages as on its arithmetic. Such a tensor
// gets huge pages where Linux has them.
at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace dn_detr::cpu
