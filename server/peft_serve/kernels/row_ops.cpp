// What happens to each token by itself between the products of a layer: its RMS norm, the rotation of its queries and
// keys with the storing of its keys and values, the gate, the residual. One call each, because beside a small product the
// calls are what costs. A token's numbers have the same bits alone and in any batch: every token runs through the same
// loops.
//
// Numbers are float32, or bfloat16 that is widened, and rounded wherever the models of transformers round.

#include <cmath>
#include <cstring>

#include "lanes.h"
#include "team.h"

namespace {

constexpr long SHARE = 1 << 13;  // numbers that pay for another thread

long tokens_at_once(long size) { return size >= SHARE ? 1 : SHARE / size; }

inline Lanes squares(Lanes sums, Lanes x) { return added(sums, x, x); }

template <class T>
inline void put(T* to, Lanes lanes, long count) {
  if (count >= LANES)
    store(to, lanes);
  else
    store_of(to, lanes, count);
}

template <class T>
float sum_of_squares(const T* x, long size) {
  Lanes sums[4] = {};
  long i = 0;
  for (; i + 4 * LANES <= size; i += 4 * LANES)
    for (int j = 0; j < 4; ++j) sums[j] = squares(sums[j], load(x + i + j * LANES));
  for (; i < size; i += LANES) sums[0] = squares(sums[0], load_of(x + i, size - i));
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
inline void rms_norm_one(const T* from, const T* gain, T* to, long size, float epsilon) {
  const float scale = 1.0f / std::sqrt(sum_of_squares(from, size) / float(size) + epsilon);
  for (long i = 0; i < size; i += LANES) {
    const Lanes normed = rounded(from, load_of(from + i, size - i) * scale);
    put(to + i, load_of(gain + i, size - i) * normed, size - i);
  }
}

template <class T>
void rms_norm(const T* x, const T* gain, T* y, long tokens, long size, float epsilon) {
  team::share(tokens, tokens_at_once(size), [=](long first, long last) {
    for (long t = first; t < last; ++t) rms_norm_one(x + t * size, gain, y + t * size, size, epsilon);
  });
}

template <class T>
void own_rms_norm(const T* x, const T* gains, const int64_t* slots, T* y, long tokens, long each, long size,
                  float epsilon) {
  team::share(tokens, tokens_at_once(each * size), [=](long first, long last) {
    for (long t = first; t < last; ++t)
      for (long i = t * each; i < (t + 1) * each; ++i)
        rms_norm_one(x + i * size, gains + slots[t] * size, y + i * size, size, epsilon);
  });
}

// One head's rotation in place: halves (a, b) become (a cos - b sin, b cos + a sin), each half with its own angles.
template <class T>
void rotate(T* x, const T* cosines, const T* sines, long head) {
  const long half = head / 2;
  for (long i = 0; i < half; i += LANES) {
    const long rest = half - i;
    const Lanes a = load_of(x + i, rest), b = load_of(x + half + i, rest);
    const Lanes a_cos = rounded(x, a * load_of(cosines + i, rest)), b_sin = rounded(x, b * load_of(sines + i, rest));
    const Lanes b_cos = rounded(x, b * load_of(cosines + half + i, rest));
    const Lanes a_sin = rounded(x, a * load_of(sines + half + i, rest));
    put(x + i, a_cos - b_sin, rest);
    put(x + half + i, b_cos + a_sin, rest);
  }
}

template <class T>
void rotate_and_store(T* q, T* k, const T* v, const T* cosines, const T* sines, const long* places, T* keys, T* values,
                      long tokens, long heads, long kv_heads, long head) {
  const long kv = kv_heads * head;
  team::share(tokens, tokens_at_once(heads * head), [=](long first, long last) {
    for (long t = first; t < last; ++t) {
      const T *cos = cosines + t * head, *sin = sines + t * head;
      for (long h = 0; h < heads; ++h) rotate(q + (t * heads + h) * head, cos, sin, head);
      for (long h = 0; h < kv_heads; ++h) rotate(k + (t * kv_heads + h) * head, cos, sin, head);
      std::memcpy(keys + places[t] * kv, k + t * kv, kv * sizeof(T));
      std::memcpy(values + places[t] * kv, v + t * kv, kv * sizeof(T));
    }
  });
}

// x / (1 + e^-x), from the side on which e^ cannot overflow.
template <class V>
inline V silu(V x) {
  const V e = exp_of(x < V{} ? x : -x), one = V{} + 1.0f;
  return x * ((x < V{} ? e : one) / (one + e));
}

template <class T>
void gate(T* x, const T* up, long num) {
  team::share(num, SHARE, [=](long first, long last) {
    long i = first;
    for (; i + NUM_WIDE <= last; i += NUM_WIDE) store(x + i, rounded(x, silu(load_wide(x + i))) * load_wide(up + i));
    for (; i < last; i += LANES)
      put(x + i, rounded(x, silu(load_of(x + i, last - i))) * load_of(up + i, last - i), last - i);
  });
}

template <class T>
void add(T* y, const T* x, long num) {
  team::share(num, SHARE, [=](long first, long last) {
    for (long i = first; i < last; i += LANES)
      put(y + i, load_of(y + i, last - i) + load_of(x + i, last - i), last - i);
  });
}

// y[t] = x[t] * table[slots[t]], y = x allowed.
template <class T>
void scale(T* y, const T* x, const T* table, const int64_t* slots, long tokens, long size) {
  team::share(tokens, tokens_at_once(size), [=](long first, long last) {
    for (long t = first; t < last; ++t)
      for (long i = 0; i < size; i += LANES)
        put(y + t * size + i, load_of(x + t * size + i, size - i) * load_of(table + slots[t] * size + i, size - i),
            size - i);
  });
}

// y[t] = y[t] + table[slots[t]]
template <class T>
void shift(T* y, const T* table, const int64_t* slots, long tokens, long size) {
  team::share(tokens, tokens_at_once(size), [=](long first, long last) {
    for (long t = first; t < last; ++t) {
      const T* from = table + slots[t] * size;
      for (long i = 0; i < size; i += LANES)
        put(y + t * size + i, load_of(y + t * size + i, size - i) + load_of(from + i, size - i), size - i);
    }
  });
}

inline const float* f32(const void* p) { return static_cast<const float*>(p); }
inline float* f32(void* p) { return static_cast<float*>(p); }
inline const Half* bf16(const void* p) { return static_cast<const Half*>(p); }
inline Half* bf16(void* p) { return static_cast<Half*>(p); }

}  // namespace

extern "C" {

// Each for float32 and for bfloat16.
#define ROW_OPS(dtype)                                                                                                 \
  /* y = gain * x / sqrt(mean(x^2) + epsilon) of `tokens` vectors of `size` numbers; y may be x. */                    \
  void row_rms_norm_##dtype(const void* x, const void* gain, void* y, long tokens, long size, float epsilon) {         \
    rms_norm(dtype(x), dtype(gain), dtype(y), tokens, size, epsilon);                                                  \
  }                                                                                                                    \
  /* The same of `each` vectors of every token, with the row of its slot in a table of gains. */                       \
  void row_own_rms_norm_##dtype(const void* x, const void* gains, const int64_t* slots, void* y, long tokens,          \
                                long each, long size, float epsilon) {                                                 \
    own_rms_norm(dtype(x), dtype(gains), slots, dtype(y), tokens, each, size, epsilon);                                \
  }                                                                                                                    \
  /* q [tokens, heads, head] and k [tokens, kv_heads, head] are turned by the angles of their token, cosines and */    \
  /* sines [tokens, head]; then k and v [tokens, kv_heads, head] are copied to their places of keys and values. */     \
  void row_rotate_##dtype(void* q, void* k, const void* v, const void* cosines, const void* sines, const long* places, \
                          void* keys, void* values, long tokens, long heads, long kv_heads, long head) {               \
    rotate_and_store(dtype(q), dtype(k), dtype(v), dtype(cosines), dtype(sines), places, dtype(keys), dtype(values),   \
                     tokens, heads, kv_heads, head);                                                                   \
  }                                                                                                                    \
  /* x = silu(x) * up */                                                                                               \
  void row_gate_##dtype(void* x, const void* up, long num) { gate(dtype(x), dtype(up), num); }                         \
  /* y = x * the row of its token's slot in a table of vectors of `size` numbers; y may be x. */                       \
  void row_scale_##dtype(void* y, const void* x, const void* table, const int64_t* slots, long tokens, long size) {    \
    scale(dtype(y), dtype(x), dtype(table), slots, tokens, size);                                                      \
  }                                                                                                                    \
  /* y = y + the row of its token's slot */                                                                            \
  void row_shift_##dtype(void* y, const void* table, const int64_t* slots, long tokens, long size) {                   \
    shift(dtype(y), dtype(table), slots, tokens, size);                                                                \
  }                                                                                                                    \
  /* y = y + x */                                                                                                      \
  void row_add_##dtype(void* y, const void* x, long num) { add(dtype(y), dtype(x), num); }

ROW_OPS(f32)
ROW_OPS(bf16)
}
