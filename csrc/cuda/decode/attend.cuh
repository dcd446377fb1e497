// Attention of the new tokens of a (row, head) to one slice of its chunk states.
#pragma once

#include <cmath>

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
__device__ __forceinline__ void load_queries(const Decode& a, const Item& item, const Lane& lane, const float* rows,
                                             Queries<K::N>& queries) {
  uint32_t keys = item.keys, offset = item.offset;
#pragma unroll
  for (int i = 0; i < K::N; ++i) {
    queries.keys[i] = keys;
    load_scratch(rows + i * K::kColumns + lane.d, queries.q[i]);
    if (i + 1 < a.tokens && ++offset == a.chunk_size) {
      offset = 0;
      ++keys;
    }
  }
}

// Which of kKeys keys a lane of a group answers for, after their sums over the group.
template <int W, int kKeys>
__device__ __forceinline__ int own_key(const Lane& lane) {
  return kKeys == 4 ? lane.index / (W / 4) : lane.index / (W / 2);
}

// The sums over a lane group of several values, one left in each lane: that of own_key(). Half of the values go at each step.
template <int W, int kKeys>
__device__ __forceinline__ float shared_sum(const Lane& lane, const float (&x)[kKeys]) {
  static_assert(kKeys == 2 || kKeys == 4);
  const bool upper = lane.index >= W / 2;
  float mine;
  int step = W / 2;
  if constexpr (kKeys == 4) {
    float half[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      half[i] = __fadd_rn(upper ? x[i + 2] : x[i], __shfl_xor_sync(kFullWarp, upper ? x[i] : x[i + 2], W / 2));
    }
    const bool odd = lane.index / (W / 4) % 2 == 1;
    mine = __fadd_rn(odd ? half[1] : half[0], __shfl_xor_sync(kFullWarp, odd ? half[0] : half[1], W / 4));
    step = W / 4;
  } else {
    mine = __fadd_rn(upper ? x[1] : x[0], __shfl_xor_sync(kFullWarp, upper ? x[0] : x[1], W / 2));
  }
#pragma unroll
  for (step /= 2; step > 0; step /= 2) mine = __fadd_rn(mine, __shfl_xor_sync(kFullWarp, mine, step));
  return mine;
}

// Keys of a stage, from `base` on; those from `fresh_from` on are the new ones. kWhole: every token sees all, and none is new.
// Each lane keeps the sum of the weights of the keys that it answers for.
template <class K, bool kWhole>
__device__ __forceinline__ void attend(const Queries<K::N>& queries, const Lane& lane, int D, uint32_t base,
                                       uint32_t fresh_from, const typename K::S* stage, const typename K::S* fresh,
                                       const float (*fresh_scale)[kMostTokens], Running (&r)[K::N]) {
  using S = typename K::S;
  using T = typename K::T;
  constexpr int W = K::W, N = K::N, kKeys = K::kKeys;
  const uint32_t group = threadIdx.x / W;
  const S* const values = stage + K::kStageKeys * D;
  const float* const scales = reinterpret_cast<const float*>(values + K::kStageKeys * D);
  // The place of a key among the fresh ones, or -1.
  const auto fresh_place = [&](uint32_t at) {
    const bool is_fresh = !kWhole && N > 1 && base + at >= fresh_from;
    return is_fresh ? static_cast<int>(min(base + at - fresh_from, static_cast<uint32_t>(N - 1))) : -1;
  };
  float score[N][kKeys];
#pragma unroll
  for (int u = 0; u < kKeys; ++u) {
    const uint32_t at = u * K::kGroups + group;
    const int place = fresh_place(at);
    const S* const from = (place >= 0 ? fresh + place * D : stage + at * D) + lane.d;
    float x[8];
    unpack_state(*reinterpret_cast<const StateRaw<S>*>(from), x);
#pragma unroll
    for (int i = 0; i < N; ++i) score[i][u] = lane.live ? dot(queries.q[i], x) : 0.0f;
  }
  const uint32_t own_at = own_key<W, kKeys>(lane) * K::kGroups + group;
  float scale_k = 1.0f, scale_v = 1.0f;
  if constexpr (K::kScaled) {
    const int place = fresh_place(own_at);
    scale_k = place >= 0 ? fresh_scale[0][place] : scales[own_at];
    scale_v = place >= 0 ? fresh_scale[1][place] : scales[K::kStageKeys + own_at];
  }
  float weight[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float mine = shared_sum<W, kKeys>(lane, score[i]);
    if constexpr (K::kScaled) mine = __fmul_rn(mine, scale_k);
    if (!kWhole && base + own_at >= queries.keys[i]) mine = -INFINITY;
    float top = fmaxf(r[i].maximum, mine);
#pragma unroll
    for (int step = W / 2; step >= W / kKeys; step /= 2) top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, step));
    const float shrink = weight_of<T>(r[i].maximum - top);
    weight[i] = weight_of<T>(mine - top);
    r[i].maximum = top;
    r[i].sum = fmaf(r[i].sum, shrink, weight[i]);
    if constexpr (K::kScaled) weight[i] = __fmul_rn(weight[i], scale_v);
#pragma unroll
    for (int j = 0; j < 8; ++j) r[i].value[j] = __fmul_rn(r[i].value[j], shrink);
  }
#pragma unroll
  for (int u = 0; u < kKeys; ++u) {
    const uint32_t at = u * K::kGroups + group;
    const int place = fresh_place(at);
    const S* const from = (place >= 0 ? fresh + (N + place) * D : values + at * D) + lane.d;
    float x[8];
    unpack_state(*reinterpret_cast<const StateRaw<S>*>(from), x);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float of_key = __shfl_sync(kFullWarp, weight[i], u * (W / kKeys), W);
      // A key that the token does not see is left out: 0 times its value may be NaN.
      if (kWhole || base + at < queries.keys[i]) {
#pragma unroll
        for (int j = 0; j < 8; ++j) r[i].value[j] = fmaf(of_key, x[j], r[i].value[j]);
      }
    }
  }
}

// ---- joining ----------------------------------------------------------------------------------------------------------

constexpr int kJoinBarrier = 1;
template <class K>
__device__ __forceinline__ void join_sync() {
  named_barrier_sync(kJoinBarrier, K::kJoinThreads);
}

// The number of a thread among those that join.
template <class K>
__device__ __forceinline__ int join_thread() {
  const int thread = K::kMatrix ? fresh_thread() : static_cast<int>(threadIdx.x);
  return K::kJoiners > 0 ? thread - (K::kThreads - K::kJoinThreads) : thread;
}

// What a thread joins: a token, and of its values the elements d ... d + kEach - 1.
template <class K>
struct Share {
  static constexpr int kEach = K::N * K::kColumns > K::kJoinThreads ? K::N * K::kColumns / K::kJoinThreads : 1;
  static_assert(kEach <= 4 && 8 % kEach == 0 && K::kJoinThreads * kEach >= K::N * K::kColumns);
  int token, d;
  bool live;
  __device__ __forceinline__ explicit Share(const Decode& a) {
    const int thread = join_thread<K>();
    token = thread / (K::kColumns / kEach);
    d = thread % (K::kColumns / kEach) * kEach;
    live = token < a.tokens && d < a.p.head_dim;
  }
};

// Floats next to each other, as many as a thread has.
template <int EACH>
__device__ __forceinline__ void load_floats(const float* at, float (&x)[EACH]) {
  if constexpr (EACH == 1) {
    x[0] = *at;
  } else if constexpr (EACH == 2) {
    const float2 both = *reinterpret_cast<const float2*>(at);
    x[0] = both.x, x[1] = both.y;
  } else {
    const float4 all = *reinterpret_cast<const float4*>(at);
    x[0] = all.x, x[1] = all.y, x[2] = all.z, x[3] = all.w;
  }
}

template <int EACH>
__device__ __forceinline__ void store_floats(float* at, const float (&x)[EACH]) {
  if constexpr (EACH == 1) {
    *at = x[0];
  } else if constexpr (EACH == 2) {
    *reinterpret_cast<float2*>(at) = make_float2(x[0], x[1]);
  } else {
    *reinterpret_cast<float4*>(at) = make_float4(x[0], x[1], x[2], x[3]);
  }
}

// The softmax of a slice, or of several: of the values, what a thread has.
template <int EACH>
struct Joined {
  float maximum, sum;
  float value[EACH];
};

template <int EACH>
__device__ __forceinline__ void clear(Joined<EACH>& joined) {
  joined.maximum = kNoScore;
  joined.sum = 0.0f;
#pragma unroll
  for (float& x : joined.value) x = 0.0f;
}

// Brings the lane groups' softmaxes of a slice to shared memory, warp by warp.
template <class K>
__device__ __forceinline__ void share_slice(SharedHead& head, float* values, const Lane& lane, Running (&r)[K::N]) {
  constexpr int W = K::W;
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int i = 0; i < K::N; ++i) {
    float top = r[i].maximum;
#pragma unroll
    for (int step = W / 2; step >= W / K::kKeys; step /= 2) {
      r[i].sum = __fadd_rn(r[i].sum, __shfl_xor_sync(kFullWarp, r[i].sum, step));
    }
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
        head.maximum[0][i][warp] = top;
        head.sum[0][i][warp] = r[i].sum;
      }
    }
  }
}

// The warps' softmaxes of a slice. kAlone: the first warp has all keys; the others would change no bit.
template <class K, bool kAlone>
__device__ __forceinline__ void join_warps(const SharedHead& head, const float* values, int turn, const Share<K>& share,
                                           Joined<Share<K>::kEach>& joined) {
  constexpr int kEach = Share<K>::kEach, kWarps = kAlone ? 1 : kConsumerWarps;
  const float *const maximum = head.maximum[turn][share.token], *const sum = head.sum[turn][share.token];
  clear(joined);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) joined.maximum = fmaxf(joined.maximum, maximum[w]);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const float weight = weight_of<typename K::T>(maximum[w] - joined.maximum);
    float value[kEach];
    load_floats(values + (share.token * kConsumerWarps + w) * K::kColumns + share.d, value);
    joined.sum = fmaf(weight, sum[w], joined.sum);
#pragma unroll
    for (int e = 0; e < kEach; ++e) joined.value[e] = fmaf(weight, value[e], joined.value[e]);
  }
}

__device__ __forceinline__ float* partial_row(const Decode& a, const Item& item, int token, int64_t entry) {
  const int64_t pair = static_cast<int64_t>(item.row) * a.p.heads + item.head;
  return a.partial + ((pair * a.tokens + token) * a.entries + entry) * (a.p.head_dim + 8);
}

template <int EACH>
__device__ __forceinline__ void store_partial(const Decode& a, const Item& item, int token, int64_t entry, int d,
                                              const Joined<EACH>& joined) {
  float* const row = partial_row(a, item, token, entry);
  store_floats(row + d, joined.value);
  if (d == 0) {
    row[a.p.head_dim] = joined.maximum;
    row[a.p.head_dim + 1] = joined.sum;
  }
}

// `joined`, joined by a slice behind it. With nothing before it, a slice stays as it is, bit for bit. before and behind: the
// weights of both.
template <int EACH>
__device__ __forceinline__ void join(Joined<EACH>& joined, float before, float behind, float sum,
                                     const float (&value)[EACH]) {
  joined.sum = fmaf(behind, sum, __fmul_rn(before, joined.sum));
#pragma unroll
  for (int e = 0; e < EACH; ++e) joined.value[e] = fmaf(behind, value[e], __fmul_rn(before, joined.value[e]));
}
template <class T, int EACH>
__device__ __forceinline__ void join(Joined<EACH>& joined, const Joined<EACH>& slice) {
  const float top = fmaxf(joined.maximum, slice.maximum);
  const float before = weight_of<T>(joined.maximum - top), behind = weight_of<T>(slice.maximum - top);
  joined.maximum = top;
  join(joined, before, behind, slice.sum, slice.value);
}

// y of a token from its keys and its own state.
template <class K>
__device__ __forceinline__ void store_output(const Decode& a, const Item& item, const Share<K>& share,
                                             const Joined<Share<K>::kEach>& keys, float own_score,
                                             const float (&own_value)[Share<K>::kEach], const float* out_gate) {
  using T = typename K::T;
  constexpr int kEach = Share<K>::kEach;
  const float top = fmaxf(keys.maximum, own_score);
  const float of_keys = weight_of<T>(keys.maximum - top), own = weight_of<T>(own_score - top);
  const float sum = fmaf(of_keys, keys.sum, own);
  const float inverse = sizeof(T) == 4 ? 1.0f / sum : reciprocal_fast(sum);
  float open[kEach];
  load_floats(out_gate + share.token * K::kColumns + share.d, open);
  T* const y = out_row_of<T>(a.p.y, item.row, share.token, item.head, share.d);
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    y[e] = from_float<T>(fmaf(of_keys, keys.value[e], __fmul_rn(own, own_value[e])) * inverse * open[e]);
  }
}

}  // namespace rat::cuda
