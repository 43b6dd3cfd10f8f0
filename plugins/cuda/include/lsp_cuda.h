#ifndef LSP_CUDA_H
#define LSP_CUDA_H

#include <stddef.h>
#include <stdint.h>

/* lsp::BlockSparseLinear on GPUs (SM80 and newer) as a C library:
 *
 *     y = act(x @ W + bias) [+ residual]        x [M, K], W [K, N] in blocks, y [M, N]; rows are dense
 *
 * A plan holds what follows from sizes and mask: for each tactic (a kernel and its tile size) a table that the kernel
 * reads. A plan is constant once it is made: many threads may use it at once. No function here allocates memory of the
 * device. docs/gpu-kernels.md says how `values` is stored (bsl16.v1) and how the kernels work. */
#ifdef __cplusplus
extern "C" {
#endif
typedef enum {
  LSP_CUDA_NO_TYPE = 0,
  LSP_CUDA_INT8 = 3,
  LSP_CUDA_FLOAT16 = 10,
  LSP_CUDA_BFLOAT16 = 16
} lsp_cuda_type; /* ONNX's numbers */
typedef enum { LSP_CUDA_NONE = 0, LSP_CUDA_GELU = 1, LSP_CUDA_GELU_TANH = 2, LSP_CUDA_RELU = 3 } lsp_cuda_activation;

typedef struct {
  int64_t K, N, block_k, block_n; /* K and N up to 262144; block_k and block_n 16, 32 or 64 */
  const int64_t* col_ptr;
  size_t col_ptr_count; /* ceil(N / block_n) + 1 */
  const int64_t* k_idx;
  size_t k_idx_count;        /* surviving blocks, ascending in each block column */
  lsp_cuda_type values_type; /* of values and x */
  lsp_cuda_activation activation;
  lsp_cuda_type out_type;      /* values_type or int8; for int8 values: float16, bfloat16 or int8 */
  float out_scale, out_offset; /* int8 y: clip(rint((y - out_offset) * (1 / out_scale))) */
  lsp_cuda_type residual_type; /* float16 or bfloat16, for float values theirs; LSP_CUDA_NO_TYPE: no residual */
} lsp_cuda_desc;
typedef struct lsp_cuda_plan lsp_cuda_plan;

/* Functions that return text return NULL, or what is wrong; the text holds until the thread's next call. */

/* Makes a plan; the description is not needed afterwards. */
const char* lsp_cuda_plan_create(const lsp_cuda_desc* desc, lsp_cuda_plan** out);
void lsp_cuda_plan_destroy(lsp_cuda_plan*);

/* How many sub-blocks of 512 bytes `values` has. */
int64_t lsp_cuda_sub_blocks(const lsp_cuda_plan*);

/* Tactics are numbered from 0; there is at least one, and each is right for every M. The order is from large tiles to
 * small ones. But for launch, which checks it, the number must be one of them. */
int lsp_cuda_tactics(const lsp_cuda_plan*);
const char* lsp_cuda_tactic_name(const lsp_cuda_plan*, int tactic);
/* The share of x's slices that the tactic loads, over all its column tiles: the density that its loads see. */
double lsp_cuda_tactic_density(const lsp_cuda_plan*, int tactic);

/* The tactic that is estimated to be the fastest for M rows on the current device: for those who do not time them. It
 * may differ from M to M. */
const char* lsp_cuda_default_tactic(const lsp_cuda_plan*, int64_t M, int* tactic);

/* The tactic's table, which launch wants in the device's memory, aligned to 16 bytes. */
const void* lsp_cuda_table(const lsp_cuda_plan*, int tactic, size_t* bytes);

/* Enqueues one kernel. All pointers are the device's and aligned to 16 bytes; bias and scale are float32 [N]. scale is
 * read for int8 values only, residual where the plan has one; it may be y. stream is a cudaStream_t. May be captured into
 * a CUDA graph once the tactic has run on the device. */
const char* lsp_cuda_launch(const lsp_cuda_plan*, int tactic, int64_t M, const void* x, const void* values,
                            const float* bias, const float* scale, const void* residual, void* y, const void* table,
                            void* stream);
#ifdef __cplusplus
}
#endif

#endif
