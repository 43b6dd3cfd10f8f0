#include "linear/kernels.h"

namespace lsp {
namespace {

const Kernel* const kKernels[] = {
    &kPortableFloat,
    &kPortableBfloat16,
    &kPortableInt8,
};

}  // namespace

const Kernel& find_kernel(lsp_type type, Isa cap) {
  const Kernel* best = nullptr;
  for (const Kernel* kernel : kKernels) {
    if (kernel->type != type || kernel->isa > cap || !available(kernel->isa)) continue;
    if (best == nullptr || kernel->isa > best->isa) best = kernel;
  }
  return *best;
}

}  // namespace lsp
