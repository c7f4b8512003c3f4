// The kernels of one instruction set, which COTTENTION_ISA names; compiled once for each.
//
// Includes no C++ library header: an inline function of one, compiled here for AVX-512, could
// otherwise be the copy that the linker keeps for everybody.
#include "kernels.h"

#include "elementwise.h"
#include "argmax.h"
#include "linear.h"
#include "attention_gelu.h"
#include "recurrent.h"
#include "sampling_weights.h"

namespace cottention::COTTENTION_ISA {

const Kernels kernels = {
    denominators, recurrent, mix,  linear<FloatWord>, linear<PairWord>, round_row,
    features,     gelu,      elu_plus_one,            layer_norm,         likeliest,
    weigh};

}  // namespace cottention::COTTENTION_ISA
