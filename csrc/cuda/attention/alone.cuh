// A query on its own, key by key: for tiles that a product would not do.
//
// The families multiply a tile of queries by a block of values, with weight 0 where a query does not see a key. Where such a value
// is not finite, 0 times it is NaN, and the tile's earlier queries must take this way. It is slow and rare.
#pragma once

#include "../device/rows.cuh"
#include "../ptx/opaque.cuh"
#include "softmax.cuh"

namespace rat::cuda {

// A query, its own state and where its result goes.
template <class T>
struct LoneQuery {
  const T* q;        // not rotated
  const float* cos;  // of its angle; null: nothing is rotated
  const float* sin;
  const T* out_gate;  // null: no gate
  T* y;               // v~ on entry
  float* lse;
  float own;  // s_tt, in powers of two
  float scale_log2, sign;
  int keys, head_dim;
};

// By one warp. DPAD is at least D. key_at(j) is where the state of key j begins, in `k` and `v`.
template <int DPAD, class T, class KeyAt>
__device__ __forceinline__ void attend_alone(const LoneQuery<T>& p, const T* k, const T* v, const KeyAt& key_at) {
  constexpr int kMost = DPAD / 32;  // elements of a lane: lane, lane + 32, ...
  // Opaque: or what depends on the lane alone would be kept in registers by the loops around this rare way.
  const int lane = opaque(static_cast<int>(threadIdx.x % 32)), half = p.head_dim / 2;
  float q[kMost], sum[kMost];
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const int d = lane + 32 * i;
    q[i] = sum[i] = 0.0f;
    if (d < p.head_dim) {
      float x = to_float(p.q[d]);
      if (p.cos != nullptr) {
        const int angle = d < half ? d : d - half;
        const float other = to_float(p.q[d < half ? d + half : d - half]);
        x = fmaf(x, p.cos[angle], (d < half ? -other : other) * p.sin[angle]);
      }
      q[i] = to_float(from_float<T>(x * p.sign));
    }
  }
  float maximum = first_maximum(p.own), total = first_sum(p.own);
#pragma unroll 1
  for (int j = 0; j < p.keys; ++j) {
    const int64_t at = key_at(j);
    float score = 0.0f;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (lane + 32 * i < p.head_dim) score = fmaf(q[i], to_float(k[at + lane + 32 * i]), score);
    }
    score = group_sum<32>(score) * p.scale_log2;
    const float top = fmaxf(maximum, score), shrink = exp2_fast(maximum - top), weight = exp2_fast(score - top);
    maximum = top;
    total = fmaf(total, shrink, weight);
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (lane + 32 * i < p.head_dim) sum[i] = fmaf(sum[i], shrink, weight * to_float(v[at + lane + 32 * i]));
    }
  }
  const float own_weight = exp2_fast(p.own - maximum);
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const int d = lane + 32 * i;
    if (d < p.head_dim) {
      float y = fmaf(own_weight, to_float(p.y[d]), sum[i]) / total;
      if (p.out_gate != nullptr) y *= sigmoid(to_float(p.out_gate[d]));
      p.y[d] = from_float<T>(y);
    }
  }
  if (lane == 0) *p.lse = (maximum + log2f(total)) * kLn2;
}

}  // namespace rat::cuda
