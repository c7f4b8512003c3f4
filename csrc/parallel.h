// Shares independent tasks among torch's threads: each takes its own portion, then what others left.
//
// A portion is the same in every call over as many tasks, so that a thread meets memory that lies in
// its own caches: threads may sit on parts of a machine that share none. Tasks may be of very
// different length (a prefilled segment beside decoded tokens), so who is done takes from the rest.
// Which thread does a task changes no bit of it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

namespace cottention {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kShortRuns = 32;

// How many neighbouring tasks a thread takes at a time, so that it comes back `times` times: runs of
// them lie side by side in memory. Tasks of one length allow long runs, tasks of many lengths none.
inline int64_t even_run(int64_t count, int64_t times) {
  return std::max<int64_t>(1, count / (times * int64_t(torch::stable::get_num_threads())));
}

struct alignas(64) Portion {
  std::atomic<int64_t> next;
  int64_t end;
};

inline std::vector<Portion> portions(int64_t count, int64_t number) {
  std::vector<Portion> all(number);
  for (int64_t i = 0; i < number; ++i) {
    all[i].next.store(count * i / number, std::memory_order_relaxed);
    all[i].end = count * (i + 1) / number;
  }
  return all;
}

// What nobody has taken of a portion, `run` tasks at a time.
template <class Task>
void finish(Portion& portion, int64_t run, const Task& task) {
  while (true) {
    const int64_t first = portion.next.fetch_add(run, std::memory_order_relaxed);
    if (first >= portion.end) return;
    for (int64_t i = first; i < std::min(first + run, portion.end); ++i) task(i);
  }
}

// Calls task(i) for i in [0, count), `run` at a time. `least` tasks are worth waking a thread for.
template <class Task>
void for_each_task(int64_t count, int64_t least, int64_t run, const Task& task) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t workers = std::min(threads, ceil_div(count, std::max<int64_t>(least, 1)));
  if (workers <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  std::vector<Portion> all = portions(count, workers);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t own = begin; own < end; ++own)
      for (int64_t i = 0; i < workers; ++i) finish(all[(own + i) % workers], run, task);
  });
}

template <class Task>
void for_each_task(int64_t count, int64_t least, const Task& task) {
  for_each_task(count, least, even_run(count, kShortRuns), task);
}

}  // namespace cottention
