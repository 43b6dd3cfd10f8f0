"""Graph passes: ONNX to ONNX, one rewrite a file. No analysis, no decisions, no I/O."""
