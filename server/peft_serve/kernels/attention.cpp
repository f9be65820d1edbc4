// Attention of one new token a row over its own blocks of keys and values, where they lie: softmax(scale q k^T) v.
//
// A task is one row and one key/value head with the query heads that share it. Its context is read once, CHUNK
// positions at a time, with a running maximum (Milakov and Gimelshein, arXiv:1805.02867). What a row gives depends on
// its own context alone, to the bit. No position beyond a row's last is read, whatever lies there.
//
// Keys and values are float32, or bfloat16 that is widened first; all arithmetic is float32.

#include <cmath>
#include <cstdint>

#include "lanes.h"
#include "team.h"

namespace {

constexpr int CHUNK = 32;
constexpr int MAX_HEAD = 256;
constexpr int MAX_QUERIES = 8192;  // numbers of all query heads of a key/value head

// The sums of LANES vectors' lanes, as one vector.
inline Lanes lane_sums(const Lanes* a) {
  Lanes two[4], four[2];
  for (int i = 0; i < 4; ++i)
    two[i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
             __builtin_shufflevector(a[2 * i], a[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  for (int i = 0; i < 2; ++i)
    four[i] = __builtin_shufflevector(two[2 * i], two[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
              __builtin_shufflevector(two[2 * i], two[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(four[0], four[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(four[0], four[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

}  // namespace

extern "C" {

// One layer's pool: keys and values [places, kv_heads, head], a place being block * block_size + offset.
struct Pages {
  const void* keys;
  const void* values;
  long kv_heads, head, block_size;
  int is_bf16;  // of queries, keys, values and results; else float32
};

// The rows of a step: blocks [rows, width], and the last position each of them reads.
struct Rows {
  const int64_t* blocks;
  const int64_t* last;
  long rows, width;
  long window;  // positions that are read, the last one included; 0: all
};

}  // extern "C"

namespace {

template <class T>
struct Task {
  const Pages& pages;
  const Rows& rows;
  const T* q;
  long q_row, q_head;  // steps
  T* out;              // [rows, heads, head]
  long heads;
  float scale;

  void run(long task) const {
    const long row = task / pages.kv_heads, kv = task % pages.kv_heads;
    const long D = pages.head, G = heads / pages.kv_heads;
    alignas(64) float queries[MAX_QUERIES], sums[MAX_QUERIES], shares[CHUNK];
    float most[MAX_QUERIES / LANES], total[MAX_QUERIES / LANES];
    for (long g = 0; g < G; ++g) {
      const T* from = q + row * q_row + (kv * G + g) * q_head;
      for (long d = 0; d < D; d += LANES) {
        store(queries + g * D + d, load(from + d) * scale);
        store(sums + g * D + d, Lanes{});
      }
      most[g] = -INFINITY;
      total[g] = 0;
    }
    const long last = rows.last[row];
    const long first = rows.window > 0 && last >= rows.window ? last - rows.window + 1 : 0;
    alignas(64) float wide[sizeof(T) == 4 ? 1 : 2 * CHUNK * MAX_HEAD];
    const float *keys[CHUNK], *values[CHUNK];
    for (long at = first; at <= last; at += CHUNK) {
      const int count = int(last - at + 1 < CHUNK ? last - at + 1 : CHUNK);
      find(row, kv, at, count, wide, keys, values);
      for (long g = 0; g < G; ++g) {
        const float now = score(queries + g * D, keys, count, most[g], shares);
        const float shrink = std::exp(most[g] - now);  // of the first chunk: e^-inf = 0
        most[g] = now;
        total[g] = total[g] * shrink + shares_of(shares, count, now);
        add(sums + g * D, values, shares, count, shrink);
      }
    }
    for (long g = 0; g < G; ++g) {
      T* to = out + (row * heads + kv * G + g) * D;
      for (long d = 0; d < D; d += LANES) store(to + d, load(sums + g * D + d) / total[g]);
    }
  }

  // Where the chunk's keys and values are; those beyond `count` are the last one's again.
  void find(long row, long kv, long at, int count, float* wide, const float** keys, const float** values) const {
    const long D = pages.head;
    for (int c = 0; c < CHUNK; ++c) {
      if (c >= count) {
        keys[c] = keys[count - 1];
        continue;
      }
      const long position = at + c;
      const long block = rows.blocks[row * rows.width + position / pages.block_size];
      const long place = block * pages.block_size + position % pages.block_size;
      const long offset = (place * pages.kv_heads + kv) * D;
      const T* key = static_cast<const T*>(pages.keys) + offset;
      const T* value = static_cast<const T*>(pages.values) + offset;
      if constexpr (sizeof(T) == 4) {
        keys[c] = key;
        values[c] = value;
        for (long d = 0; d < D; d += 16) __builtin_prefetch(value + d);
      } else {
        float* wide_key = wide + c * D;
        float* wide_value = wide + (CHUNK + c) * D;
        for (long d = 0; d < D; d += LANES) {
          store(wide_key + d, load(key + d));
          store(wide_value + d, load(value + d));
        }
        keys[c] = wide_key;
        values[c] = wide_value;
      }
    }
  }

  // q . k of each position into `scores`; gives the largest of them and of `most`.
  float score(const float* query, const float* const* keys, int count, float most, float* scores) const {
    for (int c = 0; c < count; c += LANES) {
      Lanes dots[LANES] = {};
      for (long d = 0; d < pages.head; d += LANES) {
        const Lanes part = load(query + d);
        for (int i = 0; i < LANES; ++i) dots[i] = added(dots[i], part, load(keys[c + i] + d));
      }
      store(scores + c, lane_sums(dots));
    }
    for (int c = 0; c < count; ++c) most = scores[c] > most ? scores[c] : most;
    return most;
  }

  // Scores become e^(score - most); gives their sum.
  static float shares_of(float* scores, int count, float most) {
    for (int c = 0; c < count; c += LANES) store(scores + c, exp_of(load(scores + c) - most));
    float total = 0;
    for (int c = 0; c < count; ++c) total += scores[c];
    return total;
  }

  // sums = sums * shrink + shares . values
  void add(float* sums, const float* const* values, const float* shares, int count, float shrink) const {
    long d = 0;
    for (; d + 8 * LANES <= pages.head; d += 8 * LANES) add_part<8>(sums + d, values, d, shares, count, shrink);
    for (; d + 4 * LANES <= pages.head; d += 4 * LANES) add_part<4>(sums + d, values, d, shares, count, shrink);
    for (; d < pages.head; d += LANES) add_part<1>(sums + d, values, d, shares, count, shrink);
  }

  template <int N>
  static void add_part(float* sums, const float* const* values, long d, const float* shares, int count, float shrink) {
    Lanes acc[N];
    for (int n = 0; n < N; ++n) acc[n] = load(sums + n * LANES) * shrink;
    for (int c = 0; c < count; ++c)
      for (int n = 0; n < N; ++n) acc[n] = added(acc[n], load(values[c] + d + n * LANES), shares[c]);
    for (int n = 0; n < N; ++n) store(sums + n * LANES, acc[n]);
  }
};

template <class T>
void attend(const Pages& pages, const Rows& rows, const void* q, long q_row, long q_head, void* out, long heads,
            float scale) {
  const Task<T> task{pages, rows, static_cast<const T*>(q), q_row, q_head, static_cast<T*>(out), heads, scale};
  team::share(rows.rows * pages.kv_heads, 1, [&](long first, long last) {
    for (long i = first; i < last; ++i) task.run(i);
  });
}

}  // namespace

extern "C" {

// Whether heads of this size, so many queries to a key, are computed here.
int attention_covers(long head, long queries) {
  return head % LANES == 0 && head <= MAX_HEAD && head * queries <= MAX_QUERIES;
}

// out [rows, heads, head] of queries that lie `q_row` and `q_head` numbers apart.
void attention(const Pages* pages, const Rows* rows, const void* q, long q_row, long q_head, void* out, long heads,
               float scale) {
  if (pages->is_bf16)
    attend<Half>(*pages, *rows, q, q_row, q_head, out, heads, scale);
  else
    attend<float>(*pages, *rows, q, q_row, q_head, out, heads, scale);
}
}
