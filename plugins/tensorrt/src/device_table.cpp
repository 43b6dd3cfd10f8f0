#include "device_table.h"

#include <stdexcept>
#include <string>

namespace lsp_tensorrt {
namespace {

void require(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

}  // namespace

int current_device() {
  int device;
  require(cudaGetDevice(&device));
  return device;
}

DeviceTable::DeviceTable(const void* bytes, size_t size, cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  require(cudaStreamIsCapturing(stream, &status));
  if (status != cudaStreamCaptureStatusNone)
    throw std::runtime_error("run the engine once at these shapes before capturing it into a CUDA graph");
  require(cudaMalloc(&memory_, size));
  cudaError_t error = cudaMemcpyAsync(memory_, bytes, size, cudaMemcpyHostToDevice, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);  // other streams will read it, too
  if (error != cudaSuccess) {
    cudaFree(memory_);
    require(error);
  }
}

// When the process ends, the runtime may be gone before us: what cudaFree says does not matter.
DeviceTable::~DeviceTable() { cudaFree(memory_); }

}  // namespace lsp_tensorrt
