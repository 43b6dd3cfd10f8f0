#include "messages.h"

#include <atomic>
#include <cstdio>
#include <string>

#include "loaded_tensorrt.h"

namespace lsp_tensorrt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

nvinfer1::ILogger* logger() {
  if (nvinfer1::ILoggerFinder* finder = logger_finder) return finder->findLogger();
  const auto get = loaded_function<nvinfer1::ILogger*()>("getLogger");
  return get != nullptr ? get() : nullptr;
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) { logger_finder = finder; }

void log_error(const char* text) {
  const std::string line = std::string("lsp::BlockSparseLinear: ") + text;
  if (nvinfer1::ILogger* to = logger())
    to->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
  else
    std::fprintf(stderr, "%s\n", line.c_str());
}

}  // namespace lsp_tensorrt
