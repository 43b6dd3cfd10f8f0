// What one core can do at most: multiplications and additions from registers to registers, in 10^9 operations a second.
// Prints a line for float32, and where the CPU has them for bfloat16 and int8. Compile with -march=native.
#include <chrono>
#include <cstdio>

// Sums that do not wait for each other, more than there are instructions in flight: 12 in the registers that every CPU
// has, 12 more in those of AVX-512.
#define ONE(instruction, r, sum) instruction " %%" r "14,%%" r "15,%%" r sum "\n"
#define FOUR(instruction, r, a, b, c, d) \
  ONE(instruction, r, a) ONE(instruction, r, b) ONE(instruction, r, c) ONE(instruction, r, d)
#define LOW(instruction, r)                                                                            \
  asm volatile(FOUR(instruction, r, "0", "1", "2", "3") FOUR(instruction, r, "4", "5", "6", "7") FOUR( \
                   instruction, r, "8", "9", "10", "11")::                                             \
                   : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11")
#define HIGH(instruction, r)                                                                                       \
  asm volatile(FOUR(instruction, r, "16", "17", "18", "19") FOUR(instruction, r, "20", "21", "22", "23")           \
                   FOUR(instruction, r, "24", "25", "26", "27")::                                                  \
                       : "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", \
                         "xmm26", "xmm27")

// `operations` are those of one call of `step`.
template <class Step>
static void print_peak(const char* name, double operations, Step step) {
  constexpr int kRounds = 4000;
  double best = 0;
  for (int attempt = 0; attempt < 300; ++attempt) {
    const auto begin = std::chrono::steady_clock::now();
    for (int round = 0; round < kRounds; ++round) step();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    const double rate = operations * kRounds / seconds * 1e-9;
    if (rate > best) best = rate;
  }
  std::printf("%s %.1f\n", name, best);
}

int main() {
#if defined(__AVX512F__)
  print_peak("float32", 24 * 32, [] {
    LOW("vfmadd231ps", "zmm");
    HIGH("vfmadd231ps", "zmm");
  });
#elif defined(__FMA__)
  print_peak("float32", 12 * 16, [] { LOW("vfmadd231ps", "ymm"); });
#endif
#if defined(__AVX512BF16__)
  print_peak("bfloat16", 24 * 64, [] {
    LOW("vdpbf16ps", "zmm");
    HIGH("vdpbf16ps", "zmm");
  });
#endif
#if defined(__AVX512VNNI__)
  print_peak("int8", 24 * 128, [] {
    LOW("vpdpbusd", "zmm");
    HIGH("vpdpbusd", "zmm");
  });
#endif
}
