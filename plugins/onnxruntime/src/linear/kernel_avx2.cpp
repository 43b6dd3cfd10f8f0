// Kernels for AVX2 and FMA: 256-bit FMA, and int8 as pairs of int16.
#include "linear/arithmetic.h"
#include "linear/kernels.h"
#include "linear/microkernel.h"
#include "linear/pack_rows.h"
#include "linear/words_x86.h"
#include "vector/avx2.h"

namespace lsp {
namespace {

using V = Avx2Vector;

// The sum stays in its register as in kernel_avx512_vnni.cpp.
struct Int16Arithmetic : IntegerArithmetic<V, 2> {
  static Sum step(Sum sum, Word a, Word b) {
    const Word product = _mm256_madd_epi16(a, b);
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(product));
    return sum;
  }
};

// Of the 16 registers, 12 hold sums; vpmaddwd needs one for its product.
constexpr Shape kFloat = {16, 6, 1.0};
constexpr Shape kInt8 = {16, 5, 1.0};

void multiply_float(const Tile& tile, int, int rows) { multiply_rows<FloatArithmetic<V>, kFloat.rows, 2>(tile, rows); }
void multiply_int8(const Tile& tile, int, int rows) { multiply_rows<Int16Arithmetic, kInt8.rows, 2>(tile, rows); }

}  // namespace

const Kernel kAvx2Float = {"avx2", Isa::avx2, LSP_FLOAT32, 1, 0, {kFloat}, pack_float<V>, multiply_float};
const Kernel kAvx2Bfloat16 = {"avx2", Isa::avx2, LSP_BFLOAT16, 1, 0, {kFloat}, pack_rounded<V>, multiply_float};
const Kernel kAvx2Int8 = {"avx2", Isa::avx2, LSP_INT8, 2, 0, {kInt8}, pack_int8<V, Int16Words>, multiply_int8};

}  // namespace lsp
