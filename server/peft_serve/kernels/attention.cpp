// Attention of one new token a row over its own blocks of keys and values, where they lie: softmax(scale q k^T) v.
//
// A task is one row and one key/value head with the query heads that share it (heads.h). Its context is read once,
// CHUNK positions at a time. What a row gives depends on its own context alone, to the bit. No position beyond a row's
// last is read, whatever lies there.
//
// Keys and values are float32, or bfloat16 that is widened first; all arithmetic is float32.

#include <cmath>
#include <cstdint>

#include "heads.h"
#include "lanes.h"
#include "team.h"

namespace {

constexpr int PARTS = 4;           // of a thread's tasks, which are not equally long
constexpr int MAX_QUERIES = 8192;  // numbers of all query heads of a key/value head

// Where the vectors of one number of each of the keys go, from such vectors of words.
inline void store_words(float* keys, long step, Words words, float) {
  (void)step;
  store(keys, reinterpret_cast<Lanes>(words));
}
inline void store_words(float* keys, long step, Words words, Half) {
  store(keys, reinterpret_cast<Lanes>(words << 16));
  store(keys + step, reinterpret_cast<Lanes>(words & 0xffff0000u));
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

// Query heads of a task, and what they have found so far.
struct Found {
  alignas(64) float queries[MAX_QUERIES], sums[MAX_QUERIES];  // [heads, head]
  float most[MAX_QUERIES / LANES], total[MAX_QUERIES / LANES];
};

template <class T>
struct Task {
  const Pages& pages;
  const Rows& rows;
  const T* q;
  long q_row, q_head;  // steps
  T* out;              // [rows, heads, head]
  long heads;
  float scale;

  // Tasks [first, last), each while the next one's first keys and values are fetched.
  void run(long first, long last) const {
    for (long task = first; task < last; ++task) run_one(task, task + 1 < last ? task + 1 : task);
  }

  void run_one(long task, long next) const {
    const long row = task / pages.kv_heads, kv = task % pages.kv_heads;
    const long D = pages.head, G = heads / pages.kv_heads;
    Found found;
    for (long g = 0; g < G; ++g) {
      const T* from = q + row * q_row + (kv * G + g) * q_head;
      for (long d = 0; d < D; d += LANES) {
        store(found.queries + g * D + d, load(from + d) * scale);
        store(found.sums + g * D + d, Lanes{});
      }
      found.most[g] = -INFINITY;
      found.total[g] = 0;
    }
    const long first = first_of(row), last = rows.last[row], next_row = next / pages.kv_heads;
    Chunk chunk;
    chunk.is_turned = G >= TURNED_FROM;
    Soon soon;
    for (long at = first; at <= last; at += CHUNK) {
      chunk.count = int(last - at + 1 < CHUNK ? last - at + 1 : CHUNK);
      fetch(row, kv, at, chunk);
      soon.told = soon.count = 0;
      if (at + CHUNK <= last)
        list(row, kv, at + CHUNK, soon);
      else if (next != task)
        list(next_row, next % pages.kv_heads, first_of(next_row), soon);
      const long parts = (G + MOST_HEADS - 1) / MOST_HEADS;
      for (long i = 0; i < parts; ++i)
        some_heads(G * (i + 1) / parts - G * i / parts, G * i / parts, chunk, found, soon);
      soon.tell(soon.count);
    }
    for (long g = 0; g < G; ++g) {
      T* to = out + (row * heads + kv * G + g) * D;
      for (long d = 0; d < D; d += LANES) store(to + d, load(found.sums + g * D + d) / found.total[g]);
    }
  }

  void some_heads(long count, long g, const Chunk& chunk, Found& found, Soon& soon) const {
    switch (count) {
      case 8: return heads_from<8>(g, chunk, found, soon);
      case 7: return heads_from<7>(g, chunk, found, soon);
      case 6: return heads_from<6>(g, chunk, found, soon);
      case 5: return heads_from<5>(g, chunk, found, soon);
      case 4: return heads_from<4>(g, chunk, found, soon);
      case 3: return heads_from<3>(g, chunk, found, soon);
      case 2: return heads_from<2>(g, chunk, found, soon);
      default: return heads_from<1>(g, chunk, found, soon);
    }
  }

  template <int H>
  void heads_from(long g, const Chunk& chunk, Found& found, Soon& soon) const {
    const long at = g * pages.head;
    Heads<H>{pages.head, found.queries + at, found.sums + at, found.most + g, found.total + g, chunk, soon, {}, {}}
        .run();
  }

  // The first position that a row reads.
  long first_of(long row) const {
    const long last = rows.last[row];
    return rows.window > 0 && last >= rows.window ? last - rows.window + 1 : 0;
  }

  // each(position, offset) of a row's positions: how far into keys and values those of a head are.
  template <class Each>
  void walk(long row, long kv, long first, long end, const Each& each) const {
    const long step = pages.kv_heads * pages.head;
    for (long position = first; position < end;) {
      const long in_block = position % pages.block_size, left = position + pages.block_size - in_block;
      const long block = rows.blocks[row * rows.width + position / pages.block_size];
      long offset = (block * pages.block_size + in_block) * step + kv * pages.head;
      for (const long until = left < end ? left : end; position < until; ++position, offset += step)
        each(position, offset);
    }
  }

  // The lines of the chunk from `at` on.
  void list(long row, long kv, long at, Soon& soon) const {
    const long end = rows.last[row] < at + CHUNK ? rows.last[row] + 1 : at + CHUNK;
    walk(row, kv, at, end, [&](long, long offset) {
      for (long d = 0; d < pages.head; d += LINE / long(sizeof(T))) {
        soon.lines[soon.count++] = static_cast<const T*>(pages.keys) + offset + d;
        soon.lines[soon.count++] = static_cast<const T*>(pages.values) + offset + d;
      }
    });
  }

  void fetch(long row, long kv, long at, Chunk& chunk) const {
    static constexpr T NOTHING[MAX_HEAD] = {};
    const long D = pages.head;
    const T* keys[CHUNK];
    walk(row, kv, at, at + chunk.count, [&](long position, long offset) {
      keys[position - at] = static_cast<const T*>(pages.keys) + offset;
      const T* value = static_cast<const T*>(pages.values) + offset;
      for (long d = 0; d < D; d += LANES) store(chunk.values + (position - at) * D + d, load(value + d));
    });
    for (int c = chunk.count; c < CHUNK; ++c) keys[c] = NOTHING;
    const int end = chunk.count <= NUM_WIDE ? NUM_WIDE : CHUNK;
    for (int c = 0; c < end; c += LANES)
      if (chunk.is_turned)
        turn(keys + c, chunk.keys + c);
      else
        for (int i = c; i < c + LANES; ++i)
          for (long d = 0; d < D; d += LANES) store(chunk.keys + i * D + d, load(keys[i] + d));
  }

  // Eight keys into eight columns of the chunk's.
  void turn(const T* const* keys, float* columns) const {
    constexpr long IN_WORD = sizeof(uint32_t) / sizeof(T), STEP = LANES * IN_WORD;
    for (long d = 0; d < pages.head; d += STEP) {
      const long count = pages.head - d < STEP ? pages.head - d : STEP;
      Words words[LANES];
      for (int i = 0; i < LANES; ++i) {
        words[i] = Words{};
        if (count == STEP)
          words[i] = *reinterpret_cast<const LooseWords*>(keys[i] + d);
        else
          std::memcpy(&words[i], keys[i] + d, count * sizeof(T));
      }
      transpose(words);
      for (long w = 0; w < count / IN_WORD; ++w)
        store_words(columns + (d + w * IN_WORD) * CHUNK, CHUNK, words[w], T{});
    }
  }
};

template <class T>
void attend(const Pages& pages, const Rows& rows, const void* q, long q_row, long q_head, void* out, long heads,
            float scale) {
  const Task<T> task{pages, rows, static_cast<const T*>(q), q_row, q_head, static_cast<T*>(out), heads, scale};
  const long tasks = rows.rows * pages.kv_heads, part = tasks / (PARTS * team::num_threads());
  team::share(tasks, part < 1 ? 1 : part, [&](long first, long last) { task.run(first, last); });
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
