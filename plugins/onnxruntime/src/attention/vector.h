// Vectors of kWidth floats, in the vector language that GCC and Clang share. Whoever includes this defines kWidth before,
// in an unnamed namespace: every file is compiled for another instruction set and must keep its code to itself.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

typedef float Vector __attribute__((vector_size(kWidth * 4)));
typedef std::int32_t Integers __attribute__((vector_size(kWidth * 4)));
typedef std::uint32_t Bits __attribute__((vector_size(kWidth * 4)));
typedef float Unaligned __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vector x) { *reinterpret_cast<Unaligned*>(to) = x; }
inline Vector splat(float x) { return x - Vector{}; }
inline Bits bits(Vector x) { return reinterpret_cast<Bits>(x); }
inline Vector floats(Bits x) { return reinterpret_cast<Vector>(x); }

// The first `count` floats, zeros behind them; `count` may be negative, or more than there is room for.
inline Vector load_partial(const float* from, std::int64_t count) {
  if (count >= kWidth) return load(from);
  float values[kWidth] = {};
  for (std::int64_t i = 0; i < count; ++i) values[i] = from[i];
  return load(values);
}

inline void store_partial(float* to, Vector x, std::int64_t count) {
  if (count >= kWidth) return store(to, x);
  for (std::int64_t i = 0; i < count; ++i) to[i] = x[i];
}

inline Integers lane_numbers() {
  Integers lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = i;
  return lanes;
}

// The larger of each pair of lanes; b where either is no number. GCC does not find the instruction if a is constant.
inline Vector larger(Vector a, Vector b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, a, b);  // not _mm512_max_ps, which GCC 12 warns of (its bug 105593)
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// Half of the lanes of `low` and `high`, alternating: the first half, or the second.
template <bool second, int... lane>
inline Vector interleaved(Vector low, Vector high, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(low, high, (lane / 2 + (second ? kWidth / 2 : 0) + (lane % 2) * kWidth)...);
}

using Lanes = std::make_integer_sequence<int, kWidth>;

// Rows become columns: interleaving the two halves of the rows log2(kWidth) times.
inline void transpose(Vector (&rows)[kWidth]) {
#pragma GCC unroll 4
  for (int step = 1; step < kWidth; step *= 2) {
    Vector mixed[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth / 2; ++i) {
      mixed[2 * i] = interleaved<false>(rows[i], rows[i + kWidth / 2], Lanes{});
      mixed[2 * i + 1] = interleaved<true>(rows[i], rows[i + kWidth / 2], Lanes{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) rows[i] = mixed[i];
  }
}

template <int distance, int... lane>
inline Vector shifted(Vector x, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(x, x, ((lane + distance) % kWidth)...);
}

// Folds the upper half of the lanes onto the lower half until one is left.
template <int distance = kWidth / 2, class Fold>
inline float reduce(Vector x, Fold fold) {
  x = fold(x, shifted<distance>(x, Lanes{}));
  if constexpr (distance > 1) {
    return reduce<distance / 2>(x, fold);
  } else {
    return x[0];
  }
}

// 2^x for x ≤ 0, 0 for x ≤ -127, to 2.2e-7 of the result; what is no number stays none.
inline Vector exp2_of_negative(Vector x) {
  // Adding 1.5 · 2^23 rounds to a whole number, whose lowest bits are then the lowest bits; 127 is the exponent of one.
  const Vector shift = splat(12582912.0f + 127.0f);
  x = larger(splat(-127.0f), x);
  const Vector shifted_x = x + shift;
  const Vector r = x - (shifted_x - shift);
  // The polynomial of degree 5 that is nearest to 2^r on [-1/2, 1/2], relatively (Remez).
  Vector p = splat(0.0013276472454890609f);
  p = p * r + splat(0.009675540961325169f);
  p = p * r + splat(0.05550713092088699f);
  p = p * r + splat(0.24022120237350464f);
  p = p * r + splat(0.6931469440460205f);
  p = p * r + splat(1.0000001192092896f);
  return p * floats(bits(shifted_x) << 23);
}

// Rounded to bfloat16, nearest even; what is no number stays none.
inline Vector rounded_to_bfloat16(Vector x) {
  const Bits even = (bits(x) >> 16) & 1;
  const Bits rounded = (bits(x) + 0x7fff + even) & 0xffff0000;
  return x == x ? floats(rounded) : x;
}

}  // namespace
