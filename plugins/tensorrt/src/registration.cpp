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

bool is_of_our_headers() {
  const auto version = loaded_function<int32_t()>("getInferLibVersion");
  return version != nullptr && version() / 10000 == NV_TENSORRT_MAJOR;
}

// Under the creator's own namespace: the macro REGISTER_TENSORRT_PLUGIN says "", under which nothing would find it. The
// library is linked with nodelete, so that what the registry points to stays.
const bool registered = [] {
  const auto registry = loaded_function<nvinfer1::IPluginRegistry*()>("getPluginRegistry");
  if (registry == nullptr || !is_of_our_headers() || registry() == nullptr) return false;
  if (registry()->getCreator(NAME, VERSION, NAMESPACE) != nullptr) return true;
  return registry()->registerCreator(creator(), NAMESPACE);
}();

}  // namespace
}  // namespace lsp_tensorrt

#define LSP_EXPORT extern "C" __attribute__((visibility("default")))

LSP_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { lsp_tensorrt::set_logger_finder(finder); }

LSP_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&lsp_tensorrt::creator()};
  count = 1;
  return creators;
}
