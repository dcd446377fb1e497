// Element types, conversions, exponentials and gates. Everything is computed in float; storage is float, bfloat16 or half.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../ptx/special.cuh"

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

// Two floats to one word, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    static_assert(std::is_same_v<T, f16>);
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// The two floats of a word.
template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t word) {
  if constexpr (std::is_same_v<T, bf16>) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  } else {
    static_assert(std::is_same_v<T, f16>);
    return make_float2(__half2float(__ushort_as_half(static_cast<unsigned short>(word))),
                       __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16))));
  }
}

// sigmoid(x) from its own exponential; sigmoid(-x), called as such, has no cancellation either.
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// Gates of elements of two bytes are computed from logits in units of -ln 2, so that e^-x is one multiply-add (the bias comes
// in the same units) and one MUFU.EX2; float ones from plain logits.
template <class T>
constexpr float kLogitUnit = sizeof(T) == 4 ? 1.0f : -1.44269504089f;

// f = sigmoid and g = 1 - f of x, a logit times kLogitUnit, neither by cancellation. T says how precise the exponential has to
// be.
template <class T>
__device__ __forceinline__ void gates(float x, float& f, float& g) {
  if constexpr (sizeof(T) == 4) {
    const float e = expf(-fabsf(x));
    const float high = 1.0f / (1.0f + e);
    const float low = e * high;
    f = x < 0.0f ? low : high;
    g = x < 0.0f ? high : low;
  } else {
    // f = 1 / (1 + e), 1 - f = e f. The limit keeps e finite and f normal, .NaN lets a NaN through.
    const float e = exp2_fast(min_or_nan(x, 125.0f));
    f = reciprocal_fast(1.0f + e);
    g = e * f;
  }
}

}  // namespace rat::cuda
