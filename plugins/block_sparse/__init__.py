"""The operator lsp::BlockSparseLinear: its definition, how its weight is stored, and what it computes."""
