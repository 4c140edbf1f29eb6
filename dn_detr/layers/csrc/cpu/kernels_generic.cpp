// The kernels for any CPU: vectors of 16 bytes.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#define DN_DETR_INSTRUCTIONS generic
#define DN_DETR_VECTOR_BYTES 16
#define DN_DETR_SUPPORTED true
#include "kernels_impl.h"
