// Low-rank terms of many adapters beside one linear layer: y[t] += B_k (A_k x[t]), k being the adapter of token t.
//
// Tokens of one adapter lie side by side: a step is a list of segments. Factors lie where their owner keeps them, A as
// [rank, inputs] and B as [rank, outputs], and are read once for each segment. Sums are float32, in an order that
// depends on the rank and the number of inputs alone: a token gets the same bits alone and in any step. They are
// computed by vectors, or, in bfloat16, by the CPU's matrix unit where it has one.

#include <cstdint>
#include <cstring>
#include <thread>

#include "low_rank_tiles.h"
#include "low_rank_vectors.h"
#include "team.h"

namespace {

constexpr long WORTH_TEAM = 60000;  // multiply-adds; fewer take less time than starting a team
constexpr long PATIENCE = 20000;    // looks at the others' work before the core is offered to somebody else

// The work of a call: `phases` of units, each of which wants those before it to be done.
template <class Work>
void share_phases(const Work& work, long cost) {
  constexpr int NUM = Work::PHASES;
  const int threads = team::num_threads();
  if (threads <= 1 || cost < WORTH_TEAM) {
    for (int phase = 0; phase < NUM; ++phase) work.some(phase, 0, work.num_units(phase));
    return;
  }
  // Ranges are handed out in order: who waits for a phase waits for ranges that others are working on.
  long begins[NUM + 1] = {};
  for (int phase = 0; phase < NUM; ++phase)
    begins[phase + 1] = begins[phase] + least(work.num_units(phase), 4 * threads);
  std::atomic<long> done{0};
  team::share(begins[NUM], 1, [&](long from, long to) {
    int phase = 0;
    for (long range = from; range < to; ++range) {
      while (range >= begins[phase + 1]) ++phase;
      for (long tries = 0; done.load(std::memory_order_acquire) < begins[phase]; ++tries)
        if (tries > PATIENCE) std::this_thread::yield();
      const long units = work.num_units(phase), ranges = begins[phase + 1] - begins[phase], its = range - begins[phase];
      work.some(phase, units * its / ranges, units * (its + 1) / ranges);
      done.fetch_add(1, std::memory_order_release);
    }
  });
}

// The terms of layers with the same inputs, side by side: one team shares the work of all of them.
template <class Terms>
struct Together {
  const Terms* each;
  long count;

  long num_shrink() const {
    long num = 0;
    for (long i = 0; i < count; ++i) num += each[i].num_shrink;
    return num;
  }
  long num_expand() const {
    long num = 0;
    for (long i = 0; i < count; ++i) num += each[i].num_expand;
    return num;
  }

  // Units [first, last) of either kind, counted through all layers.
  void shrink_some(long first, long last) const {
    for (long i = 0; i < count && last > 0; ++i) {
      const long here = each[i].num_shrink, from = first > 0 ? first : 0, to = least(last, here);
      if (from < to) each[i].shrink_some(from, to);
      first -= here;
      last -= here;
    }
  }
  void expand_some(long first, long last) const {
    for (long i = 0; i < count && last > 0; ++i) {
      const long here = each[i].num_expand, from = first > 0 ? first : 0, to = least(last, here);
      if (from < to) each[i].expand_some(from, to);
      first -= here;
      last -= here;
    }
  }
};

template <class T>
struct ByVectors {
  static constexpr int PHASES = 2;
  Together<VectorTerms<T>> terms;

  long num_units(int phase) const { return phase ? terms.num_expand() : terms.num_shrink(); }
  void some(int phase, long first, long last) const {
    phase ? terms.expand_some(first, last) : terms.shrink_some(first, last);
  }
};

// What is between the phases of the layers lies in one memory. Returns what the work costs.
template <class Terms>
long give_memory(Terms* each, long count) {
  static thread_local Kept kept;
  long wanted = 0, cost = 0;
  for (long i = 0; i < count; ++i) {
    wanted += each[i].num_low();
    cost += each[i].cost;
  }
  float* low = wanted ? kept.of(wanted) : nullptr;
  for (long i = 0; i < count; ++i) {
    each[i].low = low;
    low += each[i].num_low();
  }
  return cost;
}

template <class T>
void add_all(VectorTerms<T>* each, long count) {
  if (const long cost = give_memory(each, count)) share_phases(ByVectors<T>{{each, count}}, cost);
}

#if HAS_LOW_RANK_TILES

struct ByTiles {
  static constexpr int PHASES = 3;
  const low_rank::Shrinking& low;
  void* const* ys;

  long panels(long l) const { return low.has_tiles(l) ? parts(low.layers[l]->num_out, low_rank::WIDTH) : 0; }

  long num_units(int phase) const {
    if (phase == 0) return low.num_units;
    if (phase == 2) return low.few_units();
    long num = 0;
    for (long l = 0; l < low.count; ++l) num += panels(l);
    return num;
  }
  void some(int phase, long first, long last) const {
    if (phase == 0) return low.some(first, last);
    low_rank::Terms& terms = low_rank::Terms::of(low, ys);
    if (phase == 2) return terms.few(low, ys, first, last);
    terms.take_low(low);
    constexpr long ROWS = 2 * tiles::ROWS;
    tiles::Using unit;
    for (long l = 0; l < low.count; ++l) {
      const long here = panels(l);
      for (long p = first > 0 ? first : 0; p < least(last, here); ++p)
        for (long row = 0; row < low.num_tokens; row += ROWS) {
          const long rows = least(ROWS, low.num_tokens - row);
          unit.set(least(rows, tiles::ROWS), rows > tiles::ROWS ? rows - tiles::ROWS : 0);
          const long column = p * low_rank::WIDTH;
          const low_rank::FromResults from{static_cast<const tiles::bf16*>(ys[l]), low.layers[l]->num_out, column};
          terms.layer(l)->prepare(row, rows, column);
          terms.layer(l)->add(from);
        }
      first -= here;
      last -= here;
    }
  }
};

void add_by_tiles(const void* const* layers, long count, const void* segments, void* const* ys, const void* x) {
  static thread_local Kept kept;
  low_rank::Shrinking low(layers, count, segments, x);
  if (!low.num_units) return;
  low.sums = kept.of(low.size());
  share_phases(ByTiles{low, ys}, low.cost);
}

#endif

template <class Terms>
void add_each(const void* const* layers, long count, const void* segments, void* const* ys, const void* x) {
  switch (count) {
    case 1: {
      Terms terms[] = {{layers[0], segments, ys[0], x}};
      return add_all(terms, 1);
    }
    case 2: {
      Terms terms[] = {{layers[0], segments, ys[0], x}, {layers[1], segments, ys[1], x}};
      return add_all(terms, 2);
    }
    default: {
      Terms terms[low_rank::MOST_LAYERS] = {
          {layers[0], segments, ys[0], x}, {layers[1], segments, ys[1], x}, {layers[2], segments, ys[2], x}};
      return add_all(terms, low_rank::MOST_LAYERS);
    }
  }
}

}  // namespace

extern "C" {

// y [tokens, outputs] += the terms of the segments' adapters on x [tokens, inputs], both without gaps; one to three
// layers that read the same x, each with a y of its own.
void low_rank_each_f32(const void* const* layers, long count, const void* segments, void* const* ys, const void* x) {
  add_each<VectorTerms<float>>(layers, count, segments, ys, x);
}
void low_rank_each_bf16(const void* const* layers, long count, const void* segments, void* const* ys, const void* x) {
  add_each<VectorTerms<Half>>(layers, count, segments, ys, x);
}
void low_rank_f32(const void* layer, const void* segments, void* y, const void* x) {
  low_rank_each_f32(&layer, 1, segments, &y, x);
}
void low_rank_bf16(const void* layer, const void* segments, void* y, const void* x) {
  low_rank_each_bf16(&layer, 1, segments, &y, x);
}

// Whether this CPU has a matrix unit that computes bfloat16 terms, and this process may use it.
int low_rank_has_tiles() { return HAS_LOW_RANK_TILES && tiles::allowed(); }

#if HAS_LOW_RANK_TILES
// As low_rank_each_bf16 and low_rank_bf16, by the matrix unit.
void low_rank_each_by_tiles(const void* const* layers, long count, const void* segments, void* const* ys, const void* x) {
  add_by_tiles(layers, count, segments, ys, x);
}
void low_rank_by_tiles(const void* layer, const void* segments, void* y, const void* x) {
  low_rank_each_by_tiles(&layer, 1, segments, &y, x);
}
#endif
}
