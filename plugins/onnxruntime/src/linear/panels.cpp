#include "linear/panels.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace lsp {
namespace {

// Which chunks of K survive in each panel, for panels of a given width. A chunk survives where any block touches it.
std::vector<std::vector<int32_t>> surviving_chunks(const lsp_linear_desc& desc, int columns) {
  const int64_t panels = (desc.N + columns - 1) / columns;
  std::vector<std::vector<int32_t>> chunks(static_cast<size_t>(panels));
  std::vector<bool> survives(static_cast<size_t>((desc.K + kChunk - 1) / kChunk));
  for (int64_t p = 0; p < panels; ++p) {
    std::fill(survives.begin(), survives.end(), false);
    const int64_t last_column = std::min((p + 1) * columns, desc.N) - 1;
    for (int64_t b = p * columns / desc.block_n; b <= last_column / desc.block_n; ++b) {
      for (int64_t e = desc.col_ptr[b]; e < desc.col_ptr[b + 1]; ++e) {
        const int64_t first = desc.k_idx[e] * desc.block_k;
        const int64_t last = std::min(first + desc.block_k, desc.K) - 1;
        for (int64_t c = first / kChunk; c <= last / kChunk; ++c) survives[static_cast<size_t>(c)] = true;
      }
    }
    for (size_t c = 0; c < survives.size(); ++c) {
      if (survives[c]) chunks[static_cast<size_t>(p)].push_back(static_cast<int32_t>(c));
    }
  }
  return chunks;
}

// Stores one weight in its place within a word: widened where the kernel's words hold fewer values than would fit.
void store_weight(lsp_type type, int group, const void* values, size_t index, char* word, int64_t place) {
  if (type == LSP_FLOAT32) {
    std::memcpy(word, static_cast<const float*>(values) + index, 4);
  } else if (type == LSP_BFLOAT16) {
    // The upper half of a float, in the upper half of a word that holds a float.
    std::memcpy(word + (group == 1 ? 2 : place * 2), static_cast<const uint16_t*>(values) + index, 2);
  } else {
    const int8_t value = static_cast<const int8_t*>(values)[index];
    const int16_t half = value;
    const int32_t whole = value;
    if (group == 4) std::memcpy(word + place, &value, 1);
    if (group == 2) std::memcpy(word + place * 2, &half, 2);
    if (group == 1) std::memcpy(word, &whole, 4);
  }
}

// Copies the part of block `e`, of block column `b`, that lies in panel `p`.
void copy_block(const lsp_linear_desc& desc, const Kernel& kernel, Panels& panels, int64_t p, int64_t b, int64_t e) {
  const int columns = panels.shape.columns;
  const int64_t k_begin = desc.k_idx[e] * desc.block_k, k_end = std::min(k_begin + desc.block_k, desc.K);
  const int64_t n_begin = std::max(b * desc.block_n, p * columns);
  const int64_t n_end = std::min({(b + 1) * desc.block_n, (p + 1) * columns, desc.N});
  const auto chunks_begin = panels.chunks.begin() + panels.first[static_cast<size_t>(p)];
  const auto chunks_end = panels.chunks.begin() + panels.first[static_cast<size_t>(p) + 1];
  for (int64_t k = k_begin; k < k_end; ++k) {
    const auto chunk = std::lower_bound(chunks_begin, chunks_end, static_cast<int32_t>(k / kChunk));
    char* words = panels.words.get() + static_cast<size_t>(chunk - panels.chunks.begin()) * panels.chunk_bytes +
                  k % kChunk / kernel.group * columns * 4;
    for (int64_t n = n_begin; n < n_end; ++n) {
      const int64_t index = (e * desc.block_k + k - k_begin) * desc.block_n + n - b * desc.block_n;
      store_weight(desc.values_type, kernel.group, desc.values, static_cast<size_t>(index),
                   words + (n - p * columns) * 4, k % kernel.group);
      if (desc.values_type == LSP_INT8) {
        panels.start[static_cast<size_t>(n)] -= kernel.x_bias * static_cast<const int8_t*>(desc.values)[index];
      }
    }
  }
}

// The kernel's shape that takes least time: narrow panels keep narrow blocks apart, wide ones run faster.
Shape best_shape(const lsp_linear_desc& desc, const Kernel& kernel, std::vector<std::vector<int32_t>>& chunks) {
  Shape best{};
  double least = 0;
  for (const Shape& shape : kernel.shapes) {
    if (shape.columns == 0) continue;
    std::vector<std::vector<int32_t>> found = surviving_chunks(desc, shape.columns);
    double cost = 0;
    for (const std::vector<int32_t>& panel : found) cost += static_cast<double>(panel.size()) * shape.columns;
    cost *= shape.cost;
    if (best.columns != 0 && cost >= least) continue;
    best = shape;
    least = cost;
    chunks = std::move(found);
  }
  return best;
}

}  // namespace

Panels pack_panels(const lsp_linear_desc& desc, const Kernel& kernel) {
  Panels panels;
  std::vector<std::vector<int32_t>> chunks;
  panels.shape = best_shape(desc, kernel, chunks);
  const int columns = panels.shape.columns;

  panels.first.assign(1, 0);
  for (const std::vector<int32_t>& panel : chunks) {
    panels.chunks.insert(panels.chunks.end(), panel.begin(), panel.end());
    panels.first.push_back(static_cast<int64_t>(panels.chunks.size()));
  }
  panels.chunks.push_back(0);
  const size_t padded = static_cast<size_t>(panels.count() * columns);
  panels.bias.assign(desc.bias, desc.bias + desc.N);
  panels.scale.assign(desc.scale, desc.scale + desc.N);
  panels.bias.resize(padded, 0.0F);
  panels.scale.resize(padded, 0.0F);
  panels.start.assign(padded, 0);

  panels.chunk_bytes = static_cast<size_t>(kChunk / kernel.group * columns) * 4;
  const size_t bytes = (static_cast<size_t>(panels.first.back()) * panels.chunk_bytes + 64) / 64 * 64;
  panels.words.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
  if (panels.words == nullptr) throw std::bad_alloc();
  std::memset(panels.words.get(), 0, bytes);
  for (int64_t p = 0; p < panels.count(); ++p) {
    const int64_t last_column = std::min((p + 1) * columns, desc.N) - 1;
    for (int64_t b = p * columns / desc.block_n; b <= last_column / desc.block_n; ++b) {
      for (int64_t e = desc.col_ptr[b]; e < desc.col_ptr[b + 1]; ++e) copy_block(desc, kernel, panels, p, b, e);
    }
  }
  return panels;
}

}  // namespace lsp
