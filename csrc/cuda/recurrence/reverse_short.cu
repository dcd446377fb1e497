// The backward scans of rat_attention where chunks are short: at most kTokens tokens, elements of two bytes, aligned rows.
// recurrence/backward.cu has the other cases. The forward saved none of k~, v~: the reverse scan makes them again.
//
//   chunk_prepare_short_bwd_kernel   do, d(out_gate), Delta: elementwise and a sum over each row
//   chunk_scan_short_bwd_kernel      p_tt, ds_tt and the reverse scan: dk, dv, dgate, dq, partial sums of dgate_bias
//
// Prepare reads dy, y, out_gate and writes do, dout_gate: 5 H D elements a token (without out_gate it reads 2 H D).
//
// The reverse scan takes a block for a run of tiles, of kTokens tokens (whole chunks) each, and the heads of one group. A thread
// owns two neighbouring elements of D and takes the heads one after the other:
//
//   0. once a tile: ask for q, k and attention's part of dq, into shared memory, each thread its own elements
//   1. scan forward; k~ and v~ before each token stay in registers, in T; the dot products q.k~ and do.v~ of a token are
//      summed over a warp by shuffles, four tokens at a time
//   2. barrier: the parts of all warps are there. Each warp adds them up and makes p_tt and ds_tt, a lane a token
//   3. walk back: gradients of k~ and v~, then dv and dgate, which are stored, and what the head adds to dq and dk, in shared
//      memory. v, gate and do of a token, once used, make room for those of the next head: the loads have the rest of the walk
//      and the next head's beginning to arrive
//   4. after the last head: store dq and dk
//
// So nothing is read twice, threads wait for each other only at 2 and between tiles, and each has up to 48 loads in flight. All
// loops over tokens are unrolled, since registers cannot be indexed: 168 of them, 12 warps an SM. About 140 SASS instructions a
// token and warp (64 elements). It reads v, gate, do and writes dv, dgate: 5 H D elements a token, and small change.
#include <algorithm>
#include <type_traits>

#include "../ptx/cp_async.cuh"
#include "scan_launch.h"

namespace rat::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTokens = static_cast<int>(kShortChunk);
static_assert(kTokens == 16, "a half-warp has a lane for each token");
constexpr int kWarps = 12;  // of the reverse scan on an SM, by registers and by shared memory

// ---- prepare ----------------------------------------------------------------------------------------------------------

struct PrepareShort {
  Sizes size;
  Rows dy, y, out_gate;  // out_gate null: do is dy
  Rows dout, dout_gate;  // outputs, with out_gate
  float* delta;          // (B, H, T)
  int64_t row_tiles;     // ceil(T / kTokens)
  int64_t head_batches;  // ceil(H / heads of a warp)
};

// A warp takes kTokens tokens and 32 / W heads.
template <class T, int W>
__global__ void __launch_bounds__(kThreads, 5) chunk_prepare_short_bwd_kernel(const __grid_constant__ PrepareShort p) {
  const Sizes& s = p.size;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int64_t tile = warp / p.head_batches, batch = warp % p.head_batches;
  if (tile >= s.batch * p.row_tiles) return;
  const Lane lane = lane_of<W>(batch * (32 / W) + threadIdx.x % 32 / W, s.heads, s.head_dim);
  const int64_t row = tile / p.row_tiles, token = tile % p.row_tiles * kTokens, h = lane.head;
  const int count = static_cast<int>(min(s.tokens - token, static_cast<int64_t>(kTokens)));
  const bool out_gated = p.out_gate.ptr != nullptr;
  const T* dy_row = row_of<T>(p.dy, row, token, h, lane.d);
  const T* y_row = row_of<T>(p.y, row, token, h, lane.d);
  const T* out_gate_row = out_gated ? row_of<T>(p.out_gate, row, token, h, lane.d) : nullptr;
  T* dout_row = out_gated ? out_row_of<T>(p.dout, row, token, h, lane.d) : nullptr;
  T* dout_gate_row = out_gated ? out_row_of<T>(p.dout_gate, row, token, h, lane.d) : nullptr;
  float* const delta = p.delta + (row * s.heads + h) * s.tokens + token;

  // N tokens from token i on: all rows are requested, then used one after the other.
  const auto walk = [&](int i, auto tokens) {
    constexpr int N = decltype(tokens)::value;
    Raw8<T> dy_raw[N], y_raw[N], out_gate_raw[N];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      dy_raw[u] = load_raw<true>(take(dy_row, p.dy.token));
      y_raw[u] = load_raw<true>(take(y_row, p.y.token));
      if (out_gated) out_gate_raw[u] = load_raw<true>(take(out_gate_row, p.out_gate.token));
    }
    float sum[N];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      float dout[8], x[8];
      unpack(dy_raw[u], dout);
      unpack(y_raw[u], x);
      sum[u] = lane.live ? dot(dout, x) : 0.0f;
      if (out_gated) {
        float z[8];
        unpack(out_gate_raw[u], z);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float open, shut;
          gates<T>(kLogitUnit<T> * z[j], open, shut);
          x[j] *= dout[j] * shut;
          dout[j] *= open;
        }
        if (lane.live) {
          store_row<true>(dout_gate_row, x);
          store_row<true>(dout_row, dout);
        }
        dout_gate_row += p.dout_gate.token;
        dout_row += p.dout.token;
      }
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

// ---- the reverse scan -------------------------------------------------------------------------------------------------

// Rows that a thread walks: pointer to its elements and steps in bytes.
struct Walk {
  char* ptr;
  int64_t batch, token, head;
};

struct ScanShort {
  ScanInput in;           // q, k; v and gate are below
  Walk v, gate, dout;     // (B, T, H, D)
  Walk dv, dgate;         // outputs; dv may be do's memory
  Rows dq, dk;            // outputs, (B, T, G, D)
  const float* dq_sum;    // (B, T, G, D): attention's part
  const float* lse;       // (B, H, T)
  const float* delta;     // (B, H, T)
  ChunkStates chunks;     // layout of the four chunk gradients
  const float* dchunk_k;  // from attention, float
  const float* dchunk_v;
  const void* incoming_k;  // of the returned chunk states, T, or null
  const void* incoming_v;
  const float* drunning_k;  // (N, H, D) or null
  const float* drunning_v;
  float* dinitial_k;  // (N, H, D) or null
  float* dinitial_v;
  float* bias_partial;  // (tile blocks, H, D) or null
  int group_heads;      // H / G
  int64_t tiles_per_block;
};

// Shared memory of a block: what a warp has to itself, for each warp, and then (2, warps, 32) dot products, by parity of the
// head.
struct WarpShared {
  float4 sums[kTokens][32];  // two elements of dq, two of dk
  uint2 rows[kTokens][32];   // q and k
  float2 self[kTokens];      // p_tt, scale * ds_tt
};
constexpr size_t shared_bytes(int warps) { return warps * (sizeof(WarpShared) + 2 * 32 * sizeof(float)); }

template <class T>
__device__ __forceinline__ void unpack2(uint32_t raw, float (&x)[2]);
template <>
__device__ __forceinline__ void unpack2<bf16>(uint32_t raw, float (&x)[2]) {
  x[0] = __uint_as_float(raw << 16);
  x[1] = __uint_as_float(raw & 0xffff0000u);
}
template <>
__device__ __forceinline__ void unpack2<f16>(uint32_t raw, float (&x)[2]) {
  x[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(raw)));
  x[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(raw >> 16)));
}
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ __forceinline__ uint32_t pack2<f16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <class T>
constexpr uint32_t kInfinities = std::is_same_v<T, bf16> ? 0x7f807f80u : 0x7c007c00u;

// Global addresses as integers that move by steps. Opaque: else all tokens' multiples of all steps would be kept over the loop
// over heads, in registers that are not there.
__device__ __forceinline__ void move(uint64_t& at, int64_t bytes) {
  at += bytes;
  asm volatile("" : "+l"(at));
}
// Two elements, or what `raw` had where there is nothing to load. Volatile keeps the order of loads and stores: rows written may
// be those that were read.
__device__ __forceinline__ void load_pair(uint32_t& raw, uint64_t at, bool valid) {
  asm volatile("{\n.reg .pred valid;\nsetp.ne.s32 valid, %2, 0;\n@valid ld.global.u32 %0, [%1];\n}\n"
               : "+r"(raw)
               : "l"(at), "r"(static_cast<int>(valid)));
}
__device__ __forceinline__ void store_pair(uint64_t at, uint32_t raw, bool valid) {
  asm volatile("{\n.reg .pred valid;\nsetp.ne.s32 valid, %2, 0;\n@valid st.global.u32 [%0], %1;\n}\n" ::"l"(at),
               "r"(raw), "r"(static_cast<int>(valid)));
}

// Gradient of a chunk state, two elements of it, before it is rotated back.
struct ChunkGrad {
  float2 v, k, pair;  // pair: the elements that rotation mixes with k
  float2 cosine, sine;
};

template <class T>
__device__ __forceinline__ float2 chunk_grad_at(const float* attention, const void* incoming, int64_t at) {
  float2 x = *reinterpret_cast<const float2*>(attention + at);
  if (incoming) {
    const T* from = static_cast<const T*>(incoming) + at;  // the caller's memory: alignment of T is all that is known
    x.x += to_float(from[0]);
    x.y += to_float(from[1]);
  }
  return x;
}

template <class T>
__device__ __forceinline__ ChunkGrad load_chunk_grad(const ScanShort& p, int64_t state, int chunk, int d) {
  const int half = static_cast<int>(p.in.size.head_dim) / 2, i = d < half ? d : d - half;
  ChunkGrad c;
  c.v = chunk_grad_at<T>(p.dchunk_v, p.incoming_v, state + d);
  c.k = chunk_grad_at<T>(p.dchunk_k, p.incoming_k, state + d);
  c.pair = c.sine = make_float2(0.0f, 0.0f);
  c.cosine = make_float2(1.0f, 1.0f);
  if (p.in.rotary.cos) {
    c.pair = chunk_grad_at<T>(p.dchunk_k, p.incoming_k, state + (d < half ? d + half : i));
    const float* cosine = static_cast<const float*>(p.in.rotary.cos) + int64_t{chunk} * half + i;
    const float* sine = static_cast<const float*>(p.in.rotary.sin) + int64_t{chunk} * half + i;
    c.cosine = make_float2(cosine[0], cosine[1]);
    c.sine = d < half ? make_float2(sine[0], sine[1]) : make_float2(-sine[0], -sine[1]);
  }
  return c;
}

__device__ __forceinline__ void add_chunk_grad(const ChunkGrad& c, float (&gk)[2], float (&gv)[2]) {
  gv[0] += c.v.x;
  gv[1] += c.v.y;
  gk[0] += fmaf(c.k.x, c.cosine.x, c.pair.x * c.sine.x);
  gk[1] += fmaf(c.k.y, c.cosine.y, c.pair.y * c.sine.y);
}

// Before compute capability 9.0 the masked form needs one register more than kWarps warps leave it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kRoomy = true;
#else
constexpr bool kRoomy = false;
#endif

// kWhole: every tile is one chunk of kTokens tokens, all lanes have elements, and no state enters: nothing is masked. The bound
// limits registers, so that kWarps warps fit: with 144 or 128 of them spills cost more than the added warps bring.
template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, kRoomy && !kWhole ? 2 : kWarps / (kThreads / 32))
    chunk_scan_short_bwd_kernel(const __grid_constant__ ScanShort p) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const Sizes& s = p.in.size;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  WarpShared& shared = reinterpret_cast<WarpShared*>(shared_memory)[warp];
  float* const dots = reinterpret_cast<float*>(shared_memory + warps * sizeof(WarpShared));

  const unsigned groups = static_cast<unsigned>(s.q_groups), tile_block = blockIdx.x / groups;
  const auto group_again = [&]() -> int64_t {  // made anew where it is needed: kept, it costs a spill
    unsigned divisor = groups;
    asm volatile("" : "+r"(divisor));
    return blockIdx.x % divisor;
  };
  const int d = kWhole || 2 * tid < s.head_dim ? 2 * tid : 0;
  const bool live = kWhole || 2 * tid < s.head_dim;
  const int first_head = static_cast<int>(blockIdx.x % groups) * p.group_heads;
  const auto bias_partial = [&](int h) {
    return reinterpret_cast<float2*>(p.bias_partial + (static_cast<int64_t>(tile_block) * s.heads + h) * s.head_dim +
                                     d);
  };
  bool first_tile = true;
  constexpr int last = kTokens - 1;

  int64_t item = static_cast<int64_t>(tile_block) * p.tiles_per_block;
#pragma unroll 1
  for (int left = static_cast<int>(min(p.tiles_per_block, p.in.items - item)); left > 0; --left, ++item) {
    const Tile tile = tile_of(s, item, p.in.tile);
    const int count = tile.count;
    if (count == 0) continue;      // the same for the whole block
    const auto tile_again = [&] {  // made anew where it is rarely needed: kept, it costs registers
      int64_t same = item;
      asm volatile("" : "+l"(same));
      return tile_of(s, same, p.in.tile);
    };
    const int64_t row = tile.sequence.batch, token = tile.token;
    const int own_count = live ? count : 0;
    const auto valid = [&](int t) { return kWhole || t < own_count; };

    // 0. Rows of the group.
    {
      const int64_t group = group_again(), sums_row = s.q_groups * s.head_dim;
      const T* q_at = row_of<T>(p.in.q, row, token, group, d);
      const T* k_at = row_of<T>(p.in.k, row, token, group, d);
      const float* dq_at = p.dq_sum + (row * s.tokens + token) * sums_row + group * s.head_dim + d;
#pragma unroll 4
      for (int t = 0; t < kTokens; ++t) {
        cp_async4(shared_address(&shared.rows[t][lane].x), q_at, valid(t));
        cp_async4(shared_address(&shared.rows[t][lane].y), k_at, valid(t));
        cp_async8(shared_address(&shared.sums[t][lane]), dq_at, valid(t));
        reinterpret_cast<float2*>(&shared.sums[t][lane])[1] = make_float2(0.0f, 0.0f);
        if (kWhole || t + 1 < count) {  // addresses of rows that do not exist are not even formed
          q_at += p.in.q.token;
          k_at += p.in.k.token;
          dq_at += sums_row;
        }
      }
      cp_async_commit();
    }

    // Which tokens open and close a chunk, a bit each, and the chunk of the first.
    uint32_t edges = 0;                                                      // opens, closes << 16
    const int first_chunk = static_cast<int>(tile.position / s.chunk_size);  // positions fit in 31 bits
    if constexpr (!kWhole) {
      const int length = static_cast<int>(s.chunk_size);
      int offset = static_cast<int>(tile.position) - first_chunk * length;
      for (int t = 0; t < count; ++t) {
        edges |= (offset == 0) << t | static_cast<uint32_t>(offset == length - 1) << (16 + t);
        offset = offset == length - 1 ? 0 : offset + 1;
      }
    }
    int64_t state_at = chunk_offset(s, p.chunks, tile.sequence.index, first_head) + first_chunk * s.head_dim;

    // The inputs are asked for at the first token, and again where they were used; the outputs are stored from the last on.
    const auto start = [&](const Walk& w, int t) {
      const char* at = w.ptr + row * w.batch + (token + t) * w.token + first_head * w.head + d * int{sizeof(T)};
      return static_cast<uint64_t>(__cvta_generic_to_global(at));
    };
    uint64_t v_at = start(p.v, 0), gate_at = start(p.gate, 0), dout_at = start(p.dout, 0);
    uint64_t dv_at = start(p.dv, last), dgate_at = start(p.dgate, last);
    int64_t scalar_at = (row * s.heads + first_head) * s.tokens + token + lane % 16;
    // In its first chunk a token attends to itself alone: its weight is 1 and its score has no gradient, whatever Delta lost
    // when y was rounded.
    enum : int { kNone, kAlone, kAttends };
    const int self_kind = lane % 16 >= count ? kNone : tile.position + lane % 16 < s.chunk_size ? kAlone : kAttends;
    const auto load_scalar = [&]() {
      return kWhole || self_kind != kNone ? (lane < 16 ? p.lse : p.delta)[scalar_at] : 0.0f;
    };

    uint32_t v_raw[kTokens], gate_raw[kTokens], dout_raw[kTokens];
    const auto request = [&](int t, bool in) {
      load_pair(v_raw[t], v_at, in);
      load_pair(gate_raw[t], gate_at, in);
      load_pair(dout_raw[t], dout_at, in);
    };
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      // A token that does not exist has f = 1, and all else zero: states and gradients pass it unchanged.
      gate_raw[t] = kInfinities<T>;
      v_raw[t] = dout_raw[t] = 0;
      request(t, valid(t));
      if (t < last) {
        move(v_at, p.v.token);
        move(gate_at, p.gate.token);
        move(dout_at, p.dout.token);
      }
    }
    float scalar = load_scalar();
    cp_async_wait<0>();

#pragma unroll 1
    for (int h = first_head; h < first_head + p.group_heads; ++h) {
      const auto of_sequence = [&](const Tile& tile) { return (tile.sequence.index * s.heads + h) * s.head_dim + d; };
      const bool more = h + 1 < first_head + p.group_heads;
      float bias[2] = {0.0f, 0.0f}, dbias[2] = {0.0f, 0.0f};
      if (p.in.gate_bias) {
        const float* at = p.in.gate_bias + static_cast<int64_t>(h) * s.head_dim + d;
        bias[0] = kLogitUnit<T> * at[0];
        bias[1] = kLogitUnit<T> * at[1];
        // A token that does not exist has a gate of +inf, which a bias of -inf would make NaN. Every gate is shut long before.
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (bias[j] > 1e30f) bias[j] = 1e30f;
        }
      }
      const auto gates_at = [&](int t, float (&f)[2], float (&g)[2]) {
        float x[2];
        unpack2<T>(gate_raw[t], x);
#pragma unroll
        for (int j = 0; j < 2; ++j) gates<T>(fmaf(x[j], kLogitUnit<T>, bias[j]), f[j], g[j]);
      };

      // 1. Forward.
      float k_state[2] = {0.0f, 0.0f}, v_state[2] = {0.0f, 0.0f};
      if (!kWhole && p.in.initial_k) {
        if (const Tile again = tile_again(); again.first) {
          const int64_t at = of_sequence(again);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            k_state[j] = p.in.initial_k[at + j];
            v_state[j] = p.in.initial_v[at + j];
          }
        }
      }
      uint32_t k_before[kTokens], v_before[kTokens];
      float part[8];  // of q.k~ of four tokens and of do.v~
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (kWhole ? t == 0 : edges >> t & 1) k_state[0] = k_state[1] = v_state[0] = v_state[1] = 0.0f;
        k_before[t] = pack2<T>(k_state[0], k_state[1]);
        v_before[t] = pack2<T>(v_state[0], v_state[1]);
        const uint2 raw = shared.rows[t][lane];
        float f[2], g[2], q[2], k[2], v[2], dout[2];
        gates_at(t, f, g);
        unpack2<T>(raw.x, q);
        unpack2<T>(raw.y, k);
        unpack2<T>(v_raw[t], v);
        unpack2<T>(dout_raw[t], dout);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          k_state[j] = fmaf(f[j], k_state[j], g[j] * k[j]);
          v_state[j] = fmaf(f[j], v_state[j], g[j] * v[j]);
        }
        part[t % 4] = fmaf(q[1], k_state[1], q[0] * k_state[0]);
        part[4 + t % 4] = fmaf(dout[1], v_state[1], dout[0] * v_state[0]);
        if (t % 4 < 3) continue;
        // Each step halves the sums that a lane has: it gives away half and takes what the other lane has of its own half.
#pragma unroll
        for (int step = 4; step > 0; step /= 2) {
          const bool upper = lane & 4 * step;
#pragma unroll
          for (int i = 0; i < step; ++i) {
            const float give = upper ? part[i] : part[i + step], own = upper ? part[i + step] : part[i];
            part[i] = own + __shfl_xor_sync(kFullWarp, give, 4 * step);
          }
        }
        part[0] += __shfl_xor_sync(kFullWarp, part[0], 2);
        part[0] += __shfl_xor_sync(kFullWarp, part[0], 1);
        if (lane % 4 == 0) dots[(h % 2 * warps + warp) * 32 + lane / 16 * 16 + t / 4 * 4 + lane / 4 % 4] = part[0];
      }

      float k_carry[2] = {0.0f, 0.0f}, v_carry[2] = {0.0f, 0.0f};  // f_{t+1} a_{t+1} and f_{t+1} b_{t+1}
      if (p.drunning_k || p.drunning_v) {
        if (const Tile again = tile_again(); again.last) {
          const int64_t at = of_sequence(again);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            if (p.drunning_k) k_carry[j] = p.drunning_k[at + j];
            if (p.drunning_v) v_carry[j] = p.drunning_v[at + j];
          }
        }
      }
      ChunkGrad chunk_grad;
      if constexpr (kWhole) chunk_grad = load_chunk_grad<T>(p, state_at, first_chunk, d);

      // 2. The dots of all warps are there. The next head's go to the other half: who is two heads ahead has passed the barrier
      // of the head between, before which all have read these.
      __syncthreads();
      {
        float dot = 0.0f;
        for (int w = 0; w < warps; ++w) dot += dots[(h % 2 * warps + w) * 32 + lane];
        const float dp = __shfl_xor_sync(kFullWarp, dot, 16), delta = __shfl_xor_sync(kFullWarp, scalar, 16);
        if (lane < kTokens) {
          float2 self = make_float2(self_kind == kAlone ? 1.0f : 0.0f, 0.0f);
          if (self_kind == kAttends) {
            self.x = expf(fmaf(p.in.scale, dot, -scalar));
            self.y = p.in.scale * self.x * (dp - delta);
          }
          shared.self[lane] = self;
        }
        __syncwarp();
        scalar_at += s.tokens;
        if (more) scalar = load_scalar();
      }

      if constexpr (kWhole) add_chunk_grad(chunk_grad, k_carry, v_carry);

      // 3. Back. The compiler is kept from keeping gates and unpacked rows of the forward walk: there are no registers for them.
#pragma unroll
      for (int t = 0; t < kTokens; ++t) asm volatile("" : "+r"(v_raw[t]), "+r"(gate_raw[t]), "+r"(dout_raw[t]));
      if (more) {
        v_at += p.v.head;
        gate_at += p.gate.head;
        dout_at += p.dout.head;
      }
      uint2 raw = shared.rows[last][lane];
      float2 own = shared.self[last];
#pragma unroll
      for (int t = last; t >= 0; --t) {
        float f[2], g[2], q[2], k[2], v[2], dout[2], k_past[2], v_past[2], dk[2], dv[2], dgate[2];
        float4 sum = shared.sums[t][lane];
        unpack2<T>(raw.x, q);
        unpack2<T>(raw.y, k);
        unpack2<T>(v_raw[t], v);
        unpack2<T>(dout_raw[t], dout);
        unpack2<T>(k_before[t], k_past);
        unpack2<T>(v_before[t], v_past);
        gates_at(t, f, g);
        const float probability = own.x, ds = own.y;
        if (t > 0) {
          raw = shared.rows[t - 1][lane];
          own = shared.self[t - 1];
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          v_carry[j] = fmaf(probability, dout[j], v_carry[j]);
          k_carry[j] = fmaf(ds, q[j], k_carry[j]);
        }
        if (!kWhole && (edges >> (16 + t) & 1)) {
          const int before = __popc(edges >> 16 & ((1u << t) - 1));
          add_chunk_grad(
              load_chunk_grad<T>(p, state_at + before * static_cast<int>(s.head_dim), first_chunk + before, d), k_carry,
              v_carry);
        }
        // They are a_t and b_t now.
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          dk[j] = g[j] * k_carry[j];
          dv[j] = g[j] * v_carry[j];
          dgate[j] = f[j] * fmaf(dv[j], v_past[j] - v[j], dk[j] * (k_past[j] - k[j]));
          dbias[j] += dgate[j];
          k_carry[j] *= f[j];
          v_carry[j] *= f[j];
        }
        sum.x = fmaf(ds, fmaf(f[0], k_past[0], g[0] * k[0]), sum.x);
        sum.y = fmaf(ds, fmaf(f[1], k_past[1], g[1] * k[1]), sum.y);
        sum.z += dk[0];
        sum.w += dk[1];
        shared.sums[t][lane] = sum;
        if (!kWhole && (edges >> t & 1)) k_carry[0] = k_carry[1] = v_carry[0] = v_carry[1] = 0.0f;
        store_pair(dv_at, pack2<T>(dv[0], dv[1]), valid(t));
        store_pair(dgate_at, pack2<T>(dgate[0], dgate[1]), valid(t));
        request(t, more && valid(t));
        if (t > 0) {
          move(v_at, -p.v.token);
          move(gate_at, -p.gate.token);
          move(dout_at, -p.dout.token);
          move(dv_at, -p.dv.token);
          move(dgate_at, -p.dgate.token);
        }
      }
      v_at += last * p.v.token;
      gate_at += last * p.gate.token;
      dout_at += last * p.dout.token;
      dv_at += last * p.dv.token + p.dv.head;
      dgate_at += last * p.dgate.token + p.dgate.head;
      state_at += p.chunks.head;

      if (!kWhole && p.dinitial_k) {
        if (const Tile again = tile_again(); again.first && live) {
          const int64_t at = of_sequence(again);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            p.dinitial_k[at + j] = k_carry[j];
            p.dinitial_v[at + j] = v_carry[j];
          }
        }
      }
      if (p.bias_partial && live) {  // summed over the tiles of the block
        float2* const at = bias_partial(h);
        float2 sum = first_tile ? make_float2(0.0f, 0.0f) : *at;
        sum.x += dbias[0];
        sum.y += dbias[1];
        *at = sum;
      }
    }
    first_tile = false;

    // 4. The sums over the heads.
    const Tile again = tile_again();
    const int64_t group_of_sums = group_again();
    T* dq_at = out_row_of<T>(p.dq, again.sequence.batch, again.token, group_of_sums, d);
    T* dk_at = out_row_of<T>(p.dk, again.sequence.batch, again.token, group_of_sums, d);
#pragma unroll 4
    for (int t = 0; t < kTokens; ++t) {
      if (!valid(t)) break;
      const float4 sum = shared.sums[t][lane];
      *reinterpret_cast<uint32_t*>(take(dq_at, p.dq.token)) = pack2<T>(sum.x, sum.y);
      *reinterpret_cast<uint32_t*>(take(dk_at, p.dk.token)) = pack2<T>(sum.z, sum.w);
    }
    __syncthreads();  // all have read the last head's dots: the next tile's may take their place
  }
  if (p.bias_partial && live && first_tile) {  // a block without tokens
    for (int h = first_head; h < first_head + p.group_heads; ++h) *bias_partial(h) = make_float2(0.0f, 0.0f);
  }
}

// ---- launches ---------------------------------------------------------------------------------------------------------

template <class F>
void with_type(const Sizes& s, F&& f) {
  s.dtype == DType::bf16 ? f(bf16()) : f(f16());
}

struct Deal {
  int64_t tile, items, tiles_per_block, tile_blocks;
};

// A block for each tile is fastest; but with a bias each leaves partial sums, so about 8,192 blocks where there is so much work.
Deal deal(const Sizes& s, bool bias) {
  Deal d;
  d.tile = tile_size(s, true, kShortChunk, kTokens);
  d.items = work_items(s, d.tile);
  d.tiles_per_block = bias ? std::min<int64_t>(64, std::max<int64_t>(1, d.items * s.q_groups / 8192)) : 1;
  d.tile_blocks = ceil_div(d.items, d.tiles_per_block);
  return d;
}

Walk walk(const Rows& r) { return {static_cast<char*>(r.ptr), r.batch * 2, r.token * 2, r.head * 2}; }

void launch_prepare(const AttentionBwdParams& a, const BwdScratch& scratch, cudaStream_t stream) {
  const Sizes& s = a.fwd.size;
  PrepareShort p{};
  p.size = s;
  p.dy = a.dy;
  p.y = a.fwd.y;
  p.out_gate = a.fwd.out_gate;
  p.dout = scratch.dout;
  p.dout_gate = a.dout_gate;
  p.delta = scratch.delta;
  p.row_tiles = ceil_div(s.tokens, kTokens);
  with_variant(s, "rat_attention_backward", [&](auto variant) {
    using V = decltype(variant);
    if constexpr (V::kVector && sizeof(typename V::T) == 2) {
      p.head_batches = ceil_div(s.heads, 32 / V::W);
      const int64_t blocks = ceil_div(s.batch * p.row_tiles * p.head_batches, kThreads / 32);
      if (blocks == 0) return;
      chunk_prepare_short_bwd_kernel<typename V::T, V::W>
          <<<grid_x(blocks, "chunk_prepare_short_bwd"), kThreads, 0, stream>>>(p);
      check_launch("chunk_prepare_short_bwd");
    }
  });
}

void launch_scan(const AttentionBwdParams& a, const BwdScratch& scratch, const Deal& d, float* bias_partial,
                 cudaStream_t stream) {
  const Sizes& s = a.fwd.size;
  ScanShort p{};
  p.in = scan_input(a.fwd);
  p.in.tile = d.tile;
  p.in.items = d.items;
  p.v = walk(a.fwd.v);
  p.gate = walk(a.fwd.gate);
  p.dout = walk(scratch.dout);
  p.dv = walk(a.dv);
  p.dgate = walk(a.dgate);
  p.dq = a.dq;
  p.dk = a.dk;
  p.dq_sum = scratch.dq;
  p.lse = static_cast<const float*>(a.fwd.lse);
  p.delta = scratch.delta;
  p.chunks = a.fwd.chunks;
  p.dchunk_k = scratch.dchunk_k;
  p.dchunk_v = scratch.dchunk_v;
  p.incoming_k = a.dchunk_k;
  p.incoming_v = a.dchunk_v;
  p.drunning_k = static_cast<const float*>(a.drunning_k);
  p.drunning_v = static_cast<const float*>(a.drunning_v);
  p.dinitial_k = static_cast<float*>(a.dinitial.running_k);
  p.dinitial_v = static_cast<float*>(a.dinitial.running_v);
  p.group_heads = static_cast<int>(s.heads / s.q_groups);
  p.tiles_per_block = d.tiles_per_block;
  p.bias_partial = bias_partial;

  const int64_t blocks = d.tile_blocks * s.q_groups;
  if (blocks > 0) {
    const int threads = static_cast<int>(round_up(s.head_dim / 2, 32));
    const bool whole = !s.cu_seqlens && !s.lengths && s.chunk_size == kTokens && s.tokens % kTokens == 0 &&
                       s.head_dim % 64 == 0 && !p.dinitial_k;
    with_type(s, [&](auto type) {
      using T = decltype(type);
      const auto kernel = whole ? chunk_scan_short_bwd_kernel<T, true> : chunk_scan_short_bwd_kernel<T, false>;
      const size_t shared = shared_bytes(threads / 32);
      if (shared > 48 * 1024) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
              "chunk_scan_short_bwd shared memory");
      }
      kernel<<<grid_x(blocks, "chunk_scan_short_bwd"), threads, shared, stream>>>(p);
      check_launch("chunk_scan_short_bwd");
    });
  }
  if (a.dgate_bias) {
    reduce_gate_bias(p.bias_partial, d.tile_blocks, s.heads * s.head_dim, static_cast<float*>(a.dgate_bias), stream);
  }
}

}  // namespace

bool short_chunks(const AttentionFwdParams& a) {
  const Sizes& s = a.size;
  return a.gate.ptr && s.chunk_size <= kShortChunk && s.k_groups == s.q_groups && s.aligned16 &&
         (s.dtype == DType::bf16 || s.dtype == DType::f16);
}

Launch chunk_prepare_short_bwd(const AttentionBwdParams& a, const BwdScratch& scratch, Arena&) {
  return [&a, scratch](cudaStream_t stream) { launch_prepare(a, scratch, stream); };
}

Launch chunk_scan_short_bwd(const AttentionBwdParams& a, const BwdScratch& scratch, Arena& arena) {
  const Sizes& s = a.fwd.size;
  const Deal d = deal(s, a.dgate_bias != nullptr);
  Piece<float> bias_partial;  // (tile_blocks, H, D)
  if (a.dgate_bias) bias_partial = arena.take<float>(d.tile_blocks * s.heads * s.head_dim);
  return [&a, scratch, d, bias_partial](cudaStream_t stream) { launch_scan(a, scratch, d, bias_partial, stream); };
}

KernelList chunk_short_bwd_kernels() {
  static const KernelTable table = [] {
    KernelTable t;
    const auto address = [](auto* kernel) { return reinterpret_cast<const void*>(kernel); };
    const auto add = [&](auto type, const std::string& name) {
      using T = decltype(type);
      t.add("chunk_prepare_short_bwd<" + name + ", 8>", address(chunk_prepare_short_bwd_kernel<T, 8>));
      t.add("chunk_prepare_short_bwd<" + name + ", 16>", address(chunk_prepare_short_bwd_kernel<T, 16>));
      t.add("chunk_prepare_short_bwd<" + name + ", 32>", address(chunk_prepare_short_bwd_kernel<T, 32>));
      t.add("chunk_scan_short_bwd<" + name + ", whole>", address(chunk_scan_short_bwd_kernel<T, true>));
      t.add("chunk_scan_short_bwd<" + name + ">", address(chunk_scan_short_bwd_kernel<T, false>));
    };
    add(bf16(), "bf16");
    add(f16(), "f16");
    return t;
  }();
  return table.list();
}

}  // namespace rat::cuda
