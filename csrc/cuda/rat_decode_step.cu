// One decode step for every row of a batch, in one launch: scan one token, attend to the chunk states, append, advance.
//
// A block takes a slice of the chunk states of one (row, head). Its lane groups (rows.cuh) take keys in turn, four at a
// time, each with a running softmax in registers; groups are merged by shuffles and through shared memory. Bytes: the chunk
// states, 2 C D per (row, head), read once, 16 bytes per lane; the rest is small.
//
//   slice 0          advances the running state, starts its softmax from the own state, appends the chunk state that closes.
//                    No one else reads what it writes: the keys of this token are the chunks closed before it.
//   last slice       to arrive at a (row, head) (atomic counter; partial results are published by a fence before it) merges
//                    the slices in order, applies the output gate, stores y.
//   last head        to arrive at a row, after all of its blocks have read the length, advances it.
//
// The counters belong to the entries of the pool, the partial results to the call: steps over disjoint entries may run at
// the same time. A counter wraps to zero with the last arrival, so the workspace is zeroed once, when the cache is made.
// Every decision from a length is taken on the device: a CUDA graph may replay the step.
//
// What is not finite becomes what the definition makes of it: a score of -inf weighs 0, also where a group has seen
// nothing else; one of +inf or NaN, or nothing but -inf, makes y NaN; and the weight of each key that the token sees
// multiplies its value, 0 * inf = NaN, but no value that it does not see.
#include <algorithm>
#include <cfloat>
#include <cstdio>

#include "recurrence/scan_launch.h"

namespace rat::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
// Blocks that a launch splits (row, head) pairs into, at most: bounds the partial results.
constexpr int64_t kMaxBlocks = 1056;
constexpr int64_t kMaxSlices = 64;

// The maximum of a softmax over no keys: below no finite score, and finite, so that e^(-inf - maximum) is 0.
constexpr float kNoScore = -FLT_MAX;

struct Decode {
  DecodeParams p;
  int slices;
  float* partial;      // (batch * H * slices, D + 8): unnormalised values, then maximum and sum; null if slices == 1
  unsigned* arrived;   // (pool, H): slices that are done
  unsigned* heads_in;  // (pool): heads that are done
};

// A softmax over some of the keys: sum of weights relative to exp(maximum), values weighted likewise. Each lane of a group
// holds eight values.
struct Running {
  float maximum, sum;
  float value[8];
};

__device__ __forceinline__ void clear(Running& r) {
  r.maximum = kNoScore;
  r.sum = 0.0f;
  zero(r.value);
}

// a, joined by b.
__device__ __forceinline__ void merge(Running& a, float maximum, float sum, const float (&value)[8]) {
  const float top = fmaxf(a.maximum, maximum);
  const float mine = a.maximum == top ? 1.0f : expf(a.maximum - top);
  const float other = maximum == top ? 1.0f : expf(maximum - top);
  a.maximum = top;
  a.sum = a.sum * mine + sum * other;
#pragma unroll
  for (int j = 0; j < 8; ++j) a.value[j] = a.value[j] * mine + value[j] * other;
}

// Merges all lane groups of the block; the result is in the groups of warp 0. `shared`: kWarps x (W * 8 + 2) floats.
template <int W>
__device__ __forceinline__ void merge_block(Running& r, float* shared) {
#pragma unroll
  for (int distance = W; distance < 32; distance *= 2) {
    float value[8];
    const float maximum = __shfl_xor_sync(kFullWarp, r.maximum, distance);
    const float sum = __shfl_xor_sync(kFullWarp, r.sum, distance);
#pragma unroll
    for (int j = 0; j < 8; ++j) value[j] = __shfl_xor_sync(kFullWarp, r.value[j], distance);
    merge(r, maximum, sum, value);
  }
  constexpr int kRow = W * 8 + 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();  // `shared` may still be read from the last merge
  if (lane < W) {
#pragma unroll
    for (int j = 0; j < 8; ++j) shared[warp * kRow + j * W + lane] = r.value[j];
    if (lane == 0) {
      shared[warp * kRow + 8 * W] = r.maximum;
      shared[warp * kRow + 8 * W + 1] = r.sum;
    }
  }
  __syncthreads();  // every warp's result is there
  if (warp == 0) {
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      float value[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) value[j] = shared[w * kRow + j * W + lane % W];
      merge(r, shared[w * kRow + 8 * W], shared[w * kRow + 8 * W + 1], value);
    }
  }
}

// Counts an arrival; true for the last of `all`. The counter is back at zero after each round of `all`, and so it is after
// a call that names one entry twice: what its y is nobody says, but later calls are right.
__device__ __forceinline__ bool last_of(unsigned* counter, unsigned all) {
  return atomicInc(counter, all - 1) == all - 1;
}

// The token of a block, and where it stands.
struct Token {
  int64_t b, h;  // row, head
  int64_t entry;
  int64_t length;  // of the sequence, without this token
  int64_t chunk, offset;
  bool closes;  // its chunk
};

// Stops the kernel with a message where the token has no place.
__device__ __forceinline__ bool has_place(const DecodeParams& p, const Token& t) {
  if (t.length < 0 || t.chunk > p.pool.rows || (t.closes && t.chunk >= p.pool.rows) || t.length >= INT32_MAX) {
    if (threadIdx.x == 0) {
      printf(
          "rat_ext.rat_decode_step: cache: sequence %lld has %lld tokens; its %lld chunk states of %lld tokens have no "
          "room for one more token (cache full)\n",
          static_cast<long long>(t.entry), static_cast<long long>(t.length), static_cast<long long>(p.pool.rows),
          static_cast<long long>(p.chunk_size));
      __trap();  // here, so that nobody stops the kernel before the message is out
    }
    return false;
  }
  if (p.rotary.cos && t.chunk >= p.rotary.rows) {
    if (threadIdx.x == 0) {
      printf("rat_ext.rat_decode_step: rotary_cos: expected more than %lld rows, one for each chunk, got %lld\n",
             static_cast<long long>(t.chunk), static_cast<long long>(p.rotary.rows));
      __trap();  // here, so that nobody stops the kernel before the message is out
    }
    return false;
  }
  return true;
}

// Advances the running state, starts the softmax of the group that stores from it, and appends the chunk state that
// closes. For one warp: keys first, then values, to hold few registers. All groups of it compute, the first stores; each
// barrier stands between the last read of a running state and its update. q: scaled, not rotated.
template <class T, int W, bool kVector>
__device__ __forceinline__ void advance_states(const DecodeParams& p, const Token& t, const Lane& lane,
                                               const float (&q)[8], T* chunk_k, T* chunk_v, Running& r) {
  const bool leads = threadIdx.x < W;
  const int64_t at = (t.entry * p.heads + t.h) * p.head_dim + lane.d;
  float* const running_k = static_cast<float*>(p.pool.running_k) + at;
  float* const running_v = static_cast<float*>(p.pool.running_v) + at;
  float state[8], f[8], g[8], x[8];
  zero(x);
  if (p.gate_bias) load_floats(static_cast<const float*>(p.gate_bias) + t.h * p.head_dim + lane.d, x);
#pragma unroll
  for (int j = 0; j < 8; ++j) x[j] *= kLogitUnit<T>;
  gates_of(load_raw<kVector>(row_of<T>(p.gate, t.b, 0, t.h, lane.d)), x, true, f, g);

  zero(state);
  if (t.offset > 0) load_floats(running_k, state);
  load_row<kVector>(row_of<T>(p.k, t.b, 0, t.h / (p.heads / p.k_groups), lane.d), x);
  advance(f, g, x, state);
  const float own = group_sum<W>(lane.live ? dot(q, state) : 0.0f);
  __syncwarp();
  if (leads && lane.live) store_floats(running_k, state);
  if (t.closes) {
    if (p.rotary.cos) rotate<W>(p.rotary, t.chunk, p.head_dim, lane, 1.0f, state);
    if (leads && lane.live) store_row<kVector>(chunk_k + t.chunk * p.head_dim, state);
  }

  zero(state);
  if (t.offset > 0) load_floats(running_v, state);
  load_row<kVector>(row_of<T>(p.v, t.b, 0, t.h, lane.d), x);
  advance(f, g, x, state);
  __syncwarp();
  if (leads) {
    r.maximum = fmaxf(own, kNoScore);
    r.sum = expf(own - r.maximum);  // 1 for a finite score
#pragma unroll
    for (int j = 0; j < 8; ++j) r.value[j] = r.sum * state[j];
  }
  if (leads && lane.live) {
    store_floats(running_v, state);
    if (t.closes) store_row<kVector>(chunk_v + t.chunk * p.head_dim, state);
  }
}

// Attends to keys [begin, end), which is the same range for all groups of the block: shuffles need whole warps.
template <class T, int W, bool kVector>
__device__ __forceinline__ void attend(const T* chunk_k, const T* chunk_v, int64_t head_dim, int64_t begin, int64_t end,
                                       const Lane& lane, const float (&q)[8], Running& r) {
  constexpr int kGroups = kThreads / W;
  constexpr int kKeys = sizeof(T) == 4 ? 2 : 4;
  const int group = static_cast<int>(threadIdx.x) / W;
#pragma unroll 1
  for (int64_t base = begin; base < end; base += kGroups * kKeys) {
    Raw8<T> k_raw[kKeys], v_raw[kKeys];
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
      const int64_t key = min(base + u * kGroups + group, end - 1);
      k_raw[u] = load_raw<kVector>(chunk_k + key * head_dim);
      v_raw[u] = load_raw<kVector>(chunk_v + key * head_dim);
    }
    float score[kKeys];
    float top = r.maximum;
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
      float x[8];
      unpack(k_raw[u], x);
      score[u] = group_sum<W>(lane.live ? dot(q, x) : 0.0f);
      if (base + u * kGroups + group < end) top = fmaxf(top, score[u]);
    }
    const float shrink = r.maximum == top ? 1.0f : expf(r.maximum - top);
    r.maximum = top;
    r.sum *= shrink;
#pragma unroll
    for (int j = 0; j < 8; ++j) r.value[j] *= shrink;
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
      if (base + u * kGroups + group >= end) break;  // a key that another group has: 0 times its value may be NaN
      const float weight = expf(score[u] - top);
      r.sum += weight;
      float x[8];
      unpack(v_raw[u], x);
#pragma unroll
      for (int j = 0; j < 8; ++j) r.value[j] = fmaf(weight, x[j], r.value[j]);
    }
  }
}

// Publishes the result of a slice. False for all threads of the block unless it is the last one of its (row, head); r is
// then the sum of all slices, in the groups of warp 0.
template <int W>
__device__ __forceinline__ bool merge_slices(const Decode& a, const Token& t, int64_t pair, int slice, const Lane& lane,
                                             float* shared, bool& is_last, Running& r) {
  const int64_t D = a.p.head_dim, row = D + 8;
  float* const mine = a.partial + (pair * a.slices + slice) * row;
  if (threadIdx.x < W && lane.live) {
    store_scratch(mine + lane.d, r.value);
    if (lane.index == 0) {
      mine[D] = r.maximum;
      mine[D + 1] = r.sum;
    }
    __threadfence();
  }
  __syncthreads();  // partial results are published before the arrival is counted
  if (threadIdx.x == 0) {
    is_last = last_of(a.arrived + t.entry * a.p.heads + t.h, static_cast<unsigned>(a.slices));
    __threadfence();  // and the others' are read after it
  }
  __syncthreads();
  if (!is_last) return false;
  clear(r);
  for (int i = static_cast<int>(threadIdx.x) / W; i < a.slices; i += kThreads / W) {
    const float* from = a.partial + (pair * a.slices + i) * row;
    float value[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) value[j] = __ldcg(from + lane.d + j);
    merge(r, __ldcg(from + D), __ldcg(from + D + 1), value);
  }
  merge_block<W>(r, shared);
  return true;
}

template <class T, bool kVector>
__device__ __forceinline__ void store_output(const DecodeParams& p, const Token& t, const Lane& lane, T* y,
                                             Running& r) {
  const float inverse = 1.0f / r.sum;
#pragma unroll
  for (int j = 0; j < 8; ++j) r.value[j] *= inverse;
  if (p.out_gate.ptr) {
    float z[8];
    load_row<kVector>(row_of<T>(p.out_gate, t.b, 0, t.h, lane.d), z);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float open, shut;
      gates<T>(kLogitUnit<T> * z[j], open, shut);
      r.value[j] *= open;
    }
  }
  store_row<kVector>(y, r.value);
}

template <class T, int W, bool kVector>
__global__ void __launch_bounds__(kThreads, kVector && sizeof(T) == 2 ? 5 : 4)
    decode_step_kernel(const __grid_constant__ Decode a) {
  __shared__ float shared[kWarps * (W * 8 + 2)];
  __shared__ bool is_last;
  const DecodeParams& p = a.p;
  const int slice = static_cast<int>(blockIdx.x % a.slices);
  const int64_t pair = blockIdx.x / a.slices;
  Token t;
  t.b = pair / p.heads;
  t.h = pair % p.heads;
  const Lane lane = lane_of<W>(t.h, p.heads, p.head_dim);
  const bool stores = threadIdx.x < W && lane.live;  // a lane of the group that stores

  t.entry = p.slots ? p.slots[t.b] : t.b;
  T* const y = static_cast<T*>(p.y.ptr) + t.b * p.y.batch + t.h * p.y.head + lane.d;
  if (t.entry < 0) {
    float none[8];
    zero(none);
    if (slice == 0 && stores) store_row<false>(y, none);
    return;
  }
  if (t.entry >= p.pool.sequences) {
    if (threadIdx.x == 0) {
      printf("rat_ext.rat_decode_step: slots[%lld]: expected less than %lld, the sequences of the cache, got %lld\n",
             static_cast<long long>(t.b), static_cast<long long>(p.pool.sequences), static_cast<long long>(t.entry));
      __trap();  // here, so that nobody stops the kernel before the message is out
    }
    return;
  }
  t.length = p.pool.lengths[t.entry];
  t.chunk = t.length / p.chunk_size;
  t.offset = t.length - t.chunk * p.chunk_size;
  t.closes = t.offset == p.chunk_size - 1;
  if (!has_place(p, t)) return;

  // q, scaled, unrotated for the own state and rotated for the chunks.
  float q[8];
  load_row<kVector>(row_of<T>(p.q, t.b, 0, t.h / (p.heads / p.q_groups), lane.d), q);
#pragma unroll
  for (int j = 0; j < 8; ++j) q[j] = lane.live ? static_cast<float>(p.scale) * q[j] : 0.0f;

  Running r;
  clear(r);
  const int64_t states = (t.entry * p.heads + t.h) * p.pool.rows * p.head_dim + lane.d;
  T* const chunk_k = static_cast<T*>(p.pool.chunk_k) + states;
  T* const chunk_v = static_cast<T*>(p.pool.chunk_v) + states;
  if (slice == 0 && threadIdx.x < 32) advance_states<T, W, kVector>(p, t, lane, q, chunk_k, chunk_v, r);
  if (p.rotary.cos) rotate<W>(p.rotary, t.chunk, p.head_dim, lane, 1.0f, q);
  const int64_t begin = t.chunk * slice / a.slices, end = t.chunk * (slice + 1) / a.slices;
  attend<T, W, kVector>(chunk_k, chunk_v, p.head_dim, begin, end, lane, q, r);
  merge_block<W>(r, shared);
  if (a.slices > 1 && !merge_slices<W>(a, t, pair, slice, lane, shared, is_last, r)) return;
  if (stores) store_output<T, kVector>(p, t, lane, y, r);

  // All threads of this block have read the length, long before merge_block's barriers.
  if (threadIdx.x == 0) {
    __threadfence();
    if (last_of(a.heads_in + t.entry, static_cast<unsigned>(p.heads))) {
      p.pool.lengths[t.entry] = static_cast<int32_t>(t.length + 1);
    }
  }
}

struct Counters {
  Piece<unsigned> heads_in, arrived;
};

Counters take_counters(const DecodeParams& p, Arena& workspace) {
  Counters c;
  c.heads_in = workspace.take<unsigned>(p.pool.sequences);
  c.arrived = workspace.take<unsigned>(p.pool.sequences * p.heads);
  return c;
}

}  // namespace

size_t decode_workspace(const DecodeParams& p) {
  Arena workspace;
  take_counters(p, workspace);
  return workspace.bytes();
}

void decode_step(const DecodeParams& p, const Allocator& allocator, void* stream) {
  if (p.batch == 0 || p.heads == 0) return;
  if (p.tokens != 1 || p.pool.ring != 1 || p.pool.page_table || p.pool.scale_k) {
    throw std::runtime_error("rat_ext.rat_decode_step: on a GPU one token for each row, and a plain cache");
  }
  Decode a{};
  a.p = p;
  // The counters live as long as the cache, the partial results as long as the call.
  Arena workspace, scratch;
  const Counters counters = take_counters(p, workspace);
  workspace.commit({[](void* memory, size_t) { return memory; }, p.workspace});
  a.heads_in = counters.heads_in;
  a.arrived = counters.arrived;
  // Enough slices to fill the chip, each of at least 16 keys of a full cache.
  const int64_t pairs = p.batch * p.heads;
  const int64_t useful = std::min(kMaxSlices, ceil_div(p.pool.rows, 16));
  a.slices = static_cast<int>(std::max<int64_t>(1, std::min(useful, kMaxBlocks / pairs)));
  Piece<float> partial;
  if (a.slices > 1) partial = scratch.take<float>(pairs * a.slices * (p.head_dim + 8));
  scratch.commit(allocator);
  a.partial = partial;
  Sizes s;
  s.dtype = p.dtype;
  s.head_dim = p.head_dim;
  s.aligned16 = p.aligned16 && reinterpret_cast<uintptr_t>(p.pool.chunk_k) % 16 == 0 &&
                reinterpret_cast<uintptr_t>(p.pool.chunk_v) % 16 == 0 && reinterpret_cast<uintptr_t>(p.y.ptr) % 16 == 0;
  const unsigned blocks = grid_x(pairs * a.slices, "decode_step");
  with_variant(s, "rat_decode_step", [&](auto variant) {
    using V = decltype(variant);
    decode_step_kernel<typename V::T, V::W, V::kVector><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
    check_launch("decode_step");
  });
}

KernelList decode_kernels() {
  static const KernelTable table = [] {
    KernelTable t;
    for_each_variant([&](auto variant, const char* type) {
      using V = decltype(variant);
      auto* const kernel = decode_step_kernel<typename V::T, V::W, V::kVector>;
      t.add("decode_step", variant, type, reinterpret_cast<const void*>(kernel));
    });
    return t;
  }();
  return table.list();
}

}  // namespace rat::cuda
