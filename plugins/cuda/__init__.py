"""The GPU kernels of lsp::BlockSparseLinear: a C library (include/lsp_cuda.h) and its binding."""
