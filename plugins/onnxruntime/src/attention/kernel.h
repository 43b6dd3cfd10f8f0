// What the driver and the kernels of attention agree on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "lsp_cpu.h"

namespace lsp::attention {

constexpr int kMaxSize = 128;  // of a head

// One run: y = softmax(scale · q kᵀ + bias) v, for each of `batch` × `heads`.
struct Job {
  std::int64_t batch, heads, queries, keys, size;
  float scale;
  lsp_rows q, k, v;
  const float* bias;  // [bias_batches, bias_heads, queries, keys], which repeats along batches and heads, or NULL
  std::int64_t bias_batches, bias_heads;
  float* y;
};

// A kernel works in a workspace of `bytes(job, rows)`: first it packs keys and values of a head into it, then attends to
// them from up to `rows` queries at a time, `row` being the first.
struct Kernel {
  const char* name;
  std::int64_t tile;  // a multiple of this many rows is fastest
  std::size_t (*bytes)(const Job& job, std::int64_t rows);
  void (*pack)(const Job& job, std::int64_t batch, std::int64_t head, float* workspace);
  void (*attend)(const Job& job, std::int64_t batch, std::int64_t head, std::int64_t row, std::int64_t rows,
                 float* workspace);
};

// The kernels of an instruction set: float32; bfloat16, whose operands are rounded to bfloat16.
struct Kernels {
  Isa isa;
  Kernel float32, bfloat16;
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels;
#elif defined(__aarch64__)
extern const Kernels neon_kernels;
#endif

}  // namespace lsp::attention
