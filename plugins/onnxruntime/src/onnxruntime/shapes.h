// Shapes while a graph is loaded: known sizes, named ones ("batch"), and unknown ones.
#ifndef LSP_ONNXRUNTIME_SHAPES_H
#define LSP_ONNXRUNTIME_SHAPES_H

#include "abi.h"

namespace lsp::ort {

constexpr int64_t kUnknownSize = -1;

size_t input_count(const Api& api, const ShapeInferContext* context);

// Returns the last size of an input's shape, or kUnknownSize.
int64_t last_size(const Api& api, const ShapeInferContext* context, size_t input);

// Returns an integer attribute of the node, or `absent`.
int64_t attribute(const Api& api, const ShapeInferContext* context, const char* name, int64_t absent);

// Gives the output the shape of an input with another last size, and `type`, or with kUndefined the input's type. Does
// nothing where the input's rank is unknown.
void set_output_like(const Api& api, const ShapeInferContext* context, size_t input, int64_t last_size,
                     ElementType type = kUndefined);

}  // namespace lsp::ort

#endif
