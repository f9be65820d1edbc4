// Low-rank terms in bfloat16 by a CPU's matrix unit (AMX), for few_rows.cpp and low_rank.cpp: a thread's part in a call.
#pragma once

#include <cstdint>

#include "low_rank_expanding.h"
#include "low_rank_few.h"

#if HAS_LOW_RANK_TILES

namespace {
namespace low_rank {

// A thread's own part in a call: each layer's expanding, and what it wants of all low numbers.
class Terms {
 public:
  // This thread's for a call.
  static Terms& of(const Shrinking& low, void* const* ys) {
    static thread_local Terms its;
    if (its.call_ != low.call) its.begin(low, ys);
    return its;
  }

  // Wanted before anything is added; the units of shrinking have to be done.
  void take_low(const Shrinking& low) {
    if (!has_low_) take_low_numbers(low, numbers_);
    has_low_ = true;
  }
  bool has_low() const { return has_low_; }

  Expanding* layer(long l) { return has_[l] ? expanding_ + l : nullptr; }

  // Units [first, last) of the pieces for vectors, WIDE outputs of a layer each, counted through all layers.
  void few(const Shrinking& low, void* const* ys, long first, long last) {
    take_low(low);
    for (long l = 0; l < low.count; ++l) {
      const long here = low.few_units(l), from = first > 0 ? first : 0, to = least(last, here);
      if (from < to) ExpandingFew{low, l, numbers_[l], static_cast<bf16*>(ys[l])}.some(from, to);
      first -= here;
      last -= here;
    }
  }

 private:
  void begin(const Shrinking& low, void* const* ys) {
    call_ = low.call;
    has_low_ = false;
    for (long l = 0; l < low.count; ++l) {
      has_[l] = low.layers[l] != nullptr;
      if (!has_[l]) continue;
      cut(low, l, numbers_[l]);
      has_[l] = low.has_tiles(l);
      if (has_[l]) expanding_[l].begin(low, l, numbers_[l], ys[l]);
    }
  }

  uint64_t call_ = 0;
  bool has_[MOST_LAYERS] = {}, has_low_ = false;
  LowNumbers numbers_[MOST_LAYERS];
  Expanding expanding_[MOST_LAYERS];
};

}  // namespace low_rank
}  // namespace

#endif
