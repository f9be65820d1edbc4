// Eight float32 numbers side by side, and their way out of memory and back, as float32 or as bfloat16.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 8;

typedef float Lanes __attribute__((vector_size(32)));
typedef float LooseLanes __attribute__((vector_size(32), aligned(4), may_alias));
typedef float HalfLanes __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef int32_t Integers __attribute__((vector_size(32)));
typedef uint32_t LooseWords __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint16_t Shorts __attribute__((vector_size(16)));
typedef uint16_t LooseShorts __attribute__((vector_size(16), aligned(2), may_alias));

struct Half {  // bfloat16: the upper half of a float32
  uint16_t bits;
};

inline Lanes load(const float* from) { return *reinterpret_cast<const LooseLanes*>(from); }
inline Lanes load(const Half* from) {
#if defined(__AVX2__)
  const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Lanes>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(stored), 16));
#else
  const Shorts stored = *reinterpret_cast<const LooseShorts*>(from);
  return reinterpret_cast<Lanes>(__builtin_convertvector(stored, Words) << 16);
#endif
}

inline void store(float* to, Lanes lanes) { *reinterpret_cast<LooseLanes*>(to) = lanes; }
// Rounded to the nearest, ties to even, as the upper halves of words; what is no number stays none.
inline Words rounded_words(Lanes lanes) {
  const Words words = reinterpret_cast<Words>(lanes);
  return lanes == lanes ? words + 0x7fff + ((words >> 16) & 1) : words | 0x400000;
}
inline void store(Half* to, Lanes lanes) {
  *reinterpret_cast<LooseShorts*>(to) = __builtin_convertvector(rounded_words(lanes) >> 16, Shorts);
}

// One half of sixteen numbers, in an order that is the same for everything of one type: all that a dot product asks.
inline Lanes load_part(const float* from, int part) { return load(from + part * LANES); }
inline Lanes load_part(const Half* from, int part) {
  const Words both = *reinterpret_cast<const LooseWords*>(from);
  return reinterpret_cast<Lanes>(part ? both & 0xffff0000u : both << 16);
}

// Both halves of sixteen numbers, in that order.
inline void store_parts(float* to, Lanes first, Lanes second) {
  store(to, first);
  store(to + LANES, second);
}
inline void store_parts(Half* to, Lanes first, Lanes second) {
  *reinterpret_cast<LooseWords*>(to) = (rounded_words(second) & 0xffff0000u) | (rounded_words(first) >> 16);
}

// The first numbers of a row that ends after `count`, zeros behind them.
template <class T>
inline Lanes load_of(const T* from, long count) {
  if (count >= LANES) return load(from);
  T padded[LANES] = {};
  if (count > 0) std::memcpy(padded, from, count * sizeof(T));
  return load(padded);
}
template <class T>
inline void store_of(T* to, Lanes lanes, long count) {
  T padded[LANES];
  store(padded, lanes);
  std::memcpy(to, padded, count * sizeof(T));
}

// sum + one * other, rounded once. Said outright: a compiler that may contract a product and a sum does so in one place
// and not in another, and a token's bits would depend on how many it stands beside.
inline Lanes added(Lanes sum, Lanes one, Lanes other) {
#if defined(__FMA__) && defined(__AVX__)
  return _mm256_fmadd_ps(one, other, sum);
#elif defined(__aarch64__)
  for (int i = 0; i < LANES; ++i) sum[i] = __builtin_fmaf(one[i], other[i], sum[i]);
  return sum;
#else
  return sum + one * other;
#endif
}
inline Lanes added(Lanes sum, Lanes one, float other) {
  return added(sum, one, Lanes{other, other, other, other, other, other, other, other});
}

// e^x for x <= 0, to about one unit in the last place; zero below the smallest normal number. NaN stays NaN.
inline Lanes exp_of(Lanes x) {
  const Lanes least = Lanes{} - 87.3f, magic = Lanes{} + 12582912.0f;
  const Integers is_small = x < least;
  x = is_small ? least : x;
  const Lanes n = added(magic, x, 1.44269504088896341f) - magic;
  Lanes r = added(x, n, -0.693359375f);
  r = added(r, n, 2.12194440e-4f);
  Lanes p = added(Lanes{} + 1.3981999507e-3f, r, 1.9875691500e-4f);
  p = added(Lanes{} + 8.3334519073e-3f, p, r);
  p = added(Lanes{} + 4.1665795894e-2f, p, r);
  p = added(Lanes{} + 1.6666665459e-1f, p, r);
  p = added(Lanes{} + 5.0000001201e-1f, p, r);
  p = added(r, p * r, r) + 1.0f;
  const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
  p = p * reinterpret_cast<Lanes>(power);
  return is_small ? Lanes{} : p;
}

inline float sum(Lanes lanes) {
  HalfLanes low, high;
  std::memcpy(&low, &lanes, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&lanes) + sizeof low, sizeof high);
  const HalfLanes half = low + high;
  return (half[0] + half[2]) + (half[1] + half[3]);
}

}  // namespace
