"""TensorRT-RTX: engines built in a child process, on machines without a GPU as well."""
