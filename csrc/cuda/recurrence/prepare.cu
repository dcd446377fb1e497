// Backward phase 1: what the gradient of attention and the reverse scan need of a token, by family (choose.cpp).
//
//   chunk_prepare_short_bwd_kernel   short: dO, d(out_gate), Delta. Elementwise, and a sum over each row
//   chunk_prepare_bwd_kernel         scan, long: the same and p_tt, ds_tt, which need k~ and v~: it works as the forward does. For
//                                    long it leaves the states that tiles start with, too
//
// Bytes per token, elements of two bytes. Short: reads dy, y, out_gate and writes dO, dout_gate, 10 H D (without out_gate it
// reads 4 H D). Scan: 14 H D; long: a quarter of H D more.
#include <type_traits>

#include "families.h"
#include "scan_launch.h"

namespace rat::cuda {
namespace {

constexpr int kThreads = 128;

// ---- dO, d(out_gate), Delta -------------------------------------------------------------------------------------------

struct OutputGrad {
  Rows dy, y, out_gate;  // out_gate null: dO is dy
  Rows dout, dout_gate;  // outputs, with out_gate
  float* delta;          // (B, H, T)
};

// The rows that a lane is at.
template <class T>
struct OutputRows {
  const T *dy, *y, *out_gate;
  T *dout, *dout_gate;

  __device__ __forceinline__ OutputRows(const OutputGrad& p, int64_t row, int64_t token, const Lane& lane) {
    const int64_t h = lane.head;
    const bool gated = p.out_gate.ptr != nullptr;
    dy = row_of<T>(p.dy, row, token, h, lane.d);
    y = row_of<T>(p.y, row, token, h, lane.d);
    out_gate = gated ? row_of<T>(p.out_gate, row, token, h, lane.d) : nullptr;
    dout = gated ? out_row_of<T>(p.dout, row, token, h, lane.d) : nullptr;
    dout_gate = gated ? out_row_of<T>(p.dout_gate, row, token, h, lane.d) : nullptr;
  }

  // With an output gate: dy becomes dO, y becomes the gradient of the gate; both are stored.
  __device__ __forceinline__ void through_gate(const OutputGrad& p, const Raw8<T>& out_gate_raw, const Lane& lane,
                                               float (&dy_to_do)[8], float (&y_to_dgate)[8]) {
    float z[8];
    unpack(out_gate_raw, z);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float open, shut;
      gates<T>(kLogitUnit<T> * z[j], open, shut);
      y_to_dgate[j] *= dy_to_do[j] * shut;
      dy_to_do[j] *= open;
    }
    if (lane.live) {
      store_row(dout_gate, y_to_dgate);
      store_row(dout, dy_to_do);
    }
    dout_gate += p.dout_gate.token;
    dout += p.dout.token;
  }
};

OutputGrad output_grad(const AttentionBwdParams& a, const BwdScratch& scratch) {
  return {a.dy, a.fwd.y, a.fwd.out_gate, scratch.dout, a.dout_gate, scratch.delta};
}

// ---- scan -------------------------------------------------------------------------------------------------------------

struct PrepareBwd {
  ScanInput in;
  OutputGrad out;
  const float* lse;  // (B, H, T), as are the next two
  float* p_self;
  float* ds_self;
  TileStates tiles;
};

template <class T, int W>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 4 : 2)
    chunk_prepare_bwd_kernel(const __grid_constant__ PrepareBwd p) {
  const ScanInput& in = p.in;
  const Sizes& s = in.size;
  ScanTile tile;
  Lane lane;
  if (!warp_work<W>(in, tile, lane)) return;
  const bool gated = in.gate.ptr != nullptr, out_gated = p.out.out_gate.ptr != nullptr;
  const int64_t row = tile.sequence.batch, token = tile.token, h = lane.head;
  const T* q_row = row_of<T>(in.q, row, token, group_of(s, h, s.q_groups), lane.d);
  const T* k_row = row_of<T>(in.k, row, token, group_of(s, h, s.k_groups), lane.d);
  const T* v_row = row_of<T>(in.v, row, token, h, lane.d);
  const T* gate_row = gated ? row_of<T>(in.gate, row, token, h, lane.d) : nullptr;
  OutputRows<T> out(p.out, row, token, lane);
  const int64_t scalars = (row * s.heads + h) * s.tokens + token;

  float bias[8], k_state[8], v_state[8];
  load_bias<T>(in, lane, bias);
  incoming_state<true>(in, tile, lane, k_state, v_state);
  ChunkClock clock(s, tile.position);
  int in_span = p.tiles.ptr ? static_cast<int>(modulo(tile.position, p.tiles.span)) : 0;

#pragma unroll 1
  for (int i = 0; i < tile.count; ++i) {
    const Raw8<T> dy_raw = load_raw(take(out.dy, p.out.dy.token));
    const Raw8<T> y_raw = load_raw(take(out.y, p.out.y.token));
    const Raw8<T> v_raw = load_raw(take(v_row, in.v.token));
    Raw8<T> gate_raw, out_gate_raw;
    if (gated) gate_raw = load_raw(take(gate_row, in.gate.token));
    if (out_gated) out_gate_raw = load_raw(take(out.out_gate, p.out.out_gate.token));
    const Raw8<T> k_raw = load_raw(take(k_row, in.k.token));
    const Raw8<T> q_raw = load_raw(take(q_row, in.q.token));
    const float lse = p.lse[scalars + i];
    if (p.tiles.ptr) {
      if (in_span % kStateTile == 0 && lane.live && !clock.resets()) {
        const int64_t place = state_place(s, tile.sequence, token + i);
        T* const to = static_cast<T*>(p.tiles.ptr) + (place * s.heads + h) * 2 * s.head_dim + lane.d;
        store_row(to, k_state);
        store_row(to + s.head_dim, v_state);
      }
      if (++in_span == p.tiles.span) in_span = 0;
    }

    float dout[8], delta, x[8], f[8], g[8];
    unpack(dy_raw, dout);
    unpack(y_raw, x);
    delta = dot(dout, x);
    if (out_gated) out.through_gate(p.out, out_gate_raw, lane, dout, x);
    if (clock.resets() || !gated) {
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
      // Before the first key a token attends to itself alone: its weight is 1 and its score has no gradient, whatever
      // Delta lost when y was rounded.
      const bool alone = tile.position + i < s.key_every;
      const float probability = alone ? 1.0f : expf(fmaf(in.scale, own, -lse));
      p.p_self[scalars + i] = probability;
      p.ds_self[scalars + i] = alone ? 0.0f : probability * (dp - delta);
      p.out.delta[scalars + i] = delta;
    }
  }
}

// ---- short ------------------------------------------------------------------------------------------------------------

constexpr int kTokens = 16;  // of a warp

struct PrepareShort {
  Sizes size;
  OutputGrad out;
  int64_t row_tiles;     // ceil(T / kTokens)
  int64_t head_batches;  // ceil(H / heads of a warp)
};

// A warp takes kTokens tokens and 32 / W heads.
template <class T, int W>
__global__ void __launch_bounds__(kThreads, 5) chunk_prepare_short_bwd_kernel(const __grid_constant__ PrepareShort p) {
  const Sizes& s = p.size;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int64_t tile = quotient(warp, p.head_batches), batch = modulo(warp, p.head_batches);
  if (tile >= s.batch * p.row_tiles) return;
  const Lane lane = lane_of<W>(batch * (32 / W) + threadIdx.x % 32 / W, s.heads, s.head_dim);
  const int64_t row = quotient(tile, p.row_tiles), token = modulo(tile, p.row_tiles) * kTokens, h = lane.head;
  const int count = static_cast<int>(min(s.tokens - token, static_cast<int64_t>(kTokens)));
  const bool out_gated = p.out.out_gate.ptr != nullptr;
  OutputRows<T> out(p.out, row, token, lane);
  float* const delta = p.out.delta + (row * s.heads + h) * s.tokens + token;

  // N tokens from token i on: all rows are requested, then used one after the other.
  const auto walk = [&](int i, auto tokens) {
    constexpr int N = decltype(tokens)::value;
    Raw8<T> dy_raw[N], y_raw[N], out_gate_raw[N];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      dy_raw[u] = load_raw(take(out.dy, p.out.dy.token));
      y_raw[u] = load_raw(take(out.y, p.out.y.token));
      if (out_gated) out_gate_raw[u] = load_raw(take(out.out_gate, p.out.out_gate.token));
    }
    float sum[N];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      float dout[8], x[8];
      unpack(dy_raw[u], dout);
      unpack(y_raw[u], x);
      sum[u] = lane.live ? dot(dout, x) : 0.0f;
      if (out_gated) out.through_gate(p.out, out_gate_raw[u], lane, dout, x);
    }
    float own = 0.0f;
#pragma unroll
    for (int u = 0; u < N; ++u) {
      sum[u] = group_sum<W>(sum[u]);
      if (lane.index == u) own = sum[u];
    }
    const bool exists = lane_of<W>(batch * (32 / W) + threadIdx.x % 32 / W, s.heads, 8 * W).live;
    if (exists && lane.index < N) delta[i + lane.index] = own;
  };
  constexpr int kStep = 4;
  int i = 0;
#pragma unroll 1
  for (; i + kStep <= count; i += kStep) walk(i, std::integral_constant<int, kStep>());
#pragma unroll 1
  for (; i < count; ++i) walk(i, std::integral_constant<int, 1>());
}

// ---- launches ---------------------------------------------------------------------------------------------------------

void launch_scan(const AttentionBwdParams& a, const BwdScratch& scratch, float* incoming, cudaStream_t stream) {
  PrepareBwd p{};
  p.in = scan_input(a.fwd);
  p.out = output_grad(a, scratch);
  p.lse = static_cast<const float*>(a.fwd.lse);
  p.p_self = scratch.p_self;
  p.ds_self = scratch.ds_self;
  if (scratch.tile_states.taken()) p.tiles = {scratch.tile_states, span_tokens(a.fwd.size)};
  if (incoming) {
    p.in.incoming = incoming;
    scan_segments(p.in, true, incoming, stream);
  }
  with_variant(p.in.size, "rat_attention_backward", [&](auto variant) {
    using V = decltype(variant);
    plan_tiles<V>(p.in, tile_size(p.in.size, a.fwd.gate.ptr != nullptr, kMaxChunkFwd, 16));
    const int64_t blocks = ceil_div(p.in.items * p.in.head_batches, kThreads / 32);
    if (blocks == 0) return;
    chunk_prepare_bwd_kernel<typename V::T, V::W><<<grid_x(blocks, "chunk_prepare_bwd"), kThreads, 0, stream>>>(p);
    check_launch("chunk_prepare_bwd");
  });
}

void launch_short(const AttentionBwdParams& a, const BwdScratch& scratch, cudaStream_t stream) {
  const Sizes& s = a.fwd.size;
  PrepareShort p{};
  p.size = s;
  p.out = output_grad(a, scratch);
  p.row_tiles = ceil_div(s.tokens, kTokens);
  with_variant(s, "rat_attention_backward", [&](auto variant) {
    using V = decltype(variant);
    if constexpr (sizeof(typename V::T) == 2) {
      p.head_batches = ceil_div(s.heads, 32 / V::W);
      const int64_t blocks = ceil_div(s.batch * p.row_tiles * p.head_batches, kThreads / 32);
      if (blocks == 0) return;
      chunk_prepare_short_bwd_kernel<typename V::T, V::W>
          <<<grid_x(blocks, "chunk_prepare_short_bwd"), kThreads, 0, stream>>>(p);
      check_launch("chunk_prepare_short_bwd");
    }
  });
}

}  // namespace

Launch scan::prepare(const AttentionBwdParams& a, const BwdScratch& scratch, Arena& arena) {
  const Piece<float> incoming = take_segments(a.fwd.size, a.fwd.gate.ptr != nullptr, kMaxChunkFwd, 3, arena);
  return [&a, scratch, incoming](cudaStream_t stream) { launch_scan(a, scratch, incoming, stream); };
}

Launch short_scan::prepare(const AttentionBwdParams& a, const BwdScratch& scratch, Arena&) {
  return [&a, scratch](cudaStream_t stream) { launch_short(a, scratch, stream); };
}

KernelList prepare_kernels() {
  static const KernelTable table = [] {
    KernelTable t;
    for_each_variant([&](auto variant, const char* type) {
      using V = decltype(variant);
      using T = typename V::T;
      t.add("chunk_prepare_bwd", variant, type, chunk_prepare_bwd_kernel<T, V::W>);
      if constexpr (sizeof(T) == 2) {
        t.add("chunk_prepare_short_bwd", variant, type, chunk_prepare_short_bwd_kernel<T, V::W>);
      }
    });
    return t;
  }();
  return table.list();
}

}  // namespace rat::cuda
