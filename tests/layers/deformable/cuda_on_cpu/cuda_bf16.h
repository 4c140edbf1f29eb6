#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 bfloat) {
  const uint32_t bits = uint32_t(bfloat.bits) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

// To the nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16_rn(float number) {
  if (std::isnan(number)) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
