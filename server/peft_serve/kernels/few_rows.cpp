// y[M, N] = x[M, K] W[N, K]^T + b for few rows, from a copy of W in the order in which it is read: by vectors (panels.h),
// or, in bfloat16, by the CPU's matrix unit (tiles.h). Either way a row has the same bits alone and in any batch.

#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>

#include "low_rank_tiles.h"
#include "panels.h"
#include "team.h"
#include "tiles.h"

namespace {

constexpr int MOST_PRODUCTS = 3;  // side by side

// A `Product` by tiles. x [M, K] has zeros behind each row up to whole tiles.
struct TileProduct {
  const bf16* x;
  const bf16* w;
  Result result;
  long M, N, K;
  bool by_vectors;  // where there are one or two rows

  void columns(long first, long last) const { columns_then(first, last, tiles::JustPut{}); }

  template <class Then>
  void columns_then(long first, long last, const Then& then) const {
    tiles::columns(x, w, M, K, first, last, by_vectors, result, then);
  }

  long num_panels() const { return (N + tiles::NR - 1) / tiles::NR; }
  long least_part() const { return by_vectors && M <= 2 ? 4 : 1; }
};

// How the panels of a call are cut for its threads: each has a region, of which it takes half of what is left again and
// again, so that it reads on and on. Who is done takes the others' small parts, so that nobody waits long for another.
struct Parts {
  static constexpr long MOST = 1024, MOST_REGIONS = 64;
  struct Part {
    long first, last;
  };
  Part parts[MOST];
  long count = 0;

  Parts(long panels, long least) {
    const long threads = team::num_threads(), regions = threads < MOST_REGIONS ? threads : MOST_REGIONS;
    long ends[MOST_REGIONS + 1], at[MOST_REGIONS];
    for (long r = 0; r <= regions; ++r) ends[r] = panels * r / regions;
    for (long r = 0; r < regions; ++r) at[r] = ends[r];
    for (long before = -1; before != count;) {
      before = count;
      for (long r = 0; r < regions; ++r) {
        const long left = ends[r + 1] - at[r], half = (left / 2 + least - 1) / least * least;
        const long num = count + 2 * regions > MOST || half < least || half > left ? left : half;
        if (left) parts[count++] = {at[r], at[r] + num};
        at[r] += num;
      }
    }
  }
};

// Products of the same rows, side by side, and how their panels are cut.
template <class Each>
struct Panels {
  const Each* each;
  long count;
  Parts parts;
  bool is_small;  // less than what starting a team costs

  Panels(const Each* each, long count)
      : each(each), count(count), parts(all_of(each, count), each->least_part()), is_small(false) {
    long features = 0;
    for (long i = 0; i < count; ++i) features += each[i].N;
    is_small = each->M * each->K * features < 80000;
  }

  static long all_of(const Each* each, long count) {
    long panels = 0;
    for (long i = 0; i < count; ++i) panels += each[i].num_panels();
    return panels;
  }

  // act(number of the product, first panel, last panel) for a part.
  template <class Act>
  void in_part(long part, const Act& act) const {
    const auto [first, last] = parts.parts[part];
    long before = 0;
    for (long i = 0; i < count && before < last; ++i) {
      const long here = each[i].num_panels();
      const long from = first > before ? first - before : 0, to = last - before < here ? last - before : here;
      if (from < to) act(i, from, to);
      before += here;
    }
  }
};

// One team shares the panels of all products.
template <class Each>
void run(const Each* each, long count) {
  const Panels<Each> panels(each, count);
  team::share(panels.parts.count, panels.is_small ? panels.parts.count : 1, [&](long first, long last) {
    for (long part = first; part < last; ++part)
      panels.in_part(part, [&](long i, long from, long to) { each[i].columns(from, to); });
  });
}

#if HAS_LOW_RANK_TILES

constexpr long PATIENCE = 20000;  // looks at the others' work before the core is offered to somebody else

// So many things to be done before others.
struct Before {
  long wanted;
  std::atomic<long> done{0};

  void one() { done.fetch_add(1, std::memory_order_release); }
  void wait() const {
    for (long tries = 0; done.load(std::memory_order_acquire) < wanted; ++tries)
      if (tries > PATIENCE) std::this_thread::yield();
  }
};

// Results are put with a thread's terms, once every unit of shrinking is done.
struct PutWithTerms {
  static constexpr bool ACTS = true;
  const low_rank::Shrinking& low;
  const Before& shrunk;
  low_rank::Terms& terms;
  low_rank::Expanding& its;

  void prepare(long row, long rows, long column) const { its.prepare(row, rows, column); }
  void meanwhile(long part, long parts) const { its.meanwhile(part, parts); }

  void operator()(long row, long rows, long column, const float* sums, const Result& result) const {
    if (!terms.has_low()) {
      shrunk.wait();
      terms.take_low(low);
    }
    const uint32_t put = its.add(low_rank::FromSums{sums, row, result.bias ? result.bias + column : nullptr});
    for (long r = 0; r < rows; ++r)
      if (!(put >> r & 1)) result.put(row + r, column, sums + r * tiles::NR, tiles::NR);
  }
};

// The same with low-rank terms. Threads shrink first, and then put results with the terms; those that are for vectors come
// behind.
void run_with(const TileProduct* each, long count, low_rank::Shrinking& low, void* const* ys) {
  static thread_local Kept kept;
  low.sums = kept.of(low.size());
  const Panels<TileProduct> panels(each, count);
  const long units = low.few_units(), most = 2 * team::num_threads();
  Before shrunk{least(low.num_units, team::num_threads())}, put{panels.parts.count};
  const long few = least(units, most), tasks = shrunk.wanted + put.wanted + few;
  team::share(tasks, panels.is_small ? tasks : 1, [&](long first, long last) {
    for (long task = first; task < last; ++task) {
      if (task < shrunk.wanted) {
        low.some(low.num_units * task / shrunk.wanted, low.num_units * (task + 1) / shrunk.wanted);
        shrunk.one();
        continue;
      }
      low_rank::Terms& terms = low_rank::Terms::of(low, ys);
      if (const long part = task - shrunk.wanted; part < put.wanted) {
        panels.in_part(part, [&](long i, long from, long to) {
          if (low_rank::Expanding* its = terms.layer(i))
            each[i].columns_then(from, to, PutWithTerms{low, shrunk, terms, *its});
          else
            each[i].columns(from, to);
        });
        put.one();
        continue;
      }
      put.wait();
      shrunk.wait();
      const long part = task - shrunk.wanted - put.wanted;
      terms.few(low, ys, units * part / few, units * (part + 1) / few);
    }
  });
}

#endif

void pack_tiles(const bf16* w, long row_step, long column_step, bf16* packed, long N, long K) {
  const long panels = (N + tiles::NR - 1) / tiles::NR, depth = tiles::depths(K) * tiles::DEPTH;
  team::share(panels, 16, [=](long first, long last) {
    for (long n = first * tiles::NR; n < last * tiles::NR; ++n)
      for (long k = 0; k < depth; ++k)
        packed[tiles::place(n, k, K)] = n < N && k < K ? w[n * row_step + k * column_step] : bf16(0);
  });
}

void take_tiles(const bf16* packed, long K, const int64_t* numbers, long count, bf16* rows) {
  team::share(count, 64, [=](long first, long last) {
    for (long i = first; i < last; ++i)
      for (long k = 0; k < K; ++k) rows[i * K + k] = packed[tiles::place(numbers[i], k, K)];
  });
}

// x [M, K] with zeros behind each row up to whole tiles; itself where K is so many already.
const bf16* filled_up(const bf16* x, long M, long K, std::unique_ptr<bf16[]>& memory) {
  const long depth = tiles::depths(K) * tiles::DEPTH;
  if (depth == K) return x;
  memory.reset(new bf16[M * depth]());
  for (long m = 0; m < M; ++m) std::memcpy(memory.get() + m * depth, x + m * K, K * sizeof(bf16));
  return memory.get();
}

}  // namespace

extern "C" {

enum Kind { FLOAT32, BFLOAT16, BFLOAT16_TILES };

// A weight [N, K] in panels, and how its products are given. `few_rows.py` has the same fields.
struct Layer {
  const void* panels;
  const float* bias;  // or null
  long N, K;
  int kind;  // of weights, rows and results
  int by_vectors;  // one or two rows of BFLOAT16_TILES
};

static TileProduct tile_product(const Layer& layer, const bf16* rows, void* y, long M) {
  const Result result{layer.bias, y, true, layer.N};
  return {rows, static_cast<const bf16*>(layer.panels), result, M, layer.N, layer.K, layer.by_vectors != 0};
}

// Whether this CPU has BFLOAT16_TILES, and this process may use them.
int few_rows_has_tiles() { return tiles::allowed(); }

// Numbers that the panels of a weight [N, K] take.
long few_rows_size(long N, long K, int kind) {
  const long width = kind == BFLOAT16_TILES ? tiles::NR : NR;
  return (N + width - 1) / width * width * (kind == BFLOAT16_TILES ? tiles::depths(K) * tiles::DEPTH : K);
}

// Fill layer->panels from weights that lie so many numbers apart.
void few_rows_pack(const Layer* layer, const void* weight, long row_step, long column_step) {
  auto* panels = const_cast<void*>(layer->panels);
  const auto* narrow_weight = static_cast<const bf16*>(weight);
  auto* narrow_panels = static_cast<bf16*>(panels);
  if (layer->kind == BFLOAT16_TILES)
    pack_tiles(narrow_weight, row_step, column_step, narrow_panels, layer->N, layer->K);
  else if (layer->kind == BFLOAT16)
    pack(narrow_weight, row_step, column_step, narrow_panels, layer->N, layer->K);
  else
    pack(static_cast<const float*>(weight), row_step, column_step, static_cast<float*>(panels), layer->N, layer->K);
}

// rows[i] = weight[numbers[i]], [count, K] without gaps; numbers are within [0, N).
void few_rows_take(const Layer* layer, const int64_t* numbers, long count, void* rows) {
  const auto* narrow_panels = static_cast<const bf16*>(layer->panels);
  if (layer->kind == BFLOAT16_TILES)
    take_tiles(narrow_panels, layer->K, numbers, count, static_cast<bf16*>(rows));
  else if (layer->kind == BFLOAT16)
    take(narrow_panels, layer->K, numbers, count, static_cast<bf16*>(rows));
  else
    take(static_cast<const float*>(layer->panels), layer->K, numbers, count, static_cast<float*>(rows));
}

// Each y[M, N] from the same x[M, K], all without gaps; at most MOST_PRODUCTS layers of one K and one kind.
void few_rows_each(const Layer* const* layers, long count, const void* x, void* const* ys, long M) {
  const long K = layers[0]->K;
  if (layers[0]->kind == FLOAT32) {
    Product<float> products[MOST_PRODUCTS];
    for (long i = 0; i < count; ++i)
      products[i] = {static_cast<const float*>(x), static_cast<const float*>(layers[i]->panels),
                     {layers[i]->bias, ys[i], false, layers[i]->N}, M, layers[i]->N, K};
    return run(products, count);
  }
  const auto* narrow_x = static_cast<const bf16*>(x);
  if (layers[0]->kind == BFLOAT16_TILES) {
    std::unique_ptr<bf16[]> filled;
    const bf16* rows = filled_up(narrow_x, M, K, filled);
    TileProduct products[MOST_PRODUCTS]{};
    for (long i = 0; i < count; ++i) products[i] = tile_product(*layers[i], rows, ys[i], M);
    return run(products, count);
  }
  const std::unique_ptr<float[]> wide(new float[M * K]);
  team::share(M * K, 1 << 15, [&](long first, long last) {
    for (long i = first; i < last; ++i) wide[i] = widen(narrow_x[i]);
  });
  Product<bf16> products[MOST_PRODUCTS];
  for (long i = 0; i < count; ++i)
    products[i] = {wide.get(), static_cast<const bf16*>(layers[i]->panels), {layers[i]->bias, ys[i], true, layers[i]->N},
                   M, layers[i]->N, K};
  run(products, count);
}

void few_rows(const Layer* layer, const void* x, void* y, long M) { few_rows_each(&layer, 1, x, &y, M); }

#if HAS_LOW_RANK_TILES
// As few_rows_each, for BFLOAT16_TILES, with the low-rank terms of the segments' adapters on the same x: a layer's, or
// null. The bits are those of low_rank_each_by_tiles behind few_rows_each.
void few_rows_each_with(const Layer* const* layers, long count, const void* x, void* const* ys, long M,
                        const void* const* low_ranks, const void* segments) {
  low_rank::Shrinking low(low_ranks, count, segments, x);
  if (!low.num_units) return few_rows_each(layers, count, x, ys, M);
  std::unique_ptr<bf16[]> filled;
  const bf16* rows = filled_up(static_cast<const bf16*>(x), M, layers[0]->K, filled);
  TileProduct products[MOST_PRODUCTS]{};
  for (long i = 0; i < count; ++i) products[i] = tile_product(*layers[i], rows, ys[i], M);
  run_with(products, count, low, ys);
}
#endif
}
