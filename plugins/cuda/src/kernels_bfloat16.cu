#include "tiles.h"

lsp_cuda::Kernels lsp_cuda::bfloat16_kernels() { return kernels_of<BFloat16>(); }
