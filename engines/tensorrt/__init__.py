"""TensorRT 10.3 and later: engines built on the GPU that is present."""
