// The kernels there are, each defined in the file named for its instruction set.
#pragma once

#include "linear/kernel.h"

namespace lsp {

extern const Kernel kPortableFloat, kPortableBfloat16, kPortableInt8;
#if defined(__x86_64__)
extern const Kernel kAvx2Float, kAvx2Bfloat16, kAvx2Int8, kAvx2VnniInt8;
extern const Kernel kAvx512Float, kAvx512Bfloat16, kAvx512Int8, kAvx512VnniInt8, kAvx512Bf16;
#elif defined(__aarch64__)
extern const Kernel kNeonFloat, kNeonBfloat16, kNeonInt8, kNeonDotInt8;
#endif

}  // namespace lsp
