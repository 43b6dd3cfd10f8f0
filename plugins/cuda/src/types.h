// Element types as the kernels see them, and the sizes of a tile.
#pragma once

#include "layout.h"

namespace lsp_cuda {

struct Float16 {
  using Accumulator = float;
  static constexpr int TYPE = 10, BYTES = 2;
};
struct BFloat16 {
  using Accumulator = float;
  static constexpr int TYPE = 16, BYTES = 2;
};
struct Int8 {
  using Accumulator = int32_t;
  static constexpr int TYPE = 3, BYTES = 1;
};

// What one thread block computes at a time: M rows by N columns, in steps of K_BYTES of K that pass through a ring of
// STAGES. Warps share M, N, and the slices of a step (then their sums are added at the end). RAGGED: rows of x are not
// whole chunks, or rows of y not whole vectors of four.
template <class T_, int M_, int N_, int WARPS_M_, int WARPS_N_, int WARPS_K_, int K_BYTES_, int STAGES_,
          bool RAGGED_ = false>
struct Tile {
  using T = T_;
  using Accumulator = typename T::Accumulator;
  static constexpr int M = M_, N = N_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, WARPS_K = WARPS_K_, STAGES = STAGES_;
  static constexpr bool RAGGED = RAGGED_;
  static constexpr int WARPS = WARPS_M * WARPS_N * WARPS_K, THREADS = 32 * WARPS;
  static constexpr int K_BYTES = K_BYTES_, SLICES = K_BYTES / SLICE_BYTES, CHUNKS = K_BYTES / CHUNK_BYTES,
                       GROUPS = N / GROUP;

  static constexpr int WARP_M = M / WARPS_M, WARP_N = N / WARPS_N;           // a warp's part
  static constexpr int M_TILES = WARP_M / 16, WARP_GROUPS = WARP_N / GROUP;  // in units of mma.sync
  static constexpr int ACCUMULATORS = M_TILES * WARP_GROUPS * 8;             // registers a thread

  static constexpr int ROWS_A_PASS = THREADS / CHUNKS, PASSES = M / ROWS_A_PASS;
  static constexpr int SUB_BLOCKS = SLICES * GROUPS, SUB_BLOCKS_A_WARP = SUB_BLOCKS / WARPS;

  static constexpr int X_BYTES = M * K_BYTES, STAGE_BYTES = X_BYTES + SUB_BLOCKS * SUB_BLOCK_BYTES;
  static constexpr int MASKS_AT = STAGES * STAGE_BYTES, PARTIAL_AT = MASKS_AT + STAGES * SLICES * 4;
  static constexpr int SHARED_BYTES = PARTIAL_AT + (WARPS_K - 1) * WARPS_M * WARPS_N * ACCUMULATORS * 128;

  // Thread blocks that a multiprocessor is to have registers for: 128 a thread for large tiles, 96 for small ones.
  // Shared memory lets fewer in almost everywhere.
  static constexpr int BLOCKS = (ACCUMULATORS >= 64 ? 512 : 640) / THREADS;

  static_assert(SHARED_BYTES <= 99 << 10, "every GPU from SM80 on has this much for a thread block");
  static_assert(GROUPS <= 8, "the mask has 8 bits");
  static_assert(M % (16 * WARPS_M) == 0 && N % (GROUP * WARPS_N) == 0 && SLICES % WARPS_K == 0,
                "whole fragments for each warp");
  static_assert(ROWS_A_PASS % 8 == 0, "the swizzle is the same in every pass");
  static_assert(M % ROWS_A_PASS == 0 && SUB_BLOCKS % WARPS == 0, "all threads copy alike");
};

struct Arguments {
  const uint8_t* x;
  const uint8_t* values;
  const float* bias;
  const float* scale;
  const void* residual;
  void* y;
  // The tactic's table: steps of each column tile; its groups, [n_tiles, GROUPS], -1 for none; each step's slices; each
  // slice's sub-blocks, [steps, SLICES, GROUPS], -1 for none.
  const Span* spans;
  const int32_t* groups;
  const uint32_t* slices;
  const int32_t* sub_blocks;
  int M, N, k_bytes;              // k_bytes: of a row of x
  int m_tiles, n_tiles, m_chunk;  // m_chunk: row tiles whose x stays in the L2 cache while all column tiles pass
  int activation, out_type, residual_type;
  float out_reciprocal, out_offset;
};

// One kernel of the library.
struct Kernel {
  const char* name;
  int type, M, slices, groups, slices_a_warp, threads, shared_bytes;  // slices: of a step
  bool ragged;
  void (*function)(Arguments);
};

struct Kernels {
  const Kernel* first;
  int count;
};
Kernels float16_kernels();
Kernels bfloat16_kernels();
Kernels int8_kernels();

}  // namespace lsp_cuda
