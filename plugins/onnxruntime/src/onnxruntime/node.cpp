#include "node.h"

#include <sched.h>

#include <cstdlib>
#include <memory>
#include <stdexcept>

namespace lsp::ort {

std::string message_of(const Api& api, Status* status) {
  std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  return message;
}

void check(const Api& api, Status* status) {
  if (status != nullptr) throw std::runtime_error(message_of(api, status));
}

std::vector<int64_t> shape_of(const Api& api, const TensorInfo* info) {
  size_t rank = 0;
  check(api, api.GetDimensionsCount(info, &rank));
  std::vector<int64_t> shape(rank);
  check(api, api.GetDimensions(info, shape.data(), rank));
  return shape;
}

std::string text_of(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

const char* name_of(ElementType type) {
  switch (type) {
    case kFloat: return "float32";
    case kInt8: return "int8";
    case kFloat16: return "float16";
    case kBFloat16: return "bfloat16";
    default: return "of another element type";
  }
}

Node::Node(const Runtime& runtime, const KernelInfo* info, const char* op_type)
    : api_(*runtime.api), config_api_(runtime.config_api), info_(info) {
  size_t size = 0;
  check(api_.KernelInfo_GetNodeName(info, nullptr, &size));
  std::vector<char> name(size + 1);
  check(api_.KernelInfo_GetNodeName(info, name.data(), &size));
  prefix_ = std::string("lsp::") + op_type + " \"" + name.data() + "\": ";
}

void Node::refuse(const std::string& reason) const { throw std::runtime_error(prefix_ + reason); }

void Node::require(bool condition, const std::string& reason) const {
  if (!condition) refuse(reason);
}

void Node::require_version() const {
  const std::string version = text("plugin_version", "1");
  require(version == "1", "plugin_version " + version + " is not known here; a newer lsp-deploy wrote it");
}

int64_t Node::integer(const char* name) const {
  int64_t value = 0;
  if (!is_there(api_.KernelInfoGetAttribute_int64(info_, name, &value))) {
    refuse(std::string("attribute ") + name + " is missing or no integer");
  }
  return value;
}

int64_t Node::integer(const char* name, int64_t absent) const { return has(name) ? integer(name) : absent; }

float Node::real(const char* name) const {
  float value = 0;
  if (!is_there(api_.KernelInfoGetAttribute_float(info_, name, &value))) {
    refuse(std::string("attribute ") + name + " is missing or no float");
  }
  return value;
}

float Node::real(const char* name, float absent) const { return has(name) ? real(name) : absent; }

std::string Node::text(const char* name) const {
  size_t size = 0;
  if (!is_there(api_.KernelInfoGetAttribute_string(info_, name, nullptr, &size))) {
    refuse(std::string("attribute ") + name + " is missing or no string");
  }
  std::vector<char> value(size + 1);
  check(api_.KernelInfoGetAttribute_string(info_, name, value.data(), &size));
  return value.data();
}

std::string Node::text(const char* name, const char* absent) const { return has(name) ? text(name) : absent; }

std::vector<int64_t> Node::integers(const char* name) const {
  size_t count = 0;
  const bool found = is_there(api_.KernelInfoGetAttributeArray_int64(info_, name, nullptr, &count));
  // ONNX Runtime gives an attribute of another type as an empty list.
  if (!found || (count == 0 && has_single(name))) {
    refuse(std::string("attribute ") + name + " is missing or no list of integers");
  }
  std::vector<int64_t> values(count);
  if (count > 0) check(api_.KernelInfoGetAttributeArray_int64(info_, name, values.data(), &count));
  return values;
}

std::vector<int64_t> Node::integers_or_none(const char* name) const {
  return has(name) ? integers(name) : std::vector<int64_t>();
}

size_t Node::input_count() const {
  size_t count = 0;
  check(api_.KernelInfo_GetInputCount(info_, &count));
  return count;
}

size_t Node::output_count() const {
  size_t count = 0;
  check(api_.KernelInfo_GetOutputCount(info_, &count));
  return count;
}

TensorType Node::input_type(size_t index) const {
  TypeInfo* info = nullptr;
  check(api_.KernelInfo_GetInputTypeInfo(info_, index, &info));
  return tensor_type(info);
}

TensorType Node::output_type(size_t index) const {
  TypeInfo* info = nullptr;
  check(api_.KernelInfo_GetOutputTypeInfo(info_, index, &info));
  return tensor_type(info);
}

Constant Node::constant(size_t input, const char* name) const {
  const std::string described = std::string("input ") + std::to_string(input) + " (" + name + ")";
  require(input < input_count(), described + " is missing");
  int is_constant = 0;
  const Value* value = nullptr;
  check(api_.KernelInfoGetConstantInput_tensor(info_, input, &is_constant, &value));
  require(is_constant != 0 && value != nullptr, described + " must be a constant: an initializer");
  TensorInfo* owned = nullptr;
  check(api_.GetTensorTypeAndShape(value, &owned));
  const std::unique_ptr<TensorInfo, void (*)(TensorInfo*)> info(owned, api_.ReleaseTensorTypeAndShapeInfo);
  void* data = nullptr;
  // The interface has no function that leaves a tensor constant; nothing is written through this one.
  check(api_.GetTensorMutableData(const_cast<Value*>(value), &data));
  return {shape_of(api_, info.get()), data};
}

int Node::threads() const {
  if (config_api_ != nullptr) {
    KeyValuePairs* owned = nullptr;
    check(config_api_->KernelInfo_GetConfigEntries(info_, &owned));
    const std::unique_ptr<KeyValuePairs, void (*)(KeyValuePairs*)> entries(owned, config_api_->ReleaseKeyValuePairs);
    const char* threads = config_api_->GetKeyValue(entries.get(), "lsp.threads");
    if (threads != nullptr && std::atoi(threads) > 0) return std::atoi(threads);
  }
  cpu_set_t allowed;
  return sched_getaffinity(0, sizeof allowed, &allowed) == 0 ? CPU_COUNT(&allowed) : 0;
}

void Node::check(Status* status) const {
  if (status != nullptr) refuse(message_of(api_, status));
}

bool Node::is_there(Status* status) const {
  if (status == nullptr) return true;
  api_.ReleaseStatus(status);
  return false;
}

TensorType Node::tensor_type(TypeInfo* owned) const {
  const std::unique_ptr<TypeInfo, void (*)(TypeInfo*)> info(owned, api_.ReleaseTypeInfo);
  const TensorInfo* tensor = nullptr;
  check(api_.CastTypeInfoToTensorInfo(info.get(), &tensor));
  require(tensor != nullptr, "an input or output is not a tensor");
  TensorType type{kUndefined, shape_of(api_, tensor)};
  check(api_.GetTensorElementType(tensor, &type.type));
  return type;
}

// Whether there is an attribute of this name, of whatever type: one of a wrong type is refused, not taken for absent.
bool Node::has(const char* name) const {
  size_t size = 0;
  return has_single(name) || is_there(api_.KernelInfoGetAttributeArray_int64(info_, name, nullptr, &size));
}

bool Node::has_single(const char* name) const {
  int64_t integer = 0;
  float real = 0;
  size_t size = 0;
  return is_there(api_.KernelInfoGetAttribute_int64(info_, name, &integer)) ||
         is_there(api_.KernelInfoGetAttribute_float(info_, name, &real)) ||
         is_there(api_.KernelInfoGetAttribute_string(info_, name, nullptr, &size));
}

}  // namespace lsp::ort
