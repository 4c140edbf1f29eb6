// Vectors of numbers, of the length that the including file has set, by the vector extension of GCC
// and Clang: the same text serves every instruction set.
//
// Included once by each kernels_*.cpp, inside of its own namespace: code compiled for different
// instruction sets must not share names, or the linker would keep one of them for all. For the same
// reason neither this nor kernels_impl.h uses a template of the standard library that makes code.

// GCC's name for it takes an index vector, Clang's the indices.
#if defined(__clang__)
#define DN_DETR_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DN_DETR_SHUFFLE(a, b, ...) \
  __builtin_shuffle(a, b, typename ShuffleIndex<decltype(a)>::type{__VA_ARGS__})
#endif

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr int kQuad = 4;

// Zeros at first.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : numbers_(new T[size + 1]()) {}
  ~Buffer() { delete[] numbers_; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T& operator[](int64_t i) { return numbers_[i]; }
  const T& operator[](int64_t i) const { return numbers_[i]; }

 private:
  T* numbers_;
};

// Arithmetic in float.
struct Single {
  using Real = float;
  using Int = int32_t;
  static constexpr int kLanes = DN_DETR_VECTOR_BYTES / 4;
  typedef float Reals __attribute__((vector_size(4 * kLanes)));
  typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
  typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
  typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));
  typedef float Quad __attribute__((vector_size(4 * kQuad)));
};

// Arithmetic in double; never fewer than four lanes, so that both are reduced alike.
struct Double {
  using Real = double;
  using Int = int64_t;
  static constexpr int kLanes = DN_DETR_VECTOR_BYTES >= 32 ? DN_DETR_VECTOR_BYTES / 8 : kQuad;
  typedef double Reals __attribute__((vector_size(8 * kLanes)));
  typedef int64_t Ints __attribute__((vector_size(8 * kLanes)));
  typedef double Quad __attribute__((vector_size(8 * kQuad)));
};

template <typename Vector>
struct ShuffleIndex {
  using type = decltype(Vector{} < Vector{});
};

template <typename A>
inline typename A::Reals load(const typename A::Real* from) {
  typename A::Reals vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

// Compilers widen vectors in halves; the one instruction that does it has to be named.
inline Single::Bits load_widened(const uint16_t* from) {
#if DN_DETR_VECTOR_BYTES == 64
  return (Single::Bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
#elif DN_DETR_VECTOR_BYTES == 32
  return (Single::Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
#else
  Single::Shorts shorts;
  std::memcpy(&shorts, from, sizeof shorts);
  return __builtin_convertvector(shorts, Single::Bits);
#endif
}

template <typename A>
inline Single::Reals load(const BFloat16* from) {
  return (Single::Reals)(load_widened(&from->bits) << 16);
}

template <typename A>
inline Single::Reals load(const Half* from) {
#if DN_DETR_VECTOR_BYTES == 64
  return (Single::Reals)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif DN_DETR_VECTOR_BYTES == 32
  return (Single::Reals)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
  // Exponent and mantissa in the place of a float's are the number times 2^-112, subnormals
  // included; what comes out above the range of half was infinite or NaN.
  const Single::Bits bits = load_widened(&from->bits);
  const Single::Reals number = (Single::Reals)((bits & 0x7fff) << 13) * 0x1p112f;
  const Single::Bits special = (Single::Bits)(number >= 65536.f) & 0x7f800000;
  return (Single::Reals)((Single::Bits)number | special | (bits & 0x8000) << 16);
#endif
}

// Where fewer than a vector's numbers are there, the rest is zeros.
template <typename A, typename T>
inline typename A::Reals load_part(const T* from, int64_t count) {
  if (count >= A::kLanes) return load<A>(from);
  T padded[A::kLanes] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return load<A>(padded);
}

inline void store_one(float* to, float number) { *to = number; }
inline void store_one(double* to, double number) { *to = number; }

inline uint32_t bits_of(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return bits;
}

inline void store_one(BFloat16* to, float number) {
  const uint32_t bits = bits_of(number);
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);  // ties to even
  to->bits = static_cast<uint16_t>(number == number ? rounded >> 16 : 0x7fc0);
}

inline void store_one(Half* to, float number) {
  const uint32_t sign = bits_of(number) >> 16 & 0x8000;
  const uint32_t bits = bits_of(number) & 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (bits >= 0x47800000) {
    half = 0x7c00;  // 65536 and more: infinite
  } else if (bits < 0x38800000) {
    // Below 2^-14, where halves are multiples of 2^-24: as floats between 0.5 and 1 are.
    half = bits_of((number < 0 ? -number : number) + 0.5f) - 0x3f000000;
  } else {
    half = (bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13;  // ties to even
  }
  to->bits = static_cast<uint16_t>(half | sign);
}

template <typename A, typename T>
inline void store_part(T* to, const typename A::Reals& vector, int64_t count) {
  if (std::is_same<T, typename A::Real>::value && count >= A::kLanes) {
    std::memcpy(to, &vector, sizeof vector);
    return;
  }
  for (int64_t i = 0; i < A::kLanes && i < count; ++i) store_one(to + i, vector[i]);
}

// (x, y) pairs to a vector of each; `count` of them are there.
template <typename A>
inline void load_pairs(const typename A::Real* from, int64_t count, typename A::Reals& x,
                       typename A::Reals& y) {
  typename A::Real padded[2 * A::kLanes];
  if (count < A::kLanes) {
    std::memset(padded, 0, sizeof padded);
    std::memcpy(padded, from, 2 * count * sizeof *from);
    from = padded;
  }
  for (int i = 0; i < A::kLanes; ++i) {
    x[i] = from[2 * i];
    y[i] = from[2 * i + 1];
  }
}

template <typename A>
inline void store_pairs(typename A::Real* to, const typename A::Reals& x,
                        const typename A::Reals& y, int64_t count) {
  for (int64_t i = 0; i < A::kLanes && i < count; ++i) {
    to[2 * i] = x[i];
    to[2 * i + 1] = y[i];
  }
}

template <typename A>
inline typename A::Quad fold(const typename A::Reals& vector) {
  typename A::Quad quads[A::kLanes / kQuad];
  std::memcpy(quads, &vector, sizeof quads);
  typename A::Quad sum = quads[0];
  for (int i = 1; i < A::kLanes / kQuad; ++i) sum += quads[i];
  return sum;
}

// The sum over the lanes of each of four vectors.
template <typename A>
inline typename A::Quad sum_lanes(const typename A::Reals (&vectors)[4]) {
  using Quad = typename A::Quad;
  const Quad a = fold<A>(vectors[0]), b = fold<A>(vectors[1]);
  const Quad c = fold<A>(vectors[2]), d = fold<A>(vectors[3]);
  const Quad ab = DN_DETR_SHUFFLE(a, b, 0, 4, 1, 5) + DN_DETR_SHUFFLE(a, b, 2, 6, 3, 7);
  const Quad cd = DN_DETR_SHUFFLE(c, d, 0, 4, 1, 5) + DN_DETR_SHUFFLE(c, d, 2, 6, 3, 7);
  return DN_DETR_SHUFFLE(ab, cd, 0, 1, 4, 5) + DN_DETR_SHUFFLE(ab, cd, 2, 3, 6, 7);
}
