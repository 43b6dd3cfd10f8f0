#include "linear/run.h"

#include <unistd.h>

#include <algorithm>

#include "scratch.h"

namespace lsp {
namespace {

// Rows of x are packed this many bytes at a time: it bounds the memory, and they stay in the last-level cache.
constexpr int64_t kPackedBytes = 4 << 20;
// A task packs no less than this.
constexpr int64_t kPackBytes = 32 << 10;
// A task multiplies no fewer words than this: a few microseconds.
constexpr int64_t kTaskWork = 1 << 19;
// More tasks than threads even out what one thread loses to other programs.
constexpr int kTasksPerThread = 6;
constexpr int kUnknownThreads = 8;
// What a tile costs on top of its chunks, in chunks.
constexpr int64_t kTileOverhead = 2;

// The packed rows that one task uses stay in the second-level cache while all its panels stream past.
int64_t task_bytes() {
  static const int64_t bytes = [] {
    const long cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return (cache > 0 ? int64_t{cache} : int64_t{1} << 20) * 3 / 4;
  }();
  return bytes;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `count` things in `parts` parts of nearly equal size.
struct Split {
  int64_t count, parts;
  int64_t begin(int64_t part) const { return count * part / parts; }
  int64_t size(int64_t part) const { return begin(part + 1) - begin(part); }
};

// Calls work(i) for each i < count, on the pool's threads if there are several.
template <class Work>
void for_each(const lsp_pool* pool, int64_t count, const Work& work) {
  if (pool == nullptr || count == 1) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  const auto task = [](void* user, size_t index) { (*static_cast<const Work*>(user))(static_cast<int64_t>(index)); };
  pool->run(pool->pool, task, static_cast<size_t>(count), const_cast<Work*>(&work));
}

// Some consecutive rows, as tiles of nearly equal height, and the groups of tiles and panels that tasks take.
struct Plan {
  int64_t first_row;
  Split tiles;        // rows into tiles
  Split tile_groups;  // tiles into groups
  int64_t panel_groups;
};

Plan plan_rows(const Layer& layer, int64_t first_row, int64_t rows, int64_t row_bytes, const lsp_pool* pool) {
  Plan plan{};
  plan.first_row = first_row;
  plan.tiles = {rows, divide_up(rows, layer.panels.shape.rows)};
  plan.tile_groups = {plan.tiles.parts, std::min(divide_up(rows * row_bytes, task_bytes()), plan.tiles.parts)};
  plan.panel_groups = 1;
  if (pool == nullptr || pool->threads == 1) return plan;

  const int64_t threads = pool->threads > 0 ? pool->threads : kUnknownThreads;
  const int64_t chunks = layer.panels.first.back() + kTileOverhead * layer.panels.count();
  const int64_t work = rows * chunks * (kChunk / layer.kernel->group) * layer.panels.shape.columns;
  const int64_t tasks = std::max<int64_t>(1, std::min(threads * kTasksPerThread, work / kTaskWork));
  plan.panel_groups = std::min(divide_up(tasks, plan.tile_groups.parts), layer.panels.count());
  const int64_t groups = std::min(divide_up(tasks, plan.panel_groups), plan.tiles.parts);
  plan.tile_groups.parts = std::max(plan.tile_groups.parts, groups);
  return plan;
}

// The panel where group `group` of `groups` starts, all with about the same number of chunks.
int64_t first_panel(const Panels& panels, int64_t group, int64_t groups) {
  const auto cost = [&](int64_t p) { return panels.first[static_cast<size_t>(p)] + kTileOverhead * p; };
  const int64_t wanted = cost(panels.count()) * group / groups;
  int64_t low = 0, high = panels.count();
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cost(middle) < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

struct Call {
  const Layer& layer;
  const void* x;
  const float* residual;
  void* y;
  char* packed;
  int64_t row_bytes;  // of packed x

  void pack(const Plan& plan, int64_t tile) const {
    const int64_t row = plan.tiles.begin(tile);
    const int64_t element = layer.x_type == LSP_INT8 ? 1 : 4;
    Rows rows{};
    rows.x = static_cast<const char*>(x) + (plan.first_row + row) * layer.K * element;
    rows.x_type = layer.x_type;
    rows.K = layer.K;
    rows.rows = static_cast<int>(plan.tiles.size(tile));
    rows.quantization = layer.quantization;
    rows.packed = packed + row * row_bytes;
    layer.kernel->pack(rows);
  }

  // `row` counts from `first_row`, the first that is packed. Each of the `tiles` tiles of a panel fetches its part of
  // the next panel, so that memory has as long for it as the multiplications take.
  void multiply(int64_t first_row, int64_t row, int rows, int64_t panel, int64_t tile_index, int64_t tiles) const {
    const Panels& panels = layer.panels;
    const int columns = panels.shape.columns;
    const int64_t column = panel * columns;
    const int64_t position = (first_row + row) * layer.N + column;
    const int64_t first = panels.first[static_cast<size_t>(panel)];
    Tile tile{};
    tile.x = packed + row * row_bytes;
    tile.w = panels.words.get() + static_cast<size_t>(first) * panels.chunk_bytes;
    tile.chunks = panels.chunks.data() + first;
    tile.chunk_count = static_cast<int32_t>(panels.first[static_cast<size_t>(panel) + 1] - first);
    const int64_t lines = divide_up(static_cast<int64_t>(panels.chunk_bytes) / 64, tiles);
    tile.wanted = static_cast<const char*>(tile.w) + tile.chunk_count * static_cast<int64_t>(panels.chunk_bytes) +
                  tile_index * tile.chunk_count * lines * 64;
    tile.wanted_lines = static_cast<int>(lines);
    tile.start = panels.start.data() + column;
    tile.scale = panels.scale.data() + column;
    tile.bias = panels.bias.data() + column;
    tile.residual = residual == nullptr ? nullptr : residual + position;
    tile.y = static_cast<char*>(y) + position * (layer.epilogue.out_type == LSP_INT8 ? 1 : 4);
    tile.stride = layer.N;
    tile.columns = static_cast<int>(std::min<int64_t>(columns, layer.N - column));
    tile.epilogue = &layer.epilogue;
    layer.kernel->multiply(tile, columns, rows);
  }
};

// First all rows are packed, then all tiles multiplied. Tasks that share rows have neighbouring numbers: a pool that
// gives each thread a range of them keeps the rows in that thread's cache.
void run_rows(const Call& call, const Plan& plan, const lsp_pool* pool) {
  const int64_t tasks = plan.tile_groups.parts * plan.panel_groups;
  if (tasks == 1) pool = nullptr;  // so little that threads would only wait for each other
  const int64_t bytes = plan.tiles.count * call.row_bytes;
  const Split pack_groups = {plan.tiles.parts, std::clamp<int64_t>(bytes / kPackBytes, 1, plan.tiles.parts)};
  for_each(pool, pack_groups.parts, [&](int64_t group) {
    for (int64_t t = pack_groups.begin(group); t < pack_groups.begin(group + 1); ++t) call.pack(plan, t);
  });
  for_each(pool, tasks, [&](int64_t task) {
    const int64_t tile_group = task / plan.panel_groups;
    const int64_t panel_group = task % plan.panel_groups;
    const int64_t end = first_panel(call.layer.panels, panel_group + 1, plan.panel_groups);
    const int64_t first_tile = plan.tile_groups.begin(tile_group), end_tile = plan.tile_groups.begin(tile_group + 1);
    for (int64_t p = first_panel(call.layer.panels, panel_group, plan.panel_groups); p < end; ++p) {
      int64_t row = plan.tiles.begin(first_tile);
      for (int64_t t = first_tile; t < end_tile; ++t) {
        const int64_t next = plan.tiles.begin(t + 1);
        call.multiply(plan.first_row, row, static_cast<int>(next - row), p, t - first_tile, end_tile - first_tile);
        row = next;
      }
    }
  });
}

}  // namespace

bool run_layer(const Layer& layer, int64_t M, const void* x, const float* residual, void* y, const lsp_pool* pool) {
  const int64_t row_bytes = divide_up(layer.K, kChunk) * (kChunk / layer.kernel->group) * 4;
  const int64_t most_rows = std::max<int64_t>(layer.panels.shape.rows, kPackedBytes / row_bytes);
  const Split parts = {M, divide_up(M, most_rows)};
  const Scratch scratch(static_cast<size_t>(divide_up(M, parts.parts) * row_bytes));
  if (scratch.data() == nullptr) return false;
  const Call call = {layer, x, residual, y, static_cast<char*>(scratch.data()), row_bytes};
  for (int64_t part = 0; part < parts.parts; ++part) {
    run_rows(call, plan_rows(layer, parts.begin(part), parts.size(part), row_bytes, pool), pool);
  }
  return true;
}

}  // namespace lsp
