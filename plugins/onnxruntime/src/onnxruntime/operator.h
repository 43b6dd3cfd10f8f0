// What an operator says of itself, made into the callbacks that ONNX Runtime asks for.
//
// Operator is a struct derived from CustomOp, with
//   kName, kInputs, kRequiredInputs      its name, how many inputs there may be, how many there must be
//   kOutput                              the Characteristic of its one output
//   runtime                              the ONNX Runtime it is registered in
//   input_type(index), output_type()     element types
//   make(info)                           a unique_ptr to a kernel, whose run(context) computes a call; both may throw
//   infer_shape(context)                 sets the output's shape as far as it is known; of the operators of one name
//                                        ONNX Runtime asks the first, whatever the types
#ifndef LSP_ONNXRUNTIME_OPERATOR_H
#define LSP_ONNXRUNTIME_OPERATOR_H

#include <climits>
#include <exception>

#include "abi.h"

namespace lsp::ort {

// Returns what `body` throws as a Status: no exception may reach ONNX Runtime.
template <typename Body>
Status* guarded(const Api& api, ErrorCode code, Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    return api.CreateStatus(code, error.what());
  }
}

template <typename Operator>
void set_callbacks(Operator& op) {
  using Kernel = typename decltype(op.make(nullptr))::element_type;
  op.version = kApiLevel;
  op.GetName = [](const CustomOp*) { return Operator::kName; };
  op.GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };  // the CPU's
  op.GetInputType = [](const CustomOp* self, size_t i) { return static_cast<const Operator*>(self)->input_type(i); };
  op.GetInputTypeCount = [](const CustomOp*) { return Operator::kInputs; };
  op.GetOutputType = [](const CustomOp* self, size_t) { return static_cast<const Operator*>(self)->output_type(); };
  op.GetOutputTypeCount = [](const CustomOp*) -> size_t { return 1; };
  op.GetInputCharacteristic = [](const CustomOp*, size_t i) {
    return i < Operator::kRequiredInputs ? kRequired : kOptional;
  };
  op.GetOutputCharacteristic = [](const CustomOp*, size_t) { return Operator::kOutput; };
  op.GetInputMemoryType = [](const CustomOp*, size_t) { return kDefaultMemory; };
  op.GetStartVersion = [](const CustomOp*) { return 1; };
  op.GetEndVersion = [](const CustomOp*) { return INT_MAX; };
  op.CreateKernelV2 = [](const CustomOp* self, const Api* api, const KernelInfo* info, void** kernel) {
    return guarded(*api, kInvalidArgument, [&] { *kernel = static_cast<const Operator*>(self)->make(info).release(); });
  };
  op.KernelComputeV2 = [](void* kernel, KernelContext* context) {
    const auto* self = static_cast<const Kernel*>(kernel);
    return guarded(self->api, kFail, [&] { self->run(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.InferOutputShapeFn = [](const CustomOp* self, ShapeInferContext* context) -> Status* {
    const auto* op = static_cast<const Operator*>(self);
    // A shape that cannot be told is no error, and ONNX Runtime does not look at what this returns.
    if (Status* status = guarded(*op->runtime.api, kFail, [&] { op->infer_shape(context); })) {
      op->runtime.api->ReleaseStatus(status);
    }
    return nullptr;
  };
}

}  // namespace lsp::ort

#endif
