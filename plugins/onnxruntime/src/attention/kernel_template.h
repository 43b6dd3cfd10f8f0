// Attention for one instruction set, in terms of vector.h.
//
// Operands lie in 32-bit cells: a float, or two bfloat16 that follow each other along the axis that is summed over.
// Whoever includes this defines, in an unnamed namespace, kWidth (floats in a vector) and kVectors (vectors that a tile
// of 6 rows is wide: 6 · kVectors sums have to stay in registers).
#pragma once

#include <cmath>
#include <limits>

#include "attention/kernel.h"
#include "attention/vector.h"

namespace {

using lsp::attention::Job;
using lsp::attention::Kernel;
using std::int64_t;

constexpr int kTile = 6;
constexpr float kLog2e = 1.4426950408889634f;

// Cells of floats, as they are or rounded to bfloat16.
template <bool rounded>
struct FloatCells {
  static constexpr int64_t depth = 1;           // values in a cell
  static constexpr bool are_floats = !rounded;  // whether cells are the values themselves
  // A vector of cells, the first of them cell `first`, of a row of `size` values; zeros behind it.
  static Vector along(const float* row, int64_t first, int64_t size) {
    return round(load_partial(row + first, size - first));
  }
  // Cells of values in different rows.
  static Vector across(Vector first, Vector) { return round(first); }
  static Vector multiply_add(Vector sum, float cell, Vector cells) { return splat(cell) * cells + sum; }

 private:
  static Vector round(Vector x) { return rounded ? rounded_to_bfloat16(x) : x; }
};

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t vectors_of(int64_t floats) { return divided_up(floats, kWidth); }

// `vectors` vectors side by side, in panels of nearly equal width that a tile can take.
struct Panels {
  int64_t vectors, count;
  explicit Panels(int64_t floats) : vectors(vectors_of(floats)), count(divided_up(vectors, kVectors)) {}
  int64_t begin(int64_t panel) const { return panel * vectors / count; }
};

// Where the parts of the workspace begin, in floats.
template <class Cells>
struct Layout {
  int64_t size_cells, keys_cells, padded_keys, padded_size;
  int64_t keys, values, queries, scores, end;

  Layout(const Job& job, int64_t rows)
      : size_cells(divided_up(job.size, Cells::depth)),
        keys_cells(divided_up(job.keys, Cells::depth)),
        padded_keys(vectors_of(job.keys) * kWidth),
        padded_size(vectors_of(job.size) * kWidth),
        keys(0),
        values(keys + size_cells * padded_keys),
        queries(values + keys_cells * padded_size),
        scores(queries + rows * padded_size),
        end(scores + rows * padded_keys) {}
};

const float* head_of(const lsp_rows& rows, const Job& job, int64_t batch, int64_t head) {
  return rows.data + batch * rows.batch_stride + head * job.size;
}

// kᵀ, each panel [cells along a head, keys].
template <class Cells>
void pack_keys(const Job& job, const float* k, float* packed) {
  const int64_t cells = divided_up(job.size, Cells::depth);
  const Panels panels(job.keys);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t width = (panels.begin(panel + 1) - panels.begin(panel)) * kWidth;
    for (int64_t column = 0; column < width; column += kWidth) {
      const int64_t key = panels.begin(panel) * kWidth + column;
      for (int64_t first = 0; first < cells; first += kWidth) {
        Vector block[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) {
          block[i] = key + i < job.keys ? Cells::along(k + (key + i) * job.k.row_stride, first, job.size) : Vector{};
        }
        transpose(block);
        float* to = packed + first * width + column;
        const int64_t count = cells - first < kWidth ? cells - first : kWidth;
        for (int64_t i = 0; i < count; ++i) store(to + i * width, block[i]);
      }
    }
    packed += cells * width;
  }
}

// v, each panel [cells along the keys, values of a head].
template <class Cells>
void pack_values(const Job& job, const float* v, float* packed) {
  const int64_t cells = divided_up(job.keys, Cells::depth);
  const Panels panels(job.size);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t width = (panels.begin(panel + 1) - panels.begin(panel)) * kWidth;
    for (int64_t cell = 0; cell < cells; ++cell) {
      for (int64_t column = 0; column < width; column += kWidth) {
        const int64_t at = panels.begin(panel) * kWidth + column;
        const int64_t key = cell * Cells::depth;
        const Vector first = load_partial(v + key * job.v.row_stride + at, job.size - at);
        const bool has_second = Cells::depth > 1 && key + 1 < job.keys;
        const Vector second = has_second ? load_partial(v + (key + 1) * job.v.row_stride + at, job.size - at) : Vector{};
        store(packed + cell * width + column, Cells::across(first, second));
      }
    }
    packed += cells * width;
  }
}

// A product of cells: rows of `a`, `depth` cells each, times `b` [depth, vectors]; put(row, vector, sum) stores the sums.
struct Product {
  int64_t rows, depth;
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t first_vector;  // of `b` within the whole product
};

template <class Cells, int rows, int vectors, class Put>
void multiply_tile(const Product& product, int64_t first_row, Put put) {
  const float* a = product.a + first_row * product.a_stride;
  const float* b = product.b;
  Vector sums[rows][vectors] = {};
  for (int64_t i = 0; i < product.depth; ++i) {
    Vector cells[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) cells[j] = load(b + j * kWidth);
#pragma GCC unroll 6
    for (int row = 0; row < rows; ++row) {
      const float cell = a[row * product.a_stride + i];
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sums[row][j] = Cells::multiply_add(sums[row][j], cell, cells[j]);
    }
    b += vectors * kWidth;
  }
#pragma GCC unroll 6
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) put(first_row + row, product.first_vector + j, sums[row][j]);
  }
}

// Some rows in tiles of one height. The last tile may overlap what is before it, and computes the same there again.
// Not inlined: registers are allocated best for this loop alone.
template <class Cells, int rows, int vectors, class Put>
__attribute__((noinline)) void multiply_rows(const Product product, int64_t begin, int64_t end, const Put put) {
  for (int64_t row = begin; row < end; row += rows) {
    multiply_tile<Cells, rows, vectors>(product, row < end - rows ? row : end - rows, put);
  }
}

// All rows, in high tiles, and the rest in a lower one where that is cheaper.
template <class Cells, int vectors, class Put>
void multiply_panel(const Product& product, Put put) {
  const int64_t rest = product.rows % kTile;
  const bool in_high_tiles = rest > kTile / 2 && product.rows > kTile;
  const int64_t high = in_high_tiles ? product.rows : product.rows - rest;
  multiply_rows<Cells, kTile, vectors>(product, 0, high, put);
  if (rest > 1 && product.rows > 2) {
    multiply_rows<Cells, kTile / 2, vectors>(product, high, product.rows, put);
  } else {
    multiply_rows<Cells, 1, vectors>(product, high, product.rows, put);
  }
}

// The same for all panels of `b`.
template <class Cells, class Put>
void multiply(Product product, const Panels& panels, Put put) {
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t begin = panels.begin(panel), vectors = panels.begin(panel + 1) - begin;
    product.first_vector = begin;
    switch (vectors) {
      case 1:
        multiply_panel<Cells, 1>(product, put);
        break;
      case 2:
        multiply_panel<Cells, 2>(product, put);
        break;
      case 3:
        if constexpr (kVectors >= 3) multiply_panel<Cells, 3>(product, put);
        break;
      default:
        if constexpr (kVectors >= 4) multiply_panel<Cells, 4>(product, put);
    }
    product.b += product.depth * vectors * kWidth;
  }
}

// Adds the bias to a row of scores, which are times log2(e), takes out what is behind them, and returns the largest.
inline float prepare_row(float* scores, int64_t keys, const float* bias) {
  const Vector infinity = splat(std::numeric_limits<float>::infinity());
  const int64_t padded = vectors_of(keys) * kWidth, last = padded - kWidth;
  if (bias != nullptr) {
    for (int64_t i = 0; i < padded; i += kWidth) {
      store(scores + i, load(scores + i) + load_partial(bias + i, keys - i) * splat(kLog2e));
    }
  }
  const Integers behind = lane_numbers() >= Integers{} + static_cast<std::int32_t>(keys - last);
  const Vector last_scores = behind ? -infinity : load(scores + last);
  store(scores + last, last_scores);
  Vector largest = last_scores;
  for (int64_t i = 0; i < last; i += kWidth) largest = larger(load(scores + i), largest);
  return reduce(largest, larger);
}

// Scores become 2^(score - largest), as cells. Returns their sum.
template <class Cells>
float exponentiate_row(float* scores, int64_t keys, float largest) {
  const int64_t padded = vectors_of(keys) * kWidth;
  Vector sum = {};
  for (int64_t i = 0; i < padded; i += kWidth) {
    const Vector weight = exp2_of_negative(load(scores + i) - splat(largest));
    store(scores + i, weight);
    sum += weight;
  }
  if constexpr (!Cells::are_floats) {
    // In place: a vector of cells lies before the values that it is made of, or on them.
    for (int64_t i = 0; i * Cells::depth < padded; i += kWidth) store(scores + i, Cells::along(scores, i, padded));
  }
  return reduce(sum, [](Vector a, Vector b) { return a + b; });
}

template <class Cells>
void attend(const Job& job, int64_t batch, int64_t head, int64_t row, int64_t rows, float* workspace) {
  const Layout<Cells> layout(job, rows);
  float* queries = workspace + layout.queries;
  float* scores = workspace + layout.scores;
  const float* q = head_of(job.q, job, batch, head) + row * job.q.row_stride;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < layout.size_cells; j += kWidth) {
      store(queries + i * layout.padded_size + j, Cells::along(q + i * job.q.row_stride, j, job.size));
    }
  }
  // Scores are scaled by log2(e) too: the softmax then takes powers of two.
  const Vector scale = splat(job.scale * kLog2e);
  multiply<Cells>(
      {rows, layout.size_cells, queries, layout.padded_size, workspace + layout.keys, 0}, Panels(job.keys),
      [scores, stride = layout.padded_keys, scale](int64_t i, int64_t j, Vector sum) {
        store(scores + i * stride + j * kWidth, sum * scale);
      });

  const float* bias = job.bias;
  if (bias != nullptr) {
    const int64_t matrix = batch % job.bias_batches * job.bias_heads + head % job.bias_heads;
    bias += (matrix * job.queries + row) * job.keys;
  }
  float* largest = queries;  // which have been read
  for (int64_t i = 0; i < rows; ++i) {
    largest[i] = prepare_row(scores + i * layout.padded_keys, job.keys, bias == nullptr ? bias : bias + i * job.keys);
  }
  float* inverse = largest;
  for (int64_t i = 0; i < rows; ++i) {
    inverse[i] = 1.0f / exponentiate_row<Cells>(scores + i * layout.padded_keys, job.keys, largest[i]);
  }

  const int64_t y_stride = job.heads * job.size;
  float* y = job.y + (batch * job.queries + row) * y_stride + head * job.size;
  multiply<Cells>(
      {rows, layout.keys_cells, scores, layout.padded_keys, workspace + layout.values, 0}, Panels(job.size),
      [y, y_stride, inverse, size = job.size](int64_t i, int64_t j, Vector sum) {
        store_partial(y + i * y_stride + j * kWidth, sum * splat(inverse[i]), size - j * kWidth);
      });
}

template <class Cells>
void pack(const Job& job, int64_t batch, int64_t head, float* workspace) {
  const Layout<Cells> layout(job, 0);
  pack_keys<Cells>(job, head_of(job.k, job, batch, head), workspace + layout.keys);
  pack_values<Cells>(job, head_of(job.v, job, batch, head), workspace + layout.values);
}

template <class Cells>
std::size_t bytes(const Job& job, int64_t rows) {
  return static_cast<std::size_t>(Layout<Cells>(job, rows).end) * sizeof(float);
}

template <class Cells>
constexpr Kernel make_kernel(const char* name) {
  return {name, kTile, bytes<Cells>, pack<Cells>, attend<Cells>};
}

}  // namespace
