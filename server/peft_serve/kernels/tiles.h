// y[M, N] = x[M, K] W[N, K]^T + b in bfloat16 by a CPU's matrix unit (AMX), for any number of rows.
//
// The unit multiplies tiles: 16 rows of x by 32 of K with 32 of K by 16 columns of W, summed in float32. W is kept in
// panels of NR = 32 columns, two tiles side by side for each 32 of K, in the order in which a tile wants them: pairs of
// K for each column. K is filled up with zeros. A tile sums its 32 products of K in a fixed order, and those of K follow
// each other, whatever M is and wherever the row stands: a row has the same bits alone and in any batch.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define HAS_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_TILES 0
#endif

namespace tiles {

typedef uint16_t bf16;

constexpr long ROWS = 16;          // of a tile of x or y,
constexpr long COLUMNS = 16;       // of a tile of y,
constexpr long DEPTH = 32;         // and of K
constexpr long SIDE = 2;           // tiles of W side by side in a panel
constexpr long NR = SIDE * COLUMNS;
constexpr long TILE = DEPTH * COLUMNS;  // numbers
constexpr long BLOCK = SIDE * TILE;     // a panel's for DEPTH of K
constexpr long X_BYTES = 1 << 20;  // of rows that are multiplied by one panel after the other: they stay in the L2 cache
constexpr long NEAR = 2048;        // bytes of each of several streams that are asked for in advance
constexpr long PAGE = 4096;        // bytes; memory and the CPU's own prefetching work by them,
constexpr long PAGES = 8;          // and by so many at once they give most

inline long depths(long K) { return (K + DEPTH - 1) / DEPTH; }

// Where W[n, k] lies.
inline long place(long n, long k, long K) {
  const long column = n % NR;
  return ((n / NR) * depths(K) + k / DEPTH) * BLOCK + column / COLUMNS * TILE + k % DEPTH / 2 * 2 * COLUMNS +
         column % COLUMNS * 2 + k % 2;
}

// Whether this process may use the unit: Linux wants to be asked, once, since its registers are large.
inline bool allowed() {
#if HAS_TILES
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl(2)
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}

#if HAS_TILES

// What the unit is told of its eight registers: sums 0 to 3, x 4 and 5, W 6 and 7.
struct alignas(64) Registers {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  // The upper rows of x go to one tile, the lower ones, where there are any, to another.
  Registers(long upper, long lower) {
    const long of[8] = {upper, upper, lower, lower, upper, lower, DEPTH / 2, DEPTH / 2};
    for (int i = 0; i < 8; ++i) {
      rows[i] = uint8_t(of[i]);
      bytes[i] = of[i] ? 64 : 0;
    }
  }
};

// The unit's registers are this thread's between two of these; other code finds them as if never used.
struct Using {
  ~Using() { _tile_release(); }

  void set(long upper, long lower) {
    if (upper == upper_ && lower == lower_) return;
    const Registers registers(upper, lower);
    _tile_loadconfig(&registers);
    upper_ = upper;
    lower_ = lower;
  }

 private:
  long upper_ = -1, lower_ = -1;
};

// The compiler does not know that tiles are read from memory and written to it.
inline void fence() { asm volatile("" ::: "memory"); }

// A quarter of what is asked for while a block of W is multiplied: lines of all of the next PAGES in turn, so that by
// the time their first block is wanted they are in the L2 cache. From a single stream, however early it is asked for,
// memory gives a fifth less; asked for all at once, lines keep x waiting.
inline void ask_ahead(const bf16* w, int quarter) {
  constexpr long REACH = PAGES * PAGE, LINE = 64, LINES = BLOCK * 2 / LINE / 4;
  const uintptr_t here = reinterpret_cast<uintptr_t>(w);
  const char* from = reinterpret_cast<const char*>((here / REACH + 1) * REACH + here % REACH / PAGES);
#pragma GCC unroll 8
  for (long i = quarter * LINES; i < (quarter + 1) * LINES; ++i)
    __builtin_prefetch(from + i % PAGES * PAGE + i / PAGES * LINE, 0, 2);
}

// sums[32, 32] = x[up to 32 rows] . panel. The panel comes from memory the first time; meanwhile(part, parts) is called
// for each part of it.
template <bool HAS_LOWER, bool IS_FAR, class Meanwhile>
inline void multiply(const bf16* x, long x_bytes, const bf16* panel, long num, float* sums, const Meanwhile& meanwhile) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (HAS_LOWER) {
    _tile_zero(2);
    _tile_zero(3);
  }
  const bf16* lower = x + ROWS * x_bytes / 2;
  for (long d = 0; d < num; ++d) {
    const bf16* w = panel + d * BLOCK;
    if constexpr (IS_FAR) ask_ahead(w, 0);
    _tile_loadd(6, w, 64);
    _tile_loadd(4, x + d * DEPTH, x_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (IS_FAR) ask_ahead(w, 1);
    if constexpr (HAS_LOWER) {
      _tile_loadd(5, lower + d * DEPTH, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (IS_FAR) ask_ahead(w, 2);
    _tile_loadd(7, w + TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (IS_FAR) ask_ahead(w, 3);
    if constexpr (HAS_LOWER) _tile_dpbf16ps(3, 5, 7);
    meanwhile(d, num);
  }
  _tile_stored(0, sums, NR * 4);
  _tile_stored(1, sums + COLUMNS, NR * 4);
  if constexpr (HAS_LOWER) {
    _tile_stored(2, sums + ROWS * NR, NR * 4);
    _tile_stored(3, sums + ROWS * NR + COLUMNS, NR * 4);
  }
  fence();
}

// One or two rows by vectors, which read from memory faster than tiles are loaded, in the unit's own order of sums: of
// each DEPTH of K the even products and the odd ones apart, then both, then the sum so far; denormal numbers are zero.
struct WithoutDenormals {
  const unsigned before = _mm_getcsr();
  WithoutDenormals() { _mm_setcsr(before | 0x8040); }
  ~WithoutDenormals() { _mm_setcsr(before); }
};

template <int R, int P>
__attribute__((noinline)) void add_up(const bf16* x, long x_step, const bf16* panels, long num, float* sums) {
  constexpr int V = P * SIDE;  // vectors of 16 columns
  __m512 sum[R][V] = {};
  for (long d = 0; d < num; ++d) {
    __m512 even[R][V] = {}, odd[R][V] = {};
    for (long pair = 0; pair < DEPTH / 2; ++pair) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const bf16* from = panels + (v / SIDE * num + d) * BLOCK + v % SIDE * TILE + pair * 2 * COLUMNS;
        __builtin_prefetch(from + NEAR / 2);
        const __m512i both = _mm512_load_si512(from);
        const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000u))));
#pragma GCC unroll 2
        for (int row = 0; row < R; ++row) {
          const bf16* at = x + row * x_step + d * DEPTH + 2 * pair;
          const __m512 x_low = _mm512_castsi512_ps(_mm512_set1_epi32(int(uint32_t(at[0]) << 16)));
          const __m512 x_high = _mm512_castsi512_ps(_mm512_set1_epi32(int(uint32_t(at[1]) << 16)));
          even[row][v] = _mm512_fmadd_ps(low, x_low, even[row][v]);
          odd[row][v] = _mm512_fmadd_ps(high, x_high, odd[row][v]);
        }
      }
    }
    for (int row = 0; row < R; ++row)
      for (int v = 0; v < V; ++v) sum[row][v] = sum[row][v] + (even[row][v] + odd[row][v]);
  }
  for (int row = 0; row < R; ++row)
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(sums + row * P * NR + v * COLUMNS, sum[row][v]);
}

// As many panels as can be with P at once, from `first` on.
template <int R, int P, class Result>
void few(const bf16* x, const bf16* w, long K, long& first, long last, const Result& result) {
  const long num = depths(K);
  const WithoutDenormals mode;
  float sums[R * P * NR];
  for (; first + P <= last; first += P) {
    add_up<R, P>(x, num * DEPTH, w + first * num * BLOCK, num, sums);
    for (long row = 0; row < R; ++row) result.put(row, first * NR, sums + row * P * NR, P * NR);
  }
}

#endif

// Results are put as they are.
struct JustPut {
  static constexpr bool ACTS = false;
  void prepare(long, long, long) const {}
  void meanwhile(long, long) const {}
};

// `Result` writes numbers of y: result.put(row, column, sums, count). Where they go was told a moment before, since
// what lies there has to be fetched as well: result.expect(row, column). Where `Then` acts, it puts a panel's results of up
// to 32 rows, which the unit's registers are set for: then(row, rows, column, sums, result), behind then.prepare(row, rows,
// column). While a panel is multiplied, it may have something to do: then.meanwhile(part, parts). One or two rows that are
// multiplied by vectors are just put.
template <class Result, class Then>
void columns(const bf16* x, const bf16* w, long M, long K, long first, long last, bool by_vectors, const Result& result,
             const Then& then) {
#if HAS_TILES
  if (by_vectors && M == 1) {
    few<1, 4>(x, w, K, first, last, result);
    few<1, 1>(x, w, K, first, last, result);
    return;
  }
  if (by_vectors && M == 2) {
    few<2, 3>(x, w, K, first, last, result);
    few<2, 1>(x, w, K, first, last, result);
    return;
  }
  const long num = depths(K), x_bytes = num * DEPTH * 2;
  const long most = X_BYTES / x_bytes / (2 * ROWS), group = (most > 0 ? most : 1) * 2 * ROWS;
  alignas(64) float sums[2 * ROWS * NR];
  Using unit;
  fence();
  for (long m = 0; m < M; m += group) {
    const long end = M - m < group ? M : m + group;
    for (long p = first; p < last; ++p) {
      const bf16* panel = w + p * num * BLOCK;
      for (long row = m; row < end; row += 2 * ROWS) {
        const long rows = end - row < 2 * ROWS ? end - row : 2 * ROWS;
        const bf16* from = x + row * (x_bytes / 2);
        for (long r = 0; r < rows; ++r) result.expect(row + r, p * NR);
        then.prepare(row, rows, p * NR);
        const auto meanwhile = [&then](long part, long parts) { then.meanwhile(part, parts); };
        unit.set(rows < ROWS ? rows : ROWS, rows > ROWS ? rows - ROWS : 0);
        if (rows > ROWS)
          row == m ? multiply<true, true>(from, x_bytes, panel, num, sums, meanwhile)
                   : multiply<true, false>(from, x_bytes, panel, num, sums, meanwhile);
        else
          row == m ? multiply<false, true>(from, x_bytes, panel, num, sums, meanwhile)
                   : multiply<false, false>(from, x_bytes, panel, num, sums, meanwhile);
        if constexpr (Then::ACTS)
          then(row, rows, p * NR, sums, result);
        else
          for (long r = 0; r < rows; ++r) result.put(row + r, p * NR, sums + r * NR, NR);
      }
    }
  }
#else
  (void)x, (void)w, (void)M, (void)K, (void)first, (void)last, (void)by_vectors, (void)result,
      (void)then;
#endif
}

}  // namespace tiles
