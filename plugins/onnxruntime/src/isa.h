// The instruction sets that kernels are written for, and which of them this CPU has.
#pragma once

namespace lsp {

// In order of preference: of the kernels for one element type, the one with the greatest usable instruction set runs.
enum class Isa { portable, neon, neon_dot, avx2, avx2_vnni, avx512, avx512_vnni, avx512_bf16 };

// Whether this CPU, and its operating system, can run code written for `isa`.
bool available(Isa isa);

// Sets `cap` to the instruction set named `name`; without a name to the one that LSP_ISA names; without either to the
// best. A kernel may use what is available and not greater than `cap`. Returns NULL, or what is wrong with the name.
const char* find_isa_cap(const char* name, Isa& cap);

}  // namespace lsp
