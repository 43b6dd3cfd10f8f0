// Error messages that cross the C interface.
#pragma once

namespace lsp {

// Formats as printf does, and returns the text, which is valid until this thread's next call.
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
const char* error(const char* format, ...);

}  // namespace lsp
