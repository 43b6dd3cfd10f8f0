// lsp::Attention: which kernel, and how a run is cut into tasks.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <new>

#include "attention/kernel.h"
#include "error.h"

using lsp::attention::Job;
using lsp::attention::Kernel;
using lsp::attention::Kernels;

struct lsp_attention {
  lsp_attention_desc desc;
  const Kernel* kernel;
};

namespace {

// Best first.
constexpr const Kernels* kKernels[] = {
#if defined(__x86_64__)
    &lsp::attention::avx512_bf16_kernels, &lsp::attention::avx512_kernels, &lsp::attention::avx2_kernels,
#elif defined(__aarch64__)
    &lsp::attention::neon_kernels,
#endif
    &lsp::attention::portable_kernels,
};

// A task takes so many rows of scores that they stay in the cache, and enough of them to be worth packing keys for.
constexpr std::int64_t kRows = 48, kScoreBytes = 128 * 1024;

// What a thread keeps: the keys and values that it packed last. Tasks of one head follow each other, and so mostly run
// on the same thread, which packs once.
struct Workspace {
  float* data = nullptr;
  std::size_t bytes = 0;
  std::uint64_t run = 0;
  std::int64_t head = 0;

  ~Workspace() { std::free(data); }
  bool reserve(std::size_t needed) {
    if (bytes >= needed) return true;
    std::free(data);
    run = 0;
    bytes = (needed + 4095) / 4096 * 4096;
    data = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (data == nullptr) bytes = 0;
    return data != nullptr;
  }
};

struct Run {
  const Job& job;
  const Kernel& kernel;
  std::uint64_t number;
  std::int64_t rows, tasks_per_head;
  std::size_t workspace_bytes;
  std::atomic<bool> out_of_memory{false};
};

void run_task(void* user, std::size_t index) {
  thread_local Workspace workspace;
  Run& run = *static_cast<Run*>(user);
  const auto task = static_cast<std::int64_t>(index);
  if (!workspace.reserve(run.workspace_bytes)) {
    run.out_of_memory = true;
    return;
  }
  const std::int64_t head = task / run.tasks_per_head;
  const std::int64_t batch = head / run.job.heads, in_batch = head % run.job.heads;
  if (workspace.run != run.number || workspace.head != head) {
    run.kernel.pack(run.job, batch, in_batch, workspace.data);
    workspace.run = run.number;
    workspace.head = head;
  }
  const std::int64_t row = task % run.tasks_per_head * run.rows;
  const std::int64_t rows = std::min(run.rows, run.job.queries - row);
  run.kernel.attend(run.job, batch, in_batch, row, rows, workspace.data);
}

// Rows of a task: about equal, as many as keep their scores in the cache, a multiple of the kernel's tile.
std::int64_t rows_of_task(const Job& job, std::int64_t tile) {
  const std::int64_t fitting = std::clamp<std::int64_t>(kScoreBytes / 4 / job.keys, tile, kRows);
  const std::int64_t tasks = std::max<std::int64_t>(1, (job.queries + fitting / 2) / fitting);
  const std::int64_t rows = (job.queries + tasks - 1) / tasks;
  return (rows + tile - 1) / tile * tile;
}

std::atomic<std::uint64_t> run_count{0};

}  // namespace

extern "C" const char* lsp_attention_create(const lsp_attention_desc* desc, const char* isa, lsp_attention** out) {
  *out = nullptr;
  if (desc->heads < 1) return lsp::error("heads is %lld, not a positive number", static_cast<long long>(desc->heads));
  if (desc->head_size < 1 || desc->head_size > lsp::attention::kMaxSize) {
    return lsp::error("head size %lld is not within 1 to %d", static_cast<long long>(desc->head_size),
                      lsp::attention::kMaxSize);
  }
  if (!std::isfinite(desc->scale)) return lsp::error("scale is not finite");
  if (desc->compute != LSP_FLOAT32 && desc->compute != LSP_BFLOAT16) {
    return lsp::error("compute type %d is neither float32 nor bfloat16", static_cast<int>(desc->compute));
  }
  lsp::Isa cap;
  if (const char* why = lsp::find_isa_cap(isa, cap)) return why;
  const Kernels* const* kernels = std::find_if(
      std::begin(kKernels), std::end(kKernels),
      [&](const Kernels* each) { return each->isa <= cap && lsp::available(each->isa); });
  const Kernel& kernel = desc->compute == LSP_FLOAT32 ? (*kernels)->float32 : (*kernels)->bfloat16;
  *out = new (std::nothrow) lsp_attention{*desc, &kernel};
  return *out == nullptr ? lsp::error("out of memory") : nullptr;
}

extern "C" const char* lsp_attention_run(const lsp_attention* attention, std::int64_t B, std::int64_t S,
                                         std::int64_t T, lsp_rows q, lsp_rows k, lsp_rows v, const float* bias,
                                         std::int64_t bias_batches, std::int64_t bias_heads, float* y,
                                         const lsp_pool* pool) {
  const lsp_attention_desc& desc = attention->desc;
  if (B < 1 || S < 1) return nullptr;
  if (T < 1) return lsp::error("there are no keys to attend to");
  if (bias != nullptr && (bias_batches < 1 || (bias_heads != 1 && bias_heads != desc.heads))) {
    return lsp::error("a bias of %lld batches and %lld heads is none for %lld heads", static_cast<long long>(bias_batches),
                      static_cast<long long>(bias_heads), static_cast<long long>(desc.heads));
  }
  const Job job{B, desc.heads, S, T, desc.head_size, desc.scale, q, k, v, bias, bias_batches, bias_heads, y};
  const std::int64_t rows = rows_of_task(job, attention->kernel->tile);
  Run run{job, *attention->kernel, ++run_count, rows, (S + rows - 1) / rows, attention->kernel->bytes(job, rows)};
  const std::size_t tasks = static_cast<std::size_t>(B * desc.heads * run.tasks_per_head);
  if (pool != nullptr && tasks > 1) {
    pool->run(pool->pool, run_task, tasks, &run);
  } else {
    for (std::size_t task = 0; task < tasks; ++task) run_task(&run, task);
  }
  return run.out_of_memory ? lsp::error("out of memory for %zu bytes", run.workspace_bytes) : nullptr;
}

extern "C" void lsp_attention_destroy(lsp_attention* attention) { delete attention; }

extern "C" const char* lsp_attention_kernel(const lsp_attention* attention) { return attention->kernel->name; }
