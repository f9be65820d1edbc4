// The threads of the OpenMP runtime that torch computes with, handed over once after loading (see native.py).
// A source includes this file once; its library then has as many threads as torch has on the calling thread.
#pragma once

#include <atomic>

namespace team {

typedef void (*Start)(void (*work)(void*), void* facts, unsigned num_threads, unsigned flags);
typedef int (*NumThreads)();

#define OURS __attribute__((visibility("hidden")))  // libraries loaded side by side do not share these
OURS inline Start start = nullptr;
OURS inline NumThreads max_threads = nullptr;
#undef OURS

inline int num_threads() { return start && max_threads ? max_threads() : 1; }

// body(first, last) for ranges of `grain` tasks out of [0, num_tasks), by whichever thread is free.
template <class Body>
void share(long num_tasks, long grain, const Body& body) {
  const long num_ranges = (num_tasks + grain - 1) / grain;
  const int threads = num_threads();
  if (threads <= 1 || num_ranges <= 1) {
    if (num_tasks > 0) body(0L, num_tasks);
    return;
  }
  struct Facts {
    const Body* body;
    long num_tasks, grain;
    std::atomic<long> next;
  } facts{&body, num_tasks, grain, {0}};
  auto work = [](void* given) {
    auto* f = static_cast<Facts*>(given);
    for (;;) {
      const long first = f->next.fetch_add(f->grain, std::memory_order_relaxed);
      if (first >= f->num_tasks) return;
      const long last = first + f->grain;
      (*f->body)(first, last < f->num_tasks ? last : f->num_tasks);
    }
  };
  start(work, &facts, num_ranges < threads ? unsigned(num_ranges) : unsigned(threads), 0);
}

}  // namespace team

extern "C" inline __attribute__((used, visibility("default"))) void use_team(void* start, void* max_threads) {
  team::start = reinterpret_cast<team::Start>(start);
  team::max_threads = reinterpret_cast<team::NumThreads>(max_threads);
}
