#include "tiles.h"

lsp_cuda::Kernels lsp_cuda::float16_kernels() { return kernels_of<Float16>(); }
