// lsp::BlockSparseLinear in ONNX Runtime; docs/operator.md defines it.
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "call.h"
#include "lsp_cpu.h"
#include "node.h"
#include "operator.h"
#include "registration.h"
#include "shapes.h"

namespace lsp::ort {

namespace {

enum InputIndex : size_t { kX, kValues, kBias, kScale, kResidual };

using Linear = std::unique_ptr<lsp_linear, void (*)(lsp_linear*)>;

struct Kernel {
  const Api& api;
  Linear linear;
  int64_t K, N;
  int threads;

  void run(KernelContext* context) const {
    Call call(api, context, threads);
    const Input x = call.input(kX);
    if (x.shape.empty() || x.shape.back() != K) {
      throw std::runtime_error("x is " + text_of(x.shape) + ", but its last size must be K = " + std::to_string(K));
    }
    std::vector<int64_t> shape = x.shape;
    shape.back() = N;
    const Input residual = call.input(kResidual);
    if (residual.data != nullptr && residual.shape != shape) {
      throw std::runtime_error("residual is " + text_of(residual.shape) + ", but y is " + text_of(shape));
    }
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
    void* y = call.output(shape);
    if (rows == 0) return;
    call.check_run(lsp_linear_run(linear.get(), rows, x.data, residual.floats(), y, call.pool()));
  }
};

lsp_activation activation_of(const Node& node) {
  const std::string name = node.text("activation", "none");
  if (name == "none") return LSP_NONE;
  if (name == "gelu") return LSP_GELU;
  if (name == "gelu_tanh") return LSP_GELU_TANH;
  if (name == "relu") return LSP_RELU;
  node.refuse("activation \"" + name + "\" is not one of none, gelu, gelu_tanh, relu");
}

const float* per_column(const Node& node, InputIndex input, const char* name, int64_t N) {
  const Constant constant = node.constant(input, name);
  node.require(constant.shape == std::vector<int64_t>{N},
               std::string(name) + " is " + text_of(constant.shape) + ", not [N] = [" + std::to_string(N) + "]");
  return static_cast<const float*>(constant.data);
}

struct BlockSparseLinear : CustomOp {
  static constexpr const char* kName = "BlockSparseLinear";
  static constexpr size_t kInputs = 5;
  static constexpr size_t kRequiredInputs = 4;
  // The attribute out_type says what y is. ONNX Runtime leaves an output's type to infer_shape only where it is
  // undefined here, and lets it be undefined only where the output need not be there. (Releases before 1.20 take the
  // type from the graph's value_info alone.)
  static constexpr Characteristic kOutput = kOptional;

  Runtime runtime;
  ElementType x_type, values_type;

  BlockSparseLinear(const Runtime& in, ElementType x, ElementType values)
      : CustomOp{}, runtime(in), x_type(x), values_type(values) {
    set_callbacks(*this);
  }

  ElementType input_type(size_t index) const { return index == kX ? x_type : index == kValues ? values_type : kFloat; }
  ElementType output_type() const { return kUndefined; }

  void infer_shape(ShapeInferContext* context) const {
    const Api& api = *runtime.api;
    const auto type = static_cast<ElementType>(attribute(api, context, "out_type", kFloat));
    set_output_like(api, context, kX, last_size(api, context, kBias), type);
  }

  std::unique_ptr<Kernel> make(const KernelInfo* info) const {
    const Node node(runtime, info, kName);
    node.require_version();
    refuse_types(node);
    const std::string layout = node.text("layout", "canonical");
    node.require(layout != "bsl16.v1", "its layout bsl16.v1 is for GPUs; convert the model first: lsp-deploy lower");
    node.require(layout == "canonical", "layout \"" + layout + "\" is unknown here");

    lsp_linear_desc desc{};
    desc.K = node.integer("K");
    desc.N = node.integer("N");
    desc.block_k = node.integer("block_k");
    desc.block_n = node.integer("block_n");
    const std::vector<int64_t> x = node.input_type(kX).shape;
    node.require(x.empty() || x.back() < 0 || x.back() == desc.K,
                 "x is " + text_of(x) + ", but its last size must be K = " + std::to_string(desc.K));
    const std::vector<int64_t> col_ptr = node.integers("col_ptr");
    const std::vector<int64_t> k_idx = node.integers_or_none("k_idx");
    desc.col_ptr = col_ptr.data();
    desc.col_ptr_count = col_ptr.size();
    desc.k_idx = k_idx.data();
    desc.k_idx_count = k_idx.size();
    const Constant values = node.constant(kValues, "values");
    node.require(values.shape.size() == 3 && values.shape[1] == desc.block_k && values.shape[2] == desc.block_n,
                 "values is " + text_of(values.shape) + ", not [blocks, block_k, block_n] = [..., " +
                     std::to_string(desc.block_k) + ", " + std::to_string(desc.block_n) + "]");
    desc.values_type = static_cast<lsp_type>(values_type);
    desc.values = values.data;
    desc.values_count = static_cast<size_t>(values.shape[0] * values.shape[1] * values.shape[2]);
    desc.bias = per_column(node, kBias, "bias", desc.N);
    desc.scale = per_column(node, kScale, "scale", desc.N);
    desc.activation = activation_of(node);
    desc.x_type = static_cast<lsp_type>(x_type);
    desc.x_scale = node.real("x_scale", 0);
    desc.x_offset = node.real("x_offset", 0);
    desc.out_type = static_cast<lsp_type>(out_type_of(node));
    desc.out_scale = node.real("out_scale", 0);
    desc.out_offset = node.real("out_offset", 0);

    lsp_linear* linear = nullptr;
    if (const char* reason = lsp_linear_create(&desc, nullptr, &linear)) node.refuse(reason);
    return std::unique_ptr<Kernel>(
        new Kernel{*runtime.api, Linear(linear, lsp_linear_destroy), desc.K, desc.N, node.threads()});
  }

 private:
  void refuse_types(const Node& node) const {
    for (const ElementType type : {x_type, values_type}) {
      node.require(type != kFloat16, "float16 is for GPUs; lsp-deploy lower writes it in standard operators");
    }
    const bool quantized = x_type == kInt8;
    const bool known = x_type == kFloat || (quantized && values_type == kInt8);
    node.require(known, std::string("x is ") + name_of(x_type) + " and values is " + name_of(values_type) +
                            ": x must be float32, or int8 where values is int8");
  }

  static ElementType out_type_of(const Node& node) {
    const int64_t type = node.integer("out_type", kFloat);
    node.require(type == kFloat || type == kInt8, "out_type is " + std::to_string(type) +
                                                      "; on a CPU y is float32 (1) or int8 (3)");
    node.require(node.output_count() == 1, "it must have one output");
    const ElementType given = node.output_type(0).type;
    node.require(given == type, std::string("out_type says ") + name_of(static_cast<ElementType>(type)) +
                                    ", but in the graph y is " + name_of(given));
    return given;
  }
};

}  // namespace

std::vector<CustomOp*> block_sparse_linear_operators(const Runtime& runtime) {
  std::vector<CustomOp*> operators;
  for (const ElementType x : {kFloat, kInt8, kFloat16, kBFloat16}) {
    for (const ElementType values : {kFloat, kBFloat16, kInt8, kFloat16}) {
      operators.push_back(new BlockSparseLinear(runtime, x, values));
    }
  }
  return operators;
}

}  // namespace lsp::ort
