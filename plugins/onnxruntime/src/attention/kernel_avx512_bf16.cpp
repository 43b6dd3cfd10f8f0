namespace {
constexpr int kWidth = 16, kVectors = 4;
}
#include "attention/kernel_template.h"

namespace {

// Cells of two bfloat16, which one instruction multiplies and sums in float32.
struct Bfloat16Cells {
  static constexpr int64_t depth = 2;
  static constexpr bool are_floats = false;

  static Vector along(const float* row, int64_t first, int64_t size) {
    const int64_t at = depth * first;
    return pairs(load_partial(row + at, size - at), load_partial(row + at + kWidth, size - at - kWidth));
  }
  static Vector across(Vector first, Vector second) {
    alignas(64) static constexpr std::uint16_t kAlternating[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,
                                                                   21, 6, 22, 7, 23, 8,  24, 9,  25, 10, 26,
                                                                   11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_load_si512(kAlternating);
    return reinterpret_cast<Vector>(
        _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(pairs(first, second))));
  }
  static Vector multiply_add(Vector sum, float cell, Vector cells) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_ps(cell)), reinterpret_cast<__m512bh>(cells));
  }

 private:
  // The values of two vectors, one after the other.
  static Vector pairs(Vector low, Vector high) {
    return reinterpret_cast<Vector>(_mm512_cvtne2ps_pbh(high, low));
  }
};

}  // namespace

const lsp::attention::Kernels lsp::attention::avx512_bf16_kernels = {
    Isa::avx512_bf16,
    make_kernel<FloatCells<false>>("avx512 float32"),
    make_kernel<Bfloat16Cells>("avx512_bf16"),
};
