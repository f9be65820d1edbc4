// A decoder layer of Llama's kind, x + o(attention(norm(x))) and then + down(silu(gate) * up), by a table of stages: a
// call runs as many of them as the step allows, all of them as a rule. One crossing from Python for a whole layer, and
// everything between two products in a few lines of memory that stay in the cache.
//
// Nothing is computed here. The kernels are those that run where a layer is spelled out in Python, in the same order on
// the same numbers, so both give the same bits. They are called by address: each is a library of its own.
//
// Between two stages the caller may change what the first one gave: the terms of adapters that no kernel computes.

#include <cstdint>
#include <cstring>

#include "team.h"

extern "C" {

struct Kernels {
  void (*norm)(const void* x, const void* gain, void* y, long tokens, long size, float epsilon);
  void (*own_norm)(const void* x, const void* gains, const int64_t* slots, void* y, long tokens, long each, long size,
                   float epsilon);
  void (*rotate)(void* q, void* k, const void* v, const void* cosines, const void* sines, const int64_t* places,
                 void* keys, void* values, long tokens, long heads, long kv_heads, long head);
  void (*gate)(void* x, const void* up, long num);
  void (*add)(void* y, const void* x, long num);
  void (*scale)(void* y, const void* x, const void* table, const int64_t* slots, long tokens, long size);
  void (*shift)(void* y, const void* table, const int64_t* slots, long tokens, long size);
  void (*products)(const void* const* layers, long count, const void* x, void* const* ys, long rows);
  // The same with low-rank terms, null for a layer without; null where no kernel does both at once.
  void (*products_with)(const void* const* layers, long count, const void* x, void* const* ys, long rows,
                        const void* const* low_ranks, const void* segments);
  void (*low_rank)(const void* const* layers, long count, const void* segments, void* const* ys, const void* x);
  void (*mix)(const void* layer, const void* segments, void* y, const void* x);
  void (*attend)(const void* pages, const void* rows, const void* q, long q_row, long q_head, void* out, long heads,
                 float scale);
};

enum Projection { Q, K, V, O, GATE, UP, DOWN, PROJECTIONS };
enum NormAt { BEFORE, HEADS_Q, HEADS_K, AFTER, NORMS };

// What a layer does, one after the other; `Stage` of layer.py.
enum Stage {
  NORM_BEFORE, READ, NORM_HEADS, ROTATE, ATTEND, WRITE, ADD_WRITTEN, NORM_AFTER, OPEN, GATE_OPENED, CLOSE, ADD_CLOSED,
  STAGES,
};

struct Norm {
  const void* gain;  // null: there is none
  float epsilon;
};

// What a layer is. `layer.py` has the same fields, of all structures here.
struct Layer {
  const Kernels* kernels;
  const void* products[PROJECTIONS];
  Norm norms[NORMS];
  float scale;
  int num_bytes;  // of a number
  long size, heads, kv_heads, head, inner;
};

// The step: which tokens there are, and memory for each of them.
struct Pass {
  long tokens;
  const int64_t* places;
  const void *cosines, *sines;
  const void* rows;      // of the attention kernel; null: attention is somebody else's
  const void* segments;  // of the adapters; null: there are none
  const int64_t* slots;  // of each token; null with the segments
  void *q, *k, *v, *attended;
  void *normed, *gate, *up;  // `normed` has what comes out of the last projection, too
  void* given;               // what enters a product, where that is not what all of its neighbours read
};

// What adapters do at a projection, each null where none of them does:
// y = mixed(out_scale * (W mixed(in_scale * x) + b)) + B A x + shift. Vectors stand in tables by slot.
struct Terms {
  const void *in_scale, *in_mix, *out_scale, *out_mix, *low_rank, *shift;
  long is_elsewhere;  // the caller computes the projection; then the others are null
};

// The layer in the step: its keys and values, and its adapters.
struct Here {
  const void* pages;
  void *keys, *values;
  Terms terms[PROJECTIONS];
  const void* gains[NORMS];  // tables by slot of the adapters' own; null: the layer's
};

}  // extern "C"

namespace {

constexpr int MOST_PRODUCTS = 3;  // of the same inputs

struct Run {
  const Layer& layer;
  const Pass& pass;
  const Here& here;
  const void* x;
  const void* attended;
  void* y;

  long q_size() const { return layer.heads * layer.head; }
  long kv_size() const { return layer.kv_heads * layer.head; }

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

  // What a product reads: x, or what the adapters' terms in front of it made of it.
  const void* entering(long projection, const void* from) const {
    const Terms& terms = here.terms[projection];
    const long size = size_in(projection);
    if (terms.in_scale)
      layer.kernels->scale(pass.given, from, terms.in_scale, pass.slots, pass.tokens, size);
    else if (terms.in_mix)
      std::memcpy(pass.given, from, pass.tokens * size * layer.num_bytes);
    if (terms.in_mix) layer.kernels->mix(terms.in_mix, pass.segments, pass.given, pass.given);
    return terms.in_scale || terms.in_mix ? pass.given : from;
  }

  // Whether the low-rank term of a projection comes with its product: it reads the same, and nothing is between them.
  bool is_with_product(const Terms& its) const {
    return its.low_rank && layer.kernels->products_with && !its.in_scale && !its.in_mix && !its.out_scale && !its.out_mix;
  }

  // The products of `count` projections with what `from` has: side by side as far as they read the same.
  void multiply(long first, long count, const void* from, void* const* ys) const {
    const void *layers[MOST_PRODUCTS], *low_ranks[MOST_PRODUCTS];
    void* its[MOST_PRODUCTS];
    long num = 0, num_with = 0;
    for (long i = 0; i < count; ++i) {
      const Terms& terms = here.terms[first + i];
      if (terms.is_elsewhere) continue;
      if (terms.in_scale || terms.in_mix) {
        layer.kernels->products(layer.products + first + i, 1, entering(first + i, from), ys + i, pass.tokens);
        continue;
      }
      layers[num] = layer.products[first + i];
      low_ranks[num] = is_with_product(terms) ? terms.low_rank : nullptr;
      num_with += low_ranks[num] != nullptr;
      its[num++] = ys[i];
    }
    if (num_with)
      layer.kernels->products_with(layers, num, from, its, pass.tokens, low_ranks, pass.segments);
    else if (num)
      layer.kernels->products(layers, num, from, its, pass.tokens);
  }

  void project(long first, long count, const void* from, void* const* ys) const {
    const Kernels& run = *layer.kernels;
    multiply(first, count, from, ys);
    const void* low_rank[MOST_PRODUCTS];
    void* low_rank_ys[MOST_PRODUCTS];
    long num_low_rank = 0;
    for (long i = 0; i < count; ++i) {
      const Terms& terms = here.terms[first + i];
      if (terms.out_scale) run.scale(ys[i], ys[i], terms.out_scale, pass.slots, pass.tokens, size_out(first + i));
      if (terms.out_mix) run.mix(terms.out_mix, pass.segments, ys[i], ys[i]);
      if (terms.low_rank && !is_with_product(terms)) {
        low_rank[num_low_rank] = terms.low_rank;
        low_rank_ys[num_low_rank++] = ys[i];
      }
    }
    if (num_low_rank) run.low_rank(low_rank, num_low_rank, pass.segments, low_rank_ys, from);
    for (long i = 0; i < count; ++i)
      if (const Terms& terms = here.terms[first + i]; terms.shift)
        run.shift(ys[i], terms.shift, pass.slots, pass.tokens, size_out(first + i));
  }

  // `each` vectors of a token are normed one by one.
  void norm(NormAt at, const void* from, void* to, long each, long size) const {
    const Norm& its = layer.norms[at];
    if (here.gains[at])
      layer.kernels->own_norm(from, here.gains[at], pass.slots, to, pass.tokens, each, size, its.epsilon);
    else
      layer.kernels->norm(from, its.gain, to, pass.tokens * each, size, its.epsilon);
  }

  void read() const {
    void* const ys[] = {pass.q, pass.k, pass.v};
    project(Q, 3, pass.normed, ys);
  }

  void norm_heads() const {
    if (!layer.norms[HEADS_Q].gain) return;
    norm(HEADS_Q, pass.q, pass.q, layer.heads, layer.head);
    norm(HEADS_K, pass.k, pass.k, layer.kv_heads, layer.head);
  }

  void rotate() const {
    layer.kernels->rotate(pass.q, pass.k, pass.v, pass.cosines, pass.sines, pass.places, here.keys, here.values,
                          pass.tokens, layer.heads, layer.kv_heads, layer.head);
  }

  void attend() const {
    layer.kernels->attend(here.pages, pass.rows, pass.q, q_size(), layer.head, pass.attended, layer.heads, layer.scale);
  }

  void open() const {
    void* const ys[] = {pass.gate, pass.up};
    project(GATE, 2, pass.normed, ys);
  }

  void stage(long at) const {
    const Kernels& run = *layer.kernels;
    const long num = pass.tokens * layer.size;
    switch (at) {
      case NORM_BEFORE: return norm(BEFORE, x, pass.normed, 1, layer.size);
      case READ: return read();
      case NORM_HEADS: return norm_heads();
      case ROTATE: return rotate();
      case ATTEND: return attend();
      case WRITE: return project(O, 1, attended, &y);
      case ADD_WRITTEN: return run.add(y, x, num);
      case NORM_AFTER: return norm(AFTER, y, pass.normed, 1, layer.size);
      case OPEN: return open();
      case GATE_OPENED: return run.gate(pass.gate, pass.up, pass.tokens * layer.inner);
      case CLOSE: return project(DOWN, 1, pass.gate, &pass.normed);
      case ADD_CLOSED: return run.add(y, pass.normed, num);
    }
  }
};

}  // namespace

extern "C" {

// Stages [first, last) of the way from x [tokens, size] to y [tokens, size]. `attended` is what the output projection
// reads, [tokens, heads, head]: the pass's, or what somebody else's attention gave.
void layer_run(const Layer* layer, const Pass* pass, const Here* here, const void* x, const void* attended, void* y,
               long first, long last) {
  const Run run{*layer, *pass, *here, x, attended, y};
  for (long at = first; at < last; ++at) run.stage(at);
}

// `count` layers one after the other, all stages of each, from x to y over `between`; the three are apart.
void layers_run(const Layer* const* layers, const Here* const* heres, long count, const Pass* pass, const void* x,
                void* between, void* y) {
  for (long i = 0; i < count; ++i) {
    void* const to = (count - i) % 2 ? y : between;
    layer_run(layers[i], pass, heres[i], x, pass->attended, to, NORM_BEFORE, STAGES);
    x = to;
  }
}
}
