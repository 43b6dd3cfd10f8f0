// How packed words multiply, with ordinary arithmetic. Instruction sets with dot products add their own.
#pragma once

#include "linear/kernel.h"

namespace lsp {

template <class Vector>
struct FloatArithmetic {
  using V = Vector;
  using Sum = typename V::Float;
  using Word = typename V::Float;
  static constexpr int group = 1;

  static Sum start(const int32_t*) { return V::broadcast(0.0F); }
  static Word load(const char* from) { return V::load(reinterpret_cast<const float*>(from)); }
  static Word broadcast(const char* from) { return V::broadcast(*reinterpret_cast<const float*>(from)); }
  static Sum step(Sum sum, Word a, Word b) { return V::fma(a, b, sum); }
  static Sum finish(Sum sum, typename V::Float, typename V::Float bias) { return V::add(sum, bias); }
};

// What all kernels with integer sums share.
template <class Vector, int GROUP>
struct IntegerArithmetic {
  using V = Vector;
  using Sum = typename V::Int;
  using Word = typename V::Int;
  static constexpr int group = GROUP;

  static Sum start(const int32_t* from) { return V::load_int(from); }
  static Word load(const char* from) { return V::load_int(reinterpret_cast<const int32_t*>(from)); }
  static Word broadcast(const char* from) { return V::broadcast_int(*reinterpret_cast<const int32_t*>(from)); }
  static typename V::Float finish(Sum sum, typename V::Float scale, typename V::Float bias) {
    return V::fma(V::to_float(sum), scale, bias);
  }
};

}  // namespace lsp
