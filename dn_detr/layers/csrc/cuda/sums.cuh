// How the backward kernel adds up the gradient of value, to which many items add at one address:
// with floating-point atomics, whose result depends on the order in which threads come by, or in
// fixed point, where it does not.
//
// Fixed point: terms are multiplied by 2^shift, rounded to integers of 64 bits and added as such. A
// term is at most bound = max|gradient| * max|weights|, and one address receives at most one unit of
// bilinear weight from each of queries * points; with
//
//   shift = 62 - ceil(log2(queries * points)) - ceil(log2(bound))
//
// no sum can overflow. A term is off by at most 2^-(shift + 1). For 22,223 queries of 16 points that
// is 2^-44 of the bound for every term: float32 (2^-24 of the largest partial sum) is coarser
// wherever the sum exceeds 2^-20 of the bound for each term, and below that a sum is still exact to
// 2^-44 of the bound. For double the result is less precise than with atomics (2^-53).
// Where gradient or weights are not finite, or a term is not (NaN locations, overflow), the whole
// gradient of value is NaN.
#pragma once

#include "common.cuh"

namespace dn_detr {
namespace cuda {

template <typename R>
class FloatingSum {
 public:
  using Target = R*;

  // `first` is the index of this thread's first channel at token 0.
  __device__ FloatingSum(Target target, int64_t first, int elements_per_token)
      : first_(reinterpret_cast<char*>(target + first)),
        bytes_per_token_(elements_per_token * int(sizeof(R))) {}

  template <int kCount>
  __device__ void add(int token, const R (&terms)[kCount]) const {
    R* sums = reinterpret_cast<R*>(first_ + int64_t(token) * bytes_per_token_);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (sizeof(R) == sizeof(float) && kCount % 4 == 0) {
#pragma unroll
      for (int c = 0; c < kCount; c += 4) {
        atomicAdd(reinterpret_cast<float4*>(sums + c),
                  make_float4(terms[c], terms[c + 1], terms[c + 2], terms[c + 3]));
      }
      return;
    }
#endif
#pragma unroll
    for (int c = 0; c < kCount; ++c) atomicAdd(sums + c, terms[c]);
  }

 private:
  char* first_;
  int bytes_per_token_;
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

  __device__ FixedPointSum(Target target, int64_t first, int elements_per_token)
      : sums_(target.words + FixedPoint::kSums + first),
        not_finite_(target.words + FixedPoint::kNotFinite),
        elements_per_token_(elements_per_token),
        scale_(ldexp(1.0, target.shift())) {}

  template <typename R, int kCount>
  __device__ void add(int token, const R (&terms)[kCount]) const {
    unsigned long long* sums = sums_ + int64_t(token) * elements_per_token_;
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      if (isfinite(terms[c])) {
        const long long rounded = __double2ll_rn(terms[c] * scale_);
        atomicAdd(sums + c, static_cast<unsigned long long>(rounded));
      } else {
        atomicMax(not_finite_, 1ull);
      }
    }
  }

 private:
  unsigned long long* sums_;
  unsigned long long* not_finite_;
  int elements_per_token_;
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
