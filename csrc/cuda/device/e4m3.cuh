// Chunk states in e4m3: elements of one byte, and a scale for each state, a power of two.
#pragma once

#include <cuda_fp8.h>

#include "rows.cuh"

namespace rat::cuda {

struct e4m3 {
  uint8_t bits;
};

// The conversions of <cuda_fp8.h>, bit for bit (but that NaN has no sign), in a third of its instructions: for chips before 8.9,
// which have none of their own.
__device__ __forceinline__ float2 e4m3x2_to_float2(uint32_t pair) {
  const uint32_t high = (pair & 0xff) << 8 | (pair & 0xff00) << 16;  // in the upper byte of each half
  // Exponents are of base 7 there, of base 15 here: off by 2^8. NaN becomes 480, which is no e4m3.
  float2 x = unpack2<f16>((high >> 1 & 0x3f803f80) | (high & 0x80008000));
  x.x *= 256.0f, x.y *= 256.0f;
  if (fabsf(x.x) == 480.0f) x.x = __int_as_float(0x7fffffff);
  if (fabsf(x.y) == 480.0f) x.y = __int_as_float(0x7fffffff);
  return x;
}
__device__ __forceinline__ uint32_t float_to_e4m3(float x) {
  if (x != x) return 0x7f;
  const float magnitude = fminf(fabsf(x), 448.0f);
  // To the nearest, ties to even: the last bit of 2^(e + 20) is 2^(e - 3), for exponents e from -6 on.
  const float large = __uint_as_float(max(__float_as_uint(magnitude) & 0x7f800000, 0x3c800000) + (20 << 23));
  const float rounded = magnitude + large - large;
  return __float_as_uint(rounded * 0x1p-120f) >> 20 | (__float_as_uint(x) >> 24 & 0x80);
}

// Eight elements of a chunk state, as they lie in memory.
template <class S>
struct StateRaw {
  Raw8<S> raw;
};
template <>
struct alignas(8) StateRaw<e4m3> {
  uint32_t word[2];
};

template <class S>
__device__ __forceinline__ void unpack_state(const StateRaw<S>& state, float (&x)[8]) {
  if constexpr (sizeof(S) == 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = state.word[i / 2] >> (i % 2 * 16);
#if __CUDA_ARCH__ >= 890
      const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
      const float2 two = __half22float2(halves);
#else
      const float2 two = e4m3x2_to_float2(pair);
#endif
      x[2 * i] = two.x;
      x[2 * i + 1] = two.y;
    }
  } else {
    unpack(state.raw, x);
  }
}

// The least power of two that brings amax to 448, the largest e4m3; 1 for zeros. What is not finite makes all of the state NaN.
__device__ __forceinline__ float state_scale(float amax) {
  if (amax == 0.0f) return 1.0f;
  if (!(amax <= 3.402823466e+38f)) return amax;
  int exponent;
  const float fraction = frexpf(amax, &exponent);  // in [1/2, 1); 448 is 7/8 of 2^9
  exponent += fraction <= 0.875f ? -9 : -8;
  return ldexpf(1.0f, max(exponent, -117));
}

__device__ __forceinline__ void pack_state(const float (&x)[8], float scale, StateRaw<e4m3>& state) {
  const float inverse = 1.0f / scale;
  state.word[0] = state.word[1] = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#if __CUDA_ARCH__ >= 890
    const uint32_t bits = __nv_cvt_float_to_fp8(x[i] * inverse, __NV_SATFINITE, __NV_E4M3);
#else
    const uint32_t bits = float_to_e4m3(x[i] * inverse);
#endif
    state.word[i / 4] |= bits << (8 * (i % 4));
  }
}

// The scale of a state that a lane group of W lanes holds. All lanes of the warp take part.
template <int W>
__device__ __forceinline__ float scale_of_group(const float (&x)[8], const Lane& lane) {
  float amax = 0.0f;
  bool odd = false;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    amax = fmaxf(amax, fabsf(x[j]));
    odd = odd || x[j] != x[j];  // which fmaxf drops
  }
#pragma unroll
  for (int step = W / 2; step > 0; step /= 2) amax = fmaxf(amax, __shfl_xor_sync(kFullWarp, amax, step));
  const unsigned odds = __ballot_sync(kFullWarp, odd && lane.live);
  const unsigned of_group = W == 32 ? kFullWarp : ((1u << (W % 32)) - 1) << (threadIdx.x % 32 / W * W);
  return state_scale((odds & of_group) != 0 ? __int_as_float(0x7fffffff) : amax);
}

}  // namespace rat::cuda
