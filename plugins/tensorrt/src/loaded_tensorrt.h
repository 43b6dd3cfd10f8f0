// Functions of the TensorRT that this process has loaded. The plugin is not linked to one, so that one file fits all.
#pragma once

namespace lsp_tensorrt {

// Null where no TensorRT is loaded.
void* loaded_symbol(const char* name);

template <class Function>
Function* loaded_function(const char* name) {
  return reinterpret_cast<Function*>(loaded_symbol(name));
}

}  // namespace lsp_tensorrt
