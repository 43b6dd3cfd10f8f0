"""The operator lsp::Attention: its definition, what it computes, and the same in standard operators."""
