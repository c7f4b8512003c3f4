// Picks the instruction set when the first op runs. COTTENTION_CPU_ISA (plain, avx2, avx512 or
// avx512_bf16) forces one that the machine supports.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace cottention {
namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// Every CPU that has the one has the other.
bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vnni");
}

const Kernels* kernels_for(const std::string& isa) {
  if (isa == "plain") return &plain::kernels;
  if (isa == "avx2" && has_avx2()) return &avx2::kernels;
  if (isa == "avx512" && has_avx512()) return &avx512::kernels;
  if (isa == "avx512_bf16" && has_avx512_bf16()) return &avx512_bf16::kernels;
  return nullptr;
}

const char* best() {
  return has_avx512_bf16() ? "avx512_bf16"
         : has_avx512()    ? "avx512"
         : has_avx2()      ? "avx2"
                           : "plain";
}
#else
const Kernels* kernels_for(const std::string& isa) {
  return isa == "plain" ? &plain::kernels : nullptr;
}

const char* best() { return "plain"; }
#endif

const Kernels& pick() {
  const char* forced = std::getenv("COTTENTION_CPU_ISA");
  const std::string isa = forced && *forced ? forced : best();
  const Kernels* found = kernels_for(isa);
  if (!found)
    throw std::runtime_error(
        "COTTENTION_CPU_ISA=" + isa +
        ": not one of plain, avx2, avx512, avx512_bf16 that this machine supports");
  return *found;
}

}  // namespace

// With the prefetchers of Zen 4, which Zen 3 has as well, steps and products were 5 to 35 % slower
// with prefetches in them, on Zen 5 up to twice as fast.
bool prefetches_ahead() {
#if defined(__x86_64__)
  static const bool has_prefetchers = __builtin_cpu_is("amdfam19h");
  return !has_prefetchers;
#else
  return true;
#endif
}

const Kernels& kernels() {
  static const Kernels& picked = pick();
  return picked;
}

}  // namespace cottention
