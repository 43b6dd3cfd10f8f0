// The operators that RegisterCustomOps adds to a session, for every combination of element types.
#ifndef LSP_ONNXRUNTIME_REGISTRATION_H
#define LSP_ONNXRUNTIME_REGISTRATION_H

#include <vector>

#include "abi.h"

namespace lsp::ort {

// ONNX Runtime chooses among operators of one name by the element types of their inputs. Types that no kernel takes
// have an operator as well, which refuses the node with a reason. The operators are never freed: sessions may use them
// until the process ends.
std::vector<CustomOp*> block_sparse_linear_operators(const Runtime& runtime);
std::vector<CustomOp*> attention_operators(const Runtime& runtime);

}  // namespace lsp::ort

#endif
