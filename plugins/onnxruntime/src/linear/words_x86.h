// How 16 values of int8 are stored as words for x86 kernels. For files compiled for AVX2 or more.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

// Pairs of int16, for vpmaddwd: exact, where vpmaddubsw would saturate.
struct Int16Words {
  static constexpr int group = 2;
  static void put(const int8_t* x, char* packed) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed), _mm256_cvtepi8_epi16(bytes));
  }
};

// Four unsigned bytes, x + 128: vpdpbusd multiplies unsigned by signed.
struct BiasedInt8Words {
  static constexpr int group = 4;
  static constexpr int bias = 128;
  static void put(const int8_t* x, char* packed) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    const __m128i biased = _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(bias)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), biased);
  }
};

}  // namespace
