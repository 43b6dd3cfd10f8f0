#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <string>

#include "error.h"
#include "lsp_cpu.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#endif

namespace lsp {
namespace {

struct Name {
  Isa isa;
  const char* text;
};

// Best first, as lsp_isas() lists them.
constexpr Name kNames[] = {
    {Isa::avx512_bf16, "avx512_bf16"},
    {Isa::avx512_vnni, "avx512_vnni"},
    {Isa::avx512, "avx512"},
    {Isa::avx2_vnni, "avx2_vnni"},
    {Isa::avx2, "avx2"},
    {Isa::neon_dot, "neon_dot"},
    {Isa::neon, "neon"},
    {Isa::portable, "portable"},
};

#if defined(__x86_64__)
// GCC 12's __builtin_cpu_supports does not know AVX-VNNI: CPUID leaf 7, subleaf 1, EAX bit 4.
bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 &&
         (eax & (1U << 4)) != 0;
}
#endif

}  // namespace

bool available(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return true;
#if defined(__x86_64__)
    // These also ask the operating system whether it saves the registers.
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx2_vnni:
      return available(Isa::avx2) && has_avx_vnni();
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx512_vnni:
      return available(Isa::avx512) && __builtin_cpu_supports("avx512vnni");
    case Isa::avx512_bf16:
      return available(Isa::avx512_vnni) && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__)
    case Isa::neon:
      return true;
#if defined(__linux__)
    case Isa::neon_dot:
      return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
#endif
    default:
      return false;
  }
}

const char* find_isa_cap(const char* name, Isa& cap) {
  const char* origin = "isa";
  if (name == nullptr || *name == '\0') {
    name = std::getenv("LSP_ISA");
    origin = "LSP_ISA";
  }
  if (name == nullptr || *name == '\0') {
    cap = kNames[0].isa;
    return nullptr;
  }
  for (const Name& known : kNames) {
    if (std::strcmp(known.text, name) != 0) continue;
    if (!available(known.isa)) return error("%s=%s: this CPU cannot run it, only: %s", origin, name, lsp_isas());
    cap = known.isa;
    return nullptr;
  }
  return error("%s=%s is not a known instruction set; usable here: %s", origin, name, lsp_isas());
}

}  // namespace lsp

extern "C" const char* lsp_isas(void) {
  static const std::string names = [] {
    std::string text;
    for (const lsp::Name& known : lsp::kNames) {
      if (!lsp::available(known.isa)) continue;
      if (!text.empty()) text += ' ';
      text += known.text;
    }
    return text;
  }();
  return names.c_str();
}
