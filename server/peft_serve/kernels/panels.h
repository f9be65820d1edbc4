// y[M, N] = x[M, K] W[N, K]^T + b by vectors, from a copy of W in the order in which it is read.
//
// W is kept in panels of NR columns, [N / NR, K, NR], the last one filled up with zeros. Every number of y is the sum of
// its blocks of KC products in ascending order, and each block the sum of its products in ascending order, whatever M
// is and wherever the row stands: a row has the same bits alone and in any batch.
//
// Weights are float32, or bfloat16 that is widened to float32 in registers: the halves of a word are two columns.
// Sums are float32; a bfloat16 result is rounded once, to nearest even, behind the bias.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "team.h"

namespace {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif
constexpr int NV = VL == 4 ? 4 : 2;  // vectors in a panel's row
constexpr int NR = NV * VL;
constexpr int MR = 6;          // rows that are summed at once: MR * NV sums stay in registers
constexpr int KC = 128;        // of a panel that is read once for all blocks of rows: it stays in the L1 cache
constexpr long AHEAD = 2048;      // bytes of each of several streams that are asked for in advance,
constexpr long FAR_AHEAD = 8192;  // and of a single one
constexpr int MC = 96;         // rows whose x stays in the L2 cache

typedef float Vec __attribute__((vector_size(VL * 4)));
typedef float LooseVec __attribute__((vector_size(VL * 4), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(VL * 4)));
typedef uint32_t LooseWords __attribute__((vector_size(VL * 4), aligned(2)));
typedef uint16_t Shorts __attribute__((vector_size(VL * 2)));
typedef uint16_t LooseShorts __attribute__((vector_size(VL * 2), aligned(2), may_alias));
typedef uint16_t bf16;

inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }

// sum + w * x, rounded once wherever the CPU can. Said outright: a compiler that may contract a product and a sum does so
// for one number of rows and not for another, and a row's bits would depend on how many it stands beside.
inline Vec added(Vec sum, Vec w, float x) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(w, _mm512_set1_ps(x), sum);
#elif defined(__FMA__) && defined(__AVX__)
  return _mm256_fmadd_ps(w, _mm256_set1_ps(x), sum);
#elif defined(__aarch64__)
  for (int i = 0; i < VL; ++i) sum[i] = __builtin_fmaf(w[i], x, sum[i]);
  return sum;
#else
  return sum + w * x;
#endif
}

inline float widen(bf16 v) {
  const uint32_t bits = uint32_t(v) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline bf16 narrow(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16((bits >> 16) | 0x40);
  return bf16((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline void store(bf16* p, Vec v) {
  const Words bits = reinterpret_cast<Words>(v);
  const Words rounded = v == v ? bits + 0x7fffu + ((bits >> 16) & 1) : bits | 0x400000u;
  *reinterpret_cast<LooseShorts*>(p) = __builtin_convertvector(rounded >> 16, Shorts);
}
inline void store_one(bf16* p, float f) { *p = narrow(f); }
inline void store_one(float* p, float f) { *p = f; }

// One row of a panel as NV vectors. In bfloat16 each pair of vectors shares its words: low halves, then high halves.
inline void panel_row(const float* w, Vec* out) {
  for (int v = 0; v < NV; ++v) out[v] = load(w + v * VL);
}
inline void panel_row(const bf16* w, Vec* out) {
  for (int v = 0; v < NV; v += 2) {
    const Words both = *reinterpret_cast<const LooseWords*>(w + v * VL);
    out[v] = reinterpret_cast<Vec>(both << 16);
    out[v + 1] = reinterpret_cast<Vec>(both & 0xffff0000u);
  }
}
inline int place_in_row(const float*, int column) { return column; }
inline int place_in_row(const bf16*, int column) {
  const int vector = column / VL, lane = column % VL;
  return (vector / 2) * 2 * VL + 2 * lane + (vector % 2);
}

// acc += x[..][k] * row k of each panel
template <class W, int R, int P>
inline void add_k(Vec (&acc)[R][P][NV], const float* x, long x_step, const W* w, long panel_step, long k) {
  Vec b[P][NV];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    panel_row(w + p * panel_step + k * NR, b[p]);
    if (P > 1) __builtin_prefetch(w + p * panel_step + k * NR + AHEAD / sizeof(W));
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const float xk = x[r * x_step + k];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[r][p][v] = added(acc[r][p][v], b[p][v], xk);
  }
}

// sums[r][NR p + c] += x[r] . panel p over `num_k`, or = for the first block; P panels lie `panel_step` apart.
template <class W, int R, int P>
__attribute__((noinline)) void sum_block(const float* x, long x_step, const W* w, long panel_step, long num_k,
                                         float* sums, long sums_step, bool is_first, const W* ahead, long ahead_step) {
  Vec acc[R][P][NV] = {};
  if constexpr (P == 1) {
    // Two at a time: else GCC reads the panel from memory again for every row, and loads are what is short.
#pragma GCC unroll 2
    for (long k = 0; k < num_k; ++k) {
      __builtin_prefetch(ahead + k * ahead_step);
      add_k<W, R, P>(acc, x, x_step, w, panel_step, k);
    }
  } else {
    for (long k = 0; k < num_k; ++k) add_k<W, R, P>(acc, x, x_step, w, panel_step, k);
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p)
      for (int v = 0; v < NV; ++v) {
        float* at = sums + r * sums_step + p * NR + v * VL;
        store(at, is_first ? acc[r][p][v] : load(at) + acc[r][p][v]);
      }
}

// y[M, N] of a product, float32 or bfloat16, and what is added to each of its rows.
struct Result {
  const float* bias;  // or null
  void* y;
  bool is_narrow;
  long N;

  void put(long row, long column, const float* sums, int count) const {
    if (is_narrow)
      put_as<bf16>(row, column, sums, count);
    else
      put_as<float>(row, column, sums, count);
  }

  // It is put there soon.
  void expect(long row, long column) const {
    const long at = (row * N + column) * (is_narrow ? sizeof(bf16) : sizeof(float));
    __builtin_prefetch(static_cast<const char*>(y) + at, 1);
  }

 private:
  template <class T>
  void put_as(long row, long column, const float* sums, int count) const {
    const long num = N - column < count ? N - column : count;
    const float* from = bias ? bias + column : nullptr;
    T* to = static_cast<T*>(y) + row * N + column;
    long c = 0;
    for (; c + VL <= num; c += VL) store(to + c, from ? load(sums + c) + load(from + c) : load(sums + c));
    for (; c < num; ++c) store_one(to + c, from ? sums[c] + from[c] : sums[c]);
  }
};

template <class W>
struct Product {
  const float* x;  // [M, K]
  const W* w;      // panels
  Result result;
  long M, N, K;

  const W* panel(long p) const { return w + p * K * NR; }

  void put(long row, long column, const float* sums, int count) const { result.put(row, column, sums, count); }

  template <int R, int P>
  void few(long first, long last) const {
    long p = first;
    for (; p + P <= last; p += P) together<R, P>(p);
    for (; p < last; ++p) together<R, 1>(p);
  }

  // All rows and all of K for P panels from p on, each a stream of its own from memory.
  template <int R, int P>
  __attribute__((noinline)) void together(long p) const {
    float sums[R * P * NR];
    for (long k = 0; k < K; k += KC) {
      const long num_k = K - k < KC ? K - k : KC;
      const W* from = panel(p) + k * NR;
      sum_block<W, R, P>(x + k, K, from, K * NR, num_k, sums, P * NR, k == 0, from + FAR_AHEAD / sizeof(W), NR);
    }
    for (int r = 0; r < R; ++r) put(r, p * NR, sums + r * P * NR, P * NR);
  }

  void many(long first, long last) const {
    float sums[MC * NR];
    for (long m = 0; m < M; m += MC) {
      const long rows = M - m < MC ? M - m : MC;
      const long blocks = (rows + MR - 1) / MR;
      for (long p = first; p < last; ++p) {
        for (long k = 0; k < K; k += KC) {
          const long num_k = K - k < KC ? K - k : KC;
          for (long b = 0; b < blocks; ++b) {
            const long from = rows * b / blocks, to = rows * (b + 1) / blocks;
            const W* ahead = panel(p) + k * NR + FAR_AHEAD / sizeof(W) + b * num_k * (NR / blocks);
            rows_of(to - from, x + (m + from) * K + k, panel(p) + k * NR, num_k, sums + from * NR, k == 0, ahead, NR / blocks);
          }
        }
        for (long r = 0; r < rows; ++r) put(m + r, p * NR, sums + r * NR, NR);
      }
    }
  }

  void rows_of(long count, const float* xs, const W* ws, long num_k, float* sums, bool is_first, const W* ahead,
               long step) const {
    switch (count) {
      case 6: return sum_block<W, 6, 1>(xs, K, ws, 0, num_k, sums, NR, is_first, ahead, step);
      case 5: return sum_block<W, 5, 1>(xs, K, ws, 0, num_k, sums, NR, is_first, ahead, step);
      case 4: return sum_block<W, 4, 1>(xs, K, ws, 0, num_k, sums, NR, is_first, ahead, step);
      case 3: return sum_block<W, 3, 1>(xs, K, ws, 0, num_k, sums, NR, is_first, ahead, step);
      case 2: return sum_block<W, 2, 1>(xs, K, ws, 0, num_k, sums, NR, is_first, ahead, step);
      default: return sum_block<W, 1, 1>(xs, K, ws, 0, num_k, sums, NR, is_first, ahead, step);
    }
  }

  void columns(long first, long last) const {
    switch (M) {
      case 1: return few<1, 4>(first, last);
      case 2: return few<2, 3>(first, last);
      case 3: return few<3, 2>(first, last);
      case 4: return few<4, 1>(first, last);
      case 5: return few<5, 1>(first, last);
      case 6: return few<6, 1>(first, last);
      default: return many(first, last);
    }
  }

  long num_panels() const { return (N + NR - 1) / NR; }
  long least_part() const { return 4; }  // panels that a thread takes: as many as one row is multiplied by at once
};

template <class W>
void pack(const W* w, long row_step, long column_step, W* packed, long N, long K) {
  const long panels = (N + NR - 1) / NR;
  team::share(panels, 16, [=](long first, long last) {
    for (long p = first; p < last; ++p)
      for (long k = 0; k < K; ++k)
        for (int c = 0; c < NR; ++c) {
          const long n = p * NR + c;
          packed[(p * K + k) * NR + place_in_row(w, c)] = n < N ? w[n * row_step + k * column_step] : W(0);
        }
  });
}

// Rows of the weight by number, with the bits they were packed with.
template <class W>
void take(const W* packed, long K, const int64_t* numbers, long count, W* rows) {
  team::share(count, 64, [=](long first, long last) {
    for (long i = first; i < last; ++i) {
      const W* from = packed + numbers[i] / NR * K * NR + place_in_row(packed, int(numbers[i] % NR));
      for (long k = 0; k < K; ++k) rows[i * K + k] = from[k * NR];
    }
  });
}

}  // namespace
