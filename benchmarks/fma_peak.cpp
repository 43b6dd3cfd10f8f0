// What one core can do at most: multiplications and additions from registers to registers, in 10^9 operations a second.
// Prints a line for float32, and where the CPU has them for bfloat16 and int8. Compile with -march=native.
#include <chrono>
#include <cstdio>

// Twelve independent sums: more than latency times instructions a cycle.
#define TWELVE(instruction, r)                                                                           \
  asm volatile(instruction " %%" r "14,%%" r "15,%%" r "0\n" instruction " %%" r "14,%%" r "15,%%" r "1\n" \
               instruction " %%" r "14,%%" r "15,%%" r "2\n" instruction " %%" r "14,%%" r "15,%%" r "3\n" \
               instruction " %%" r "14,%%" r "15,%%" r "4\n" instruction " %%" r "14,%%" r "15,%%" r "5\n" \
               instruction " %%" r "14,%%" r "15,%%" r "6\n" instruction " %%" r "14,%%" r "15,%%" r "7\n" \
               instruction " %%" r "14,%%" r "15,%%" r "8\n" instruction " %%" r "14,%%" r "15,%%" r "9\n" \
               instruction " %%" r "14,%%" r "15,%%" r "10\n" instruction " %%" r "14,%%" r "15,%%" r "11\n" \
               ::: "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11")

template <class Step>
static void print_peak(const char* name, double operations, Step step) {
  constexpr int kRounds = 4000;
  double best = 0;
  for (int attempt = 0; attempt < 300; ++attempt) {
    const auto begin = std::chrono::steady_clock::now();
    for (int round = 0; round < kRounds; ++round) step();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    const double rate = 12 * operations * kRounds / seconds * 1e-9;
    if (rate > best) best = rate;
  }
  std::printf("%s %.1f\n", name, best);
}

int main() {
#if defined(__AVX512F__)
  print_peak("float32", 32, [] { TWELVE("vfmadd231ps", "zmm"); });
#elif defined(__FMA__)
  print_peak("float32", 16, [] { TWELVE("vfmadd231ps", "ymm"); });
#endif
#if defined(__AVX512BF16__)
  print_peak("bfloat16", 64, [] { TWELVE("vdpbf16ps", "zmm"); });
#endif
#if defined(__AVX512VNNI__)
  print_peak("int8", 128, [] { TWELVE("vpdpbusd", "zmm"); });
#endif
}
