// The running softmax. It starts from the self term, so that the maximum is finite before the first key: a score of -inf then
// weighs exp(-inf - m) = 0, and only a row of nothing but -inf divides 0 by 0. In the tensor core families scores are in powers
// of two: exp(scale s) = 2^(s scale_log2).
#pragma once

#include <cfloat>
#include <cmath>
#include <limits>

#include "../ptx/special.cuh"

namespace rat::cuda {

// What a row starts from, given the score of its self term: +inf and NaN are kept, and make the row NaN.
__device__ __forceinline__ float first_maximum(float own) { return own == -INFINITY ? -FLT_MAX : own; }
__device__ __forceinline__ float first_sum(float own) { return own == -INFINITY ? 0.0f : 1.0f; }

// |scale| log2(e) as kernels use it, from the float that it rounds to. Masked scores are -inf, and -inf times 0 would be NaN:
// so a scale of 0, and one that rounds to 0, is the smallest float above 0. The product of any score with it is below 5e-7,
// which weighs all keys alike.
inline float mask_safe(float scale_log2) { return std::fmax(scale_log2, std::numeric_limits<float>::denorm_min()); }

// The maximum of a row is raised only when a score exceeds it by more than this: weights then stay below 2^8, and the sums so
// far are rescaled a few times per tile instead of at every block of keys. The result is the same softmax, as all of a row is
// relative to one number.
constexpr float kSlack = 8.0f;

// Raises the maximum where it has to be. Returns what the sums so far shrink by: 1 where it was not.
__device__ __forceinline__ float raise_maximum(float& maximum, float top) {
  const bool raise = top > maximum + kSlack;
  const float shrink = raise ? exp2_fast(maximum - top) : 1.0f;
  maximum = raise ? top : maximum;
  return shrink;
}

// Over the four lanes that share a row of C tiles.
__device__ __forceinline__ float quad_maximum(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  x += __shfl_xor_sync(0xffffffffu, x, 2);
  return x;
}

}  // namespace rat::cuda
