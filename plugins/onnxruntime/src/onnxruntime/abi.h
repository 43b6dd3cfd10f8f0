// What this library uses of ONNX Runtime's C interface, written from its documentation.
//
// The interface is a table of function pointers that only ever grows, so an operator made for level 17 loads in every
// ONNX Runtime from 1.17 on, and nothing of ONNX Runtime is needed to build or link this library. Where its header is
// at hand, abi_check.cpp compares every slot with it.
#ifndef LSP_ONNXRUNTIME_ABI_H
#define LSP_ONNXRUNTIME_ABI_H

#include <cstddef>
#include <cstdint>

namespace lsp::ort {

constexpr uint32_t kApiLevel = 17;         // the oldest that has everything below, but for:
constexpr uint32_t kConfigApiLevel = 24;   // KernelInfo_GetConfigEntries

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kUndefined = 0, kFloat = 1, kInt8 = 3, kFloat16 = 10, kBFloat16 = 16 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum AttributeType : int { kInt = 1 };
enum MemoryType : int { kDefaultMemory = 0 };

// Known to ONNX Runtime only.
struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct Value;
struct TypeInfo;
struct TensorInfo;  // OrtTensorTypeAndShapeInfo
struct KernelInfo;
struct KernelContext;
struct ShapeInferContext;
struct OpAttribute;
struct KeyValuePairs;

// Functions that return a Status* return nullptr when all went well. A gap is named for its first and last slot.
struct Api {
  Status* (*CreateStatus)(ErrorCode code, const char* message);
  void* gap_1_1[1];
  const char* (*GetErrorMessage)(const Status*);
  void* gap_3_25[23];
  Status* (*CreateCustomOpDomain)(const char* name, CustomOpDomain** out);
  Status* (*CustomOpDomain_Add)(CustomOpDomain*, const struct CustomOp*);
  Status* (*AddCustomOpDomain)(SessionOptions*, CustomOpDomain*);
  void* gap_29_50[22];
  Status* (*GetTensorMutableData)(Value*, void** out);
  void* gap_52_54[3];
  Status* (*CastTypeInfoToTensorInfo)(const TypeInfo*, const TensorInfo** out);
  void* gap_56_57[2];
  Status* (*SetTensorElementType)(TensorInfo*, ElementType);
  Status* (*SetDimensions)(TensorInfo*, const int64_t* sizes, size_t rank);
  Status* (*GetTensorElementType)(const TensorInfo*, ElementType* out);
  Status* (*GetDimensionsCount)(const TensorInfo*, size_t* out);
  Status* (*GetDimensions)(const TensorInfo*, int64_t* sizes, size_t rank);
  Status* (*GetSymbolicDimensions)(const TensorInfo*, const char* names[], size_t rank);
  void* gap_64_64[1];
  Status* (*GetTensorTypeAndShape)(const Value*, TensorInfo** out);
  void* gap_66_84[19];
  Status* (*KernelInfoGetAttribute_float)(const KernelInfo*, const char* name, float* out);
  Status* (*KernelInfoGetAttribute_int64)(const KernelInfo*, const char* name, int64_t* out);
  Status* (*KernelInfoGetAttribute_string)(const KernelInfo*, const char* name, char* out, size_t* size);
  Status* (*KernelContext_GetInputCount)(const KernelContext*, size_t* out);
  void* gap_89_89[1];
  Status* (*KernelContext_GetInput)(const KernelContext*, size_t index, const Value** out);
  Status* (*KernelContext_GetOutput)(KernelContext*, size_t index, const int64_t* sizes, size_t rank, Value** out);
  void* gap_92_92[1];
  void (*ReleaseStatus)(Status*);
  void* gap_94_97[4];
  void (*ReleaseTypeInfo)(TypeInfo*);
  void (*ReleaseTensorTypeAndShapeInfo)(TensorInfo*);
  void* gap_100_162[63];
  Status* (*KernelInfoGetAttributeArray_int64)(const KernelInfo*, const char* name, int64_t* out, size_t* count);
  void* gap_164_229[66];
  Status* (*KernelInfo_GetInputCount)(const KernelInfo*, size_t* out);
  Status* (*KernelInfo_GetOutputCount)(const KernelInfo*, size_t* out);
  void* gap_232_233[2];
  Status* (*KernelInfo_GetInputTypeInfo)(const KernelInfo*, size_t index, TypeInfo** out);
  Status* (*KernelInfo_GetOutputTypeInfo)(const KernelInfo*, size_t index, TypeInfo** out);
  void* gap_236_243[8];
  Status* (*KernelInfo_GetNodeName)(const KernelInfo*, char* out, size_t* size);
  void* gap_245_248[4];
  Status* (*KernelInfoGetConstantInput_tensor)(const KernelInfo*, size_t index, int* is_constant, const Value** out);
  void* gap_250_266[17];
  Status* (*ShapeInferContext_GetInputCount)(const ShapeInferContext*, size_t* out);
  Status* (*ShapeInferContext_GetInputTypeShape)(const ShapeInferContext*, size_t index, TensorInfo** out);
  Status* (*ShapeInferContext_GetAttribute)(const ShapeInferContext*, const char* name, const OpAttribute** out);
  Status* (*ShapeInferContext_SetOutputTypeShape)(const ShapeInferContext*, size_t index, const TensorInfo*);
  Status* (*SetSymbolicDimensions)(TensorInfo*, const char* names[], size_t rank);
  Status* (*ReadOpAttr)(const OpAttribute*, AttributeType, void* data, size_t size, size_t* out);
  void* gap_273_273[1];
  Status* (*KernelContext_ParallelFor)(const KernelContext*, void (*task)(void*, size_t), size_t count, size_t batches,
                                       void* user);
  // From level 24 only: read these from GetApi(kConfigApiLevel), never from GetApi(kApiLevel).
  void* gap_275_296[22];
  const char* (*GetKeyValue)(const KeyValuePairs*, const char* key);
  void* gap_298_299[2];
  void (*ReleaseKeyValuePairs)(KeyValuePairs*);
  void* gap_301_390[90];
  Status* (*KernelInfo_GetConfigEntries)(const KernelInfo*, KeyValuePairs** out);
};

struct ApiBase {
  const Api* (*GetApi)(uint32_t level);
  const char* (*GetVersionString)();
};

// The ONNX Runtime that registers this library; a process may hold more than one.
struct Runtime {
  const Api* api;
  const Api* config_api;  // of level kConfigApiLevel, or nullptr in an older ONNX Runtime
};

// An operator, as ONNX Runtime asks for it. The functions that are nullptr here have a newer form that is used instead.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  ElementType (*GetInputType)(const CustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void* kernel, KernelContext*);
  void (*KernelDestroy)(void* kernel);
  Characteristic (*GetInputCharacteristic)(const CustomOp*, size_t index);
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, size_t index);
  MemoryType (*GetInputMemoryType)(const CustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status* (*KernelComputeV2)(void* kernel, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, ShapeInferContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
};

static_assert(offsetof(Api, KernelContext_ParallelFor) == 274 * sizeof(void*), "a gap has the wrong size");
static_assert(offsetof(Api, KernelInfo_GetConfigEntries) == 391 * sizeof(void*), "a gap has the wrong size");

}  // namespace lsp::ort

#endif
