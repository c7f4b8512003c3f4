// Memory on large pages, where the system has them for those who ask: a step walks through all weights
// and states, and each page has to be looked up.
#pragma once

#include <stdint.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cottention {

#if defined(__linux__)
#if !defined(MADV_COLLAPSE)
#define MADV_COLLAPSE 25
#endif

// For the large pages that lie in [data, data + bytes).
inline void advise_large_pages(void* data, int64_t bytes, int advice) {
  constexpr uintptr_t size = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + size - 1) / size * size, last = (begin + bytes) / size * size;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, advice);
}
#endif

// Calls fill(), which writes the memory for the first time. Memory that was in use before has small
// pages already, which Linux 6.1 and later put together.
template <class Fill>
void fill_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes,
                      const Fill& fill) {
#if defined(__linux__)
  advise_large_pages(data, bytes, MADV_HUGEPAGE);
#endif
  fill();
#if defined(__linux__)
  advise_large_pages(data, bytes, MADV_COLLAPSE);
#endif
}

}  // namespace cottention
