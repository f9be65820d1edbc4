// What shrinking gave (low_rank_shrinking.h), as expanding takes it: a low number is the sum of two bfloat16 numbers, 16
// bits of it. The tokens of a segment are cut into pieces, each within 16 tokens.
#pragma once

#include <cstdint>
#include <vector>

#include "low_rank_shrinking.h"

#if HAS_LOW_RANK_TILES

namespace {
namespace low_rank {

// The tokens of a segment among 16. Few of them are multiplied by vectors, which read B as it lies.
struct Piece {
  long segment, first, last, block;
  bool by_vectors;
  long at;  // of its low numbers

  long size() const { return last - first; }
};

// What shrinking gave for one layer: a low number is the sum of two bfloat16 numbers. For tiles [chunks of 16 ranks,
// 16 tokens, 16 ranks] words of both, for vectors [tokens, ranks, 2] as float32.
struct LowNumbers {
  std::vector<Piece> pieces;
  std::vector<long> begins;  // of the pieces of each 16 tokens
  Kept kept;

  uint32_t* words(const Piece& its) const { return reinterpret_cast<uint32_t*>(kept.memory.get()) + its.at; }
  float* floats(const Piece& its) const { return kept.memory.get() + its.at; }
};

// The upper 16 bits of numbers, rounded, below those of what is left of them; no more than the first where it is infinite.
inline __m512i two_of(__m512 wide) {
  const __m512i first = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(wide));
  const __m512 left = wide - _mm512_castsi512_ps(_mm512_slli_epi32(first, 16));
  const __mmask16 is_finite = _mm512_cmp_ps_mask(_mm512_abs_ps(left), _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
  const __m512i second = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_mov_ps(is_finite, left)));
  return _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
}

// The pieces of a layer, and room for their numbers.
inline void cut(const Shrinking& low, long l, LowNumbers& all) {
  all.pieces.clear();
  all.begins.clear();
  long size = 0;
  for (long block = 0; block < low.num_blocks(); ++block) {
    all.begins.push_back(long(all.pieces.size()));
    for (long i = low.first_segment(block); i < low.segments.count; ++i) {
      const Segment& s = low.segments.each[i];
      if (s.first >= (block + 1) * SIDE) break;
      const long first = s.first > block * SIDE ? s.first : block * SIDE, last = least(s.last, (block + 1) * SIDE);
      const long ranks = parts(low.rank(l, s), SIDE) * SIDE;
      if (!ranks) continue;
      all.pieces.push_back({i, first, last, block, last - first <= FEW, size});
      size += ranks * SIDE;
    }
  }
  all.begins.push_back(long(all.pieces.size()));
  all.kept.of(size + 1);
}

// All low numbers, behind the last unit of shrinking; the pieces are cut.
inline void take_low_numbers(const Shrinking& low, LowNumbers* of_layer) {
  const long slices = low.num_slices();
  long before = 0;
  for (long block = 0; block < low.num_blocks(); ++block) {
    long jobs = 0, job = 0;
    low.each_of(block, [&](long, const Segment&, long) { ++jobs; });
    const Piece* piece = nullptr;
    low.each_of(block, [&](long l, const Segment& s, long r) {
      const LowNumbers& all = of_layer[l];
      const long number = &s - low.segments.each;
      if (r == 0)
        for (piece = &all.pieces[all.begins[block]]; piece->segment != number;) ++piece;
      const float* from = low.sums + (before + job++) * SUMS;
      const long ranks = low.rank(l, s), here = least(SIDE, ranks - r);
      __m512i rows[SIDE];
      for (long i = 0; i < SIDE; ++i) {
        __m512 sum = i < here ? _mm512_load_ps(from + i * SIDE) : _mm512_setzero_ps();
        for (long slice = 1; i < here && slice < slices; ++slice)
          sum += _mm512_load_ps(from + slice * jobs * SUMS + i * SIDE);
        rows[i] = _mm512_castps_si512(sum);
      }
      turn(rows);
      for (long token = piece->first; token < piece->last; ++token) {
        const __m512i both = two_of(_mm512_castsi512_ps(rows[token % SIDE]));
        if (!piece->by_vectors) {
          _mm512_store_si512(all.words(*piece) + (r + token % SIDE) * SIDE, both);
          continue;
        }
        float* to = all.floats(*piece) + ((token - piece->first) * parts(ranks, SIDE) * SIDE + r) * 2;
        const __m512i first = _mm512_slli_epi32(both, 16), second = _mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000u)));
        const __m512i even = _mm512_unpacklo_epi32(first, second), odd = _mm512_unpackhi_epi32(first, second);
        _mm512_storeu_si512(to, _mm512_permutex2var_epi64(even, _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), odd));
        _mm512_storeu_si512(to + SIDE, _mm512_permutex2var_epi64(even, _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4), odd));
      }
    });
    before += jobs * slices;
  }
}

}  // namespace low_rank
}  // namespace

#endif
