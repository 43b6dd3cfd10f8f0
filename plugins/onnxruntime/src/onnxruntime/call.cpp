#include "call.h"

#include <memory>
#include <stdexcept>

#include "node.h"

namespace lsp::ort {

Call::Call(const Api& api, KernelContext* context, int threads)
    : api_(api), context_(context), pool_{&Call::run, this, threads} {}

Input Call::input(size_t index) const {
  size_t count = 0;
  check(api_, api_.KernelContext_GetInputCount(context_, &count));
  if (index >= count) return {{}, nullptr};
  const Value* value = nullptr;
  check(api_, api_.KernelContext_GetInput(context_, index, &value));
  if (value == nullptr) return {{}, nullptr};
  TensorInfo* owned = nullptr;
  check(api_, api_.GetTensorTypeAndShape(value, &owned));
  const std::unique_ptr<TensorInfo, void (*)(TensorInfo*)> info(owned, api_.ReleaseTensorTypeAndShapeInfo);
  void* data = nullptr;
  check(api_, api_.GetTensorMutableData(const_cast<Value*>(value), &data));
  return {shape_of(api_, info.get()), data};
}

void* Call::output(const std::vector<int64_t>& shape) {
  Value* value = nullptr;
  check(api_, api_.KernelContext_GetOutput(context_, 0, shape.data(), shape.size(), &value));
  void* data = nullptr;
  check(api_, api_.GetTensorMutableData(value, &data));
  return data;
}

void Call::check_run(const char* reason) const {
  check(api_, pool_status_);
  if (reason != nullptr) throw std::runtime_error(reason);
}

void Call::run(void* call, lsp_task task, size_t count, void* user) {
  auto* self = static_cast<Call*>(call);
  if (self->pool_status_ != nullptr) return;  // an earlier round failed: the result is void
  self->pool_status_ = self->api_.KernelContext_ParallelFor(self->context_, task, count, 0, user);
}

}  // namespace lsp::ort
