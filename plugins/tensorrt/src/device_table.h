// A tactic's table in the memory of the current device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace lsp_tensorrt {

// The device that calls go to. Throws std::runtime_error.
int current_device();

class DeviceTable {
 public:
  // Copies `size` bytes and waits until they are there. Throws std::runtime_error, also while the stream is captured.
  DeviceTable(const void* bytes, size_t size, cudaStream_t stream);
  ~DeviceTable();
  DeviceTable(const DeviceTable&) = delete;
  DeviceTable& operator=(const DeviceTable&) = delete;
  const void* get() const { return memory_; }

 private:
  void* memory_ = nullptr;
};

}  // namespace lsp_tensorrt
