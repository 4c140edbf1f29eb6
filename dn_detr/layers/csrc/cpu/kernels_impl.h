// The kernels themselves, for the instruction set that the including file has chosen.
//
// Both passes go through the same stages for every (image, query, head):
//   1. stage: position, bilinear shares and the four tokens of every point, vectorised over points;
//   2. forward: sums of token rows, or backward: products with token rows and sums into rows of the
//      gradient, vectorised over channels;
//   3. backward: gradients of location and weight from those products, over points again.
// A result is written by one thread, in an order that does not depend on how many there are.

#if !defined(DN_DETR_INSTRUCTIONS) || !defined(DN_DETR_VECTOR_BYTES)
#error "define DN_DETR_INSTRUCTIONS and DN_DETR_VECTOR_BYTES before including this"
#endif

namespace dn_detr::cpu::DN_DETR_INSTRUCTIONS {
namespace {

#include "vectors.h"

constexpr int kCorners = 4;  // left top, right top, left bottom, right bottom
constexpr int kBlock = 32;   // channels that are summed up in registers

// What a point's level says about it, laid out for vectors of points.
template <typename A>
struct Points {
  const int64_t first, count, padded;  // in the point axis; padded to whole vectors
  Buffer<typename A::Real> width, height;
  Buffer<typename A::Int> columns, rows, first_token;

  Points(const Problem& problem, int64_t first_level, int64_t last_level)
      : first(first_level < last_level ? problem.levels[first_level].first_point : 0),
        count(first_level < last_level ? end_of(problem.levels[last_level - 1]) - first : 0),
        padded((count + A::kLanes - 1) / A::kLanes * A::kLanes),
        width(padded), height(padded), columns(padded), rows(padded), first_token(padded) {
    for (int64_t l = first_level; l < last_level; ++l) {
      const Level& level = problem.levels[l];
      for (int64_t p = level.first_point - first; p < end_of(level) - first; ++p) {
        width[p] = columns[p] = level.width;
        height[p] = rows[p] = level.height;
        first_token[p] = level.first_token;
      }
    }
  }

  static int64_t end_of(const Level& level) { return level.first_point + level.num_points; }
};

// The points of one (image, query, head), ready for the token rows. A point wholly outside of its
// level has the token -1 in its first corner; of one at a border, a corner outside has no share and
// repeats the token of a corner inside.
template <typename A>
struct Staged {
  Buffer<typename A::Real> share[kCorners];  // bilinear share times weight
  Buffer<typename A::Int> token[kCorners];
  // For the backward pass: fractions of a pixel, and all bits set where a side exists.
  Buffer<typename A::Real> x, y, weight;
  Buffer<typename A::Int> left, right, top, bottom;

  explicit Staged(int64_t n)
      : share{Buffer<typename A::Real>(n), Buffer<typename A::Real>(n), Buffer<typename A::Real>(n),
              Buffer<typename A::Real>(n)},
        token{Buffer<typename A::Int>(n), Buffer<typename A::Int>(n), Buffer<typename A::Int>(n),
              Buffer<typename A::Int>(n)},
        x(n), y(n), weight(n), left(n), right(n), top(n), bottom(n) {}
};

template <typename Vector, typename Number>
inline Vector at(const Buffer<Number>& numbers, int64_t first) {
  Vector vector;
  std::memcpy(&vector, &numbers[first], sizeof vector);
  return vector;
}

template <typename Vector, typename Number>
inline void put(Buffer<Number>& numbers, int64_t first, const Vector& vector) {
  std::memcpy(&numbers[first], &vector, sizeof vector);
}

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
                  Staged<A>& staged) {
  using Reals = typename A::Reals;
  using Ints = typename A::Ints;
  for (int64_t p = 0; p < points.count; p += A::kLanes) {
    Reals x, y;
    load_pairs<A>(locations + 2 * p, points.count - p, x, y);
    const Reals weight = load_part<A>(weights + p, points.count - p);
    const Ints columns = at<Ints>(points.columns, p), first = at<Ints>(points.first_token, p);
    const Axis<A> h(x, at<Reals>(points.width, p), columns);
    const Axis<A> v(y, at<Reals>(points.height, p), at<Ints>(points.rows, p));
    const Reals left = h.has_low ? 1 - h.fraction : Reals{}, right = h.has_high ? h.fraction : Reals{};
    const Reals top = (v.has_low ? 1 - v.fraction : Reals{}) * weight;
    const Reals bottom = (v.has_high ? v.fraction : Reals{}) * weight;
    put(staged.share[0], p, top * left);
    put(staged.share[1], p, top * right);
    put(staged.share[2], p, bottom * left);
    put(staged.share[3], p, bottom * right);
    const Ints above = first + v.low * columns, below = first + v.high * columns;
    put(staged.token[0], p, (above + h.low) | (h.outside | v.outside));
    put(staged.token[1], p, above + h.high);
    put(staged.token[2], p, below + h.low);
    put(staged.token[3], p, below + h.high);
    if (kBackward) {
      put(staged.x, p, h.fraction);
      put(staged.y, p, v.fraction);
      put(staged.weight, p, weight);
      put(staged.left, p, h.has_low);
      put(staged.right, p, h.has_high);
      put(staged.top, p, v.has_low);
      put(staged.bottom, p, v.has_high);
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
inline void prefetch(const Staged<A>& staged, int64_t count, const Rows<T>& rows,
                     int64_t channels) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t p = 0; p < count; ++p) {
    if (staged.token[0][p] < 0) continue;
    for (const auto& token : staged.token) {
      const T* row = rows(token[p]);
      for (int64_t c = 0; c < channels; c += kLine) __builtin_prefetch(row + c);
    }
  }
}

// Channels [first, first + kVectors * lanes) of the output; of the last vector `count` exist.
template <typename A, int kVectors, bool kWhole, typename T>
inline void sum_rows(const Staged<A>& staged, int64_t points, const Rows<const T>& rows,
                     int64_t first, int64_t count, T* output) {
  using Reals = typename A::Reals;
  // Independent sums hide the latency of an addition.
  constexpr int kSums = kVectors >= 8 ? 1 : kVectors >= 4 ? 2 : kCorners;
  Reals sums[kSums][kVectors] = {};
  for (int64_t p = 0; p < points; ++p) {
    if (staged.token[0][p] < 0) continue;
    for (int k = 0; k < kCorners; ++k) {
      const T* row = rows(staged.token[k][p]) + first;
      const typename A::Real share = staged.share[k][p];
      for (int v = 0; v < kVectors; ++v) {
        const T* from = row + v * A::kLanes;
        sums[k % kSums][v] += share * (kWhole ? load<A>(from) : load_part<A>(from, count));
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    Reals sum = sums[0][v];
    for (int s = 1; s < kSums; ++s) sum += sums[s][v];
    store_part<A>(output + first + v * A::kLanes, sum, kWhole ? A::kLanes : count);
  }
}

template <typename A, typename T>
inline void write_output(const Staged<A>& staged, int64_t points, const Rows<const T>& rows,
                         int64_t channels, T* output) {
  int64_t first = 0;
  for (; first + kBlock <= channels; first += kBlock) {
    sum_rows<A, kBlock / A::kLanes, true>(staged, points, rows, first, A::kLanes, output);
  }
  for (; first + A::kLanes <= channels; first += A::kLanes) {
    sum_rows<A, 1, true>(staged, points, rows, first, A::kLanes, output);
  }
  if (first < channels) {
    sum_rows<A, 1, false>(staged, points, rows, first, channels - first, output);
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
  Staged<A> buffers[2] = {Staged<A>(points.padded), Staged<A>(points.padded)};
  const auto prepare = [&](int64_t item) {
    Staged<A>& staged = buffers[item % 2];
    stage<A, false>(points, locations + item * points.count * 2, weights + item * points.count,
                    staged);
    if (call.prefetch) prefetch(staged, points.count, rows(item), problem.channels);
  };
  const int64_t first = first_query * problem.heads, last = last_query * problem.heads;
  if (first < last) prepare(first);
  for (int64_t item = first; item < last; ++item) {
    if (item + 1 < last) prepare(item + 1);
    write_output<A, T>(buffers[item % 2], points.count, rows(item), problem.channels,
                       static_cast<T*>(call.output) + item * problem.channels);
  }
}

// Of one vector of channels: its part of the products of the gradient with the four rows of a
// point, and the share of the gradient that each row gets.
template <typename A, typename T>
inline void add_products(const Staged<A>& staged, int64_t point, const typename A::Reals& gradient,
                         const T* const (&values)[kCorners],
                         typename A::Real* const (&gradients)[kCorners], int64_t first,
                         int64_t count, typename A::Reals (&products)[kCorners]) {
  for (int k = 0; k < kCorners; ++k) {
    products[k] += gradient * load_part<A>(values[k] + first, count);
    typename A::Real* to = gradients[k] + first;
    store_part<A>(to, load_part<A>(to, count) + staged.share[k][point] * gradient, count);
  }
}

// Adds to the rows of value's gradient; returns the products of the output's gradient with the
// values in `products`, four a point. kVectors: number of whole vectors of a head; 0: any number,
// and a part.
template <typename A, int kVectors, typename T>
inline void scatter(const Staged<A>& staged, int64_t points, const T* gradient, int64_t channels,
                    const Rows<const T>& values, const Rows<typename A::Real>& gradients,
                    typename A::Quad* products) {
  using Reals = typename A::Reals;
  Reals held[kVectors ? kVectors : 1];
  for (int v = 0; v < kVectors; ++v) held[v] = load<A>(gradient + v * A::kLanes);
  for (int64_t p = 0; p < points; ++p) {
    products[p] = typename A::Quad{};
    if (staged.token[0][p] < 0) continue;
    const T* value[kCorners];
    typename A::Real* sum[kCorners];
    for (int k = 0; k < kCorners; ++k) {
      value[k] = values(staged.token[k][p]);
      sum[k] = gradients(staged.token[k][p]);
    }
    Reals parts[kCorners] = {};
    for (int v = 0; v < kVectors; ++v) {
      add_products<A, T>(staged, p, held[v], value, sum, v * A::kLanes, A::kLanes, parts);
    }
    for (int64_t c = kVectors ? channels : 0; c < channels; c += A::kLanes) {
      const Reals part = load_part<A>(gradient + c, channels - c);
      add_products<A, T>(staged, p, part, value, sum, c, channels - c, parts);
    }
    products[p] = sum_lanes<A>(parts);
  }
}

// Gradients of the points' weights and locations, from the products of `scatter`.
template <typename A, typename W>
inline void finish(const Staged<A>& staged, const Points<A>& points,
                   const typename A::Quad* products, typename A::Real* location_gradient,
                   W* weight_gradient) {
  using Real = typename A::Real;
  for (int64_t p = 0; p < points.count; ++p) {
    const bool left = staged.left[p], right = staged.right[p];
    const bool top = staged.top[p], bottom = staged.bottom[p];
    const Real lt = left && top ? products[p][0] : 0, rt = right && top ? products[p][1] : 0;
    const Real lb = left && bottom ? products[p][2] : 0, rb = right && bottom ? products[p][3] : 0;
    const Real x = staged.x[p], y = staged.y[p], weight = staged.weight[p];
    const bool outside = staged.token[0][p] < 0;
    const Real at_top = lt + x * (rt - lt), at_bottom = lb + x * (rb - lb);
    const Real across = (rt - lt) + y * ((rb - lb) - (rt - lt));
    store_one(weight_gradient + p, outside ? 0 : at_top + y * (at_bottom - at_top));
    location_gradient[2 * p] = outside ? 0 : across * weight * points.width[p];
    location_gradient[2 * p + 1] = outside ? 0 : (at_bottom - at_top) * weight * points.height[p];
  }
}

template <typename A, typename T, typename W>
void backward(const Call& call, const Slice& slice) {
  using Real = typename A::Real;
  const Problem& problem = call.problem;
  const Points<A> points(problem, slice.first_level, slice.last_level);
  const Rows<const T> values = value_rows<T>(call, slice.image, slice.head);
  const int64_t width = problem.heads * problem.channels;
  const Rows<Real> gradients = {static_cast<Real*>(call.value_gradient) +
                                    slice.image * problem.tokens * width +
                                    slice.head * problem.channels,
                                width};
  const auto item = [&](int64_t query) {
    return (slice.image * problem.queries + query) * problem.heads + slice.head;
  };
  const auto first_point = [&](int64_t query) {
    return item(query) * problem.points + points.first;
  };
  Staged<A> buffers[2] = {Staged<A>(points.padded), Staged<A>(points.padded)};
  const auto prepare = [&](int64_t query) {
    Staged<A>& staged = buffers[query % 2];
    stage<A, true>(points, static_cast<const Real*>(call.locations) + 2 * first_point(query),
                   static_cast<const W*>(call.weights) + first_point(query), staged);
    if (call.prefetch) {
      prefetch(staged, points.count, values, problem.channels);
      prefetch(staged, points.count, gradients, problem.channels);
    }
  };
  constexpr int kVectors = kBlock / A::kLanes;
  const auto scatter_rows = problem.channels == kBlock ? &scatter<A, kVectors, T> : &scatter<A, 0, T>;
  Buffer<typename A::Quad> products(points.count);
  if (problem.queries > 0) prepare(0);
  for (int64_t query = 0; query < problem.queries; ++query) {
    if (query + 1 < problem.queries) prepare(query + 1);
    const Staged<A>& staged = buffers[query % 2];
    scatter_rows(staged, points.count,
                 static_cast<const T*>(call.gradient) + item(query) * problem.channels,
                 problem.channels, values, gradients, &products[0]);
    finish<A>(staged, points, &products[0],
              static_cast<Real*>(call.location_gradient) + 2 * first_point(query),
              static_cast<W*>(call.weight_gradient) + first_point(query));
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
}  // namespace dn_detr::cpu::DN_DETR_INSTRUCTIONS
