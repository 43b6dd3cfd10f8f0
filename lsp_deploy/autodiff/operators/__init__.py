"""ONNX operators in torch, grouped by topic; `registry.OPERATORS` finds them by domain and name."""
