// The ops registered with torch's dispatcher for CUDA; the library of the CPU ops has the schemas.
#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(cottention, CUDA, m) { cottention::cuda::register_all(m); }
