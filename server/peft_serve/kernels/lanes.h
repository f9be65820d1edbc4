// Eight float32 numbers side by side, and their way out of memory and back, as float32 or as bfloat16. Where the CPU
// has sixteen, what happens to each number by itself may take them instead: the bits are the same.
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

#if defined(__AVX512F__)
constexpr int NUM_WIDE = 16;
typedef float WideLanes __attribute__((vector_size(64)));

inline WideLanes load_wide(const float* from) { return _mm512_loadu_ps(from); }
inline WideLanes load_wide(const Half* from) {
  const __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return reinterpret_cast<WideLanes>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(stored), 16));
}
#else
constexpr int NUM_WIDE = LANES;
typedef Lanes WideLanes;

template <class T>
inline WideLanes load_wide(const T* from) { return load(from); }
#endif

inline Lanes load_as(Lanes, const float* from) { return load(from); }
#if defined(__AVX512F__)
inline WideLanes load_as(WideLanes, const float* from) { return load_wide(from); }
#endif

// Whole numbers in the place of V's.
template <class V>
struct Whole {
  typedef uint32_t Words __attribute__((vector_size(sizeof(V))));
  typedef int32_t Integers __attribute__((vector_size(sizeof(V))));
};

inline void store(float* to, Lanes lanes) { *reinterpret_cast<LooseLanes*>(to) = lanes; }
// Rounded to the nearest, ties to even, as the upper halves of words; what is no number stays none.
template <class V>
inline typename Whole<V>::Words rounded_words(V lanes) {
  const auto words = reinterpret_cast<typename Whole<V>::Words>(lanes);
  return lanes == lanes ? words + 0x7fff + ((words >> 16) & 1) : words | 0x400000;
}
inline void store(Half* to, Lanes lanes) {
  *reinterpret_cast<LooseShorts*>(to) = __builtin_convertvector(rounded_words(lanes) >> 16, Shorts);
}
#if defined(__AVX512F__)
inline void store(float* to, WideLanes lanes) { _mm512_storeu_ps(to, lanes); }
inline void store(Half* to, WideLanes lanes) {
  const __m512i words = reinterpret_cast<__m512i>(rounded_words(lanes) >> 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(words));
}
#endif

// As they come out of memory once they were stored there.
template <class V>
inline V rounded(const float*, V lanes) { return lanes; }
template <class V>
inline V rounded(const Half*, V lanes) { return reinterpret_cast<V>(rounded_words(lanes) & 0xffff0000u); }

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
#if defined(__AVX512F__)
inline WideLanes added(WideLanes sum, WideLanes one, WideLanes other) { return _mm512_fmadd_ps(one, other, sum); }
#endif
template <class V>
inline V added(V sum, V one, float other) {
  return added(sum, one, other - V{});
}

// e^x for x <= 0, to about one unit in the last place; zero below the smallest normal number. NaN stays NaN.
template <class V>
inline V exp_of(V x) {
  typedef typename Whole<V>::Integers Integers;
  const V least = V{} - 87.3f, magic = V{} + 12582912.0f;
  const Integers is_small = x < least;
  x = is_small ? least : x;
  const V n = added(magic, x, 1.44269504088896341f) - magic;
  V r = added(x, n, -0.693359375f);
  r = added(r, n, 2.12194440e-4f);
  V p = added(V{} + 1.3981999507e-3f, r, 1.9875691500e-4f);
  p = added(V{} + 8.3334519073e-3f, p, r);
  p = added(V{} + 4.1665795894e-2f, p, r);
  p = added(V{} + 1.6666665459e-1f, p, r);
  p = added(V{} + 5.0000001201e-1f, p, r);
  p = added(r, p * r, r) + 1.0f;
  const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
  p = p * reinterpret_cast<V>(power);
  return is_small ? V{} : p;
}

inline float sum(Lanes lanes) {
  HalfLanes low, high;
  std::memcpy(&low, &lanes, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&lanes) + sizeof low, sizeof high);
  const HalfLanes half = low + high;
  return (half[0] + half[2]) + (half[1] + half[3]);
}

}  // namespace
