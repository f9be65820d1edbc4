// The threads of the OpenMP runtime that torch computes with, handed over once after loading (see native.py).
// A source includes this file once; its library then has as many threads as torch has on the calling thread.
//
// A team waits at its end for all its threads. Where another program is busy on one of their cores, each of those waits
// lasts until the scheduler changes its mind, some milliseconds, and a step has a hundred of them: it would take thirty
// times as long for a core that is half as fast. So who waits too long a few times in a row works alone for a while.
#pragma once

#include <atomic>
#include <chrono>

namespace team {

typedef void (*Start)(void (*work)(void*), void* facts, unsigned num_threads, unsigned flags);
typedef int (*NumThreads)();
typedef std::chrono::steady_clock Clock;
typedef std::chrono::duration<long, std::nano> Nanoseconds;

constexpr long LONG_WAIT = 700'000;           // ns; a scheduler's slice is longer, the work of one range is not
constexpr int PATIENCE = 3;                   // long waits in a row; single ones are the event loop's
constexpr long SHORTEST_BREAK = 20'000'000;   // ns
constexpr long LONGEST_BREAK = 320'000'000;

// How long this library's teams have had to wait of late.
struct Waiting {
  std::atomic<int> in_a_row{0};
  std::atomic<long> break_ns{SHORTEST_BREAK};
  std::atomic<long> alone_until{0};

  bool is_over(long now) const { return now >= alone_until.load(std::memory_order_relaxed); }

  // A team that worked for so long has waited for so long.
  void note(long now, long worked, long waited) {
    if (waited < LONG_WAIT || waited < worked) {
      in_a_row.store(0, std::memory_order_relaxed);
      break_ns.store(SHORTEST_BREAK, std::memory_order_relaxed);
      return;
    }
    if (in_a_row.fetch_add(1, std::memory_order_relaxed) + 1 < PATIENCE) return;
    const long length = break_ns.load(std::memory_order_relaxed);
    alone_until.store(now + length, std::memory_order_relaxed);
    break_ns.store(length < LONGEST_BREAK ? 2 * length : length, std::memory_order_relaxed);
    in_a_row.store(PATIENCE - 1, std::memory_order_relaxed);  // the first team behind a break is a trial
  }
};

#define OURS __attribute__((visibility("hidden")))  // libraries loaded side by side do not share these
OURS inline Start start = nullptr;
OURS inline NumThreads max_threads = nullptr;
OURS inline Waiting waiting;
#undef OURS

inline long now() {
  return std::chrono::duration_cast<Nanoseconds>(Clock::now().time_since_epoch()).count();
}

inline int num_threads() { return start && max_threads ? max_threads() : 1; }

template <class Body>
struct Facts {
  const Body* body;
  long num_tasks, grain;
  std::atomic<long> next;
  const void* caller;  // tells the thread that waits for the others: before its work for the last team's, and behind it
  long entered, left;  // its work

  static const void* this_thread() {
    static thread_local char here;
    return &here;
  }

  void work() {
    const bool is_caller = this_thread() == caller;
    if (is_caller) entered = now();
    for (;;) {
      const long first = next.fetch_add(grain, std::memory_order_relaxed);
      if (first >= num_tasks) break;
      const long last = first + grain;
      (*body)(first, last < num_tasks ? last : num_tasks);
    }
    if (is_caller) left = now();
  }
};

// body(first, last) for ranges of `grain` tasks out of [0, num_tasks), by whichever thread is free.
template <class Body>
void share(long num_tasks, long grain, const Body& body) {
  const long num_ranges = (num_tasks + grain - 1) / grain;
  const int threads = num_threads();
  const long began = threads > 1 && num_ranges > 1 ? now() : 0;
  if (!began || !waiting.is_over(began)) {
    if (num_tasks > 0) body(0L, num_tasks);
    return;
  }
  Facts<Body> facts{&body, num_tasks, grain, {0}, Facts<Body>::this_thread(), began, began};
  start([](void* given) { static_cast<Facts<Body>*>(given)->work(); }, &facts,
        num_ranges < threads ? unsigned(num_ranges) : unsigned(threads), 0);
  const long ended = now();
  waiting.note(ended, facts.left - facts.entered, facts.entered - began + ended - facts.left);
}

}  // namespace team

extern "C" inline __attribute__((used, visibility("default"))) void use_team(void* start, void* max_threads) {
  team::start = reinterpret_cast<team::Start>(start);
  team::max_threads = reinterpret_cast<team::NumThreads>(max_threads);
}
