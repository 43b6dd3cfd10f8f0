// The machine is this CPU: src/machine_ptx.h on threads that take turns, for tests without a GPU. Made to find
// mistakes: copies land as late as the waits allow, their target holds garbage until then, warps run as far apart as
// the barriers allow, in random order, and the fragments of ldmatrix and mma.sync are laid out here anew, from the PTX
// manual.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../src/types.h"

#define LSP_DEVICE inline
#define LSP_KERNEL(threads, blocks) inline void
#define LSP_ARGUMENTS(name) const Arguments name

namespace lsp_cuda {

// What a lane brings to an operation of its whole warp.
struct Lane {
  enum Operation { LOAD_MATRICES, MULTIPLY_FLOAT16, MULTIPLY_BFLOAT16, MULTIPLY_INT8 } operation;
  uint32_t address;  // of load_matrices
  const uint32_t* a;
  uint32_t b[2];
  void* result;  // four words
};

// Implemented by the scheduler in emulate.cpp, for the thread that runs.
int thread();
int block();
int grid();
void barrier();
void with_warp(const Lane& lane);
uint8_t* shared(uint32_t address, int bytes);
void copy_async(uint32_t to, const void* from, int bytes);
void copy_async_commit();
void copy_async_wait(int pending);
template <int PENDING>
void copy_async_wait() {
  copy_async_wait(PENDING);
}

inline uint32_t shared_memory() { return 0; }
template <class V>
V load(const V* from) {
  return *from;
}

inline void store_shared(uint32_t to, uint32_t v) { std::memcpy(shared(to, 4), &v, 4); }
inline void store_shared(uint32_t to, const uint32_t (&v)[4]) { std::memcpy(shared(to, 16), v, 16); }
inline uint32_t load_shared(uint32_t from) {
  uint32_t v;
  std::memcpy(&v, shared(from, 4), 4);
  return v;
}
inline void load_shared(uint32_t (&v)[4], uint32_t from) { std::memcpy(v, shared(from, 16), 16); }

inline void load_matrices(uint32_t (&v)[4], uint32_t row) { with_warp({Lane::LOAD_MATRICES, row, nullptr, {}, v}); }
inline void multiply_add(Float16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  with_warp({Lane::MULTIPLY_FLOAT16, 0, a, {b0, b1}, c});
}
inline void multiply_add(BFloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  with_warp({Lane::MULTIPLY_BFLOAT16, 0, a, {b0, b1}, c});
}
inline void multiply_add(Int8, int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  with_warp({Lane::MULTIPLY_INT8, 0, a, {b0, b1}, c});
}

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline uint32_t to_bits(float v) { return bits_as<uint32_t>(v); }
inline uint32_t to_bits(int32_t v) { return static_cast<uint32_t>(v); }
inline void add_bits(float& sum, uint32_t v) { sum += bits_as<float>(v); }
inline void add_bits(int32_t& sum, uint32_t v) { sum += static_cast<int32_t>(v); }

inline float power_of_two(float v) { return std::exp2(v); }
inline float reciprocal(float v) { return 1 / v; }
inline float multiplied_added(float a, float b, float c) { return std::fma(a, b, c); }
inline int rounded(float v) { return v != v ? 0 : static_cast<int>(std::nearbyint(std::min(std::max(v, -2e9f), 2e9f))); }

// 16-bit floats, rounded to nearest even.
inline uint16_t half_bits(BFloat16, float v) {
  const uint32_t bits = bits_as<uint32_t>(v);
  return v != v ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t half_bits(Float16, float v) {
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  v = std::fabs(v);
  if (v != v) return 0x7fff;
  if (v >= 65520.f) return sign | 0x7c00;
  if (v < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(v * 0x1p24f));
  const uint32_t bits = bits_as<uint32_t>(v) - (112u << 23);
  return sign | static_cast<uint16_t>((bits + 0xfff + (bits >> 13 & 1)) >> 13);
}
inline float widened(BFloat16, uint16_t v) { return bits_as<float>(static_cast<uint32_t>(v) << 16); }
inline float widened(Float16, uint16_t v) {
  const float sign = v & 0x8000 ? -1.f : 1.f;
  const int exponent = v >> 10 & 31, fraction = v & 1023;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.f + fraction, exponent - 25) : std::ldexp(float(fraction), -24));
}
template <class H>
uint32_t narrowed(H, float low, float high) {
  return half_bits(H(), low) | static_cast<uint32_t>(half_bits(H(), high)) << 16;
}

}  // namespace lsp_cuda
