// Where every byte lies: packed weights (bsl16.v1), the ring in shared memory, and the accumulators of mma.sync.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LSP_BOTH __host__ __device__ __forceinline__
#else
#define LSP_BOTH inline
#endif

namespace lsp_cuda {

constexpr int SLICE_BYTES = 32;       // of K: one mma.sync step, 16 rows of 16-bit weights or 32 of int8
constexpr int CHUNK_BYTES = 16;       // what one cp.async moves
constexpr int GROUP = 16;             // columns of a sub-block: two n-tiles of mma.sync
constexpr int SUB_BLOCK_BYTES = 512;  // a slice of a group, in the order of B fragments: 16 bytes a lane

// A tile of x in shared memory is rows of 4 or 8 chunks. The XOR spreads the 8 rows that one phase of ldmatrix reads,
// and the 8 chunks that one phase of cp.async writes, over all banks.
template <int CHUNKS>
LSP_BOTH int swizzled(int row, int chunk) {
  static_assert(CHUNKS == 4 || CHUNKS == 8, "rows of 64 or 128 bytes");
  return CHUNKS == 4 ? chunk ^ ((row >> 1) & 3) : chunk ^ (row & 7);
}

// Row of ldmatrix.x4 whose address a lane gives, and the chunk of the slice: matrices 0 to 3 become a0 to a3.
LSP_BOTH int fragment_row(int lane) { return lane & 15; }
LSP_BOTH int fragment_chunk(int lane) { return lane >> 4; }

// Accumulators 2h and 2h + 1 of both n-tiles of a group are one row's four consecutive columns, thanks to the order of
// columns in a sub-block.
LSP_BOTH int accumulator_row(int lane, int half) { return (lane >> 2) + 8 * half; }
LSP_BOTH int accumulator_column(int lane) { return 4 * (lane & 3); }

// The word of a slice in a tactic's table: which slice of K, and which of the tile's groups have a sub-block there.
LSP_BOTH uint32_t slice_word(uint32_t slice, uint32_t mask) { return slice | mask << 24; }
LSP_BOTH uint32_t slice_of(uint32_t word) { return word & 0xffffff; }
LSP_BOTH uint32_t mask_of(uint32_t word) { return word >> 24; }

struct Span {
  int32_t first, last;  // steps
};

}  // namespace lsp_cuda
