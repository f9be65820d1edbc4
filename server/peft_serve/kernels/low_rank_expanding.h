// Low-rank terms of many tokens of an adapter by a CPU's matrix unit, y += B low: both parts of a low number are multiplied
// with each number of B, 16 ranks at a time, in the order of the ranks.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "low_rank_numbers.h"

#if HAS_LOW_RANK_TILES

namespace {
namespace low_rank {

constexpr long FETCHED = 256;  // outputs of a row of B that are asked for at once: memory gives more in a row

// y += B low for the pieces of one layer that are for tiles, a panel of 32 outputs at a time. The unit has the tiles of a
// product: see tiles.h.
//
// Tiles multiply a copy of B in which each number stands twice, for the two parts of a low number. The copy of a panel's
// part of B is made bit by bit while the panel is multiplied, for that waits for memory, and the copy for the caches.
// Likewise the parts of B for the next panels are asked for, so many outputs of a row at once.
class Expanding {
 public:
  void begin(const Shrinking& its_low, long its_layer, const LowNumbers& its_numbers, void* its_y) {
    low_ = &its_low;
    layer_ = its_low.layers[its_layer];
    numbers_ = &its_numbers;
    y_ = static_cast<bf16*>(its_y);
    planned_.clear();
    rows_.clear();
    copies_.clear();
    output_ = fetched_ = -1;
    num_copied_ = num_wanted_ = num_fetched_ = 0;
  }

  // What comes next is the panel of 32 outputs from `column` on and the rows [row, row + rows), 32 at most, row being a
  // multiple of 32.
  void prepare(long row, long rows, long column) {
    first_ = numbers_->begins[least(row / SIDE, low_->num_blocks())];
    last_ = numbers_->begins[least(parts(row + rows, SIDE), low_->num_blocks())];
    row_ = row;
    if (!is_planned()) plan();
    else if (output_ == column) return;
    output_ = column;
    num_copied_ = 0;
    ask();
  }

  // The `part`th of so many parts of what can be done before `add`.
  void meanwhile(long part, long parts) {
    fetch(num_wanted_ * (part + 1) / parts);
    copy(long(copies_.size()) * (part + 1) / parts);
  }

  // Behind `prepare`: from(t, some, first, second) gives a row's results so far, the numbers of `some`. Returns the rows
  // that were put.
  template <class From>
  uint32_t add(const From& from) {
    meanwhile(0, 1);
    const tiles::WithoutDenormals mode;
    const __mmask32 some = first_of(layer_->num_out - output_);
    uint32_t put = 0;
    for (long i = first_; i < last_; ++i) {
      const Piece& piece = numbers_->pieces[i];
      if (piece.by_vectors) continue;
      alignas(64) float sums[SIDE * WIDTH];
      const uint32_t* copied = copy_.of(0) + planned_[i - first_].at;
      tiles::fence();
      piece.block * SIDE > row_ ? multiply_lower(piece, copied, sums) : multiply_upper(piece, copied, sums);
      tiles::fence();
      put |= put_rows(piece, some, sums + piece.first % SIDE * WIDTH, from);
    }
    return put;
  }

 private:
  struct Planned {
    long segment;
    bool by_vectors;
    long at;  // of its copy: for each 16 ranks two tiles, the left and the right half of the panel
  };
  struct CopiedRow {
    const bf16* b;
    long to;
  };
  struct Words {
    Kept kept;
    uint32_t* of(long wanted) { return reinterpret_cast<uint32_t*>(kept.of(wanted)); }
  };

  long rank(const Piece& piece) const { return layer_->of_slot[low_->segments.each[piece.segment].slot].rank; }
  const bf16* b(const Piece& piece) const {
    return static_cast<const bf16*>(layer_->of_slot[low_->segments.each[piece.segment].slot].b);
  }

  bool is_planned() const {
    if (long(planned_.size()) != last_ - first_) return false;
    for (long i = first_; i < last_; ++i) {
      const Planned& its = planned_[i - first_];
      const Piece& piece = numbers_->pieces[i];
      if (its.segment != piece.segment || its.by_vectors != piece.by_vectors) return false;
    }
    return true;
  }

  void plan() {
    planned_.clear();
    rows_.clear();
    copies_.clear();
    fetched_ = -1;
    long size = 0;
    for (long i = first_; i < last_; ++i) {
      const Piece& piece = numbers_->pieces[i];
      const bool is_copied = !planned_.empty() && planned_.back().segment == piece.segment && !planned_.back().by_vectors;
      planned_.push_back({piece.segment, piece.by_vectors, is_copied ? planned_.back().at : size});
      if (piece.by_vectors || is_copied) continue;
      for (long r = 0; r < rank(piece); ++r) {
        rows_.push_back(b(piece) + r * layer_->num_out);
        copies_.push_back({rows_.back(), size + r / SIDE * 2 * SUMS + r % SIDE * SIDE});
      }
      size += parts(rank(piece), SIDE) * 2 * SUMS;
    }
    std::memset(copy_.of(size + 1), 0, size * 4);  // what is behind an adapter's ranks stays so
  }

  // What is fetched along with this panel: of some rows the next FETCHED outputs, so that all rows have been when they
  // come; or what is left of these outputs, of all rows, where nobody has fetched them.
  void ask() {
    constexpr long PANELS = FETCHED / WIDTH;
    const long here = output_ / FETCHED, part = output_ % FETCHED / WIDTH, num = long(rows_.size());
    const bool is_urgent = here != fetched_;
    first_row_ = is_urgent ? 0 : num * part / PANELS;
    end_row_ = is_urgent ? num : num * (part + 1) / PANELS;
    first_line_ = is_urgent ? output_ : (here + 1) * FETCHED;
    const long last = least((is_urgent ? here + 1 : here + 2) * FETCHED, layer_->num_out);
    num_wanted_ = last > first_line_ ? (end_row_ - first_row_) * parts(last - first_line_, WIDTH) : 0;
    num_fetched_ = 0;
    fetched_ = !is_urgent && part == PANELS - 1 ? here + 1 : here;
  }

  // Lines up to `end` of what is wanted: of each of some rows in turn, for memory gives more of several pages at once.
  void fetch(long end) {
    if (num_fetched_ >= end) return;
    const long rows = end_row_ - first_row_;
    for (; num_fetched_ < end; ++num_fetched_)
      __builtin_prefetch(rows_[first_row_ + num_fetched_ % rows] + first_line_ + num_fetched_ / rows * WIDTH, 0, 2);
  }

  void copy(long end) {
    const __mmask32 some = first_of(layer_->num_out - output_);
    const __m512i once = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i left = _mm512_or_si512(once, _mm512_slli_epi32(once, 16));
    const __m512i right = _mm512_or_si512(left, _mm512_set1_epi16(16));
    const CopiedRow* row = copies_.data() + num_copied_;
    const CopiedRow* const behind = copies_.data() + end;
    uint32_t* const copied = copy_.of(0);
    const long output = output_;
    for (; row < behind; ++row) {
      const __m512i its = _mm512_maskz_loadu_epi16(some, row->b + output);
      _mm512_store_si512(copied + row->to, _mm512_permutexvar_epi16(left, its));
      _mm512_store_si512(copied + row->to + SUMS, _mm512_permutexvar_epi16(right, its));
    }
    num_copied_ = end > num_copied_ ? end : num_copied_;
  }

  // The assembler wants registers by their numbers.
  void multiply_upper(const Piece& piece, const uint32_t* copied, float* sums) const {
    _tile_zero(0);
    _tile_zero(1);
    for (long r = 0; r < rank(piece); r += SIDE, copied += 2 * SUMS) {
      _tile_loadd(4, numbers_->words(piece) + r * SIDE, SIDE * 4);
      _tile_loadd(6, copied, SIDE * 4);
      _tile_loadd(7, copied + SUMS, SIDE * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, sums, WIDTH * 4);
    _tile_stored(1, sums + SIDE, WIDTH * 4);
  }
  void multiply_lower(const Piece& piece, const uint32_t* copied, float* sums) const {
    _tile_zero(2);
    _tile_zero(3);
    for (long r = 0; r < rank(piece); r += SIDE, copied += 2 * SUMS) {
      _tile_loadd(5, numbers_->words(piece) + r * SIDE, SIDE * 4);
      _tile_loadd(6, copied, SIDE * 4);
      _tile_loadd(7, copied + SUMS, SIDE * 4);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(2, sums, WIDTH * 4);
    _tile_stored(3, sums + SIDE, WIDTH * 4);
  }

  // The rows of a piece; sums are those of its first one on.
  template <class From>
  uint32_t put_rows(const Piece& piece, __mmask32 some, const float* sums, const From& given) const {
    const From from = given;
    const long num_out = layer_->num_out, last = piece.last;
    bf16* const y = y_ + output_;
    for (long t = piece.first; t < last; ++t, sums += WIDTH) {
      __m512 left, right;
      from(t, some, left, right);
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(right + _mm512_load_ps(sums + SIDE), left + _mm512_load_ps(sums));
      _mm512_mask_storeu_epi16(y + t * num_out, some, both);
    }
    return ((2u << (last - 1 - row_)) - 1) & ~((1u << (piece.first - row_)) - 1);
  }

  const Shrinking* low_ = nullptr;
  const Layer* layer_ = nullptr;
  const LowNumbers* numbers_ = nullptr;
  bf16* y_ = nullptr;
  long first_ = 0, last_ = 0, row_ = 0, output_ = -1;  // pieces, and the panel's first row and output
  std::vector<Planned> planned_;             // for those pieces
  std::vector<const bf16*> rows_;            // of B that they want
  std::vector<CopiedRow> copies_;
  Words copy_;
  long num_copied_ = 0;
  long fetched_ = -1;  // so many times FETCHED outputs, of which all rows have been
  long first_row_ = 0, end_row_ = 0, first_line_ = 0, num_wanted_ = 0, num_fetched_ = 0;
};

// A row's results as they were put.
struct FromResults {
  const bf16* y;
  long num_out, column;

  void operator()(long t, __mmask32 some, __m512& left, __m512& right) const {
    const __m512i row = _mm512_maskz_loadu_epi16(some, y + t * num_out + column);
    left = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(row)), 16));
    right = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(row, 1)), 16));
  }
};

// A row's results as they would be put: sums and bias, rounded.
struct FromSums {
  const float* sums;  // [rows from `row` on, 32]
  long row;
  const float* bias;  // of `column`, or null

  void operator()(long t, __mmask32 some, __m512& left, __m512& right) const {
    const float* its = sums + (t - row) * WIDTH;
    left = rounded(_mm512_loadu_ps(its), __mmask16(some), bias);
    right = rounded(_mm512_loadu_ps(its + SIDE), __mmask16(some >> SIDE), bias + SIDE);
  }

  __m512 rounded(__m512 sum, __mmask16 some, const float* its_bias) const {
    if (bias) sum += _mm512_maskz_loadu_ps(some, its_bias);
    const __m512i bits = _mm512_castps_si512(sum), one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 is_number = _mm512_cmp_ps_mask(sum, sum, _CMP_ORD_Q);
    const __m512i word = _mm512_mask_mov_epi32(quiet, is_number, up);
    return _mm512_castsi512_ps(_mm512_and_si512(word, _mm512_set1_epi32(int(0xffff0000u))));
  }
};

}  // namespace low_rank
}  // namespace

#endif
