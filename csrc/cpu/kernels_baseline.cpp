// The kernels for whatever the compiler targets without being told: SSE2 on x86-64, NEON on AArch64.
#include <cmath>
#include <cstdint>

#include "elements.h"
#include "plan.h"

#define RAT_ISA baseline
#define RAT_VECTOR_BYTES 16
#include "kernels.inl"
