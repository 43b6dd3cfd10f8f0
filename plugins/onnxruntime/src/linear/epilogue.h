// The second pass over a tile whose outputs need more than a bias: activation, residual, quantization, ragged columns.
#pragma once

#include "linear/kernel.h"

namespace lsp {

// c[0] + c[1] x + c[2] x^2 + ...
template <class V, int N>
typename V::Float polynomial(typename V::Float x, const float (&c)[N]) {
  typename V::Float sum = V::broadcast(c[N - 1]);
  for (int i = N - 2; i >= 0; --i) sum = V::fma(sum, x, V::broadcast(c[i]));
  return sum;
}

// What GELU takes away from max(x, 0), for z = |x|: z Phi(-z), as z / P(z)^16. P is the polynomial that is nearest to
// Phi(-z)^(-1/16) on [0, 5.5], relatively (Remez). So the small results of GELU's left side are exact in their own
// size, to 4e-6, where 1 + erf(x) would lose all but the last digits of them.
template <class V, int N>
typename V::Float gelu_by_its_tail(typename V::Float x, const float (&p)[N]) {
  const typename V::Float zero = V::broadcast(0.0F);
  // P(128)^16 is infinite already; z itself must not be, for infinity by infinity is no number.
  const typename V::Float z = V::min_abs(x, V::broadcast(128.0F));
  typename V::Float power = polynomial<V>(z, p);
  for (int i = 0; i < 4; ++i) power = V::mul(power, power);
  return V::sub(V::max(zero, x), V::div(z, power));  // NaN stays NaN
}

// x Phi(x), Phi that of the normal distribution.
template <class V>
typename V::Float gelu(typename V::Float x) {
  constexpr float p[] = {1.04427373F,     0.0520787947F,   0.0220531784F,    0.00347997062F,   -2.51995825e-05F,
                         8.91199306e-05F, -6.15053114e-06F, 1.92760785e-06F, -2.01827618e-07F, 1.7708647e-08F};
  return gelu_by_its_tail<V>(x, p);
}

// The same with Phi(z) = 1 / (1 + exp(-2 sqrt(2 / pi) (z + 0.044715 z^3))).
template <class V>
typename V::Float gelu_tanh(typename V::Float x) {
  constexpr float p[] = {1.04427373F,       0.0520765074F,    0.0220628362F,  0.00343734003F,
                         -0.000122465295F,  0.000220925911F,  -0.000137017661F, 8.8205903e-05F,
                         -2.66278748e-05F,  4.49480058e-06F,  -4.0208829e-07F, 1.58629856e-08F};
  return gelu_by_its_tail<V>(x, p);
}

template <class V, lsp_activation ACTIVATION>
typename V::Float activate(typename V::Float x) {
  if constexpr (ACTIVATION == LSP_RELU) return V::max(V::broadcast(0.0F), x);  // NaN stays NaN
  if constexpr (ACTIVATION == LSP_GELU) return gelu<V>(x);
  if constexpr (ACTIVATION == LSP_GELU_TANH) return gelu_tanh<V>(x);
  return x;
}

// The integer nearest to (x - offset) * reciprocal, even in the middle, within the range of int8.
template <class V>
typename V::Int quantize(typename V::Float x, typename V::Float offset, typename V::Float reciprocal) {
  const typename V::Float scaled = V::mul(V::sub(x, offset), reciprocal);
  return V::round(V::min(V::max(scaled, V::broadcast(-128.0F)), V::broadcast(127.0F)));
}

// `count` outputs of one row, from `position` on, of a vector's width or less.
template <class V, lsp_activation ACTIVATION>
void finish_part(const Tile& tile, const float* values, int64_t position, int count) {
  typename V::Float value = activate<V, ACTIVATION>(V::load(values));
  if (tile.residual != nullptr) value = V::add(value, V::load_part(tile.residual + position, count));
  if (tile.epilogue->out_type == LSP_INT8) {
    const Quantization& out = tile.epilogue->out;
    const typename V::Int q = quantize<V>(value, V::broadcast(out.offset), V::broadcast(out.reciprocal));
    V::store_int8_part(static_cast<int8_t*>(tile.y) + position, q, count);
  } else {
    V::store_part(static_cast<float*>(tile.y) + position, value, count);
  }
}

// Whole vectors, with what is the same for all of them decided beforehand.
template <class V, lsp_activation ACTIVATION, bool RESIDUAL, class Out>
void finish_whole(const Tile& tile, const float* buffer, int columns, int rows) {
  const typename V::Float offset = V::broadcast(tile.epilogue->out.offset);
  const typename V::Float reciprocal = V::broadcast(tile.epilogue->out.reciprocal);
  const float* residual = tile.residual;
  Out* y = static_cast<Out*>(tile.y);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; c += V::lanes) {
      typename V::Float value = activate<V, ACTIVATION>(V::load(buffer + c));
      if constexpr (RESIDUAL) value = V::add(value, V::load(residual + c));
      if constexpr (sizeof(Out) == 1) {
        V::store_int8(y + c, quantize<V>(value, offset, reciprocal));
      } else {
        V::store(y + c, value);
      }
    }
    buffer += columns;
    y += tile.stride;
    if constexpr (RESIDUAL) residual += tile.stride;
  }
}

template <class V, lsp_activation ACTIVATION>
void finish_rows(const Tile& tile, const float* buffer, int columns, int rows) {
  if (tile.columns < columns) {
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < tile.columns; c += V::lanes) {
        const int left = tile.columns - c;
        finish_part<V, ACTIVATION>(tile, buffer + r * columns + c, r * tile.stride + c,
                                   left < V::lanes ? left : V::lanes);
      }
    }
  } else if (tile.epilogue->out_type == LSP_INT8) {
    if (tile.residual != nullptr) return finish_whole<V, ACTIVATION, true, int8_t>(tile, buffer, columns, rows);
    finish_whole<V, ACTIVATION, false, int8_t>(tile, buffer, columns, rows);
  } else {
    if (tile.residual != nullptr) return finish_whole<V, ACTIVATION, true, float>(tile, buffer, columns, rows);
    finish_whole<V, ACTIVATION, false, float>(tile, buffer, columns, rows);
  }
}

template <class V>
void finish_tile(const Tile& tile, const float* buffer, int columns, int rows) {
  switch (tile.epilogue->activation) {
    case LSP_NONE:
      return finish_rows<V, LSP_NONE>(tile, buffer, columns, rows);
    case LSP_GELU:
      return finish_rows<V, LSP_GELU>(tile, buffer, columns, rows);
    case LSP_GELU_TANH:
      return finish_rows<V, LSP_GELU_TANH>(tile, buffer, columns, rows);
    case LSP_RELU:
      return finish_rows<V, LSP_RELU>(tile, buffer, columns, rows);
  }
}

}  // namespace lsp
