// One layer: its plan, and the tables of the tactics that ran, on each device. The clones of a plugin share it.
#pragma once

#include <map>
#include <memory>
#include <mutex>

#include "attributes.h"
#include "device_table.h"
#include "lsp_cuda.h"

namespace lsp_tensorrt {

struct Buffers {
  const void* x;
  const void* values;
  const float* bias;
  const float* scale;
  const void* residual;
  void* y;
};

class Layer {
 public:
  // Throws std::invalid_argument: what the kernels cannot do.
  explicit Layer(const Attributes& attributes);

  int64_t sub_blocks() const { return lsp_cuda_sub_blocks(plan_.get()); }
  int tactics() const { return lsp_cuda_tactics(plan_.get()); }

  // The tactic, counted from 0, for those who have timed none. Throws std::runtime_error.
  int default_tactic(int64_t M) const;

  // Enqueues the kernel of a tactic, counted from 0. Its first launch on a device copies its table there, and waits.
  // Throws std::runtime_error.
  void launch(int tactic, int64_t M, const Buffers& buffers, cudaStream_t stream);

 private:
  const void* table(int tactic, cudaStream_t stream);

  std::unique_ptr<lsp_cuda_plan, decltype(&lsp_cuda_plan_destroy)> plan_{nullptr, lsp_cuda_plan_destroy};
  std::mutex mutex_;
  std::map<std::pair<int, int>, DeviceTable> tables_;  // by device and tactic
};

}  // namespace lsp_tensorrt
