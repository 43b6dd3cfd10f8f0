// Which tactic is the fastest, where nobody could time them: roughly how long each one takes.
#pragma once

#include <algorithm>
#include <cmath>

#include "plan.h"

namespace lsp_cuda {

// What one multiprocessor does, of an A100 or the like. Only ratios matter: they order the tactics of one layer.
constexpr double L2_BYTES_A_CYCLE = 32, MMA_CYCLES = 2, OUTPUTS_A_CYCLE = 8;
// What nothing hides in a thread block that runs alone: the start and the end of a tile; a barrier; shared memory's
// answer; one warp's mma.sync.
constexpr double TILE_LATENCY = 1500, STEP_LATENCY = 100, SLICE_LATENCY = 60, WARP_MMA_CYCLES = 8;

// Cycles of M rows on `multiprocessors`, each of which holds `blocks` thread blocks of this tactic. Either all that a
// multiprocessor has to load, multiply and write takes this long, or the tiles that one thread block does in turn.
inline double estimated_cycles(const Table& table, int64_t M, int multiprocessors, int blocks) {
  const Kernel& kernel = table.kernel;
  const int64_t m_tiles = (M + kernel.M - 1) / kernel.M, tiles = m_tiles * table.n_tiles;
  const double slices = static_cast<double>(table.loaded) / table.n_tiles,
               sub_blocks = static_cast<double>(table.multiplied) / table.n_tiles,
               steps = std::max(1., std::ceil(slices / kernel.slices)), mma = sub_blocks * 2 * (kernel.M / 16),
               outputs = static_cast<double>(kernel.M) * kernel.groups * GROUP;
  const double bytes = slices * SLICE_BYTES * kernel.M + sub_blocks * SUB_BLOCK_BYTES + outputs * 2;
  const double busy = std::max(bytes / L2_BYTES_A_CYCLE, mma * MMA_CYCLES) + outputs / OUTPUTS_A_CYCLE;
  const double alone = TILE_LATENCY + steps * (STEP_LATENCY + kernel.slices_a_warp * SLICE_LATENCY) +
                       mma / (kernel.threads / 32) * WARP_MMA_CYCLES;
  const auto in_turn = [&](int64_t places) { return static_cast<double>((tiles + places - 1) / places); };
  return std::max(in_turn(multiprocessors) * busy, in_turn(int64_t{multiprocessors} * blocks) * alone);
}

}  // namespace lsp_cuda
