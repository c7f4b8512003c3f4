// zero_large_pages on the CPU: x, contiguous, is set to zero, on large pages if nothing was written to
// it before.
#include <cstring>

#include "checks.h"
#include "large_pages.h"
#include "ops.h"
#include "parallel.h"

namespace cottention {

constexpr int64_t kZeroedPerTask = 4 << 20;  // bytes

void zero_large_pages(const Tensor& x) {
  check_contiguous(x, "x", x.dim(), ScalarType::Float);
  char* data = static_cast<char*>(x.mutable_data_ptr());
  const int64_t bytes = x.numel() * sizeof(float);
  fill_large_pages(data, bytes, [&] {
    for_each_task(ceil_div(bytes, kZeroedPerTask), 1, [&](int64_t task) {
      const int64_t begin = task * kZeroedPerTask;
      std::memset(data + begin, 0, std::min(kZeroedPerTask, bytes - begin));
    });
  });
}

}  // namespace cottention
