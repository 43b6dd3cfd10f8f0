// lsp::BlockSparseLinear as TensorRT's IPluginV3, with its creator.
#pragma once

#include <NvInferRuntime.h>

#include <memory>

#include "attributes.h"
#include "layer.h"

namespace lsp_tensorrt {

constexpr char NAME[] = "BlockSparseLinear", VERSION[] = "1", NAMESPACE[] = "lsp";

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
  using Type = nvinfer1::DataType;
  using Tensor = nvinfer1::PluginTensorDesc;
  using DynamicTensor = nvinfer1::DynamicPluginTensorDesc;
  using Shape = nvinfer1::DimsExprs;

 public:
  // Throws std::invalid_argument: what the kernels cannot do, where the types are known already.
  explicit Plugin(Attributes attributes);
  Plugin(const Plugin& other);

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;
  const char* getPluginName() const noexcept override { return NAME; }
  const char* getPluginVersion() const noexcept override { return VERSION; }
  const char* getPluginNamespace() const noexcept override { return NAMESPACE; }

  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t getOutputDataTypes(Type* outputs, int32_t output_count, const Type* inputs,
                             int32_t input_count) const noexcept override;
  int32_t getOutputShapes(const Shape* inputs, int32_t input_count, const Shape*, int32_t, Shape* outputs, int32_t,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const DynamicTensor* tensors, int32_t input_count,
                                 int32_t output_count) noexcept override;
  int32_t configurePlugin(const DynamicTensor* inputs, int32_t input_count, const DynamicTensor* outputs,
                          int32_t output_count) noexcept override;
  int32_t getNbTactics() noexcept override { return layer_ ? layer_->tactics() : 0; }
  int32_t getValidTactics(int32_t* tactics, int32_t count) noexcept override;
  const char* getTimingCacheID() noexcept override { return digest_.c_str(); }

  int32_t setTactic(int32_t tactic) noexcept override;
  int32_t onShapeChange(const Tensor* inputs, int32_t input_count, const Tensor* outputs,
                        int32_t output_count) noexcept override;
  int32_t enqueue(const Tensor* input_descs, const Tensor* output_descs, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return fields_.collection(); }

 private:
  void set_up(const Tensor** inputs, int32_t count);

  Attributes attributes_;
  Fields fields_{attributes_, true};
  std::string digest_ = digest(attributes_);
  std::shared_ptr<Layer> layer_;  // once the types are known
  int32_t tactic_ = 0;
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  const char* getPluginName() const noexcept override { return NAME; }
  const char* getPluginVersion() const noexcept override { return VERSION; }
  const char* getPluginNamespace() const noexcept override { return NAMESPACE; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return names_.collection(); }
  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;

 private:
  // TensorRT hands over only attributes that are listed here. Those that are lists must not be empty to be listed.
  Attributes all_ = [] {
    Attributes all;
    all.col_ptr = all.k_idx = {0};
    return all;
  }();
  Fields names_{all_, false};
};

}  // namespace lsp_tensorrt
