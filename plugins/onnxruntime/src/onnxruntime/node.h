// A node of the model, as a kernel reads it when it is made.
#ifndef LSP_ONNXRUNTIME_NODE_H
#define LSP_ONNXRUNTIME_NODE_H

#include <string>
#include <vector>

#include "abi.h"

namespace lsp::ort {

// A constant input; `data` belongs to ONNX Runtime and lives as long as the session.
struct Constant {
  std::vector<int64_t> shape;
  const void* data;
};

// What the graph says of a value; an unknown size is -1, an unknown shape empty.
struct TensorType {
  ElementType type;
  std::vector<int64_t> shape;
};

// Whatever is wrong with the node is thrown as a std::runtime_error that names it.
class Node {
 public:
  Node(const Runtime& runtime, const KernelInfo* info, const char* op_type);

  [[noreturn]] void refuse(const std::string& reason) const;
  void require(bool condition, const std::string& reason) const;
  void require_version() const;  // of the operator's definition: attribute plugin_version

  int64_t integer(const char* name) const;
  int64_t integer(const char* name, int64_t absent) const;
  float real(const char* name) const;
  float real(const char* name, float absent) const;
  std::string text(const char* name) const;
  std::string text(const char* name, const char* absent) const;
  std::vector<int64_t> integers(const char* name) const;
  std::vector<int64_t> integers_or_none(const char* name) const;

  size_t input_count() const;
  size_t output_count() const;
  TensorType input_type(size_t index) const;
  TensorType output_type(size_t index) const;
  Constant constant(size_t input, const char* name) const;

  int threads() const;  // of the session's pool where the session says it, else the CPUs that this process may use

 private:
  void check(Status* status) const;
  bool is_there(Status* status) const;
  bool has(const char* name) const;
  bool has_single(const char* name) const;
  TensorType tensor_type(TypeInfo* owned) const;

  const Api& api_;
  const Api* config_api_;
  const KernelInfo* info_;
  std::string prefix_;
};

// Returns what `status` says, and frees it.
std::string message_of(const Api& api, Status* status);

// Throws where `status` is an error.
void check(const Api& api, Status* status);

std::vector<int64_t> shape_of(const Api& api, const TensorInfo* info);

// "[1, 197, 384]"
std::string text_of(const std::vector<int64_t>& shape);

const char* name_of(ElementType type);

}  // namespace lsp::ort

#endif
