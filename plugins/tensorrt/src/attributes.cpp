#include "attributes.h"

#include <cstdio>
#include <cstring>
#include <stdexcept>

namespace lsp_tensorrt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

// The one list of all attributes, for reading, writing and hashing.
template <class A, class Visit>
void visit_attributes(A& a, Visit visit) {
  visit("K", a.K);
  visit("N", a.N);
  visit("block_k", a.block_k);
  visit("block_n", a.block_n);
  visit("col_ptr", a.col_ptr);
  visit("k_idx", a.k_idx);
  visit("activation", a.activation);
  visit("layout", a.layout);
  visit("x_scale", a.x_scale);
  visit("x_offset", a.x_offset);
  visit("out_type", a.out_type);
  visit("out_scale", a.out_scale);
  visit("out_offset", a.out_offset);
}

template <class A, class Visit>
void visit_types(A& a, Visit visit) {
  visit("values_type", a.values_type);
  visit("residual_type", a.residual_type);
}

// How each kind of attribute lies in a field.
const int32_t* data(const int32_t& value) { return &value; }
const float* data(const float& value) { return &value; }
const int32_t* data(const std::vector<int32_t>& values) { return values.data(); }
const char* data(const std::string& text) { return text.data(); }
size_t count(int32_t) { return 1; }
size_t count(float) { return 1; }
size_t count(const std::vector<int32_t>& values) { return values.size(); }
size_t count(const std::string& text) { return text.size() + 1; }  // the NUL at its end is part of it
PluginFieldType type(const int32_t*) { return PluginFieldType::kINT32; }
PluginFieldType type(const float*) { return PluginFieldType::kFLOAT32; }
PluginFieldType type(const char*) { return PluginFieldType::kCHAR; }

void assign(const PluginField& field, int32_t& value) { value = *static_cast<const int32_t*>(field.data); }
void assign(const PluginField& field, float& value) { value = *static_cast<const float*>(field.data); }
void assign(const PluginField& field, std::vector<int32_t>& values) {
  const auto* first = static_cast<const int32_t*>(field.data);
  values.assign(first, first + field.length);
}
void assign(const PluginField& field, std::string& text) {
  const auto* first = static_cast<const char*>(field.data);
  text.assign(first, strnlen(first, field.length));
}

template <class T>
void read(const PluginField& field, T& value) {
  constexpr bool is_single = std::is_arithmetic_v<T>;
  if (field.type != type(data(value)) || (is_single ? field.length != 1 : field.length < 0) ||
      (field.length > 0 && field.data == nullptr))
    throw std::invalid_argument(std::string("attribute ") + field.name + " has another type than it should have");
  if (field.length > 0) assign(field, value);
}

}  // namespace

Attributes attributes_of(const nvinfer1::PluginFieldCollection& fields) {
  Attributes attributes;
  for (int i = 0; i < fields.nbFields; ++i) {
    const PluginField& field = fields.fields[i];
    const auto take = [&](const char* name, auto& value) {
      if (std::strcmp(name, field.name) == 0) read(field, value);
    };
    visit_attributes(attributes, take);
    visit_types(attributes, take);
  }
  if (attributes.layout != "bsl16.v1")
    throw std::invalid_argument("its values are in layout " + attributes.layout +
                                ", the plugin reads bsl16.v1: compress the model for a GPU target");
  return attributes;
}

Fields::Fields(const Attributes& attributes, bool with_types) {
  const auto add = [&](const char* name, const auto& value) {
    if (count(value) == 0) return;  // no field is empty; what is not there is empty
    fields_.emplace_back(name, data(value), type(data(value)), static_cast<int32_t>(count(value)));
  };
  visit_attributes(attributes, add);
  if (with_types) visit_types(attributes, add);
  collection_.nbFields = static_cast<int32_t>(fields_.size());
  collection_.fields = fields_.data();
}

std::string digest(const Attributes& attributes) {
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
  const auto add = [&](const void* bytes, size_t size) {
    for (size_t i = 0; i < size; ++i) hash = (hash ^ static_cast<const uint8_t*>(bytes)[i]) * 0x100000001b3;
  };
  visit_attributes(attributes, [&](const char*, const auto& value) {
    const uint64_t size = count(value);
    add(&size, sizeof size);
    add(data(value), size * sizeof *data(value));
  });
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

}  // namespace lsp_tensorrt
