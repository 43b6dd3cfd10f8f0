// One layer, ready to run, and how its work is divided over threads.
#pragma once

#include <cstdint>

#include "linear/kernel.h"
#include "linear/panels.h"
#include "lsp_cpu.h"

namespace lsp {

struct Layer {
  const Kernel* kernel = nullptr;
  Panels panels;
  int64_t K = 0, N = 0;
  lsp_type x_type = LSP_FLOAT32;
  Quantization quantization;
  Epilogue epilogue;
};

// y = the layer's output for M rows of x. Returns false if there is not enough memory.
bool run_layer(const Layer& layer, int64_t M, const void* x, const float* residual, void* y, const lsp_pool* pool);

}  // namespace lsp
