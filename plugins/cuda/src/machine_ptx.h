// The machine is an NVIDIA GPU, SM80 or newer. emulation/machine_cpu.h has the same functions.
#pragma once

#include "types.h"

#define LSP_DEVICE __device__ __forceinline__
#define LSP_KERNEL(threads, blocks) __global__ __launch_bounds__(threads, blocks) void
#define LSP_ARGUMENTS(name) const __grid_constant__ Arguments name

namespace lsp_cuda {

extern __shared__ __align__(1024) uint8_t shared_bytes[];

LSP_DEVICE int thread() { return threadIdx.x; }
LSP_DEVICE int block() { return blockIdx.x; }
LSP_DEVICE int grid() { return gridDim.x; }
LSP_DEVICE void barrier() { __syncthreads(); }

// Shared memory is addressed by 32-bit numbers, and touched by volatile assembly alone, which keeps its order.
// Through a shuffle, so that the compiler keeps the address: for SM90 it would read a special register in each step.
LSP_DEVICE uint32_t shared_memory() {
  return __shfl_sync(~0u, static_cast<uint32_t>(__cvta_generic_to_shared(shared_bytes)), 0);
}

template <class V>
LSP_DEVICE V load(const V* from) {
  return __ldg(from);
}

// Copies 16 bytes to shared memory in the background, or zeros where `bytes` is 0: then nothing is read.
LSP_DEVICE void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes));
}
LSP_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;\n"); }
template <int PENDING>
LSP_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING));
}

LSP_DEVICE void store_shared(uint32_t to, uint32_t v) { asm volatile("st.shared.u32 [%0], %1;\n" ::"r"(to), "r"(v)); }
LSP_DEVICE void store_shared(uint32_t to, const uint32_t (&v)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};\n" ::"r"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]));
}
LSP_DEVICE uint32_t load_shared(uint32_t from) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(v) : "r"(from));
  return v;
}
LSP_DEVICE void load_shared(uint32_t (&v)[4], uint32_t from) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];\n" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(from));
}
LSP_DEVICE void load_matrices(uint32_t (&v)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(row));
}

LSP_DEVICE void multiply_add(Float16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
LSP_DEVICE void multiply_add(BFloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
LSP_DEVICE void multiply_add(Int8, int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Accumulators through shared memory.
LSP_DEVICE uint32_t to_bits(float v) { return __float_as_uint(v); }
LSP_DEVICE uint32_t to_bits(int32_t v) { return static_cast<uint32_t>(v); }
LSP_DEVICE void add_bits(float& sum, uint32_t v) { sum += __uint_as_float(v); }
LSP_DEVICE void add_bits(int32_t& sum, uint32_t v) { sum += static_cast<int32_t>(v); }

// One instruction each: what is below 2^-126 counts as 0, which the intrinsics take several more to keep.
LSP_DEVICE float power_of_two(float v) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(power) : "f"(v));
  return power;
}
LSP_DEVICE float reciprocal(float v) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(v));
  return result;
}
LSP_DEVICE float multiplied_added(float a, float b, float c) { return __fmaf_rn(a, b, c); }
LSP_DEVICE int rounded(float v) { return __float2int_rn(v); }  // saturates

// 16-bit floats are bits in the kernels: the headers of CUDA's own types take longer to compile than these lines.
LSP_DEVICE uint32_t narrowed(Float16, float low, float high) {
  uint32_t v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
LSP_DEVICE uint32_t narrowed(BFloat16, float low, float high) {
  uint32_t v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
LSP_DEVICE float widened(Float16, uint16_t v) {
  float f;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(f) : "h"(v));
  return f;
}
LSP_DEVICE float widened(BFloat16, uint16_t v) { return __uint_as_float(static_cast<uint32_t>(v) << 16); }

}  // namespace lsp_cuda
