// The threads of the CPU ops.
//
// A job is run by the thread that has it and by those workers that come while it lasts. Its owner
// waits for no worker that has not begun: where other threads have the cores, such as a server's
// event loop, a worker that must wait for one would hold up the whole step. So a job must be one
// that any number of threads can do, as a list of tasks is from which each takes the next.
#pragma once

#include <stdint.h>

namespace cottention {

// body(context, thread) for each thread that takes part; thread 0 is the owner.
struct Job {
  void (*body)(const void* context, int64_t thread);
  const void* context;
};

// Runs a job on at most `threads` threads; on this one alone while another thread has the workers.
// The body must not throw, and not run jobs.
void run_job(int64_t threads, const Job& job);

}  // namespace cottention
