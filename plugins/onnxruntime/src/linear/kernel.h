// What a compute kernel is to the rest of the library: how it wants its operands packed, and three functions.
//
// A kernel multiplies one tile of rows of x by one panel of columns of W and writes the finished outputs. It keeps the
// whole tile in registers over all surviving chunks of the panel, so each output is written once.
//
// Operands come in 32-bit words. A word holds `group` consecutive k: one float, one int32, two bfloat16, two int16 or
// four 8-bit integers. A chunk is 16 consecutive k.
//   packed x   [chunks of K][rows of the tile][words of a chunk]
//   packed W   [surviving chunks of the panel][words of a chunk][columns of the panel]
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "lsp_cpu.h"

namespace lsp {

constexpr int kChunk = 16;
constexpr int kMaxTileOutputs = 512;  // rows times columns of a tile

// How a float becomes an int8: clip(rint((value - offset) * reciprocal), -128, 127).
struct Quantization {
  float offset = 0;
  float reciprocal = 0;
};

// What is the same for all tiles of a layer.
struct Epilogue {
  lsp_activation activation = LSP_NONE;
  lsp_type out_type = LSP_FLOAT32;
  Quantization out;
};

// One tile: y = activation(x W * scale + bias) + residual, perhaps quantized. Arrays by column start at the panel.
struct Tile {
  const void* x;
  const void* w;
  const int32_t* chunks;  // which chunk of K each chunk of the panel multiplies; one more is there to be read
  int32_t chunk_count;
  const char* wanted;    // weights of the next panel, fetched into the second-level cache on the way:
  int wanted_lines;      // so many lines of 64 bytes for each chunk
  const int32_t* start;  // integers: what the sums start from
  const float* scale;    // integers only
  const float* bias;
  const float* residual;  // or NULL
  void* y;
  int64_t stride;  // from row to row of y and of residual, in elements
  int columns;     // of y; the last panel may have fewer than its width
  const Epilogue* epilogue;
};

// Rows to pack: x is [rows, K], dense.
struct Rows {
  const void* x;
  lsp_type x_type;
  int64_t K;
  int rows;
  Quantization quantization;  // int8 from float x
  void* packed;
};

struct Shape {
  int columns;  // width of a panel
  int rows;     // greatest height of a tile
  double cost;  // of one multiplication, relative to the kernel's best shape
};

struct Kernel {
  const char* name;
  Isa isa;
  lsp_type type;    // of the weights
  int group;        // values in a word; fewer than fill it means that they are widened
  int x_bias;       // added to every int8 of x when it is packed, and taken off by Tile::start
  Shape shapes[2];  // the best first; columns 0: there is no second one
  void (*pack)(const Rows&);
  void (*multiply)(const Tile&, int columns, int rows);
};

// The best kernel for `type` that this CPU and `cap` allow. There always is one.
const Kernel& find_kernel(lsp_type type, Isa cap);

}  // namespace lsp
