"""The ONNX graph itself as a differentiable torch module: gradients need the file only, never the training code."""
