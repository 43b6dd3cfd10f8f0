#include "registration.h"

#include <cstdio>
#include <map>
#include <mutex>

#include "node.h"
#include "operator.h"

namespace lsp::ort {

namespace {

// An ONNX Runtime that is asked for a level it does not have writes a complaint to stderr.
bool has_level(const ApiBase& base, uint32_t level) {
  unsigned major = 0, minor = 0;
  const int found = std::sscanf(base.GetVersionString(), "%u.%u", &major, &minor);
  return found == 2 && (major > 1 || minor >= level);
}

Runtime runtime_of(const ApiBase& base) {
  return {base.GetApi(kApiLevel), has_level(base, kConfigApiLevel) ? base.GetApi(kConfigApiLevel) : nullptr};
}

CustomOpDomain* make_domain(const Runtime& runtime) {
  const Api& api = *runtime.api;
  CustomOpDomain* domain = nullptr;
  check(api, api.CreateCustomOpDomain("lsp", &domain));
  for (const auto& operators : {block_sparse_linear_operators(runtime), attention_operators(runtime)}) {
    for (CustomOp* op : operators) check(api, api.CustomOpDomain_Add(domain, op));
  }
  return domain;
}

// One domain for each ONNX Runtime in the process. It outlives every session that has it, so it is never freed.
CustomOpDomain* domain_of(const Runtime& runtime) {
  static std::mutex mutex;
  static auto* domains = new std::map<const Api*, CustomOpDomain*>;
  const std::lock_guard<std::mutex> lock(mutex);
  CustomOpDomain*& domain = (*domains)[runtime.api];
  if (domain == nullptr) domain = make_domain(runtime);
  return domain;
}

}  // namespace

}  // namespace lsp::ort

// What ONNX Runtime calls when it loads this library.
extern "C" __attribute__((visibility("default"))) lsp::ort::Status* RegisterCustomOps(
    lsp::ort::SessionOptions* options, const lsp::ort::ApiBase* base) {
  using namespace lsp::ort;
  const Api* api = base->GetApi(kApiLevel);
  if (api == nullptr) return base->GetApi(1)->CreateStatus(kFail, "the lsp operators need ONNX Runtime 1.17 or newer");
  return guarded(*api, kFail, [&] {
    check(*api, api->AddCustomOpDomain(options, domain_of(runtime_of(*base))));
  });
}
