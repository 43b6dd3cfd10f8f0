// The only file that calls the CUDA runtime.
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>

#include "estimate.h"
#include "plan.h"

namespace lsp_cuda {
namespace {

void require(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// What one device can do with one kernel.
struct Resident {
  int multiprocessors, blocks;  // blocks: thread blocks that one multiprocessor holds
  int l2_bytes;
  int at_once() const { return multiprocessors * blocks; }
};

Resident resident(const Kernel& kernel, int device) {
  const void* function = reinterpret_cast<const void*>(kernel.function);
  require(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes));
  // The ring is what the L1 cache has to give its memory to: else fewer blocks run at once than are counted here.
  const auto carveout = cudaFuncAttributePreferredSharedMemoryCarveout;
  require(cudaFuncSetAttribute(function, carveout, cudaSharedmemCarveoutMaxShared));
  int multiprocessors, l2_bytes, blocks;
  require(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  require(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device));
  require(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, kernel.threads, kernel.shared_bytes));
  if (blocks == 0) throw std::runtime_error("this GPU has too few registers or too little memory for the kernel");
  return {multiprocessors, blocks, l2_bytes};
}

// The same, asked once.
Resident known_resident(const Kernel& kernel) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, Resident> known;
  int device;
  require(cudaGetDevice(&device));
  const std::pair key(reinterpret_cast<const void*>(kernel.function), device);
  const std::lock_guard lock(mutex);
  const auto found = known.find(key);
  return found != known.end() ? found->second : known[key] = resident(kernel, device);
}

// Row tiles whose part of x takes half the L2 cache, while all column tiles pass over them; but enough tiles for all
// thread blocks, a few times over.
int chunk_of(const Arguments& a, const Kernel& kernel, const Resident& can) {
  const int64_t cached = can.l2_bytes / 2 / (int64_t{kernel.M} * a.k_bytes),
                busy = 4 * int64_t{can.at_once()} / a.n_tiles + 1;
  return static_cast<int>(std::min<int64_t>(std::max(cached, busy), a.m_tiles));
}

}  // namespace
}  // namespace lsp_cuda

using namespace lsp_cuda;

const char* lsp_cuda_default_tactic(const lsp_cuda_plan* plan, int64_t M, int* tactic) {
  return reported([&] {
    if (M < 1) throw std::invalid_argument("M must be at least 1");
    std::vector<double> cycles;
    for (const Table& table : plan->tables) {
      const Resident can = known_resident(table.kernel);
      cycles.push_back(estimated_cycles(table, M, can.multiprocessors, can.blocks));
    }
    *tactic = static_cast<int>(std::min_element(cycles.begin(), cycles.end()) - cycles.begin());
  });
}

const char* lsp_cuda_launch(const lsp_cuda_plan* plan, int tactic, int64_t M, const void* x, const void* values,
                            const float* bias, const float* scale, const void* residual, void* y, const void* table,
                            void* stream) {
  return reported([&] {
    const Table& of = plan->tactic(tactic);
    Arguments a = plan->arguments(of, {M, x, values, bias, scale, residual, y, table});
    const Resident can = known_resident(of.kernel);
    a.m_chunk = chunk_of(a, of.kernel, can);
    const int grid = std::min(can.at_once(), a.m_tiles * a.n_tiles);
    void* arguments[] = {&a};
    require(cudaLaunchKernel(reinterpret_cast<const void*>(of.kernel.function), dim3(grid), dim3(of.kernel.threads),
                             arguments, of.kernel.shared_bytes, static_cast<cudaStream_t>(stream)));
  });
}
