// Workers that look for jobs for a short time, and then sleep until there is one.
#include "workers.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace cottention {
namespace {

// How often a thread looks before it sleeps: 20 to 60 microseconds, more than there are between
// two jobs of a step. As long as it looks, nobody else has its core.
constexpr int kLooks = 1500;

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Condition>
bool look_for(const Condition& condition) {
  for (int i = 0; i < kLooks; ++i) {
    if (condition()) return true;
    pause_briefly();
  }
  return condition();
}

class Workers {
 public:
  void run(int64_t threads, const Job& job) {
    std::unique_lock<std::mutex> alone(running_, std::try_to_lock);
    if (!alone) return job.body(job.context, 0);
    hire(threads - 1);
    open(threads, job);
    job.body(job.context, 0);
    close();
  }

 private:
  // The gate: the number of the job, whether it can be entered, and how many workers are inside.
  static constexpr uint64_t kInside = 0xffff, kOpen = kInside + 1, kNext = 2 * kOpen;
  static uint64_t number_of(uint64_t gate) { return gate & ~(kNext - 1); }

  void hire(int64_t number) {
    for (; hired_ < number; ++hired_)
      std::thread(&Workers::work, this, hired_ + 1).detach();
  }

  void open(int64_t threads, const Job& job) {
    threads_ = threads;
    job_ = job;
    gate_.store((number_of(gate_.load(std::memory_order_relaxed)) + kNext) | kOpen);
    if (sleeping_.load() == 0) return;
    { std::lock_guard<std::mutex> lock(mutex_); }  // who has looked at the gate sleeps by now
    opened_.notify_all();
  }

  void close() {
    gate_.fetch_and(~kOpen);
    const auto is_empty = [&] { return (gate_.load() & kInside) == 0; };
    if (look_for(is_empty)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    is_owner_asleep_.store(true);
    left_.wait(lock, is_empty);
    is_owner_asleep_.store(false);
  }

  [[noreturn]] void work(int64_t thread) {
    uint64_t last = 0;
    while (true) {
      const uint64_t before = number_of(gate_.load());
      const auto has_job = [&] {
        const uint64_t gate = gate_.load();
        return (gate & kOpen) != 0 && number_of(gate) != last;
      };
      if (!look_for(has_job)) sleep_after(before);
      if (!enter(last)) continue;
      if (thread < threads_) job_.body(job_.context, thread);
      leave();
    }
  }

  // Until there is a job after the one of this number, be it over by then: the next ones of a step
  // follow soon.
  void sleep_after(uint64_t number) {
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleeping_;
    opened_.wait(lock, [&] { return number_of(gate_.load()) != number; });
    --sleeping_;
  }

  // Whether there was a job to enter; `last` is then its number.
  bool enter(uint64_t& last) {
    uint64_t gate = gate_.load();
    while ((gate & kOpen) && number_of(gate) != last)
      if (gate_.compare_exchange_weak(gate, gate + 1)) {
        last = number_of(gate);
        return true;
      }
    return false;
  }

  void leave() {
    const uint64_t before = gate_.fetch_sub(1);
    if ((before & kOpen) || (before & kInside) != 1 || !is_owner_asleep_.load()) return;
    { std::lock_guard<std::mutex> lock(mutex_); }
    left_.notify_one();
  }

  alignas(64) std::atomic<uint64_t> gate_{0};
  alignas(64) std::atomic<int> sleeping_{0};
  std::atomic<bool> is_owner_asleep_{false};
  int64_t threads_ = 0;
  Job job_{};
  std::mutex running_;  // held by the owner of the job
  std::mutex mutex_;
  std::condition_variable opened_, left_;
  int64_t hired_ = 0;
};

// Never destroyed: its threads end with the process. A process that was forked has none of them,
// and makes its own.
Workers* workers = nullptr;
std::once_flag at_fork;
std::mutex making;

Workers& all_workers() {
  std::call_once(at_fork, [] {
    pthread_atfork([] { making.lock(); }, [] { making.unlock(); },
                   [] {
                     workers = nullptr;
                     making.unlock();
                   });
  });
  std::lock_guard<std::mutex> lock(making);
  if (!workers) workers = new Workers;
  return *workers;
}

}  // namespace

void run_job(int64_t threads, const Job& job) { all_workers().run(threads, job); }

}  // namespace cottention
