// int8 with the dot products of ARMv8.2, such as the CPUs of Jetson Orin have.
#include "linear/arithmetic.h"
#include "linear/kernels.h"
#include "linear/microkernel.h"
#include "linear/pack_rows.h"
#include "vector/neon.h"

namespace lsp {
namespace {

using V = NeonVector;

struct DotArithmetic : IntegerArithmetic<V, 4> {
  static Sum step(Sum sum, Word a, Word b) { return vdotq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b)); }
};

struct Int8Words {
  static constexpr int group = 4;
  static void put(const int8_t* x, char* packed) { vst1q_s8(reinterpret_cast<int8_t*>(packed), vld1q_s8(x)); }
};

constexpr Shape kShape = {16, 6, 1.0};

void multiply(const Tile& tile, int, int rows) { multiply_rows<DotArithmetic, kShape.rows, 4>(tile, rows); }

}  // namespace

const Kernel kNeonDotInt8 = {"neon_dot", Isa::neon_dot, LSP_INT8, 4, 0, {kShape}, pack_int8<V, Int8Words>, multiply};

}  // namespace lsp
