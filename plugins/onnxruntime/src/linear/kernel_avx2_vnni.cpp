// int8 with AVX-VNNI, on CPUs that have it in 256 bits (Alder Lake and later, Zen 5).
#include "linear/arithmetic.h"
#include "linear/kernels.h"
#include "linear/microkernel.h"
#include "linear/pack_rows.h"
#include "linear/words_x86.h"
#include "vector/avx2.h"

namespace lsp {
namespace {

using V = Avx2Vector;

struct DotArithmetic : IntegerArithmetic<V, 4> {
  // As in kernel_avx512_vnni.cpp. Without {vex} the assembler would take AVX-512's encoding where it may.
  static Sum step(Sum sum, Word a, Word b) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    return sum;
  }
};

constexpr Shape kShape = {16, 6, 1.0};

void multiply(const Tile& tile, int, int rows) { multiply_rows<DotArithmetic, kShape.rows, 2>(tile, rows); }

}  // namespace

const Kernel kAvx2VnniInt8 = {
    "avx2_vnni", Isa::avx2_vnni, LSP_INT8, 4, BiasedInt8Words::bias, {kShape}, pack_int8<V, BiasedInt8Words>, multiply};

}  // namespace lsp
