// Runs a model with operators of the domain "lsp" on ones and prints the output's first numbers.
//   run_model model.onnx liblsp_ort.so [threads]
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

const OrtApi* ort = nullptr;

void check(OrtStatus* status) {
  if (status == nullptr) return;
  std::fprintf(stderr, "error: %s\n", ort->GetErrorMessage(status));
  std::exit(1);
}

// The two lines that a model with these operators needs, beside what every ONNX Runtime application does.
void add_lsp_operators(OrtSessionOptions* options, const char* library, int threads) {
  check(ort->RegisterCustomOpsLibrary_V2(options, library));
  check(ort->AddSessionConfigEntry(options, "lsp.threads", std::to_string(threads).c_str()));
}

// The shape of the first input; a size that may vary becomes 1.
std::vector<int64_t> input_shape(const OrtSession* session) {
  OrtTypeInfo* type = nullptr;
  const OrtTensorTypeAndShapeInfo* info = nullptr;
  size_t rank = 0;
  check(ort->SessionGetInputTypeInfo(session, 0, &type));
  check(ort->CastTypeInfoToTensorInfo(type, &info));
  check(ort->GetDimensionsCount(info, &rank));
  std::vector<int64_t> shape(rank);
  check(ort->GetDimensions(info, shape.data(), rank));
  for (int64_t& size : shape) size = std::max<int64_t>(size, 1);
  ort->ReleaseTypeInfo(type);
  return shape;
}

size_t element_count(const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  size_t count = 0;
  check(ort->GetTensorTypeAndShape(value, &info));
  check(ort->GetTensorShapeElementCount(info, &count));
  ort->ReleaseTensorTypeAndShapeInfo(info);
  return count;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: run_model model.onnx liblsp_ort.so [threads]\n");
    return 2;
  }
  const int threads = argc > 3 ? std::atoi(argv[3]) : 1;
  ort = OrtGetApiBase()->GetApi(17);  // ONNX Runtime 1.17, or any newer one
  if (ort == nullptr) return 1;

  OrtEnv* env = nullptr;
  OrtSessionOptions* options = nullptr;
  OrtSession* session = nullptr;
  check(ort->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "run_model", &env));
  check(ort->CreateSessionOptions(&options));
  check(ort->SetIntraOpNumThreads(options, threads));
  add_lsp_operators(options, argv[2], threads);
  check(ort->CreateSession(env, argv[1], options, &session));

  const std::vector<int64_t> shape = input_shape(session);
  size_t count = 1;
  for (const int64_t size : shape) count *= static_cast<size_t>(size);
  std::vector<float> ones(count, 1.0F);
  OrtMemoryInfo* memory = nullptr;
  OrtValue* x = nullptr;
  OrtValue* y = nullptr;
  check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  check(ort->CreateTensorWithDataAsOrtValue(memory, ones.data(), count * sizeof(float), shape.data(), shape.size(),
                                            ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &x));

  OrtAllocator* allocator = nullptr;
  char* input = nullptr;
  char* output = nullptr;
  check(ort->GetAllocatorWithDefaultOptions(&allocator));
  check(ort->SessionGetInputName(session, 0, allocator, &input));
  check(ort->SessionGetOutputName(session, 0, allocator, &output));
  check(ort->Run(session, nullptr, &input, &x, 1, &output, 1, &y));

  void* numbers = nullptr;
  check(ort->GetTensorMutableData(y, &numbers));
  const size_t shown = std::min<size_t>(element_count(y), 8);
  for (size_t i = 0; i < shown; ++i) std::printf("%.9g\n", static_cast<const float*>(numbers)[i]);

  check(ort->AllocatorFree(allocator, input));
  check(ort->AllocatorFree(allocator, output));
  ort->ReleaseValue(y);
  ort->ReleaseValue(x);
  ort->ReleaseMemoryInfo(memory);
  ort->ReleaseSession(session);
  ort->ReleaseSessionOptions(options);
  ort->ReleaseEnv(env);
  return 0;
}
