// What follows from sizes and mask, on the host: which sub-blocks `values` has, and each tactic's table.
#pragma once

#include <string>
#include <vector>

#include "lsp_cuda.h"
#include "types.h"

namespace lsp_cuda {

// The table of one kernel: one array of words, as Arguments points into it. Offsets are in words.
struct Table {
  Kernel kernel;
  std::vector<int32_t> words;
  size_t groups, slices, sub_blocks;  // spans begin at 0
  int n_tiles;
  int64_t loaded, multiplied;  // slices of x and sub-blocks, of all column tiles
  double density;
};

// What a launch is given besides the plan.
struct Operands {
  int64_t M;
  const void* x;
  const void* values;
  const float* bias;
  const float* scale;
  const void* residual;
  void* y;
  const void* table;
};

}  // namespace lsp_cuda

struct lsp_cuda_plan {
  // Throws std::invalid_argument with what is wrong with the description.
  explicit lsp_cuda_plan(const lsp_cuda_desc& desc);

  // The kernel's arguments, but for m_chunk. Throws std::invalid_argument.
  lsp_cuda::Arguments arguments(const lsp_cuda::Table& table, const lsp_cuda::Operands& operands) const;
  // Throws std::invalid_argument.
  const lsp_cuda::Table& tactic(int number) const;

  int64_t K, N, sub_blocks = 0;
  int values_type, activation, out_type, residual_type;
  float out_scale, out_offset;
  std::vector<lsp_cuda::Table> tables;
};

namespace lsp_cuda {

// Runs action, and returns its error as the C API does.
template <class Action>
const char* reported(Action&& action) {
  static thread_local std::string text;
  try {
    action();
    return nullptr;
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
}

}  // namespace lsp_cuda
