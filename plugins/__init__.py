"""The block-sparse operator: one definition for ONNX Runtime and TensorRT."""
