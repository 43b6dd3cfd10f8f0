#include "linear/description.h"

#include <cinttypes>
#include <cmath>

#include "error.h"

namespace lsp {
namespace {

// Sizes stay far from the limits of 32-bit indices, and of memory.
constexpr int64_t kMaxSize = int64_t{1} << 24;
// A small file can ask for a huge grid without blocks, and packing looks at every place in it.
constexpr int64_t kMaxEntries = int64_t{1} << 28;
// -128 * -128 * K must fit an int32.
constexpr int64_t kMaxInt8K = ((int64_t{1} << 31) - 1) / (128 * 128);

const char* check_size(const char* name, int64_t value) {
  if (value < 1 || value > kMaxSize) return error("%s is %" PRId64 ", not within 1 to %" PRId64, name, value, kMaxSize);
  return nullptr;
}

const char* check_sizes(const lsp_linear_desc& desc) {
  if (const char* why = check_size("K", desc.K)) return why;
  if (const char* why = check_size("N", desc.N)) return why;
  if (const char* why = check_size("block_k", desc.block_k)) return why;
  if (const char* why = check_size("block_n", desc.block_n)) return why;
  const int64_t rows = (desc.K + desc.block_k - 1) / desc.block_k * desc.block_k;
  const int64_t columns = (desc.N + desc.block_n - 1) / desc.block_n * desc.block_n;
  if (rows * columns > kMaxEntries) {
    return error("a weight of %" PRId64 " x %" PRId64 ", with what fills up its blocks, is too large for one layer",
                 desc.K, desc.N);
  }
  if (desc.values_type == LSP_INT8 && desc.K > kMaxInt8K) {
    return error("K is %" PRId64 "; int8 sums fit 32 bits up to %" PRId64, desc.K, kMaxInt8K);
  }
  return nullptr;
}

const char* check_blocks(const lsp_linear_desc& desc) {
  const int64_t block_rows = (desc.K + desc.block_k - 1) / desc.block_k;
  const int64_t block_columns = (desc.N + desc.block_n - 1) / desc.block_n;
  if (desc.col_ptr == nullptr || desc.col_ptr_count != static_cast<size_t>(block_columns) + 1) {
    return error("col_ptr has %zu entries, not %" PRId64 ": one more than there are columns of blocks",
                 desc.col_ptr == nullptr ? size_t{0} : desc.col_ptr_count, block_columns + 1);
  }
  if (desc.col_ptr[0] != 0) return error("col_ptr starts with %" PRId64 ", not 0", desc.col_ptr[0]);
  const int64_t blocks = desc.col_ptr[block_columns];
  for (int64_t b = 0; b < block_columns; ++b) {
    if (desc.col_ptr[b + 1] < desc.col_ptr[b]) return error("col_ptr[%" PRId64 "] is less than the one before", b + 1);
  }
  const size_t indices = desc.k_idx == nullptr ? 0 : desc.k_idx_count;
  if (indices != static_cast<size_t>(blocks)) {
    return error("k_idx has %zu entries, but col_ptr ends with %" PRId64, indices, blocks);
  }
  for (int64_t b = 0; b < block_columns; ++b) {
    for (int64_t e = desc.col_ptr[b]; e < desc.col_ptr[b + 1]; ++e) {
      if (desc.k_idx[e] < 0 || desc.k_idx[e] >= block_rows) {
        return error("k_idx[%" PRId64 "] is %" PRId64 ", not within 0 to %" PRId64, e, desc.k_idx[e], block_rows - 1);
      }
      if (e > desc.col_ptr[b] && desc.k_idx[e] <= desc.k_idx[e - 1]) {
        return error("k_idx[%" PRId64 "] does not ascend within its column of blocks", e);
      }
    }
  }
  // Nothing overflows: no more blocks than k_idx has entries in memory, and a block is no larger than 2^48.
  const int64_t block_size = desc.block_k * desc.block_n;
  const int64_t stored = blocks == 0 ? 1 : blocks;  // no tensor is empty: without a block one of zeros is stored
  if (desc.values == nullptr || desc.values_count % static_cast<size_t>(block_size) != 0 ||
      desc.values_count / static_cast<size_t>(block_size) != static_cast<size_t>(stored)) {
    return error("values has %zu elements, not %" PRId64 " blocks of %" PRId64 " x %" PRId64,
                 desc.values == nullptr ? size_t{0} : desc.values_count, stored, desc.block_k, desc.block_n);
  }
  return nullptr;
}

const char* check_quantization(const char* name, float scale, float offset, bool wanted) {
  if (!std::isfinite(scale) || scale < 0) return error("%s_scale is %g, not a finite positive number", name, scale);
  if (!std::isfinite(offset)) return error("%s_offset is %g, not a finite number", name, offset);
  if (wanted && scale == 0) return error("%s_scale is 0, but int8 needs a scale", name);
  if (wanted && !std::isfinite(1.0F / scale)) return error("%s_scale is %g, too small", name, scale);
  if (!wanted && scale != 0) return error("%s_scale is %g, but only int8 has a scale", name, scale);
  if (!wanted && offset != 0) return error("%s_offset is %g, but only int8 has an offset", name, offset);
  return nullptr;
}

const char* check_types(const lsp_linear_desc& desc) {
  const bool integers = desc.values_type == LSP_INT8;
  if (!integers && desc.values_type != LSP_FLOAT32 && desc.values_type != LSP_BFLOAT16) {
    return error("values have element type %d, not float32, bfloat16 or int8", static_cast<int>(desc.values_type));
  }
  if (desc.x_type != LSP_FLOAT32 && desc.x_type != LSP_INT8) {
    return error("x has element type %d, not float32 or int8", static_cast<int>(desc.x_type));
  }
  if (desc.x_type == LSP_INT8 && !integers) return error("x is int8, but values are not");
  if (desc.out_type != LSP_FLOAT32 && desc.out_type != LSP_INT8) {
    return error("out_type is %d, not float32 or int8", static_cast<int>(desc.out_type));
  }
  if (desc.activation < LSP_NONE || desc.activation > LSP_RELU) {
    return error("activation %d is unknown", static_cast<int>(desc.activation));
  }
  if (desc.bias == nullptr) return error("bias is missing");
  if (desc.scale == nullptr) return error("scale is missing");
  if (const char* why = check_quantization("x", desc.x_scale, desc.x_offset, integers)) return why;
  return check_quantization("out", desc.out_scale, desc.out_offset, desc.out_type == LSP_INT8);
}

}  // namespace

const char* check_description(const lsp_linear_desc& desc) {
  if (const char* why = check_types(desc)) return why;
  if (const char* why = check_sizes(desc)) return why;
  return check_blocks(desc);
}

}  // namespace lsp
