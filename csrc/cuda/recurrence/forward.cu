// The forward scans: k~ and v~ of rat_attention with what the attention kernel needs of them, and chunk_recurrence.
//
//   chunk_carry_fwd_kernel    a segment's end state from a zero start, and the product of its gates   long chunks only
//   chunk_carry_join_kernel   start states of segments, one after the other                           long chunks only
//   chunk_prepare_fwd_kernel  the scan
//
// A warp takes a tile of tokens and 32 / W heads, and walks the tile with the states in registers (scan.cuh). Rows of a few
// tokens are requested before the first is used; many warps an SM hide the rest. Bytes a token in attention, elements of
// two bytes: reads v, gate (4 H D) and q, k (4 G D, the heads of a group hit the L1 cache), writes v~ (2 H D), s_tt (4 H)
// and 1/L of a key and a value. About 225 instructions a row and warp.
#include <type_traits>

#include "scan_launch.h"

namespace rat::cuda {
namespace {

constexpr int kThreads = 128;

// Tokens requested at once: what keeps four blocks on an SM.
template <class T, bool kAttention>
constexpr int kTokens = (sizeof(T) == 4 ? 1 : 2) * (kAttention ? 1 : 2);

struct PrepareFwd {
  ScanInput in;
  Rows y;         // v~, or y of chunk_recurrence
  float* s_self;  // (B, H, T)
  ChunkStates chunks;
  float* running_k;  // (N, H, D) or null
  float* running_v;
};

// kAttention: scan k and v, dot with q, write chunk states. Otherwise scan k alone and write its states.
template <class T, int W, bool kVector, bool kAttention>
__global__ void __launch_bounds__(kThreads, kVector ? 4 : 2)
    chunk_prepare_fwd_kernel(const __grid_constant__ PrepareFwd p) {
  const ScanInput& in = p.in;
  const Sizes& s = in.size;
  Tile tile;
  Lane lane;
  if (!warp_work<W>(in, tile, lane)) return;
  const bool gated = in.gate.ptr != nullptr;
  const int64_t row = tile.sequence.batch, token = tile.token, h = lane.head;
  const T* k_row = row_of<T>(in.k, row, token, h / (s.heads / s.k_groups), lane.d);
  const T* q_row = kAttention ? row_of<T>(in.q, row, token, h / (s.heads / s.q_groups), lane.d) : nullptr;
  const T* v_row = kAttention ? row_of<T>(in.v, row, token, h, lane.d) : nullptr;
  const T* gate_row = gated ? row_of<T>(in.gate, row, token, h, lane.d) : nullptr;
  T* y_row = out_row_of<T>(p.y, row, token, h, lane.d);
  float* s_self = kAttention ? p.s_self + (row * s.heads + h) * s.tokens + token : nullptr;

  float bias[8], k_state[8], v_state[8];
  load_bias<T>(in, lane, bias);
  entry_state<kAttention>(in, tile, lane, k_state, v_state);
  ChunkClock clock(tile.position, s.chunk_size);

  // N tokens from token i on: all rows are requested, then used one after the other.
  const auto walk = [&](int i, auto tokens) {
    constexpr int N = decltype(tokens)::value;
    [[maybe_unused]] Raw8<T> q_raw[N], k_raw[N], v_raw[N], gate_raw[N];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if constexpr (kAttention) v_raw[u] = load_raw<kVector>(take(v_row, in.v.token));
      if (gated) gate_raw[u] = load_raw<kVector>(take(gate_row, in.gate.token));
      k_raw[u] = load_raw<kVector>(take(k_row, in.k.token));
      if constexpr (kAttention) q_raw[u] = load_raw<kVector>(take(q_row, in.q.token));
    }
    [[maybe_unused]] float own[N];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (clock.opens() || !gated) {
        zero(k_state);
        zero(v_state);
      }
      float f[8], g[8], x[8];
      gates_of(gate_raw[u], bias, gated, f, g);
      unpack(k_raw[u], x);
      advance(f, g, x, k_state);
      T* const out = take(y_row, p.y.token);
      if constexpr (kAttention) {
        unpack(v_raw[u], x);
        advance(f, g, x, v_state);
        if (lane.live) store_row<kVector>(out, v_state);
        unpack(q_raw[u], x);
        own[u] = lane.live ? dot(x, k_state) : 0.0f;
        if (clock.closes()) {
          float turned[8];
#pragma unroll
          for (int j = 0; j < 8; ++j) turned[j] = k_state[j];
          if (in.rotary.cos) rotate<W>(in.rotary, clock.chunk, s.head_dim, lane, 1.0f, turned);
          if (lane.live) {
            const int64_t at = chunk_offset(s, p.chunks, tile.sequence.index, h) + clock.chunk * s.head_dim + lane.d;
            store_row<kVector>(static_cast<T*>(p.chunks.k) + at, turned);
            store_row<kVector>(static_cast<T*>(p.chunks.v) + at, v_state);
          }
        }
      } else {
        if (lane.live) store_row<kVector>(out, k_state);
      }
      clock.next();
    }
    if constexpr (kAttention) {
#pragma unroll
      for (int u = 0; u < N; ++u) {
        own[u] = group_sum<W>(own[u]);
        if (lane.live && lane.index == 0) s_self[i + u] = in.scale * own[u];
      }
    }
  };
  constexpr int kStep = kTokens<T, kAttention>;
  int i = 0;
#pragma unroll 1
  for (; i + kStep <= tile.count; i += kStep) walk(i, std::integral_constant<int, kStep>());
#pragma unroll 1
  for (; i < tile.count; ++i) walk(i, std::integral_constant<int, 1>());
  if (tile.last && p.running_k && lane.live) {
    const int64_t at = (tile.sequence.index * s.heads + h) * s.head_dim + lane.d;
    store_floats(p.running_k + at, k_state);
    if (kAttention) store_floats(p.running_v + at, v_state);
  }
}

template <class T, int W, bool kVector, bool kAttention>
__global__ void __launch_bounds__(kThreads) chunk_carry_fwd_kernel(const __grid_constant__ ScanInput in) {
  const Sizes& s = in.size;
  Tile tile;
  Lane lane;
  if (!warp_work<W>(in, tile, lane)) return;
  const int64_t row = tile.sequence.batch, token = tile.token, h = lane.head;
  const T* k_row = row_of<T>(in.k, row, token, h / (s.heads / s.k_groups), lane.d);
  const T* v_row = kAttention ? row_of<T>(in.v, row, token, h, lane.d) : nullptr;
  const T* gate_row = row_of<T>(in.gate, row, token, h, lane.d);

  float bias[8], k_state[8], v_state[8], product[8];
  load_bias<T>(in, lane, bias);
  zero(k_state);
  zero(v_state);
#pragma unroll
  for (int j = 0; j < 8; ++j) product[j] = 1.0f;
  ChunkClock clock(tile.position, s.chunk_size);

  constexpr int kStep = kTokens<T, kAttention>;
#pragma unroll 1
  for (int i = 0; i < tile.count; i += kStep) {
    Raw8<T> k_raw[kStep], v_raw[kStep], gate_raw[kStep];
#pragma unroll
    for (int u = 0; u < kStep; ++u) {
      const int64_t t = min(i + u, tile.count - 1);
      k_raw[u] = load_raw<kVector>(k_row + t * in.k.token);
      if constexpr (kAttention) v_raw[u] = load_raw<kVector>(v_row + t * in.v.token);
      gate_raw[u] = load_raw<kVector>(gate_row + t * in.gate.token);
    }
#pragma unroll
    for (int u = 0; u < kStep; ++u) {
      if (i + u < tile.count) {
        if (clock.opens()) {
          zero(k_state);
          zero(v_state);
          zero(product);
        }
        float f[8], g[8], x[8];
        gates_of(gate_raw[u], bias, true, f, g);
        unpack(k_raw[u], x);
        advance(f, g, x, k_state);
        if constexpr (kAttention) {
          unpack(v_raw[u], x);
          advance(f, g, x, v_state);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) product[j] *= f[j];
        clock.next();
      }
    }
  }
  if (lane.live) {
    constexpr int kStreams = kAttention ? 3 : 2;
    store_scratch(in.carry + carry_at(s, tile.item, h, kStreams, 0) + lane.d, k_state);
    if (kAttention) store_scratch(in.carry + carry_at(s, tile.item, h, kStreams, 1) + lane.d, v_state);
    store_scratch(in.carry + carry_at(s, tile.item, h, kStreams, kStreams - 1) + lane.d, product);
  }
}

// One thread for each (sequence, head, stream, d). A product of zero drops the carry, also one that is not finite.
__global__ void __launch_bounds__(kThreads) chunk_carry_join_kernel(const __grid_constant__ CarryJoin p) {
  const Sizes& s = p.size;
  const int64_t id = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t d = id % s.head_dim, stream = id / s.head_dim % p.joined;
  const int64_t owner = id / s.head_dim / p.joined;
  if (owner >= s.sequences * s.heads) return;
  const int64_t n = owner / s.heads, h = owner % s.heads;
  const Sequence sequence = sequence_at(s, n);
  const int64_t count = tile_count(sequence, p.tile);
  if (count == 0) return;
  const int64_t first = first_item(s, n, p.tile) + (p.reverse ? count - 1 : 0);
  const int64_t step = (p.reverse ? -1 : 1) * s.heads * s.head_dim;
  const float* gate = p.gates + carry_at(s, first, h, p.gate_streams, p.gate_streams - 1) + d;
  float* value = p.values + carry_at(s, first, h, p.value_streams, static_cast<int>(stream)) + d;
  const float* outer = stream ? p.outer_v : p.outer_k;
  float state = outer ? outer[owner * s.head_dim + d] : 0.0f;

  constexpr int kAhead = 16;
  for (int64_t j = 0; j < count; j += kAhead) {
    float product[kAhead], end[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (j + u < count) {
        product[u] = gate[(j + u) * step * p.gate_streams];
        end[u] = value[(j + u) * step * p.value_streams];
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (j + u < count) {
        value[(j + u) * step * p.value_streams] = state;
        state = product[u] == 0.0f ? end[u] : fmaf(product[u], state, end[u]);
      }
    }
  }
}

template <bool kAttention>
void launch_prepare(PrepareFwd p, const char* op, cudaStream_t stream) {
  with_variant(p.in.size, op, [&](auto variant) {
    using V = decltype(variant);
    const bool gated = p.in.gate.ptr != nullptr;
    // Longer tiles cost less around them, shorter ones fill the chip.
    plan_tiles<V>(p.in, tile_size(p.in.size, gated, kMaxChunkFwd, 32));
    if (p.in.items * p.in.head_batches < 4096) {
      plan_tiles<V>(p.in, tile_size(p.in.size, gated, kMaxChunkFwd, 16));
    }
    const int64_t blocks = ceil_div(p.in.items * p.in.head_batches, kThreads / 32);
    if (blocks == 0) return;
    chunk_prepare_fwd_kernel<typename V::T, V::W, V::kVector, kAttention>
        <<<grid_x(blocks, "chunk_prepare_fwd"), kThreads, 0, stream>>>(p);
    check_launch("chunk_prepare_fwd");
  });
}

template <bool kAttention>
void launch_carry(ScanInput in, cudaStream_t stream) {
  with_variant(in.size, "chunk_recurrence", [&](auto variant) {
    using V = decltype(variant);
    plan_tiles<V>(in, kSegment);
    const int64_t blocks = ceil_div(in.items * in.head_batches, kThreads / 32);
    if (blocks == 0) return;
    chunk_carry_fwd_kernel<typename V::T, V::W, V::kVector, kAttention>
        <<<grid_x(blocks, "chunk_carry_fwd"), kThreads, 0, stream>>>(in);
    check_launch("chunk_carry_fwd");
  });
}

}  // namespace

void join_carries(const CarryJoin& join, cudaStream_t stream) {
  const int64_t threads = join.size.sequences * join.size.heads * join.joined * join.size.head_dim;
  if (threads == 0) return;
  chunk_carry_join_kernel<<<grid_x(ceil_div(threads, kThreads), "chunk_carry_join"), kThreads, 0, stream>>>(join);
  check_launch("chunk_carry_join");
}

void scan_carries(ScanInput in, bool attention, float* carry, cudaStream_t stream) {
  in.carry = carry;
  if (attention) {
    launch_carry<true>(in, stream);
  } else {
    launch_carry<false>(in, stream);
  }
  CarryJoin join{};
  join.size = in.size;
  join.tile = kSegment;
  join.gates = carry;
  join.values = carry;
  join.gate_streams = join.value_streams = attention ? 3 : 2;
  join.joined = attention ? 2 : 1;
  join.outer_k = in.initial_k;
  join.outer_v = in.initial_v;
  join_carries(join, stream);
}

Launch chunk_prepare_fwd(const AttentionFwdParams& a, const FwdScratch& scratch, Arena& arena) {
  const Piece<float> carry = take_carry(a.size, a.gate.ptr != nullptr, kMaxChunkFwd, 3, arena);
  return [&a, scratch, carry](cudaStream_t stream) {
    PrepareFwd p{};
    p.in = scan_input(a);
    p.y = a.y;
    p.s_self = scratch.s_self;
    p.chunks = a.chunks;
    p.running_k = static_cast<float*>(a.running_k);
    p.running_v = static_cast<float*>(a.running_v);
    if (carry.taken()) {
      p.in.carry = carry;
      scan_carries(p.in, true, carry, stream);
    }
    carry_state_fwd(a, stream);
    launch_prepare<true>(p, "rat_attention", stream);
  };
}

void recurrence_fwd(const RecurrenceFwdParams& r, const Allocator& allocator, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  Arena arena;
  const Piece<float> carry = take_carry(r.size, true, kMaxChunkFwd, 2, arena);
  arena.commit(allocator);
  if (r.size.cu_seqlens || r.size.lengths) check_sequences(r.size, -1, -1, -1, nullptr, stream);
  PrepareFwd p{};
  p.in = scan_input(r);
  p.y = r.y;
  p.running_k = static_cast<float*>(r.final_state);
  if (carry.taken()) {
    p.in.carry = carry;
    scan_carries(p.in, false, carry, stream);
  }
  if (r.final_state) copy_empty(r.size, p.in.initial_k, p.running_k, stream);
  launch_prepare<false>(p, "chunk_recurrence", stream);
}

KernelList chunk_recurrence_fwd_kernels() {
  static const KernelTable table = [] {
    KernelTable t;
    for_each_variant([&](auto variant, const char* type) {
      using V = decltype(variant);
      using T = typename V::T;
      const auto address = [](auto* kernel) { return reinterpret_cast<const void*>(kernel); };
      t.add("chunk_prepare_fwd", variant, type, address(chunk_prepare_fwd_kernel<T, V::W, V::kVector, true>));
      t.add("chunk_recurrence_fwd", variant, type, address(chunk_prepare_fwd_kernel<T, V::W, V::kVector, false>));
      t.add("chunk_carry_fwd", variant, type, address(chunk_carry_fwd_kernel<T, V::W, V::kVector, true>));
      t.add("chunk_recurrence_carry_fwd", variant, type, address(chunk_carry_fwd_kernel<T, V::W, V::kVector, false>));
    });
    t.add("chunk_carry_join", reinterpret_cast<const void*>(chunk_carry_join_kernel));
    return t;
  }();
  return table.list();
}

}  // namespace rat::cuda
