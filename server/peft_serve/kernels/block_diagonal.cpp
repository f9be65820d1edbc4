// Block-diagonal maps of many adapters, y[t] = concat_j(x[t]_j R_j), the blocks R_j being those of token t's adapter.
//
// Tokens of one adapter lie side by side: a step is a list of segments. Blocks lie where their owner keeps them, [n, k, k]
// with n k features, and are read once for each segment. Sums are float32, over the k inputs of a block in order: a token
// gets the same bits alone and in any step. A block's inputs are taken up before its outputs are written: y may be x.

#include <cstdint>

#include "lanes.h"
#include "segments.h"
#include "team.h"

namespace {

constexpr int SHARING = 4;           // tokens that share a pass over a block: two vectors of outputs each
constexpr long WORTH_TEAM = 60000;   // multiply-adds; fewer take less time than starting a team
constexpr long AHEAD = 1024;         // bytes asked for in advance

// What one adapter has at a layer; nothing where there are no blocks.
struct Blocks {
  const void* blocks;
  int64_t size, count;
};

struct Layer {
  int64_t num_features;
  Blocks of_slot[];
};

// y[m][o..] = x[m] . R[..][o..] for M tokens and W vectors of outputs; x [M, k] is float32.
template <class T, int M, int W>
inline void mix_part(const float* x, const T* block, long size, long o, T* y, long y_step) {
  Lanes sums[M][W] = {};
  for (long r = 0; r < size; ++r) {
    const T* row = block + r * size + o;
    if (M == 1) __builtin_prefetch(reinterpret_cast<const char*>(row) + AHEAD);
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      const Lanes from = load_of(row + w * LANES, size - o - w * LANES);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sums[m][w] = added(sums[m][w], from, x[m * size + r]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int w = 0; w < W; ++w) {
      const long rest = size - o - w * LANES;
      T* to = y + m * y_step + o + w * LANES;
      if (rest >= LANES)
        store(to, sums[m][w]);
      else if (rest > 0)
        store_of(to, sums[m][w], rest);
    }
}

template <class T, int M>
void mix_tokens(const T* x, long step, const T* block, long size, T* y) {
  static thread_local Kept kept;
  float* taken = kept.of(M * size + LANES);
  for (int m = 0; m < M; ++m)
    for (long i = 0; i < size; i += LANES) {
      const Lanes part = load_of(x + m * step + i, size - i);
      if (size - i >= LANES)
        store(taken + m * size + i, part);
      else
        store_of(taken + m * size + i, part, size - i);
    }
  constexpr int WIDE = M == 1 ? 4 : 2;  // as many sums as keep a core busy
  long o = 0;
  for (; o + (WIDE - 1) * LANES < size; o += WIDE * LANES) mix_part<T, M, WIDE>(taken, block, size, o, y, step);
  for (; o < size; o += LANES) mix_part<T, M, 1>(taken, block, size, o, y, step);
}

template <class T>
void mix_block(const T* x, long step, const T* block, long size, T* y, long count) {
  for (; count >= SHARING; count -= SHARING, x += SHARING * step, y += SHARING * step)
    mix_tokens<T, SHARING>(x, step, block, size, y);
  switch (count) {
    case 3: return mix_tokens<T, 3>(x, step, block, size, y);
    case 2: return mix_tokens<T, 2>(x, step, block, size, y);
    case 1: return mix_tokens<T, 1>(x, step, block, size, y);
  }
}

template <class T>
void mix(const void* given_layer, const void* given_segments, T* y, const T* x) {
  const Layer& layer = *static_cast<const Layer*>(given_layer);
  const Segments& segments = *static_cast<const Segments*>(given_segments);
  const long step = layer.num_features;
  long units = 0, cost = 0;
  for (long i = 0; i < segments.count; ++i) {
    const Blocks& its = layer.of_slot[segments.each[i].slot];
    units += its.count;
    cost += its.count * its.size * its.size * segments.each[i].size();
  }
  const auto work = [&](long first, long last) {
    long at = 0;
    for (long i = 0; i < segments.count && at < last; ++i) {
      const Segment& s = segments.each[i];
      const Blocks& its = layer.of_slot[s.slot];
      const long begin = first > at ? first - at : 0, end = last - at < its.count ? last - at : its.count;
      for (long j = begin; j < end; ++j) {
        const long place = s.first * step + j * its.size;
        const T* block = static_cast<const T*>(its.blocks) + j * its.size * its.size;
        mix_block(x + place, step, block, its.size, y + place, s.size());
      }
      at += its.count;
    }
  };
  if (cost < WORTH_TEAM) return work(0, units);
  const long grain = units / (4 * team::num_threads());
  team::share(units, grain > 1 ? grain : 1, work);
}

}  // namespace

extern "C" {

// y [tokens, features] = the mixed x [tokens, features], both without gaps, for the tokens whose adapter has blocks; y of
// the others stays. y may be x.
void block_diagonal_f32(const void* layer, const void* segments, void* y, const void* x) {
  mix(layer, segments, static_cast<float*>(y), static_cast<const float*>(x));
}
void block_diagonal_bf16(const void* layer, const void* segments, void* y, const void* x) {
  mix(layer, segments, static_cast<Half*>(y), static_cast<const Half*>(x));
}
}
