// Vectors of 8 for AVX2 and FMA. See vector/portable.h for what the functions do.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Avx2Vector {
  static constexpr int lanes = 8;
  using Float = __m256;
  using Int = __m256i;

  static Int first(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  static Float load(const float* from) { return _mm256_loadu_ps(from); }
  static Float load_part(const float* from, int count) { return _mm256_maskload_ps(from, first(count)); }
  static void store(float* to, Float value) { _mm256_storeu_ps(to, value); }
  static void store_part(float* to, Float value, int count) { _mm256_maskstore_ps(to, first(count), value); }
  static Float broadcast(float value) { return _mm256_set1_ps(value); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float min_abs(Float a, Float limit) { return min(_mm256_andnot_ps(broadcast(-0.0F), a), limit); }

  static Int load_int(const int32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static Int broadcast_int(int32_t value) { return _mm256_set1_epi32(value); }
  static Float to_float(Int value) { return _mm256_cvtepi32_ps(value); }
  static Int round(Float value) { return _mm256_cvtps_epi32(value); }
  static Float round_to_bfloat16(Float value) {
    const Int bits = _mm256_castps_si256(value);
    const Int odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), broadcast_int(1));
    const Int sum = _mm256_add_epi32(_mm256_add_epi32(bits, broadcast_int(0x7fff)), odd);
    const Float rounded = _mm256_castsi256_ps(_mm256_and_si256(sum, broadcast_int(-65536)));
    return _mm256_blendv_ps(value, rounded, _mm256_cmp_ps(value, value, _CMP_ORD_Q));
  }
  static __m128i narrow(Int value) {
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
    return _mm_packs_epi16(halves, halves);
  }
  static void store_int8(int8_t* to, Int value) { _mm_storel_epi64(reinterpret_cast<__m128i*>(to), narrow(value)); }
  static void store_int8_part(int8_t* to, Int value, int count) {
    alignas(16) int8_t bytes[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(bytes), narrow(value));
    for (int i = 0; i < count; ++i) to[i] = bytes[i];
  }
};

}  // namespace
