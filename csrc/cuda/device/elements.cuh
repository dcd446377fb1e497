// Element types and 8-element vector access. Everything is computed in float; storage is float, bfloat16 or half.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace rat::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
  return __float2half_rn(x);
}

// sigmoid(x) and sigmoid(-x) without cancellation: each from its own exponential.
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// Eight consecutive elements into registers. `vector` is uniform over the launch: 16-byte loads, or one by one when a
// pointer or stride of the call is not a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ void load8(const T* p, float (&x)[8], bool vector) {
  if (vector) {
    alignas(16) T raw[8];
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) * 8 / 16); ++i) {
      reinterpret_cast<Bytes16*>(raw)[i] = reinterpret_cast<const Bytes16*>(p)[i];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = to_float(raw[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = to_float(p[i]);
  }
}

template <class T>
__device__ __forceinline__ void store8(T* p, const float (&x)[8], bool vector) {
  if (vector) {
    alignas(16) T raw[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) raw[i] = from_float<T>(x[i]);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) * 8 / 16); ++i) {
      reinterpret_cast<Bytes16*>(p)[i] = reinterpret_cast<const Bytes16*>(raw)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) p[i] = from_float<T>(x[i]);
  }
}

}  // namespace rat::cuda
