// What happens to each token by itself between the products of a layer: its RMS norm, and the rotation of its queries
// and keys with the storing of its keys and values. One call each, because beside a small product the calls are what
// costs. A token's numbers have the same bits alone and in any batch: every token runs through the same loops.
//
// All numbers are float32.

#include <cmath>
#include <cstring>

#include "lanes.h"
#include "team.h"

namespace {

constexpr long SHARE = 1 << 15;  // numbers that pay for another thread

long tokens_at_once(long size) { return size >= SHARE ? 1 : SHARE / size; }

inline Lanes squares(Lanes sums, Lanes x) { return added(sums, x, x); }

float sum_of_squares(const float* x, long size) {
  Lanes sums[4] = {};
  long i = 0;
  for (; i + 4 * LANES <= size; i += 4 * LANES)
    for (int j = 0; j < 4; ++j) sums[j] = squares(sums[j], load(x + i + j * LANES));
  for (; i < size; i += LANES) sums[0] = squares(sums[0], load_of(x + i, size - i));
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// One head's rotation in place: halves (a, b) become (a cos - b sin, b cos + a sin), each half with its own angles.
void rotate(float* x, const float* cosines, const float* sines, long head) {
  const long half = head / 2;
  for (long i = 0; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cosines[i] - b * sines[i];
    x[half + i] = b * cosines[half + i] + a * sines[half + i];
  }
}

}  // namespace

extern "C" {

// y = gain * x / sqrt(mean(x^2) + epsilon) of `tokens` vectors of `size` numbers.
void row_rms_norm(const float* x, const float* gain, float* y, long tokens, long size, float epsilon) {
  team::share(tokens, tokens_at_once(size), [=](long first, long last) {
    for (long t = first; t < last; ++t) {
      const float* from = x + t * size;
      float* to = y + t * size;
      const float scale = 1.0f / std::sqrt(sum_of_squares(from, size) / float(size) + epsilon);
      for (long i = 0; i < size; ++i) to[i] = gain[i] * (from[i] * scale);
    }
  });
}

// q [tokens, heads, head] and k [tokens, kv_heads, head] are turned by the angles of their token, cosines and sines
// [tokens, head]; then k and v [tokens, kv_heads, head] are copied to their places of keys and values.
void row_rotate(float* q, float* k, const float* v, const float* cosines, const float* sines, const long* places,
                float* keys, float* values, long tokens, long heads, long kv_heads, long head) {
  const long kv = kv_heads * head;
  team::share(tokens, tokens_at_once(heads * head), [=](long first, long last) {
    for (long t = first; t < last; ++t) {
      const float *cos = cosines + t * head, *sin = sines + t * head;
      for (long h = 0; h < heads; ++h) rotate(q + (t * heads + h) * head, cos, sin, head);
      for (long h = 0; h < kv_heads; ++h) rotate(k + (t * kv_heads + h) * head, cos, sin, head);
      std::memcpy(keys + places[t] * kv, k + t * kv, kv * sizeof(float));
      std::memcpy(values + places[t] * kv, v + t * kv, kv * sizeof(float));
    }
  });
}
}
