// A team of torch's threads for all layers of a model: its threads stay awake from one list of tasks
// to the next, which are microseconds apart, and sleep when the last one is done.
//
// The owner runs the program; the others look for its lists. Who looks too late for a list, because
// its core has other work, is not waited for: the owner does what is left. Only a thread that has
// begun a task is.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <exception>
#include <thread>

namespace cottention {

// body(context, i) for i of [0, threads), each at most once. That for 0 does what no other has begun.
struct Job {
  void (*body)(const void* context, int64_t thread);
  const void* context;
  int64_t threads;
};

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Team {
 public:
  // The team whose program this thread runs, or null.
  static Team*& of_this_thread() {
    static thread_local Team* team = nullptr;
    return team;
  }

  // By the owner.
  void run(const Job& job) {
    job_ = job;
    gate_.store((gate_.load(std::memory_order_relaxed) | kOpen) + kNext);
    job.body(job.context, 0);
    gate_.fetch_and(~kOpen);
    for (int64_t looks = 0; (gate_.load() & kInside) != 0; ++looks) wait(looks);
  }
  void end() { has_ended_.store(true); }

  // By the others, until the program ends.
  void serve(int64_t thread) {
    uint64_t last = 0;
    for (int64_t looks = 0; !has_ended_.load(); ++looks) {
      if (!enter(last)) {
        wait(looks);
        continue;
      }
      if (thread < job_.threads) job_.body(job_.context, thread);
      gate_.fetch_sub(1);
      looks = 0;
    }
  }

 private:
  // The gate: how many are inside, whether it is open, and the number of the job.
  static constexpr uint64_t kInside = 0xffff, kOpen = kInside + 1, kNext = 2 * kOpen;
  static constexpr int64_t kLooks = 1000;  // 20 to 40 microseconds
  static uint64_t number_of(uint64_t gate) { return gate / kNext; }

  // Whoever has looked for long may have the core that the other thread needs.
  static void wait(int64_t looks) {
    if (looks < kLooks)
      pause_briefly();
    else
      std::this_thread::yield();
  }

  // Whether there is another job than the last; `last` is then its number.
  bool enter(uint64_t& last) {
    uint64_t gate = gate_.load();
    if (!(gate & kOpen) || number_of(gate) == last) return false;
    if (!gate_.compare_exchange_strong(gate, gate + 1)) return false;
    last = number_of(gate);
    return true;
  }

  alignas(64) std::atomic<uint64_t> gate_{0};
  alignas(64) std::atomic<bool> has_ended_{false};
  Job job_{};
};

// Calls program() on this thread, with torch's other threads as its team if `is_shared`.
template <class Program>
void with_team(bool is_shared, const Program& program) {
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || !is_shared || Team::of_this_thread()) return program();
  Team team;
  std::exception_ptr error;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t own = begin; own < end; ++own) {
      if (own > 0) {
        team.serve(own);
        continue;
      }
      Team::of_this_thread() = &team;
      try {
        program();
      } catch (...) {
        error = std::current_exception();
      }
      Team::of_this_thread() = nullptr;
      team.end();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace cottention
