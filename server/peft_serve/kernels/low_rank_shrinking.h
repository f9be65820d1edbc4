// Low-rank terms in bfloat16 by a CPU's matrix unit (AMX): see low_rank.cpp. Factors are read as they lie.
//
// Shrinking multiplies tiles of A, 16 ranks by 32 inputs, with tiles of x turned, 32 inputs by 16 tokens. What comes out
// is float32; expanding takes it as the sum of two bfloat16 numbers, 16 bits of it, and multiplies both with each number
// of B, 16 ranks at a time. A token's sums run in an order that depends on the rank and the number of inputs alone: by
// slices of the inputs, of a slice by every fourth 32 of them, then by ranks.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

#include "low_rank_layer.h"
#include "segments.h"
#include "tiles.h"

#if HAS_TILES && defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_LOW_RANK_TILES 1

namespace {
namespace low_rank {

using tiles::bf16;

constexpr long SIDE = 16;           // ranks, tokens or outputs of a tile
constexpr long DEPTH = 32;          // numbers that a tile's are summed over at once
constexpr long SUMS = SIDE * SIDE;  // of a tile
constexpr long SLICE = 1024;        // inputs that a unit of work sums over
constexpr long APART = 4;           // sums that run beside each other, for one waits long for its next
constexpr long WIDTH = 2 * SIDE;    // outputs of two tiles side by side, a panel's
constexpr long FEW = 4;             // tokens of a piece that vectors expand, in less time than a copy for tiles takes:
constexpr long WIDE = 512;          // so many outputs at a time

static_assert(WIDTH == tiles::NR, "terms are added to the results of a panel");

// 16 by 16 words, rows for columns.
inline void turn(__m512i (&rows)[SIDE]) {
  __m512i twos[SIDE], fours[SIDE];
#pragma GCC unroll 8
  for (int i = 0; i < SIDE; i += 2) {
    twos[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    twos[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < SIDE; i += 4) {
    fours[i] = _mm512_unpacklo_epi64(twos[i], twos[i + 2]);
    fours[i + 1] = _mm512_unpackhi_epi64(twos[i], twos[i + 2]);
    fours[i + 2] = _mm512_unpacklo_epi64(twos[i + 1], twos[i + 3]);
    fours[i + 3] = _mm512_unpackhi_epi64(twos[i + 1], twos[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i even = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0x88);
    const __m512i odd = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0xdd);
    const __m512i even_below = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0x88);
    const __m512i odd_below = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0xdd);
    rows[i] = _mm512_shuffle_i32x4(even, even_below, 0x88);
    rows[4 + i] = _mm512_shuffle_i32x4(odd, odd_below, 0x88);
    rows[8 + i] = _mm512_shuffle_i32x4(even, even_below, 0xdd);
    rows[12 + i] = _mm512_shuffle_i32x4(odd, odd_below, 0xdd);
  }
}

// The first `count` of 32 numbers.
inline __mmask32 first_of(long count) { return count >= DEPTH ? ~0u : count > 0 ? (1u << count) - 1 : 0; }

// Tiles of A by tiles of turned x.
struct ShrinkingTiles {
  ~ShrinkingTiles() { _tile_release(); }

  void set(long ranks) {
    if (ranks == ranks_) return;
    tiles::Registers registers(ranks, ranks);
    registers.rows[6] = registers.rows[7] = SIDE;
    _tile_loadconfig(&registers);
    ranks_ = ranks;
  }

 private:
  long ranks_ = -1;
};

// Slice `slice` of x for the tokens [16 block, 16 block + 16) as tiles: for each 32 inputs 16 pairs of each token. Zeros
// stand behind the inputs and the tokens.
struct TurnedSlice {
  long block = -1, slice = -1;
  alignas(64) uint32_t words[SLICE / DEPTH][SUMS];

  void take(const bf16* x, long num_in, long num_tokens, long its_block, long its_slice) {
    if (block == its_block && slice == its_slice) return;
    block = its_block;
    slice = its_slice;
    const long begin = slice * SLICE, end = least(begin + SLICE, num_in);
    for (long i = begin; i < end; i += DEPTH) {
      const __mmask32 some = first_of(end - i);
      __m512i rows[SIDE];
      for (long t = 0; t < SIDE; ++t)
        rows[t] = block * SIDE + t < num_tokens
                      ? _mm512_maskz_loadu_epi16(some, x + (block * SIDE + t) * num_in + i)
                      : _mm512_setzero_si512();
      turn(rows);
      for (long t = 0; t < SIDE; ++t) _mm512_store_si512(words[(i - begin) / DEPTH] + t * SIDE, rows[t]);
    }
  }
};

// A part of A: up to 16 ranks, a slice of the inputs.
struct PartOfA {
  const bf16* a;
  long num_in, ranks, num;  // inputs of the slice

  // Its numbers for the `d`th 32 inputs are on their way to the L2 cache: a line of each rank in turn, for memory gives more
  // of several pages at once.
  void ask(long d) const {
    if (d * DEPTH < num)
      for (long i = 0; i < ranks; ++i) __builtin_prefetch(a + i * num_in + d * DEPTH, 0, 2);
  }
};

// sums [16 ranks, 16 tokens] = A . x. Meanwhile the next one is asked for.
inline void shrink_tile(const PartOfA& of, const TurnedSlice& x, const PartOfA& next, float* sums, ShrinkingTiles& unit) {
  const bf16* const a = of.a;
  const long a_bytes = of.num_in * 2, whole = of.num / DEPTH;
  alignas(64) float apart[APART - 1][SUMS];
  alignas(64) bf16 rest[SIDE][DEPTH];
  unit.set(of.ranks);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  tiles::fence();
  long d = 0;
  for (; d + APART <= whole; d += APART) {
    next.ask(d);
    _tile_loadd(4, a + d * DEPTH, a_bytes);
    _tile_loadd(6, x.words[d], SIDE * 4);
    _tile_dpbf16ps(0, 4, 6);
    next.ask(d + 1);
    _tile_loadd(5, a + (d + 1) * DEPTH, a_bytes);
    _tile_loadd(7, x.words[d + 1], SIDE * 4);
    _tile_dpbf16ps(1, 5, 7);
    next.ask(d + 2);
    _tile_loadd(4, a + (d + 2) * DEPTH, a_bytes);
    _tile_loadd(6, x.words[d + 2], SIDE * 4);
    _tile_dpbf16ps(2, 4, 6);
    next.ask(d + 3);
    _tile_loadd(5, a + (d + 3) * DEPTH, a_bytes);
    _tile_loadd(7, x.words[d + 3], SIDE * 4);
    _tile_dpbf16ps(3, 5, 7);
  }
  for (; d < whole; ++d) {
    next.ask(d);
    _tile_loadd(4, a + d * DEPTH, a_bytes);
    _tile_loadd(6, x.words[d], SIDE * 4);
    _tile_dpbf16ps(0, 4, 6);
  }
  if (d * DEPTH < of.num) {
    const __mmask32 some = first_of(of.num - d * DEPTH);
    for (long i = 0; i < of.ranks; ++i)
      _mm512_store_si512(rest[i], _mm512_maskz_loadu_epi16(some, a + i * of.num_in + d * DEPTH));
    tiles::fence();
    _tile_loadd(4, rest, DEPTH * 2);
    _tile_loadd(6, x.words[d], SIDE * 4);
    _tile_dpbf16ps(0, 4, 6);
  }
  _tile_stored(0, sums, SIDE * 4);
  if (whole >= APART) {
    _tile_stored(1, apart[0], SIDE * 4);
    _tile_stored(2, apart[1], SIDE * 4);
    _tile_stored(3, apart[2], SIDE * 4);
  }
  tiles::fence();
  if (whole < APART) return;
  for (long i = 0; i < of.ranks * SIDE; i += SIDE) {
    const __m512 first = _mm512_load_ps(sums + i) + _mm512_load_ps(apart[0] + i);
    _mm512_store_ps(sums + i, first + (_mm512_load_ps(apart[1] + i) + _mm512_load_ps(apart[2] + i)));
  }
}

// A x for layers with the same inputs. The work is cut into units: 16 tokens, a slice of the inputs, 16 ranks of an adapter.
struct Shrinking {
  const Layer* layers[MOST_LAYERS];  // null where a layer has no terms
  long count;
  const Segments& segments;
  const bf16* x;
  long num_in, num_tokens;
  float* sums = nullptr;  // [units, 16, 16]
  long num_units = 0, cost = 0;
  const uint64_t call = number();  // no other is of this one

  Shrinking(const void* const* given, long count, const void* given_segments, const void* x)
      : count(count), segments(*static_cast<const Segments*>(given_segments)), x(static_cast<const bf16*>(x)) {
    num_in = num_tokens = 0;
    for (long l = 0; l < count; ++l) layers[l] = static_cast<const Layer*>(given[l]);
    for (long i = 0; i < segments.count; ++i) {
      const Segment& s = segments.each[i];
      num_tokens = s.last > num_tokens ? s.last : num_tokens;
      for (long l = 0; l < count; ++l)
        if (layers[l]) {
          const long ranks = parts(rank(l, s), SIDE);
          num_in = layers[l]->num_in;
          num_units += ranks * (parts(s.last, SIDE) - s.first / SIDE) * parts(num_in, SLICE);
          cost += rank(l, s) * s.size() * (num_in + layers[l]->num_out);
        }
    }
  }

  long rank(long l, const Segment& s) const { return layers[l]->of_slot[s.slot].rank; }
  long size() const { return num_units * SUMS; }

  // Pieces of a layer are expanded by vectors, or by tiles: see `Piece`.
  template <class Is>
  bool any_piece(long l, const Is& is) const {
    for (long i = 0; layers[l] && i < segments.count; ++i) {
      const Segment& s = segments.each[i];
      for (long at = s.first; rank(l, s) && at < s.last; at = (at / SIDE + 1) * SIDE)
        if (is(least(s.last, (at / SIDE + 1) * SIDE) - at)) return true;
    }
    return false;
  }
  bool has_tiles(long l) const { return any_piece(l, [](long size) { return size > FEW; }); }
  long few_units(long l) const {
    return any_piece(l, [](long size) { return size <= FEW; }) ? parts(layers[l]->num_out, WIDE) : 0;
  }
  long few_units() const {
    long num = 0;
    for (long l = 0; l < count; ++l) num += few_units(l);
    return num;
  }
  long num_blocks() const { return parts(num_tokens, SIDE); }
  long num_slices() const { return parts(num_in, SLICE); }

  // The first one that has tokens of a block, or of those behind it: segments are in the order of their tokens.
  long first_segment(long block) const {
    long low = 0, high = segments.count;
    while (low < high) {
      const long middle = (low + high) / 2;
      segments.each[middle].last > block * SIDE ? high = middle : low = middle + 1;
    }
    return low;
  }

  // act(layer, segment, first rank) for those that have tokens of a block.
  template <class Act>
  void each_of(long block, const Act& act) const {
    const long begin = first_segment(block);
    for (long l = 0; l < count; ++l)
      for (long i = begin; layers[l] && i < segments.count && segments.each[i].first < (block + 1) * SIDE; ++i)
        for (long r = 0; r < rank(l, segments.each[i]); r += SIDE) act(l, segments.each[i], r);
  }

  static uint64_t number() {
    static std::atomic<uint64_t> calls{0};
    return ++calls;
  }

  // Units [first, last).
  void some(long first, long last) const {
    if (first >= last) return;
    static thread_local TurnedSlice turned;
    turned.block = -1;
    ShrinkingTiles unit;
    struct Job {
      PartOfA part;
      long block, slice;
    } before{};
    long at = 0;
    const auto run = [&](const PartOfA& next) {
      turned.take(x, num_in, num_tokens, before.block, before.slice);
      shrink_tile(before.part, turned, next, sums + (at - 1) * SUMS, unit);
    };
    for (long block = 0; block < num_blocks() && at < last; ++block)
      for (long slice = 0; slice < num_slices() && at < last; ++slice)
        each_of(block, [&](long l, const Segment& s, long r) {
          if (at >= first && at < last) {
            const bf16* a = static_cast<const bf16*>(layers[l]->of_slot[s.slot].a) + r * num_in + slice * SLICE;
            const long num = least(SLICE, num_in - slice * SLICE);
            const Job job{{a, num_in, least(SIDE, rank(l, s) - r), num}, block, slice};
            if (at > first)
              run(job.part);
            else
              for (long d = 0; d * DEPTH < num; ++d) job.part.ask(d);
            before = job;
          }
          ++at;
        });
    at = last;
    run({nullptr, 0, 0, 0});
  }
};

}  // namespace low_rank
}  // namespace

#else
#define HAS_LOW_RANK_TILES 0
#endif
