#ifndef LSP_CPU_H
#define LSP_CPU_H

#include <stddef.h>
#include <stdint.h>

/* lsp_cpu.h: the kernels as a C library. Thread-safe: a created object is constant, and many threads may run it at once. */
#ifdef __cplusplus
extern "C" {
#endif
#define LSP_EXPORT __attribute__((visibility("default")))
typedef enum { LSP_FLOAT32 = 1, LSP_INT8 = 3, LSP_BFLOAT16 = 16 } lsp_type;          /* ONNX's numbers */
typedef enum { LSP_NONE = 0, LSP_GELU = 1, LSP_GELU_TANH = 2, LSP_RELU = 3 } lsp_activation;

/* Runs task(user, i) for each i < count, in any order, on any threads, and returns when all are done. */
typedef void (*lsp_task)(void* user, size_t index);
typedef struct { void (*run)(void* pool, lsp_task task, size_t count, void* user); void* pool; int threads; } lsp_pool; /* threads: 0 if unknown */

typedef struct {
  int64_t K, N, block_k, block_n;
  const int64_t* col_ptr; size_t col_ptr_count;
  const int64_t* k_idx;   size_t k_idx_count;
  lsp_type values_type; const void* values; size_t values_count;   /* elements */
  const float* bias; const float* scale;                           /* [N] each */
  lsp_activation activation;
  lsp_type x_type; float x_scale, x_offset;
  lsp_type out_type; float out_scale, out_offset;
} lsp_linear_desc;
typedef struct lsp_linear lsp_linear;
/* Each create: NULL and *out set, or the reason (valid until the thread's next call). Everything the description points to is copied or packed. isa NULL: LSP_ISA, else the best. */
LSP_EXPORT const char* lsp_linear_create(const lsp_linear_desc* desc, const char* isa, lsp_linear** out);
/* Returns NULL, or why it did not run (out of memory). pool NULL: on the calling thread. residual: float32 or NULL. */
LSP_EXPORT const char* lsp_linear_run(const lsp_linear*, int64_t M, const void* x, const float* residual, void* y, const lsp_pool* pool);
LSP_EXPORT void lsp_linear_destroy(lsp_linear*);
LSP_EXPORT const char* lsp_linear_kernel(const lsp_linear*);     /* e.g. "avx512_vnni 14x32", for reports and tests */

typedef struct { int64_t heads, head_size; float scale; lsp_type compute; } lsp_attention_desc;
typedef struct lsp_attention lsp_attention;
typedef struct { const float* data; int64_t batch_stride, row_stride; } lsp_rows;     /* floats; heads lie side by side in a row */
LSP_EXPORT const char* lsp_attention_create(const lsp_attention_desc* desc, const char* isa, lsp_attention** out);
/* bias [bias_batches, bias_heads, S, T] or NULL: batch b adds matrix b % bias_batches; bias_heads is 1 or heads. y is dense [B, S, heads*head_size]. */
LSP_EXPORT const char* lsp_attention_run(const lsp_attention*, int64_t B, int64_t S, int64_t T, lsp_rows q, lsp_rows k, lsp_rows v,
                              const float* bias, int64_t bias_batches, int64_t bias_heads, float* y, const lsp_pool* pool);
LSP_EXPORT void lsp_attention_destroy(lsp_attention*);
LSP_EXPORT const char* lsp_attention_kernel(const lsp_attention*);
LSP_EXPORT const char* lsp_isas(void);                           /* space-separated names usable here, best first */
#ifdef __cplusplus
}
#endif

#endif
