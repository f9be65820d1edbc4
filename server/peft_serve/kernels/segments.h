// The tokens of a step by their adapters, the factors of a layer's adapters, and memory that a thread keeps from call to
// call.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace {

// It begins with a line of the cache.
struct Kept {
  static constexpr std::align_val_t LINE{64};
  struct Back {
    void operator()(float* memory) const { ::operator delete[](memory, LINE); }
  };
  std::unique_ptr<float[], Back> memory;
  long size = 0;

  float* of(long wanted) {
    if (size < wanted) {
      memory.reset(new (LINE) float[wanted]);
      size = wanted;
    }
    return memory.get();
  }
};

// Tokens [first, last) belong to the adapter of a slot.
struct Segment {
  int64_t slot, first, last;

  long size() const { return last - first; }
};

struct Segments {
  int64_t count;
  Segment each[];
};

inline long parts(long count, long size) { return (count + size - 1) / size; }
inline long least(long a, long b) { return a < b ? a : b; }

}  // namespace
