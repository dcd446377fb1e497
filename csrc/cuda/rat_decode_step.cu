// One decode step for every row of a batch, in one launch: scan one token, attend to the chunk states, append, advance.
//
// A block takes a slice of the chunk states of one (row, head). Its lane groups (scan.cuh) take keys in turn, four at a
// time, each with a running softmax in registers; groups are merged by shuffles and through shared memory. Bytes: the chunk
// states, 2 C D a (row, head), read once 16 bytes a lane; the rest is small.
//
//   slice 0          advances the running state, starts its softmax from the own state, appends the chunk state that closes.
//                    No one else reads what it writes: the keys of this token are the chunks closed before it.
//   last slice       to arrive at a (row, head) (atomic counter; partial results are published by a fence before it) merges
//                    the slices in order, applies the output gate, stores y.
//   last head        to arrive at a row, after all of its blocks have read the length, advances it.
//
// Whoever is last sets the counter back to zero, so the workspace is zeroed once, when the cache is made. Every decision
// from a length is taken on the device: a CUDA graph may replay the step.
#include <algorithm>
#include <cstdio>

#include "recurrence/scan_launch.h"

namespace rat::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
// Blocks that a launch splits (row, head) pairs into, at most: bounds the partial results.
constexpr int64_t kMaxPartials = 1056;
constexpr int64_t kMaxSlices = 64;

struct Decode {
  DecodeParams p;
  int slices;
  float* partial;      // (batch * H * slices, D + 8): unnormalised values, then maximum and sum; if slices > 1
  unsigned* arrived;   // (batch * H): slices that are done; if slices > 1
  unsigned* heads_in;  // (pool): heads that are done
};

// A softmax over some of the keys: sum of weights relative to exp(maximum), values weighted likewise. Each lane of a group
// holds eight values.
struct Running {
  float maximum, sum;
  float value[8];
};

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

template <class T, int W, bool kVector>
__global__ void __launch_bounds__(kThreads, kVector && sizeof(T) == 2 ? 5 : 4)
    decode_step_kernel(const __grid_constant__ Decode a) {
  __shared__ float shared[kWarps * (W * 8 + 2)];
  __shared__ bool is_last;
  const DecodeParams& p = a.p;
  const int slice = static_cast<int>(blockIdx.x % a.slices);
  const int64_t pair = blockIdx.x / a.slices;
  const int64_t b = pair / p.heads, h = pair % p.heads;
  const Lane lane = lane_of<W>(h, p.heads, p.head_dim);
  const int group = static_cast<int>(threadIdx.x) / W;
  constexpr int kGroups = kThreads / W;
  const bool leads = threadIdx.x < W;  // the lanes of the group that stores

  const int64_t entry = p.slots ? p.slots[b] : b;
  T* const y = static_cast<T*>(p.y.ptr) + b * p.y.batch + h * p.y.head + lane.d;
  if (entry < 0) {
    float none[8];
    zero(none);
    if (slice == 0 && leads && lane.live) store_row<false>(y, none);
    return;
  }
  if (entry >= p.pool) {
    if (threadIdx.x == 0) {
      printf("rat_ext.rat_decode_step: slots[%lld]: expected less than %lld, the sequences of the cache, got %lld\n",
             static_cast<long long>(b), static_cast<long long>(p.pool), static_cast<long long>(entry));
      __trap();  // here, so that nobody stops the kernel before the message is out
    }
    return;
  }
  const int64_t length = p.lengths[entry];
  const int64_t chunk = length / p.chunk_size, offset = length - chunk * p.chunk_size;
  const bool closes = offset == p.chunk_size - 1;
  if (length < 0 || chunk > p.rows || (closes && chunk >= p.rows) || length >= INT32_MAX) {
    if (threadIdx.x == 0) {
      printf(
          "rat_ext.rat_decode_step: cache: sequence %lld has %lld tokens; its %lld chunk states of %lld tokens have no "
          "room for one more token (cache full)\n",
          static_cast<long long>(entry), static_cast<long long>(length), static_cast<long long>(p.rows),
          static_cast<long long>(p.chunk_size));
      __trap();  // here, so that nobody stops the kernel before the message is out
    }
    return;
  }
  if (p.rotary.cos && chunk >= p.rotary.rows) {
    if (threadIdx.x == 0) {
      printf("rat_ext.rat_decode_step: rotary_cos: expected more than %lld rows, one for each chunk, got %lld\n",
             static_cast<long long>(chunk), static_cast<long long>(p.rotary.rows));
      __trap();  // here, so that nobody stops the kernel before the message is out
    }
    return;
  }

  // q, scaled, unrotated for the own state and rotated for the chunks.
  float q[8];
  load_row<kVector>(row_of<T>(p.q, b, 0, h / (p.heads / p.q_groups), lane.d), q);
#pragma unroll
  for (int j = 0; j < 8; ++j) q[j] = lane.live ? static_cast<float>(p.scale) * q[j] : 0.0f;

  Running r;
  r.maximum = -INFINITY;
  r.sum = 0.0f;
  zero(r.value);
  const int64_t owner = entry * p.heads + h;
  T* const chunk_k = static_cast<T*>(p.chunk_k) + owner * p.rows * p.head_dim + lane.d;
  T* const chunk_v = static_cast<T*>(p.chunk_v) + owner * p.rows * p.head_dim + lane.d;

  if (slice == 0 && threadIdx.x < 32) {
    // Keys first, then values, to hold few registers. All groups of the warp compute, the first stores; each barrier
    // stands between the last read of a running state and its update.
    const int64_t at = owner * p.head_dim + lane.d;
    float* const running_k = static_cast<float*>(p.running_k) + at;
    float* const running_v = static_cast<float*>(p.running_v) + at;
    float state[8], f[8], g[8], x[8];
    zero(x);
    if (p.gate_bias) load_floats(static_cast<const float*>(p.gate_bias) + h * p.head_dim + lane.d, x);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] *= kLogitUnit<T>;
    gates_of(load_raw<kVector>(row_of<T>(p.gate, b, 0, h, lane.d)), x, true, f, g);

    zero(state);
    if (offset > 0) load_floats(running_k, state);
    load_row<kVector>(row_of<T>(p.k, b, 0, h / (p.heads / p.k_groups), lane.d), x);
    advance(f, g, x, state);
    const float own = group_sum<W>(lane.live ? dot(q, state) : 0.0f);
    __syncwarp();
    if (leads && lane.live) store_floats(running_k, state);
    if (closes) {
      if (p.rotary.cos) rotate<W>(p.rotary, chunk, p.head_dim, lane, 1.0f, state);
      if (leads && lane.live) store_row<kVector>(chunk_k + chunk * p.head_dim, state);
    }

    zero(state);
    if (offset > 0) load_floats(running_v, state);
    load_row<kVector>(row_of<T>(p.v, b, 0, h, lane.d), x);
    advance(f, g, x, state);
    __syncwarp();
    if (leads) {
      r.maximum = own;
      r.sum = 1.0f;
#pragma unroll
      for (int j = 0; j < 8; ++j) r.value[j] = state[j];
    }
    if (leads && lane.live) {
      store_floats(running_v, state);
      if (closes) store_row<kVector>(chunk_v + chunk * p.head_dim, state);
    }
  }
  if (p.rotary.cos) rotate<W>(p.rotary, chunk, p.head_dim, lane, 1.0f, q);

  const int64_t begin = chunk * slice / a.slices, end = chunk * (slice + 1) / a.slices;
  constexpr int kKeys = sizeof(T) == 4 ? 2 : 4;
  // The bound is the same for all groups of the block: shuffles need whole warps.
#pragma unroll 1
  for (int64_t base = begin; base < end; base += kGroups * kKeys) {
    Raw8<T> k_raw[kKeys], v_raw[kKeys];
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
      const int64_t key = min(base + u * kGroups + group, end - 1);
      k_raw[u] = load_raw<kVector>(chunk_k + key * p.head_dim);
      v_raw[u] = load_raw<kVector>(chunk_v + key * p.head_dim);
    }
    float score[kKeys];
    float top = r.maximum;
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
      float x[8];
      unpack(k_raw[u], x);
      score[u] = group_sum<W>(lane.live ? dot(q, x) : 0.0f);
      if (base + u * kGroups + group >= end) score[u] = -INFINITY;
      top = fmaxf(top, score[u]);
    }
    // A group may have had no key yet, and have none here: its weights are then zero.
    const float shrink = r.maximum == top ? 1.0f : expf(r.maximum - top);
    r.maximum = top;
    r.sum *= shrink;
#pragma unroll
    for (int j = 0; j < 8; ++j) r.value[j] *= shrink;
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
      const bool inside = base + u * kGroups + group < end;
      const float weight = inside ? expf(score[u] - top) : 0.0f;
      r.sum += weight;
      float x[8];
      unpack(v_raw[u], x);
#pragma unroll
      for (int j = 0; j < 8; ++j) r.value[j] = fmaf(weight, x[j], r.value[j]);
    }
  }
  merge_block<W>(r, shared);

  if (a.slices > 1) {
    const int64_t row = p.head_dim + 8;
    float* const mine = a.partial + (pair * a.slices + slice) * row;
    if (leads && lane.live) {
      store_scratch(mine + lane.d, r.value);
      if (lane.index == 0) {
        mine[p.head_dim] = r.maximum;
        mine[p.head_dim + 1] = r.sum;
      }
      __threadfence();
    }
    __syncthreads();  // partial results are published before the arrival is counted
    if (threadIdx.x == 0) {
      is_last = atomicAdd(a.arrived + pair, 1u) + 1 == static_cast<unsigned>(a.slices);
      __threadfence();  // and the others' are read after it
    }
    __syncthreads();
    if (!is_last) return;
    r.maximum = -INFINITY;
    r.sum = 0.0f;
    zero(r.value);
    for (int i = group; i < a.slices; i += kGroups) {
      const float* from = a.partial + (pair * a.slices + i) * row;
      float value[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) value[j] = __ldcg(from + lane.d + j);
      merge(r, __ldcg(from + p.head_dim), __ldcg(from + p.head_dim + 1), value);
    }
    merge_block<W>(r, shared);
    if (threadIdx.x == 0) a.arrived[pair] = 0;
  }

  if (leads && lane.live) {
    const float inverse = 1.0f / r.sum;
#pragma unroll
    for (int j = 0; j < 8; ++j) r.value[j] *= inverse;
    if (p.out_gate.ptr) {
      float z[8];
      load_row<kVector>(row_of<T>(p.out_gate, b, 0, h, lane.d), z);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float open, shut;
        gates<T>(kLogitUnit<T> * z[j], open, shut);
        r.value[j] *= open;
      }
    }
    store_row<kVector>(y, r.value);
  }
  // All threads of this block have read the length, long before merge_block's barriers.
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(a.heads_in + entry, 1u) + 1 == static_cast<unsigned>(p.heads)) {
      a.heads_in[entry] = 0;
      p.lengths[entry] = static_cast<int32_t>(length + 1);
    }
  }
}

struct DecodePieces {
  Piece<unsigned> heads_in;
  Piece<unsigned> arrived;
  Piece<float> partial;
};

DecodePieces take_pieces(const DecodeParams& p, Arena& arena) {
  DecodePieces w;
  w.heads_in = arena.take<unsigned>(p.pool);
  w.arrived = arena.take<unsigned>(kMaxPartials);
  w.partial = arena.take<float>(kMaxPartials * (p.head_dim + 8));
  return w;
}

}  // namespace

size_t decode_workspace(const DecodeParams& p) {
  Arena arena;
  take_pieces(p, arena);
  return arena.mark();
}

void decode_step(const DecodeParams& p, void* stream) {
  if (p.batch == 0 || p.heads == 0) return;
  Decode a{};
  a.p = p;
  // The memory is the cache's, not the call's.
  const Allocator cache{[](void* workspace, size_t) { return workspace; }, p.workspace};
  Arena arena;
  const DecodePieces w = take_pieces(p, arena);
  arena.commit(cache);
  a.heads_in = w.heads_in;
  a.arrived = w.arrived;
  a.partial = w.partial;
  // Enough slices to fill the chip, each of at least 16 keys of a full cache.
  const int64_t pairs = p.batch * p.heads;
  const int64_t useful = std::min(kMaxSlices, ceil_div(p.rows, 16));
  a.slices = static_cast<int>(std::max<int64_t>(1, std::min(useful, kMaxPartials / pairs)));
  Sizes s;
  s.dtype = p.dtype;
  s.head_dim = p.head_dim;
  s.aligned16 = p.aligned16 && reinterpret_cast<uintptr_t>(p.chunk_k) % 16 == 0 &&
                reinterpret_cast<uintptr_t>(p.chunk_v) % 16 == 0 && reinterpret_cast<uintptr_t>(p.y.ptr) % 16 == 0;
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
