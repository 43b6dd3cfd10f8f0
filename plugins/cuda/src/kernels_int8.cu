#include "tiles.h"

lsp_cuda::Kernels lsp_cuda::int8_kernels() { return kernels_of<Int8>(); }
