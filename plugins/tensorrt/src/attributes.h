// What a node says, and how TensorRT hands it over and stores it: as plugin fields.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

namespace lsp_tensorrt {

// Names and defaults are those of docs/operator.md. The last two are no attributes: they follow from the inputs, and are
// stored with an engine so that it can be made ready before it sees any.
struct Attributes {
  int32_t K = 0, N = 0, block_k = 0, block_n = 0;
  std::vector<int32_t> col_ptr, k_idx;
  std::string activation = "none", layout = "canonical";
  float x_scale = 0, x_offset = 0;
  int32_t out_type = 1;
  float out_scale = 0, out_offset = 0;
  int32_t values_type = 0, residual_type = 0;
};

// Throws std::invalid_argument with what is wrong with the fields.
Attributes attributes_of(const nvinfer1::PluginFieldCollection& fields);

// The fields of some attributes. It points into both: neither may move.
class Fields {
 public:
  Fields(const Attributes& attributes, bool with_types);
  Fields(const Fields&) = delete;
  Fields& operator=(const Fields&) = delete;
  const nvinfer1::PluginFieldCollection* collection() const { return &collection_; }

 private:
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

// A hash of all that the node says, as text.
std::string digest(const Attributes& attributes);

}  // namespace lsp_tensorrt
