// Backward phase 3, the short family: the reverse scan where chunks are at most kTokens tokens, of elements of two bytes. reverse.cu
// has the other cases. The forward saved none of k~, v~: the kernel makes them again, and p_tt, ds_tt from them.
//
//   chunk_scan_short_bwd_kernel   dk, dv, dgate, dq, partial sums of dgate_bias
//
// A block takes a run of tiles, of kTokens tokens (whole chunks) each, and the heads of one group. A thread owns two neighbouring
// elements of D and takes the heads one after the other:
//
//   0. request_group, once per tile: q, k and attention's part of dq, into shared memory, each thread its own elements
//   1. scan_forward: k~ and v~ before each token stay in registers, in T; the dot products q.k~ and dO.v~ of a token are
//      summed over a warp by shuffles, four tokens at a time
//   2. barrier: the parts of all warps are there. own_weights: each warp adds them up and makes p_tt and ds_tt, one lane per token
//   3. walk_back: gradients of k~ and v~, then dv and dgate, which are stored, and what the head adds to dq and dk, in shared
//      memory. v, gate and dO of a token, once used, make room for those of the next head: the loads have the rest of the walk
//      and the next head's beginning to arrive
//   4. store_group, after the last head: dq and dk
//
// So nothing is read twice, threads wait for each other only at 2 and between tiles, and each has up to 48 loads in flight. All
// loops over tokens are unrolled, since registers cannot be indexed: 168 of them, 12 warps per SM. About 140 SASS instructions per
// token and warp (64 elements). It reads v, gate, dO and writes dv, dgate: 10 H D bytes per token, and small change.
#include <algorithm>
#include <cfloat>
#include <type_traits>

#include "../ptx/cp_async.cuh"
#include "../ptx/memory.cuh"
#include "../ptx/opaque.cuh"
#include "families.h"
#include "scan_launch.h"

namespace rat::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTokens = static_cast<int>(short_scan::kShortChunk);
static_assert(kTokens == 16, "a half-warp has a lane for each token");
constexpr int kWarps = 12;  // on an SM, by registers and by shared memory
constexpr int kLast = kTokens - 1;

// Rows that a thread walks: pointer to its elements and steps in bytes.
struct Walk {
  char* ptr;
  int64_t batch, token, head;
};

struct ScanShort {
  ScanInput in;         // q, k; v and gate are below
  Walk v, gate, dout;   // (B, T, H, D)
  Walk dv, dgate;       // outputs; dv may be dO's memory
  Rows dq, dk;          // outputs, (B, T, G, D)
  const float* dq_sum;  // (B, T, G, D): attention's part
  const float* lse;     // (B, H, T)
  const float* delta;   // (B, H, T)
  ChunkGrads chunk;
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
constexpr uint32_t kInfinities = std::is_same_v<T, bf16> ? 0x7f807f80u : 0x7c007c00u;

template <class T>
__device__ __forceinline__ void unpack_pair(uint32_t raw, float (&x)[2]) {
  const float2 pair = unpack2<T>(raw);
  x[0] = pair.x;
  x[1] = pair.y;
}

// Two gates, with a bias in units of the gates.
template <class T>
__device__ __forceinline__ void gates2(uint32_t raw, const float (&bias)[2], float (&f)[2], float (&g)[2]) {
  float x[2];
  unpack_pair<T>(raw, x);
#pragma unroll
  for (int j = 0; j < 2; ++j) gates<T>(fmaf(x[j], kLogitUnit<T>, bias[j]), f[j], g[j]);
}

// Global addresses as integers that move by steps. Opaque: else all tokens' multiples of all steps would be kept over the loop
// over heads, in registers that are not there.
__device__ __forceinline__ void move(uint64_t& at, int64_t bytes) { at = opaque(at + bytes); }

// ---- gradients of chunk states ----------------------------------------------------------------------------------------

// Gradient of a chunk state, two elements of it, before it is rotated back.
struct ChunkGrad {
  float2 v, k, pair;  // pair: the elements that rotation mixes with k
  float2 cosine, sine;
};

template <class T>
__device__ __forceinline__ float2 chunk_grad_at(const float* attention, const void* returned, int64_t at) {
  float2 x = *reinterpret_cast<const float2*>(attention + at);
  if (returned) {
    const T* from = static_cast<const T*>(returned) + at;
    x.x += to_float(from[0]);
    x.y += to_float(from[1]);
  }
  return x;
}

template <class T>
__device__ __forceinline__ ChunkGrad load_chunk_grad(const ScanShort& p, int64_t state, int angle, int d) {
  const int half = static_cast<int>(p.in.size.head_dim) / 2, i = d < half ? d : d - half;
  ChunkGrad c;
  c.v = chunk_grad_at<T>(p.chunk.attention_v, p.chunk.returned_v, state + d);
  c.k = chunk_grad_at<T>(p.chunk.attention_k, p.chunk.returned_k, state + d);
  c.pair = c.sine = make_float2(0.0f, 0.0f);
  c.cosine = make_float2(1.0f, 1.0f);
  if (p.in.rotary.cos) {
    c.pair = chunk_grad_at<T>(p.chunk.attention_k, p.chunk.returned_k, state + (d < half ? d + half : i));
    const float* cosine = static_cast<const float*>(p.in.rotary.cos) + int64_t{angle} * half + i;
    const float* sine = static_cast<const float*>(p.in.rotary.sin) + int64_t{angle} * half + i;
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

// ---- steps ------------------------------------------------------------------------------------------------------------

// What a thread knows of its block and of its elements. kWhole: see the kernel.
template <bool kWhole>
struct Place {
  int lane, warp, warps;
  int d;      // first of its two elements, 0 where it has none
  bool live;  // has elements
  WarpShared* shared;
  float* dots;

  __device__ __forceinline__ Place(const Sizes& s, unsigned char* memory) {
    const int tid = static_cast<int>(threadIdx.x);
    lane = tid % 32;
    warp = tid / 32;
    warps = static_cast<int>(blockDim.x) / 32;
    live = kWhole || 2 * tid < s.head_dim;
    d = live ? 2 * tid : 0;
    shared = reinterpret_cast<WarpShared*>(memory) + warp;
    dots = reinterpret_cast<float*>(memory + warps * sizeof(WarpShared));
  }
  // Dots of a warp for a head: (2, kTokens), q.k~ and dO.v~.
  __device__ __forceinline__ float* dots_of(int h, int w) const { return dots + (h % 2 * warps + w) * 32; }
};

// Step 0: rows of the group, and zeros for dk.
template <class T, bool kWhole, class Valid>
__device__ __forceinline__ void request_group(const ScanShort& p, const Place<kWhole>& place, const ScanTile& tile,
                                              int64_t group, Valid&& valid) {
  const Sizes& s = p.in.size;
  const int64_t row = tile.sequence.batch, token = tile.token, sums_row = s.q_groups * s.head_dim;
  const T* q_at = row_of<T>(p.in.q, row, token, group, place.d);
  const T* k_at = row_of<T>(p.in.k, row, token, group, place.d);
  const float* dq_at = p.dq_sum + (row * s.tokens + token) * sums_row + group * s.head_dim + place.d;
  WarpShared& shared = *place.shared;
#pragma unroll 4
  for (int t = 0; t < kTokens; ++t) {
    cp_async4(shared_address(&shared.rows[t][place.lane].x), q_at, valid(t));
    cp_async4(shared_address(&shared.rows[t][place.lane].y), k_at, valid(t));
    cp_async8(shared_address(&shared.sums[t][place.lane]), dq_at, valid(t));
    reinterpret_cast<float2*>(&shared.sums[t][place.lane])[1] = make_float2(0.0f, 0.0f);
    if (kWhole || t + 1 < tile.count) {  // addresses of rows that do not exist are not even formed
      q_at += p.in.q.token;
      k_at += p.in.k.token;
      dq_at += sums_row;
    }
  }
  cp_async_commit();
}

// Step 4. The sums over the heads.
template <class T, bool kWhole, class Valid>
__device__ __forceinline__ void store_group(const ScanShort& p, const Place<kWhole>& place, const ScanTile& tile,
                                            int64_t group, Valid&& valid) {
  T* dq_at = out_row_of<T>(p.dq, tile.sequence.batch, tile.token, group, place.d);
  T* dk_at = out_row_of<T>(p.dk, tile.sequence.batch, tile.token, group, place.d);
#pragma unroll 4
  for (int t = 0; t < kTokens; ++t) {
    if (!valid(t)) break;
    const float4 sum = place.shared->sums[t][place.lane];
    *reinterpret_cast<uint32_t*>(take(dq_at, p.dq.token)) = pack2<T>(sum.x, sum.y);
    *reinterpret_cast<uint32_t*>(take(dk_at, p.dk.token)) = pack2<T>(sum.z, sum.w);
  }
}

// Which tokens of a tile reset the recurrence, and which leave a key: a bit each.
struct Edges {
  uint32_t bits = 0;  // resets, keys << 16

  __device__ __forceinline__ void find(const Sizes& s, const ScanTile& tile, int first_chunk) {
    const int length = static_cast<int>(s.reset);
    int offset = static_cast<int>(tile.position) - first_chunk * length;
    for (int t = 0; t < tile.count; ++t) {
      bits |= (offset == 0) << t | static_cast<uint32_t>(offset == length - 1) << (16 + t);
      offset = offset == length - 1 ? 0 : offset + 1;
    }
  }
  __device__ __forceinline__ bool resets(int t) const { return bits >> t & 1; }
  __device__ __forceinline__ bool leaves_key(int t) const { return bits >> (16 + t) & 1; }
  __device__ __forceinline__ int keys_before(int t) const { return __popc(bits >> 16 & ((1u << t) - 1)); }
};

// v, gate and dO of all tokens of a head, in registers; where they are, and where dv and dgate go. The inputs are asked for at the
// first token, and again where they were used; the outputs are stored from the last on.
template <class T>
struct HeadRows {
  uint64_t v_at, gate_at, dout_at, dv_at, dgate_at;
  uint32_t v[kTokens], gate[kTokens], dout[kTokens];

  __device__ __forceinline__ HeadRows(const ScanShort& p, const ScanTile& tile, int head, int d) {
    const auto start = [&](const Walk& w, int t) {
      const char* at =
          w.ptr + tile.sequence.batch * w.batch + (tile.token + t) * w.token + head * w.head + d * int{sizeof(T)};
      return static_cast<uint64_t>(__cvta_generic_to_global(at));
    };
    v_at = start(p.v, 0), gate_at = start(p.gate, 0), dout_at = start(p.dout, 0);
    dv_at = start(p.dv, kLast), dgate_at = start(p.dgate, kLast);
  }
  __device__ __forceinline__ void request(int t, bool in) {
    load_pair_if(v[t], v_at, in);
    load_pair_if(gate[t], gate_at, in);
    load_pair_if(dout[t], dout_at, in);
  }
  template <class Valid>
  __device__ __forceinline__ void request_all(const ScanShort& p, Valid&& valid) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      // A token that does not exist has f = 1, and all else zero: states and gradients pass it unchanged.
      gate[t] = kInfinities<T>;
      v[t] = dout[t] = 0;
      request(t, valid(t));
      if (t < kLast) {
        move(v_at, p.v.token);
        move(gate_at, p.gate.token);
        move(dout_at, p.dout.token);
      }
    }
  }
  // The compiler is kept from keeping gates and unpacked rows of the forward walk: there are no registers for them.
  __device__ __forceinline__ void forget_unpacked() {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) forget(v[t], gate[t], dout[t]);
  }
  __device__ __forceinline__ void inputs_to_next_head(const ScanShort& p) {
    v_at += p.v.head;
    gate_at += p.gate.head;
    dout_at += p.dout.head;
  }
  __device__ __forceinline__ void back(const ScanShort& p) {
    move(v_at, -p.v.token);
    move(gate_at, -p.gate.token);
    move(dout_at, -p.dout.token);
    move(dv_at, -p.dv.token);
    move(dgate_at, -p.dgate.token);
  }
  __device__ __forceinline__ void to_ends(const ScanShort& p) {  // after kLast steps back
    v_at += kLast * p.v.token;
    gate_at += kLast * p.gate.token;
    dout_at += kLast * p.dout.token;
    dv_at += kLast * p.dv.token + p.dv.head;
    dgate_at += kLast * p.dgate.token + p.dgate.head;
  }
};

// Sums over the warp of eight values per lane: each step halves the values that a lane has, it gives away half and takes what the
// other lane has of its own half. Lane l ends with the sum of value l / 4.
__device__ __forceinline__ float sum_eight(float (&part)[8], int lane) {
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
  return part[0];
}

// Step 1. The states before each token, in T, and this warp's part of the dots.
template <class T, bool kWhole>
__device__ __forceinline__ void scan_forward(const Place<kWhole>& place, const HeadRows<T>& rows, const Edges& edges,
                                             const float (&bias)[2], int h, float (&k_state)[2], float (&v_state)[2],
                                             uint32_t (&k_before)[kTokens], uint32_t (&v_before)[kTokens]) {
  const int lane = place.lane;
  float part[8];  // of q.k~ of four tokens and of dO.v~
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (kWhole ? t == 0 : edges.resets(t)) k_state[0] = k_state[1] = v_state[0] = v_state[1] = 0.0f;
    k_before[t] = pack2<T>(k_state[0], k_state[1]);
    v_before[t] = pack2<T>(v_state[0], v_state[1]);
    const uint2 raw = place.shared->rows[t][lane];
    float f[2], g[2], q[2], k[2], v[2], dout[2];
    gates2<T>(rows.gate[t], bias, f, g);
    unpack_pair<T>(raw.x, q);
    unpack_pair<T>(raw.y, k);
    unpack_pair<T>(rows.v[t], v);
    unpack_pair<T>(rows.dout[t], dout);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      k_state[j] = fmaf(f[j], k_state[j], g[j] * k[j]);
      v_state[j] = fmaf(f[j], v_state[j], g[j] * v[j]);
    }
    part[t % 4] = fmaf(q[1], k_state[1], q[0] * k_state[0]);
    part[4 + t % 4] = fmaf(dout[1], v_state[1], dout[0] * v_state[0]);
    if (t % 4 < 3) continue;
    const float sum = sum_eight(part, lane);
    if (lane % 4 == 0) place.dots_of(h, place.warp)[lane / 16 * 16 + t / 4 * 4 + lane / 4 % 4] = sum;
  }
}

// In its first chunk a token attends to itself alone: its weight is 1 and its score has no gradient, whatever Delta lost when y was
// rounded.
enum SelfKind : int { kNone, kAlone, kAttends };

// Step 2. p_tt and scale * ds_tt, one lane per token. `scalar`: lse of the token of lanes 0 ... 15, Delta of that of lanes 16 ... 31.
template <bool kWhole>
__device__ __forceinline__ void own_weights(const ScanShort& p, const Place<kWhole>& place, int h, int self_kind,
                                            float scalar) {
  const int lane = place.lane;
  float dot = 0.0f;
  for (int w = 0; w < place.warps; ++w) dot += place.dots_of(h, w)[lane];
  const float dp = __shfl_xor_sync(kFullWarp, dot, 16), delta = __shfl_xor_sync(kFullWarp, scalar, 16);
  if (lane < kTokens) {
    float2 self = make_float2(self_kind == kAlone ? 1.0f : 0.0f, 0.0f);
    if (self_kind == kAttends) {
      self.x = expf(fmaf(p.in.scale, dot, -scalar));
      self.y = p.in.scale * self.x * (dp - delta);
    }
    place.shared->self[lane] = self;
  }
  __syncwarp();
}

// Step 3. k_grad and v_grad: what the state of the last token receives from the tokens after it; in the end what the state before the
// first does. `more`: another head of the group follows, whose rows are asked for.
template <class T, bool kWhole, class Valid>
__device__ __forceinline__ void walk_back(const ScanShort& p, const Place<kWhole>& place, const Edges& edges,
                                          int64_t state_at, int first_chunk, const float (&bias)[2],
                                          const uint32_t (&k_before)[kTokens], const uint32_t (&v_before)[kTokens],
                                          bool more, Valid&& valid, HeadRows<T>& rows, float (&k_grad)[2],
                                          float (&v_grad)[2], float (&dbias)[2]) {
  WarpShared& shared = *place.shared;
  const int lane = place.lane;
  uint2 raw = shared.rows[kLast][lane];
  float2 own = shared.self[kLast];
#pragma unroll
  for (int t = kLast; t >= 0; --t) {
    float f[2], g[2], q[2], k[2], v[2], dout[2], k_past[2], v_past[2], dk[2], dv[2], dgate[2];
    float4 sum = shared.sums[t][lane];
    unpack_pair<T>(raw.x, q);
    unpack_pair<T>(raw.y, k);
    unpack_pair<T>(rows.v[t], v);
    unpack_pair<T>(rows.dout[t], dout);
    unpack_pair<T>(k_before[t], k_past);
    unpack_pair<T>(v_before[t], v_past);
    gates2<T>(rows.gate[t], bias, f, g);
    const float probability = own.x, ds = own.y;
    if (t > 0) {
      raw = shared.rows[t - 1][lane];
      own = shared.self[t - 1];
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      v_grad[j] = fmaf(probability, dout[j], v_grad[j]);
      k_grad[j] = fmaf(ds, q[j], k_grad[j]);
    }
    if (!kWhole && edges.leaves_key(t)) {
      const int before = edges.keys_before(t);
      add_chunk_grad(load_chunk_grad<T>(p, state_at + before * static_cast<int>(p.in.size.head_dim),
                                        first_chunk + before, place.d),
                     k_grad, v_grad);
    }
    // They are a_t and b_t now.
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      dk[j] = g[j] * k_grad[j];
      dv[j] = g[j] * v_grad[j];
      dgate[j] = f[j] * fmaf(dv[j], v_past[j] - v[j], dk[j] * (k_past[j] - k[j]));
      dbias[j] += dgate[j];
      k_grad[j] *= f[j];
      v_grad[j] *= f[j];
    }
    sum.x = fmaf(ds, fmaf(f[0], k_past[0], g[0] * k[0]), sum.x);
    sum.y = fmaf(ds, fmaf(f[1], k_past[1], g[1] * k[1]), sum.y);
    sum.z += dk[0];
    sum.w += dk[1];
    shared.sums[t][lane] = sum;
    if (!kWhole && edges.resets(t)) k_grad[0] = k_grad[1] = v_grad[0] = v_grad[1] = 0.0f;
    store_pair_if(rows.dv_at, pack2<T>(dv[0], dv[1]), valid(t));
    store_pair_if(rows.dgate_at, pack2<T>(dgate[0], dgate[1]), valid(t));
    rows.request(t, more && valid(t));
    if (t > 0) rows.back(p);
  }
  rows.to_ends(p);
}

// ---- what a head and a sequence bring along -----------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void load_bias2(const ScanShort& p, int h, int d, float (&bias)[2]) {
  bias[0] = bias[1] = 0.0f;
  if (!p.in.gate_bias) return;
  const float* at = p.in.gate_bias + static_cast<int64_t>(h) * p.in.size.head_dim + d;
  bias[0] = kLogitUnit<T> * at[0];
  bias[1] = kLogitUnit<T> * at[1];
  // A token that does not exist has a gate of +inf, which a bias of -inf would make NaN: the largest float shuts gates as well.
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (bias[j] > FLT_MAX) bias[j] = FLT_MAX;
  }
}

// Offset of (sequence, head, d) in a running state. `tile_again` makes the tile anew where it is rarely needed: kept, it costs
// registers.
__device__ __forceinline__ int64_t running_at(const Sizes& s, const ScanTile& tile, int h, int d) {
  return (tile.sequence.index * s.heads + h) * s.head_dim + d;
}

// The states before the first token of the tile, but for chunks that start in it.
template <bool kWhole, class TileAgain>
__device__ __forceinline__ void states_before(const ScanShort& p, TileAgain&& tile_again, int h, int d,
                                              float (&k_state)[2], float (&v_state)[2]) {
  k_state[0] = k_state[1] = v_state[0] = v_state[1] = 0.0f;
  if (kWhole || !p.in.initial_k) return;
  if (const ScanTile again = tile_again(); again.first) {
    const int64_t at = running_at(p.in.size, again, h, d);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      k_state[j] = p.in.initial_k[at + j];
      v_state[j] = p.in.initial_v[at + j];
    }
  }
}

// What the state of the last token of the tile receives from the tokens after it: f_{t+1} a_{t+1} and f_{t+1} b_{t+1}.
template <class TileAgain>
__device__ __forceinline__ void gradients_after(const ScanShort& p, TileAgain&& tile_again, int h, int d,
                                                float (&k_grad)[2], float (&v_grad)[2]) {
  k_grad[0] = k_grad[1] = v_grad[0] = v_grad[1] = 0.0f;
  if (!p.drunning_k && !p.drunning_v) return;
  if (const ScanTile again = tile_again(); again.last) {
    const int64_t at = running_at(p.in.size, again, h, d);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (p.drunning_k) k_grad[j] = p.drunning_k[at + j];
      if (p.drunning_v) v_grad[j] = p.drunning_v[at + j];
    }
  }
}

template <bool kWhole, class TileAgain>
__device__ __forceinline__ void store_initial(const ScanShort& p, TileAgain&& tile_again, int h, int d, bool live,
                                              const float (&k_grad)[2], const float (&v_grad)[2]) {
  if (kWhole || !p.dinitial_k) return;
  if (const ScanTile again = tile_again(); again.first && live) {
    const int64_t at = running_at(p.in.size, again, h, d);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      p.dinitial_k[at + j] = k_grad[j];
      p.dinitial_v[at + j] = v_grad[j];
    }
  }
}

// ---- the kernel -------------------------------------------------------------------------------------------------------

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
  const Place<kWhole> place(s, shared_memory);
  const int lane = place.lane, d = place.d;
  const bool live = place.live;
  const unsigned groups = static_cast<unsigned>(s.q_groups), tile_block = blockIdx.x / groups;
  // Made anew where it is needed: kept, it costs a spill.
  const auto group_again = [&]() -> int64_t { return blockIdx.x % opaque(groups); };
  const int first_head = static_cast<int>(blockIdx.x % groups) * p.group_heads;
  const auto bias_partial = [&](int h) {
    return reinterpret_cast<float2*>(p.bias_partial + (static_cast<int64_t>(tile_block) * s.heads + h) * s.head_dim +
                                     d);
  };
  bool first_tile = true;

  int64_t item = static_cast<int64_t>(tile_block) * p.tiles_per_block;
#pragma unroll 1
  for (int left = static_cast<int>(min(p.tiles_per_block, p.in.items - item)); left > 0; --left, ++item) {
    const ScanTile tile = tile_of(s, item, p.in.tile);
    const int count = tile.count;
    if (count == 0) continue;  // the same for the whole block
    const auto tile_again = [&] { return tile_of(s, opaque(item), p.in.tile); };
    const int own_count = live ? count : 0;
    const auto valid = [&](int t) { return kWhole || t < own_count; };

    request_group<T>(p, place, tile, group_again(), valid);
    Edges edges;
    const int first_chunk = static_cast<int>(quotient(tile.position, s.key_every));
    if constexpr (!kWhole) edges.find(s, tile, first_chunk);
    int64_t state_at = chunk_offset(s, p.chunk.layout, tile.sequence.index, first_head) + first_chunk * s.head_dim;

    HeadRows<T> rows(p, tile, first_head, d);
    int64_t scalar_at = (tile.sequence.batch * s.heads + first_head) * s.tokens + tile.token + lane % 16;
    const int self_kind = lane % 16 >= count ? kNone : tile.position + lane % 16 < s.key_every ? kAlone : kAttends;
    const auto load_scalar = [&]() {
      return kWhole || self_kind != kNone ? (lane < 16 ? p.lse : p.delta)[scalar_at] : 0.0f;
    };
    rows.request_all(p, valid);
    float scalar = load_scalar();
    cp_async_wait<0>();

#pragma unroll 1
    for (int h = first_head; h < first_head + p.group_heads; ++h) {
      const bool more = h + 1 < first_head + p.group_heads;
      float bias[2], dbias[2] = {0.0f, 0.0f}, k_state[2], v_state[2];
      load_bias2<T>(p, h, d, bias);
      states_before<kWhole>(p, tile_again, h, d, k_state, v_state);
      uint32_t k_before[kTokens], v_before[kTokens];
      scan_forward(place, rows, edges, bias, h, k_state, v_state, k_before, v_before);

      float k_grad[2], v_grad[2];
      gradients_after(p, tile_again, h, d, k_grad, v_grad);
      ChunkGrad chunk_grad;
      if constexpr (kWhole) chunk_grad = load_chunk_grad<T>(p, state_at, first_chunk, d);

      // The dots of all warps are there. The next head's go to the other half: who is two heads ahead has passed the barrier
      // of the head between, before which all have read these.
      __syncthreads();
      own_weights(p, place, h, self_kind, scalar);
      scalar_at += s.tokens;
      if (more) scalar = load_scalar();

      if constexpr (kWhole) add_chunk_grad(chunk_grad, k_grad, v_grad);
      rows.forget_unpacked();
      if (more) rows.inputs_to_next_head(p);
      walk_back(p, place, edges, state_at, first_chunk, bias, k_before, v_before, more, valid, rows, k_grad, v_grad,
                dbias);
      state_at += p.chunk.layout.head;

      store_initial<kWhole>(p, tile_again, h, d, live, k_grad, v_grad);
      if (p.bias_partial && live) {  // summed over the tiles of the block
        float2* const at = bias_partial(h);
        float2 sum = first_tile ? make_float2(0.0f, 0.0f) : *at;
        sum.x += dbias[0];
        sum.y += dbias[1];
        *at = sum;
      }
    }
    first_tile = false;
    store_group<T>(p, place, tile_again(), group_again(), valid);
    __syncthreads();  // all have read the last head's dots: the next tile's may take their place
  }
  if (p.bias_partial && live && first_tile) {  // a block without tokens
    for (int h = first_head; h < first_head + p.group_heads; ++h) *bias_partial(h) = make_float2(0.0f, 0.0f);
  }
}

// ---- launches ---------------------------------------------------------------------------------------------------------

struct Deal {
  int64_t tile, items, tiles_per_block, tile_blocks;
};

// A block for each tile is fastest; but with a bias each leaves partial sums, so about 8,192 blocks where there is so much work.
Deal deal(const Sizes& s, bool bias) {
  Deal d;
  d.tile = tile_size(s, true, kTokens, kTokens);
  d.items = work_items(s, d.tile);
  d.tiles_per_block = bias ? std::min<int64_t>(64, std::max<int64_t>(1, d.items * s.q_groups / 8192)) : 1;
  d.tile_blocks = ceil_div(d.items, d.tiles_per_block);
  return d;
}

Walk walk(const Rows& r) { return {static_cast<char*>(r.ptr), r.batch * 2, r.token * 2, r.head * 2}; }

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
  p.chunk = chunk_grads(a, scratch);
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
    const bool whole = !s.cu_seqlens && !s.lengths && s.reset == kTokens && s.tokens % kTokens == 0 &&
                       s.head_dim % 64 == 0 && !p.dinitial_k;
    const auto launch = [&](auto* kernel) {
      const int shared = static_cast<int>(shared_bytes(threads / 32));
      allow_shared_memory(kernel, shared, "chunk_scan_short_bwd shared memory");
      kernel<<<grid_x(blocks, "chunk_scan_short_bwd"), threads, shared, stream>>>(p);
      check_launch("chunk_scan_short_bwd");
    };
    if (s.dtype == DType::bf16) {
      launch(whole ? chunk_scan_short_bwd_kernel<bf16, true> : chunk_scan_short_bwd_kernel<bf16, false>);
    } else {
      launch(whole ? chunk_scan_short_bwd_kernel<f16, true> : chunk_scan_short_bwd_kernel<f16, false>);
    }
  }
  if (a.dgate_bias) {
    reduce_gate_bias(p.bias_partial, d.tile_blocks, s.heads * s.head_dim, static_cast<float*>(a.dgate_bias), stream);
  }
}

}  // namespace

const char* short_scan::refuses(const AttentionBwdParams& a) {
  const Sizes& s = a.fwd.size;
  if (s.dtype != DType::bf16 && s.dtype != DType::f16) return "elements are not of two bytes";
  if (a.fwd.gate.ptr == nullptr) return "the states are given";
  if (s.reset > kShortChunk) return "chunks are longer than 16 tokens";
  if (s.k_groups != s.q_groups) return "k has other groups than q";
  return nullptr;
}

Launch short_scan::reverse(const AttentionBwdParams& a, const BwdScratch& scratch, Arena& arena) {
  const Sizes& s = a.fwd.size;
  const Deal d = deal(s, a.dgate_bias != nullptr);
  Piece<float> bias_partial;  // (tile_blocks, H, D)
  if (a.dgate_bias) bias_partial = arena.take<float>(d.tile_blocks * s.heads * s.head_dim);
  return [&a, scratch, d, bias_partial](cudaStream_t stream) { launch_scan(a, scratch, d, bias_partial, stream); };
}

KernelList reverse_short_kernels() {
  static const KernelTable table = [] {
    KernelTable t;
    t.add("chunk_scan_short_bwd<bf16, whole>", chunk_scan_short_bwd_kernel<bf16, true>);
    t.add("chunk_scan_short_bwd<bf16>", chunk_scan_short_bwd_kernel<bf16, false>);
    t.add("chunk_scan_short_bwd<f16, whole>", chunk_scan_short_bwd_kernel<f16, true>);
    t.add("chunk_scan_short_bwd<f16>", chunk_scan_short_bwd_kernel<f16, false>);
    return t;
  }();
  return table.list();
}

}  // namespace rat::cuda
