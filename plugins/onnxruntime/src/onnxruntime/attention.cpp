// lsp::Attention in ONNX Runtime; docs/operator.md defines it.
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

using AttentionKernel = std::unique_ptr<lsp_attention, void (*)(lsp_attention*)>;
using Shape = std::vector<int64_t>;

constexpr int64_t kMaxHeads = int64_t{1} << 24;  // far from where products of sizes overflow

// Where q, k and v lie, and how many rows and columns they have.
struct Operands {
  lsp_rows q, k, v;
  int64_t batch, queries, keys, width;
};

struct Bias {
  const float* data;
  int64_t batches, heads;
};

void require(bool condition, const std::string& reason) {
  if (!condition) throw std::runtime_error(reason);
}

lsp_rows dense_rows(const float* data, int64_t rows, int64_t row_stride) {
  return {data, rows * row_stride, row_stride};
}

Operands packed_operands(const Input& qkv, int64_t heads) {
  require(qkv.shape.size() == 3 && qkv.shape[2] % (3 * heads) == 0,
          "qkv is " + text_of(qkv.shape) + ", not [B, S, 3 * num_heads * D]");
  const int64_t width = qkv.shape[2] / 3;
  const auto part = [&](int64_t index) {
    return dense_rows(qkv.floats() + index * width, qkv.shape[1], 3 * width);
  };
  return {part(0), part(1), part(2), qkv.shape[0], qkv.shape[1], qkv.shape[1], width};
}

Operands separate_operands(const Input& q, const Input& k, const Input& v, int64_t heads) {
  require(q.shape.size() == 3 && q.shape[2] % heads == 0, "q is " + text_of(q.shape) + ", not [B, S, num_heads * D]");
  require(k.shape.size() == 3 && k.shape[0] == q.shape[0] && k.shape[2] == q.shape[2],
          "k is " + text_of(k.shape) + ", but q is " + text_of(q.shape) + ": only the number of rows may differ");
  require(v.shape == k.shape, "v is " + text_of(v.shape) + ", but k is " + text_of(k.shape));
  const int64_t width = q.shape[2];
  return {dense_rows(q.floats(), q.shape[1], width), dense_rows(k.floats(), k.shape[1], width),
          dense_rows(v.floats(), v.shape[1], width), q.shape[0], q.shape[1], k.shape[1], width};
}

Bias bias_of(const Input& bias, const Operands& operands, int64_t heads) {
  if (bias.data == nullptr) return {nullptr, 1, 1};
  const Shape& shape = bias.shape;
  require(shape.size() == 4 && shape[0] > 0 && operands.batch % shape[0] == 0 && (shape[1] == 1 || shape[1] == heads) &&
              shape[2] == operands.queries && shape[3] == operands.keys,
          "bias is " + text_of(shape) + ", which does not broadcast over its first two sizes to [B, H, S, T] = " +
              text_of({operands.batch, heads, operands.queries, operands.keys}));
  return {bias.floats(), shape[0], shape[1]};
}

// Throws the reason where there is no such kernel.
AttentionKernel make_attention(const lsp_attention_desc& desc) {
  lsp_attention* attention = nullptr;
  if (const char* reason = lsp_attention_create(&desc, nullptr, &attention)) throw std::runtime_error(reason);
  return AttentionKernel(attention, lsp_attention_destroy);
}

lsp_type compute_of(const Node& node) {
  const std::string compute = node.text("compute");
  if (compute == "float32") return LSP_FLOAT32;
  if (compute == "bfloat16") return LSP_BFLOAT16;
  node.refuse("compute \"" + compute + "\" is neither float32 nor bfloat16");
}

struct Kernel {
  const Api& api;
  AttentionKernel attention;  // for the head size that the graph tells, if it does
  lsp_attention_desc desc;
  bool packed;
  int threads;

  void run(KernelContext* context) const {
    Call call(api, context, threads);
    const int64_t heads = desc.heads;
    const Operands operands = packed ? packed_operands(call.input(0), heads)
                                     : separate_operands(call.input(0), call.input(1), call.input(2), heads);
    const Bias bias = bias_of(call.input(packed ? 1 : 3), operands, heads);
    auto* y = static_cast<float*>(call.output({operands.batch, operands.queries, operands.width}));
    const auto run_with = [&](const lsp_attention* with) {
      call.check_run(lsp_attention_run(with, operands.batch, operands.queries, operands.keys, operands.q, operands.k,
                                       operands.v, bias.data, bias.batches, bias.heads, y, call.pool()));
    };
    lsp_attention_desc met = desc;
    met.head_size = operands.width / heads;
    if (attention != nullptr && met.head_size == desc.head_size) {
      run_with(attention.get());
    } else {
      run_with(make_attention(met).get());  // cheap: nothing is packed beforehand
    }
  }
};

struct Attention : CustomOp {
  static constexpr const char* kName = "Attention";
  static constexpr size_t kInputs = 4;
  static constexpr size_t kRequiredInputs = 1;
  static constexpr Characteristic kOutput = kRequired;

  Runtime runtime;
  ElementType type;

  Attention(const Runtime& in, ElementType of) : CustomOp{}, runtime(in), type(of) { set_callbacks(*this); }

  ElementType input_type(size_t) const { return type; }
  ElementType output_type() const { return type; }

  void infer_shape(ShapeInferContext* context) const {
    const Api& api = *runtime.api;
    const bool packed = input_count(api, context) < 3;
    const int64_t width = last_size(api, context, 0);
    set_output_like(api, context, 0, packed && width > 0 ? width / 3 : width);
  }

  std::unique_ptr<Kernel> make(const KernelInfo* info) const {
    const Node node(runtime, info, kName);
    node.require_version();
    node.require(type == kFloat, std::string("its inputs are ") + name_of(type) +
                                     ", not float32; lsp-deploy lower writes it in standard operators");
    const int64_t packed = node.integer("packed_qkv");
    node.require(packed == 0 || packed == 1, "packed_qkv is " + std::to_string(packed) + ", not 0 or 1");
    const size_t operands = packed == 1 ? 1 : 3;
    const size_t inputs = node.input_count();
    node.require(inputs == operands || inputs == operands + 1,
                 "it has " + std::to_string(inputs) + " inputs, not " + std::to_string(operands) +
                     " or, with a bias, one more");
    lsp_attention_desc desc{};
    desc.heads = node.integer("num_heads");
    node.require(desc.heads > 0 && desc.heads <= kMaxHeads, "num_heads is " + std::to_string(desc.heads));
    desc.scale = node.real("scale");
    desc.compute = compute_of(node);
    const Shape shape = node.input_type(0).shape;
    const int64_t parts = desc.heads * (packed == 1 ? 3 : 1);
    AttentionKernel attention(nullptr, lsp_attention_destroy);
    if (!shape.empty() && shape.back() > 0) {
      node.require(shape.back() % parts == 0, "the last size of its first input is " + std::to_string(shape.back()) +
                                                  ", no multiple of " + std::to_string(parts));
      desc.head_size = shape.back() / parts;
      try {
        attention = make_attention(desc);
      } catch (const std::runtime_error& error) {
        node.refuse(error.what());
      }
    }
    return std::unique_ptr<Kernel>(
        new Kernel{*runtime.api, std::move(attention), desc, packed == 1, node.threads()});
  }
};

}  // namespace

std::vector<CustomOp*> attention_operators(const Runtime& runtime) {
  return {new Attention(runtime, kFloat), new Attention(runtime, kFloat16), new Attention(runtime, kBFloat16)};
}

}  // namespace lsp::ort
