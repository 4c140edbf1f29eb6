// How the backward kernel adds up the gradient of value, to which many items add at one address:
// with floating-point atomics, whose result depends on the order in which threads come by, or in
// fixed point, where it does not.
//
// Fixed point: terms are multiplied by 2^shift, rounded to integers of 64 bits and added as such. A
// term is at most bound = max|gradient| * max|weights|, and one address receives at most one unit
// of bilinear weight from each of queries * points. With
//
//   shift = 62 - ceil(log2(queries * points)) - ceil(log2(bound))
//
// no sum can overflow, and a term is off by at most 2^-(shift + 1): for 22,223 queries of 16 points
// by 2^-44 of the bound. A float sum is off by 2^-25 of its partial sums with every term, which is
// more wherever these exceed 2^-19 of the bound. Sums of double are less precise than with atomics.
// Where gradient or weights are not finite, or a term is not (NaN locations, overflow), the whole
// gradient of value is NaN.
#pragma once

#include "common.cuh"

namespace dn_detr {
namespace cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasVectorAtomics = true;
__device__ inline void add_vector(float* sums, float a, float b, float c, float d) {
  atomicAdd(reinterpret_cast<float4*>(sums), make_float4(a, b, c, d));
}
#else
constexpr bool kHasVectorAtomics = false;
__device__ inline void add_vector(...) {}
#endif

// Terms are added to kCount neighbouring sums; offsets count accesses of so many.
template <typename R, int kCount>
class FloatingSum {
 public:
  using Target = R*;

  __device__ FloatingSum(Target target, int64_t first)
      : first_(reinterpret_cast<Sums*>(target + first)) {}

  __device__ void add(int offset, const R (&terms)[kCount]) const {
    R(&sums)[kCount] = first_[offset];
    if constexpr (kHasVectorAtomics && sizeof(R) == sizeof(float) && kCount % 4 == 0) {
#pragma unroll
      for (int c = 0; c < kCount; c += 4) {
        add_vector(sums + c, terms[c], terms[c + 1], terms[c + 2], terms[c + 3]);
      }
    } else {
#pragma unroll
      for (int c = 0; c < kCount; ++c) atomicAdd(sums + c, terms[c]);
    }
  }

 private:
  using Sums = R[kCount];
  Sums* first_;
};

// Words of 64 bits in device memory, zeros at first.
struct FixedPoint {
  static constexpr int kMaxGradient = 0;  // bits of a double
  static constexpr int kMaxWeight = 1;    // bits of a double
  static constexpr int kNotFinite = 2;    // 1 once a term was not finite
  static constexpr int kSums = 4;         // index of the first sum

  unsigned long long* words;
  int term_bits;  // ceil(log2(queries * points))

  __device__ double bound() const {
    return __longlong_as_double(static_cast<long long>(words[kMaxGradient])) *
           __longlong_as_double(static_cast<long long>(words[kMaxWeight]));
  }

  __device__ int shift() const {
    int bound_bits = 0;
    frexp(bound(), &bound_bits);
    return min(62 - term_bits - bound_bits, 1000);  // 2^1000 is a double
  }
};

class FixedPointSum {
 public:
  using Target = FixedPoint;

  __device__ FixedPointSum(Target target, int64_t first)
      : first_(target.words + FixedPoint::kSums + first),
        not_finite_(target.words + FixedPoint::kNotFinite),
        scale_(ldexp(1.0, target.shift())) {}

  template <typename R>
  __device__ void add(int offset, const R (&terms)[1]) const {
    if (isfinite(terms[0])) {
      const long long rounded = __double2ll_rn(terms[0] * scale_);
      atomicAdd(first_ + offset, static_cast<unsigned long long>(rounded));
    } else {
      atomicMax(not_finite_, 1ull);
    }
  }

 private:
  unsigned long long* first_;
  unsigned long long* not_finite_;
  double scale_;
};

// Fills FixedPoint::kMaxGradient and kMaxWeight.
cudaError_t find_bounds(const Problem& problem, const void* gradient, const void* weights,
                        const FixedPoint& fixed_point, cudaStream_t stream);

// Writes the sums to value_gradient (float or, for kDouble, double).
cudaError_t convert_sums(const Problem& problem, const FixedPoint& fixed_point,
                         void* value_gradient, cudaStream_t stream);

FixedPoint make_fixed_point(const Problem& problem, int64_t* words);

}  // namespace cuda
}  // namespace dn_detr
