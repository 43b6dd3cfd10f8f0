// The kernel: a persistent thread block walks over tiles of y. Its copies run STAGES - 1 steps ahead of its arithmetic,
// also from one tile into the next, so that short columns do not wait for memory.
#pragma once

#include "epilogue.h"
#include "machine.h"

namespace lsp_cuda {

// Which warp of the tile this is, along each dimension.
template <class Tile>
struct Warp {
  int m, n, k;
  LSP_DEVICE Warp() {
    const int warp = thread() / 32;
    m = warp % Tile::WARPS_M;
    n = warp / Tile::WARPS_M % Tile::WARPS_N;
    k = warp / (Tile::WARPS_M * Tile::WARPS_N);
  }
};

struct Place {
  int n_tile, row;
};

// Tiles are numbered by chunks of rows, then column tiles (the table has them by falling work), then rows.
template <class Tile>
LSP_DEVICE Place place_of(const Arguments& a, int tile) {
  const int chunk = tile / (a.m_chunk * a.n_tiles), first = chunk * a.m_chunk;
  const int rows = a.m_tiles - first < a.m_chunk ? a.m_tiles - first : a.m_chunk;
  const int within = tile - first * a.n_tiles;
  return {within / rows, (first + within % rows) * Tile::M};
}

// Fills the ring, one step a call, through all tiles of this thread block.
template <class Tile>
class Loader {
 public:
  LSP_DEVICE Loader(const Arguments& a, uint32_t ring)
      : a_(a), ring_(ring), values_(a.values + thread() % 32 * CHUNK_BYTES), tile_(block()) {
    const int row = thread() / Tile::CHUNKS, chunk = thread() % Tile::CHUNKS;
    chunk_at_ = row * Tile::K_BYTES + swizzled<Tile::CHUNKS>(row, chunk) * CHUNK_BYTES;
    begin_tile();
  }

  // Starts the copies of the next step, if there is one. Each call is one commit, so that waits can count.
  LSP_DEVICE void issue() {
    if (tile_ < a_.m_tiles * a_.n_tiles) {
      copy_x();
      copy_weights();
      if (thread() < Tile::CHUNKS && thread() % 2 == 0)
        store_shared(ring_ + Tile::MASKS_AT + (stage_ * Tile::SLICES + thread() / 2) * 4, mask_of(word_));
      next_step();
    }
    copy_async_commit();
    stage_ = stage_ + 1 == Tile::STAGES ? 0 : stage_ + 1;
  }

 private:
  LSP_DEVICE void begin_tile() {
    if (tile_ >= a_.m_tiles * a_.n_tiles) return;
    const Place place = place_of<Tile>(a_, tile_);
    const Span span = a_.spans[place.n_tile];
    row_ = place.row + thread() / Tile::CHUNKS;
    x_ = a_.x + static_cast<int64_t>(row_) * a_.k_bytes;
    step_ = span.first;
    last_ = span.last;
    fetch();
  }

  LSP_DEVICE void next_step() {
    if (++step_ < last_) {
      fetch();
    } else {
      tile_ += grid();
      begin_tile();
    }
  }

  // Reads the table one step ahead: its latency is not in front of the copies. With the limits of K and N, 32 bits are
  // enough for its words.
  LSP_DEVICE void fetch() {
    const auto step = static_cast<uint32_t>(step_);
    word_ = load(a_.slices + (step * Tile::SLICES + thread() % Tile::CHUNKS / 2));
    const int32_t* sub_blocks = a_.sub_blocks + (step * Tile::SUB_BLOCKS + thread() / 32);
#pragma unroll
    for (int i = 0; i < Tile::SUB_BLOCKS_A_WARP; ++i) sub_blocks_[i] = load(sub_blocks + i * Tile::WARPS);
  }

  // Each thread copies one chunk of several rows. Rows and bytes beyond x become zeros: nothing is read for them.
  LSP_DEVICE void copy_x() {
    if (mask_of(word_) == 0) return;  // fills up the last step: no warp looks at it
    const int k = static_cast<int>(slice_of(word_)) * SLICE_BYTES + thread() % 2 * CHUNK_BYTES;
    const uint8_t* from = x_ + k;
    const uint32_t to = ring_ + stage_ * Tile::STAGE_BYTES + chunk_at_;
#pragma unroll
    for (int i = 0; i < Tile::PASSES; ++i) {
      const bool inside = row_ + i * Tile::ROWS_A_PASS < a_.M && k < a_.k_bytes;
      const uint32_t to_row = to + i * Tile::ROWS_A_PASS * Tile::K_BYTES;
      if constexpr (Tile::RAGGED)
        copy_ragged(to_row, from, inside ? a_.k_bytes - k : 0);
      else
        copy_async(to_row, from, inside ? CHUNK_BYTES : 0);
      from += static_cast<int64_t>(Tile::ROWS_A_PASS) * a_.k_bytes;
    }
  }

  // A chunk that is not aligned or not whole, element by element. Nothing runs in the background here.
  LSP_DEVICE void copy_ragged(uint32_t to, const uint8_t* from, int bytes) {
    constexpr int E = Tile::T::BYTES;
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int b = 0; b < CHUNK_BYTES; b += E) {
      if (b >= bytes) continue;
      uint32_t element;
      if constexpr (E == 2)
        element = load(reinterpret_cast<const uint16_t*>(from + b));
      else
        element = load(from + b);
      words[b / 4] |= element << b % 4 * 8;
    }
    store_shared(to, words);
  }

  LSP_DEVICE void copy_weights() {
    const int warp = thread() / 32, lane = thread() % 32;
    const uint32_t stage = ring_ + stage_ * Tile::STAGE_BYTES + Tile::X_BYTES + lane * CHUNK_BYTES;
#pragma unroll
    for (int i = 0; i < Tile::SUB_BLOCKS_A_WARP; ++i)
      if (sub_blocks_[i] >= 0)
        copy_async(stage + (warp + i * Tile::WARPS) * SUB_BLOCK_BYTES,
                   values_ + static_cast<int64_t>(sub_blocks_[i]) * SUB_BLOCK_BYTES, CHUNK_BYTES);
  }

  const Arguments& a_;
  const uint32_t ring_;
  const uint8_t* const values_;  // this lane's bytes of the first sub-block
  uint32_t chunk_at_;            // where this thread's first chunk is in a stage
  int tile_, step_, last_, stage_ = 0;
  int row_;                                      // this thread's first row of the tile
  const uint8_t* x_;                             // its bytes
  uint32_t word_;                                // this thread's slice of the next step
  int32_t sub_blocks_[Tile::SUB_BLOCKS_A_WARP];  // this warp's
};

// Adds one step, slice by slice. A group is skipped where its sub-block is not there: arithmetic is done for surviving
// sub-blocks only, though x was loaded for all groups of the tile together.
template <class Tile>
LSP_DEVICE void multiply_step(typename Tile::Accumulator (&sums)[Tile::M_TILES][2 * Tile::WARP_GROUPS][4],
                              const Warp<Tile>& warp, uint32_t stage, uint32_t masks) {
  constexpr uint32_t ALL = (1u << Tile::WARP_GROUPS) - 1;
  using T = typename Tile::T;
  constexpr int SLICES = Tile::SLICES / Tile::WARPS_K;  // this warp's
  const int lane = thread() % 32;
  uint32_t present[SLICES];
#pragma unroll
  for (int i = 0; i < SLICES; ++i) present[i] = load_shared(masks + (i * Tile::WARPS_K + warp.k) * 4);
#pragma unroll
  for (int i = 0; i < SLICES; ++i) {
    const int slice = i * Tile::WARPS_K + warp.k;
    const uint32_t mask = present[i] >> warp.n * Tile::WARP_GROUPS & ALL;
    if (mask == 0) continue;
    uint32_t x[Tile::M_TILES][4];
#pragma unroll
    for (int m = 0; m < Tile::M_TILES; ++m) {
      const int row = warp.m * Tile::WARP_M + m * 16 + fragment_row(lane);
      const int place = swizzled<Tile::CHUNKS>(row, slice * 2 + fragment_chunk(lane));
      load_matrices(x[m], stage + row * Tile::K_BYTES + place * CHUNK_BYTES);
    }
    const uint32_t weights = stage + Tile::X_BYTES +
                             (slice * Tile::GROUPS + warp.n * Tile::WARP_GROUPS) * SUB_BLOCK_BYTES + lane * CHUNK_BYTES;
    const auto multiply = [&](int group, const uint32_t (&w)[4]) {
#pragma unroll
      for (int m = 0; m < Tile::M_TILES; ++m) {
        multiply_add(T(), sums[m][2 * group], x[m], w[0], w[1]);
        multiply_add(T(), sums[m][2 * group + 1], x[m], w[2], w[3]);
      }
    };
    if (mask == ALL) {  // no branch between loads and arithmetic
      uint32_t w[Tile::WARP_GROUPS][4];
#pragma unroll
      for (int group = 0; group < Tile::WARP_GROUPS; ++group) load_shared(w[group], weights + group * SUB_BLOCK_BYTES);
#pragma unroll
      for (int group = 0; group < Tile::WARP_GROUPS; ++group) multiply(group, w[group]);
    } else {
#pragma unroll
      for (int group = 0; group < Tile::WARP_GROUPS; ++group) {
        if ((mask >> group & 1) == 0) continue;
        uint32_t w[4];
        load_shared(w, weights + group * SUB_BLOCK_BYTES);
        multiply(group, w);
      }
    }
  }
}

// Warps that shared the slices of the same outputs: the first adds what the others bring through shared memory. The
// barriers of the next tile's steps keep this memory until it has been read.
template <class Tile>
LSP_DEVICE void add_partial_sums(typename Tile::Accumulator (&sums)[Tile::M_TILES][2 * Tile::WARP_GROUPS][4],
                                 const Warp<Tile>& warp, uint32_t partial) {
  constexpr int OUTPUTS = Tile::WARPS_M * Tile::WARPS_N, BYTES = Tile::ACCUMULATORS * 128;
  const uint32_t mine = partial + (warp.n * Tile::WARPS_M + warp.m) * BYTES + thread() % 32 * 4;
  const auto each = [&](auto&& action) {
#pragma unroll
    for (int i = 0; i < Tile::ACCUMULATORS; ++i)
      action(sums[i / 8 / Tile::WARP_GROUPS][i / 4 % (2 * Tile::WARP_GROUPS)][i % 4], mine + i * 128);
  };
  if (warp.k > 0)
    each([&](auto& sum, uint32_t at) { store_shared(at + (warp.k - 1) * OUTPUTS * BYTES, to_bits(sum)); });
  barrier();
  if (warp.k > 0) return;
#pragma unroll
  for (int k = 1; k < Tile::WARPS_K; ++k)
    each([&](auto& sum, uint32_t at) { add_bits(sum, load_shared(at + (k - 1) * OUTPUTS * BYTES)); });
}

template <class Tile>
LSP_KERNEL(Tile::THREADS, Tile::BLOCKS)
block_sparse_linear(LSP_ARGUMENTS(a)) {
  const uint32_t ring = shared_memory();
  const Warp<Tile> warp;
  Loader<Tile> loader(a, ring);
#pragma unroll
  for (int i = 0; i < Tile::STAGES - 1; ++i) loader.issue();

  int stage = 0;
  for (int tile = block(); tile < a.m_tiles * a.n_tiles; tile += grid()) {
    const Place place = place_of<Tile>(a, tile);
    const Span span = a.spans[place.n_tile];
    typename Tile::Accumulator sums[Tile::M_TILES][2 * Tile::WARP_GROUPS][4] = {};
    for (int step = span.first; step < span.last; ++step) {
      copy_async_wait<Tile::STAGES - 2>();
      barrier();  // all copies of this step have landed, and nobody reads the stage that is filled next
      loader.issue();
      multiply_step<Tile>(sums, warp, ring + stage * Tile::STAGE_BYTES,
                          ring + Tile::MASKS_AT + stage * Tile::SLICES * 4);
      stage = stage + 1 == Tile::STAGES ? 0 : stage + 1;
    }
    if constexpr (Tile::WARPS_K > 1) add_partial_sums<Tile>(sums, warp, ring + Tile::PARTIAL_AT);
    if (warp.k == 0)
      write_tile<Tile>(a, a.groups + place.n_tile * Tile::GROUPS + warp.n * Tile::WARP_GROUPS,
                       place.row + warp.m * Tile::WARP_M, sums);
  }
  copy_async_wait<0>();
}

}  // namespace lsp_cuda
