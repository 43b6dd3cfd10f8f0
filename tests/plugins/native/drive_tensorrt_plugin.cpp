// What TensorRT does with a plugin, in its order, for tests: a library that Python calls.
//
// It also stands in for the TensorRT that a process has loaded, whose registry the plugin looks for when it is opened.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

void require(bool holds, const std::string& otherwise) {
  if (!holds) throw std::runtime_error(otherwise);
}

class Logger final : public ILogger {
 public:
  void log(Severity, const char* text) noexcept override { said = text; }
  std::string said;
};
Logger logger;

class Finder final : public ILoggerFinder {
 public:
  ILogger* findLogger() override { return &logger; }
};
Finder finder;

// Sizes are the addresses of these.
class Size final : public IDimensionExpr, apiv::VDimensionExpr {
 public:
  explicit Size(int64_t value) : value(value) { mImpl = this; }
  bool isConstant() const override { return true; }
  int64_t getConstantValue() const override { return value; }
  bool isSizeTensor() const override { return false; }
  const int64_t value;
};

class Sizes final : public IExprBuilder, apiv::VExprBuilder {
 public:
  Sizes() { mImpl = this; }
  const IDimensionExpr* constant(int64_t value) override {
    made_.push_back(std::make_unique<Size>(value));
    return made_.back().get();
  }
  const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&, const IDimensionExpr&) override {
    return nullptr;
  }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
    return nullptr;
  }

 private:
  std::vector<std::unique_ptr<Size>> made_;
};

// Functions that a version does not have override nothing there.
#pragma GCC diagnostic ignored "-Wsuggest-override"
#pragma GCC diagnostic ignored "-Woverloaded-virtual"
class Registry final : public IPluginRegistry {
 public:
  bool registerCreator(IPluginCreatorInterface& creator, const AsciiChar* name_space) noexcept {
    auto& one = static_cast<IPluginCreatorV3One&>(creator);
    registered += std::string(one.getPluginName()) + " " + one.getPluginVersion() + " " + name_space + "\n";
    return true;
  }
  bool deregisterCreator(const IPluginCreatorInterface&) noexcept {
    registered += "taken back\n";
    return true;
  }
  std::string registered;

#if NV_TENSORRT_MAJOR < 11
  bool registerCreator(IPluginCreator&, const AsciiChar*) noexcept { return false; }
  IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept { return nullptr; }
  IPluginCreator* getPluginCreator(const AsciiChar*, const AsciiChar*, const AsciiChar*) noexcept { return nullptr; }
  bool deregisterCreator(const IPluginCreator&) noexcept { return false; }
#endif
  void setErrorRecorder(IErrorRecorder*) noexcept {}
  IErrorRecorder* getErrorRecorder() const noexcept { return nullptr; }
  bool isParentSearchEnabled() const { return false; }
  void setParentSearchEnabled(bool) {}
  PluginLibraryHandle loadLibrary(const AsciiChar*) noexcept { return nullptr; }
  void deregisterLibrary(PluginLibraryHandle) noexcept {}
  IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept { return nullptr; }
  IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept { return nullptr; }
  IPluginCreatorInterface* getCreator(const AsciiChar*, const AsciiChar*, const AsciiChar*) noexcept { return nullptr; }
  IPluginResource* acquirePluginResource(const AsciiChar*, IPluginResource*) noexcept { return nullptr; }
  int32_t releasePluginResource(const AsciiChar*) noexcept { return 0; }
};
Registry registry;
int32_t version = NV_TENSORRT_MAJOR * 10000;

template <class Function>
Function* symbol(void* library, const char* name) {
  void* found = dlsym(library, name);
  require(found != nullptr, std::string("no symbol ") + name);
  return reinterpret_cast<Function*>(found);
}

}  // namespace

extern "C" {

struct Tensor {
  int32_t type, rank;
  int64_t dims[8];
  void* data;
};

struct Info {
  int32_t tactics;
  char timing_cache_id[64];
};

IPluginRegistry* getPluginRegistry() noexcept { return &registry; }
int32_t getInferLibVersion() noexcept { return version; }

// Opens the plugin in a process of a TensorRT version, its own if it is 0, and asks for its creators twice if `loads`, as
// loadLibrary does; returns what it has told the registry, a line each.
const char* told_registry(const char* path, int32_t of_version, bool loads) {
  version = of_version != 0 ? of_version : NV_TENSORRT_MAJOR * 10000;
  void* library = dlopen(path, RTLD_NOW);
  if (library == nullptr) return dlerror();
  int32_t count;
  for (int i = 0; loads && i < 2; ++i)
    symbol<IPluginCreatorInterface* const*(int32_t&)>(library, "getCreators")(count);
  return registry.registered.c_str();
}

// Builds a layer, stores it, loads it and runs a tactic; returns null, or what went wrong and what the plugin said of it.
const char* drive(const char* path, const PluginField* fields, int32_t field_count, const Tensor* inputs,
                  int32_t input_count, const Tensor* output, int32_t tactic, Info* info) {
  static std::string text;
  logger.said.clear();
  try {
    void* library = dlopen(path, RTLD_NOW);
    require(library != nullptr, "cannot be opened");
    symbol<void(ILoggerFinder*)>(library, "setLoggerFinder")(&finder);
    int32_t count = 0;
    auto* creators = symbol<IPluginCreatorInterface* const*(int32_t&)>(library, "getCreators")(count);
    require(count == 1 && std::string(creators[0]->getInterfaceInfo().kind) == "PLUGIN CREATOR_V3ONE", "getCreators");
    auto* creator = static_cast<IPluginCreatorV3One*>(creators[0]);

    PluginFieldCollection all{};
    all.nbFields = field_count;
    all.fields = fields;
    std::unique_ptr<IPluginV3> plugin(creator->createPlugin("layer", &all, TensorRTPhase::kBUILD));
    require(plugin != nullptr, "createPlugin");
    auto* build = static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));

    std::vector<DynamicPluginTensorDesc> dynamic;
    std::vector<PluginTensorDesc> fixed;
    std::vector<DataType> types;
    std::vector<DimsExprs> shapes;
    std::vector<const void*> data;
    Sizes sizes;
    const auto add = [&](const Tensor& tensor) {
      PluginTensorDesc desc{};
      desc.type = static_cast<DataType>(tensor.type);
      desc.format = TensorFormat::kLINEAR;
      desc.dims.nbDims = tensor.rank;
      DimsExprs shape{};
      shape.nbDims = tensor.rank;
      for (int i = 0; i < tensor.rank; ++i) {
        desc.dims.d[i] = tensor.dims[i];
        shape.d[i] = sizes.constant(tensor.dims[i]);
      }
      fixed.push_back(desc);
      dynamic.push_back({desc, desc.dims, desc.dims, desc.dims});
      types.push_back(desc.type);
      shapes.push_back(shape);
    };
    for (int i = 0; i < input_count; ++i) {
      add(inputs[i]);
      data.push_back(inputs[i].data);
    }
    add(*output);
    dynamic[0].desc.dims.d[0] = -1;  // the batch is dynamic

    DataType out_type;
    require(build->getOutputDataTypes(&out_type, 1, types.data(), input_count) == 0, "getOutputDataTypes");
    require(out_type == types.back(), "the output has another type");
    DimsExprs out{};
    require(build->getOutputShapes(shapes.data(), input_count, nullptr, 0, &out, 1, sizes) == 0, "getOutputShapes");
    require(out.nbDims == output->rank, "the output has another rank");
    for (int i = 0; i < out.nbDims; ++i)
      require(static_cast<const Size*>(out.d[i])->value == output->dims[i], "the output has another shape");
    for (int i = 0; i <= input_count; ++i)
      require(build->supportsFormatCombination(i, dynamic.data(), input_count, 1), "supportsFormatCombination");
    require(build->configurePlugin(dynamic.data(), input_count, &dynamic.back(), 1) == 0, "configurePlugin");
    info->tactics = build->getNbTactics();
    std::vector<int32_t> tactics(info->tactics);
    require(build->getValidTactics(tactics.data(), info->tactics) == 0, "getValidTactics");
    for (int i = 0; i < info->tactics; ++i) require(tactics[i] == i + 1, "tactics are not numbered from 1");
    std::strncpy(info->timing_cache_id, build->getTimingCacheID(), sizeof info->timing_cache_id - 1);

    auto* stored = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME))
                       ->getFieldsToSerialize();
    std::unique_ptr<IPluginV3> loaded(creator->createPlugin("layer", stored, TensorRTPhase::kRUNTIME));
    require(loaded != nullptr, "createPlugin from what was stored");
    plugin.reset();
    auto* runtime = static_cast<IPluginV3OneRuntime*>(loaded->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    std::unique_ptr<IPluginV3> attached(runtime->attachToContext(nullptr));
    require(attached != nullptr, "attachToContext");
    runtime = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    require(runtime->setTactic(tactic) == 0, "setTactic");
    require(runtime->onShapeChange(fixed.data(), input_count, &fixed.back(), 1) == 0, "onShapeChange");
    void* outputs[] = {output->data};
    require(runtime->enqueue(fixed.data(), &fixed.back(), data.data(), outputs, nullptr, nullptr) == 0, "enqueue");
    return nullptr;
  } catch (const std::exception& error) {
    text = std::string(error.what()) + ": " + logger.said;
    return text.c_str();
  }
}
}
