#pragma once

#include "lsp_cpu.h"

namespace lsp {

// Returns NULL if the description is complete and consistent, else what is wrong with it.
const char* check_description(const lsp_linear_desc& desc);

}  // namespace lsp
