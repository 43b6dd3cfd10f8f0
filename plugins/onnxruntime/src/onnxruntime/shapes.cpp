#include "shapes.h"

#include <atomic>
#include <string>
#include <vector>

#include "node.h"

namespace lsp::ort {

namespace {

// ONNX Runtime keeps it; a rank of 0 may mean that nothing is known.
TensorInfo* shape_info(const Api& api, const ShapeInferContext* context, size_t input) {
  TensorInfo* info = nullptr;
  check(api, api.ShapeInferContext_GetInputTypeShape(context, input, &info));
  return info;
}

// An unknown size that has no name would be taken for the size -1, so it gets a name that nothing else has.
std::string fresh_name() {
  static std::atomic<unsigned long> count{0};
  return "lsp_unknown_" + std::to_string(count++);
}

}  // namespace

size_t input_count(const Api& api, const ShapeInferContext* context) {
  size_t count = 0;
  check(api, api.ShapeInferContext_GetInputCount(context, &count));
  return count;
}

int64_t last_size(const Api& api, const ShapeInferContext* context, size_t input) {
  const std::vector<int64_t> shape = shape_of(api, shape_info(api, context, input));
  return shape.empty() ? kUnknownSize : shape.back();
}

int64_t attribute(const Api& api, const ShapeInferContext* context, const char* name, int64_t absent) {
  const OpAttribute* attribute = nullptr;
  if (Status* status = api.ShapeInferContext_GetAttribute(context, name, &attribute)) {
    api.ReleaseStatus(status);
    return absent;
  }
  int64_t value = 0;
  size_t size = 0;
  check(api, api.ReadOpAttr(attribute, kInt, &value, sizeof value, &size));
  return value;
}

void set_output_like(const Api& api, const ShapeInferContext* context, size_t input, int64_t last_size,
                     ElementType type) {
  TensorInfo* info = shape_info(api, context, input);
  std::vector<int64_t> shape = shape_of(api, info);
  const size_t rank = shape.size();
  if (rank == 0) return;
  std::vector<const char*> pointers(rank);
  check(api, api.GetSymbolicDimensions(info, pointers.data(), rank));
  std::vector<std::string> names(pointers.begin(), pointers.end());
  shape.back() = last_size;
  names.back().clear();
  for (size_t i = 0; i < rank; ++i) {
    if (shape[i] < 0 && names[i].empty()) names[i] = fresh_name();
    pointers[i] = names[i].c_str();
  }
  if (type != kUndefined) check(api, api.SetTensorElementType(info, type));
  check(api, api.SetDimensions(info, shape.data(), rank));
  check(api, api.SetSymbolicDimensions(info, pointers.data(), rank));
  check(api, api.ShapeInferContext_SetOutputTypeShape(context, 0, info));
}

}  // namespace lsp::ort
