// Runs layers of BlockSparseLinear on every instruction set there is, on several threads, and compares them with sums
// in double. For machines where Python is not at hand: another architecture under emulation, or a thread sanitizer's
// build. Prints the kernels that ran; the exit code says whether all results were right.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "lsp_cpu.h"

namespace {

struct Problem {
  int64_t M, K, N, block_k, block_n;
  double density;
  lsp_activation activation;
  bool residual, x_int8, y_int8;
};

const Problem kProblems[] = {
    {197, 96, 128, 32, 32, 0.5, LSP_GELU, false, false, false},
    {29, 100, 45, 16, 16, 0.5, LSP_NONE, true, false, false},
    {1, 64, 33, 16, 48, 0.7, LSP_GELU_TANH, true, true, true},
    {13, 37, 50, 5, 7, 0.6, LSP_RELU, false, true, false},
    {50, 160, 96, 32, 32, 1.0, LSP_NONE, true, false, true},
    {14, 64, 64, 32, 32, 0.0, LSP_GELU, false, false, false},
};

void run_on_threads(void*, lsp_task task, size_t count, void* user) {
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next++; i < count; i = next++) task(user, i);
  };
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
}

double activate(lsp_activation activation, double v) {
  if (activation == LSP_RELU) return std::max(v, 0.0);
  if (activation == LSP_GELU) return 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
  if (activation == LSP_GELU_TANH) return 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
  return v;
}

float rounded_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Returns whether the layer's results are right, and adds the name of the kernel that it ran.
bool check(const Problem& p, lsp_type type, const std::string& isa, std::set<std::string>& kernels) {
  std::mt19937 generator(static_cast<unsigned>(p.K * 1000 + p.N));
  std::uniform_real_distribution<float> uniform(-1, 1);
  const bool integers = type == LSP_INT8;
  const int64_t block_rows = (p.K + p.block_k - 1) / p.block_k, block_columns = (p.N + p.block_n - 1) / p.block_n;

  std::vector<double> weight(static_cast<size_t>(p.K * p.N));
  std::vector<int64_t> col_ptr{0}, k_idx;
  std::vector<float> floats;
  for (int64_t b = 0; b < block_columns; ++b) {
    for (int64_t i = 0; i < block_rows; ++i) {
      if ((uniform(generator) + 1) / 2 >= p.density) continue;
      k_idx.push_back(i);
      for (int64_t k = i * p.block_k; k < (i + 1) * p.block_k; ++k) {
        for (int64_t n = b * p.block_n; n < (b + 1) * p.block_n; ++n) {
          float value = uniform(generator);
          if (integers) value = std::round(value * 127);
          if (type == LSP_BFLOAT16) value = rounded_to_bfloat16(value);
          if (k >= p.K || n >= p.N) value = 0;
          floats.push_back(value);
          if (value != 0) weight[static_cast<size_t>(k * p.N + n)] = static_cast<double>(value);
        }
      }
    }
    col_ptr.push_back(static_cast<int64_t>(k_idx.size()));
  }
  if (floats.empty()) floats.assign(static_cast<size_t>(p.block_k * p.block_n), 0.0F);
  std::vector<int8_t> bytes;
  std::vector<uint16_t> halves;
  for (float value : floats) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    halves.push_back(static_cast<uint16_t>(bits >> 16));
    bytes.push_back(static_cast<int8_t>(integers ? value : 0));
  }

  const bool x_int8 = integers && p.x_int8;
  std::vector<float> bias, scale, residual, x;
  std::vector<int8_t> x_bytes;
  for (int64_t n = 0; n < p.N; ++n) {
    bias.push_back(uniform(generator));
    scale.push_back(integers ? 1e-4F * (2 + uniform(generator)) : 1.0F);
  }
  for (int64_t i = 0; i < p.M * p.N; ++i) residual.push_back(uniform(generator));
  for (int64_t i = 0; i < p.M * p.K; ++i) {
    x.push_back(uniform(generator));
    x_bytes.push_back(static_cast<int8_t>(std::round(x.back() * 127)));
  }

  lsp_linear_desc desc{};
  desc.K = p.K, desc.N = p.N, desc.block_k = p.block_k, desc.block_n = p.block_n;
  desc.col_ptr = col_ptr.data(), desc.col_ptr_count = col_ptr.size();
  desc.k_idx = k_idx.data(), desc.k_idx_count = k_idx.size();
  desc.values_type = type, desc.values_count = floats.size();
  desc.values = floats.data();
  if (integers) desc.values = bytes.data();
  if (type == LSP_BFLOAT16) desc.values = halves.data();
  desc.bias = bias.data(), desc.scale = scale.data(), desc.activation = p.activation;
  desc.x_type = x_int8 ? LSP_INT8 : LSP_FLOAT32;
  desc.x_scale = integers ? 0.01F : 0.0F;
  desc.out_type = p.y_int8 ? LSP_INT8 : LSP_FLOAT32;
  desc.out_scale = p.y_int8 ? 0.05F : 0.0F;
  lsp_linear* linear = nullptr;
  if (const char* why = lsp_linear_create(&desc, isa.c_str(), &linear)) return std::printf("%s\n", why), false;
  kernels.insert(lsp_linear_kernel(linear));

  std::vector<float> y(static_cast<size_t>(p.M * p.N));
  std::vector<int8_t> y_bytes(y.size());
  const lsp_pool pool{run_on_threads, nullptr, 3};
  void* out = p.y_int8 ? static_cast<void*>(y_bytes.data()) : y.data();
  const void* in = x_int8 ? static_cast<const void*>(x_bytes.data()) : x.data();
  const char* why = lsp_linear_run(linear, p.M, in, p.residual ? residual.data() : nullptr, out, &pool);
  lsp_linear_destroy(linear);
  if (why != nullptr) return std::printf("%s\n", why), false;

  double worst = 0;
  for (int64_t m = 0; m < p.M; ++m) {
    for (int64_t n = 0; n < p.N; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < p.K; ++k) {
        const size_t at = static_cast<size_t>(m * p.K + k);
        double value = x[at];
        if (type == LSP_BFLOAT16) value = rounded_to_bfloat16(x[at]);
        if (integers)
          value = x_int8 ? x_bytes[at] : std::clamp(std::nearbyint(x[at] * (1.0F / 0.01F)), -128.0F, 127.0F);
        sum += value * weight[static_cast<size_t>(k * p.N + n)];
      }
      const size_t at = static_cast<size_t>(m * p.N + n);
      const double v = activate(p.activation, sum * scale[static_cast<size_t>(n)] + bias[static_cast<size_t>(n)]);
      const double expected = v + (p.residual ? residual[at] : 0);
      const double limit = p.y_int8 ? 0.0251 : 1e-4;  // half a step of int8, or rounding
      const double wanted = p.y_int8 ? std::clamp(expected, -128 * 0.05, 127 * 0.05) : expected;
      worst = std::max(worst, std::abs((p.y_int8 ? y_bytes[at] * 0.05 : y[at]) - wanted) / limit);
    }
  }
  if (!(worst <= 1)) std::printf("%s, type %d, K %ld: error of %.3g limits\n", isa.c_str(), type, long(p.K), worst);
  return worst <= 1;
}

}  // namespace

int main() {
  bool right = true;
  std::set<std::string> kernels;
  std::istringstream isas(lsp_isas());
  for (std::string isa; isas >> isa;) {
    for (const Problem& problem : kProblems) {
      for (lsp_type type : {LSP_FLOAT32, LSP_BFLOAT16, LSP_INT8}) right &= check(problem, type, isa, kernels);
    }
  }
  for (const std::string& kernel : kernels) std::printf("%s\n", kernel.c_str());
  return right ? 0 : 1;
}
