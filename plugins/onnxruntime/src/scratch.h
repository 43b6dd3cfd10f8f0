// Memory for packed activations, kept by each thread between runs: page faults on fresh memory cost more than packing.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace lsp {

// A buffer aligned to 64 bytes, borrowed from the calling thread for as long as this object lives. Nested borrowing,
// from a task that a pool runs on a waiting thread, gets memory of its own.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes) {
    Buffer& kept = kept_buffer();
    buffer_ = kept;
    kept = Buffer{};
    if (buffer_.bytes >= bytes) return;
    std::free(buffer_.data);
    buffer_.bytes = (bytes + 65535) / 65536 * 65536;
    buffer_.data = std::aligned_alloc(64, buffer_.bytes);
    if (buffer_.data == nullptr) buffer_.bytes = 0;
  }
  ~Scratch() {
    Buffer& kept = kept_buffer();
    std::free(kept.data);
    kept = buffer_;
    buffer_ = Buffer{};
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // NULL if there was not enough memory.
  void* data() const { return buffer_.data; }

 private:
  struct Buffer {
    void* data = nullptr;
    std::size_t bytes = 0;
  };
  struct Kept : Buffer {
    ~Kept() { std::free(data); }
  };
  static Buffer& kept_buffer() {
    thread_local Kept kept;
    return kept;
  }

  Buffer buffer_;
};

}  // namespace lsp
