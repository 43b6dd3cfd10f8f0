"""The TensorRT plugin of lsp::BlockSparseLinear: in C++, and in Python as far as building an engine needs it."""
