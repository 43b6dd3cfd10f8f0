// int8 with AVX512_VNNI: four multiplications and additions a lane and instruction.
#include "linear/arithmetic.h"
#include "linear/kernels.h"
#include "linear/microkernel.h"
#include "linear/pack_rows.h"
#include "linear/words_x86.h"
#include "vector/avx512.h"

namespace lsp {
namespace {

using V = Avx512Vector;

struct DotArithmetic : IntegerArithmetic<V, 4> {
  // GCC 12 copies sums to and fro, and to memory, around the intrinsic; an operand that is read and written it leaves.
  static Sum step(Sum sum, Word a, Word b) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
};

constexpr Shape kWide = {32, 14, 1.0}, kNarrow = {16, 28, 1.15};

void multiply(const Tile& tile, int columns, int rows) {
  if (columns == kWide.columns) return multiply_rows<DotArithmetic, kWide.rows, 2>(tile, rows);
  multiply_rows<DotArithmetic, kNarrow.rows, 1>(tile, rows);
}

}  // namespace

const Kernel kAvx512VnniInt8 = {"avx512_vnni",
                                Isa::avx512_vnni,
                                LSP_INT8,
                                4,
                                BiasedInt8Words::bias,
                                {kWide, kNarrow},
                                pack_int8<V, BiasedInt8Words>,
                                multiply};

}  // namespace lsp
