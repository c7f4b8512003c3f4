// The kernels of one instruction set, COTTENTION_ISA; compiled once for each.
//
// Includes no C++ library header: the linker keeps one copy of an inline function, which could be
// the one that was compiled here for AVX-512.
#include "kernels.h"

#include "argmax.h"
#include "attention_gelu.h"
#include "elementwise.h"
#include "linear.h"
#include "recurrent.h"
#include "sampling_weights.h"

namespace cottention::COTTENTION_ISA {

const Kernels kernels = {
    denominators, recurrent,    attention_gelu, linear<Float32Word>, linear<BFloat16Pair>,
    to_bfloat16,  features,     gelu,           gelu_erf,            elu_plus_one,
    layer_norm,   argmax,       sampling_weights};

}  // namespace cottention::COTTENTION_ISA
