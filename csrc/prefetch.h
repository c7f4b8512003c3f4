// Fetching ahead what the machine does not foresee: where the next pages begin.
//
// Included by kernels.cpp only.
#pragma once

#include <stdint.h>

namespace cottention::COTTENTION_ISA {

constexpr uintptr_t kPage = 4096;  // bytes

// The machine foresees the lines of a page, but not pages: where one begins in these `count` elements,
// a line of that two pages ahead is asked for. Asking for every line, or to write it, is slower.
inline void fetch_pages(const float* data, int64_t count) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t end = begin + count * sizeof(float);
  for (uintptr_t page = (begin + kPage - 1) / kPage * kPage; page < end; page += kPage)
    __builtin_prefetch(reinterpret_cast<const void*>(page + 2 * kPage));
}

}  // namespace cottention::COTTENTION_ISA
