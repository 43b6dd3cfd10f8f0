// Loops over registers must be unrolled completely, or the compiler keeps them in memory.
#pragma once

#if defined(__clang__)
#define LSP_UNROLL _Pragma("clang loop unroll(full)")
#else
#define LSP_UNROLL _Pragma("GCC unroll 64")
#endif
