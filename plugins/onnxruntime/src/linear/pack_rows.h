// Packing rows of x: for each chunk of 16 k, one row after another, so that a tile reads consecutive cache lines.
#pragma once

#include "linear/epilogue.h"
#include "linear/kernel.h"

namespace lsp {

// Writer::write(const Element*, char*) stores 16 values as words.
// A ragged last chunk is filled with zeros, which meet weights that are zero.
template <class Writer, class Element>
void pack_chunks(const Rows& rows, const Writer& writer) {
  constexpr int bytes = kChunk / Writer::group * 4;
  const int64_t whole = rows.K / kChunk;
  const int tail = static_cast<int>(rows.K % kChunk);
  for (int r = 0; r < rows.rows; ++r) {
    const Element* x = static_cast<const Element*>(rows.x) + r * rows.K;
    char* packed = static_cast<char*>(rows.packed) + r * bytes;
    for (int64_t c = 0; c < whole; ++c, x += kChunk, packed += rows.rows * bytes) writer.write(x, packed);
    if (tail != 0) {
      Element last[kChunk] = {};
      for (int i = 0; i < tail; ++i) last[i] = x[i];
      writer.write(last, packed);
    }
  }
}

template <class V>
struct FloatWriter {
  static constexpr int group = 1;
  void write(const float* x, char* packed) const {
    for (int i = 0; i < kChunk; i += V::lanes) V::store(reinterpret_cast<float*>(packed) + i, V::load(x + i));
  }
};

// bfloat16 where only floats can be multiplied: rounded, but kept in 32 bits.
template <class V>
struct RoundedWriter {
  static constexpr int group = 1;
  void write(const float* x, char* packed) const {
    for (int i = 0; i < kChunk; i += V::lanes) {
      V::store(reinterpret_cast<float*>(packed) + i, V::round_to_bfloat16(V::load(x + i)));
    }
  }
};

// int8, given or quantized here. Words::put(const int8_t*, char*) stores 16 of them as Words::group asks.
template <class V, class Words>
struct Int8Writer {
  static constexpr int group = Words::group;
  typename V::Float offset;
  typename V::Float reciprocal;

  void write(const int8_t* x, char* packed) const { Words::put(x, packed); }
  void write(const float* x, char* packed) const {
    alignas(16) int8_t q[kChunk];
    for (int i = 0; i < kChunk; i += V::lanes) V::store_int8(q + i, quantize<V>(V::load(x + i), offset, reciprocal));
    Words::put(q, packed);
  }
};

template <class V>
void pack_float(const Rows& rows) {
  pack_chunks<FloatWriter<V>, float>(rows, FloatWriter<V>());
}

template <class V>
void pack_rounded(const Rows& rows) {
  pack_chunks<RoundedWriter<V>, float>(rows, RoundedWriter<V>());
}

template <class V, class Words>
void pack_int8(const Rows& rows) {
  const Int8Writer<V, Words> writer{V::broadcast(rows.quantization.offset), V::broadcast(rows.quantization.reciprocal)};
  if (rows.x_type == LSP_INT8) {
    pack_chunks<Int8Writer<V, Words>, int8_t>(rows, writer);
  } else {
    pack_chunks<Int8Writer<V, Words>, float>(rows, writer);
  }
}

}  // namespace lsp
