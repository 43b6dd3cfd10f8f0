// The second pass over a tile whose outputs need more than a bias: activation, residual, quantization, ragged columns.
#pragma once

#include "linear/kernel.h"

namespace lsp {

// c[0] + c[1] s + c[2] s^2 + ...
template <class V, int N>
typename V::Float polynomial(typename V::Float s, const float (&c)[N]) {
  typename V::Float sum = V::broadcast(c[N - 1]);
  for (int i = N - 2; i >= 0; --i) sum = V::fma(sum, s, V::broadcast(c[i]));
  return sum;
}

// An odd function that tends to 1, as z P(z^2) / Q(z^2) within the limit. P is some 3e-7 too great, so that the
// quotient is 1 exactly once it is cut off there: what is far below zero gives exactly 0 for x (1 + odd(x)).
template <class V, int P, int Q>
typename V::Float odd_rational(typename V::Float z, float limit, const float (&p)[P], const float (&q)[Q]) {
  z = V::max(V::min(z, V::broadcast(limit)), V::broadcast(-limit));
  const typename V::Float s = V::mul(z, z);
  const typename V::Float value = V::div(V::mul(z, polynomial<V>(s, p)), polynomial<V>(s, q));
  return V::max(V::min(value, V::broadcast(1.0F)), V::broadcast(-1.0F));
}

// erf(x / sqrt(2)): minimax in 0.5 x erf(x / sqrt(2)), where the error is below 2e-6.
template <class V>
typename V::Float erf_of_half(typename V::Float x) {
  constexpr float p[] = {0.79787904F, 0.14061113F, 0.014007602F, 0.0011017915F, 1.98237885e-5F};
  constexpr float q[] = {1.0F, 0.34286124F, 0.049752425F, 0.0040397281F, 2.0113339e-4F, 7.9668553e-7F};
  return odd_rational<V>(x, 5.5F, p, q);
}

// tanh(z): minimax, error below 6e-7.
template <class V>
typename V::Float tanh(typename V::Float z) {
  constexpr float p[] = {1.00000024F, 0.13373202F, 0.0034865832F, 2.0471842e-5F, 1.3184234e-8F};
  constexpr float q[] = {1.0F, 0.46706495F, 0.025841982F, 3.2713861e-4F, 7.7026664e-7F};
  return odd_rational<V>(z, 9.0F, p, q);
}

template <class V, lsp_activation ACTIVATION>
typename V::Float activate(typename V::Float x) {
  if constexpr (ACTIVATION == LSP_RELU) return V::max(V::broadcast(0.0F), x);  // NaN stays NaN
  if constexpr (ACTIVATION == LSP_GELU || ACTIVATION == LSP_GELU_TANH) {
    const typename V::Float half = V::mul(x, V::broadcast(0.5F));
    typename V::Float odd;
    if constexpr (ACTIVATION == LSP_GELU) {
      odd = erf_of_half<V>(x);
    } else {
      const typename V::Float square = V::mul(x, x);
      const typename V::Float factor = V::fma(square, V::broadcast(0.035677408F), V::broadcast(0.79788456F));
      odd = tanh<V>(V::mul(x, factor));
    }
    return V::fma(half, odd, half);
  }
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
