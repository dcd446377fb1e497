// The special function unit: one instruction, about 22 good bits. Subnormal numbers count as zeros. PTX ISA 9.7.3.
#pragma once

namespace rat::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// The smaller one; NaN where one is NaN, which fminf drops. PTX ISA 9.7.3.11.
__device__ __forceinline__ float min_or_nan(float x, float limit) {
  asm("min.NaN.f32 %0, %0, %1;\n" : "+f"(x) : "f"(limit));
  return x;
}

// 2^x: relative error 2^-22; results below 2^-126 become 0. PTX ISA 9.7.3.21.
__device__ __forceinline__ float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(r) : "f"(x));
  return r;
}

// 1 / x, good to a unit in the last place, without the code that a division spends on subnormal numbers. PTX ISA 9.7.3.13.
__device__ __forceinline__ float reciprocal_fast(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(r) : "f"(x));
  return r;
}

}  // namespace rat::cuda
