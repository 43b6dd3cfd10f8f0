// Vectors of 4 for AArch64. See vector/portable.h for what the functions do.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace {

struct NeonVector {
  static constexpr int lanes = 4;
  using Float = float32x4_t;
  using Int = int32x4_t;

  static Float load(const float* from) { return vld1q_f32(from); }
  static Float load_part(const float* from, int count) {
    float values[lanes] = {};
    for (int i = 0; i < count; ++i) values[i] = from[i];
    return load(values);
  }
  static void store(float* to, Float value) { vst1q_f32(to, value); }
  static void store_part(float* to, Float value, int count) {
    float values[lanes];
    store(values, value);
    for (int i = 0; i < count; ++i) to[i] = values[i];
  }
  static Float broadcast(float value) { return vdupq_n_f32(value); }
  static Float add(Float a, Float b) { return vaddq_f32(a, b); }
  static Float sub(Float a, Float b) { return vsubq_f32(a, b); }
  static Float mul(Float a, Float b) { return vmulq_f32(a, b); }
  static Float div(Float a, Float b) { return vdivq_f32(a, b); }
  static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  static Float min(Float a, Float b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static Float max(Float a, Float b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static Float min_abs(Float a, Float limit) { return min(vabsq_f32(a), limit); }

  static Int load_int(const int32_t* from) { return vld1q_s32(from); }
  static Int broadcast_int(int32_t value) { return vdupq_n_s32(value); }
  static Float to_float(Int value) { return vcvtq_f32_s32(value); }
  static Int round(Float value) { return vcvtnq_s32_f32(value); }
  static Float round_to_bfloat16(Float value) {
    const uint32x4_t bits = vreinterpretq_u32_f32(value);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t sum = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    const Float rounded = vreinterpretq_f32_u32(vandq_u32(sum, vdupq_n_u32(0xffff0000)));
    return vbslq_f32(vceqq_f32(value, value), rounded, value);
  }
  static void store_int8(int8_t* to, Int value) { store_int8_part(to, value, lanes); }
  static void store_int8_part(int8_t* to, Int value, int count) {
    const int16x4_t halves = vqmovn_s32(value);
    int8_t bytes[8];
    vst1_s8(bytes, vqmovn_s16(vcombine_s16(halves, halves)));
    for (int i = 0; i < count; ++i) to[i] = bytes[i];
  }
};

}  // namespace
