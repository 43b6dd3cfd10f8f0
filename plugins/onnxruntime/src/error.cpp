#include "error.h"

#include <cstdarg>
#include <cstdio>

namespace lsp {

const char* error(const char* format, ...) {
  thread_local char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return text;
}

}  // namespace lsp
