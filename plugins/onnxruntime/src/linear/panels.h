// The weights as kernels read them: panels of columns, each a list of surviving chunks of 16 k.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "linear/kernel.h"
#include "lsp_cpu.h"

namespace lsp {

struct Panels {
  Shape shape{};
  std::vector<int64_t> first;   // of the chunks of each panel, and the number of all
  std::vector<int32_t> chunks;  // which chunk of K each one multiplies, ascending within a panel; and one more
  std::vector<float> bias, scale;
  std::vector<int32_t> start;  // what integer sums start from
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> words;  // [chunks][words of a chunk][columns], aligned to 64 bytes
  size_t chunk_bytes = 0;

  int64_t count() const { return static_cast<int64_t>(first.size()) - 1; }
};

// Packs what a checked description holds for `kernel`. Throws std::bad_alloc.
Panels pack_panels(const lsp_linear_desc& desc, const Kernel& kernel);

}  // namespace lsp
