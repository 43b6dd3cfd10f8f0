// Kernels for any AArch64 CPU.
#include "linear/arithmetic.h"
#include "linear/kernels.h"
#include "linear/microkernel.h"
#include "linear/pack_rows.h"
#include "vector/neon.h"

namespace lsp {
namespace {

using V = NeonVector;

struct Int32Arithmetic : IntegerArithmetic<V, 1> {
  static Sum step(Sum sum, Word a, Word b) { return vmlaq_s32(sum, a, b); }
};

struct Int32Words {
  static constexpr int group = 1;
  static void put(const int8_t* x, char* packed) {
    int32_t* words = reinterpret_cast<int32_t*>(packed);
    for (int i = 0; i < kChunk; i += 8) {
      const int16x8_t halves = vmovl_s8(vld1_s8(x + i));
      vst1q_s32(words + i, vmovl_s16(vget_low_s16(halves)));
      vst1q_s32(words + i + 4, vmovl_s16(vget_high_s16(halves)));
    }
  }
};

constexpr Shape kShape = {16, 6, 1.0};

void multiply_float(const Tile& tile, int, int rows) { multiply_rows<FloatArithmetic<V>, kShape.rows, 4>(tile, rows); }
void multiply_int8(const Tile& tile, int, int rows) { multiply_rows<Int32Arithmetic, kShape.rows, 4>(tile, rows); }

}  // namespace

const Kernel kNeonFloat = {"neon", Isa::neon, LSP_FLOAT32, 1, 0, {kShape}, pack_float<V>, multiply_float};
const Kernel kNeonBfloat16 = {"neon", Isa::neon, LSP_BFLOAT16, 1, 0, {kShape}, pack_rounded<V>, multiply_float};
const Kernel kNeonInt8 = {"neon", Isa::neon, LSP_INT8, 1, 0, {kShape}, pack_int8<V, Int32Words>, multiply_int8};

}  // namespace lsp
