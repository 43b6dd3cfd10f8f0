// The kernels of one element type, from large tiles to small ones.
#pragma once

#include "kernel.h"

namespace lsp_cuda {

template <class Tile>
constexpr Kernel kernel(const char* name) {
  return {name,
          Tile::T::TYPE,
          Tile::M,
          Tile::SLICES,
          Tile::GROUPS,
          Tile::SLICES / Tile::WARPS_K,
          Tile::THREADS,
          Tile::SHARED_BYTES,
          Tile::RAGGED,
          block_sparse_linear<Tile>};
}

//                     rows cols  warps: M N K  bytes of K, stages
template <class T>
Kernels kernels_of() {
  static constexpr Kernel all[] = {
      kernel<Tile<T, 256, 128, 4, 4, 1, 64, 4>>("256x128"),
      kernel<Tile<T, 128, 128, 2, 4, 1, 64, 4>>("128x128"),
      kernel<Tile<T, 128, 64, 2, 2, 1, 64, 4>>("128x64"),
      kernel<Tile<T, 128, 32, 4, 1, 1, 64, 4>>("128x32"),
      kernel<Tile<T, 64, 64, 2, 2, 1, 64, 4>>("64x64"),
      kernel<Tile<T, 64, 32, 4, 1, 1, 128, 4>>("64x32"),
      kernel<Tile<T, 32, 64, 2, 2, 1, 128, 4>>("32x64"),
      kernel<Tile<T, 32, 32, 1, 1, 4, 128, 4>>("32x32"),
      kernel<Tile<T, 64, 32, 4, 1, 1, 128, 3, true>>("64x32 ragged"),
  };
  return {all, sizeof(all) / sizeof(all[0])};
}

}  // namespace lsp_cuda
