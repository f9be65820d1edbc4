// Low-rank terms of few tokens of an adapter by vectors, y += B low, with the bits of low_rank_expanding.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "low_rank_numbers.h"

#if HAS_LOW_RANK_TILES

namespace {
namespace low_rank {

constexpr long AHEAD_OUT = 256;  // outputs of a row of B that are asked for in advance

// sums [N tokens, WIDE] += low . B for 16 ranks and so many outputs, by vectors, in the unit's own order of sums (see
// tiles.h): the first parts of low numbers and the second ones apart, then both, then the sum so far; denormal numbers are
// zero. Of each 32 outputs the even ones stand in front.
template <int N>
inline void expand_ranks(const float* low, long low_step, long ranks, const bf16* b, long num_out, long outputs,
                         float* sums) {
  for (long o = 0; o < outputs; o += WIDTH, sums += WIDTH) {
    const __mmask32 some = first_of(outputs - o);
    __m512 first[N][2] = {}, second[N][2] = {};
    for (long r = 0; r < ranks; ++r) {
      const bf16* from = b + r * num_out + o;
      __builtin_prefetch(from + AHEAD_OUT);
      const __m512i both = _mm512_maskz_loadu_epi16(some, from);
      const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
      const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000u))));
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const __m512 one = _mm512_set1_ps(low[n * low_step + 2 * r]);
        const __m512 other = _mm512_set1_ps(low[n * low_step + 2 * r + 1]);
        first[n][0] = _mm512_fmadd_ps(even, one, first[n][0]);
        first[n][1] = _mm512_fmadd_ps(odd, one, first[n][1]);
        second[n][0] = _mm512_fmadd_ps(even, other, second[n][0]);
        second[n][1] = _mm512_fmadd_ps(odd, other, second[n][1]);
      }
    }
    for (int n = 0; n < N; ++n)
      for (int half = 0; half < 2; ++half) {
        float* to = sums + n * WIDE + half * SIDE;
        _mm512_store_ps(to, _mm512_load_ps(to) + (first[n][half] + second[n][half]));
      }
  }
}

// y += B low for the pieces of one layer that are for vectors, WIDE outputs at a time, behind all that is put there.
struct ExpandingFew {
  const Shrinking& low;
  long l;
  const LowNumbers& numbers;
  bf16* y;

  void some(long first, long last) const {
    const tiles::WithoutDenormals mode;
    for (const Piece& piece : numbers.pieces)
      for (long unit = first; piece.by_vectors && unit < last; ++unit) one(piece, unit * WIDE);
  }

 private:
  void one(const Piece& piece, long output) const {
    static_assert(FEW == 4, "as many as here");
    const Factors& factors = low.layers[l]->of_slot[low.segments.each[piece.segment].slot];
    const long num_out = low.layers[l]->num_out, outputs = least(WIDE, num_out - output);
    const long step = parts(factors.rank, SIDE) * SIDE * 2;
    const float* from = numbers.floats(piece);
    alignas(64) float sums[FEW * WIDE];
    std::memset(sums, 0, piece.size() * WIDE * sizeof(float));
    for (long r = 0; r < factors.rank; r += SIDE) {
      const bf16* b = static_cast<const bf16*>(factors.b) + r * num_out + output;
      const long ranks = least(SIDE, factors.rank - r);
      switch (piece.size()) {
        case 1: expand_ranks<1>(from + 2 * r, step, ranks, b, num_out, outputs, sums); break;
        case 2: expand_ranks<2>(from + 2 * r, step, ranks, b, num_out, outputs, sums); break;
        case 3: expand_ranks<3>(from + 2 * r, step, ranks, b, num_out, outputs, sums); break;
        default: expand_ranks<4>(from + 2 * r, step, ranks, b, num_out, outputs, sums);
      }
    }
    for (long n = 0; n < piece.size(); ++n)
      for (long o = 0; o < outputs; o += WIDTH)
        put(y + (piece.first + n) * num_out + output + o, first_of(outputs - o), sums + n * WIDE + o);
  }

  static void put(bf16* to, __mmask32 some, const float* sums) {
    const __m512i before = _mm512_maskz_loadu_epi16(some, to);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(before, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(before, _mm512_set1_epi32(int(0xffff0000u))));
    const __m512i lower = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even + _mm512_load_ps(sums)));
    const __m512i upper = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd + _mm512_load_ps(sums + SIDE)));
    _mm512_mask_storeu_epi16(to, some, _mm512_or_si512(lower, _mm512_slli_epi32(upper, 16)));
  }
};

}  // namespace low_rank
}  // namespace

#endif
