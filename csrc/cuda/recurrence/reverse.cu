// Backward phase 3, the scan family, and the backward of chunk_recurrence: the reverse scan. None of k~, v~ is saved by the forward:
// the kernel scans its tile again.
//
//   chunk_scan_bwd_kernel    dk, dv, dgate, dq, partial sums of dgate_bias
//   gate_bias_reduce_kernel  dgate_bias from the partial sums, in a fixed order
//
// A block takes a tile and the heads of one query group (of several, if they are few):
//
//   1. scan_forward: from the state at the start of the tile; keep the states in shared memory, in T, each thread its own.
//      Tiles longer than a sub-block keep the state at the start of each sub-block only, and scan each again before 2.
//   2. walk_back over the sub-block: gradients of k~ and v~, then dv and dgate, which belong to a head and are stored, and dq
//      and dk, which are summed over the heads of the group: over those of a warp by shuffles. A warp leaves its part of the
//      sums in shared memory (contribute), where its own states of the same token were, so that no barrier is needed on the way.
//   3. barrier; add_up the parts of all warps, for all tokens of the sub-block; barrier.
//
// It reads v, gate twice (the second time from L2), dO once, writes dv, dgate: 10 H D bytes per token of elements of two bytes, and
// small change.
#include "reverse.cuh"

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "../ptx/opaque.cuh"
#include "families.h"
#include "scan_launch.h"

namespace rat::cuda {
namespace {

struct ScanBwd : ReverseInput {
  Rows dq, dk, dv, dgate;
  float* dq_sum;      // (B, T, q_groups, D): attention's part; with several passes over the heads also the sum so far
  float* dk_sum;      // (B, T, k_groups, D): the sum so far, with several passes; else null
  float* dinitial_k;  // (N, H, D) or null
  float* dinitial_v;
  float* bias_partial;  // (tile blocks, H, D) or null
  // how heads are dealt to blocks
  int64_t group_heads;  // H / families; a family is the heads whose dq (in chunk_recurrence: dx) are summed
  int64_t families;
  int64_t family_batches;  // ceil(families / families of a block)
  int block_families;
  int slots;         // lane groups of a family in a block
  int pass, passes;  // heads pass*slots ... of each family
  int fold;          // lane groups of a warp that are summed by shuffles
  int warp_rows;     // sums of lane groups that a warp leaves, of all its heads
  int family_rows;   // and that a family has in the block
  int64_t tiles_per_block;
  int sub_block;      // tokens whose states shared memory holds
  int slot;           // 16-byte words of shared memory that a thread has for each of them
  int sub_blocks;     // of a tile
  bool sum_q, sum_k;  // over the heads of a family, else each head stores its own
};

// Shared memory of a block: (sub_block, warps, 32 slots of 16 bytes * slot) states and then contributions, see the head;
// with gates (2, threads) float4 of bias, to spare registers; states at the starts of sub-blocks (sub_blocks, streams, threads)
// Raw8, if more than one.
template <class T>
size_t scan_bwd_shared(const ScanBwd& p, bool attention, int threads) {
  const size_t streams = attention ? 2 : 1;
  size_t bytes = size_t{16} * p.sub_block * threads * p.slot;
  if (p.in.gate.ptr) bytes += 2 * sizeof(float4) * threads;
  if (p.in.gate.ptr && p.sub_blocks > 1) bytes += p.sub_blocks * streams * threads * sizeof(Raw8<T>);
  return bytes;
}

// The same as a thread sees it.
template <class T>
struct ReverseShared {
  int threads, in_warp;
  int token_slots, warp_slots;  // of all warps for a token, of a warp
  float4* slots;
  float4* warp_slot;  // + token * token_slots
  float4* bias;
  Raw8<T>* starts;  // [(sub*streams + stream)*threads]

  __device__ __forceinline__ ReverseShared(const ScanBwd& p, unsigned char* memory) {
    threads = static_cast<int>(blockDim.x);
    const int tid = static_cast<int>(threadIdx.x);
    in_warp = tid % 32;
    slots = reinterpret_cast<float4*>(memory);
    token_slots = p.slot * threads;
    warp_slots = p.slot * 32;
    warp_slot = slots + tid / 32 * warp_slots;
    bias = slots + p.sub_block * token_slots + tid;
    starts = reinterpret_cast<Raw8<T>*>(bias - tid + 2 * threads) + tid;
  }
  __device__ __forceinline__ void write_bias(const float (&x)[8]) const {
    bias[0] = make_float4(x[0], x[1], x[2], x[3]);
    bias[threads] = make_float4(x[4], x[5], x[6], x[7]);
  }
  __device__ __forceinline__ void read_bias(float (&x)[8]) const {
    const float4 low = bias[0], high = bias[threads];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  }
  // k~ before a token of the sub-block; v~ is 32 further.
  __device__ __forceinline__ Raw8<T>* state_at(int token) const {
    return reinterpret_cast<Raw8<T>*>(warp_slot + token * token_slots) + in_warp;
  }
};

// Which head a lane group has, of which family.
struct HeadShare {
  unsigned family_batch;
  bool owner;    // the lane group has a head
  bool all_own;  // all of the warp
  int head;      // H where there is none
};

template <int W>
__device__ __forceinline__ HeadShare head_share(const ScanBwd& p) {
  HeadShare share;
  share.family_batch = blockIdx.x % static_cast<unsigned>(p.family_batches);
  const int slot = static_cast<int>(threadIdx.x) / W;
  const int64_t family = static_cast<int64_t>(share.family_batch) * p.block_families + slot / p.slots;
  const int64_t member = static_cast<int64_t>(p.pass) * p.slots + slot % p.slots;
  share.owner = slot / p.slots < p.block_families && family < p.families && member < p.group_heads;
  share.all_own = __all_sync(kFullWarp, share.owner);
  share.head = static_cast<int>(share.owner ? family * p.group_heads + member : p.in.size.heads);
  return share;
}

// A lane's rows of a tile. The pointers walk forward over the tile and back.
template <class T, bool kAttention>
struct ReverseRows {
  const T *q, *k, *v, *gate, *dout;
  T *dv, *dgate;
  int64_t scalar;  // of p_tt, ds_tt

  __device__ __forceinline__ ReverseRows(const ScanBwd& p, const ScanTile& tile, const Lane& lane, bool gated) {
    const Sizes& s = p.in.size;
    const int64_t row = tile.sequence.batch, token = tile.token, h = lane.head;
    const int heads = static_cast<int>(s.heads);
    const int q_group = kAttention ? static_cast<int>(h) / (heads / static_cast<int>(s.q_groups)) : 0;
    const int k_group = static_cast<int>(h) / (heads / static_cast<int>(s.k_groups));
    q = kAttention ? row_of<T>(p.in.q, row, token, q_group, lane.d) : nullptr;
    k = row_of<T>(p.in.k, row, token, k_group, lane.d);
    v = kAttention ? row_of<T>(p.in.v, row, token, h, lane.d) : nullptr;
    gate = gated ? row_of<T>(p.in.gate, row, token, h, lane.d) : nullptr;
    dout = row_of<T>(p.dout, row, token, h, lane.d);
    dv = kAttention ? out_row_of<T>(p.dv, row, token, h, lane.d) : nullptr;
    dgate = gated ? out_row_of<T>(p.dgate, row, token, h, lane.d) : nullptr;
    scalar = (row * s.heads + h) * s.tokens + token;
  }
  __device__ __forceinline__ void move_inputs(const ScanBwd& p, bool gated, int64_t tokens) {
    k += tokens * p.in.k.token;
    if constexpr (kAttention) v += tokens * p.in.v.token;
    if (gated) gate += tokens * p.in.gate.token;
  }
  __device__ __forceinline__ void move_others(const ScanBwd& p, bool gated, int64_t tokens) {
    dout += tokens * p.dout.token;
    scalar += tokens;
    if constexpr (kAttention) {
      q += tokens * p.in.q.token;
      dv += tokens * p.dv.token;
    }
    if (gated) dgate += tokens * p.dgate.token;
  }
};

// What the state of the tile's last token receives from the tokens after it: f_{t+1} a_{t+1} and f_{t+1} b_{t+1}.
template <bool kAttention>
__device__ __forceinline__ void incoming_gradient(const ScanBwd& p, const ScanTile& tile, const Lane& lane,
                                                  float (&k_grad)[8], float (&v_grad)[8]) {
  const Sizes& s = p.in.size;
  constexpr int kStreams = kAttention ? 3 : 2;
  zero(k_grad);
  zero(v_grad);
  if (p.incoming_grad) {
    load_scratch(p.incoming_grad + segment_at(s, tile.item, lane.head, kStreams, 0) + lane.d, k_grad);
    if (kAttention) load_scratch(p.incoming_grad + segment_at(s, tile.item, lane.head, kStreams, 1) + lane.d, v_grad);
  } else if (tile.last) {
    const int64_t at = (tile.sequence.index * s.heads + lane.head) * s.head_dim + lane.d;
    if (p.drunning_k) load_floats(p.drunning_k + at, k_grad);
    if (kAttention && p.drunning_v) load_floats(p.drunning_v + at, v_grad);
  }
}

// Step 1, over tokens begin ... end - 1 of the tile. `keep`: the state before each goes to shared memory.
template <class T, bool kAttention>
__device__ __forceinline__ void scan_forward(const ScanBwd& p, const ReverseShared<T>& shared, ChunkClock clock,
                                             int begin, int end, bool keep, ReverseRows<T, kAttention>& rows,
                                             float (&k_state)[8], float (&v_state)[8]) {
  // N tokens: all rows are requested, then used one after the other.
  const auto walk = [&](int i, auto tokens) {
    constexpr int N = decltype(tokens)::value;
    [[maybe_unused]] Raw8<T> k_raw[N], v_raw[kAttention ? N : 1], gate_raw[N];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      gate_raw[u] = load_raw(take(rows.gate, p.in.gate.token));
      if constexpr (kAttention) v_raw[u] = load_raw(take(rows.v, p.in.v.token));
      k_raw[u] = load_raw(take(rows.k, p.in.k.token));
    }
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (clock.resets()) {
        zero(k_state);
        zero(v_state);
      }
      clock.next();
      if (keep) {
        Raw8<T>* const to = shared.state_at(i + u - begin);
        pack(k_state, to[0]);
        if constexpr (kAttention) pack(v_state, to[32]);
      }
      float f[8], g[8], x[8], bias[8];
      shared.read_bias(bias);
      gates_of(gate_raw[u], bias, true, f, g);
      unpack(k_raw[u], x);
      advance(f, g, x, k_state);
      if constexpr (kAttention) {
        unpack(v_raw[u], x);
        advance(f, g, x, v_state);
      }
    }
  };
  constexpr int kStep = sizeof(T) == 4 ? 1 : 4;
  int i = begin;
#pragma unroll 1
  for (; i + kStep <= end; i += kStep) walk(i, std::integral_constant<int, kStep>());
#pragma unroll 1
  for (; i < end; ++i) walk(i, std::integral_constant<int, 1>());
}

// What the lanes of this warp add to the sums of a token takes the place of the warp's states of the token: (sums, rows of the
// warp, 2, W) float4, a row being the sum of `fold` lane groups.
template <int W, bool kAttention, class T>
__device__ __forceinline__ void contribute(const ScanBwd& p, const ReverseShared<T>& shared, const HeadShare& share,
                                           int which_count, int token, float (&dq)[8], float (&dk)[8]) {
  const int in_warp = shared.in_warp;
  if (!share.all_own && !share.owner) {
    zero(dq);
    zero(dk);
  }
  __syncwarp();
  float4* const to = shared.warp_slot + token * shared.token_slots + in_warp % W;
  const auto put = [&](int line, const float (&c)[8]) {
    to[2 * W * line] = make_float4(c[0], c[1], c[2], c[3]);
    to[2 * W * line + W] = make_float4(c[4], c[5], c[6], c[7]);
  };
  if (W < 32 && p.fold > 1) {
    if (which_count == 2) {
      // The lane groups of a pair swap: the even one adds up dq, the odd one dk.
      const bool odd = in_warp & W % 32;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float give = odd ? dq[j] : dk[j];
        dq[j] = (odd ? dk[j] : dq[j]) + __shfl_xor_sync(kFullWarp, give, W % 32);
      }
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (p.sum_k) dq[j] = dk[j];
        dq[j] += __shfl_xor_sync(kFullWarp, dq[j], W % 32);
      }
    }
#pragma unroll
    for (int distance = 2 * W; distance < 32; distance *= 2) {
#pragma unroll
      for (int j = 0; j < 8; ++j) dq[j] += __shfl_xor_sync(kFullWarp, dq[j], distance);
    }
    if (in_warp < W * which_count) put(in_warp / W, dq);
  } else {
    if (kAttention && p.sum_q) put(in_warp / W, dq);
    if (p.sum_k) put(p.sum_q * p.warp_rows + in_warp / W, dk);
  }
}

// Step 2, over tokens end - 1 ... begin of the tile: dv, dgate, and dq, dk where they are of one head. The rows stand at end - 1,
// and at begin - 1 afterwards.
template <class T, int W, bool kAttention>
__device__ __forceinline__ void walk_back(const ScanBwd& p, const ReverseShared<T>& shared, const HeadShare& share,
                                          const ScanTile& tile, const Lane& lane, bool gated, int which_count,
                                          int begin, int end, ReverseRows<T, kAttention>& rows, ChunkClock& clock,
                                          float (&k_grad)[8], float (&v_grad)[8], float (&dbias)[8]) {
  const ScanInput& in = p.in;
  const Sizes& s = in.size;
  const int64_t h = lane.head, row = tile.sequence.batch, token = tile.token;
  // Rows of a token are asked for when those of the token after it have been used.
  Raw8<T> q_raw, k_raw, v_raw, gate_raw, dout_raw;
  float probability = 0.0f, ds = 0.0f;
  const auto load_scalars = [&] {
    if constexpr (kAttention) {
      probability = p.p_self[rows.scalar];
      ds = p.ds_self[rows.scalar];
      --rows.scalar;
    }
  };
  dout_raw = load_raw(take(rows.dout, -p.dout.token));
  load_scalars();
  if constexpr (kAttention) q_raw = load_raw(take(rows.q, -in.q.token));
  if (gated) gate_raw = load_raw(take(rows.gate, -in.gate.token));
  k_raw = load_raw(take(rows.k, -in.k.token));
  if constexpr (kAttention) v_raw = load_raw(take(rows.v, -in.v.token));
#pragma unroll 1
  for (int i = end - 1; i >= begin; --i) {
    const bool more = i > begin;
    const float ds_now = in.scale * ds;
    float x[8], f[8], g[8], bias[8];
    unpack(dout_raw, x);
    if (more) dout_raw = load_raw(take(rows.dout, -p.dout.token));
    if constexpr (kAttention) {
#pragma unroll
      for (int j = 0; j < 8; ++j) v_grad[j] = fmaf(probability, x[j], v_grad[j]);
      unpack(q_raw, x);
      if (more) {
        q_raw = load_raw(take(rows.q, -in.q.token));
        load_scalars();
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) k_grad[j] = fmaf(ds_now, x[j], k_grad[j]);
      if (clock.leaves_key()) add_chunk_grad<T, W>(p, lane, tile.sequence.index, clock, k_grad, v_grad);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) k_grad[j] += x[j];
    }
    // k_grad and v_grad are now a_t and b_t.
    if (gated) shared.read_bias(bias);
    gates_of(gate_raw, bias, gated, f, g);
    if (gated && more) gate_raw = load_raw(take(rows.gate, -in.gate.token));
    float k_before[8], v_before[8], dq[8], dk[8], dgate[8];
    zero(k_before);
    zero(v_before);
    if (gated) {
      const Raw8<T>* const from = shared.state_at(i - begin);
      unpack(from[0], k_before);
      if constexpr (kAttention) unpack(from[32], v_before);
    }
    unpack(k_raw, x);
    if (more) k_raw = load_raw(take(rows.k, -in.k.token));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      dgate[j] = k_grad[j] * (k_before[j] - x[j]);
      dk[j] = g[j] * k_grad[j];
      dq[j] = kAttention ? ds_now * fmaf(f[j], k_before[j], g[j] * x[j]) : 0.0f;
    }
    if constexpr (kAttention) {
      unpack(v_raw, x);
      if (more) v_raw = load_raw(take(rows.v, -in.v.token));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        dgate[j] = fmaf(v_grad[j], v_before[j] - x[j], dgate[j]);
        x[j] = g[j] * v_grad[j];
      }
      T* const to = take(rows.dv, -p.dv.token);
      if (lane.live) store_row(to, x);
    }
    if (gated) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        dgate[j] *= f[j] * g[j];
        dbias[j] += dgate[j];
      }
      T* const to = take(rows.dgate, -p.dgate.token);
      if (lane.live) store_row(to, dgate);
    }
    const bool resets = clock.resets() || !gated;
    clock.back();
    if (resets) {
      zero(k_grad);
      zero(v_grad);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        k_grad[j] *= f[j];
        v_grad[j] *= f[j];
      }
    }

    if (kAttention && !p.sum_q && lane.live) {
      const int64_t at = ((row * s.tokens + token + i) * s.heads + h) * s.head_dim + lane.d;
      load_scratch(p.dq_sum + at, x);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] += dq[j];
      store_row(out_row_of<T>(p.dq, row, token + i, h, lane.d), x);
    }
    if (!p.sum_k && lane.live) store_row(out_row_of<T>(p.dk, row, token + i, h, lane.d), dk);
    if (which_count == 0) continue;
    contribute<W, kAttention>(p, shared, share, which_count, i - begin, dq, dk);
  }
}

// Step 3: the sums of `tokens` tokens from `first` of row `row` on, over the heads of each family.
template <class T, int W>
__device__ __forceinline__ void add_up(const ScanBwd& p, const ReverseShared<T>& shared, unsigned family_batch,
                                       int which_count, int64_t row, int64_t first, int tokens) {
  const Sizes& s = p.in.size;
  const int pieces = tokens * p.block_families * which_count * W;
#pragma unroll 2
  for (int piece = static_cast<int>(threadIdx.x); piece < pieces; piece += shared.threads) {
    const int which = which_count == 2 ? piece / W & 1 : 0;
    const int rest = which_count == 2 ? piece / (2 * W) : piece / W;
    const int piece_slot = rest % p.block_families, i = rest / p.block_families, piece_d = piece % W * 8;
    const int64_t piece_family = static_cast<int64_t>(family_batch) * p.block_families + piece_slot;
    if (piece_d >= s.head_dim || piece_family >= p.families) continue;
    const bool is_q = p.sum_q && which == 0;
    const int64_t t = first + i;
    // Offset of (row, t, family) in dq_sum or dk_sum: sums run over all heads of a family, so families are groups.
    const int64_t sum_at = ((row * s.tokens + t) * p.families + piece_family) * s.head_dim + piece_d;
    float sum[8];
    zero(sum);
    if (is_q) load_scratch(p.dq_sum + sum_at, sum);
    if (!is_q && p.pass > 0) load_scratch(p.dk_sum + sum_at, sum);
    const float4* const lines = shared.slots + i * shared.token_slots + which * p.warp_rows * 2 * W + piece % W;
    for (int m = piece_slot * p.family_rows; m < (piece_slot + 1) * p.family_rows; ++m) {
      const float4* const at = lines + m / p.warp_rows * shared.warp_slots + m % p.warp_rows * 2 * W;
      const float4 low = at[0], high = at[W];
      sum[0] += low.x, sum[1] += low.y, sum[2] += low.z, sum[3] += low.w;
      sum[4] += high.x, sum[5] += high.y, sum[6] += high.z, sum[7] += high.w;
    }
    if (p.pass + 1 < p.passes) {
      store_scratch((is_q ? p.dq_sum : p.dk_sum) + sum_at, sum);
    } else {
      store_row(out_row_of<T>(is_q ? p.dq : p.dk, row, t, piece_family, piece_d), sum);
    }
  }
}

// Blocks have at most 256 threads. The bound for elements of two bytes limits registers, so that three blocks of 128 fit.
template <class T>
constexpr int kScanBound = sizeof(T) == 2 ? 384 : 256;

template <class T, int W, bool kAttention>
__global__ void __launch_bounds__(kScanBound<T>) chunk_scan_bwd_kernel(const __grid_constant__ ScanBwd p) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const ScanInput& in = p.in;
  const Sizes& s = in.size;
  constexpr int kStreams = kAttention ? 2 : 1;
  const ReverseShared<T> shared(p, shared_memory);
  const HeadShare share = head_share<W>(p);
  const int threads = shared.threads;
  const unsigned batches = static_cast<unsigned>(p.family_batches);
  // Divided anew where it is needed: kept, it costs a spill.
  const auto tile_block = [&]() -> int64_t { return blockIdx.x / opaque(batches); };
  const bool gated = in.gate.ptr != nullptr;
  const int which_count = p.sum_q + p.sum_k;  // sums of a token

  float dbias[8];
  zero(dbias);
  if (gated) {
    float bias[8];
    load_bias<T>(in, lane_of<W>(share.head, s.heads, s.head_dim), bias);
    shared.write_bias(bias);
  }

  int64_t item = tile_block() * p.tiles_per_block;
#pragma unroll 1
  for (int left = static_cast<int>(min(p.tiles_per_block, in.items - item)); left > 0; --left, ++item) {
    const ScanTile tile = tile_of(s, item, in.tile);
    if (tile.count == 0) continue;  // the same for the whole block
    // Lanes and addresses are computed anew for each tile: kept, they cost 20 registers.
    const Lane lane = lane_of<W>(opaque(share.head), s.heads, s.head_dim);
    ReverseRows<T, kAttention> rows(p, tile, lane, gated);
    float k_grad[8], v_grad[8], k_state[8], v_state[8];
    incoming_gradient<kAttention>(p, tile, lane, k_grad, v_grad);
    const int subs = (tile.count + p.sub_block - 1) / p.sub_block;
    incoming_state<kAttention>(in, tile, lane, k_state, v_state);
    ChunkClock back_clock(s, tile.position + tile.count - 1);

    // Steps below zero go forward and note where sub-blocks start; the others take the sub-blocks from the last to the first.
#pragma unroll 1
    for (int step = gated ? 1 - subs : 0; step < subs; ++step) {
      const bool keep = step >= 0;
      const int sub = keep ? subs - 1 - step : step + subs - 1;
      const int begin = sub * p.sub_block, end = min(begin + p.sub_block, tile.count);
      if (gated) {
        Raw8<T>* at = shared.starts + sub * kStreams * threads;
        if (step > 0) {
          unpack(at[0], k_state);
          if constexpr (kAttention) unpack(at[threads], v_state);
        } else if (step < 0) {
          pack(k_state, at[0]);
          if constexpr (kAttention) pack(v_state, at[threads]);
        }
        scan_forward(p, shared, ChunkClock(s, tile.position + begin), begin, end, keep, rows, k_state, v_state);
      }
      if (!keep) {
        rows.move_others(p, gated, end - begin);
        continue;
      }

      if (!gated) rows.move_inputs(p, gated, end - begin);
      rows.move_inputs(p, gated, -1);
      rows.move_others(p, gated, end - 1 - begin);
      walk_back<T, W, kAttention>(p, shared, share, tile, lane, gated, which_count, begin, end, rows, back_clock,
                                  k_grad, v_grad, dbias);
      // All stand before `begin` now; the sub-block before this one is a whole one.
      rows.move_inputs(p, gated, 1 - p.sub_block);
      rows.move_others(p, gated, 1 - p.sub_block);
      if (which_count == 0) continue;

      __syncthreads();  // contributions to all tokens of the sub-block are there
      add_up<T, W>(p, shared, share.family_batch, which_count, tile.sequence.batch, tile.token + begin, end - begin);
      __syncthreads();  // all are added up: the next states may take their place
    }
    if (tile.first && p.dinitial_k && lane.live) {
      const int64_t at = (tile.sequence.index * s.heads + lane.head) * s.head_dim + lane.d;
      store_floats(p.dinitial_k + at, k_grad);
      if (kAttention) store_floats(p.dinitial_v + at, v_grad);
    }
  }
  const Lane lane = lane_of<W>(share.head, s.heads, s.head_dim);
  if (p.bias_partial && lane.live) {
    store_scratch(p.bias_partial + (tile_block() * s.heads + lane.head) * s.head_dim + lane.d, dbias);
  }
}

// dgate_bias[c] = sum over rows of partial[row][c]: a block for 32 columns, 16 warps stride over the rows.
__global__ void __launch_bounds__(512)
    gate_bias_reduce_kernel(const float* partial, int64_t rows, int64_t columns, float* out) {
  __shared__ float sums[16][33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (column < columns) {
    for (int64_t row = warp; row < rows; row += 64) {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        if (row + 16 * u < rows) sum[u] += partial[(row + 16 * u) * columns + column];
      }
    }
  }
  sums[warp][lane] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  __syncthreads();
  if (warp == 0 && column < columns) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < 16; ++w) total += sums[w][lane];
    out[column] = total;
  }
}

// ---- launches ---------------------------------------------------------------------------------------------------------

struct Deal {
  int threads;
  int64_t tile_blocks;
};

// Deals heads to blocks of at most 256 threads, of 128 where a family fits, and tiles to blocks. Blocks are smaller where the
// device has too little shared memory, but two lane groups at least: they add up two sums.
template <class V>
Deal deal(ScanBwd& p, bool attention) {
  const Sizes& s = p.in.size;
  const bool gated = p.in.gate.ptr != nullptr;
  plan_tiles<V>(p.in, tile_size(s, gated, kMaxChunkBwd, 16));
  p.families = attention ? s.q_groups : s.k_groups;
  p.group_heads = s.heads / p.families;
  p.sum_q = attention && p.group_heads > 1;
  p.sum_k = s.k_groups != s.heads;

  const int shared_limit = device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>();
  Deal d;
  for (int most = 256; most >= 64; most /= 2) {
    p.passes = static_cast<int>(ceil_div(p.group_heads, most / V::W));
    p.slots = static_cast<int>(ceil_div(p.group_heads, p.passes));
    const int64_t room = std::max<int64_t>(1, std::min(most, 128) / V::W / p.slots);
    p.block_families = static_cast<int>(std::min<int64_t>(room, p.families));
    p.family_batches = ceil_div(p.families, p.block_families);
    p.fold = p.slots % (32 / V::W) == 0 ? 32 / V::W : 1;
    p.warp_rows = 32 / V::W / p.fold;
    p.family_rows = p.slots / p.fold;
    d.threads = static_cast<int>(round_up(int64_t{p.block_families} * p.slots * V::W, 32));
    const int state_words = gated ? (attention ? 2 : 1) * static_cast<int>(sizeof(Raw8<typename V::T>) / 16) : 0;
    const int sum_words = static_cast<int>(ceil_div(2 * (p.sum_q + p.sum_k), p.fold));
    p.slot = std::max(state_words, sum_words);
    p.sub_block = static_cast<int>(std::min<int64_t>(p.in.tile, p.slot > 2 || (gated && p.in.tile > 16) ? 8 : 16));
    p.sub_blocks = static_cast<int>(ceil_div(p.in.tile, p.sub_block));
    if (scan_bwd_shared<typename V::T>(p, attention, d.threads) <= static_cast<size_t>(shared_limit)) break;
  }
  const int64_t blocks = p.in.items * p.family_batches;
  p.tiles_per_block = std::min<int64_t>(64, std::max<int64_t>(1, blocks / 8192));
  d.tile_blocks = ceil_div(p.in.items, p.tiles_per_block);
  return d;
}

struct ReverseWorkspace {
  Piece<float> incoming;
  Piece<float> incoming_grad;
  Piece<float> dk_sum;
  Piece<float> bias_partial;
  int64_t bias_rows = 0;
};

ReverseWorkspace take_workspace(ScanBwd p, bool attention, bool bias, Arena& arena) {
  const Sizes& s = p.in.size;
  ReverseWorkspace w;
  const bool gated = p.in.gate.ptr != nullptr;
  w.incoming = take_segments(s, gated, kMaxChunkBwd, attention ? 3 : 2, arena);
  w.incoming_grad = take_segments(s, gated, kMaxChunkBwd, attention ? 3 : 2, arena);
  with_variant(s, attention ? "rat_attention" : "chunk_recurrence", [&](auto variant) {
    const Deal d = deal<decltype(variant)>(p, attention);
    if (p.passes > 1 && p.sum_k) w.dk_sum = arena.take<float>(s.batch * s.tokens * s.k_groups * s.head_dim);
    w.bias_rows = d.tile_blocks;
    if (bias) w.bias_partial = arena.take<float>(d.tile_blocks * s.heads * s.head_dim);
  });
  return w;
}

template <bool kAttention>
void launch_scan_bwd(ScanBwd p, float* dgate_bias, const ReverseWorkspace& w, cudaStream_t stream) {
  const Sizes& s = p.in.size;
  if (kAttention && s.k_groups != s.q_groups && s.k_groups != s.heads) {
    throw std::runtime_error("rat_ext: rat_attention_backward: k groups must be the q groups or the heads");
  }
  p.dk_sum = w.dk_sum;
  p.bias_partial = w.bias_partial;
  if (w.incoming.taken()) {
    p.in.incoming = w.incoming;
    p.incoming_grad = w.incoming_grad;
    scan_segments(p.in, kAttention, w.incoming, stream);
    reverse_segments(p, kAttention, stream);
  }
  with_variant(s, "chunk_scan_bwd", [&](auto variant) {
    using V = decltype(variant);
    using T = typename V::T;
    const Deal d = deal<V>(p, kAttention);
    const int64_t blocks = d.tile_blocks * p.family_batches;
    if (blocks == 0) return;
    const auto kernel = chunk_scan_bwd_kernel<T, V::W, kAttention>;
    const int shared = static_cast<int>(scan_bwd_shared<T>(p, kAttention, d.threads));
    allow_shared_memory(kernel, shared, "chunk_scan_bwd shared memory");
    for (p.pass = 0; p.pass < p.passes; ++p.pass) {
      kernel<<<grid_x(blocks, "chunk_scan_bwd"), d.threads, shared, stream>>>(p);
      check_launch("chunk_scan_bwd");
    }
  });
  if (dgate_bias) reduce_gate_bias(w.bias_partial, w.bias_rows, s.heads * s.head_dim, dgate_bias, stream);
}

// Without what comes from scratch memory.
ScanBwd scan_bwd(const AttentionBwdParams& a) {
  ScanBwd p{};
  p.in = scan_input(a.fwd);
  p.drunning_k = static_cast<const float*>(a.drunning_k);
  p.drunning_v = static_cast<const float*>(a.drunning_v);
  p.dq = a.dq;
  p.dk = a.dk;
  p.dv = a.dv;
  p.dgate = a.dgate;
  p.dinitial_k = static_cast<float*>(a.dinitial.running_k);
  p.dinitial_v = static_cast<float*>(a.dinitial.running_v);
  return p;
}

ScanBwd scan_bwd(const RecurrenceBwdParams& r) {
  ScanBwd p{};
  p.in = scan_input(r.fwd);
  p.dout = r.dy;
  p.drunning_k = static_cast<const float*>(r.dfinal);
  p.dk = r.dx;
  p.dgate = r.dgate;
  p.dinitial_k = static_cast<float*>(r.dinitial);
  return p;
}

}  // namespace

void reduce_gate_bias(const float* partial, int64_t rows, int64_t columns, float* dgate_bias, cudaStream_t stream) {
  gate_bias_reduce_kernel<<<grid_x(ceil_div(columns, 32), "gate_bias_reduce"), 512, 0, stream>>>(partial, rows, columns,
                                                                                                 dgate_bias);
  check_launch("gate_bias_reduce");
}

const char* scan::refuses(const AttentionBwdParams&) { return nullptr; }

Launch scan::reverse(const AttentionBwdParams& a, const BwdScratch& scratch, Arena& arena) {
  const ReverseWorkspace w = take_workspace(scan_bwd(a), true, a.dgate_bias != nullptr, arena);
  return [&a, scratch, w](cudaStream_t stream) {
    ScanBwd p = scan_bwd(a);
    p.dout = scratch.dout;
    p.p_self = scratch.p_self;
    p.ds_self = scratch.ds_self;
    p.chunk = chunk_grads(a, scratch);
    p.dq_sum = scratch.dq;
    launch_scan_bwd<true>(p, static_cast<float*>(a.dgate_bias), w, stream);
  };
}

void recurrence_bwd(const RecurrenceBwdParams& r, const Allocator& allocator, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const Sizes& s = r.fwd.size;
  Arena arena;
  const ReverseWorkspace w = take_workspace(scan_bwd(r), false, r.dgate_bias != nullptr, arena);
  arena.commit(allocator);
  if (s.cu_seqlens || s.lengths) check_sequences(s, -1, -1, -1, nullptr, stream);
  if (r.dinitial) {
    copy_empty(s, static_cast<const float*>(r.dfinal), static_cast<float*>(r.dinitial), stream);
  }
  launch_scan_bwd<false>(scan_bwd(r), static_cast<float*>(r.dgate_bias), w, stream);
}

KernelList reverse_kernels() {
  static const KernelTable table = [] {
    KernelTable t;
    for_each_variant([&](auto variant, const char* type) {
      using V = decltype(variant);
      using T = typename V::T;
      t.add("chunk_scan_bwd", variant, type, chunk_scan_bwd_kernel<T, V::W, true>);
      t.add("chunk_recurrence_bwd", variant, type, chunk_scan_bwd_kernel<T, V::W, false>);
    });
    t.add("gate_bias_reduce", gate_bias_reduce_kernel);
    return t;
  }();
  return table.list();
}

}  // namespace rat::cuda
