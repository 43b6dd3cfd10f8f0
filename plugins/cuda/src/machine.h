// What the kernels ask of the machine: PTX on a GPU, or the same operations on a CPU, for tests.
#pragma once

#include "types.h"

#if defined(__CUDACC__)
#include "machine_ptx.h"
#else
#include "../emulation/machine_cpu.h"
#endif
