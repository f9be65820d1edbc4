// The factors of a layer's adapters, as low_rank.py has them.
#pragma once

#include <cstdint>

namespace {
namespace low_rank {

// What one adapter has at a layer, A [rank, inputs] and B [rank, outputs]; nothing where the rank is 0.
struct Factors {
  const void *a, *b;
  int64_t rank;
};

struct Layer {
  int64_t num_in, num_out;
  Factors of_slot[];
};

constexpr long MOST_LAYERS = 3;  // side by side

}  // namespace low_rank
}  // namespace
