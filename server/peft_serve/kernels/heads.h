// Query heads that share a key/value head, over a chunk of its positions: scores, the softmax so far and its sums.
//
// With a running maximum (Milakov and Gimelshein, arXiv:1805.02867), in float32. What comes out depends on the chunks
// of the one row alone, to the bit, and not on which heads are computed together.
#pragma once

#include <cmath>

#include "lanes.h"

namespace {

constexpr int CHUNK = 32;     // positions
constexpr int MAX_HEAD = 256;
constexpr long LINE = 64;     // bytes of a cache's
constexpr int MOST_HEADS = NUM_WIDE > LANES ? 8 : 5;  // that are computed together: their sums stay in registers
constexpr int TURNED_FROM = 4;  // query heads of a key/value head that pay for turning its keys

// The sums of LANES vectors' lanes, as one vector.
inline Lanes lane_sums(const Lanes* a) {
  Lanes two[4], four[2];
  for (int i = 0; i < 4; ++i)
    two[i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
             __builtin_shufflevector(a[2 * i], a[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  for (int i = 0; i < 2; ++i)
    four[i] = __builtin_shufflevector(two[2 * i], two[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
              __builtin_shufflevector(two[2 * i], two[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(four[0], four[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(four[0], four[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// Eight vectors of words become their first words, their second ones, and so on.
inline void transpose(Words (&a)[LANES]) {
  Words two[LANES], four[LANES];
  for (int i = 0; i < LANES; i += 2) {
    two[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    two[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < LANES; i += 4)
    for (int j = 0; j < 2; ++j) {
      four[i + 2 * j] = __builtin_shufflevector(two[i + j], two[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      four[i + 2 * j + 1] = __builtin_shufflevector(two[i + j], two[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    a[i] = __builtin_shufflevector(four[i], four[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    a[i + 4] = __builtin_shufflevector(four[i], four[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// A chunk as it is computed with. Keys are turned where it pays: then they meet queries without sums of lanes.
struct Chunk {
  bool is_turned;
  alignas(64) float keys[MAX_HEAD * CHUNK];    // [head, CHUNK] or [CHUNK, head]; zeros where there is no position
  alignas(64) float values[CHUNK * MAX_HEAD];  // [CHUNK, head]
  int count;
};

// What is read next, line by line: to the CPU it is anywhere in memory, and it would wait for each of them. They are
// asked for little by little, since it waits with everything else, too, while it has asked for too many.
struct Soon {
  const void* lines[2 * CHUNK * (MAX_HEAD * 4 / LINE)];
  long count = 0, told = 0;

  void tell(long num) {
    for (const long end = told + num < count ? told + num : count; told < end; ++told) __builtin_prefetch(lines[told]);
  }
};

// H query heads with a chunk, so that each of its numbers is loaded once for all of them.
template <int H>
struct Heads {
  long head;
  const float* queries;  // [H, head]
  float *sums, *most, *total;  // so far: softmax(scores) v is sums / total, the scores being less `most`
  const Chunk& chunk;
  Soon& soon;
  alignas(64) float shares[H * CHUNK];  // scores, then e^(score - most)
  float shrinks[H];

  void run() {
    if (!chunk.is_turned)
      for (int at = 0; at < chunk.count; at += LANES) score_rows(at);
    else if (chunk.count > NUM_WIDE)
      for (int at = 0; at < chunk.count; at += 2 * NUM_WIDE) score<2>(at);
    else
      score<1>(0);
    for (int h = 0; h < H; ++h) {
      for (int c = chunk.count; c < CHUNK; ++c) shares[h * CHUNK + c] = -INFINITY;
      soften(h);
    }
    long d = 0;
    for (; d + 2 * NUM_WIDE <= head; d += 2 * NUM_WIDE) add<WideLanes, 2>(d);
    for (; d + NUM_WIDE <= head; d += NUM_WIDE) add<WideLanes, 1>(d);
    for (; d < head; d += LANES) add<Lanes, 1>(d);
  }

 private:
  // Scores of a vector of positions, from keys as they are.
  void score_rows(int at) {
    for (int h = 0; h < H; ++h) {
      Lanes dots[LANES] = {};
      for (long d = 0; d < head; d += LANES) {
        soon.tell(1);
        const Lanes part = load(queries + h * head + d);
        for (int i = 0; i < LANES; ++i) dots[i] = added(dots[i], part, load(chunk.keys + (at + i) * head + d));
      }
      store(shares + h * CHUNK + at, lane_sums(dots));
    }
  }

  // Those of N vectors of positions, from turned keys.
  template <int N>
  void score(int at) {
    WideLanes dots[H][N] = {};
    for (long d = 0; d < head; ++d) {
      soon.tell(1);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const WideLanes key = load_wide(chunk.keys + d * CHUNK + at + n * NUM_WIDE);
#pragma GCC unroll 8
        for (int h = 0; h < H; ++h) dots[h][n] = added(dots[h][n], key, queries[h * head + d]);
      }
    }
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) store(shares + h * CHUNK + at + n * NUM_WIDE, dots[h][n]);
  }

  // Scores become e^(score - most); what was found so far is to shrink by as much as `most` has grown.
  void soften(int h) {
    float* const scores = shares + h * CHUNK;
    Lanes largest = Lanes{} - INFINITY, sums_of = {};
    for (int c = 0; c < chunk.count; c += LANES) {
      const Lanes these = load(scores + c);
      largest = these > largest ? these : largest;
    }
    float now = most[h];
    for (int i = 0; i < LANES; ++i) now = largest[i] > now ? largest[i] : now;
    for (int c = 0; c < chunk.count; c += LANES) {
      const Lanes share = exp_of(load(scores + c) - now);
      store(scores + c, share);
      sums_of = sums_of + share;
    }
    shrinks[h] = most[h] == now ? 1.0f : std::exp(most[h] - now);  // of the first chunk: e^-inf = 0
    most[h] = now;
    total[h] = total[h] * shrinks[h] + sum(sums_of);
  }

  // sums = sums * shrink + shares . values, of N vectors from d on
  template <class V, int N>
  void add(long d) {
    constexpr int SIZE = sizeof(V) / sizeof(float);
    V acc[H][N];
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[h][n] = load_as(V{}, sums + h * head + d + n * SIZE) * shrinks[h];
    for (int c = 0; c < chunk.count; ++c) {
      soon.tell(1);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const V value = load_as(V{}, chunk.values + c * head + d + n * SIZE);
#pragma GCC unroll 8
        for (int h = 0; h < H; ++h) acc[h][n] = added(acc[h][n], value, shares[h * CHUNK + c]);
      }
    }
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) store(sums + h * head + d + n * SIZE, acc[h][n]);
  }
};

}  // namespace
