// From sums to y, in registers: scale and bias, activation, residual, element type. Each is a pass of its own over the
// registers; what kind it is, is a branch that all threads take alike, outside the pass.
#pragma once

#include "machine.h"

namespace lsp_cuda {

enum Activation { NONE = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };

// x·Φ(x), by Abramowitz and Stegun 7.1.26 for erfc: its error, 1.5e-7, is far below what 16 bits hold. Written so that
// nothing cancels for negative x, and infinity stays infinity.
LSP_DEVICE float gelu(float x) {
  const float scaled = (x < 0 ? -x : x) * 0.70710678f, z = scaled > 10.f ? 10.f : scaled,
              t = reciprocal(1.f + 0.3275911f * z);
  const float erfc = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) *
                     t * power_of_two(z * (-1.44269504f * z));
  return (x > 0 ? x : 0.f) - z * 0.70710678f * erfc;
}

// 0.5·x·(1 + tanh(u)) = x / (1 + exp(-2u)), with exp(-2u) as a power of two. Both limits are where the result is 0 in
// 16 bits; with them, minus infinity becomes no infinity.
LSP_DEVICE float gelu_tanh(float x) {
  const float power = power_of_two(x * (-2.3022082f - 0.10294324f * x * x));
  return (x < -9.f ? -9.f : x) * reciprocal(1.f + (power > 1e30f ? 1e30f : power));
}

LSP_DEVICE int quantized(float v, float reciprocal, float offset) {
  const int q = rounded((v - offset) * reciprocal);
  return q < -128 ? -128 : q > 127 ? 127 : q;
}

struct alignas(16) Float4 {
  float v[4];
};
struct alignas(8) Half4 {
  uint32_t v[2];
};

// Reads four consecutive floats; in ragged rows, those that are there.
template <bool RAGGED>
LSP_DEVICE Float4 load_floats(const float* from, int count) {
  if constexpr (!RAGGED) return *reinterpret_cast<const Float4*>(from);
  Float4 out = {};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < count) out.v[i] = from[i];
  return out;
}

template <bool RAGGED, class R>
LSP_DEVICE void add_residual(R, float (&y)[4], const uint16_t* from, int count) {
  if constexpr (RAGGED) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) y[i] += widened(R(), from[i]);
  } else {
    const Half4 four = *reinterpret_cast<const Half4*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] += widened(R(), static_cast<uint16_t>(four.v[i / 2] >> i % 2 * 16));
  }
}

template <bool RAGGED, class O>
LSP_DEVICE void store_halves(O, const float (&y)[4], uint16_t* to, int count) {
  const Half4 four = {{narrowed(O(), y[0], y[1]), narrowed(O(), y[2], y[3])}};
  if constexpr (RAGGED) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) to[i] = static_cast<uint16_t>(four.v[i / 2] >> i % 2 * 16);
  } else {
    *reinterpret_cast<Half4*>(to) = four;
  }
}

template <bool RAGGED>
LSP_DEVICE void store_int8(const float (&y)[4], int8_t* to, int count, float reciprocal, float offset) {
  uint32_t four = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) four |= (static_cast<uint32_t>(quantized(y[i], reciprocal, offset)) & 255) << i * 8;
  if constexpr (RAGGED) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) to[i] = static_cast<int8_t>(four >> i * 8 & 255);
  } else {
    *reinterpret_cast<uint32_t*>(to) = four;
  }
}

// Writes a warp's part of a tile. A thread has, for each 16 rows and each group, two rows of four columns.
template <class Tile>
LSP_DEVICE void write_tile(const Arguments& a, const int32_t* groups, int row0,
                           const typename Tile::Accumulator (&sums)[Tile::M_TILES][2 * Tile::WARP_GROUPS][4]) {
  constexpr int M_TILES = Tile::M_TILES, GROUPS = Tile::WARP_GROUPS;
  constexpr bool RAGGED = Tile::RAGGED, FLOAT16 = Tile::T::TYPE != BFloat16::TYPE,
                 BFLOAT16 = Tile::T::TYPE != Float16::TYPE;
  const int lane = thread() % 32;
  float y[M_TILES][GROUPS][2][4];
  int columns[GROUPS];

#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    const int group = load(groups + g);
    columns[g] = group < 0 ? a.N : group * GROUP + accumulator_column(lane);
    Float4 bias = {}, scale = {};
    if (columns[g] < a.N) {
      bias = load_floats<RAGGED>(a.bias + columns[g], a.N - columns[g]);
      if constexpr (Tile::T::TYPE == Int8::TYPE) scale = load_floats<RAGGED>(a.scale + columns[g], a.N - columns[g]);
    }
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const auto sum = sums[m][2 * g + i % 4 / 2][i / 4 * 2 + i % 2];
        if constexpr (Tile::T::TYPE == Int8::TYPE)
          y[m][g][i / 4][i % 4] = multiplied_added(static_cast<float>(sum), scale.v[i % 4], bias.v[i % 4]);
        else
          y[m][g][i / 4][i % 4] = sum + bias.v[i % 4];
      }
  }

  const auto each_value = [&](auto&& function) {
#pragma unroll
    for (int i = 0; i < M_TILES * GROUPS * 8; ++i) {
      float& value = y[i / 8 / GROUPS][i / 8 % GROUPS][i / 4 % 2][i % 4];
      value = function(value);
    }
  };
  if (a.activation == GELU) each_value([](float v) { return gelu(v); });
  if (a.activation == GELU_TANH) each_value([](float v) { return gelu_tanh(v); });
  if (a.activation == RELU) each_value([](float v) { return v < 0 ? 0.f : v; });

  // Four values at a time, so that no address lives longer than its store.
  const auto* residual = static_cast<const uint16_t*>(a.residual);
#pragma unroll
  for (int i = 0; i < M_TILES * GROUPS * 2; ++i) {
    const int g = i / 2 % GROUPS, row = row0 + i / 2 / GROUPS * 16 + accumulator_row(lane, i % 2),
              count = a.N - columns[g];
    if (row >= a.M || count <= 0) continue;
    float (&four)[4] = y[i / 2 / GROUPS][g][i % 2];
    const int64_t at = static_cast<int64_t>(row) * a.N + columns[g];
    if (FLOAT16 && a.residual_type == Float16::TYPE) add_residual<RAGGED>(Float16(), four, residual + at, count);
    if (BFLOAT16 && a.residual_type == BFloat16::TYPE) add_residual<RAGGED>(BFloat16(), four, residual + at, count);
    if (FLOAT16 && a.out_type == Float16::TYPE)
      store_halves<RAGGED>(Float16(), four, static_cast<uint16_t*>(a.y) + at, count);
    if (BFLOAT16 && a.out_type == BFloat16::TYPE)
      store_halves<RAGGED>(BFloat16(), four, static_cast<uint16_t*>(a.y) + at, count);
    if (a.out_type == Int8::TYPE)
      store_int8<RAGGED>(four, static_cast<int8_t*>(a.y) + at, count, a.out_reciprocal, a.out_offset);
  }
}

}  // namespace lsp_cuda
