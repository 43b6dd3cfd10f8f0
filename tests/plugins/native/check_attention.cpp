// Runs attention on every instruction set there is, on several threads, and compares it with sums in double. For machines
// where Python is not at hand: another architecture under emulation. Prints the kernels that ran; the exit code says
// whether all results were right.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "lsp_cpu.h"

namespace {

struct Problem {
  int64_t batch, heads, queries, keys, size;
  bool bias;
};

const Problem kProblems[] = {
    {1, 3, 197, 197, 64, false}, {4, 2, 49, 49, 32, true}, {2, 2, 1, 50, 48, false}, {1, 1, 7, 130, 17, true}, {1, 2, 5, 3, 1, true},
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

std::vector<float> normal(std::mt19937& random, int64_t count) {
  std::normal_distribution<float> distribution;
  std::vector<float> values(count);
  for (float& value : values) value = distribution(random);
  return values;
}

// softmax(q kᵀ / 4 + bias) v of one query of one head.
std::vector<double> expected(const Problem& p, const float* q, const float* k, const float* v, int64_t stride,
                             const float* bias) {
  std::vector<double> weights(p.keys), y(p.size, 0.0);
  double sum = 0;
  for (int64_t t = 0; t < p.keys; ++t) {
    double score = bias == nullptr ? 0.0 : bias[t];
    for (int64_t d = 0; d < p.size; ++d) score += 0.25 * q[d] * k[t * stride + d];
    weights[t] = std::exp(score);
    sum += weights[t];
  }
  for (int64_t t = 0; t < p.keys; ++t) {
    for (int64_t d = 0; d < p.size; ++d) y[d] += weights[t] / sum * v[t * stride + d];
  }
  return y;
}

bool check(const Problem& p, const char* isa, lsp_type compute, std::string& kernel) {
  std::mt19937 random(0);
  const int64_t width = p.heads * p.size;
  const std::vector<float> q = normal(random, p.batch * p.queries * width);
  const std::vector<float> k = normal(random, p.batch * p.keys * width), v = normal(random, p.batch * p.keys * width);
  const int64_t repeats = p.batch > 1 ? 2 : 1;
  const std::vector<float> bias = normal(random, repeats * p.heads * p.queries * p.keys);
  std::vector<float> y(q.size());
  const lsp_attention_desc desc{p.heads, p.size, 0.25f, compute};
  lsp_attention* attention = nullptr;
  const char* why = lsp_attention_create(&desc, isa, &attention);
  if (why == nullptr) {
    kernel = lsp_attention_kernel(attention);
    const lsp_pool pool{run_on_threads, nullptr, 3};
    why = lsp_attention_run(attention, p.batch, p.queries, p.keys, {q.data(), p.queries * width, width},
                            {k.data(), p.keys * width, width}, {v.data(), p.keys * width, width},
                            p.bias ? bias.data() : nullptr, repeats, p.heads, y.data(), &pool);
    lsp_attention_destroy(attention);
  }
  if (why != nullptr) {
    std::fprintf(stderr, "%s: %s\n", isa, why);
    return false;
  }
  double worst = 0;
  for (int64_t row = 0; row < p.batch * p.queries; ++row) {
    const int64_t batch = row / p.queries, query = row % p.queries;
    for (int64_t head = 0; head < p.heads; ++head) {
      const int64_t keys = batch * p.keys * width + head * p.size;
      const int64_t matrix = batch % repeats * p.heads + head;
      const std::vector<double> right =
          expected(p, &q[row * width + head * p.size], &k[keys], &v[keys], width,
                   p.bias ? &bias[(matrix * p.queries + query) * p.keys] : nullptr);
      for (int64_t d = 0; d < p.size; ++d) {
        worst = std::max(worst, std::fabs(y[row * width + head * p.size + d] - right[d]));
      }
    }
  }
  const double allowed = compute == LSP_FLOAT32 ? 2e-5 : 5e-2;  // of values around one
  if (worst > allowed) std::fprintf(stderr, "%s: %g off, %g is allowed\n", kernel.c_str(), worst, allowed);
  return worst <= allowed;
}

}  // namespace

int main() {
  bool right = true;
  std::istringstream isas(lsp_isas());
  for (std::string isa; isas >> isa;) {
    for (const lsp_type compute : {LSP_FLOAT32, LSP_BFLOAT16}) {
      std::string kernel;
      for (const Problem& problem : kProblems) right = check(problem, isa.c_str(), compute, kernel) && right;
      std::printf("%s\n", kernel.c_str());
    }
  }
  return right ? 0 : 1;
}
