// The kernels of one instruction set, COTTENTION_ISA; compiled once for each.
//
// Includes no C++ library header: the linker keeps one copy of an inline function, which could be
// the one that was compiled here for AVX-512.
#include "kernels.h"

#include "activations.h"
#include "argmax.h"
#include "attention_gelu.h"
#include "elementwise.h"
#include "linear.h"
#include "mamba2.h"
#include "recurrent.h"
#include "rwkv7.h"
#include "sampling_weights.h"
#include "selective_scan.h"

namespace cottention::COTTENTION_ISA {

const Kernels kernels = {denominators,         recurrent,   attention_gelu, linear<Float32Word>,
                         linear<BFloat16Pair>, linear<WidenedPair>,
                         linear_compressed<BFloat16Pair>,
                         linear_compressed<WidenedPair>, linear<EightBits>, to_bfloat16,
                         BFloat16Pair::kRowWords, to_int8,   EightBits::kRowGroup, quantize_panel,
                         features,             gelu,
                         gelu_erf,             elu_plus_one, layer_norm,  argmax,         sampling_weights,
                         each_element<silu_of>, each_element<sigmoid_of>, each_element<softplus_of>,
                         each_element<tanh_of>, each_element<exponential>, rms_norm,
                         short_convolution,    selective_scan,
                         token_mix,            relu_squared, rwkv7_heads, mamba2_heads};

}  // namespace cottention::COTTENTION_ISA
