// Shares independent tasks among torch's threads, each thread taking the next one left.
//
// Tasks may be of very different length (a prefilled segment beside decoded tokens), so none is
// assigned ahead. Which thread does a task changes no bit of it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

namespace cottention {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kShortRuns = 32;

// How many neighbouring tasks a thread takes at a time, so that it comes back `times` times: runs of
// them lie side by side in memory. Tasks of one length allow long runs, tasks of many lengths none.
inline int64_t even_run(int64_t count, int64_t times) {
  return std::max<int64_t>(1, count / (times * int64_t(torch::stable::get_num_threads())));
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
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t first = next.fetch_add(run); first < count; first = next.fetch_add(run))
      for (int64_t i = first; i < std::min(first + run, count); ++i) task(i);
  });
}

template <class Task>
void for_each_task(int64_t count, int64_t least, const Task& task) {
  for_each_task(count, least, even_run(count, kShortRuns), task);
}

}  // namespace cottention
