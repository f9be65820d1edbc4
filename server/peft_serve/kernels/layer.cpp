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
  void (*products)(const void* const* layers, long count, const void* x, void* const* ys, long rows);
  void (*low_rank)(const void* layer, const void* segments, void* y, const void* x);
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
  char* scratch;
};

// The layer in the step: its keys and values, and its adapters' factors.
struct Here {
  const void* pages;
  void *keys, *values;
  const void* terms[PROJECTIONS];  // null: no adapter has one here
};

}  // extern "C"

namespace {

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

  void project(Projection first, long count, const void* x, void* const* ys) const {
    layer.kernels->products(layer.products + first, count, x, ys, pass.tokens);
    for (long i = 0; i < count; ++i)
      if (here.terms[first + i]) layer.kernels->low_rank(here.terms[first + i], pass.segments, ys[i], x);
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
  return 2 * (layer->heads + layer->kv_heads) * layer->head + layer->size + 2 * layer->inner;
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
