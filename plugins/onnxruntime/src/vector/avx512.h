// Vectors of 16 for AVX-512 F, BW, DQ and VL. See vector/portable.h for what the functions do.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Avx512Vector {
  static constexpr int lanes = 16;
  using Float = __m512;
  using Int = __m512i;

  static __mmask16 first(int count) { return static_cast<__mmask16>((1U << count) - 1); }

  static Float load(const float* from) { return _mm512_loadu_ps(from); }
  static Float load_part(const float* from, int count) { return _mm512_maskz_loadu_ps(first(count), from); }
  static void store(float* to, Float value) { _mm512_storeu_ps(to, value); }
  static void store_part(float* to, Float value, int count) { _mm512_mask_storeu_ps(to, first(count), value); }
  static Float broadcast(float value) { return _mm512_set1_ps(value); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  // One instruction: 2 for the smaller absolute value, 8 for its sign cleared.
  static Float min_abs(Float a, Float limit) { return _mm512_range_ps(a, limit, 2 + 8); }

  static Int load_int(const int32_t* from) { return _mm512_loadu_si512(from); }
  static Int broadcast_int(int32_t value) { return _mm512_set1_epi32(value); }
  static Float to_float(Int value) { return _mm512_cvtepi32_ps(value); }
  static Int round(Float value) { return _mm512_cvtps_epi32(value); }
  static Float round_to_bfloat16(Float value) {
    const Int bits = _mm512_castps_si512(value);
    const Int odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), broadcast_int(1));
    const Int sum = _mm512_add_epi32(_mm512_add_epi32(bits, broadcast_int(0x7fff)), odd);
    const Float rounded = _mm512_castsi512_ps(_mm512_and_si512(sum, broadcast_int(-65536)));
    return _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q), rounded);
  }
  static void store_int8(int8_t* to, Int value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(value));
  }
  static void store_int8_part(int8_t* to, Int value, int count) {
    _mm512_mask_cvtepi32_storeu_epi8(to, first(count), value);
  }
};

}  // namespace
