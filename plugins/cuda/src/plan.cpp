#include "plan.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace lsp_cuda {
namespace {

constexpr int64_t LIMIT = int64_t{1} << 18;  // of K and N, so that no index overflows and slices fit into their 24 bits
constexpr int CANDIDATES = 512;              // that clustering looks at for each place in a tile

int64_t whole(int64_t size, int64_t part) { return (size + part - 1) / part; }

void require(bool holds, const char* otherwise) {
  if (!holds) throw std::invalid_argument(otherwise);
}

bool has_sixteen_bits(int type) { return type == LSP_CUDA_FLOAT16 || type == LSP_CUDA_BFLOAT16; }

void check(const lsp_cuda_desc& d) {
  const auto is_block = [](int64_t size) { return size == 16 || size == 32 || size == 64; };
  require(d.K >= 1 && d.N >= 1 && d.K <= LIMIT && d.N <= LIMIT, "K and N must be from 1 to 262144");
  require(is_block(d.block_k) && is_block(d.block_n), "block_k and block_n must be 16, 32 or 64");
  const int64_t block_rows = whole(d.K, d.block_k), block_columns = whole(d.N, d.block_n);
  require(d.col_ptr != nullptr && static_cast<int64_t>(d.col_ptr_count) == block_columns + 1,
          "col_ptr must have ceil(N / block_n) + 1 entries");
  require(d.k_idx != nullptr || d.k_idx_count == 0, "k_idx is missing");
  require(d.col_ptr[0] == 0 && d.col_ptr[block_columns] == static_cast<int64_t>(d.k_idx_count),
          "col_ptr must go from 0 to the number of k_idx");
  for (int64_t column = 0; column < block_columns; ++column) {
    const int64_t first = d.col_ptr[column], last = d.col_ptr[column + 1];
    require(first <= last && last <= static_cast<int64_t>(d.k_idx_count), "col_ptr must not fall");
    for (int64_t i = first; i < last; ++i)
      require(d.k_idx[i] >= (i > first ? d.k_idx[i - 1] + 1 : 0) && d.k_idx[i] < block_rows,
              "k_idx must ascend in each block column, below ceil(K / block_k)");
  }
  const bool int8 = d.values_type == LSP_CUDA_INT8;
  require(int8 || has_sixteen_bits(d.values_type), "values must be float16, bfloat16 or int8");
  require(d.activation >= LSP_CUDA_NONE && d.activation <= LSP_CUDA_RELU, "unknown activation");
  require(d.out_type == LSP_CUDA_INT8 || d.out_type == d.values_type || (int8 && has_sixteen_bits(d.out_type)),
          "y must be int8 or of the type of values; float16, bfloat16 or int8 where values are int8");
  require(d.out_type != LSP_CUDA_INT8 || (std::isfinite(d.out_scale) && d.out_scale > 0 && std::isfinite(d.out_offset)),
          "int8 y needs an out_scale above 0 and a finite out_offset");
  require(d.residual_type == LSP_CUDA_NO_TYPE ||
              (int8 ? has_sixteen_bits(d.residual_type) : d.residual_type == d.values_type),
          "the residual must be of the type of values; float16 or bfloat16 where values are int8");
  require(d.residual_type == LSP_CUDA_NO_TYPE || d.out_type == LSP_CUDA_INT8 || d.residual_type == d.out_type,
          "the residual must be of the type of y, unless that is int8");
}

// A set of slices of K.
class Slices {
 public:
  explicit Slices(int64_t count) : words_(whole(count, 64)) {}

  void add(int64_t slice) { words_[slice / 64] |= uint64_t{1} << slice % 64; }
  bool has(int64_t slice) const { return words_[slice / 64] >> slice % 64 & 1; }
  void add(const Slices& other) {
    for (size_t i = 0; i < words_.size(); ++i) words_[i] |= other.words_[i];
  }
  int64_t count() const {
    return std::accumulate(words_.begin(), words_.end(), int64_t{0},
                           [](int64_t sum, uint64_t word) { return sum + __builtin_popcountll(word); });
  }
  // What a tile that loads this would load in addition, less what both share.
  int64_t cost(const Slices& other) const {
    int64_t cost = 0;
    for (size_t i = 0; i < words_.size(); ++i)
      cost += __builtin_popcountll(other.words_[i] & ~words_[i]) - __builtin_popcountll(other.words_[i] & words_[i]);
    return cost;
  }

 private:
  std::vector<uint64_t> words_;
};

// The groups of columns, and where their sub-blocks are in `values`.
struct Groups {
  std::vector<Slices> slices;  // of each group that has a column below N
  std::vector<int64_t> first;  // its first sub-block
  int64_t slice_count;         // slices that have a row below K
  int64_t sub_blocks = 0;      // of all groups of all blocks, also beyond K and N: `values` has whole blocks

  explicit Groups(const lsp_cuda_desc& d) {
    const int64_t rows = SLICE_BYTES / (d.values_type == LSP_CUDA_INT8 ? 1 : 2);
    const int64_t stored = whole(whole(d.K, d.block_k) * d.block_k, rows);
    slice_count = whole(d.K, rows);
    for (int64_t column = 0; column < whole(d.N, d.block_n); ++column) {
      Slices survive(stored);
      for (int64_t i = d.col_ptr[column]; i < d.col_ptr[column + 1]; ++i)
        for (int64_t row = d.k_idx[i] * d.block_k; row < (d.k_idx[i] + 1) * d.block_k; row += 16)
          survive.add(row / rows);
      for (int64_t at = column * d.block_n; at < (column + 1) * d.block_n; at += GROUP) {
        if (at < d.N) {
          slices.push_back(survive);
          first.push_back(sub_blocks);
        }
        sub_blocks += survive.count();
      }
    }
  }
};

// Columns that one tile computes, as groups, and the slices that it loads.
struct Columns {
  std::vector<int> groups;
  Slices slices;
};

int64_t loads(const std::vector<Columns>& tiles) {
  return std::accumulate(tiles.begin(), tiles.end(), int64_t{0},
                         [](int64_t sum, const Columns& tile) { return sum + tile.slices.count(); });
}

// Puts units (adjacent groups of the same blocks) into tiles of `size` units: in their order, or so that those with
// common slices come together: the fullest unit left opens a tile, and takes those that cost it least.
std::vector<Columns> tiles_of(const Groups& groups, int unit, int size, bool clustered) {
  const int count = static_cast<int>(whole(groups.slices.size(), unit));
  std::vector<int> left(count);
  std::iota(left.begin(), left.end(), 0);
  const auto slices = [&](int u) -> const Slices& { return groups.slices[u * unit]; };
  if (clustered)
    std::stable_sort(left.begin(), left.end(), [&](int a, int b) { return slices(a).count() > slices(b).count(); });
  std::vector<Columns> tiles;
  while (!left.empty()) {
    Columns tile{{}, slices(left.front())};
    for (int i = 0; i < size && !left.empty(); ++i) {
      auto next = left.begin();
      if (clustered && i > 0)
        next =
            std::min_element(left.begin(), left.begin() + std::min<size_t>(left.size(), CANDIDATES),
                             [&](int a, int b) { return tile.slices.cost(slices(a)) < tile.slices.cost(slices(b)); });
      for (int g = *next * unit; g < std::min<int>((*next + 1) * unit, groups.slices.size()); ++g)
        tile.groups.push_back(g);
      tile.slices.add(slices(*next));
      left.erase(next);
    }
    tiles.push_back(std::move(tile));
  }
  return tiles;
}

Table table_of(const Kernel& kernel, const Groups& groups, int64_t block_n) {
  const int unit = static_cast<int>(std::min<int64_t>(block_n, 32)) / GROUP, size = kernel.groups / unit;
  std::vector<Columns> tiles = tiles_of(groups, unit, size, true), natural = tiles_of(groups, unit, size, false);
  if (loads(natural) <= loads(tiles)) tiles = std::move(natural);
  // The longest first: the short ones even out the end.
  std::stable_sort(tiles.begin(), tiles.end(),
                   [](const Columns& a, const Columns& b) { return a.slices.count() > b.slices.count(); });

  std::vector<int32_t> spans, columns, slices, sub_blocks;
  std::vector<int64_t> next = groups.first;  // sub-block of each group
  for (const Columns& tile : tiles) {
    const auto steps = [&] { return static_cast<int32_t>(slices.size() / kernel.slices); };
    spans.push_back(steps());
    for (int64_t slice = 0; slice < groups.slice_count; ++slice) {
      if (!tile.slices.has(slice)) continue;
      uint32_t mask = 0;
      for (int g = 0; g < kernel.groups; ++g) {
        const bool stored = g < static_cast<int>(tile.groups.size()) && groups.slices[tile.groups[g]].has(slice);
        mask |= static_cast<uint32_t>(stored) << g;
        sub_blocks.push_back(stored ? static_cast<int32_t>(next[tile.groups[g]]++) : -1);
      }
      slices.push_back(static_cast<int32_t>(slice_word(static_cast<uint32_t>(slice), mask)));
    }
    // Whole steps, and at least one: a tile without any slice has y to write, too.
    while (slices.size() % kernel.slices != 0 || steps() == spans.back()) {
      slices.push_back(0);
      sub_blocks.resize(sub_blocks.size() + kernel.groups, -1);
    }
    spans.push_back(steps());
    columns.insert(columns.end(), tile.groups.begin(), tile.groups.end());
    columns.resize(spans.size() / 2 * kernel.groups, -1);
  }

  const int64_t multiplied = std::count_if(sub_blocks.begin(), sub_blocks.end(), [](int32_t at) { return at >= 0; });
  Table table{kernel, std::move(spans), 0, 0, 0, static_cast<int>(tiles.size()), loads(tiles), multiplied, 0};
  const auto append = [&](const std::vector<int32_t>& part) {
    const size_t at = table.words.size();
    table.words.insert(table.words.end(), part.begin(), part.end());
    return at;
  };
  table.groups = append(columns);
  table.slices = append(slices);
  table.sub_blocks = append(sub_blocks);
  table.density = static_cast<double>(table.loaded) / (static_cast<double>(groups.slice_count) * table.n_tiles);
  return table;
}

Kernels kernels_of(int type) {
  if (type == LSP_CUDA_FLOAT16) return float16_kernels();
  return type == LSP_CUDA_BFLOAT16 ? bfloat16_kernels() : int8_kernels();
}

}  // namespace
}  // namespace lsp_cuda

using namespace lsp_cuda;

lsp_cuda_plan::lsp_cuda_plan(const lsp_cuda_desc& d)
    : K(d.K),
      N(d.N),
      values_type(d.values_type),
      activation(d.activation),
      out_type(d.out_type),
      residual_type(d.residual_type),
      out_scale(d.out_scale),
      out_offset(d.out_offset) {
  check(d);
  const Groups groups(d);
  sub_blocks = std::max<int64_t>(groups.sub_blocks, 1);
  require(sub_blocks < int64_t{1} << 31, "too many sub-blocks");
  const bool ragged = K * (values_type == LSP_CUDA_INT8 ? 1 : 2) % CHUNK_BYTES != 0 || N % 4 != 0;
  const Kernels kernels = kernels_of(values_type);
  for (const Kernel* kernel = kernels.first; kernel != kernels.first + kernels.count; ++kernel)
    if (kernel->ragged == ragged) tables.push_back(table_of(*kernel, groups, d.block_n));
}

const Table& lsp_cuda_plan::tactic(int number) const {
  require(number >= 0 && number < static_cast<int>(tables.size()), "there is no such tactic");
  return tables[number];
}

Arguments lsp_cuda_plan::arguments(const Table& table, const Operands& o) const {
  const auto aligned = [](const void* pointer) {
    return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  };
  require(o.M >= 1 && o.M < int64_t{1} << 30, "M must be from 1 to 2^30 - 1");
  require(aligned(o.x) && aligned(o.values) && aligned(o.bias) && aligned(o.y) && aligned(o.table),
          "x, values, bias, y and the table must be there, aligned to 16 bytes");
  require(values_type != LSP_CUDA_INT8 || aligned(o.scale), "int8 values need scale, aligned to 16 bytes");
  require(residual_type == LSP_CUDA_NO_TYPE || aligned(o.residual),
          "the plan has a residual: it must be there, aligned to 16 bytes");

  const auto* words = static_cast<const int32_t*>(o.table);
  Arguments a{};
  a.x = static_cast<const uint8_t*>(o.x);
  a.values = static_cast<const uint8_t*>(o.values);
  a.bias = o.bias;
  a.scale = o.scale;
  a.residual = o.residual;
  a.y = o.y;
  a.spans = reinterpret_cast<const Span*>(words);
  a.groups = words + table.groups;
  a.slices = reinterpret_cast<const uint32_t*>(words + table.slices);
  a.sub_blocks = words + table.sub_blocks;
  a.M = static_cast<int>(o.M);
  a.N = static_cast<int>(N);
  a.k_bytes = static_cast<int>(K * (values_type == LSP_CUDA_INT8 ? 1 : 2));
  a.m_tiles = static_cast<int>(whole(o.M, table.kernel.M));
  a.n_tiles = table.n_tiles;
  require(int64_t{a.m_tiles} * a.n_tiles < int64_t{1} << 30, "too many tiles: M x N is too large");
  a.activation = activation;
  a.out_type = out_type;
  a.residual_type = residual_type;
  a.out_reciprocal = out_type == LSP_CUDA_INT8 ? 1.f / out_scale : 0.f;
  a.out_offset = out_offset;
  return a;
}

const char* lsp_cuda_plan_create(const lsp_cuda_desc* desc, lsp_cuda_plan** out) {
  return reported([&] { *out = new lsp_cuda_plan(*desc); });
}
void lsp_cuda_plan_destroy(lsp_cuda_plan* plan) { delete plan; }
int64_t lsp_cuda_sub_blocks(const lsp_cuda_plan* plan) { return plan->sub_blocks; }
int lsp_cuda_tactics(const lsp_cuda_plan* plan) { return static_cast<int>(plan->tables.size()); }
const char* lsp_cuda_tactic_name(const lsp_cuda_plan* plan, int tactic) { return plan->tables[tactic].kernel.name; }
double lsp_cuda_tactic_density(const lsp_cuda_plan* plan, int tactic) { return plan->tables[tactic].density; }
const void* lsp_cuda_table(const lsp_cuda_plan* plan, int tactic, size_t* bytes) {
  const Table& table = plan->tables[tactic];
  *bytes = table.words.size() * sizeof(int32_t);
  return table.words.data();
}
