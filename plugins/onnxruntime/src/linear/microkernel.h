// The inner loops, written once over a vector type V (src/vector) and an arithmetic: how packed words multiply.
//
// Everything here is a template over a type that lives in the including file's anonymous namespace: its instances
// belong to that file alone, and code for one instruction set never stands in for another's. For the same reason
// nothing here calls the standard library.
#pragma once

#include <utility>

#include "linear/epilogue.h"
#include "linear/kernel.h"
#include "unroll.h"

namespace lsp {

// What is quantized is activated beforehand, in the buffer: GELU and quantization in one pass would be chains of
// instructions so long that the CPU overlaps too few of them.
template <class V>
void finish(const Tile& tile, float* buffer, int columns, int rows) {
  if (tile.epilogue->out_type != LSP_INT8 || tile.epilogue->activation == LSP_NONE) {
    return finish_tile<V>(tile, buffer, columns, rows);
  }
  Epilogue activation, rest = *tile.epilogue;
  activation.activation = tile.epilogue->activation;
  rest.activation = LSP_NONE;
  Tile activated = tile, quantized = tile;
  activated.epilogue = &activation;
  activated.residual = nullptr;
  activated.y = buffer;
  activated.stride = activated.columns = columns;
  quantized.epilogue = &rest;
  finish_tile<V>(activated, buffer, columns, rows);
  finish_tile<V>(quantized, buffer, columns, rows);
}

// One tile of ROWS rows and VECTORS vectors of columns. Arithmetic has, besides V: the types Sum and Word, `group`,
// start(const int32_t*), load(const char*), broadcast(const char*), step(Sum, Word, Word) and
// finish(Sum, scale, bias), which gives a V of float.
template <class Arithmetic, int ROWS, int VECTORS>
void multiply_tile(const Tile& tile) {
  using V = typename Arithmetic::V;
  constexpr int words = kChunk / Arithmetic::group;
  constexpr int columns = VECTORS * V::lanes;
  static_assert(ROWS * columns <= kMaxTileOutputs, "a tile must fit its buffer");

  typename Arithmetic::Sum sum[ROWS][VECTORS];
  LSP_UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    const typename Arithmetic::Sum start = Arithmetic::start(tile.start + v * V::lanes);
    LSP_UNROLL
    for (int r = 0; r < ROWS; ++r) sum[r][v] = start;
  }

  const char* w = static_cast<const char*>(tile.w);
  const char* wanted = tile.wanted;
  for (int32_t c = 0; c < tile.chunk_count; ++c) {
    const char* x = static_cast<const char*>(tile.x) + static_cast<size_t>(tile.chunks[c]) * (ROWS * words * 4);
    // Jumps from one surviving chunk to the next are nothing that the CPU foresees.
    const char* next = static_cast<const char*>(tile.x) + static_cast<size_t>(tile.chunks[c + 1]) * (ROWS * words * 4);
    LSP_UNROLL
    for (int line = 0; line < ROWS * words * 4; line += 64) __builtin_prefetch(next + line);
    for (int line = 0; line < tile.wanted_lines; ++line) __builtin_prefetch(wanted + line * 64, 0, 2);
    wanted += tile.wanted_lines * 64;
    for (int first = 0; first < words; first += 4) {
      LSP_UNROLL
      for (int k = first; k < first + 4; ++k) {
        typename Arithmetic::Word b[VECTORS];
        LSP_UNROLL
        for (int v = 0; v < VECTORS; ++v) b[v] = Arithmetic::load(w + (k * columns + v * V::lanes) * 4);
        LSP_UNROLL
        for (int r = 0; r < ROWS; ++r) {
          const typename Arithmetic::Word a = Arithmetic::broadcast(x + (r * words + k) * 4);
          LSP_UNROLL
          for (int v = 0; v < VECTORS; ++v) sum[r][v] = Arithmetic::step(sum[r][v], a, b[v]);
        }
      }
    }
    w += words * columns * 4;
  }

  // The common case goes straight to y. All others take a second pass over a buffer in the first-level cache.
  const bool direct =
      tile.epilogue->activation == LSP_NONE && tile.epilogue->out_type == LSP_FLOAT32 && tile.columns == columns;
  alignas(64) float buffer[ROWS * columns];
  float* out = direct ? static_cast<float*>(tile.y) : buffer;
  const int64_t stride = direct ? tile.stride : columns;
  const float* residual = direct ? tile.residual : nullptr;
  LSP_UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    const typename V::Float scale = V::load(tile.scale + v * V::lanes);
    const typename V::Float bias = V::load(tile.bias + v * V::lanes);
    LSP_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      typename V::Float value = Arithmetic::finish(sum[r][v], scale, bias);
      if (residual != nullptr) value = V::add(value, V::load(residual + r * stride + v * V::lanes));
      V::store(out + r * stride + v * V::lanes, value);
    }
  }
  if (!direct) finish<V>(tile, buffer, columns, ROWS);
}

// Calls multiply_tile for the tile's height, of at most ROWS.
template <class Arithmetic, int VECTORS, int... ROWS_BEFORE>
void multiply_any_height(const Tile& tile, int rows, std::integer_sequence<int, ROWS_BEFORE...>) {
  static constexpr void (*by_height[])(const Tile&) = {multiply_tile<Arithmetic, ROWS_BEFORE + 1, VECTORS>...};
  by_height[rows - 1](tile);
}

template <class Arithmetic, int ROWS, int VECTORS>
void multiply_rows(const Tile& tile, int rows) {
  multiply_any_height<Arithmetic, VECTORS>(tile, rows, std::make_integer_sequence<int, ROWS>());
}

}  // namespace lsp
