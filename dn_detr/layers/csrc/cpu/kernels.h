// The CPU kernels, compiled once for each instruction set: kernels_*.cpp. They know no torch.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace dn_detr::cpu {

// One call to be computed in parts, by any number of threads. Gradients are null in the forward.
struct Call {
  Problem problem;
  const void* value;
  const void* locations;
  const void* weights;
  void* output;
  const void* gradient;  // of the output
  void* value_gradient;  // whatever is in it, the slices together write all of it
  void* location_gradient;
  void* weight_gradient;
  bool prefetch;  // rows are not in a near cache: fetch those of the next query ahead
};

// A share of the backward pass that writes a part of value's gradient of its own: one image, some
// of its heads, some of its levels.
struct Slice {
  int64_t image, first_head, last_head, first_level, last_level;
};

struct Kernels {
  const char* name;
  int vector_floats;  // head widths that are multiples of it are fastest
  // Output of the queries [first, last), counted over all images.
  void (*forward)(const Call&, int64_t first, int64_t last);
  void (*backward)(const Call&, const Slice&);
};

// Of each instruction set; null where the CPU that this runs on does not have it.
namespace generic {
const Kernels* kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels* kernels();
}
namespace avx512 {
const Kernels* kernels();
}
#endif

}  // namespace dn_detr::cpu
