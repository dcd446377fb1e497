// The kernels for AVX2.
#include <cmath>
#include <cstdint>

#include "elements.h"
#include "plan.h"

#ifdef RAT_CPU_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define RAT_ISA avx2
#define RAT_VECTOR_BYTES 32
#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
