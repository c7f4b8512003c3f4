// Runs independent tasks on torch's threads: static ranges, with work stealing at the end.
//
// Every thread first runs its own range, which is the same in every call with as many tasks, so
// that its data stays in the caches of its core. Tasks may differ much in length (a prefilled
// segment beside decoded tokens), so a thread that is done continues with the ranges of others. The
// result does not depend on which thread runs a task.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "team.h"

namespace cottention {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kChunksPerThread = 32;
constexpr int64_t kProductsPerThread = 131072;  // of a product of matrices

// Neighbouring tasks to take at a time, so that each thread takes `chunks_per_thread` chunks: the
// data of a chunk is contiguous. Tasks of equal length allow large chunks, tasks of unequal length
// do not.
inline int64_t chunk_size(int64_t count, int64_t chunks_per_thread) {
  return std::max<int64_t>(1,
                           count / (chunks_per_thread * int64_t(torch::stable::get_num_threads())));
}

struct alignas(64) TaskRange {
  std::atomic<int64_t> next;
  int64_t end;
};

inline std::vector<TaskRange> split_tasks(int64_t count, int64_t number) {
  std::vector<TaskRange> all(number);
  for (int64_t i = 0; i < number; ++i) {
    all[i].next.store(count * i / number, std::memory_order_relaxed);
    all[i].end = count * (i + 1) / number;
  }
  return all;
}

// Runs the tasks of a range that no thread has taken yet, `chunk` at a time.
template <class Task>
void run_rest(TaskRange& range, int64_t chunk, const Task& task) {
  while (true) {
    const int64_t first = range.next.fetch_add(chunk, std::memory_order_relaxed);
    if (first >= range.end) return;
    for (int64_t i = first; i < std::min(first + chunk, range.end); ++i) task(i);
  }
}

// Calls task(i) for i in [0, count), `chunk` at a time; a thread is used per `grain_size` tasks.
template <class Task>
void for_each_task(int64_t count, int64_t grain_size, int64_t chunk, const Task& task) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t workers = std::min(threads, ceil_div(count, std::max<int64_t>(grain_size, 1)));
  if (workers <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  std::vector<TaskRange> all = split_tasks(count, workers);
  const auto run = [&](int64_t own) {
    for (int64_t i = 0; i < workers; ++i) run_rest(all[(own + i) % workers], chunk, task);
  };
  if (Team* team = Team::of_this_thread()) {
    using Run = decltype(run);
    const auto body = [](const void* of, int64_t own) { (*static_cast<const Run*>(of))(own); };
    return team->run({body, &run, workers});
  }
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t own = begin; own < end; ++own) run(own);
  });
}

template <class Task>
void for_each_task(int64_t count, int64_t grain_size, const Task& task) {
  for_each_task(count, grain_size, chunk_size(count, kChunksPerThread), task);
}

}  // namespace cottention
