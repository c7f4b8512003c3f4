// Software prefetch across page borders, where the hardware prefetcher stops.
//
// Always inlined: the compiler may take a call of a function that only prefetches for one without
// effect, and leave it out. Included by kernels.cpp only.
#pragma once

#include <stdint.h>

namespace cottention::COTTENTION_ISA {

constexpr uintptr_t kPage = 4096;  // bytes

// The hardware prefetches the lines of a page, but not the next page. For each page that begins in
// these `count` elements, prefetch one line of the page two further on. Prefetching for writing
// measured slower.
[[gnu::always_inline]] inline void prefetch_pages(const float* data, int64_t count) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t end = begin + count * sizeof(float);
  for (uintptr_t page = (begin + kPage - 1) / kPage * kPage; page < end; page += kPage)
    __builtin_prefetch(reinterpret_cast<const void*>(page + 2 * kPage));
}

[[gnu::always_inline]] inline void prefetch_lines(const float* data, int64_t count) {
  constexpr int64_t line = 64 / sizeof(float);
  for (int64_t i = 0; i < count; i += line) __builtin_prefetch(data + i);
}

}  // namespace cottention::COTTENTION_ISA
