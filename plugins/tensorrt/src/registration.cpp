// The two ways in which TensorRT comes to know the plugin.
//
// IPluginRegistry::loadLibrary (trtexec --dynamicPlugins, engines that hold the library) calls the two functions that are
// exported here, of any version. What only opens the library (trtexec --staticPlugins, Polygraphy, Triton) needs it to
// register itself, which takes the registry's own functions: in TensorRT 11 they lie elsewhere than in 10.
#include "loaded_tensorrt.h"
#include "messages.h"
#include "plugin.h"

namespace lsp_tensorrt {
namespace {

Creator& creator() {
  static Creator instance;
  return instance;
}

// Null where no TensorRT of the headers' major version is loaded.
nvinfer1::IPluginRegistry* registry() {
  const auto version = loaded_function<int32_t()>("getInferLibVersion");
  const auto get = loaded_function<nvinfer1::IPluginRegistry*()>("getPluginRegistry");
  return version != nullptr && version() / 10000 == NV_TENSORRT_MAJOR && get != nullptr ? get() : nullptr;
}

// Under the creator's own namespace: the macro REGISTER_TENSORRT_PLUGIN says "", under which nothing would find it. The
// library is linked with nodelete, so that what the registry points to stays.
bool registered = [] {
  if (loaded_symbol("getPluginRegistry") == nullptr)
    log_error("it was opened before TensorRT was loaded, so TensorRT does not know it; open it afterwards");
  return registry() != nullptr && registry()->registerCreator(creator(), NAMESPACE);
}();

// loadLibrary opens the library, which registers itself, and then refuses creators that are there already.
void leave_it_to_load_library() {
  if (registered) registered = !registry()->deregisterCreator(creator());
}

}  // namespace
}  // namespace lsp_tensorrt

#define LSP_EXPORT extern "C" __attribute__((visibility("default")))

LSP_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { lsp_tensorrt::set_logger_finder(finder); }

LSP_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  lsp_tensorrt::leave_it_to_load_library();
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&lsp_tensorrt::creator()};
  count = 1;
  return creators;
}
