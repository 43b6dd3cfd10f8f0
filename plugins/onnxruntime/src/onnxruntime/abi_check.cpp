// Compares abi.h with ONNX Runtime's own header, where the compiler finds that (CPATH=... names its folder).
#include "abi.h"

#if __has_include(<onnxruntime_c_api.h>)
#include <onnxruntime_c_api.h>
#elif __has_include(<onnxruntime/onnxruntime_c_api.h>)
#include <onnxruntime/onnxruntime_c_api.h>
#elif __has_include(<onnxruntime/core/session/onnxruntime_c_api.h>)
#include <onnxruntime/core/session/onnxruntime_c_api.h>
#endif

#ifdef ORT_API_VERSION

#define SAME_SLOT(name) \
  static_assert(offsetof(lsp::ort::Api, name) == offsetof(::OrtApi, name), #name " is another slot of OrtApi")
#define SAME_NUMBER(ours, theirs) \
  static_assert(static_cast<int>(lsp::ort::ours) == static_cast<int>(theirs), #theirs " is another number")
#define SAME_CALLBACK(name) \
  static_assert(offsetof(lsp::ort::CustomOp, name) == offsetof(::OrtCustomOp, name), #name " moved in OrtCustomOp")

static_assert(ORT_API_VERSION >= lsp::ort::kApiLevel, "this header is older than ONNX Runtime 1.17");
SAME_NUMBER(kFail, ORT_FAIL);
SAME_NUMBER(kInvalidArgument, ORT_INVALID_ARGUMENT);
SAME_NUMBER(kUndefined, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED);
SAME_NUMBER(kFloat, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
SAME_NUMBER(kInt8, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8);
SAME_NUMBER(kFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
SAME_NUMBER(kBFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16);
SAME_NUMBER(kRequired, INPUT_OUTPUT_REQUIRED);
SAME_NUMBER(kOptional, INPUT_OUTPUT_OPTIONAL);
SAME_NUMBER(kInt, ORT_OP_ATTR_INT);
SAME_NUMBER(kDefaultMemory, OrtMemTypeDefault);

static_assert(offsetof(lsp::ort::ApiBase, GetApi) == offsetof(::OrtApiBase, GetApi), "OrtApiBase");
static_assert(offsetof(lsp::ort::ApiBase, GetVersionString) == offsetof(::OrtApiBase, GetVersionString), "OrtApiBase");

SAME_SLOT(CreateStatus);
SAME_SLOT(GetErrorMessage);
SAME_SLOT(CreateCustomOpDomain);
SAME_SLOT(CustomOpDomain_Add);
SAME_SLOT(AddCustomOpDomain);
SAME_SLOT(GetTensorMutableData);
SAME_SLOT(CastTypeInfoToTensorInfo);
SAME_SLOT(SetTensorElementType);
SAME_SLOT(SetDimensions);
SAME_SLOT(GetTensorElementType);
SAME_SLOT(GetDimensionsCount);
SAME_SLOT(GetDimensions);
SAME_SLOT(GetSymbolicDimensions);
SAME_SLOT(GetTensorTypeAndShape);
SAME_SLOT(KernelInfoGetAttribute_float);
SAME_SLOT(KernelInfoGetAttribute_int64);
SAME_SLOT(KernelInfoGetAttribute_string);
SAME_SLOT(KernelContext_GetInputCount);
SAME_SLOT(KernelContext_GetInput);
SAME_SLOT(KernelContext_GetOutput);
SAME_SLOT(ReleaseStatus);
SAME_SLOT(ReleaseTypeInfo);
SAME_SLOT(ReleaseTensorTypeAndShapeInfo);
SAME_SLOT(KernelInfoGetAttributeArray_int64);
SAME_SLOT(KernelInfo_GetInputCount);
SAME_SLOT(KernelInfo_GetOutputCount);
SAME_SLOT(KernelInfo_GetInputTypeInfo);
SAME_SLOT(KernelInfo_GetOutputTypeInfo);
SAME_SLOT(KernelInfo_GetNodeName);
SAME_SLOT(KernelInfoGetConstantInput_tensor);
SAME_SLOT(ShapeInferContext_GetInputCount);
SAME_SLOT(ShapeInferContext_GetInputTypeShape);
SAME_SLOT(ShapeInferContext_GetAttribute);
SAME_SLOT(ShapeInferContext_SetOutputTypeShape);
SAME_SLOT(SetSymbolicDimensions);
SAME_SLOT(ReadOpAttr);
SAME_SLOT(KernelContext_ParallelFor);
#if ORT_API_VERSION >= 24
static_assert(lsp::ort::kConfigApiLevel == 24, "the level that is compared here");
SAME_SLOT(GetKeyValue);
SAME_SLOT(ReleaseKeyValuePairs);
SAME_SLOT(KernelInfo_GetConfigEntries);
#endif

SAME_CALLBACK(version);
SAME_CALLBACK(CreateKernel);
SAME_CALLBACK(GetName);
SAME_CALLBACK(GetExecutionProviderType);
SAME_CALLBACK(GetInputType);
SAME_CALLBACK(GetInputTypeCount);
SAME_CALLBACK(GetOutputType);
SAME_CALLBACK(GetOutputTypeCount);
SAME_CALLBACK(KernelCompute);
SAME_CALLBACK(KernelDestroy);
SAME_CALLBACK(GetInputCharacteristic);
SAME_CALLBACK(GetOutputCharacteristic);
SAME_CALLBACK(GetInputMemoryType);
SAME_CALLBACK(GetVariadicInputMinArity);
SAME_CALLBACK(GetVariadicInputHomogeneity);
SAME_CALLBACK(GetVariadicOutputMinArity);
SAME_CALLBACK(GetVariadicOutputHomogeneity);
SAME_CALLBACK(CreateKernelV2);
SAME_CALLBACK(KernelComputeV2);
SAME_CALLBACK(InferOutputShapeFn);
SAME_CALLBACK(GetStartVersion);
SAME_CALLBACK(GetEndVersion);

#endif  // ORT_API_VERSION
