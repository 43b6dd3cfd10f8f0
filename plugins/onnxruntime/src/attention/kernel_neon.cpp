namespace {
constexpr int kWidth = 4, kVectors = 4;
}
#include "attention/kernel_template.h"

const lsp::attention::Kernels lsp::attention::neon_kernels = {
    Isa::neon,
    make_kernel<FloatCells<false>>("neon float32"),
    make_kernel<FloatCells<true>>("neon float32, rounded to bfloat16"),
};
