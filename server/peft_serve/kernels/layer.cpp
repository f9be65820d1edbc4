// A decoder layer of Llama's kind, x + o(attention(norm(x))) and then + down(silu(gate) * up), in one call: one crossing
// from Python for a whole layer, and everything between two products in a few lines of memory that stay in the cache.
//
// Nothing is computed here. The kernels are those that run where a layer is spelled out in Python, in the same order on
// the same numbers, so both give the same bits. They are called by address: each is a library of its own.
//
// Where attention is somebody else's (prompts), the layer is run in two halves, `layer_before` and `layer_after`.

#include <cstdint>

#include "team.h"

extern "C" {

struct Kernels {
  void (*norm)(const void* x, const void* gain, void* y, long tokens, long size, float epsilon);
  void (*rotate)(void* q, void* k, const void* v, const void* cosines, const void* sines, const int64_t* places,
                 void* keys, void* values, long tokens, long heads, long kv_heads, long head);
  void (*gate)(void* x, const void* up, long num);
  void (*add)(void* y, const void* x, long num);
  void (*scale)(void* y, const void* x, const void* table, const int64_t* slots, long tokens, long size);
  void (*shift)(void* y, const void* table, const int64_t* slots, long tokens, long size);
  void (*products)(const void* const* layers, long count, const void* x, void* const* ys, long rows);
  void (*low_rank)(const void* const* layers, long count, const void* segments, void* const* ys, const void* x);
  void (*attend)(const void* pages, const void* rows, const void* q, long q_row, long q_head, void* out, long heads,
                 float scale);
};

enum Projection { Q, K, V, O, GATE, UP, DOWN, PROJECTIONS };

// What a layer is. `layer.py` has the same fields, of all structures here.
struct Layer {
  const Kernels* kernels;
  const void* products[PROJECTIONS];
  const void *gain_before, *gain_after;  // of the norms before attention and behind it
  const void *gain_q, *gain_k;           // of the norms of each head's queries and keys; null: there are none
  float epsilon_before, epsilon_after, epsilon_q, epsilon_k, scale;
  int num_bytes;  // of a number
  long size, heads, kv_heads, head, inner;
};

// The step: which tokens there are, and memory of `layer_scratch` numbers for each of them.
struct Pass {
  long tokens;
  const int64_t* places;
  const void *cosines, *sines;
  const void* rows;      // of the attention kernel; null: attention is somebody else's
  const void* segments;  // of the adapters; null: there are none
  const int64_t* slots;  // of each token; null with the segments
  char* scratch;
};

// What adapters do at a projection, each null where none of them does: y = out_scale * (W (in_scale * x) + b) + B A x +
// shift. Vectors stand in tables by slot.
struct Terms {
  const void *in_scale, *out_scale, *low_rank, *shift;
};

// The layer in the step: its keys and values, and its adapters.
struct Here {
  const void* pages;
  void *keys, *values;
  Terms terms[PROJECTIONS];
};

}  // extern "C"

namespace {

constexpr int MOST_PRODUCTS = 3;  // of the same inputs

struct Run {
  const Layer& layer;
  const Pass& pass;
  const Here& here;

  long q_size() const { return layer.heads * layer.head; }
  long kv_size() const { return layer.kv_heads * layer.head; }

  // The scratch memory: queries, keys, values, what attention gave, what enters a product, the gate, and what it opens.
  void* at(long numbers) const { return pass.scratch + numbers * pass.tokens * layer.num_bytes; }
  void* q() const { return at(0); }
  void* k() const { return at(q_size()); }
  void* v() const { return at(q_size() + kv_size()); }
  void* attended() const { return at(q_size() + 2 * kv_size()); }
  void* normed() const { return at(2 * q_size() + 2 * kv_size()); }
  void* gate() const { return at(2 * q_size() + 2 * kv_size() + layer.size); }
  void* up() const { return at(2 * q_size() + 2 * kv_size() + layer.size + layer.inner); }
  void* scaled() const { return at(2 * q_size() + 2 * kv_size() + layer.size + 2 * layer.inner); }

  long size_in(long projection) const {
    return projection == O ? q_size() : projection == DOWN ? layer.inner : layer.size;
  }
  long size_out(long projection) const {
    switch (projection) {
      case Q: return q_size();
      case K: case V: return kv_size();
      case GATE: case UP: return layer.inner;
      default: return layer.size;
    }
  }

  void project(long first, long count, const void* x, void* const* ys) const {
    const Kernels& run = *layer.kernels;
    bool is_scaled = false;
    for (long i = 0; i < count; ++i) is_scaled |= here.terms[first + i].in_scale != nullptr;
    if (!is_scaled) run.products(layer.products + first, count, x, ys, pass.tokens);
    const void* low_rank[MOST_PRODUCTS];
    void* low_rank_ys[MOST_PRODUCTS];
    long num_low_rank = 0;
    for (long i = 0; i < count; ++i) {
      const long p = first + i;
      const Terms& terms = here.terms[p];
      if (is_scaled) {
        if (terms.in_scale) run.scale(scaled(), x, terms.in_scale, pass.slots, pass.tokens, size_in(p));
        run.products(layer.products + p, 1, terms.in_scale ? scaled() : x, ys + i, pass.tokens);
      }
      if (terms.out_scale) run.scale(ys[i], ys[i], terms.out_scale, pass.slots, pass.tokens, size_out(p));
      if (terms.low_rank) {
        low_rank[num_low_rank] = terms.low_rank;
        low_rank_ys[num_low_rank++] = ys[i];
      }
    }
    if (num_low_rank) run.low_rank(low_rank, num_low_rank, pass.segments, low_rank_ys, x);
    for (long i = 0; i < count; ++i)
      if (const Terms& terms = here.terms[first + i]; terms.shift)
        run.shift(ys[i], terms.shift, pass.slots, pass.tokens, size_out(first + i));
  }

  void before(const void* x) const {
    const Kernels& run = *layer.kernels;
    run.norm(x, layer.gain_before, normed(), pass.tokens, layer.size, layer.epsilon_before);
    void* const ys[] = {q(), k(), v()};
    project(Q, 3, normed(), ys);
    if (layer.gain_q) {
      run.norm(q(), layer.gain_q, q(), pass.tokens * layer.heads, layer.head, layer.epsilon_q);
      run.norm(k(), layer.gain_k, k(), pass.tokens * layer.kv_heads, layer.head, layer.epsilon_k);
    }
    run.rotate(q(), k(), v(), pass.cosines, pass.sines, pass.places, here.keys, here.values, pass.tokens, layer.heads,
               layer.kv_heads, layer.head);
  }

  void after(const void* x, const void* attended, void* y) const {
    const Kernels& run = *layer.kernels;
    const long num = pass.tokens * layer.size;
    project(O, 1, attended, &y);
    run.add(y, x, num);
    run.norm(y, layer.gain_after, normed(), pass.tokens, layer.size, layer.epsilon_after);
    void* const opened[] = {gate(), up()};
    project(GATE, 2, normed(), opened);
    run.gate(gate(), up(), pass.tokens * layer.inner);
    void* const down = normed();
    project(DOWN, 1, gate(), &down);
    run.add(y, down, num);
  }
};

}  // namespace

extern "C" {

// How many numbers of scratch memory a token takes; queries, keys and values stand first in it.
long layer_scratch(const Layer* layer) {
  const long q_size = layer->heads * layer->head, most = layer->inner > q_size ? layer->inner : q_size;
  return 2 * (layer->heads + layer->kv_heads) * layer->head + layer->size + 2 * layer->inner +
         (layer->size > most ? layer->size : most);
}

// Queries, keys and values of x [tokens, size] into the scratch memory, keys and values into their places too.
void layer_before(const Layer* layer, const Pass* pass, const Here* here, const void* x) {
  Run{*layer, *pass, *here}.before(x);
}

// y [tokens, size] from x and what attention gave, [tokens, heads, head].
void layer_after(const Layer* layer, const Pass* pass, const Here* here, const void* x, const void* attended, void* y) {
  Run{*layer, *pass, *here}.after(x, attended, y);
}

void layer_whole(const Layer* layer, const Pass* pass, const Here* here, const void* x, void* y) {
  const Run run{*layer, *pass, *here};
  run.before(x);
  layer->kernels->attend(here->pages, pass->rows, run.q(), run.q_size(), layer->head, run.attended(), layer->heads,
                         layer->scale);
  run.after(x, run.attended(), y);
}
}
