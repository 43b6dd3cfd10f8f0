// One call of a kernel: its tensors, and the session's thread pool.
#ifndef LSP_ONNXRUNTIME_CALL_H
#define LSP_ONNXRUNTIME_CALL_H

#include <vector>

#include "abi.h"
#include "lsp_cpu.h"

namespace lsp::ort {

struct Input {
  std::vector<int64_t> shape;
  const void* data;  // nullptr: the input is left out

  const float* floats() const { return static_cast<const float*>(data); }
};

// Errors are thrown as std::runtime_error; ONNX Runtime puts the node's name before them.
class Call {
 public:
  Call(const Api& api, KernelContext* context, int threads);
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  Input input(size_t index) const;
  void* output(const std::vector<int64_t>& shape);
  const lsp_pool* pool() const { return &pool_; }

  // Throws where a kernel gave a reason why it did not run, or the pool did not run it.
  void check_run(const char* reason) const;

 private:
  static void run(void* call, lsp_task task, size_t count, void* user);

  const Api& api_;
  KernelContext* context_;
  lsp_pool pool_;
  Status* pool_status_ = nullptr;
};

}  // namespace lsp::ort

#endif
