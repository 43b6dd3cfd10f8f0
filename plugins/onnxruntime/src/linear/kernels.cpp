#include "linear/kernels.h"

namespace lsp {
namespace {

const Kernel* const kKernels[] = {
    &kPortableFloat,  &kPortableBfloat16, &kPortableInt8,
#if defined(__x86_64__)
    &kAvx2Float,      &kAvx2Bfloat16,     &kAvx2Int8,       &kAvx2VnniInt8, &kAvx512Float,
    &kAvx512Bfloat16, &kAvx512Int8,       &kAvx512VnniInt8, &kAvx512Bf16,
#elif defined(__aarch64__)
    &kNeonFloat,     &kNeonBfloat16,     &kNeonInt8,     &kNeonDotInt8,
#endif
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
