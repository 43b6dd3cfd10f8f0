#include "loaded_tensorrt.h"

#include <dlfcn.h>

#include <initializer_list>

namespace lsp_tensorrt {

void* loaded_symbol(const char* name) {
  if (void* symbol = dlsym(RTLD_DEFAULT, name)) return symbol;
  // Python and trtexec keep TensorRT's names to themselves; the library can still be asked for if it is there.
  for (const char* library : {"libnvinfer.so.11", "libnvinfer.so.10", "libtensorrt_rtx.so.1"})
    if (void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD)) {
      void* symbol = dlsym(handle, name);
      dlclose(handle);  // it was loaded before, so it stays
      if (symbol != nullptr) return symbol;
    }
  return nullptr;
}

}  // namespace lsp_tensorrt
