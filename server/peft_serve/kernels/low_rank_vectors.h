// Low-rank terms by vectors, float32 or bfloat16: see low_rank.cpp. A token's sums run in an order that depends on the
// rank and the number of inputs alone.
#pragma once

#include <cstdint>
#include <cstring>

#include "lanes.h"
#include "low_rank_layer.h"
#include "segments.h"

namespace {

typedef WideLanes V;
constexpr int NUM = NUM_WIDE;      // numbers of a vector
constexpr int RANKS = 4;           // that one pass over the inputs sums up
constexpr int TOKENS = NUM == 16 ? 4 : 2;  // that share such a pass: RANKS * TOKENS sums stay in registers, and what is
                                           // widened; CPUs with longer ones have more of them
constexpr long NEAR_TOKENS = 24;   // whose inputs stay in the cache while the ranks go by
constexpr int ROWS = 8;            // of B that one pass over the outputs adds up
constexpr int SHARING = 6;         // tokens that share a pass over the ranks, two vectors of outputs each
constexpr long STREAMED = 2;       // so few tokens are bound by the reading of B: it is read as it lies in memory
constexpr long WIDE = 320;         // outputs of a unit of work for so few tokens, and for many:
constexpr long NARROW = 64;        // whose part of B stays in the cache
constexpr long A_AHEAD = 2048;      // bytes asked for in advance
constexpr long B_AHEAD = 512;

// One half of 2 * NUM numbers, in an order that is the same for everything of one type: all that a dot product asks.
inline V part_at(const float* from, int part) { return load_wide(from + part * NUM); }
inline V part_at(const Half* from, int part) {
  typename Whole<V>::Words both;
  std::memcpy(&both, from, sizeof both);
  return reinterpret_cast<V>(part ? both & 0xffff0000u : both << 16);
}

// Both halves of as many, in that order.
inline void put_parts(float* to, V first, V second) {
  store(to, first);
  store(to + NUM, second);
}
inline void put_parts(Half* to, V first, V second) {
  const typename Whole<V>::Words both = (rounded_words(second) & 0xffff0000u) | (rounded_words(first) >> 16);
  std::memcpy(to, &both, sizeof both);
}

inline float total(Lanes lanes) { return sum(lanes); }
#if defined(__AVX512F__)
inline float total(WideLanes lanes) {
  Lanes halves[2];
  std::memcpy(halves, &lanes, sizeof lanes);
  return sum(halves[0] + halves[1]);
}
#endif

template <class T>
inline void fetch(const T* from, long ahead) {
  __builtin_prefetch(reinterpret_cast<const char*>(from) + ahead);
}

// low[m][n] = A[n] . x[m]
template <class T, int M, int N>
inline void shrink_block(const T* x, long x_step, const T* a, long num_in, float* low, long low_step) {
  V sums[M][N] = {};
  long i = 0;
  for (; i + 2 * NUM <= num_in; i += 2 * NUM) {
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part) {
      V its[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) its[m] = part_at(x + m * x_step + i, part);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const V row = part_at(a + n * num_in + i, part);
        if (M == 1 && part == 0) fetch(a + n * num_in + i, A_AHEAD);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[m][n] = added(sums[m][n], its[m], row);
      }
    }
  }
  if (i < num_in) {
    T rest[N][2 * NUM] = {}, its[2 * NUM] = {};
    for (int n = 0; n < N; ++n) std::memcpy(rest[n], a + n * num_in + i, (num_in - i) * sizeof(T));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      std::memcpy(its, x + m * x_step + i, (num_in - i) * sizeof(T));
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
        for (int part = 0; part < 2; ++part)
          sums[m][n] = added(sums[m][n], part_at(its, part), part_at(rest[n], part));
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) low[m * low_step + n] = total(sums[m][n]);
}

template <class T, int N>
void shrink(const T* x, long x_step, long num_tokens, const T* a, long num_in, float* low, long low_step) {
  long m = 0;
  for (; m + TOKENS <= num_tokens; m += TOKENS)
    shrink_block<T, TOKENS, N>(x + m * x_step, x_step, a, num_in, low + m * low_step, low_step);
  if (TOKENS > 2 && m + 2 <= num_tokens) {
    shrink_block<T, 2, N>(x + m * x_step, x_step, a, num_in, low + m * low_step, low_step);
    m += 2;
  }
  if (m < num_tokens) shrink_block<T, 1, N>(x + m * x_step, x_step, a, num_in, low + m * low_step, low_step);
}

// One half of the next numbers of a row, zeros behind its end.
template <class T>
inline V part_of(const T* from, int part, long count) {
  if (count >= 2 * NUM) return part_at(from, part);
  T padded[2 * NUM] = {};
  if (count > 0) std::memcpy(padded, from, count * sizeof(T));
  return part_at(padded, part);
}

// Sums of two vectors of outputs, as `part_at` has them.
template <class T>
inline void add(T* y, V first, V second, long count) {
  if (count >= 2 * NUM) return put_parts(y, part_at(y, 0) + first, part_at(y, 1) + second);
  if (count <= 0) return;
  T padded[2 * NUM];
  put_parts(padded, part_of(y, 0, count) + first, part_of(y, 1, count) + second);
  std::memcpy(y, padded, count * sizeof(T));
}

// sums[0..num_out) += low . B for R rows of B, each a stream from memory
template <class T, int R>
inline void sum_rows(const float* low, const T* b, long b_step, long num_out, float* sums) {
  for (long o = 0; o < num_out; o += 2 * NUM) {
    V first = load_wide(sums + o), second = load_wide(sums + o + NUM);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T* from = b + r * b_step + o;
      fetch(from, B_AHEAD);
      first = added(first, part_of(from, 0, num_out - o), low[r]);
      second = added(second, part_of(from, 1, num_out - o), low[r]);
    }
    store(sums + o, first);
    store(sums + o + NUM, second);
  }
}

// y[0..num_out) += low . B for one token
template <class T>
void expand_one(T* y, const float* low, const T* b, long b_step, long rank, long num_out, float* sums) {
  std::memset(sums, 0, (num_out + 2 * NUM) * sizeof(float));
  long r = 0;
  for (; r + ROWS <= rank; r += ROWS) sum_rows<T, ROWS>(low + r, b + r * b_step, b_step, num_out, sums);
  if (rank - r >= 4) {
    sum_rows<T, 4>(low + r, b + r * b_step, b_step, num_out, sums);
    r += 4;
  }
  for (; r < rank; ++r) sum_rows<T, 1>(low + r, b + r * b_step, b_step, num_out, sums);
  for (long o = 0; o < num_out; o += 2 * NUM) add(y + o, load_wide(sums + o), load_wide(sums + o + NUM), num_out - o);
}

// y[m][0..num_out) += low[m] . tile[..][0..num_out), num_out <= 2 * NUM; a tile and sums are as `part_at` has them
template <class T, int M>
inline void expand_block(T* y, long y_step, const float* low, long low_step, const float* tile, long rank,
                         long num_out) {
  V sums[M][2] = {};
  for (long r = 0; r < rank; ++r) {
    const V left = load_wide(tile + r * NARROW), right = load_wide(tile + r * NARROW + NUM);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const float weight = low[m * low_step + r];
      sums[m][0] = added(sums[m][0], left, weight);
      sums[m][1] = added(sums[m][1], right, weight);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) add(y + m * y_step, sums[m][0], sums[m][1], num_out);
}

template <class T>
void expand_few(long count, T* y, long y_step, const float* low, long low_step, const float* tile, long rank,
                long num_out) {
  switch (count) {
    case 1: return expand_block<T, 1>(y, y_step, low, low_step, tile, rank, num_out);
    case 2: return expand_block<T, 2>(y, y_step, low, low_step, tile, rank, num_out);
    case 3: return expand_block<T, 3>(y, y_step, low, low_step, tile, rank, num_out);
    case 4: return expand_block<T, 4>(y, y_step, low, low_step, tile, rank, num_out);
    case 5: return expand_block<T, 5>(y, y_step, low, low_step, tile, rank, num_out);
    default: return expand_block<T, SHARING>(y, y_step, low, low_step, tile, rank, num_out);
  }
}

// Up to NARROW outputs of many tokens, from a copy of their part of B: it is widened once and has no gaps, which would
// make its rows fall on few places of the cache.
template <class T>
void expand_many(T* y, long y_step, long num_tokens, const float* low, long low_step, const T* b, long b_step,
                 long rank, long num_out, float* tile) {
  for (long r = 0; r < rank; ++r)
    for (long o = 0; o < NARROW; o += 2 * NUM)
      for (int part = 0; part < 2; ++part)
        store(tile + r * NARROW + o + part * NUM, part_of(b + r * b_step + o, part, num_out - o));
  for (long m = 0; m < num_tokens; m += SHARING)
    for (long o = 0; o < num_out; o += 2 * NUM)
      expand_few(num_tokens - m, y + m * y_step + o, y_step, low + m * low_step, low_step, tile + o, rank, num_out - o);
}

// The terms of one layer. Its work is cut into units, counted through all segments: so many tokens and ranks, and so many
// outputs.
template <class T>
struct VectorTerms {
  const low_rank::Layer& layer;
  const Segments& segments;
  T* y;
  const T* x;
  float* low = nullptr;
  long low_step = 0, num_tokens = 0, num_shrink = 0, num_expand = 0, cost = 0;

  VectorTerms(const void* layer, const void* segments, void* y, const void* x)
      : layer(*static_cast<const low_rank::Layer*>(layer)),
        segments(*static_cast<const Segments*>(segments)),
        y(static_cast<T*>(y)),
        x(static_cast<const T*>(x)) {
    for (long i = 0; i < this->segments.count; ++i) {
      const Segment& s = this->segments.each[i];
      const long rank = factors(s).rank;
      low_step = rank > low_step ? rank : low_step;
      num_tokens = s.last > num_tokens ? s.last : num_tokens;
      num_shrink += shrink_units(s);
      num_expand += expand_units(s);
      cost += rank * s.size() * (this->layer.num_in + this->layer.num_out);
    }
  }

  long num_low() const { return num_tokens * low_step; }

  const low_rank::Factors& factors(const Segment& s) const { return layer.of_slot[s.slot]; }
  static long width(const Segment& s) { return s.size() <= STREAMED ? WIDE : NARROW; }

  long shrink_units(const Segment& s) const { return parts(s.size(), NEAR_TOKENS) * parts(factors(s).rank, RANKS); }
  long expand_units(const Segment& s) const { return factors(s).rank ? parts(layer.num_out, width(s)) : 0; }

  void shrink_unit(const Segment& s, long unit) const {
    const long rank = factors(s).rank, blocks = parts(rank, RANKS), num_in = layer.num_in;
    const long m = s.first + unit / blocks * NEAR_TOKENS, r = unit % blocks * RANKS;
    const long count = least(s.last - m, NEAR_TOKENS);
    const T *from = x + m * num_in, *a = static_cast<const T*>(factors(s).a) + r * num_in;
    float* to = low + m * low_step + r;
    switch (rank - r) {
      case 1: return shrink<T, 1>(from, num_in, count, a, num_in, to, low_step);
      case 2: return shrink<T, 2>(from, num_in, count, a, num_in, to, low_step);
      case 3: return shrink<T, 3>(from, num_in, count, a, num_in, to, low_step);
      default: return shrink<T, RANKS>(from, num_in, count, a, num_in, to, low_step);
    }
  }

  void expand_unit(const Segment& s, long unit) const {
    static thread_local Kept kept;
    const long rank = factors(s).rank, num_out = layer.num_out, o = unit * width(s);
    const long here = least(num_out - o, width(s));
    const T* b = static_cast<const T*>(factors(s).b) + o;
    T* to = y + s.first * num_out + o;
    const float* from = low + s.first * low_step;
    if (s.size() > STREAMED)
      return expand_many(to, num_out, s.size(), from, low_step, b, num_out, rank, here, kept.of(rank * NARROW));
    float* sums = kept.of(WIDE + 2 * NUM);
    for (long m = 0; m < s.size(); ++m) expand_one(to + m * num_out, from + m * low_step, b, num_out, rank, here, sums);
  }

  // Units [first, last) of either kind.
  void shrink_some(long first, long last) const {
    each_unit(first, last, [this](const Segment& s) { return shrink_units(s); },
              [this](const Segment& s, long unit) { shrink_unit(s, unit); });
  }
  void expand_some(long first, long last) const {
    each_unit(first, last, [this](const Segment& s) { return expand_units(s); },
              [this](const Segment& s, long unit) { expand_unit(s, unit); });
  }

  template <class Count, class Work>
  void each_unit(long first, long last, const Count& count_of, const Work& work) const {
    long at = 0;
    for (long i = 0; i < segments.count && at < last; ++i) {
      const Segment& s = segments.each[i];
      const long count = count_of(s);
      const long begin = first > at ? first - at : 0, end = least(last - at, count);
      for (long unit = begin; unit < end; ++unit) work(s, unit);
      at += count;
    }
  }
};

}  // namespace
