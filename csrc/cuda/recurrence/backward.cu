// The backward scans. None of k~, v~ is saved by the forward: each kernel scans its tile again. In rat_attention short chunks
// have kernels of their own, in recurrence/reverse_short.cu.
//
//   chunk_prepare_bwd_kernel   do, d(out_gate), Delta, p_tt, ds_tt: all that the attention gradient and the reverse scan need
//   chunk_carry_bwd_kernel     what a segment passes to the one before it from a zero end      long chunks only
//   chunk_scan_bwd_kernel      the reverse scan: dk, dv, dgate, dq, partial sums of dgate_bias
//   gate_bias_reduce_kernel    dgate_bias from the partial sums, in a fixed order
//
// Prepare works as the forward does: 7 H D elements a token. The reverse scan takes a block for a tile and the heads of one
// query group (of several, if they are few):
//
//   1. scan forward from the state at the start of the tile; keep the states in shared memory, in T, each thread its own.
//      Tiles longer than a sub-block keep the state at the start of each sub-block only, and scan each again before 2.
//   2. walk back over the sub-block: gradients of k~ and v~, then dv and dgate, which belong to a head and are stored, and dq
//      and dk, which are summed over the heads of the group: over those of a warp by shuffles. A warp leaves its part of the
//      sums in shared memory, where its own states of the same token were, so that no barrier is needed on the way.
//   3. barrier; add up the parts of all warps, for all tokens of the sub-block; barrier.
//
// It reads v, gate twice (the second time from L2), do once, writes dv, dgate: 5 H D elements a token, and small change.
#include <algorithm>
#include <type_traits>

#include "scan_launch.h"

namespace rat::cuda {
namespace {

constexpr int kThreads = 128;

// ---- prepare ----------------------------------------------------------------------------------------------------------

struct PrepareBwd {
  ScanInput in;
  Rows dy, y, out_gate;  // out_gate null: do is dy
  Rows dout, dout_gate;  // outputs, with out_gate
  const float* lse;      // (B, H, T), as are the next three
  float* p_self;
  float* ds_self;
  float* delta;
};

template <class T, int W, bool kVector>
__global__ void __launch_bounds__(kThreads, kVector && sizeof(T) == 2 ? 4 : 2)
    chunk_prepare_bwd_kernel(const __grid_constant__ PrepareBwd p) {
  const ScanInput& in = p.in;
  const Sizes& s = in.size;
  Tile tile;
  Lane lane;
  if (!warp_work<W>(in, tile, lane)) return;
  const bool gated = in.gate.ptr != nullptr, out_gated = p.out_gate.ptr != nullptr;
  const int64_t row = tile.sequence.batch, token = tile.token, h = lane.head;
  const T* q_row = row_of<T>(in.q, row, token, h / (s.heads / s.q_groups), lane.d);
  const T* k_row = row_of<T>(in.k, row, token, h / (s.heads / s.k_groups), lane.d);
  const T* v_row = row_of<T>(in.v, row, token, h, lane.d);
  const T* gate_row = gated ? row_of<T>(in.gate, row, token, h, lane.d) : nullptr;
  const T* dy_row = row_of<T>(p.dy, row, token, h, lane.d);
  const T* y_row = row_of<T>(p.y, row, token, h, lane.d);
  const T* out_gate_row = out_gated ? row_of<T>(p.out_gate, row, token, h, lane.d) : nullptr;
  T* dout_row = out_gated ? out_row_of<T>(p.dout, row, token, h, lane.d) : nullptr;
  T* dout_gate_row = out_gated ? out_row_of<T>(p.dout_gate, row, token, h, lane.d) : nullptr;
  const int64_t scalars = (row * s.heads + h) * s.tokens + token;

  float bias[8], k_state[8], v_state[8];
  load_bias<T>(in, lane, bias);
  entry_state<true>(in, tile, lane, k_state, v_state);
  ChunkClock clock(tile.position, s.chunk_size);

#pragma unroll 1
  for (int i = 0; i < tile.count; ++i) {
    const Raw8<T> dy_raw = load_raw<kVector>(take(dy_row, p.dy.token));
    const Raw8<T> y_raw = load_raw<kVector>(take(y_row, p.y.token));
    const Raw8<T> v_raw = load_raw<kVector>(take(v_row, in.v.token));
    Raw8<T> gate_raw, out_gate_raw;
    if (gated) gate_raw = load_raw<kVector>(take(gate_row, in.gate.token));
    if (out_gated) out_gate_raw = load_raw<kVector>(take(out_gate_row, p.out_gate.token));
    const Raw8<T> k_raw = load_raw<kVector>(take(k_row, in.k.token));
    const Raw8<T> q_raw = load_raw<kVector>(take(q_row, in.q.token));
    const float lse = p.lse[scalars + i];

    float dout[8], delta, x[8], f[8], g[8];
    unpack(dy_raw, dout);
    unpack(y_raw, x);
    delta = dot(dout, x);
    if (out_gated) {
      float z[8];
      unpack(out_gate_raw, z);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float open, shut;
        gates<T>(kLogitUnit<T> * z[j], open, shut);
        x[j] *= dout[j] * shut;
        dout[j] *= open;
      }
      if (lane.live) {
        store_row<kVector>(dout_gate_row, x);
        store_row<kVector>(dout_row, dout);
      }
      dout_gate_row += p.dout_gate.token;
      dout_row += p.dout.token;
    }
    if (clock.opens() || !gated) {
      zero(k_state);
      zero(v_state);
    }
    clock.next();
    gates_of(gate_raw, bias, gated, f, g);
    unpack(k_raw, x);
    advance(f, g, x, k_state);
    unpack(v_raw, x);
    advance(f, g, x, v_state);
    unpack(q_raw, x);
    float own = lane.live ? dot(x, k_state) : 0.0f;
    float dp = lane.live ? dot(dout, v_state) : 0.0f;
    delta = lane.live ? delta : 0.0f;
    own = group_sum<W>(own);
    dp = group_sum<W>(dp);
    delta = group_sum<W>(delta);
    if (lane.live && lane.index == 0) {
      // In its first chunk a token attends to itself alone: its weight is 1 and its score has no gradient, whatever
      // Delta lost when y was rounded.
      const bool alone = tile.position + i < s.chunk_size;
      const float probability = alone ? 1.0f : expf(fmaf(in.scale, own, -lse));
      p.p_self[scalars + i] = probability;
      p.ds_self[scalars + i] = alone ? 0.0f : probability * (dp - delta);
      p.delta[scalars + i] = delta;
    }
  }
}

// ---- the reverse scan -------------------------------------------------------------------------------------------------

struct ScanBwd {
  ScanInput in;
  Rows dout;            // do; dy of chunk_recurrence
  const float* p_self;  // (B, H, T)
  const float* ds_self;
  ChunkStates chunks;     // layout of the four chunk gradients
  const float* dchunk_k;  // from attention, float
  const float* dchunk_v;
  const void* incoming_k;  // of the returned chunk states, T, or null
  const void* incoming_v;
  const float* drunning_k;  // (N, H, D) or null
  const float* drunning_v;
  float* reverse_carry;  // (items, H, 1 or 2, D): what each segment's last token receives; null if not segmented
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

// Adds the gradient of the chunk state that a closing token leaves behind to the gradient of its state.
template <class T, int W>
__device__ __forceinline__ void add_chunk_grad(const ScanBwd& p, const Lane& lane, int64_t n, int64_t chunk,
                                               float (&gk)[8], float (&gv)[8]) {
  const Sizes& s = p.in.size;
  const int64_t at = chunk_offset(s, p.chunks, n, lane.head) + chunk * s.head_dim + lane.d;
  float x[8], y[8];
  load_scratch(p.dchunk_v + at, y);
  load_scratch(p.dchunk_k + at, x);
#pragma unroll
  for (int j = 0; j < 8; ++j) gv[j] += y[j];
  if (p.incoming_v) {
    load_row<false>(static_cast<const T*>(p.incoming_v) + at, y);
#pragma unroll
    for (int j = 0; j < 8; ++j) gv[j] += y[j];
  }
  if (p.incoming_k) {
    load_row<false>(static_cast<const T*>(p.incoming_k) + at, y);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] += y[j];
  }
  if (p.in.rotary.cos) rotate<W>(p.in.rotary, chunk, s.head_dim, lane, -1.0f, x);
#pragma unroll
  for (int j = 0; j < 8; ++j) gk[j] += x[j];
}

template <class T, int W, bool kVector, bool kAttention>
__global__ void __launch_bounds__(kThreads, kVector ? 4 : 2) chunk_carry_bwd_kernel(const __grid_constant__ ScanBwd p) {
  const ScanInput& in = p.in;
  const Sizes& s = in.size;
  Tile tile;
  Lane lane;
  if (!warp_work<W>(in, tile, lane)) return;
  const int64_t row = tile.sequence.batch, token = tile.token, h = lane.head;
  const T* q_row = kAttention ? row_of<T>(in.q, row, token, h / (s.heads / s.q_groups), lane.d) : nullptr;
  const T* gate_row = row_of<T>(in.gate, row, token, h, lane.d);
  const T* dout_row = row_of<T>(p.dout, row, token, h, lane.d);
  const int64_t scalars = (row * s.heads + h) * s.tokens + token;

  float bias[8], k_carry[8], v_carry[8];
  load_bias<T>(in, lane, bias);
  zero(k_carry);
  zero(v_carry);
  ChunkClock clock(tile.position + tile.count - 1, s.chunk_size);

  constexpr int kStep = sizeof(T) == 4 ? 1 : 2;
#pragma unroll 1
  for (int i = tile.count - 1; i >= 0; i -= kStep) {
    Raw8<T> q_raw[kStep], gate_raw[kStep], dout_raw[kStep];
    float probability[kStep], ds[kStep];
#pragma unroll
    for (int u = 0; u < kStep; ++u) {
      const int64_t t = max(i - u, 0);
      gate_raw[u] = load_raw<kVector>(gate_row + t * in.gate.token);
      dout_raw[u] = load_raw<kVector>(dout_row + t * p.dout.token);
      if constexpr (kAttention) {
        q_raw[u] = load_raw<kVector>(q_row + t * in.q.token);
        probability[u] = p.p_self[scalars + t];
        ds[u] = in.scale * p.ds_self[scalars + t];
      }
    }
#pragma unroll
    for (int u = 0; u < kStep; ++u) {
      if (i - u >= 0) {
        float x[8], f[8], g[8];
        unpack(dout_raw[u], x);
        if constexpr (kAttention) {
#pragma unroll
          for (int j = 0; j < 8; ++j) v_carry[j] = fmaf(probability[u], x[j], v_carry[j]);
          unpack(q_raw[u], x);
#pragma unroll
          for (int j = 0; j < 8; ++j) k_carry[j] = fmaf(ds[u], x[j], k_carry[j]);
          if (clock.closes()) add_chunk_grad<T, W>(p, lane, tile.sequence.index, clock.chunk, k_carry, v_carry);
        } else {
#pragma unroll
          for (int j = 0; j < 8; ++j) k_carry[j] += x[j];
        }
        gates_of(gate_raw[u], bias, true, f, g);
        const bool opens = clock.opens();
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          k_carry[j] = opens ? 0.0f : f[j] * k_carry[j];
          v_carry[j] = opens ? 0.0f : f[j] * v_carry[j];
        }
        clock.back();
      }
    }
  }
  if (lane.live) {
    constexpr int kStreams = kAttention ? 2 : 1;
    store_scratch(p.reverse_carry + carry_at(s, tile.item, h, kStreams, 0) + lane.d, k_carry);
    if (kAttention) store_scratch(p.reverse_carry + carry_at(s, tile.item, h, kStreams, 1) + lane.d, v_carry);
  }
}

// Blocks have at most 256 threads. The bound for elements of two bytes limits registers, so that three blocks of 128 fit.
template <class T, bool kVector>
constexpr int kScanBound = kVector && sizeof(T) == 2 ? 384 : 256;

template <class T, int W, bool kVector, bool kAttention>
__global__ void __launch_bounds__(kScanBound<T, kVector>) chunk_scan_bwd_kernel(const __grid_constant__ ScanBwd p) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const ScanInput& in = p.in;
  const Sizes& s = in.size;
  constexpr int kStreams = kAttention ? 2 : 1;
  const int threads = static_cast<int>(blockDim.x), tid = static_cast<int>(threadIdx.x), in_warp = tid % 32;
  float4* const slots = reinterpret_cast<float4*>(shared_memory);
  const int token_slots = p.slot * threads, warp_slots = p.slot * 32;
  float4* const warp_slot = slots + tid / 32 * warp_slots;  // + token * token_slots
  float4* const bias_at = slots + p.sub_block * token_slots + tid;
  Raw8<T>* const starts =
      reinterpret_cast<Raw8<T>*>(bias_at - tid + 2 * threads) + tid;  // [(sub*streams + st)*threads]
  const auto read_bias = [&](float (&bias)[8]) {
    const float4 low = bias_at[0], high = bias_at[threads];
    bias[0] = low.x, bias[1] = low.y, bias[2] = low.z, bias[3] = low.w;
    bias[4] = high.x, bias[5] = high.y, bias[6] = high.z, bias[7] = high.w;
  };
  const auto state_at = [&](int token) {
    return reinterpret_cast<Raw8<T>*>(warp_slot + token * token_slots) + in_warp;
  };

  const unsigned batches = static_cast<unsigned>(p.family_batches);
  const unsigned family_batch = blockIdx.x % batches;
  const auto tile_block = [&]() -> int64_t {  // divided anew where it is needed: kept, it costs a spill
    unsigned divisor = batches;
    asm volatile("" : "+r"(divisor));
    return blockIdx.x / divisor;
  };
  const int slot = tid / W;
  const int64_t family = static_cast<int64_t>(family_batch) * p.block_families + slot / p.slots;
  const int64_t member = static_cast<int64_t>(p.pass) * p.slots + slot % p.slots;
  const bool owner = slot / p.slots < p.block_families && family < p.families && member < p.group_heads;
  const bool all_own = __all_sync(kFullWarp, owner);
  const int head = static_cast<int>(owner ? family * p.group_heads + member : s.heads),
            heads = static_cast<int>(s.heads);
  const bool gated = in.gate.ptr != nullptr;

  // Contributions of a warp to the sums of a token: (sums, rows of the warp, 2, W) float4, a row being the sum of `fold`
  // lane groups.
  const int which_count = p.sum_q + p.sum_k;

  float dbias[8];
  zero(dbias);
  if (gated) {
    float bias[8];
    load_bias<T>(in, lane_of<W>(head, s.heads, s.head_dim), bias);
    bias_at[0] = make_float4(bias[0], bias[1], bias[2], bias[3]);
    bias_at[threads] = make_float4(bias[4], bias[5], bias[6], bias[7]);
  }

  int64_t item = tile_block() * p.tiles_per_block;
#pragma unroll 1
  for (int left = static_cast<int>(min(p.tiles_per_block, in.items - item)); left > 0; --left, ++item) {
    const Tile tile = tile_of(s, item, in.tile);
    if (tile.count == 0) continue;  // the same for the whole block
    // Lanes and addresses are computed anew for each tile: kept, they cost 20 registers.
    int head_again = head;
    asm volatile("" : "+r"(head_again));
    const Lane lane = lane_of<W>(head_again, s.heads, s.head_dim);
    const int64_t h = lane.head;
    const int q_group = kAttention ? static_cast<int>(h) / (heads / static_cast<int>(s.q_groups)) : 0;
    const int k_group = static_cast<int>(h) / (heads / static_cast<int>(s.k_groups));
    const int64_t row = tile.sequence.batch, token = tile.token;
    // These walk forward over the tile and back.
    const T* q_at = kAttention ? row_of<T>(in.q, row, token, q_group, lane.d) : nullptr;
    const T* k_at = row_of<T>(in.k, row, token, k_group, lane.d);
    const T* v_at = kAttention ? row_of<T>(in.v, row, token, h, lane.d) : nullptr;
    const T* gate_at = gated ? row_of<T>(in.gate, row, token, h, lane.d) : nullptr;
    const T* dout_at = row_of<T>(p.dout, row, token, h, lane.d);
    T* dv_at = kAttention ? out_row_of<T>(p.dv, row, token, h, lane.d) : nullptr;
    T* dgate_at = gated ? out_row_of<T>(p.dgate, row, token, h, lane.d) : nullptr;
    int64_t scalar_at = (row * s.heads + h) * s.tokens + token;
    const auto move_inputs = [&](int64_t tokens) {
      k_at += tokens * in.k.token;
      if constexpr (kAttention) v_at += tokens * in.v.token;
      if (gated) gate_at += tokens * in.gate.token;
    };
    const auto move_others = [&](int64_t tokens) {
      dout_at += tokens * p.dout.token;
      scalar_at += tokens;
      if constexpr (kAttention) {
        q_at += tokens * in.q.token;
        dv_at += tokens * p.dv.token;
      }
      if (gated) dgate_at += tokens * p.dgate.token;
    };
    float k_carry[8], v_carry[8];  // f_{t+1} a_{t+1} and f_{t+1} b_{t+1}
    zero(k_carry);
    zero(v_carry);
    if (p.reverse_carry) {
      load_scratch(p.reverse_carry + carry_at(s, item, h, kStreams, 0) + lane.d, k_carry);
      if (kAttention) load_scratch(p.reverse_carry + carry_at(s, item, h, kStreams, 1) + lane.d, v_carry);
    } else if (tile.last) {
      const int64_t at = (tile.sequence.index * s.heads + h) * s.head_dim + lane.d;
      if (p.drunning_k) load_floats(p.drunning_k + at, k_carry);
      if (kAttention && p.drunning_v) load_floats(p.drunning_v + at, v_carry);
    }

    const int subs = (tile.count + p.sub_block - 1) / p.sub_block;
    float k_state[8], v_state[8];
    entry_state<kAttention>(in, tile, lane, k_state, v_state);
    ChunkClock back_clock(tile.position + tile.count - 1, s.chunk_size);

    // Steps below zero go forward and note where sub-blocks start; the others take the sub-blocks from the last to the first.
#pragma unroll 1
    for (int step = gated ? 1 - subs : 0; step < subs; ++step) {
      const bool keep = step >= 0;
      const int sub = keep ? subs - 1 - step : step + subs - 1;
      const int begin = sub * p.sub_block, end = min(begin + p.sub_block, tile.count);
      if (gated) {
        Raw8<T>* at = starts + sub * kStreams * threads;
        if (step > 0) {
          unpack(at[0], k_state);
          if constexpr (kAttention) unpack(at[threads], v_state);
        } else if (step < 0) {
          pack(k_state, at[0]);
          if constexpr (kAttention) pack(v_state, at[threads]);
        }
        ChunkClock clock(tile.position + begin, s.chunk_size);
        // N tokens: all rows are requested, then used one after the other.
        const auto walk = [&](int i, auto tokens) {
          constexpr int N = decltype(tokens)::value;
          [[maybe_unused]] Raw8<T> k_raw[N], v_raw[kAttention ? N : 1], gate_raw[N];
#pragma unroll
          for (int u = 0; u < N; ++u) {
            gate_raw[u] = load_raw<kVector>(take(gate_at, in.gate.token));
            if constexpr (kAttention) v_raw[u] = load_raw<kVector>(take(v_at, in.v.token));
            k_raw[u] = load_raw<kVector>(take(k_at, in.k.token));
          }
#pragma unroll
          for (int u = 0; u < N; ++u) {
            if (clock.opens()) {
              zero(k_state);
              zero(v_state);
            }
            clock.next();
            if (keep) {
              Raw8<T>* const to = state_at(i + u - begin);
              pack(k_state, to[0]);
              if constexpr (kAttention) pack(v_state, to[32]);
            }
            float f[8], g[8], x[8], bias[8];
            read_bias(bias);
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
      if (!keep) {
        move_others(end - begin);
        continue;
      }

      if (!gated) move_inputs(end - begin);
      move_inputs(-1);
      move_others(end - 1 - begin);
      // Rows of a token are asked for when those of the token after it have been used.
      Raw8<T> q_raw, k_raw, v_raw, gate_raw, dout_raw;
      float probability = 0.0f, ds = 0.0f;
      const auto load_scalars = [&] {
        if constexpr (kAttention) {
          probability = p.p_self[scalar_at];
          ds = p.ds_self[scalar_at];
          --scalar_at;
        }
      };
      dout_raw = load_raw<kVector>(take(dout_at, -p.dout.token));
      load_scalars();
      if constexpr (kAttention) q_raw = load_raw<kVector>(take(q_at, -in.q.token));
      if (gated) gate_raw = load_raw<kVector>(take(gate_at, -in.gate.token));
      k_raw = load_raw<kVector>(take(k_at, -in.k.token));
      if constexpr (kAttention) v_raw = load_raw<kVector>(take(v_at, -in.v.token));
#pragma unroll 1
      for (int i = end - 1; i >= begin; --i) {
        const bool more = i > begin;
        const float ds_now = in.scale * ds;
        float x[8], f[8], g[8], bias[8];
        unpack(dout_raw, x);
        if (more) dout_raw = load_raw<kVector>(take(dout_at, -p.dout.token));
        if constexpr (kAttention) {
#pragma unroll
          for (int j = 0; j < 8; ++j) v_carry[j] = fmaf(probability, x[j], v_carry[j]);
          unpack(q_raw, x);
          if (more) {
            q_raw = load_raw<kVector>(take(q_at, -in.q.token));
            load_scalars();
          }
#pragma unroll
          for (int j = 0; j < 8; ++j) k_carry[j] = fmaf(ds_now, x[j], k_carry[j]);
          if (back_clock.closes()) {
            add_chunk_grad<T, W>(p, lane, tile.sequence.index, back_clock.chunk, k_carry, v_carry);
          }
        } else {
#pragma unroll
          for (int j = 0; j < 8; ++j) k_carry[j] += x[j];
        }
        // k_carry and v_carry are now a_t and b_t.
        if (gated) read_bias(bias);
        gates_of(gate_raw, bias, gated, f, g);
        if (gated && more) gate_raw = load_raw<kVector>(take(gate_at, -in.gate.token));
        float k_before[8], v_before[8], dq[8], dk[8], dgate[8];
        zero(k_before);
        zero(v_before);
        if (gated) {
          const Raw8<T>* const from = state_at(i - begin);
          unpack(from[0], k_before);
          if constexpr (kAttention) unpack(from[32], v_before);
        }
        unpack(k_raw, x);
        if (more) k_raw = load_raw<kVector>(take(k_at, -in.k.token));
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          dgate[j] = k_carry[j] * (k_before[j] - x[j]);
          dk[j] = g[j] * k_carry[j];
          dq[j] = kAttention ? ds_now * fmaf(f[j], k_before[j], g[j] * x[j]) : 0.0f;
        }
        if constexpr (kAttention) {
          unpack(v_raw, x);
          if (more) v_raw = load_raw<kVector>(take(v_at, -in.v.token));
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            dgate[j] = fmaf(v_carry[j], v_before[j] - x[j], dgate[j]);
            x[j] = g[j] * v_carry[j];
          }
          T* const to = take(dv_at, -p.dv.token);
          if (lane.live) store_row<kVector>(to, x);
        }
        if (gated) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            dgate[j] *= f[j] * g[j];
            dbias[j] += dgate[j];
          }
          T* const to = take(dgate_at, -p.dgate.token);
          if (lane.live) store_row<kVector>(to, dgate);
        }
        const bool opens = back_clock.opens() || !gated;
        back_clock.back();
        if (opens) {
          zero(k_carry);
          zero(v_carry);
        } else {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            k_carry[j] *= f[j];
            v_carry[j] *= f[j];
          }
        }

        if (kAttention && !p.sum_q && lane.live) {
          const int64_t at = ((row * s.tokens + token + i) * s.heads + h) * s.head_dim + lane.d;
          load_scratch(p.dq_sum + at, x);
#pragma unroll
          for (int j = 0; j < 8; ++j) x[j] += dq[j];
          store_row<kVector>(out_row_of<T>(p.dq, row, token + i, h, lane.d), x);
        }
        if (!p.sum_k && lane.live) store_row<kVector>(out_row_of<T>(p.dk, row, token + i, h, lane.d), dk);
        if (which_count == 0) continue;

        // What this warp adds to the sums of the token takes the place of its states of the token.
        if (!all_own && !owner) {
          zero(dq);
          zero(dk);
        }
        __syncwarp();
        float4* const to = warp_slot + (i - begin) * token_slots + in_warp % W;
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
      // All stand before `begin` now; the sub-block before this one is a whole one.
      move_inputs(1 - p.sub_block);
      move_others(1 - p.sub_block);
      if (which_count == 0) continue;

      __syncthreads();  // contributions to all tokens of the sub-block are there
      const int pieces = (end - begin) * p.block_families * which_count * W;
#pragma unroll 2
      for (int piece = tid; piece < pieces; piece += threads) {
        const int which = which_count == 2 ? piece / W & 1 : 0;
        const int rest = which_count == 2 ? piece / (2 * W) : piece / W;
        const int piece_slot = rest % p.block_families, i = rest / p.block_families, piece_d = piece % W * 8;
        const int64_t piece_family = static_cast<int64_t>(family_batch) * p.block_families + piece_slot;
        if (piece_d >= s.head_dim || piece_family >= p.families) continue;
        const bool is_q = p.sum_q && which == 0;
        const int64_t t = token + begin + i;
        // Offset of (row, t, family) in dq_sum or dk_sum: sums run over all heads of a family, so families are groups.
        const int64_t sum_at = ((row * s.tokens + t) * p.families + piece_family) * s.head_dim + piece_d;
        float sum[8];
        zero(sum);
        if (is_q) load_scratch(p.dq_sum + sum_at, sum);
        if (!is_q && p.pass > 0) load_scratch(p.dk_sum + sum_at, sum);
        const float4* const lines = slots + i * token_slots + which * p.warp_rows * 2 * W + piece % W;
        for (int m = piece_slot * p.family_rows; m < (piece_slot + 1) * p.family_rows; ++m) {
          const float4* const at = lines + m / p.warp_rows * warp_slots + m % p.warp_rows * 2 * W;
          const float4 low = at[0], high = at[W];
          sum[0] += low.x, sum[1] += low.y, sum[2] += low.z, sum[3] += low.w;
          sum[4] += high.x, sum[5] += high.y, sum[6] += high.z, sum[7] += high.w;
        }
        if (p.pass + 1 < p.passes) {
          store_scratch((is_q ? p.dq_sum : p.dk_sum) + sum_at, sum);
        } else {
          store_row<kVector>(out_row_of<T>(is_q ? p.dq : p.dk, row, t, piece_family, piece_d), sum);
        }
      }
      __syncthreads();  // all are added up: the next states may take their place
    }
    if (tile.first && p.dinitial_k && lane.live) {
      const int64_t at = (tile.sequence.index * s.heads + h) * s.head_dim + lane.d;
      store_floats(p.dinitial_k + at, k_carry);
      if (kAttention) store_floats(p.dinitial_v + at, v_carry);
    }
  }
  const Lane lane = lane_of<W>(head, s.heads, s.head_dim);
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

  int device = 0, shared_limit = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory limit");
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

struct BwdWorkspace {
  Piece<float> carry;
  Piece<float> reverse_carry;
  Piece<float> dk_sum;
  Piece<float> bias_partial;
  int64_t bias_rows = 0;
};

BwdWorkspace take_workspace(ScanBwd p, bool attention, bool bias, Arena& arena) {
  const Sizes& s = p.in.size;
  BwdWorkspace w;
  const bool gated = p.in.gate.ptr != nullptr;
  w.carry = take_carry(s, gated, kMaxChunkBwd, attention ? 3 : 2, arena);
  w.reverse_carry = take_carry(s, gated, kMaxChunkBwd, attention ? 2 : 1, arena);
  with_variant(s, attention ? "rat_attention" : "chunk_recurrence", [&](auto variant) {
    const Deal d = deal<decltype(variant)>(p, attention);
    if (p.passes > 1 && p.sum_k) w.dk_sum = arena.take<float>(s.batch * s.tokens * s.k_groups * s.head_dim);
    w.bias_rows = d.tile_blocks;
    if (bias) w.bias_partial = arena.take<float>(d.tile_blocks * s.heads * s.head_dim);
  });
  return w;
}

template <bool kAttention>
void launch_scan_bwd(ScanBwd p, float* dgate_bias, const BwdWorkspace& w, cudaStream_t stream) {
  const Sizes& s = p.in.size;
  if (kAttention && s.k_groups != s.q_groups && s.k_groups != s.heads) {
    throw std::runtime_error("rat_ext: rat_attention_backward: k groups must be the q groups or the heads");
  }
  p.dk_sum = w.dk_sum;
  p.bias_partial = w.bias_partial;
  if (w.carry.taken()) {
    p.in.carry = w.carry;
    scan_carries(p.in, kAttention, w.carry, stream);
    p.reverse_carry = w.reverse_carry;
  }
  with_variant(s, "chunk_scan_bwd", [&](auto variant) {
    using V = decltype(variant);
    using T = typename V::T;
    const Deal d = deal<V>(p, kAttention);
    if (w.carry.taken()) {
      const int64_t blocks = ceil_div(p.in.items * p.in.head_batches, kThreads / 32);
      if (blocks > 0) {
        chunk_carry_bwd_kernel<T, V::W, V::kVector, kAttention>
            <<<grid_x(blocks, "chunk_carry_bwd"), kThreads, 0, stream>>>(p);
        check_launch("chunk_carry_bwd");
      }
      CarryJoin join{};
      join.size = s;
      join.tile = p.in.tile;
      join.gates = w.carry;
      join.values = w.reverse_carry;
      join.gate_streams = kAttention ? 3 : 2;
      join.value_streams = join.joined = kAttention ? 2 : 1;
      join.outer_k = p.drunning_k;
      join.outer_v = p.drunning_v;
      join.reverse = true;
      join_carries(join, stream);
    }
    const int64_t blocks = d.tile_blocks * p.family_batches;
    if (blocks == 0) return;
    const auto kernel = chunk_scan_bwd_kernel<T, V::W, V::kVector, kAttention>;
    const size_t shared = scan_bwd_shared<T>(p, kAttention, d.threads);
    if (shared > 48 * 1024) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
            "chunk_scan_bwd shared memory");
    }
    for (p.pass = 0; p.pass < p.passes; ++p.pass) {
      kernel<<<grid_x(blocks, "chunk_scan_bwd"), d.threads, shared, stream>>>(p);
      check_launch("chunk_scan_bwd");
    }
  });
  if (dgate_bias) reduce_gate_bias(w.bias_partial, w.bias_rows, s.heads * s.head_dim, dgate_bias, stream);
}

ScanBwd scan_bwd(const AttentionBwdParams& a) {
  ScanBwd p{};
  p.in = scan_input(a.fwd);
  p.chunks = a.fwd.chunks;
  p.incoming_k = a.dchunk_k;
  p.incoming_v = a.dchunk_v;
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

Launch chunk_prepare_bwd(const AttentionBwdParams& a, const BwdScratch& scratch, Arena& arena) {
  if (short_chunks(a.fwd)) return chunk_prepare_short_bwd(a, scratch, arena);
  const bool gated = a.fwd.gate.ptr != nullptr;
  const Piece<float> carry = take_carry(a.fwd.size, gated, kMaxChunkFwd, 3, arena);
  return [&a, scratch, gated, carry](cudaStream_t stream) {
    PrepareBwd p{};
    p.in = scan_input(a.fwd);
    p.dy = a.dy;
    p.y = a.fwd.y;
    p.out_gate = a.fwd.out_gate;
    p.dout = scratch.dout;
    p.dout_gate = a.dout_gate;
    p.lse = static_cast<const float*>(a.fwd.lse);
    p.p_self = scratch.p_self;
    p.ds_self = scratch.ds_self;
    p.delta = scratch.delta;
    if (carry.taken()) {
      p.in.carry = carry;
      scan_carries(p.in, true, carry, stream);
    }
    with_variant(p.in.size, "rat_attention_backward", [&](auto variant) {
      using V = decltype(variant);
      plan_tiles<V>(p.in, tile_size(p.in.size, gated, kMaxChunkFwd, 16));
      const int64_t blocks = ceil_div(p.in.items * p.in.head_batches, kThreads / 32);
      if (blocks == 0) return;
      chunk_prepare_bwd_kernel<typename V::T, V::W, V::kVector>
          <<<grid_x(blocks, "chunk_prepare_bwd"), kThreads, 0, stream>>>(p);
      check_launch("chunk_prepare_bwd");
    });
  };
}

Launch chunk_scan_bwd(const AttentionBwdParams& a, const BwdScratch& scratch, Arena& arena) {
  if (short_chunks(a.fwd)) {
    const Launch scan = chunk_scan_short_bwd(a, scratch, arena);
    return [&a, scratch, scan](cudaStream_t stream) {
      carry_state_bwd(a, scratch, stream);
      scan(stream);
    };
  }
  const BwdWorkspace w = take_workspace(scan_bwd(a), true, a.dgate_bias != nullptr, arena);
  return [&a, scratch, w](cudaStream_t stream) {
    ScanBwd p = scan_bwd(a);
    p.dout = scratch.dout;
    p.p_self = scratch.p_self;
    p.ds_self = scratch.ds_self;
    p.dchunk_k = scratch.dchunk_k;
    p.dchunk_v = scratch.dchunk_v;
    p.dq_sum = scratch.dq;
    carry_state_bwd(a, scratch, stream);
    launch_scan_bwd<true>(p, static_cast<float*>(a.dgate_bias), w, stream);
  };
}

void recurrence_bwd(const RecurrenceBwdParams& r, const Allocator& allocator, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const Sizes& s = r.fwd.size;
  Arena arena;
  const BwdWorkspace w = take_workspace(scan_bwd(r), false, r.dgate_bias != nullptr, arena);
  arena.commit(allocator);
  if (s.cu_seqlens || s.lengths) check_sequences(s, -1, -1, -1, nullptr, stream);
  if (r.dinitial) {
    copy_empty(s, static_cast<const float*>(r.dfinal), static_cast<float*>(r.dinitial), stream);
  }
  launch_scan_bwd<false>(scan_bwd(r), static_cast<float*>(r.dgate_bias), w, stream);
}

KernelList chunk_recurrence_bwd_kernels() {
  static const KernelTable table = [] {
    KernelTable t;
    for_each_variant([&](auto variant, const char* type) {
      using V = decltype(variant);
      using T = typename V::T;
      const auto address = [](auto* kernel) { return reinterpret_cast<const void*>(kernel); };
      t.add("chunk_prepare_bwd", variant, type, address(chunk_prepare_bwd_kernel<T, V::W, V::kVector>));
      t.add("chunk_scan_bwd", variant, type, address(chunk_scan_bwd_kernel<T, V::W, V::kVector, true>));
      t.add("chunk_recurrence_bwd", variant, type, address(chunk_scan_bwd_kernel<T, V::W, V::kVector, false>));
      t.add("chunk_carry_bwd", variant, type, address(chunk_carry_bwd_kernel<T, V::W, V::kVector, true>));
      t.add("chunk_recurrence_carry_bwd", variant, type, address(chunk_carry_bwd_kernel<T, V::W, V::kVector, false>));
    });
    t.add("gate_bias_reduce", reinterpret_cast<const void*>(gate_bias_reduce_kernel));
    return t;
  }();
  return table.list();
}

}  // namespace rat::cuda
