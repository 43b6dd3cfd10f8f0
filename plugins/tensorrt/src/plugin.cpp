#include "plugin.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "messages.h"

namespace lsp_tensorrt {
namespace {

using nvinfer1::DataType;

// Inputs, in their order.
enum { X, VALUES, BIAS, SCALE, RESIDUAL };

int32_t onnx_type(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return 1;
    case DataType::kINT8:
      return LSP_CUDA_INT8;
    case DataType::kHALF:
      return LSP_CUDA_FLOAT16;
    case DataType::kBF16:
      return LSP_CUDA_BFLOAT16;
    default:
      return 0;
  }
}

DataType tensorrt_type(int32_t onnx) {
  for (DataType type : {DataType::kFLOAT, DataType::kINT8, DataType::kHALF, DataType::kBF16})
    if (onnx_type(type) == onnx) return type;
  throw std::invalid_argument("out_type " + std::to_string(onnx) + " is none that the plugin writes");
}

bool has_sixteen_bits(DataType type) { return type == DataType::kHALF || type == DataType::kBF16; }

void require(bool holds, const char* otherwise) {
  if (!holds) throw std::invalid_argument(otherwise);
}

// Sizes that are not known yet, -1, fit everything.
bool fits(int64_t size, int64_t wanted) { return size == wanted || size == -1; }
bool is_vector(const nvinfer1::Dims& dims, int64_t size) { return dims.nbDims == 1 && fits(dims.d[0], size); }
bool ends_in(const nvinfer1::Dims& dims, int64_t size) { return dims.nbDims > 0 && fits(dims.d[dims.nbDims - 1], size); }

int64_t rows(const nvinfer1::Dims& dims) {
  int64_t product = 1;
  for (int i = 0; i < dims.nbDims - 1; ++i) product *= dims.d[i];
  return product;
}

}  // namespace

Plugin::Plugin(Attributes attributes) : attributes_(std::move(attributes)) {
  tensorrt_type(attributes_.out_type);
  if (attributes_.values_type != 0) layer_ = std::make_shared<Layer>(attributes_);
}

Plugin::Plugin(const Plugin& other) : attributes_(other.attributes_), layer_(other.layer_), tactic_(other.tactic_) {}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept {
  Plugin* copy = nullptr;
  guarded([&] { copy = new Plugin(*this); });
  return copy;
}

int32_t Plugin::getOutputDataTypes(Type* outputs, int32_t, const Type*, int32_t) const noexcept {
  return guarded([&] { outputs[0] = tensorrt_type(attributes_.out_type); });
}

int32_t Plugin::getOutputShapes(const Shape* inputs, int32_t count, const Shape*, int32_t, Shape* outputs, int32_t,
                                nvinfer1::IExprBuilder& builder) noexcept {
  return guarded([&] {
    require(count == RESIDUAL || count == RESIDUAL + 1, "it takes x, values, bias, scale and at most a residual");
    require(inputs[X].nbDims > 0, "its x has no dimensions");
    outputs[0] = inputs[X];
    outputs[0].d[inputs[X].nbDims - 1] = builder.constant(attributes_.N);
  });
}

bool Plugin::supportsFormatCombination(int32_t position, const DynamicTensor* tensors, int32_t input_count,
                                       int32_t) noexcept {
  const auto type = [&](int32_t i) { return tensors[i].desc.type; };
  const Type here = type(position), x = type(X);
  if (tensors[position].desc.format != nvinfer1::TensorFormat::kLINEAR) return false;
  const int32_t out = attributes_.out_type;
  if (position == input_count) return onnx_type(here) == out;
  switch (position) {
    case X:
      return attributes_.x_scale > 0 ? here == Type::kINT8 : has_sixteen_bits(here);
    case VALUES:
      return here == x;
    case BIAS:
    case SCALE:
      return here == Type::kFLOAT;
    case RESIDUAL:
      return out != LSP_CUDA_INT8 ? onnx_type(here) == out : x == Type::kINT8 ? has_sixteen_bits(here) : here == x;
  }
  return false;
}

int32_t Plugin::configurePlugin(const DynamicTensor* inputs, int32_t count, const DynamicTensor*, int32_t) noexcept {
  return guarded([&] {
    const Tensor* descs[RESIDUAL + 1];
    for (int i = 0; i < count && i <= RESIDUAL; ++i) descs[i] = &inputs[i].desc;
    set_up(descs, count);
  });
}

int32_t Plugin::onShapeChange(const Tensor* inputs, int32_t count, const Tensor*, int32_t) noexcept {
  return guarded([&] {
    const Tensor* descs[RESIDUAL + 1];
    for (int i = 0; i < count && i <= RESIDUAL; ++i) descs[i] = &inputs[i];
    set_up(descs, count);
  });
}

// Makes the layer where the types are new, and checks that all sizes are those of its attributes: an engine holds what a
// model said, and a model is untrusted.
void Plugin::set_up(const Tensor** inputs, int32_t count) {
  require(count == RESIDUAL || count == RESIDUAL + 1, "it takes x, values, bias, scale and at most a residual");
  const int32_t values_type = onnx_type(inputs[VALUES]->type);
  const int32_t residual_type = count > RESIDUAL ? onnx_type(inputs[RESIDUAL]->type) : 0;
  if (!layer_ || attributes_.values_type != values_type || attributes_.residual_type != residual_type) {
    attributes_.values_type = values_type;
    attributes_.residual_type = residual_type;
    layer_ = std::make_shared<Layer>(attributes_);
  }
  const auto& values = inputs[VALUES]->dims;
  require(onnx_type(inputs[X]->type) == values_type, "its x and its values have different types");
  require(ends_in(inputs[X]->dims, attributes_.K), "its x does not end in K");
  require(values.nbDims == 2 && fits(values.d[0], layer_->sub_blocks()) &&
              fits(values.d[1], values_type == LSP_CUDA_INT8 ? 512 : 256),
          "its values have another shape than the mask says");
  require(is_vector(inputs[BIAS]->dims, attributes_.N), "its bias does not have N entries");
  require(is_vector(inputs[SCALE]->dims, attributes_.N), "its scale does not have N entries");
  require(count == RESIDUAL || ends_in(inputs[RESIDUAL]->dims, attributes_.N), "its residual does not end in N");
}

// Tactic 0 is TensorRT's own; ours are counted from 1.
int32_t Plugin::getValidTactics(int32_t* tactics, int32_t count) noexcept {
  for (int32_t i = 0; i < count; ++i) tactics[i] = i + 1;
  return 0;
}

int32_t Plugin::setTactic(int32_t tactic) noexcept {
  return guarded([&] {
    require(tactic >= 0 && (!layer_ || tactic <= layer_->tactics()), "there is no such tactic");
    tactic_ = tactic;
  });
}

int32_t Plugin::enqueue(const Tensor* input_descs, const Tensor* output_descs, const void* const* inputs,
                        void* const* outputs, void*, cudaStream_t stream) noexcept {
  return guarded([&] {
    require(layer_ != nullptr, "it was not configured");
    const bool has_residual = attributes_.residual_type != 0;
    const int64_t M = rows(input_descs[X].dims);
    require(rows(output_descs[0].dims) == M && (!has_residual || rows(input_descs[RESIDUAL].dims) == M),
            "its inputs have different numbers of rows");
    if (M == 0) return;
    const Buffers buffers{inputs[X],
                          inputs[VALUES],
                          static_cast<const float*>(inputs[BIAS]),
                          static_cast<const float*>(inputs[SCALE]),
                          has_residual ? inputs[RESIDUAL] : nullptr,
                          outputs[0]};
    // Where TensorRT timed nothing, the one that is estimated to be the fastest for these rows.
    layer_->launch(tactic_ > 0 ? tactic_ - 1 : layer_->default_tactic(M), M, buffers, stream);
  });
}

nvinfer1::IPluginV3* Creator::createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                           nvinfer1::TensorRTPhase) noexcept {
  Plugin* plugin = nullptr;
  try {
    plugin = new Plugin(attributes_of(*fields));
  } catch (const std::exception& error) {
    log_error((std::string(name) + ": " + error.what()).c_str());
  }
  return plugin;
}

}  // namespace lsp_tensorrt
