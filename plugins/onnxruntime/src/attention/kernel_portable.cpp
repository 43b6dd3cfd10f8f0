namespace {
constexpr int kWidth = 4, kVectors = 2;
}
#include "attention/kernel_template.h"

const lsp::attention::Kernels lsp::attention::portable_kernels = {
    Isa::portable,
    make_kernel<FloatCells<false>>("portable float32"),
    make_kernel<FloatCells<true>>("portable float32, rounded to bfloat16"),
};
