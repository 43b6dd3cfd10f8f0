/* The kernels of liblsp_ort.so as a C library, for whoever has a runtime other than ONNX Runtime.

   What is created is constant: many threads may run it at once. The functions that can fail return NULL, or the reason
   in one line, which is valid until the thread's next call. */
#ifndef LSP_CPU_H
#define LSP_CPU_H

#include <stddef.h>
#include <stdint.h>

#define LSP_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* ONNX's numbers. */
typedef enum { LSP_FLOAT32 = 1, LSP_INT8 = 3, LSP_BFLOAT16 = 16 } lsp_type;
/* gelu is that of erf. */
typedef enum { LSP_NONE = 0, LSP_GELU = 1, LSP_GELU_TANH = 2, LSP_RELU = 3 } lsp_activation;

/* Calls task(user, i) for each i < count, in any order, on any threads, and returns when all are done. threads is how
   many there are, 0 if unknown. */
typedef void (*lsp_task)(void* user, size_t index);
typedef struct {
  void (*run)(void* pool, lsp_task task, size_t count, void* user);
  void* pool;
  int threads;
} lsp_pool;

/* The instruction sets that kernels can use on this CPU, best first, with spaces between. There are "avx512_bf16
   avx512_vnni avx512 avx2_vnni avx2 portable" for x86-64, "neon_dot neon portable" for AArch64. A name given to a
   create function, or else in the environment variable LSP_ISA, is the best that the kernel may use. */
LSP_EXPORT const char* lsp_isas(void);

/* y = activation(x W * scale + bias) + residual, with W [K, N] in blocks, of which only some are stored. */
typedef struct {
  int64_t K, N, block_k, block_n;
  /* col_ptr [ceil(N / block_n) + 1]: where each column of blocks begins in k_idx; k_idx: which row of blocks each block
     is in, ascending within a column. */
  const int64_t* col_ptr;
  size_t col_ptr_count;
  const int64_t* k_idx;
  size_t k_idx_count;
  /* [blocks, block_k, block_n]; edge blocks are filled up. One block of zeros where none is stored. values_count is in
     elements. The type is what is computed in: float32 (1), bfloat16 (16) or int8 (3). */
  lsp_type values_type;
  const void* values;
  size_t values_count;
  const float* bias;  /* [N] */
  const float* scale; /* [N]; read with int8 values only */
  lsp_activation activation;
  /* With int8 values x is int8, or float32 that becomes clip(rint((x - x_offset) * (1 / x_scale)), -128, 127). With
     others it is float32; x_scale and x_offset are 0. */
  lsp_type x_type;
  float x_scale, x_offset;
  /* int8: clip(rint((y - out_offset) * (1 / out_scale)), -128, 127). float32: out_scale and out_offset are 0. */
  lsp_type out_type;
  float out_scale, out_offset;
} lsp_linear_desc;

typedef struct lsp_linear lsp_linear;
/* Checks the description and copies what it points to. isa: see lsp_isas; NULL to leave it to LSP_ISA. */
LSP_EXPORT const char* lsp_linear_create(const lsp_linear_desc* desc, const char* isa, lsp_linear** out);
/* x [M, K], residual [M, N] of float32 or NULL, y [M, N], all dense; y may be residual. pool NULL: on this thread. */
LSP_EXPORT const char* lsp_linear_run(const lsp_linear*, int64_t M, const void* x, const float* residual, void* y,
                                      const lsp_pool* pool);
LSP_EXPORT void lsp_linear_destroy(lsp_linear*);
/* Instruction set, and rows x columns of a tile: "avx512_vnni 14x32". For reports and tests. */
LSP_EXPORT const char* lsp_linear_kernel(const lsp_linear*);

typedef struct { int64_t heads, head_size; float scale; lsp_type compute; } lsp_attention_desc;
typedef struct lsp_attention lsp_attention;
/* Strides are in floats; heads lie side by side in a row. */
typedef struct { const float* data; int64_t batch_stride, row_stride; } lsp_rows;
LSP_EXPORT const char* lsp_attention_create(const lsp_attention_desc* desc, const char* isa, lsp_attention** out);
/* bias [bias_batches, bias_heads, S, T] or NULL: batch b adds matrix b % bias_batches; bias_heads is 1 or heads. y is
   dense [B, S, heads*head_size]. */
LSP_EXPORT const char* lsp_attention_run(const lsp_attention*, int64_t B, int64_t S, int64_t T, lsp_rows q, lsp_rows k,
                                         lsp_rows v, const float* bias, int64_t bias_batches, int64_t bias_heads,
                                         float* y, const lsp_pool* pool);
LSP_EXPORT void lsp_attention_destroy(lsp_attention*);
LSP_EXPORT const char* lsp_attention_kernel(const lsp_attention*);

#ifdef __cplusplus
}
#endif

#endif
