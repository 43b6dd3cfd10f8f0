// The C interface of BlockSparseLinear.
#include <cinttypes>
#include <memory>
#include <new>
#include <string>

#include "error.h"
#include "linear/description.h"
#include "linear/kernel.h"
#include "linear/panels.h"
#include "linear/run.h"
#include "lsp_cpu.h"

using lsp::error;

struct lsp_linear {
  lsp::Layer layer;
  std::string name;
};

const char* lsp_linear_create(const lsp_linear_desc* desc, const char* isa, lsp_linear** out) {
  lsp::Isa cap{};
  if (const char* why = lsp::find_isa_cap(isa, cap)) return why;
  if (const char* why = lsp::check_description(*desc)) return why;
  try {
    auto linear = std::make_unique<lsp_linear>();
    lsp::Layer& layer = linear->layer;
    layer.kernel = &lsp::find_kernel(desc->values_type, cap);
    layer.panels = lsp::pack_panels(*desc, *layer.kernel);
    layer.K = desc->K;
    layer.N = desc->N;
    layer.x_type = desc->x_type;
    if (desc->values_type == LSP_INT8) layer.quantization = {desc->x_offset, 1.0F / desc->x_scale};
    layer.epilogue.activation = desc->activation;
    layer.epilogue.out_type = desc->out_type;
    if (desc->out_type == LSP_INT8) layer.epilogue.out = {desc->out_offset, 1.0F / desc->out_scale};
    linear->name = std::string(layer.kernel->name) + " " + std::to_string(layer.panels.shape.rows) + "x" +
                   std::to_string(layer.panels.shape.columns);
    *out = linear.release();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return error("out of memory: the weights of a layer of %" PRId64 " x %" PRId64 " do not fit", desc->K, desc->N);
  }
}

const char* lsp_linear_run(const lsp_linear* linear, int64_t M, const void* x, const float* residual, void* y,
                           const lsp_pool* pool) {
  if (M < 0) return error("M is %" PRId64 ", less than 0", M);
  if (M == 0) return nullptr;
  if (!lsp::run_layer(linear->layer, M, x, residual, y, pool)) {
    return error("out of memory: the activations of %" PRId64 " rows do not fit", M);
  }
  return nullptr;
}

void lsp_linear_destroy(lsp_linear* linear) { delete linear; }

const char* lsp_linear_kernel(const lsp_linear* linear) { return linear->name.c_str(); }
