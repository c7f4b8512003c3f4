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

// Calls task(i) for i in [0, count). `least` tasks are worth waking a thread for.
template <class Task>
void for_each_task(int64_t count, int64_t least, const Task& task) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t workers = std::min(threads, ceil_div(count, std::max<int64_t>(least, 1)));
  if (workers <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) task(i);
  });
}

}  // namespace cottention
