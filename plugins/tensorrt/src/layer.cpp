#include "layer.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>

namespace lsp_tensorrt {
namespace {

lsp_cuda_activation activation_of(const std::string& name) {
  const char* names[] = {"none", "gelu", "gelu_tanh", "relu"};  // in the order of lsp_cuda_activation
  const auto found = std::find(std::begin(names), std::end(names), name);
  if (found == std::end(names)) throw std::invalid_argument("activation " + name + " is unknown");
  return static_cast<lsp_cuda_activation>(found - std::begin(names));
}

}  // namespace

Layer::Layer(const Attributes& a) {
  const std::vector<int64_t> col_ptr(a.col_ptr.begin(), a.col_ptr.end()), k_idx(a.k_idx.begin(), a.k_idx.end());
  lsp_cuda_desc desc{};
  desc.K = a.K;
  desc.N = a.N;
  desc.block_k = a.block_k;
  desc.block_n = a.block_n;
  desc.col_ptr = col_ptr.data();
  desc.col_ptr_count = col_ptr.size();
  desc.k_idx = k_idx.data();
  desc.k_idx_count = k_idx.size();
  desc.values_type = static_cast<lsp_cuda_type>(a.values_type);
  desc.activation = activation_of(a.activation);
  desc.out_type = static_cast<lsp_cuda_type>(a.out_type);
  desc.out_scale = a.out_scale;
  desc.out_offset = a.out_offset;
  desc.residual_type = static_cast<lsp_cuda_type>(a.residual_type);
  lsp_cuda_plan* plan = nullptr;
  if (const char* error = lsp_cuda_plan_create(&desc, &plan)) throw std::invalid_argument(error);
  plan_.reset(plan);
}

int Layer::default_tactic(int64_t M) const {
  int tactic = 0;
  if (const char* error = lsp_cuda_default_tactic(plan_.get(), M, &tactic)) throw std::runtime_error(error);
  return tactic;
}

void Layer::launch(int tactic, int64_t M, const Buffers& b, cudaStream_t stream) {
  const void* memory = table(tactic, stream);
  if (const char* error = lsp_cuda_launch(plan_.get(), tactic, M, b.x, b.values, b.bias, b.scale, b.residual, b.y,
                                          memory, stream))
    throw std::runtime_error(error);
}

const void* Layer::table(int tactic, cudaStream_t stream) {
  const std::pair key(current_device(), tactic);
  const std::lock_guard lock(mutex_);
  auto found = tables_.find(key);
  if (found == tables_.end()) {
    size_t size;
    const void* bytes = lsp_cuda_table(plan_.get(), tactic, &size);
    found = tables_.try_emplace(key, bytes, size, stream).first;
  }
  return found->second.get();
}

}  // namespace lsp_tensorrt
