// The tokens of a step by their adapters, and memory that a thread keeps from call to call.
#pragma once

#include <cstdint>
#include <memory>

namespace {

struct Kept {
  std::unique_ptr<float[]> memory;
  long size = 0;

  float* of(long wanted) {
    if (size < wanted) {
      memory.reset(new float[wanted]);
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

}  // namespace
