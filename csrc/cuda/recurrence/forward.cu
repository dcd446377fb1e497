// The forward scans: k~ and v~ of rat_attention with what the attention kernel needs of them, and chunk_recurrence.
//
//   chunk_prepare_fwd_kernel      scan: where chunks are long, the states that segments start with come from segments.cu
//   chunk_prepare_few_fwd_kernel  few: for calls of few tiles
//
// They also come for rows of a pool (launchers.h): chunk states and running states are then read and written where they lie in the
// pool, and the y of a row that is skipped becomes zeros.
//
// In scan a warp takes a tile of tokens and 32 / W heads, and walks the tile with the states in registers (scan.cuh). Each lane copies its
// pieces of the rows of the next kRing tokens to shared memory of its own, and asks for one token when it has used one: bytes on
// their way cost no registers, and no thread waits for another. Narrow rows (launchers.h) come in halves. Bytes per token in
// attention, elements of two bytes: reads v, gate (4 H D) and q, k (4 G D, the heads of a group hit the L1 cache), writes v~ (2 H D),
// s_tt (4 H) and 1/L of a key and a value.
#include <type_traits>

#include "../device/divisor.h"
#include "../device/e4m3.cuh"
#include "../ptx/cp_async.cuh"
#include "../ptx/depend.cuh"
#include "../ptx/memory.cuh"
#include "families.h"
#include "scan_launch.h"

namespace rat::cuda {
namespace {

constexpr int kThreads = 128;

// Tokens whose rows are on their way: at most 48 KB of shared memory, so that four blocks fit on an SM of Hopper.
template <class T>
constexpr int kRing = sizeof(T) == 2 ? 6 : 3;

// What a token has: its gate and k; in attention v and q too.
enum Row : int { kGate, kKey, kValue, kQuery };

// Places for rows: [token of the ring][Row][16 bytes of a row's 8 elements][thread].
template <class T, bool kAttention>
class Ring {
 public:
  static constexpr int kParts = sizeof(T) / 2, kRows = kAttention ? 4 : 2;
  static constexpr int kTokenBytes = kRows * kParts * 16 * kThreads, kBytes = kRing<T> * kTokenBytes;

  __device__ __forceinline__ explicit Ring(const void* memory)
      : first_(shared_address(memory) + threadIdx.x * 16), end_(first_ + kBytes), put_(first_), get_(first_) {}

  // Rows that the warps of a block share come through L1, and so do narrow ones, of which `narrow` has a bit for each Row.
  __device__ __forceinline__ void ask(Row row, const T* source, bool shared, uint32_t narrow) {
    const char* const from = reinterpret_cast<const char*>(source);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const uint32_t to = put_ + (row * kParts + i) * (16 * kThreads);
      if (narrow >> row & 1) {
        cp_async8(to, from + 16 * i);
        cp_async8(to + 8, from + 16 * i + 8);
      } else if (shared) {
        cp_async16_through_l1(to, from + 16 * i);
      } else {
        cp_async16(to, from + 16 * i);
      }
    }
  }
  __device__ __forceinline__ void asked() {  // for a token; or for none, so that groups stay in step
    cp_async_commit();
    put_ = put_ + kTokenBytes == end_ ? first_ : put_ + kTokenBytes;
  }
  __device__ __forceinline__ void wait() const { cp_async_wait<kRing<T> - 1>(); }  // for the oldest token
  __device__ __forceinline__ Raw8<T> row(Row row) const {
    Raw8<T> raw;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      load_shared16(raw.part[i].word, get_ + (row * kParts + i) * (16 * kThreads));
    }
    return raw;
  }
  __device__ __forceinline__ void used() { get_ = get_ + kTokenBytes == end_ ? first_ : get_ + kTokenBytes; }

 private:
  uint32_t first_, end_, put_, get_;
};

struct PrepareFwd {
  ScanInput in;
  Rows y;         // v~, or y of chunk_recurrence
  float* s_self;  // (B, H, T)
  ChunkStates chunks;
  float* running_k;  // (N, H, D) or null
  float* running_v;
  uint32_t narrow;  // bit i: rows of Row i are narrow (launchers.h). Not of q
};

// A state to the e4m3 states of a pool, at state `at`, and with it what they keep of it.
template <int W>
__device__ __forceinline__ void quantise(void* states, float* scales, int64_t at, const Lane& lane, int64_t head_dim,
                                         float (&x)[8]) {
  const float scale = scale_of_group<W>(x, lane);
  StateRaw<e4m3> raw;
  pack_state(x, scale, raw);
  unpack_state(raw, x);
#pragma unroll
  for (int j = 0; j < 8; ++j) x[j] *= scale;
  if (!lane.live) return;
  *reinterpret_cast<StateRaw<e4m3>*>(static_cast<uint8_t*>(states) + at * head_dim + lane.d) = raw;
  if (lane.index == 0) scales[at] = scale;
}

// The first token of a tile whose running state stays in the pool.
__device__ __forceinline__ int first_kept(const PoolStates& pool, const ScanTile& tile) {
  const int64_t stop = tile.sequence.start + (tile.sequence.end - tile.sequence.begin);
  const int64_t first = stop - pool.ring - tile.position;
  return first <= 0 ? 0 : first < tile.count ? static_cast<int>(first) : tile.count;
}

// The state of a token that closes a chunk, to the chunk states: k~ rotated by its angle. `n` is the sequence, of the pool where
// there is one; `row` that of the call.
template <class T, int W, bool kPool>
__device__ __forceinline__ void store_key(const PrepareFwd& p, int64_t n, [[maybe_unused]] int64_t row,
                                          const Lane& lane, const ChunkClock& clock, const float (&k_state)[8],
                                          const float (&v_state)[8]) {
  const Sizes& s = p.in.size;
  float turned[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) turned[j] = k_state[j];
  if (p.in.rotary.cos) rotate<W>(p.in.rotary, clock.angle(), s.head_dim, lane, 1.0f, turned);
  if constexpr (kPool) {
    const PoolStates& pool = p.in.pool;
    if (pool.quantised.k) {
      const int64_t at = pool_offset(s, pool.quantised, n, lane.head, clock.key()) / s.head_dim;
      const int64_t to = pool_offset(s, p.chunks, row, lane.head, clock.key()) + lane.d;
#pragma unroll 1
      for (int which = 0; which < 2; ++which) {  // the key, then the value: the code once
        quantise<W>(which ? pool.quantised.v : pool.quantised.k, which ? pool.scale_v : pool.scale_k, at, lane,
                    s.head_dim, turned);
        if (lane.live) store_row(static_cast<T*>(which ? p.chunks.v : p.chunks.k) + to, turned);
#pragma unroll
        for (int j = 0; j < 8; ++j) turned[j] = v_state[j];
      }
      return;
    }
  }
  if (lane.live) {
    const int64_t at = (kPool ? pool_offset(s, p.chunks, n, lane.head, clock.key())
                              : chunk_offset(s, p.chunks, n, lane.head) + clock.key() * s.head_dim) +
                       lane.d;
    store_row(static_cast<T*>(p.chunks.k) + at, turned);
    store_row(static_cast<T*>(p.chunks.v) + at, v_state);
  }
}

// kAttention: scan k and v, dot with q, write chunk states. Otherwise scan k alone and write its states.
// kPool, in attention: rows of a pool. kNarrow, in attention: some rows of k, v or gate are narrow. A kernel of its own, for a
// branch would cost that of other rows 1.3 us of 51 at T = 4096, B = 1.
template <class T, int W, bool kAttention, bool kPool, bool kNarrow>
__global__ void __launch_bounds__(kThreads, 4) chunk_prepare_fwd_kernel(const __grid_constant__ PrepareFwd p) {
  const ScanInput& in = p.in;
  const Sizes& s = in.size;
  ScanTile tile;
  Lane lane;
  if (!warp_work<W>(in, tile, lane)) return;
  const bool gated = in.gate.ptr != nullptr;
  const int64_t row = tile.sequence.batch, token = tile.token, h = lane.head;
  extern __shared__ __align__(16) unsigned char ring_memory[];
  Ring<T, kAttention> ring(ring_memory);
  const T* k_row = row_of<T>(in.k, row, token, group_of(s, h, s.k_groups), lane.d);
  const T* q_row = kAttention ? row_of<T>(in.q, row, token, group_of(s, h, s.q_groups), lane.d) : nullptr;
  const T* v_row = kAttention ? row_of<T>(in.v, row, token, h, lane.d) : nullptr;
  const T* gate_row = gated ? row_of<T>(in.gate, row, token, h, lane.d) : nullptr;
  T* y_row = out_row_of<T>(p.y, row, token, h, lane.d);
  float* s_self = kAttention ? p.s_self + (row * s.heads + h) * s.tokens + token : nullptr;

  int left = tile.count;  // tokens that are not asked for
  const auto ask = [&] {
    if (left-- > 0) {
      const uint32_t narrow = kNarrow ? p.narrow : 0;
      if (gated) ring.ask(kGate, take(gate_row, in.gate.token), false, narrow);
      ring.ask(kKey, take(k_row, in.k.token), true, narrow);
      if constexpr (kAttention) {
        ring.ask(kValue, take(v_row, in.v.token), false, narrow);
        ring.ask(kQuery, take(q_row, in.q.token), true, 0);
      }
    }
    ring.asked();
  };
  const auto ask_first = [&] {
#pragma unroll
    for (int i = 0; i < kRing<T>; ++i) ask();
  };
  if constexpr (!kPool) ask_first();

  float bias[8], k_state[8], v_state[8];
  int64_t owner = tile.sequence.index;  // of the states
  [[maybe_unused]] int kept = 0;
  if constexpr (kPool) {
    owner = in.pool.entry[owner];
    if (owner < 0) {
      zero(v_state);
      for (int i = 0; i < tile.count; ++i) {
        T* const out = take(y_row, p.y.token);
        if (lane.live) store_row(out, v_state);
      }
      return;
    }
    ask_first();
    kept = first_kept(in.pool, tile);
    pool_state(in, tile, lane, owner, k_state, v_state);
  } else {
    incoming_state<kAttention>(in, tile, lane, k_state, v_state);
  }
  load_bias<T>(in, lane, bias);
  ChunkClock clock(s, tile.position);

#pragma unroll 1
  for (int i = 0; i < tile.count; ++i) {
    ring.wait();
    if (clock.resets() || !gated) {
      zero(k_state);
      zero(v_state);
    }
    float f[8], g[8], x[8];
    gates_of(gated ? ring.row(kGate) : Raw8<T>{}, bias, gated, f, g);
    unpack(ring.row(kKey), x);
    advance(f, g, x, k_state);
    T* const out = take(y_row, p.y.token);
    if constexpr (kAttention) {
      unpack(ring.row(kValue), x);
      advance(f, g, x, v_state);
      if (lane.live) store_row(out, v_state);
      unpack(ring.row(kQuery), x);
      float own = lane.live ? dot(x, k_state) : 0.0f;
      if (clock.leaves_key()) {
        store_key<T, W, kPool>(p, owner, tile.sequence.index, lane, clock, k_state, v_state);
      }
      if constexpr (kPool) {
        if (i >= kept && lane.live) {
          const int64_t at = running_at(s, in.pool, owner, h, tile.position + i) + lane.d;
          store_floats(in.pool.k + at, k_state);
          store_floats(in.pool.v + at, v_state);
        }
      }
      own = group_sum<W>(own);
      if (lane.live && lane.index == 0) s_self[i] = in.scale * own;
    } else {
      if (lane.live) store_row(out, k_state);
    }
    clock.next();
    ring.used();
    ask();
  }
  if (!kPool && tile.last && p.running_k && lane.live) {
    const int64_t at = (tile.sequence.index * s.heads + h) * s.head_dim + lane.d;
    store_floats(p.running_k + at, k_state);
    if (kAttention) store_floats(p.running_v + at, v_state);
  }
}

// ---- few tiles --------------------------------------------------------------------------------------------------------
//
// Where a call has so few tiles that a multiprocessor gets a few warps, the time is that of one warp going from token to token: half
// a microsecond each, of instructions. Here a block takes the tile of a warp:
//   rows          a warp for every fourth token asks for its gate, k, v and q, to shared memory
//   the walk      a thread for two elements, with the states in registers and nothing between tokens but their multiply-adds
//   what follows  a warp for every fourth token: v~ out, s_tt, states
// Lanes are those of the walk by a warp where sums are over lanes, and an element has the same arithmetic: the same bits.

constexpr int kFewTokens = 16;  // of a tile, at most
constexpr int kFewWarps = kThreads / 32;

// A float for each element of a warp's lanes: in two halves of four for each lane, so that no way to reach them has conflicts.
struct alignas(16) LaneFloats {
  float4 half[2][32];

  // Elements 2 pair and 2 pair + 1 of a lane.
  __device__ __forceinline__ void put(int lane, int pair, float2 x) {
    reinterpret_cast<float2*>(&half[pair / 2][lane])[pair % 2] = x;
  }
  __device__ __forceinline__ void get(float (&x)[8]) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const float4 low = half[0][lane], high = half[1][lane];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  }
};

struct FewShared {
  Bytes16 row[4][kFewTokens][32];   // by Row, of a warp's lanes
  LaneFloats state[2][kFewTokens];  // k~ and v~
};

// What the kernel divides by: everyone waits for the numbers that it begins with.
struct FewFwd : PrepareFwd {
  uint32_t per_row;  // tiles of a row, where rows are not packed
  Divisor head_batches, tiles_of_row, tile, reset, heads_per_k_group, heads_per_q_group;
};

// As tile_of().
__device__ __forceinline__ ScanTile few_tile_of(const FewFwd& p, uint32_t item) {
  const Sizes& s = p.in.size;
  if (s.cu_seqlens) return tile_of(s, item, p.in.tile);
  const uint32_t n = p.tiles_of_row.quotient(item), size = static_cast<uint32_t>(p.in.tile);
  ScanTile t;
  t.item = item;
  t.sequence = sequence_at(s, n);
  const uint32_t start = static_cast<uint32_t>(t.sequence.start), stop = start + static_cast<uint32_t>(s.tokens);
  const uint32_t base = (p.tile.quotient(start) + (item - n * p.per_row)) * size;
  const uint32_t low = max(base, start), high = min(base + size, stop);
  t.count = high > low ? static_cast<int>(high - low) : 0;
  t.position = low;
  t.token = low - start;
  t.first = low == start;
  t.last = high == stop;
  return t;
}

template <class T, int W, bool kPool>
__global__ void __launch_bounds__(kThreads, 4) chunk_prepare_few_fwd_kernel(const __grid_constant__ FewFwd p) {
  const ScanInput& in = p.in;
  const Sizes& s = in.size;
  // Code that comes from memory takes its time, about 0.15 us for each KB (an H200, 2026-12-01): little of it. Not in a pool, where
  // the kernel lies ready while the rows are planned, and loops would take longer than what they spare.
  constexpr int kWalk = kPool ? kFewTokens : 2, kEach = kPool ? kFewTokens / kFewWarps : 1;
  extern __shared__ __align__(16) unsigned char few_memory[];
  FewShared& shared = *reinterpret_cast<FewShared*>(few_memory);
  const int thread = static_cast<int>(threadIdx.x), warp = warp_uniform(thread / 32);
  const uint32_t item = p.head_batches.quotient(blockIdx.x);
  const int64_t batch = blockIdx.x - item * static_cast<uint32_t>(in.head_batches);
  const Lane lane = lane_of<W>(batch * (32 / W) + thread % 32 / W, s.heads, s.head_dim);
  const bool gated = in.gate.ptr != nullptr;
  const int64_t h = lane.head;
  const auto ask = [&](const ScanTile& tile) {
    const int64_t row = tile.sequence.batch, first = tile.token + warp,
                  k_head = p.heads_per_k_group.quotient(static_cast<uint32_t>(h));
    const T* gate = row_of<T>(in.gate, row, first, h, lane.d);
    const T* k = row_of<T>(in.k, row, first, k_head, lane.d);
    const T* v = row_of<T>(in.v, row, first, h, lane.d);
    const T* q = row_of<T>(in.q, row, first, p.heads_per_q_group.quotient(static_cast<uint32_t>(h)), lane.d);
    uint32_t to = shared_address(&shared.row[0][warp][thread % 32]);
    constexpr uint32_t kRow = sizeof(shared.row[0]);
#pragma unroll kEach
    for (int i = 0; i < kFewTokens / kFewWarps; ++i, to += kFewWarps * sizeof(shared.row[0][0])) {
      if (warp + kFewWarps * i >= tile.count) break;
      if (gated) cp_async16(to + kGate * kRow, take(gate, kFewWarps * in.gate.token));
      cp_async16(to + kKey * kRow, take(k, kFewWarps * in.k.token));
      cp_async16(to + kValue * kRow, take(v, kFewWarps * in.v.token));
      cp_async16(to + kQuery * kRow, take(q, kFewWarps * in.q.token));
    }
    cp_async_commit();
  };

  // In a pool the plan comes before this kernel, and before the plan all that makes the rows. So these may be asked for while it is made.
  // Which they are hangs on the sequence's length; where that is a multiple of a tile, the guess is right.
  ScanTile tile{};
#pragma unroll 1
  for (bool planned = !kPool || s.cu_seqlens != nullptr;; planned = true) {
    if (planned) {
      const int64_t asked_from = tile.token;
      const int asked = tile.count;
      wait_for_earlier_kernels();
      let_next_kernel_start();
      tile = few_tile_of(p, item);
      if (tile.count > 0 && tile.count == asked && tile.token == asked_from) break;
      cp_async_wait<0>();
      if (tile.count <= 0) return;
    } else {
      const uint32_t n = p.tiles_of_row.quotient(item);
      tile.sequence.batch = n;
      tile.token = (item - n * p.per_row) * in.tile;
      tile.count = static_cast<int>(min(in.tile, max(s.tokens - tile.token, int64_t{0})));
    }
    ask(tile);
    if (planned) break;
  }
  const int64_t row = tile.sequence.batch;
  int64_t owner = tile.sequence.index;
  if constexpr (kPool) {
    owner = in.pool.entry[owner];
    if (owner < 0) {
      float zeros[8];
      zero(zeros);
      for (int at = warp; at < tile.count; at += kFewWarps) {
        if (lane.live) store_row(out_row_of<T>(p.y, row, tile.token + at, h, lane.d), zeros);
      }
      return;
    }
  }

  // Tokens of the tile, and the one behind it, that begin a chunk. Where chunks are longer than a tile, nothing is gated.
  const uint32_t length = static_cast<uint32_t>(s.reset);
  uint32_t begins = 0;
  const uint32_t position = static_cast<uint32_t>(tile.position);
  const uint32_t offset = position - p.reset.quotient(position) * length;
  for (uint32_t at = offset ? length - offset : 0; at <= kFewTokens; at += length) begins |= 1u << at;

  {
    // Elements 2 pair, 2 pair + 1 of lane `mine` of a warp: this thread's.
    const int mine = thread / 4, pair = thread % 4, index = mine % W;
    const int64_t of = batch * (32 / W) + mine / W, head = of < s.heads ? of : s.heads - 1;
    const int64_t d = (8 * index < s.head_dim ? 8 * index : 0) + 2 * pair;
    float2 bias = make_float2(0.0f, 0.0f), k_state = bias, v_state = bias;
    if (in.gate_bias) {
      const float* const from = in.gate_bias + head * s.head_dim + d;
      bias = make_float2(from[0] * kLogitUnit<T>, from[1] * kLogitUnit<T>);
    }
    const auto start_from = [&](const float* k, const float* v, int64_t at) {
      k_state = make_float2(k[at + d], k[at + d + 1]);
      v_state = make_float2(v[at + d], v[at + d + 1]);
    };
    if constexpr (kPool) {  // as pool_state()
      if (tile.first && offset != 0) {
        if (is_staged(s, in.pool, tile.sequence)) {
          start_from(in.pool.staged_k, in.pool.staged_v, (tile.sequence.index * s.heads + head) * s.head_dim);
        } else {
          start_from(in.pool.k, in.pool.v, running_at(s, in.pool, owner, head, tile.position - 1));
        }
      }
    } else if (in.initial_k && tile.first) {
      start_from(in.initial_k, in.initial_v, (tile.sequence.index * s.heads + head) * s.head_dim);
    }
    const uint32_t resets = gated ? begins : ~0u;
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll kWalk
    for (int at = 0; at < kFewTokens; ++at) {
      if (at >= tile.count) break;
      const auto word = [&](Row which) { return shared.row[which][at][mine].word[pair]; };
      float2 f = make_float2(0.0f, 0.0f), g = make_float2(1.0f, 1.0f);
      if (gated) {
        const float2 x = unpack2<T>(word(kGate));
        gates<T>(fmaf(x.x, kLogitUnit<T>, bias.x), f.x, g.x);
        gates<T>(fmaf(x.y, kLogitUnit<T>, bias.y), f.y, g.y);
      }
      if (resets >> at & 1) k_state = v_state = make_float2(0.0f, 0.0f);
      const float2 k = unpack2<T>(word(kKey)), v = unpack2<T>(word(kValue));
      k_state = make_float2(fmaf(f.x, k_state.x, g.x * k.x), fmaf(f.y, k_state.y, g.y * k.y));
      v_state = make_float2(fmaf(f.x, v_state.x, g.x * v.x), fmaf(f.y, v_state.y, g.y * v.y));
      shared.state[0][at].put(mine, pair, k_state);
      shared.state[1][at].put(mine, pair, v_state);
    }
  }
  __syncthreads();

  const int kept = kPool ? first_kept(in.pool, tile) : tile.count;
#pragma unroll kEach
  for (int i = 0; i < kFewTokens / kFewWarps; ++i) {
    const int at = warp + kFewWarps * i;
    if (at >= tile.count) break;
    const int64_t token = tile.token + at;
    float state[8], x[8];
    shared.state[1][at].get(state);
    if (lane.live) store_row(out_row_of<T>(p.y, row, token, h, lane.d), state);
    shared.state[0][at].get(state);
    load_row(reinterpret_cast<const T*>(&shared.row[kQuery][at][thread % 32]), x);
    const float own = group_sum<W>(lane.live ? dot(x, state) : 0.0f);
    if (lane.live && lane.index == 0) p.s_self[(row * s.heads + h) * s.tokens + token] = in.scale * own;
  }
  // Few tokens leave a state, and their code is long: once, not for each of a warp's tokens.
#pragma unroll 1
  for (int at = warp; at < tile.count; at += kFewWarps) {
    const bool leaves_key = begins >> (at + 1) & 1;
    const bool last = !kPool && tile.last && at == tile.count - 1 && p.running_k;
    if (!leaves_key && !last && at < kept) continue;
    float k_state[8], v_state[8];
    shared.state[0][at].get(k_state);
    shared.state[1][at].get(v_state);
    if (leaves_key) {
      const ChunkClock clock(s, tile.position + at);
      store_key<T, W, kPool>(p, owner, tile.sequence.index, lane, clock, k_state, v_state);
    }
    const auto keep = [&](float* k, float* v, int64_t place) {
      if (!lane.live) return;
      store_floats(k + place + lane.d, k_state);
      store_floats(v + place + lane.d, v_state);
    };
    if constexpr (kPool) {
      if (at >= kept) keep(in.pool.k, in.pool.v, running_at(s, in.pool, owner, h, tile.position + at));
    } else if (last) {
      keep(p.running_k, p.running_v, (tile.sequence.index * s.heads + h) * s.head_dim);
    }
  }
}

// ---- launches ---------------------------------------------------------------------------------------------------------

template <bool kAttention, bool kPool>
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
    constexpr int kShared = Ring<typename V::T, kAttention>::kBytes;
    const auto launch = [&](auto* kernel) {
      allow_shared_memory(kernel, kShared, "chunk_prepare_fwd shared memory");
      kernel<<<grid_x(blocks, "chunk_prepare_fwd"), kThreads, kShared, stream>>>(p);
      check_launch("chunk_prepare_fwd");
    };
    if constexpr (kAttention && sizeof(typename V::T) == 2) {
      if (p.narrow != 0) return launch(chunk_prepare_fwd_kernel<typename V::T, V::W, true, kPool, true>);
    }
    launch(chunk_prepare_fwd_kernel<typename V::T, V::W, kAttention, kPool, false>);
  });
}

int64_t few_tile(const Sizes& s, bool gated) { return tile_size(s, gated, kMaxChunkFwd, kFewTokens); }

template <bool kPool>
void launch_few(const PrepareFwd& prepare, cudaStream_t stream) {
  FewFwd p{prepare};
  with_variant(p.in.size, "rat_attention", [&](auto variant) {
    using V = decltype(variant);
    if constexpr (sizeof(typename V::T) == 2) {
      plan_tiles<V>(p.in, few_tile(p.in.size, p.in.gate.ptr != nullptr));
      const Sizes& s = p.in.size;
      const int64_t blocks = p.in.items * p.in.head_batches, per_row = tiles_per_row(s, p.in.tile);
      if (blocks == 0) return;
      p.per_row = static_cast<uint32_t>(per_row);
      p.head_batches = Divisor(p.in.head_batches);
      p.tiles_of_row = Divisor(per_row);
      p.tile = Divisor(p.in.tile);
      p.reset = Divisor(s.reset);
      p.heads_per_k_group = Divisor(s.heads / s.k_groups);
      p.heads_per_q_group = Divisor(s.heads / s.q_groups);
      auto* const kernel = chunk_prepare_few_fwd_kernel<typename V::T, V::W, kPool>;
      allow_shared_memory(kernel, sizeof(FewShared), "chunk_prepare_few_fwd shared memory");
      launch_overlapping(kernel, blocks, kThreads, sizeof(FewShared), stream, "chunk_prepare_few_fwd", p);
    }
  });
}

PrepareFwd prepare_fwd(const AttentionFwdParams& a, const FwdScratch& scratch, const PoolStates* pool) {
  PrepareFwd p{};
  p.in = scan_input(a);
  p.y = a.y;
  p.s_self = scratch.s_self;
  p.chunks = a.chunks;
  p.running_k = static_cast<float*>(a.running_k);
  p.running_v = static_cast<float*>(a.running_v);
  const int64_t bytes = a.size.dtype == DType::f32 ? 4 : 2;
  const auto narrow = [&](Row row, const Rows& rows) { return rows_are_wide(rows, bytes) ? 0u : 1u << row; };
  p.narrow = narrow(kGate, a.gate) | narrow(kKey, a.k) | narrow(kValue, a.v);
  if (pool) p.in.pool = *pool;
  return p;
}

}  // namespace

const char* few_scan::refuses(const AttentionFwdParams& a) {
  const Sizes& s = a.size;
  const bool gated = a.gate.ptr != nullptr;
  if (s.dtype != DType::bf16 && s.dtype != DType::f16) return "the dtype is not bfloat16 or float16";
  if (gated && s.reset > kFewTokens) return "chunks are longer than 16 tokens";
  // Measured on 132 multiprocessors: with 2 tiles for each it takes two thirds of the time of `scan`, with 16 more than that (a whole
  // forward 67.6 us instead of 54.4). Where they meet lies between and was not looked for.
  const int64_t tiles = work_items(s, few_tile(s, gated)) * ceil_div(s.heads, s.head_dim <= 64    ? 4
                                                                              : s.head_dim <= 128 ? 2
                                                                                                  : 1);
  if (tiles > 8 * device_attribute<cudaDevAttrMultiProcessorCount>()) return "the call has many tiles";
  return nullptr;
}

Launch few_scan::prepare(const AttentionFwdParams& a, const FwdScratch& scratch, const PoolStates* pool, Arena&) {
  return [&a, scratch, pool](cudaStream_t stream) {
    const PrepareFwd p = prepare_fwd(a, scratch, pool);
    if (pool) return launch_few<true>(p, stream);
    carry_state_fwd(a, stream);
    launch_few<false>(p, stream);
  };
}

const char* scan::refuses(const AttentionFwdParams&) { return nullptr; }

Launch scan::prepare(const AttentionFwdParams& a, const FwdScratch& scratch, const PoolStates* pool, Arena& arena) {
  const Piece<float> incoming = take_segments(a.size, a.gate.ptr != nullptr, kMaxChunkFwd, 3, arena);
  return [&a, scratch, pool, incoming](cudaStream_t stream) {
    PrepareFwd p = prepare_fwd(a, scratch, pool);
    if (incoming.taken()) {
      p.in.incoming = incoming;
      scan_segments(p.in, true, incoming, stream);
    }
    if (pool) return launch_prepare<true, true>(p, "rat_attention", stream);
    carry_state_fwd(a, stream);
    launch_prepare<true, false>(p, "rat_attention", stream);
  };
}

void recurrence_fwd(const RecurrenceFwdParams& r, const Allocator& allocator, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  Arena arena;
  const Piece<float> incoming = take_segments(r.size, true, kMaxChunkFwd, 2, arena);
  arena.commit(allocator);
  if (r.size.cu_seqlens || r.size.lengths) check_sequences(r.size, -1, -1, -1, nullptr, stream);
  PrepareFwd p{};
  p.in = scan_input(r);
  p.y = r.y;
  p.running_k = static_cast<float*>(r.final_state);
  if (incoming.taken()) {
    p.in.incoming = incoming;
    scan_segments(p.in, false, incoming, stream);
  }
  if (r.final_state) copy_empty(r.size, p.in.initial_k, p.running_k, stream);
  launch_prepare<false, false>(p, "chunk_recurrence", stream);
}

KernelList forward_kernels() {
  static const KernelTable table = [] {
    KernelTable t;
    for_each_variant([&](auto variant, const char* type) {
      using V = decltype(variant);
      using T = typename V::T;
      t.add("chunk_prepare_fwd", variant, type, chunk_prepare_fwd_kernel<T, V::W, true, false, false>);
      t.add("chunk_prepare_pool_fwd", variant, type, chunk_prepare_fwd_kernel<T, V::W, true, true, false>);
      if constexpr (sizeof(T) == 2) {
        t.add("chunk_prepare_narrow_fwd", variant, type, chunk_prepare_fwd_kernel<T, V::W, true, false, true>);
        t.add("chunk_prepare_narrow_pool_fwd", variant, type, chunk_prepare_fwd_kernel<T, V::W, true, true, true>);
        t.add("chunk_prepare_few_fwd", variant, type, chunk_prepare_few_fwd_kernel<T, V::W, false>);
        t.add("chunk_prepare_few_pool_fwd", variant, type, chunk_prepare_few_fwd_kernel<T, V::W, true>);
      }
      t.add("chunk_recurrence_fwd", variant, type, chunk_prepare_fwd_kernel<T, V::W, false, false, false>);
    });
    return t;
  }();
  return table.list();
}

}  // namespace rat::cuda
