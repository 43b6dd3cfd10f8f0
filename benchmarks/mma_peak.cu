// How fast this GPU multiplies by mma.sync where nothing else is to be done: what the kernels can reach at most.
#include "../plugins/cuda/src/machine_ptx.h"

namespace {

using namespace lsp_cuda;

constexpr int THREADS = 256, CHAINS = 8;  // CHAINS: products that do not wait for each other

// Any bits are int8; as float16 they become numbers from 1 to 2, of either sign.
__device__ uint32_t noise(uint32_t seed, Int8) { return seed * 2654435761u; }
__device__ uint32_t noise(uint32_t seed, Float16) { return (seed * 2654435761u & 0x83ff83ffu) | 0x3c003c00u; }

template <class T>
__global__ void __launch_bounds__(THREADS) multiply(int steps, uint32_t* out) {
  typename T::Accumulator sums[CHAINS][4] = {};
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = noise(threadIdx.x * 7 + i, T());
  for (int i = 0; i < 2; ++i) b[i] = noise(threadIdx.x * 11 + i, T());
  for (int step = 0; step < steps; ++step)
#pragma unroll
    for (int i = 0; i < CHAINS; ++i) multiply_add(T(), sums[i], a, b[0], b[1]);
  uint32_t bits = 0;
  for (int i = 0; i < CHAINS * 4; ++i) bits ^= to_bits(sums[i / 4][i % 4]);
  out[blockIdx.x * THREADS + threadIdx.x] = bits;
}

}  // namespace

// Enqueues `blocks` thread blocks; `out` is [blocks, 256]. Each step of a block is 64 mma.sync, of 16x8x16 float16 or
// 16x8x32 int8. Returns CUDA's error.
extern "C" int mma_peak(int int8, int blocks, int steps, uint32_t* out, cudaStream_t stream) {
  if (int8)
    multiply<Int8><<<blocks, THREADS, 0, stream>>>(steps, out);
  else
    multiply<Float16><<<blocks, THREADS, 0, stream>>>(steps, out);
  return cudaGetLastError();
}
