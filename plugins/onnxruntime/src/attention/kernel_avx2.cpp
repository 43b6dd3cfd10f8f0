namespace {
constexpr int kWidth = 8, kVectors = 2;
}
#include "attention/kernel_template.h"

const lsp::attention::Kernels lsp::attention::avx2_kernels = {
    Isa::avx2,
    make_kernel<FloatCells<false>>("avx2 float32"),
    make_kernel<FloatCells<true>>("avx2 float32, rounded to bfloat16"),
};
