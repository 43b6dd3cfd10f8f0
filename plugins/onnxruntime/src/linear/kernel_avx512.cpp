// Kernels for AVX-512 as of Skylake-X: 512-bit FMA, and int8 as pairs of int16.
#include "linear/arithmetic.h"
#include "linear/kernels.h"
#include "linear/microkernel.h"
#include "linear/pack_rows.h"
#include "linear/words_x86.h"
#include "vector/avx512.h"

namespace lsp {
namespace {

using V = Avx512Vector;

// The sum stays in its register as in kernel_avx512_vnni.cpp.
struct Int16Arithmetic : IntegerArithmetic<V, 2> {
  static Sum step(Sum sum, Word a, Word b) {
    const Word product = _mm512_madd_epi16(a, b);
    asm("vpaddd %1, %0, %0" : "+v"(sum) : "v"(product));
    return sum;
  }
};

// Of the 32 registers, 28 hold sums. Panels of 16 columns spend one load on each multiplication.
constexpr Shape kWide = {32, 14, 1.0}, kNarrow = {16, 28, 1.15};
// vpmaddwd needs a register for its product.
constexpr Shape kWideInt8 = {32, 13, 1.0}, kNarrowInt8 = {16, 26, 1.15};

void multiply_float(const Tile& tile, int columns, int rows) {
  if (columns == kWide.columns) return multiply_rows<FloatArithmetic<V>, kWide.rows, 2>(tile, rows);
  multiply_rows<FloatArithmetic<V>, kNarrow.rows, 1>(tile, rows);
}

void multiply_int8(const Tile& tile, int columns, int rows) {
  if (columns == kWideInt8.columns) return multiply_rows<Int16Arithmetic, kWideInt8.rows, 2>(tile, rows);
  multiply_rows<Int16Arithmetic, kNarrowInt8.rows, 1>(tile, rows);
}

}  // namespace

const Kernel kAvx512Float = {"avx512", Isa::avx512, LSP_FLOAT32, 1, 0, {kWide, kNarrow}, pack_float<V>, multiply_float};
const Kernel kAvx512Bfloat16 = {"avx512", Isa::avx512,      LSP_BFLOAT16,    1,
                                0,        {kWide, kNarrow}, pack_rounded<V>, multiply_float};
const Kernel kAvx512Int8 = {
    "avx512", Isa::avx512, LSP_INT8, 2, 0, {kWideInt8, kNarrowInt8}, pack_int8<V, Int16Words>, multiply_int8};

}  // namespace lsp
