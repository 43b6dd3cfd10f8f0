// Loops over registers must be unrolled completely, or the compiler keeps them in memory.
#pragma once

#if defined(__clang__)
#define LSP_UNROLL _Pragma("clang loop unroll(full)")
#define LSP_UNROLL_4 _Pragma("clang loop unroll_count(4)")
#else
#define LSP_UNROLL _Pragma("GCC unroll 64")
#define LSP_UNROLL_4 _Pragma("GCC unroll 4")
#endif
