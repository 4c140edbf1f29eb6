// Before and after the backward kernel of the deterministic mode (sums.cuh).
#include <algorithm>

#include "launch.cuh"
#include "sums.cuh"

namespace dn_detr {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 4096;  // each thread takes several numbers beyond that

// The largest magnitude, as the bits of a double: these order as integers, NaN above infinity.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    largest_magnitude_kernel(const T* __restrict__ numbers, int64_t count,
                             unsigned long long* result) {
  unsigned long long largest = 0;
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
    const double magnitude = fabs(double(to_real(numbers[i])));
    const auto bits = static_cast<unsigned long long>(__double_as_longlong(magnitude));
    largest = bits > largest ? bits : largest;
  }
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const unsigned long long other = __shfl_xor_sync(kWholeWarp, largest, distance);
    largest = other > largest ? other : largest;
  }
  if (threadIdx.x % kWarpSize == 0) atomicMax(result, largest);
}

template <typename R>
__global__ void __launch_bounds__(kThreads)
    convert_kernel(FixedPoint fixed_point, int64_t count, R* __restrict__ result) {
  const bool finite =
      isfinite(fixed_point.bound()) && fixed_point.words[FixedPoint::kNotFinite] == 0;
  const int shift = fixed_point.shift();
  const unsigned long long* sums = fixed_point.words + FixedPoint::kSums;
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
    const double sum = static_cast<double>(static_cast<long long>(sums[i]));
    result[i] = finite ? R(ldexp(sum, -shift)) : R(NAN);
  }
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_over(int64_t count, cudaStream_t stream, void (*kernel)(Parameters...),
                        Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(std::min((count + kThreads - 1) / kThreads, kMostBlocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

int64_t size_of_value_gradient(const Problem& problem) {
  return problem.batch * problem.tokens * problem.heads * problem.channels;
}

}  // namespace

int64_t fixed_point_words(const Problem& problem) {
  return FixedPoint::kSums + size_of_value_gradient(problem);
}

FixedPoint make_fixed_point(const Problem& problem, int64_t* words) {
  int term_bits = 0;
  while (term_bits < 62 && (int64_t(1) << term_bits) < problem.queries * problem.points) {
    ++term_bits;
  }
  return {reinterpret_cast<unsigned long long*>(words), term_bits};
}

cudaError_t find_bounds(const Problem& problem, const void* gradient, const void* weights,
                        const FixedPoint& fixed_point, cudaStream_t stream) {
  return dispatch(problem, [&](auto value_type, auto weight_type) {
    using Value = typename decltype(value_type)::type;
    using Weight = typename decltype(weight_type)::type;
    const int64_t items = problem.batch * problem.queries * problem.heads;
    if (items * problem.channels > 0) {
      const cudaError_t error = launch_over(
          items * problem.channels, stream, largest_magnitude_kernel<Value>,
          static_cast<const Value*>(gradient), items * problem.channels,
          fixed_point.words + FixedPoint::kMaxGradient);
      if (error != cudaSuccess) return error;
    }
    return launch_over(items * problem.points, stream, largest_magnitude_kernel<Weight>,
                       static_cast<const Weight*>(weights), items * problem.points,
                       fixed_point.words + FixedPoint::kMaxWeight);
  });
}

cudaError_t convert_sums(const Problem& problem, const FixedPoint& fixed_point,
                         void* value_gradient, cudaStream_t stream) {
  const int64_t count = size_of_value_gradient(problem);
  if (count == 0) return cudaSuccess;
  if (problem.value_type == Scalar::kDouble) {
    return launch_over(count, stream, convert_kernel<double>, fixed_point, count,
                       static_cast<double*>(value_gradient));
  }
  return launch_over(count, stream, convert_kernel<float>, fixed_point, count,
                     static_cast<float*>(value_gradient));
}

}  // namespace cuda
}  // namespace dn_detr
