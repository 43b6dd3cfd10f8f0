// Kernels for any CPU.
#include "linear/arithmetic.h"
#include "linear/kernels.h"
#include "linear/microkernel.h"
#include "linear/pack_rows.h"
#include "vector/portable.h"

namespace lsp {
namespace {

using V = PortableVector;

struct Int32Arithmetic : IntegerArithmetic<V, 1> {
  static Sum step(Sum sum, Word a, Word b) { return sum + a * b; }
};

struct Int32Words {
  static constexpr int group = 1;
  static void put(const int8_t* x, char* packed) {
    int32_t words[kChunk];
    for (int i = 0; i < kChunk; ++i) words[i] = x[i];
    std::memcpy(packed, words, sizeof words);
  }
};

constexpr int kRows = 2;
constexpr int kVectors = 4;
constexpr Shape kShape = {kVectors * V::lanes, kRows, 1.0};

void multiply_float(const Tile& tile, int, int rows) { multiply_rows<FloatArithmetic<V>, kRows, kVectors>(tile, rows); }
void multiply_int8(const Tile& tile, int, int rows) { multiply_rows<Int32Arithmetic, kRows, kVectors>(tile, rows); }

}  // namespace

const Kernel kPortableFloat = {"portable", Isa::portable, LSP_FLOAT32, 1, 0, {kShape}, pack_float<V>, multiply_float};
const Kernel kPortableBfloat16 = {"portable", Isa::portable, LSP_BFLOAT16,    1,
                                  0,          {kShape},      pack_rounded<V>, multiply_float};
const Kernel kPortableInt8 = {"portable",   Isa::portable, LSP_INT8, 1, 0, {kShape}, pack_int8<V, Int32Words>,
                              multiply_int8};

}  // namespace lsp
