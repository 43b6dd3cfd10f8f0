namespace {
constexpr int kWidth = 16, kVectors = 4;
}
#include "attention/kernel_template.h"

const lsp::attention::Kernels lsp::attention::avx512_kernels = {
    Isa::avx512,
    make_kernel<FloatCells<false>>("avx512 float32"),
    make_kernel<FloatCells<true>>("avx512 float32, rounded to bfloat16"),
};
