// The kernels there are, each defined in the file named for its instruction set.
#pragma once

#include "linear/kernel.h"

namespace lsp {

extern const Kernel kPortableFloat, kPortableBfloat16, kPortableInt8;

}  // namespace lsp
