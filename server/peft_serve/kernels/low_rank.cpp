// Low-rank terms of many adapters beside one linear layer: y[t] += B_k (A_k x[t]), k being the adapter of token t.
//
// Tokens of one adapter lie side by side: a step is a list of segments. Factors lie where their owner keeps them, A as
// [rank, inputs] and B as [rank, outputs], and are read once for each segment. Sums are float32, in an order that
// depends on the rank and the number of inputs alone: a token gets the same bits alone and in any step.

#include <cstdint>
#include <cstring>
#include <thread>

#include "lanes.h"
#include "segments.h"
#include "team.h"

namespace {

constexpr int RANKS = 4;           // that one pass over the inputs sums up
constexpr int TOKENS = 2;          // that share such a pass: RANKS * TOKENS sums stay in registers, and what is widened
constexpr long NEAR_TOKENS = 24;   // whose inputs stay in the cache while the ranks go by
constexpr int ROWS = 8;            // of B that one pass over the outputs adds up
constexpr int SHARING = 6;         // tokens that share a pass over the ranks, two vectors of outputs each
constexpr long STREAMED = 2;       // so few tokens are bound by the reading of B: it is read as it lies in memory
constexpr long WIDE = 320;         // outputs of a unit of work for so few tokens, and for many:
constexpr long NARROW = 64;        // whose part of B stays in the cache
constexpr long WORTH_TEAM = 60000;  // multiply-adds; fewer take less time than starting a team
constexpr long PATIENCE = 20000;    // looks at the others' work before the core is offered to somebody else
constexpr long A_AHEAD = 2048;      // bytes asked for in advance
constexpr long B_AHEAD = 512;

template <class T>
inline void fetch(const T* from, long ahead) {
  __builtin_prefetch(reinterpret_cast<const char*>(from) + ahead);
}

inline long parts(long count, long size) { return (count + size - 1) / size; }
inline long least(long a, long b) { return a < b ? a : b; }

// low[m][n] = A[n] . x[m]
template <class T, int M, int N>
inline void shrink_block(const T* x, long x_step, const T* a, long num_in, float* low, long low_step) {
  Lanes sums[M][N] = {};
  long i = 0;
  for (; i + 2 * LANES <= num_in; i += 2 * LANES) {
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part) {
      Lanes its[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) its[m] = load_part(x + m * x_step + i, part);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const Lanes row = load_part(a + n * num_in + i, part);
        if (M == 1 && part == 0) fetch(a + n * num_in + i, A_AHEAD);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[m][n] = added(sums[m][n], its[m], row);
      }
    }
  }
  if (i < num_in) {
    T rest[N][2 * LANES] = {}, its[2 * LANES] = {};
    for (int n = 0; n < N; ++n) std::memcpy(rest[n], a + n * num_in + i, (num_in - i) * sizeof(T));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      std::memcpy(its, x + m * x_step + i, (num_in - i) * sizeof(T));
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
        for (int part = 0; part < 2; ++part)
          sums[m][n] = added(sums[m][n], load_part(its, part), load_part(rest[n], part));
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) low[m * low_step + n] = sum(sums[m][n]);
}

template <class T, int N>
void shrink(const T* x, long x_step, long num_tokens, const T* a, long num_in, float* low, long low_step) {
  long m = 0;
  for (; m + TOKENS <= num_tokens; m += TOKENS)
    shrink_block<T, TOKENS, N>(x + m * x_step, x_step, a, num_in, low + m * low_step, low_step);
  if (m < num_tokens) shrink_block<T, 1, N>(x + m * x_step, x_step, a, num_in, low + m * low_step, low_step);
}

// One half of the next sixteen numbers of a row, zeros behind its end.
template <class T>
inline Lanes part_of(const T* from, int part, long count) {
  if (count >= 2 * LANES) return load_part(from, part);
  T padded[2 * LANES] = {};
  if (count > 0) std::memcpy(padded, from, count * sizeof(T));
  return load_part(padded, part);
}

// Sums of two vectors of outputs, as `load_part` has them.
template <class T>
inline void add(T* y, Lanes first, Lanes second, long count) {
  if (count >= 2 * LANES) return store_parts(y, load_part(y, 0) + first, load_part(y, 1) + second);
  if (count <= 0) return;
  T padded[2 * LANES];
  store_parts(padded, part_of(y, 0, count) + first, part_of(y, 1, count) + second);
  std::memcpy(y, padded, count * sizeof(T));
}

// sums[0..num_out) += low . B for R rows of B, each a stream from memory
template <class T, int R>
inline void sum_rows(const float* low, const T* b, long b_step, long num_out, float* sums) {
  for (long o = 0; o < num_out; o += 2 * LANES) {
    Lanes first = load(sums + o), second = load(sums + o + LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T* from = b + r * b_step + o;
      fetch(from, B_AHEAD);
      first = added(first, part_of(from, 0, num_out - o), low[r]);
      second = added(second, part_of(from, 1, num_out - o), low[r]);
    }
    store(sums + o, first);
    store(sums + o + LANES, second);
  }
}

// y[0..num_out) += low . B for one token
template <class T>
void expand_one(T* y, const float* low, const T* b, long b_step, long rank, long num_out, float* sums) {
  std::memset(sums, 0, (num_out + 2 * LANES) * sizeof(float));
  long r = 0;
  for (; r + ROWS <= rank; r += ROWS) sum_rows<T, ROWS>(low + r, b + r * b_step, b_step, num_out, sums);
  if (rank - r >= 4) {
    sum_rows<T, 4>(low + r, b + r * b_step, b_step, num_out, sums);
    r += 4;
  }
  for (; r < rank; ++r) sum_rows<T, 1>(low + r, b + r * b_step, b_step, num_out, sums);
  for (long o = 0; o < num_out; o += 2 * LANES) add(y + o, load(sums + o), load(sums + o + LANES), num_out - o);
}

// y[m][0..num_out) += low[m] . tile[..][0..num_out), num_out <= 2 * LANES; a tile and sums are as `load_part` has them
template <class T, int M>
inline void expand_block(T* y, long y_step, const float* low, long low_step, const float* tile, long rank,
                         long num_out) {
  Lanes sums[M][2] = {};
  for (long r = 0; r < rank; ++r) {
    const Lanes left = load(tile + r * NARROW), right = load(tile + r * NARROW + LANES);
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
    for (long o = 0; o < NARROW; o += 2 * LANES)
      for (int part = 0; part < 2; ++part)
        store(tile + r * NARROW + o + part * LANES, part_of(b + r * b_step + o, part, num_out - o));
  for (long m = 0; m < num_tokens; m += SHARING)
    for (long o = 0; o < num_out; o += 2 * LANES)
      expand_few(num_tokens - m, y + m * y_step + o, y_step, low + m * low_step, low_step, tile + o, rank, num_out - o);
}

// What one adapter has at a layer; nothing where the rank is 0.
struct Factors {
  const void *a, *b;
  int64_t rank;
};

struct Layer {
  int64_t num_in, num_out;
  Factors of_slot[];
};

// The work of a call is cut into units, counted through all segments: so many tokens and ranks, and so many outputs.
template <class T>
struct Terms {
  const Layer& layer;
  const Segments& segments;
  T* y;
  const T* x;
  float* low = nullptr;
  long low_step = 0, num_tokens = 0, num_shrink = 0, num_expand = 0, cost = 0;

  Terms(const void* layer, const void* segments, void* y, const void* x)
      : layer(*static_cast<const Layer*>(layer)),
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

  const Factors& factors(const Segment& s) const { return layer.of_slot[s.slot]; }
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
    float* sums = kept.of(WIDE + 2 * LANES);
    for (long m = 0; m < s.size(); ++m) expand_one(to + m * num_out, from + m * low_step, b, num_out, rank, here, sums);
  }

  // Units [first, last) of either kind.
  void units(long first, long last, bool is_shrink) const {
    long at = 0;
    for (long i = 0; i < segments.count && at < last; ++i) {
      const Segment& s = segments.each[i];
      const long count = is_shrink ? shrink_units(s) : expand_units(s);
      const long begin = first > at ? first - at : 0, end = least(last - at, count);
      for (long unit = begin; unit < end; ++unit) is_shrink ? shrink_unit(s, unit) : expand_unit(s, unit);
      at += count;
    }
  }
};

// The terms of layers with the same inputs, side by side: one team shares the work of all of them.
template <class T>
struct Together {
  const Terms<T>* each;
  long count;

  // Units [first, last) of either kind, counted through all layers.
  void units(long first, long last, bool is_shrink) const {
    for (long i = 0; i < count && last > 0; ++i) {
      const long here = is_shrink ? each[i].num_shrink : each[i].num_expand;
      const long from = first > 0 ? first : 0, to = least(last, here);
      if (from < to) each[i].units(from, to, is_shrink);
      first -= here;
      last -= here;
    }
  }

  void run() const {
    long num_shrink = 0, num_expand = 0, cost = 0;
    for (long i = 0; i < count; ++i) {
      num_shrink += each[i].num_shrink;
      num_expand += each[i].num_expand;
      cost += each[i].cost;
    }
    const int threads = team::num_threads();
    if (threads <= 1 || cost < WORTH_TEAM) {
      units(0, num_shrink, true);
      units(0, num_expand, false);
      return;
    }
    // Ranges are handed out in order: who waits for the first kind waits for ranges that others are working on.
    const long first_kind = least(num_shrink, 4 * threads), second_kind = least(num_expand, 4 * threads);
    std::atomic<long> done{0};
    team::share(first_kind + second_kind, 1, [&, this](long from, long to) {
      for (long range = from; range < to; ++range) {
        if (range < first_kind) {
          units(num_shrink * range / first_kind, num_shrink * (range + 1) / first_kind, true);
          done.fetch_add(1, std::memory_order_release);
          continue;
        }
        for (long tries = 0; done.load(std::memory_order_acquire) < first_kind; ++tries)
          if (tries > PATIENCE) std::this_thread::yield();
        const long its = range - first_kind;
        units(num_expand * its / second_kind, num_expand * (its + 1) / second_kind, false);
      }
    });
  }
};

// The memory between shrinking and expanding is one for all of them.
template <class T>
void add_all(Terms<T>* each, long count) {
  static thread_local Kept kept;
  long wanted = 0;
  for (long i = 0; i < count; ++i) wanted += each[i].num_tokens * each[i].low_step;
  if (!wanted) return;
  float* low = kept.of(wanted);
  for (long i = 0; i < count; ++i) {
    each[i].low = low;
    low += each[i].num_tokens * each[i].low_step;
  }
  Together<T>{each, count}.run();
}

template <class T>
void add_each(const void* const* layers, long count, const void* segments, void* const* ys, const void* x) {
  switch (count) {
    case 1: {
      Terms<T> terms[] = {{layers[0], segments, ys[0], x}};
      return add_all(terms, 1);
    }
    case 2: {
      Terms<T> terms[] = {{layers[0], segments, ys[0], x}, {layers[1], segments, ys[1], x}};
      return add_all(terms, 2);
    }
    default: {
      Terms<T> terms[] = {
          {layers[0], segments, ys[0], x}, {layers[1], segments, ys[1], x}, {layers[2], segments, ys[2], x}};
      return add_all(terms, 3);
    }
  }
}

}  // namespace

extern "C" {

// y [tokens, outputs] += the terms of the segments' adapters on x [tokens, inputs], both without gaps; one to three
// layers that read the same x, each with a y of its own.
void low_rank_each_f32(const void* const* layers, long count, const void* segments, void* const* ys, const void* x) {
  add_each<float>(layers, count, segments, ys, x);
}
void low_rank_each_bf16(const void* const* layers, long count, const void* segments, void* const* ys, const void* x) {
  add_each<Half>(layers, count, segments, ys, x);
}
void low_rank_f32(const void* layer, const void* segments, void* y, const void* x) {
  add_each<float>(&layer, 1, segments, &y, x);
}
void low_rank_bf16(const void* layer, const void* segments, void* y, const void* x) {
  add_each<Half>(&layer, 1, segments, &y, x);
}
}
