// Attention of the new tokens of a (row, head) to one slice of its chunk states.
#pragma once

#include "states.cuh"

namespace rat::cuda {

// A softmax over some of the keys: sum of weights relative to 2^maximum, values weighted likewise. Each lane of a group holds
// eight values.
struct Running {
  float maximum, sum;
  float value[8];
};

__device__ __forceinline__ void clear(Running& r) {
  r.maximum = kNoScore;
  r.sum = 0.0f;
  zero(r.value);
}

// The new tokens: queries, scaled and rotated, and how many keys of the sequence each sees.
template <int N>
struct Queries {
  float q[N][8];
  uint32_t keys[N];
};

template <class K>
__device__ __forceinline__ void load_queries(const Decode& a, const Item& item, const Lane& lane,
                                             Queries<K::N>& queries) {
  using T = typename K::T;
  const DecodeParams& p = a.p;
  const int D = static_cast<int>(p.head_dim);
  const TokenRow<T> row = token_row<T>(a, p.q, item.row, item.head / static_cast<int>(p.heads / p.q_groups), lane);
  Raw8<T> raw[K::N];
#pragma unroll
  for (int i = 0; i < K::N; ++i) raw[i] = row.load(min(i, a.tokens - 1));
  Angle angle;
  uint32_t at = ~0u;
#pragma unroll
  for (int i = 0; i < K::N; ++i) {
    const uint32_t chunk = (item.length + min(i, a.tokens - 1)) / a.chunk_size;
    queries.keys[i] = chunk;
    unpack(raw[i], queries.q[i]);
#pragma unroll
    for (int j = 0; j < 8; ++j) queries.q[i][j] = lane.live ? __fmul_rn(queries.q[i][j], a.scale) : 0.0f;
    if (p.rotary.cos) {
      if (chunk != at) angle = load_angle(p.rotary, chunk, D, lane);
      at = chunk;
      rotate<K::W>(angle, D, lane, queries.q[i]);
      if (!lane.live) zero(queries.q[i]);
    }
  }
}

// Keys of a stage, from `base` on; those from `fresh_from` on are the new ones. kWhole: every token sees all, and none is new.
template <class K, bool kWhole>
__device__ __forceinline__ void attend(const Queries<K::N>& queries, const Lane& lane, int D, uint32_t base,
                                       uint32_t fresh_from, const typename K::S* stage, const typename K::S* fresh,
                                       const float (*fresh_scale)[kMostTokens], Running (&r)[K::N]) {
  using S = typename K::S;
  constexpr int W = K::W, N = K::N, kKeys = K::kKeys;
  const uint32_t group = threadIdx.x / W;
  const S* const values = stage + K::kStageKeys * D;
  const float* const scales = reinterpret_cast<const float*>(values + K::kStageKeys * D);
  float score[N][kKeys], scale_v[kKeys];
#pragma unroll
  for (int u = 0; u < kKeys; ++u) {
    const uint32_t at = u * K::kGroups + group, key = base + at;
    const bool is_fresh = !kWhole && N > 1 && key >= fresh_from;
    const int place = is_fresh ? static_cast<int>(min(key - fresh_from, static_cast<uint32_t>(N - 1))) : 0;
    const S* const from = (is_fresh ? fresh + place * D : stage + at * D) + lane.d;
    float x[8];
    unpack_state(*reinterpret_cast<const StateRaw<S>*>(from), x);
    float scale_k = 1.0f;
    if constexpr (K::kScaled) {
      scale_k = is_fresh ? fresh_scale[0][place] : scales[at];
      scale_v[u] = is_fresh ? fresh_scale[1][place] : scales[K::kStageKeys + at];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      score[i][u] = group_sum<W>(lane.live ? dot(queries.q[i], x) : 0.0f);
      if constexpr (K::kScaled) score[i][u] = __fmul_rn(score[i][u], scale_k);
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float top = r[i].maximum;
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
      if (kWhole || base + u * K::kGroups + group < queries.keys[i]) top = fmaxf(top, score[i][u]);
    }
    const float shrink = weight_of<typename K::T>(r[i].maximum - top);
    r[i].maximum = top;
    r[i].sum = __fmul_rn(r[i].sum, shrink);
#pragma unroll
    for (int j = 0; j < 8; ++j) r[i].value[j] = __fmul_rn(r[i].value[j], shrink);
#pragma unroll
    for (int u = 0; u < kKeys; ++u) score[i][u] = weight_of<typename K::T>(score[i][u] - top);
  }
#pragma unroll
  for (int u = 0; u < kKeys; ++u) {
    const uint32_t at = u * K::kGroups + group, key = base + at;
    const bool is_fresh = !kWhole && N > 1 && key >= fresh_from;
    const int place = is_fresh ? static_cast<int>(min(key - fresh_from, static_cast<uint32_t>(N - 1))) : 0;
    const S* const from = (is_fresh ? fresh + (N + place) * D : values + at * D) + lane.d;
    float x[8];
    unpack_state(*reinterpret_cast<const StateRaw<S>*>(from), x);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      // A key that the token does not see is left out: 0 times its value may be NaN.
      if (kWhole || key < queries.keys[i]) {
        const float weight = K::kScaled ? __fmul_rn(score[i][u], scale_v[u]) : score[i][u];
        r[i].sum = __fadd_rn(r[i].sum, score[i][u]);
#pragma unroll
        for (int j = 0; j < 8; ++j) r[i].value[j] = fmaf(weight, x[j], r[i].value[j]);
      }
    }
  }
}

// ---- joining ----------------------------------------------------------------------------------------------------------

constexpr int kConsumersBarrier = 1;
__device__ __forceinline__ void consumers_sync() { named_barrier_sync(kConsumersBarrier, kConsumers); }

// The softmax of a slice, or of several: one element of the values.
struct Joined {
  float maximum, sum, value;
};

// Brings the lane groups' softmaxes of a slice to shared memory, warp by warp.
template <class K>
__device__ __forceinline__ void share_slice(SharedHead& head, float* values, const Lane& lane, Running (&r)[K::N]) {
  constexpr int W = K::W;
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int i = 0; i < K::N; ++i) {
    float top = r[i].maximum;
#pragma unroll
    for (int step = W; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, step));
    const float shrink = weight_of<typename K::T>(r[i].maximum - top);
    r[i].sum = __fmul_rn(r[i].sum, shrink);
#pragma unroll
    for (int j = 0; j < 8; ++j) r[i].value[j] = __fmul_rn(r[i].value[j], shrink);
#pragma unroll
    for (int step = W; step < 32; step *= 2) {
      r[i].sum = __fadd_rn(r[i].sum, __shfl_xor_sync(kFullWarp, r[i].sum, step));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        r[i].value[j] = __fadd_rn(r[i].value[j], __shfl_xor_sync(kFullWarp, r[i].value[j], step));
      }
    }
    if (threadIdx.x % 32 < W) {
      if (lane.live) store_scratch(values + (i * kConsumerWarps + warp) * K::kColumns + lane.d, r[i].value);
      if (lane.index == 0) {
        head.maximum[i][warp] = top;
        head.sum[i][warp] = r[i].sum;
      }
    }
  }
}

// Element d of the values of token i, of all warps.
template <class K>
__device__ __forceinline__ Joined join_warps(const SharedHead& head, const float* values, int i, int d) {
  Joined joined{kNoScore, 0.0f, 0.0f};
#pragma unroll
  for (int w = 0; w < kConsumerWarps; ++w) joined.maximum = fmaxf(joined.maximum, head.maximum[i][w]);
#pragma unroll
  for (int w = 0; w < kConsumerWarps; ++w) {
    const float weight = weight_of<typename K::T>(head.maximum[i][w] - joined.maximum);
    joined.sum = fmaf(weight, head.sum[i][w], joined.sum);
    joined.value = fmaf(weight, values[(i * kConsumerWarps + w) * K::kColumns + d], joined.value);
  }
  return joined;
}

__device__ __forceinline__ float* partial_row(const Decode& a, const Item& item, int token, int64_t entry) {
  const int64_t pair = static_cast<int64_t>(item.row) * a.p.heads + item.head;
  return a.partial + ((pair * a.tokens + token) * a.entries + entry) * (a.p.head_dim + 8);
}

__device__ __forceinline__ void store_partial(const Decode& a, const Item& item, int token, int64_t entry, int d,
                                              const Joined& joined) {
  float* const row = partial_row(a, item, token, entry);
  row[d] = joined.value;
  if (d == 0) {
    row[a.p.head_dim] = joined.maximum;
    row[a.p.head_dim + 1] = joined.sum;
  }
}

// Slices [0, count), in order.
template <class K>
__device__ __forceinline__ Joined join_slices(const Decode& a, const Item& item, int token, int count, int d) {
  constexpr int kAtATime = 8;
  const int64_t D = a.p.head_dim;
  Joined joined{kNoScore, 0.0f, 0.0f};
#pragma unroll 1
  for (int first = 0; first < count; first += kAtATime) {
    Joined part[kAtATime];
    float top = joined.maximum;
#pragma unroll
    for (int s = 0; s < kAtATime; ++s) {
      part[s] = {kNoScore, 0.0f, 0.0f};
      if (first + s < count) {
        const float* const row = partial_row(a, item, token, 1 + first + s);
        part[s] = {__ldcg(row + D), __ldcg(row + D + 1), __ldcg(row + d)};
      }
    }
#pragma unroll
    for (int s = 0; s < kAtATime; ++s) top = fmaxf(top, part[s].maximum);
    const float shrink = weight_of<typename K::T>(joined.maximum - top);
    joined = {top, __fmul_rn(joined.sum, shrink), __fmul_rn(joined.value, shrink)};
#pragma unroll
    for (int s = 0; s < kAtATime; ++s) {
      const float weight = weight_of<typename K::T>(part[s].maximum - top);
      joined.sum = fmaf(weight, part[s].sum, joined.sum);
      joined.value = fmaf(weight, part[s].value, joined.value);
    }
  }
  return joined;
}

// y of a token from its keys and its own state.
template <class K>
__device__ __forceinline__ void store_output(const Decode& a, const Item& item, int token, int d, const Joined& keys,
                                             float own_score, float own_value) {
  using T = typename K::T;
  const float top = fmaxf(keys.maximum, own_score);
  const float of_keys = weight_of<T>(keys.maximum - top), own = weight_of<T>(own_score - top);
  const float sum = fmaf(of_keys, keys.sum, own);
  float y = fmaf(of_keys, keys.value, __fmul_rn(own, own_value)) * (1.0f / sum);
  if (a.p.out_gate.ptr) {
    float open, shut;
    gates<T>(__fmul_rn(kLogitUnit<T>, to_float(*row_of<T>(a.p.out_gate, item.row, token, item.head, d))), open, shut);
    y *= open;
  }
  *out_row_of<T>(a.p.y, item.row, token, item.head, d) = from_float<T>(y);
}

}  // namespace rat::cuda
