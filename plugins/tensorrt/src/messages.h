// Errors on their way to TensorRT: exceptions must not leave the plugin.
#pragma once

#include <NvInferRuntime.h>

#include <exception>

namespace lsp_tensorrt {

void set_logger_finder(nvinfer1::ILoggerFinder* finder);

void log_error(const char* text);

// Runs action; returns 0, or 1 after its error is logged.
template <class Action>
int32_t guarded(Action&& action) noexcept {
  try {
    action();
    return 0;
  } catch (const std::exception& error) {
    log_error(error.what());
    return 1;
  }
}

}  // namespace lsp_tensorrt
