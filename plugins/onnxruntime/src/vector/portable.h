// Vectors of four in the compiler's own vector extension, for any CPU.
//
// A vector type V is a struct in an anonymous namespace with `lanes`, the types Float and Int (32 bits) and the static
// functions below. That of every instruction set has the same ones, so that kernels are written once.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct PortableVector {
  static constexpr int lanes = 4;
  typedef float Float __attribute__((vector_size(16)));
  typedef int32_t Int __attribute__((vector_size(16)));

  static Float load(const float* from) {
    Float value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  static Float load_part(const float* from, int count) {
    Float value = {};
    std::memcpy(&value, from, sizeof(float) * static_cast<size_t>(count));
    return value;
  }
  static void store(float* to, Float value) { std::memcpy(to, &value, sizeof value); }
  static void store_part(float* to, Float value, int count) {
    std::memcpy(to, &value, sizeof(float) * static_cast<size_t>(count));
  }
  static Float broadcast(float value) { return Float{value, value, value, value}; }
  static Float add(Float a, Float b) { return a + b; }
  static Float sub(Float a, Float b) { return a - b; }
  static Float mul(Float a, Float b) { return a * b; }
  static Float div(Float a, Float b) { return a / b; }
  static Float fma(Float a, Float b, Float c) { return a * b + c; }
  // Of a number and a NaN, the number, if the NaN comes first.
  static Float min(Float a, Float b) { return a < b ? a : b; }
  static Float max(Float a, Float b) { return a > b ? a : b; }
  // The smaller of |a| and limit.
  static Float min_abs(Float a, Float limit) { return min(max(a, -a), limit); }

  static Int load_int(const int32_t* from) {
    Int value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  static Int broadcast_int(int32_t value) { return Int{value, value, value, value}; }
  static Float to_float(Int value) { return __builtin_convertvector(value, Float); }
  // To the nearest integer, even in the middle, for numbers well within int32.
  static Int round(Float value) {
    const Float shift = broadcast(12582912.0F);  // 1.5 * 2^23: the sum has no bits left for a fraction
    return __builtin_convertvector((value + shift) - shift, Int);
  }
  // To the nearest bfloat16, even in the middle; NaN stays NaN.
  static Float round_to_bfloat16(Float value) {
    Int bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & -65536;
    Float rounded;
    std::memcpy(&rounded, &bits, sizeof bits);
    return value == value ? rounded : value;
  }
  static void store_int8(int8_t* to, Int value) { store_int8_part(to, value, lanes); }
  static void store_int8_part(int8_t* to, Int value, int count) {
    for (int i = 0; i < count; ++i) to[i] = static_cast<int8_t>(value[i]);
  }
};

}  // namespace
