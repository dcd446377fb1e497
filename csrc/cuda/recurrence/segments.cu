// Where chunks are longer than a tile: what segments pass to each other, so that all of them can be scanned at once.
//
//   chunk_segment_fwd_kernel   a segment's end state from a zero start, and the product of its gates
//   chunk_segment_bwd_kernel   what the state before a segment receives from it, from a zero end, and the product of its gates
//   chunk_segment_join_kernel  from these what each segment starts with, one after the other, along a sequence or against it
//
// The first two work as the forward scan does (forward.cu), without its outputs: 4 H D bytes per token of elements of two bytes,
// 4 G D more for k or q.
#include "reverse.cuh"
#include "scan_launch.h"

namespace rat::cuda {
namespace {

constexpr int kThreads = 128;

// load_raw() of rows that start at multiples of 8 bytes.
template <class T>
__device__ __forceinline__ Raw8<T> load_raw_narrow(const T* p) {
  static_assert(sizeof(T) == 2);
  const uint2 low = reinterpret_cast<const uint2*>(p)[0], high = reinterpret_cast<const uint2*>(p)[1];
  return {{{{low.x, low.y, high.x, high.y}}}};
}

// kNarrow: some rows of k, v or gate are narrow (launchers.h).
template <class T, int W, bool kAttention, bool kNarrow>
__global__ void __launch_bounds__(kThreads) chunk_segment_fwd_kernel(const __grid_constant__ ScanInput in) {
  const Sizes& s = in.size;
  ScanTile tile;
  Lane lane;
  if (!warp_work<W>(in, tile, lane)) return;
  const int64_t row = tile.sequence.batch, token = tile.token, h = lane.head;
  const T* k_row = row_of<T>(in.k, row, token, group_of(s, h, s.k_groups), lane.d);
  const T* v_row = kAttention ? row_of<T>(in.v, row, token, h, lane.d) : nullptr;
  const T* gate_row = row_of<T>(in.gate, row, token, h, lane.d);

  float bias[8], k_state[8], v_state[8], product[8];
  load_bias<T>(in, lane, bias);
  zero(k_state);
  zero(v_state);
#pragma unroll
  for (int j = 0; j < 8; ++j) product[j] = 1.0f;
  ChunkClock clock(s, tile.position);

  const auto load = [](const T* from) {
    if constexpr (kNarrow) {
      return load_raw_narrow(from);
    } else {
      return load_raw(from);
    }
  };
  constexpr int kStep = (sizeof(T) == 4 ? 1 : 2) * (kAttention ? 1 : 2);  // tokens requested at once
#pragma unroll 1
  for (int i = 0; i < tile.count; i += kStep) {
    Raw8<T> k_raw[kStep], v_raw[kStep], gate_raw[kStep];
#pragma unroll
    for (int u = 0; u < kStep; ++u) {
      const int64_t t = min(i + u, tile.count - 1);
      k_raw[u] = load(k_row + t * in.k.token);
      if constexpr (kAttention) v_raw[u] = load(v_row + t * in.v.token);
      gate_raw[u] = load(gate_row + t * in.gate.token);
    }
#pragma unroll
    for (int u = 0; u < kStep; ++u) {
      if (i + u < tile.count) {
        if (clock.resets()) {
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
    store_scratch(in.incoming + segment_at(s, tile.item, h, kStreams, 0) + lane.d, k_state);
    if (kAttention) store_scratch(in.incoming + segment_at(s, tile.item, h, kStreams, 1) + lane.d, v_state);
    store_scratch(in.incoming + segment_at(s, tile.item, h, kStreams, kStreams - 1) + lane.d, product);
  }
}

template <class T, int W, bool kAttention>
__global__ void __launch_bounds__(kThreads, 4) chunk_segment_bwd_kernel(const __grid_constant__ ReverseInput p) {
  const ScanInput& in = p.in;
  const Sizes& s = in.size;
  ScanTile tile;
  Lane lane;
  if (!warp_work<W>(in, tile, lane)) return;
  const int64_t row = tile.sequence.batch, token = tile.token, h = lane.head;
  const T* q_row = kAttention ? row_of<T>(in.q, row, token, group_of(s, h, s.q_groups), lane.d) : nullptr;
  const T* gate_row = row_of<T>(in.gate, row, token, h, lane.d);
  const T* dout_row = row_of<T>(p.dout, row, token, h, lane.d);
  const int64_t scalars = (row * s.heads + h) * s.tokens + token;

  float bias[8], k_grad[8], v_grad[8], product[8];
  load_bias<T>(in, lane, bias);
  zero(k_grad);
  zero(v_grad);
#pragma unroll
  for (int j = 0; j < 8; ++j) product[j] = 1.0f;
  ChunkClock clock(s, tile.position + tile.count - 1);

  constexpr int kStep = sizeof(T) == 4 ? 1 : 2;
#pragma unroll 1
  for (int i = tile.count - 1; i >= 0; i -= kStep) {
    Raw8<T> q_raw[kStep], gate_raw[kStep], dout_raw[kStep];
    float probability[kStep], ds[kStep];
#pragma unroll
    for (int u = 0; u < kStep; ++u) {
      const int64_t t = max(i - u, 0);
      gate_raw[u] = load_raw(gate_row + t * in.gate.token);
      dout_raw[u] = load_raw(dout_row + t * p.dout.token);
      if constexpr (kAttention) {
        q_raw[u] = load_raw(q_row + t * in.q.token);
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
          for (int j = 0; j < 8; ++j) v_grad[j] = fmaf(probability[u], x[j], v_grad[j]);
          unpack(q_raw[u], x);
#pragma unroll
          for (int j = 0; j < 8; ++j) k_grad[j] = fmaf(ds[u], x[j], k_grad[j]);
          if (clock.leaves_key()) add_chunk_grad<T, W>(p, lane, tile.sequence.index, clock, k_grad, v_grad);
        } else {
#pragma unroll
          for (int j = 0; j < 8; ++j) k_grad[j] += x[j];
        }
        gates_of(gate_raw[u], bias, true, f, g);
        const bool opens = clock.resets();
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          k_grad[j] = opens ? 0.0f : f[j] * k_grad[j];
          v_grad[j] = opens ? 0.0f : f[j] * v_grad[j];
          product[j] = opens ? 0.0f : f[j] * product[j];
        }
        clock.back();
      }
    }
  }
  if (lane.live) {
    constexpr int kStreams = kAttention ? 3 : 2;
    store_scratch(p.incoming_grad + segment_at(s, tile.item, h, kStreams, 0) + lane.d, k_grad);
    if (kAttention) store_scratch(p.incoming_grad + segment_at(s, tile.item, h, kStreams, 1) + lane.d, v_grad);
    store_scratch(p.incoming_grad + segment_at(s, tile.item, h, kStreams, kStreams - 1) + lane.d, product);
  }
}

// What the join works on. `values` has joined + 1 rows for each (item, head): those that are joined, on entry what a segment makes
// of nothing, on return what it starts with; and the product of the segment's gates.
struct SegmentJoin {
  Sizes size;
  int64_t tile;
  float* values;
  int joined;
  const float* outer_k;  // (N, H, D): what the first segment on the way starts with, or null: zero
  const float* outer_v;
  PoolStates pool;  // in place of those
  bool reverse;
};

// One thread for each (sequence, head, stream, d). A product of zero drops what came before, also where that is
// not finite.
__global__ void __launch_bounds__(kThreads) chunk_segment_join_kernel(const __grid_constant__ SegmentJoin p) {
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
  const int64_t step = (p.reverse ? -1 : 1) * s.heads * s.head_dim * (p.joined + 1);
  const int streams = p.joined + 1;
  const float* gate = p.values + segment_at(s, first, h, streams, p.joined) + d;
  float* value = p.values + segment_at(s, first, h, streams, static_cast<int>(stream)) + d;
  const float* outer = stream ? p.outer_v : p.outer_k;
  int64_t outer_at = owner * s.head_dim;
  if (p.pool.entry) {
    const int64_t entry = p.pool.entry[n];
    if (entry < 0) return;
    outer = sequence.start == 0 ? nullptr : stream ? p.pool.v : p.pool.k;
    if (outer) outer_at = running_at(s, p.pool, entry, h, sequence.start - 1);
  }
  float state = outer ? outer[outer_at + d] : 0.0f;

  constexpr int kAhead = 16;
  for (int64_t j = 0; j < count; j += kAhead) {
    float product[kAhead], end[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (j + u < count) {
        product[u] = gate[(j + u) * step];
        end[u] = value[(j + u) * step];
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (j + u < count) {
        value[(j + u) * step] = state;
        state = product[u] == 0.0f ? end[u] : fmaf(product[u], state, end[u]);
      }
    }
  }
}

void join_segments(const SegmentJoin& join, cudaStream_t stream) {
  const int64_t threads = join.size.sequences * join.size.heads * join.joined * join.size.head_dim;
  if (threads == 0) return;
  chunk_segment_join_kernel<<<grid_x(ceil_div(threads, kThreads), "chunk_segment_join"), kThreads, 0, stream>>>(join);
  check_launch("chunk_segment_join");
}

template <bool kAttention>
void launch_fwd(ScanInput in, cudaStream_t stream) {
  with_variant(in.size, "chunk_recurrence", [&](auto variant) {
    using V = decltype(variant);
    plan_tiles<V>(in, kSegment);
    const int64_t blocks = ceil_div(in.items * in.head_batches, kThreads / 32);
    if (blocks == 0) return;
    const auto launch = [&](auto* kernel) {
      kernel<<<grid_x(blocks, "chunk_segment_fwd"), kThreads, 0, stream>>>(in);
      check_launch("chunk_segment_fwd");
    };
    if constexpr (kAttention && sizeof(typename V::T) == 2) {
      const bool wide = rows_are_wide(in.k, 2) && rows_are_wide(in.v, 2) && rows_are_wide(in.gate, 2);
      if (!wide) return launch(chunk_segment_fwd_kernel<typename V::T, V::W, true, true>);
    }
    launch(chunk_segment_fwd_kernel<typename V::T, V::W, kAttention, false>);
  });
}

template <bool kAttention>
void launch_bwd(ReverseInput p, cudaStream_t stream) {
  with_variant(p.in.size, "chunk_recurrence", [&](auto variant) {
    using V = decltype(variant);
    plan_tiles<V>(p.in, kSegment);
    const int64_t blocks = ceil_div(p.in.items * p.in.head_batches, kThreads / 32);
    if (blocks == 0) return;
    chunk_segment_bwd_kernel<typename V::T, V::W, kAttention>
        <<<grid_x(blocks, "chunk_segment_bwd"), kThreads, 0, stream>>>(p);
    check_launch("chunk_segment_bwd");
  });
}

}  // namespace

void scan_segments(ScanInput in, bool attention, float* incoming, cudaStream_t stream) {
  in.incoming = incoming;
  attention ? launch_fwd<true>(in, stream) : launch_fwd<false>(in, stream);
  SegmentJoin join{};
  join.size = in.size;
  join.tile = kSegment;
  join.values = incoming;
  join.joined = attention ? 2 : 1;
  join.outer_k = in.initial_k;
  join.outer_v = in.initial_v;
  join.pool = in.pool;
  join_segments(join, stream);
}

void reverse_segments(const ReverseInput& p, bool attention, cudaStream_t stream) {
  attention ? launch_bwd<true>(p, stream) : launch_bwd<false>(p, stream);
  SegmentJoin join{};
  join.size = p.in.size;
  join.tile = kSegment;
  join.values = p.incoming_grad;
  join.joined = attention ? 2 : 1;
  join.outer_k = p.drunning_k;
  join.outer_v = p.drunning_v;
  join.reverse = true;
  join_segments(join, stream);
}

KernelList segments_kernels() {
  static const KernelTable table = [] {
    KernelTable t;
    for_each_variant([&](auto variant, const char* type) {
      using V = decltype(variant);
      using T = typename V::T;
      t.add("chunk_segment_fwd", variant, type, chunk_segment_fwd_kernel<T, V::W, true, false>);
      if constexpr (sizeof(T) == 2) {
        t.add("chunk_segment_narrow_fwd", variant, type, chunk_segment_fwd_kernel<T, V::W, true, true>);
      }
      t.add("chunk_recurrence_segment_fwd", variant, type, chunk_segment_fwd_kernel<T, V::W, false, false>);
      t.add("chunk_segment_bwd", variant, type, chunk_segment_bwd_kernel<T, V::W, true>);
      t.add("chunk_recurrence_segment_bwd", variant, type, chunk_segment_bwd_kernel<T, V::W, false>);
    });
    t.add("chunk_segment_join", chunk_segment_join_kernel);
    return t;
  }();
  return table.list();
}

}  // namespace rat::cuda
