// From a type that is known at run time to one that is known when compiling.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "params.h"

namespace cottention::cuda {

template <class T>
struct Of {
  using Type = T;
};

// Calls visit(Of<…>{}) with the type of elements and returns what it returns.
template <class Visit>
auto with_type(Type type, const Visit& visit) {
  if (type == Type::kBFloat16) return visit(Of<c10::BFloat16>{});
  if (type == Type::kHalf) return visit(Of<c10::Half>{});
  return visit(Of<float>{});
}

// Calls visit(Of<…>{}, Of<…>{}) with the types of inputs and outputs; inputs have that of the
// outputs, or float.
template <class Visit>
auto with_types(Type in, Type out, const Visit& visit) {
  return with_type(out, [&](auto of_out) {
    return in == Type::kFloat ? visit(Of<float>{}, of_out) : visit(of_out, of_out);
  });
}

}  // namespace cottention::cuda
