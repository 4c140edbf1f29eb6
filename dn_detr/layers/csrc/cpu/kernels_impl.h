// The kernels themselves, for the instruction set that the including file has chosen: its name, the
// length of its vectors, and whether the CPU that this runs on has it.
//
// Both passes go through the same stages for every (image, query, head):
//   1. stage: position, bilinear shares and the four tokens of every point, vectorised over points;
//   2. forward: sums of token rows, or backward: products with token rows and sums into rows of the
//      gradient, vectorised over channels;
//   3. backward: gradients of location and weight from those products, over points again.
// A result is written by one thread, in an order that does not depend on how many there are.

#if !defined(DN_DETR_INSTRUCTIONS) || !defined(DN_DETR_VECTOR_BYTES) || !defined(DN_DETR_SUPPORTED)
#error "define DN_DETR_INSTRUCTIONS, DN_DETR_VECTOR_BYTES and DN_DETR_SUPPORTED before this"
#endif

namespace dn_detr::cpu::DN_DETR_INSTRUCTIONS {
namespace {

#include "vectors.h"

constexpr int kCorners = 4;  // left top, right top, left bottom, right bottom

// Of as many points as a vector has lanes, what their levels say about them.
template <typename A>
struct LevelOfPoints {
  typename A::Reals width, height;
  typename A::Ints columns, rows, first_token;
};

// The points of the levels [first_level, last_level), in vectors; the last one may have idle lanes.
template <typename A>
struct Points {
  const int64_t first, count;  // in the point axis
  const int64_t vectors;
  Buffer<LevelOfPoints<A>> levels;

  Points(const Problem& problem, int64_t first_level, int64_t last_level)
      : first(first_level < last_level ? problem.levels[first_level].first_point : 0),
        count(first_level < last_level ? end_of(problem.levels[last_level - 1]) - first : 0),
        vectors((count + A::kLanes - 1) / A::kLanes),
        levels(vectors) {
    for (int64_t l = first_level; l < last_level; ++l) {
      const Level& level = problem.levels[l];
      for (int64_t p = level.first_point - first; p < end_of(level) - first; ++p) {
        LevelOfPoints<A>& vector = levels[p / A::kLanes];
        const int64_t lane = p % A::kLanes;
        vector.width[lane] = vector.columns[lane] = level.width;
        vector.height[lane] = vector.rows[lane] = level.height;
        vector.first_token[lane] = level.first_token;
      }
    }
  }

  static int64_t end_of(const Level& level) { return level.first_point + level.num_points; }

  // How many points there are from the first lane of a vector on; more than lanes but for the last.
  int64_t from(int64_t vector) const { return count - vector * A::kLanes; }

  int64_t lanes(int64_t vector) const {
    return from(vector) < A::kLanes ? from(vector) : A::kLanes;
  }
};

// A vector of points of one (image, query, head), ready for the token rows. A point wholly outside
// of its level has a negative token in its first corner; of one at a border, a corner outside has
// no share and repeats the token of a corner inside.
template <typename A>
struct Staged {
  typename A::Reals share[kCorners];  // bilinear share times weight
  typename A::Ints token[kCorners];
  // For the backward pass: fractions of a pixel, and all bits set where a side exists.
  typename A::Reals x, y, weight;
  typename A::Ints left, right, top, bottom;

  bool outside(int64_t lane) const { return token[0][lane] < 0; }
};

template <typename Ints>
inline Ints clamp_index(const Ints& index, const Ints& size) {
  const Ints from_zero = index < 0 ? Ints{} : index;
  return from_zero < size ? from_zero : size - 1;
}

// Along one axis: pixel index below the position, fraction, and which of both sides exist.
template <typename A>
struct Axis {
  typename A::Ints low, high;  // indices, clamped into the level
  typename A::Ints has_low, has_high, outside;
  typename A::Reals fraction;

  Axis(const typename A::Reals& location, const typename A::Reals& size,
       const typename A::Ints& isize) {
    using Reals = typename A::Reals;
    using Ints = typename A::Ints;
    // Outside is outside, however far: bounds keep the index an integer. NaN stays NaN.
    Reals bounded = location < -1 ? Reals{} - 1 : location;
    bounded = bounded > 2 ? Reals{} + 2 : bounded;
    const Reals position = bounded * size - typename A::Real(0.5);
    const Ints truncated = __builtin_convertvector(position, Ints);
    const Ints index = truncated + (__builtin_convertvector(truncated, Reals) > position);
    fraction = position - __builtin_convertvector(index, Reals);
    outside = (position < -1) | (position >= size);
    has_low = index >= 0;
    has_high = index + 1 < isize;
    low = clamp_index(index, isize);
    high = clamp_index(index + 1, isize);
  }
};

template <typename A, bool kBackward, typename W>
inline void stage(const Points<A>& points, const typename A::Real* locations, const W* weights,
                  Buffer<Staged<A>>& vectors) {
  using Reals = typename A::Reals;
  using Ints = typename A::Ints;
  for (int64_t i = 0; i < points.vectors; ++i) {
    const int64_t first = i * A::kLanes;
    const LevelOfPoints<A>& level = points.levels[i];
    Staged<A>& staged = vectors[i];
    Reals x, y;
    load_pairs<A>(locations + 2 * first, points.from(i), x, y);
    const Reals weight = load_part<A>(weights + first, points.from(i));
    const Axis<A> h(x, level.width, level.columns), v(y, level.height, level.rows);
    const Reals left = h.has_low ? 1 - h.fraction : Reals{};
    const Reals right = h.has_high ? h.fraction : Reals{};
    const Reals top = (v.has_low ? 1 - v.fraction : Reals{}) * weight;
    const Reals bottom = (v.has_high ? v.fraction : Reals{}) * weight;
    staged.share[0] = top * left;
    staged.share[1] = top * right;
    staged.share[2] = bottom * left;
    staged.share[3] = bottom * right;
    const Ints above = level.first_token + v.low * level.columns;
    const Ints below = level.first_token + v.high * level.columns;
    staged.token[0] = (above + h.low) | (h.outside | v.outside);
    staged.token[1] = above + h.high;
    staged.token[2] = below + h.low;
    staged.token[3] = below + h.high;
    if (kBackward) {
      staged.x = h.fraction;
      staged.y = v.fraction;
      staged.weight = weight;
      staged.left = h.has_low;
      staged.right = h.has_high;
      staged.top = v.has_low;
      staged.bottom = v.has_high;
    }
  }
}

// Rows of one head of one image: `row(token)` points to its channels.
template <typename T>
struct Rows {
  T* first;
  int64_t stride;
  T* operator()(int64_t token) const { return first + token * stride; }
};

template <typename T>
Rows<const T> value_rows(const Call& call, int64_t image, int64_t head) {
  const Problem& p = call.problem;
  return {static_cast<const T*>(call.value) + image * p.value_batch_stride + head * p.channels,
          p.value_token_stride};
}

template <typename A, typename T>
inline void prefetch(const Points<A>& points, const Buffer<Staged<A>>& vectors, const Rows<T>& rows,
                     int64_t channels) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < points.vectors; ++i) {
    for (int64_t lane = 0; lane < points.lanes(i); ++lane) {
      if (vectors[i].outside(lane)) continue;
      for (const auto& token : vectors[i].token) {
        const T* row = rows(token[lane]);
        for (int64_t c = 0; c < channels; c += kLine) __builtin_prefetch(row + c);
      }
    }
  }
}

// Neighbouring channels that are held in registers: vectors, or `count` channels of one.
template <int kVectorsInBlock, bool kWholeVectors>
struct Block {
  static constexpr int kVectors = kVectorsInBlock;
  static constexpr bool kWhole = kWholeVectors;
  int64_t first, count;
};

// Calls `function` with blocks that make up all channels.
template <typename A, typename Function>
inline void for_blocks(int64_t channels, const Function& function) {
  constexpr int kLong = 32, kShort = 16;  // the usual head, and half of it
  int64_t first = 0;
  for (; first + kLong <= channels; first += kLong) {
    function(Block<kLong / A::kLanes, true>{first, A::kLanes});
  }
  for (; first + kShort <= channels; first += kShort) {
    function(Block<kShort / A::kLanes, true>{first, A::kLanes});
  }
  for (; first + A::kLanes <= channels; first += A::kLanes) {
    function(Block<1, true>{first, A::kLanes});
  }
  if (first < channels) function(Block<1, false>{first, channels - first});
}

// A vector of a block.
template <typename A, typename B, typename T>
inline typename A::Reals load_of(const B& block, const T* from) {
  return B::kWhole ? load<A>(from) : load_part<A>(from, block.count);
}

template <typename A, typename B, typename T>
inline void store_of(const B& block, T* to, const typename A::Reals& vector) {
  store_part<A>(to, vector, B::kWhole ? A::kLanes : block.count);
}

template <typename A, typename B, typename T>
inline void write_output(const Points<A>& points, const Buffer<Staged<A>>& vectors,
                         const Rows<const T>& rows, const B& block, T* output) {
  using Reals = typename A::Reals;
  // Independent sums hide the latency of an addition.
  constexpr int kSums = B::kVectors >= 8 ? 1 : B::kVectors >= 4 ? 2 : kCorners;
  Reals sums[kSums][B::kVectors] = {};
  for (int64_t i = 0; i < points.vectors; ++i) {
    const Staged<A>& staged = vectors[i];
    for (int64_t lane = 0; lane < points.lanes(i); ++lane) {
      if (staged.outside(lane)) continue;
      for (int k = 0; k < kCorners; ++k) {
        const T* row = rows(staged.token[k][lane]) + block.first;
        const typename A::Real share = staged.share[k][lane];
        for (int v = 0; v < B::kVectors; ++v) {
          sums[k % kSums][v] += share * load_of<A>(block, row + v * A::kLanes);
        }
      }
    }
  }
  for (int v = 0; v < B::kVectors; ++v) {
    Reals sum = sums[0][v];
    for (int s = 1; s < kSums; ++s) sum += sums[s][v];
    store_of<A>(block, output + block.first + v * A::kLanes, sum);
  }
}

template <typename A, typename T, typename W>
void forward(const Call& call, int64_t first_query, int64_t last_query) {
  const Problem& problem = call.problem;
  const Points<A> points(problem, 0, problem.num_levels);
  const auto* locations = static_cast<const typename A::Real*>(call.locations);
  const auto* weights = static_cast<const W*>(call.weights);
  const auto rows = [&](int64_t item) {
    return value_rows<T>(call, item / problem.heads / problem.queries, item % problem.heads);
  };
  // One item, a head of a query, is staged ahead of the one that is summed up.
  Buffer<Staged<A>> staged[2] = {Buffer<Staged<A>>(points.vectors),
                                 Buffer<Staged<A>>(points.vectors)};
  const auto prepare = [&](int64_t item) {
    stage<A, false>(points, locations + item * points.count * 2, weights + item * points.count,
                    staged[item % 2]);
    if (call.prefetch) prefetch(points, staged[item % 2], rows(item), problem.channels);
  };
  const int64_t first = first_query * problem.heads, last = last_query * problem.heads;
  if (first < last) prepare(first);
  for (int64_t item = first; item < last; ++item) {
    if (item + 1 < last) prepare(item + 1);
    const auto& current = staged[item % 2];
    const auto current_rows = rows(item);
    T* output = static_cast<T*>(call.output) + item * problem.channels;
    for_blocks<A>(problem.channels, [=, &points, &current](auto block) {
      write_output<A>(points, current, current_rows, block, output);
    });
  }
}

// The products of the output's gradient with the four rows around each of a vector of points.
template <typename A>
struct Products {
  typename A::Reals of_corner[kCorners];
};

// Adds to the rows of value's gradient, and to the products with the rows of value.
template <typename A, typename B, typename T>
inline void scatter(const Points<A>& points, const Buffer<Staged<A>>& vectors, const T* gradient,
                    const Rows<const T>& values, const Rows<typename A::Real>& gradients,
                    const B& block, Buffer<Products<A>>& products) {
  using Real = typename A::Real;
  using Reals = typename A::Reals;
  Reals held[B::kVectors];
  for (int v = 0; v < B::kVectors; ++v) {
    held[v] = load_of<A>(block, gradient + block.first + v * A::kLanes);
  }
  for (int64_t i = 0; i < points.vectors; ++i) {
    const Staged<A>& staged = vectors[i];
    for (int64_t lane = 0; lane < points.lanes(i); ++lane) {
      if (staged.outside(lane)) continue;
      Reals parts[kCorners] = {};
      for (int k = 0; k < kCorners; ++k) {
        const T* value = values(staged.token[k][lane]) + block.first;
        Real* row = gradients(staged.token[k][lane]) + block.first;
        const Real share = staged.share[k][lane];
        for (int v = 0; v < B::kVectors; ++v) {
          parts[k] += held[v] * load_of<A>(block, value + v * A::kLanes);
          Real* to = row + v * A::kLanes;
          store_of<A>(block, to, load_of<A>(block, to) + share * held[v]);
        }
      }
      const typename A::Quad product = sum_lanes<A>(parts);
      for (int k = 0; k < kCorners; ++k) {
        Reals& sums = products[i].of_corner[k];
        sums[lane] = block.first == 0 ? product[k] : sums[lane] + product[k];
      }
    }
  }
}

// Gradients of the points' weights and locations, from the products of `scatter`.
template <typename A, typename W>
inline void finish(const Points<A>& points, const Buffer<Staged<A>>& vectors,
                   const Buffer<Products<A>>& products, typename A::Real* location_gradient,
                   W* weight_gradient) {
  using Reals = typename A::Reals;
  for (int64_t i = 0; i < points.vectors; ++i) {
    const Staged<A>& s = vectors[i];
    const Reals* product = products[i].of_corner;
    const typename A::Ints inside = s.token[0] >= 0;
    const Reals left_top = inside & s.left & s.top ? product[0] : Reals{};
    const Reals right_top = inside & s.right & s.top ? product[1] : Reals{};
    const Reals left_bottom = inside & s.left & s.bottom ? product[2] : Reals{};
    const Reals right_bottom = inside & s.right & s.bottom ? product[3] : Reals{};
    const Reals top = left_top + s.x * (right_top - left_top);
    const Reals bottom = left_bottom + s.x * (right_bottom - left_bottom);
    const Reals across =
        (right_top - left_top) * (1 - s.y) + (right_bottom - left_bottom) * s.y;
    const LevelOfPoints<A>& level = points.levels[i];
    store_part<A>(weight_gradient + i * A::kLanes, top + s.y * (bottom - top), points.from(i));
    store_pairs<A>(location_gradient + 2 * i * A::kLanes, across * s.weight * level.width,
                   (bottom - top) * s.weight * level.height, points.from(i));
  }
}

// Here and not for all slices at once: rows that were just written are near.
template <typename Real>
inline void clear(const Problem& problem, const Slice& slice, Real* value_gradient) {
  if (slice.first_level == slice.last_level) return;
  const Level& last = problem.levels[slice.last_level - 1];
  const int64_t end = last.first_token + last.height * last.width;
  const int64_t width = (slice.last_head - slice.first_head) * problem.channels;
  for (int64_t t = problem.levels[slice.first_level].first_token; t < end; ++t) {
    const int64_t row = (slice.image * problem.tokens + t) * problem.heads + slice.first_head;
    std::memset(value_gradient + row * problem.channels, 0, width * sizeof(Real));
  }
}

template <typename A, typename T, typename W>
void backward(const Call& call, const Slice& slice) {
  using Real = typename A::Real;
  const Problem& problem = call.problem;
  const Points<A> points(problem, slice.first_level, slice.last_level);
  clear(problem, slice, static_cast<Real*>(call.value_gradient));
  const int64_t heads = slice.last_head - slice.first_head, items = problem.queries * heads;
  const auto head = [&](int64_t i) { return slice.first_head + i % heads; };
  // Of the i-th item of the slice: its place in tensors [batch, query, head, ...].
  const auto item = [&](int64_t i) {
    return (slice.image * problem.queries + i / heads) * problem.heads + head(i);
  };
  const auto first_point = [&](int64_t i) { return item(i) * problem.points + points.first; };
  const auto gradient_rows = [&](int64_t i) {
    const int64_t stride = problem.heads * problem.channels;
    return Rows<Real>{static_cast<Real*>(call.value_gradient) +
                          slice.image * problem.tokens * stride + head(i) * problem.channels,
                      stride};
  };
  Buffer<Staged<A>> staged[2] = {Buffer<Staged<A>>(points.vectors),
                                 Buffer<Staged<A>>(points.vectors)};
  const auto prepare = [&](int64_t i) {
    stage<A, true>(points, static_cast<const Real*>(call.locations) + 2 * first_point(i),
                   static_cast<const W*>(call.weights) + first_point(i), staged[i % 2]);
    if (call.prefetch) {
      prefetch(points, staged[i % 2], value_rows<T>(call, slice.image, head(i)), problem.channels);
      prefetch(points, staged[i % 2], gradient_rows(i), problem.channels);
    }
  };
  Buffer<Products<A>> products(points.vectors);
  if (items > 0) prepare(0);
  for (int64_t i = 0; i < items; ++i) {
    if (i + 1 < items) prepare(i + 1);
    const auto& current = staged[i % 2];
    const auto values = value_rows<T>(call, slice.image, head(i));
    const auto gradients = gradient_rows(i);
    const T* gradient = static_cast<const T*>(call.gradient) + item(i) * problem.channels;
    for_blocks<A>(problem.channels, [=, &points, &current, &products](auto block) {
      scatter<A>(points, current, gradient, values, gradients, block, products);
    });
    finish<A>(points, current, products,
              static_cast<Real*>(call.location_gradient) + 2 * first_point(i),
              static_cast<W*>(call.weight_gradient) + first_point(i));
  }
}

// Calls `function` with the arithmetic and the two storage types of a problem.
template <typename Function>
void with_types(const Problem& problem, const Function& function) {
  const bool float_weights = problem.weight_type == Scalar::kFloat;
  switch (problem.value_type) {
    case Scalar::kFloat: return function(Single(), float(), float());
    case Scalar::kDouble: return function(Double(), double(), double());
    case Scalar::kHalf:
      return float_weights ? function(Single(), Half(), float())
                           : function(Single(), Half(), Half());
    case Scalar::kBFloat16:
      return float_weights ? function(Single(), BFloat16(), float())
                           : function(Single(), BFloat16(), BFloat16());
  }
}

void forward_of_any_type(const Call& call, int64_t first, int64_t last) {
  with_types(call.problem, [&](auto arithmetic, auto value, auto weight) {
    forward<decltype(arithmetic), decltype(value), decltype(weight)>(call, first, last);
  });
}

void backward_of_any_type(const Call& call, const Slice& slice) {
  with_types(call.problem, [&](auto arithmetic, auto value, auto weight) {
    backward<decltype(arithmetic), decltype(value), decltype(weight)>(call, slice);
  });
}

}  // namespace

#define DN_DETR_TEXT(word) #word
#define DN_DETR_NAME(macro) DN_DETR_TEXT(macro)

const Kernels* kernels() {
  static const Kernels kernels = {DN_DETR_NAME(DN_DETR_INSTRUCTIONS), DN_DETR_VECTOR_BYTES / 4,
                                  forward_of_any_type, backward_of_any_type};
  return DN_DETR_SUPPORTED ? &kernels : nullptr;
}

}  // namespace dn_detr::cpu::DN_DETR_INSTRUCTIONS
