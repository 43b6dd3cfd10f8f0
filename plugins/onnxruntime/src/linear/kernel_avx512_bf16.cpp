// bfloat16 with AVX512_BF16: pairs multiplied and added to float32.
#include "linear/arithmetic.h"
#include "linear/kernels.h"
#include "linear/microkernel.h"
#include "linear/pack_rows.h"
#include "vector/avx512.h"

namespace lsp {
namespace {

using V = Avx512Vector;

struct PairArithmetic : FloatArithmetic<V> {
  using Word = __m512i;
  static constexpr int group = 2;

  static Word load(const char* from) { return _mm512_loadu_si512(from); }
  static Word broadcast(const char* from) { return _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(from)); }
  static Sum step(Sum sum, Word a, Word b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};

struct PairWriter {
  static constexpr int group = 2;
  void write(const float* x, char* packed) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x)));
  }
};

constexpr Shape kWide = {32, 14, 1.0}, kNarrow = {16, 28, 1.15};

void pack(const Rows& rows) { pack_chunks<PairWriter, float>(rows, PairWriter()); }

void multiply(const Tile& tile, int columns, int rows) {
  if (columns == kWide.columns) return multiply_rows<PairArithmetic, kWide.rows, 2>(tile, rows);
  multiply_rows<PairArithmetic, kNarrow.rows, 1>(tile, rows);
}

}  // namespace

const Kernel kAvx512Bf16 = {"avx512_bf16", Isa::avx512_bf16, LSP_BFLOAT16, 2, 0, {kWide, kNarrow}, pack, multiply};

}  // namespace lsp
