// Chunk attention backward on Hopper (sm_90a), for bfloat16 and float16 and heads over 128, up to 256. Deterministic: every sum is
// taken by one block, in one order; no block waits for another.
//
// With P_tj = exp(scale (R q)_t . K_j - lse_t) and dS_tj = P_tj (dO_t . V_j - Delta_t). Five products in one kernel, as sm90_bwd.cu
// has them, do not fit the registers: two kernels that both compute S and dP.
//  0. rotate (rotate_reduce.cu): R q in T to dq's memory.
//  1. dkdv: a block owns (64 chunk states, head, share of the queries) and walks the query tiles of 64 that see them, from the last
//     token of the sequence backwards. 4 products: S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q.
//       warp 0       one thread feeds K, V and the rings of q and dO.
//       warp 1       lse beside q, Delta beside dO.
//       warpgroup 1  S^T and P^T, which it leaves in shared memory; columns 0 ... 127 of dV and dK.
//       warpgroup 2  dP^T and, with the P^T of the other, dS^T, to shared memory too; the other columns of dV and dK.
//     S^T and dP^T of the next tile are computed behind dK of this one.
//  2. dq: a block owns (128 queries, or 64 where that leaves multiprocessors idle, of one sequence and query group) and walks the keys
//     that they see, 64 at a time, head after head, so that the sum over the group never leaves registers. 3 products: S = Q K^T,
//     dP = dO V^T, dQ += dS K, dS being a left operand in registers. Rotates back, writes float32.
//       warp 0       one thread feeds q once, dO once per head, and the rings of K and V.
//       warpgroups 1, 2  64 queries each; they share K and V, else neither knows of the other until dQ leaves.
//  3. reduce (rotate_reduce.cu): adds the shares of the queries, if any.
//
// Shared memory, 224 KB in either: dkdv has K, V, two stages of q and dO, two of P^T, one of dS^T; dq has q, dO, two stages of K, one
// of V. Tiles lie in panels of 64 columns, 128 bytes per row, 16-byte pieces swizzled; columns past D are zeros.
//
// Chunk rows past the closed ones and tokens past the end of a packed sequence may hold anything, NaN too. As rows of a product they
// spoil only rows that nobody stores; where a product sums over them (q and dO in dkdv, K in dq) they are set to zero in shared
// memory, and their weight is zero: queries past the end have an lse of +inf, keys that are not seen are masked.
#include <cuda.h>

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "../device/math.cuh"
#include "../device/sequence.cuh"
#include "../host/launch.h"
#include "../ptx/mbarrier.cuh"
#include "../ptx/memory.cuh"
#include "../ptx/mma.cuh"
#include "../ptx/opaque.cuh"
#include "../ptx/registers.cuh"
#include "../ptx/target.cuh"
#include "../ptx/tma.cuh"
#include "../ptx/wgmma.cuh"
#include "families.h"
#include "rotate_reduce.h"
#include "row_maps.h"
#include "tiles.cuh"

namespace rat::cuda {
namespace {

constexpr int kRows = 64;  // queries or keys of a tile
constexpr uint32_t kPanelBytes = kRows * 128;
constexpr int kScores = kRows / 2;  // accumulators of a 64 x 64 product
constexpr int kSteps = kRows / 16;  // of the products that sum over a tile's rows

template <class T_, int DIM>
struct Wide {
  using T = T_;
  static constexpr int kDim = DIM;  // head size, padded
  static constexpr int kPanels = DIM / 64;
  static constexpr uint32_t kTileBytes = kPanels * kPanelBytes;
  // The columns of a 64 x D sum in two parts; each starts at a panel.
  static constexpr int kFirst = 128, kSecond = DIM - 128;
  static_assert(DIM == 192 || DIM == 256);
};

// Of the hardware: 0 is that of __syncthreads().
enum NamedBarrier {
  kTilesUsedUp = 1,    // dq: all products are done, their operands' memory takes dQ
  kOutputWritten = 2,  // dq: dQ is whole
  kKeysCleared = 3,    // dq: rows of K that nobody sees are zeros; warpgroup w has number kKeysCleared + w
};

// What both kernels read.
struct Arguments {
  Sizes size;
  ChunkStates chunks;
  float scale;
  float scale_log2;
  const float* lse;
  const float* delta;
  uint32_t heads_per_group;
};

// ---- steps of a consumer thread ---------------------------------------------------------------------------------------

// c = left (64 x D) right^T (D x 64)
template <class C>
__device__ __forceinline__ void issue_scores(float (&c)[kScores], uint64_t left, uint64_t right) {
  using T = typename C::T;
  wgmma_ss<T, 64, false>(c, left, right);
#pragma unroll
  for (int step = 1; step < C::kDim / 16; ++step) {
    const uint32_t offset = step / 4 * kPanelBytes + step % 4 * 32;
    wgmma_ss<T, 64, true>(c, descriptor_add(left, offset), descriptor_add(right, offset));
  }
  wgmma_commit();
}

// c += left (64 x 64) right (64 x COLUMNS), both in shared memory
template <class T, int COLUMNS>
__device__ __forceinline__ void issue_sums(float (&c)[COLUMNS / 2], uint64_t left, uint64_t right) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    wgmma_ss_n_major<T, COLUMNS, true>(c, descriptor_add(left, step * 32), descriptor_add(right, step * 2048));
  }
  wgmma_commit();
}

// One arrival per warp.
__device__ __forceinline__ void leave(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
}

// To a barrier that counts the warps of both consumers, and on when all have come for the time-th time, from 0.
__device__ __forceinline__ void meet(uint64_t& barrier, uint32_t time) {
  leave(shared_address(&barrier));
  mbarrier_wait(shared_address(&barrier), time & 1);
}

// Rows [from, 64) of a tile become zeros, by THREADS threads of which this is number `thread`. Fence and barrier are the caller's.
template <class C, int THREADS>
__device__ __forceinline__ void clear_rows(uint32_t tile, int from, int thread) {
#pragma unroll 1
  for (int i = from * 8 + thread; i < kRows * 8; i += THREADS) {
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) clear_shared16(tile + panel * kPanelBytes + i * 16);
  }
}

// ---- dkdv -------------------------------------------------------------------------------------------------------------

struct DkdvArguments {
  Arguments call;
  float* dchunk_k;  // share s of the queries adds s * share_stride
  float* dchunk_v;
  int64_t share_stride;
  uint32_t shares;
};

// What a block does: query tiles last, last - 1, ... last - steps + 1 of its sequence. Made by thread 0.
struct KeyItem {
  int64_t scalars;      // offset of the sequence's first token in lse and Delta
  int64_t states;       // offset of the first key in dchunk_k, dchunk_v
  VisibleFrom visible;  // which queries see its keys
  int32_t token;        // of the sequence's first token
  int32_t batch;
  int32_t head;
  int32_t group;
  int32_t length;  // tokens of the sequence
  int32_t last;
  int32_t steps;
  int32_t keys;     // valid chunk states; 0: nothing to do
  int32_t key_row;  // of the first one in the tensor map
  int32_t key_outer;
};

template <class C>
struct DkdvShared {
  using T = typename C::T;
  alignas(1024) T k[C::kTileBytes / 2];
  alignas(1024) T v[C::kTileBytes / 2];
  alignas(1024) T q[2][C::kTileBytes / 2];
  alignas(1024) T dout[2][C::kTileBytes / 2];
  alignas(1024) T p[2][kPanelBytes / 2];  // [key][query]
  alignas(1024) T ds[kPanelBytes / 2];    // [key][query]
  float minus_lse[2][kRows];              // in powers of two
  float delta[2][kRows];
  KeyItem item;
  // Filled by / left by. An arrival of a consumer stands for a warp.
  RingBarriers<1> states;      // K and V. Warp 0's copies / nobody: a block has one item
  RingBarriers<2> q_tiles;     // q and lse. Warp 0's copies and the lanes of warp 1 / consumers
  RingBarriers<2> dout_tiles;  // dO and Delta. The same
  // All consumers come to these and wait. No named barriers: those want one instruction for all, and the roles have code of their own.
  uint64_t
      weights_written;  // warpgroup 1 has written P^T, both have done with what the tile before left in shared memory
  uint64_t gradients_written;  // warpgroup 2 has written dS^T
  uint64_t rows_cleared;       // rows past the end of q and dO are zeros

  __device__ __forceinline__ void init_barriers() {
    states.init(1, 8);
    q_tiles.init(1 + 32, 8);
    dout_tiles.init(1 + 32, 8);
    mbarrier_init(shared_address(&weights_written), 8);
    mbarrier_init(shared_address(&gradients_written), 8);
    mbarrier_init(shared_address(&rows_cleared), 8);
  }
};

constexpr int kThreads = 384;
constexpr int kDkdvProducerRegisters = 56, kDkdvConsumerRegisters = 224;

// Shares of a tile are neighbours, then tiles, heaviest (earliest keys) first, then heads: blocks of one head that run together
// find q and dO in L2.
__device__ __forceinline__ void describe(const DkdvArguments& a, KeyItem& item) {
  const Sizes& s = a.call.size;
  const ChunkStates& c = a.call.chunks;
  const int share = static_cast<int>(modulo(blockIdx.x, a.shares));
  const int64_t tile_head = quotient(blockIdx.x, a.shares);
  const int64_t tiles = c.compact ? c.rows / kRows + s.sequences : (c.rows + kRows - 1) / kRows;
  const int64_t pair = quotient(tile_head, tiles), head = modulo(pair, s.heads);
  const int64_t tile_index = modulo(tile_head, tiles) + (c.compact ? 0 : quotient(pair, s.heads) * tiles);
  const KeyTile tile = key_tile(s, c, tile_index, kRows);
  item.keys = 0;
  if (tile.first >= tile.closed) return;
  const Sequence& q = tile.sequence;
  item.scalars = (q.batch * s.heads + head) * s.tokens + q.begin;
  item.states = chunk_offset(s, c, q.index, head) + tile.first * s.head_dim + share * a.share_stride;
  item.visible = VisibleFrom(s, q, tile.first);
  item.token = static_cast<int>(q.begin);
  item.batch = static_cast<int>(q.batch);
  item.head = static_cast<int>(head);
  item.group = static_cast<int>(head / a.call.heads_per_group);
  item.length = static_cast<int>(q.end - q.begin);
  const QueryWalk walk = query_walk<kRows>(item.visible, item.length, share, static_cast<int>(a.shares));
  item.last = walk.last - walk.begin;
  item.steps = walk.end - walk.begin;
  item.keys = static_cast<int>(min(static_cast<int64_t>(kRows), tile.closed - tile.first));
  item.key_row = static_cast<int>(first_chunk_row(s, c, q.index) + tile.first);
  item.key_outer = static_cast<int>(c.compact ? head : q.index * s.heads + head);
}

// A 64 x D tile of a map of rank 3 (row, outer) or 4 (row, inner, outer).
template <class C, class... Place>
__device__ __forceinline__ void load_panels(const CUtensorMap& map, uint32_t target, uint32_t full, Place... place) {
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    tma_load(target + panel * kPanelBytes, &map, full, 64 * panel, place...);
  }
}

template <class C>
__device__ __forceinline__ void feed_dkdv(const CUtensorMap& k_map, const CUtensorMap& v_map, const CUtensorMap& q_map,
                                          const CUtensorMap& dout_map, DkdvShared<C>& shared) {
  const KeyItem& item = shared.item;
  const int steps = item.steps;
  const Ring<1> states(shared.states);
  Ring<2> q_tiles(shared.q_tiles), dout_tiles(shared.dout_tiles);
  mbarrier_arrive_expect(states.full(), 2 * C::kTileBytes);
  load_panels<C>(k_map, shared_address(shared.k), states.full(), item.key_row, item.key_outer);
  load_panels<C>(v_map, shared_address(shared.v), states.full(), item.key_row, item.key_outer);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int token = item.token + (item.last - step) * kRows;
    dout_tiles.wait_empty();  // consumers leave it before q
    mbarrier_arrive_expect(dout_tiles.full(), C::kTileBytes);
    load_panels<C>(dout_map, shared_address(shared.dout[dout_tiles.slot()]), dout_tiles.full(), token, item.head,
                   item.batch);
    dout_tiles.next();
    q_tiles.wait_empty();
    mbarrier_arrive_expect(q_tiles.full(), C::kTileBytes);
    load_panels<C>(q_map, shared_address(shared.q[q_tiles.slot()]), q_tiles.full(), token, item.group, item.batch);
    q_tiles.next();
  }
}

template <class C>
__device__ __forceinline__ void feed_scalars(const Arguments& a, DkdvShared<C>& shared, int lane) {
  const KeyItem& item = shared.item;
  const int steps = item.steps, length = item.length;
  const float* lse = a.lse + item.scalars;
  const float* delta = a.delta + item.scalars;
  Ring<2> q_tiles(shared.q_tiles), dout_tiles(shared.dout_tiles);
  int row = item.last * kRows + lane;
#pragma unroll 1
  for (int step = 0; step < steps; ++step, row -= kRows, q_tiles.next(), dout_tiles.next()) {
    float x[2], y[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool valid = row + 32 * i < length;
      x[i] = valid ? lse[row + 32 * i] * -kLog2e : -INFINITY;
      y[i] = valid ? delta[row + 32 * i] : 0.0f;
    }
    const uint32_t slot = q_tiles.slot();
    dout_tiles.wait_empty();
#pragma unroll
    for (int i = 0; i < 2; ++i) shared.delta[slot][lane + 32 * i] = y[i];
    mbarrier_arrive(dout_tiles.full());
    q_tiles.wait_empty();
#pragma unroll
    for (int i = 0; i < 2; ++i) shared.minus_lse[slot][lane + 32 * i] = x[i];
    mbarrier_arrive(q_tiles.full());
  }
}

// What the mask of P^T needs of a thread: it has keys `key` and key + 8 of the tile. Queries of a tile that starts before `clear` may
// not see all of them: query row + c, c being a column less 2 quad, sees key + 8 h when row + c >= seen[h].
struct KeyMask {
  int clear;
  int seen[2];
};

// P^T from S^T, rounded, to shared memory. `lane_tile` is this lane's address in the tile for stmatrix.
template <class T>
__device__ __forceinline__ void write_weights(float (&s)[kScores], const float* minus_lse, float scale_log2, int row,
                                              const KeyMask& mask, uint32_t lane_tile) {
#pragma unroll
  for (int i = 0; i < kScores / 4; ++i) {
    const float2 l = *reinterpret_cast<const float2*>(minus_lse + 8 * i);
    s[4 * i] = exp2_fast(fmaf(s[4 * i], scale_log2, l.x));
    s[4 * i + 1] = exp2_fast(fmaf(s[4 * i + 1], scale_log2, l.y));
    s[4 * i + 2] = exp2_fast(fmaf(s[4 * i + 2], scale_log2, l.x));
    s[4 * i + 3] = exp2_fast(fmaf(s[4 * i + 3], scale_log2, l.y));
  }
  if (row < mask.clear) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      if (row + i / 4 * 8 + i % 2 < mask.seen[i / 2 % 2]) s[i] = 0.0f;
    }
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t p[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) p[i] = pack2<T>(s[8 * step + 2 * i], s[8 * step + 2 * i + 1]);
    stmatrix_x4(lane_tile ^ (step * 32), p);
  }
  fence_proxy_async();  // ordinary stores, read by wgmma
}

// dS^T from dP^T and the rounded P^T of the other consumer, rounded, to shared memory.
template <class T>
__device__ __forceinline__ void write_gradients(const float (&dp)[kScores], const float* delta, uint32_t p_lane,
                                                uint32_t ds_lane) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t p[4], ds[4];
    ldmatrix_x4(p, p_lane ^ (step * 32));
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // tile 2 step + i / 2 of the accumulators, row + 8 (i % 2)
      const float2 d = *reinterpret_cast<const float2*>(delta + 16 * step + i / 2 * 8);
      const float2 w = unpack2<T>(p[i]);
      ds[i] = pack2<T>(w.x * (dp[8 * step + 2 * i] - d.x), w.y * (dp[8 * step + 2 * i + 1] - d.y));
    }
    stmatrix_x4(ds_lane ^ (step * 32), ds);
  }
  fence_proxy_async();  // ordinary stores, read by wgmma
}

// ROLE 0: P^T and the first columns of the sums. ROLE 1: dS^T and the others.
template <class C, int ROLE>
__device__ __forceinline__ void consume_dkdv(const DkdvArguments& a, DkdvShared<C>& shared) {
  using T = typename C::T;
  constexpr int kColumns = ROLE == 0 ? C::kFirst : C::kSecond, kSums = kColumns / 2;
  constexpr uint32_t kColumnOffset = ROLE == 0 ? 0 : C::kFirst / 64 * kPanelBytes;
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, quad = lane % 4;
  const int key = thread / 32 * 16 + lane / 4;
  // Matrices 0 ... 3 of step k are (keys 0 ..., queries 16 k ...), (keys 8 ..., same), (keys 0 ..., queries 16 k + 8 ...),
  // (keys 8 ..., same) of the warp's 16 keys.
  const uint32_t lane_offset = (thread / 32 * 16 + lane / 8 % 2 * 8 + lane % 8) * 128 + ((lane / 16) ^ (lane % 8)) * 16;
  const uint32_t p_lane = shared_address(shared.p) + lane_offset, ds_lane = shared_address(shared.ds) + lane_offset;
  const uint64_t left = descriptor_k_major(ROLE == 0 ? shared_address(shared.k) : shared_address(shared.v));
  const uint64_t right = descriptor_k_major(ROLE == 0 ? shared_address(shared.q) : shared_address(shared.dout));
  const uint64_t p_left = descriptor_k_major(shared_address(shared.p));
  const uint64_t ds_left = descriptor_k_major(shared_address(shared.ds));
  const uint64_t q_rows = descriptor_n_major(shared_address(shared.q) + kColumnOffset, kPanelBytes);
  const uint64_t dout_rows = descriptor_n_major(shared_address(shared.dout) + kColumnOffset, kPanelBytes);

  const KeyItem& item = shared.item;
  float dk[kSums], dv[kSums], s[kScores];  // s: S^T or dP^T
#pragma unroll
  for (int i = 0; i < kSums; ++i) dk[i] = dv[i] = 0.0f;
  // Else the zeros move to where the first products are in flight, which then wait for each other.
  hold_registers(dk);
  hold_registers(dv);

  const int steps = warp_uniform(item.steps);
  if (steps > 0) {
    const int last = warp_uniform(item.last), rows = warp_uniform(item.length) - last * kRows;
    KeyMask mask;
    mask.clear = warp_uniform(clamp_token(item.visible.of(kRows - 1)));
#pragma unroll
    for (int h = 0; h < 2; ++h) mask.seen[h] = clamp_token(item.visible.of(key + 8 * h) - 2 * quad);
    Ring<2> q_tiles(shared.q_tiles), dout_tiles(shared.dout_tiles);

    // The first tile, which may end past the sequence, and its scores. Those of each other tile go with the products of the tile
    // before.
    Ring<1>(shared.states).wait_full();
    q_tiles.wait_full();
    dout_tiles.wait_full();
    if (rows < kRows) {
      clear_rows<C, 256>(shared_address(shared.q[0]), rows, threadIdx.x - 128);
      clear_rows<C, 256>(shared_address(shared.dout[0]), rows, threadIdx.x - 128);
      fence_proxy_async();  // ordinary stores, read by wgmma
      meet(shared.rows_cleared, 0);
    }
    hold_registers(s);
    wgmma_fence();
    issue_scores<C>(s, left, right);
    wgmma_wait<0>();
    hold_registers(s);
    if constexpr (ROLE == 0) {
      write_weights<T>(s, shared.minus_lse[0] + 2 * quad, a.call.scale_log2, last * kRows, mask, p_lane);
    }
    // One query tile. Nothing is in flight from one tile to the next: the compiler would not keep track of it.
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const uint32_t slot = q_tiles.slot();
      const uint32_t q_empty = q_tiles.empty(), dout_empty = dout_tiles.empty();
      if constexpr (ROLE == 0) {
        dout_tiles.wait_full();
      } else {
        q_tiles.wait_full();
      }
      meet(shared.weights_written, step);
      hold_registers(dv);
      wgmma_fence();
      issue_sums<T, kColumns>(dv, descriptor_add(p_left, slot * kPanelBytes),
                              descriptor_add(dout_rows, slot * C::kTileBytes));
      if constexpr (ROLE == 1) {
        write_gradients<T>(s, shared.delta[slot] + 2 * quad, p_lane + slot * kPanelBytes, ds_lane);
      }
      meet(shared.gradients_written, step);
      hold_registers(dk);
      wgmma_fence();
      issue_sums<T, kColumns>(dk, ds_left, descriptor_add(q_rows, slot * C::kTileBytes));

      // After the last tile, the scores of that one again, for nobody: how many products are in flight is then a constant.
      q_tiles.next();
      dout_tiles.next();
      const bool more = step + 1 < steps;
      if (more) {
        if constexpr (ROLE == 0) {
          q_tiles.wait_full();
        } else {
          dout_tiles.wait_full();
        }
      }
      const uint32_t next = more ? slot ^ 1 : slot;
      hold_registers(s);
      wgmma_fence();
      issue_scores<C>(s, left, descriptor_add(right, next * C::kTileBytes));
      wgmma_wait<2>();  // dV
      hold_registers(dv);
      leave(dout_empty);
      wgmma_wait<1>();  // dK
      hold_registers(dk);
      leave(q_empty);
      wgmma_wait<0>();
      hold_registers(s);
      // Its place in shared memory was that of the tile before this one: the other consumer came to the last barrier
      // weights_written after its product with that. dS^T has one place: no consumer comes to weights_written with dK in flight.
      if constexpr (ROLE == 0) {
        if (more) {
          write_weights<T>(s, shared.minus_lse[next] + 2 * quad, a.call.scale_log2, (last - step - 1) * kRows, mask,
                           p_lane + next * kPanelBytes);
        }
      }
    }
  }

  const int head_dim = static_cast<int>(a.call.size.head_dim), keys = item.keys;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int j = key + 8 * h;
    if (j >= keys) continue;
    const int first = (ROLE == 0 ? 0 : C::kFirst) + 2 * quad;
    const int64_t at = item.states + static_cast<int64_t>(j) * head_dim + first;
    float* to_k = a.dchunk_k + at;
    float* to_v = a.dchunk_v + at;
#pragma unroll
    for (int i = 0; i < kSums / 4; ++i) {
      if (first + 8 * i < head_dim) {
        *reinterpret_cast<float2*>(to_k + 8 * i) =
            make_float2(dk[4 * i + 2 * h] * a.call.scale, dk[4 * i + 2 * h + 1] * a.call.scale);
        *reinterpret_cast<float2*>(to_v + 8 * i) = make_float2(dv[4 * i + 2 * h], dv[4 * i + 2 * h + 1]);
      }
    }
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    chunk_attention_dkdv_bwd_sm90_kernel(const __grid_constant__ DkdvArguments a,
                                         const __grid_constant__ CUtensorMap k_map,
                                         const __grid_constant__ CUtensorMap v_map,
                                         const __grid_constant__ CUtensorMap q_map,
                                         const __grid_constant__ CUtensorMap dout_map) {
#ifdef RAT_HOPPER_CODE
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  DkdvShared<C>& shared = *reinterpret_cast<DkdvShared<C>*>(raw_shared);
  if (shared_address(raw_shared) % 1024 != 0) __trap();
  const int warpgroup = warp_uniform(static_cast<int>(threadIdx.x) / 128);
  if (threadIdx.x == 0) {
    shared.init_barriers();
    mbarrier_init_fence();
    describe(a, shared.item);
  }
  __syncthreads();  // barriers and item are ready
  if (shared.item.keys == 0) return;
  if (warpgroup == 0) {
    give_registers<kDkdvProducerRegisters>();
    if (shared.item.steps > 0) {
      if (threadIdx.x == 0) {
        feed_dkdv<C>(k_map, v_map, q_map, dout_map, shared);
      } else if (threadIdx.x / 32 == 1) {
        feed_scalars<C>(a.call, shared, threadIdx.x % 32);
      }
    }
  } else {
    take_registers<kDkdvConsumerRegisters>();
    if (warpgroup == 1) {
      consume_dkdv<C, 0>(a, shared);
    } else {
      consume_dkdv<C, 1>(a, shared);
    }
  }
#endif
}

// ---- dq ---------------------------------------------------------------------------------------------------------------

struct DqArguments {
  Arguments call;
  TileOrder order;
  const float* cos;
  const float* sin;
  float* dq;  // (B, T, q_groups, D)
};

// CONSUMERS: warpgroups, 64 queries each. The bits do not depend on it: blocks of keys start at the same ones.
template <int CONSUMERS>
constexpr int kDqQueries = kRows * CONSUMERS;
constexpr int kDqProducerRegisters = 40, kDqConsumerRegisters = 232;

// What a block does: `blocks` blocks of keys of each head of a group. Made by thread 0.
struct QueryItem {
  int64_t batch, first_token, group;
  int64_t position;  // of the first row
  int64_t scalars;   // offset of the first row of the group's first head in lse and Delta
  VisibleKeys visible;
  int32_t rows;  // 0: nothing to do
  int32_t blocks;
  int32_t key_row;    // of key 0 in the tensor map
  int32_t key_outer;  // of the group's first head
};

template <class C, int CONSUMERS>
struct DqShared {
  using T = typename C::T;
  alignas(1024) T q[CONSUMERS][C::kTileBytes / 2];
  alignas(1024) T dout[CONSUMERS][C::kTileBytes / 2];
  alignas(1024) T k[2][C::kTileBytes / 2];
  alignas(1024) T v[C::kTileBytes / 2];
  QueryItem item;
  // Filled by warp 0's copies / left by consumers, one arrival per warp.
  RingBarriers<1> queries;  // q; nobody leaves it, a block has one item
  RingBarriers<1> douts;    // dO of a head
  RingBarriers<2> keys;     // a block of K
  RingBarriers<1> values;   // a block of V

  __device__ __forceinline__ void init_barriers() {
    queries.init(1, 4 * CONSUMERS);
    douts.init(1, 4 * CONSUMERS);
    keys.init(1, 4 * CONSUMERS);
    values.init(1, 4 * CONSUMERS);
  }
};

// At the end the memory of the tiles holds dQ in float32, for the rotation, which pairs columns that lie in different lanes.
template <class C>
constexpr int kOutStride = C::kDim + 8;  // floats: float2 stores of a warp then cover all banks

template <int CONSUMERS>
__device__ __forceinline__ void describe(const DqArguments& a, QueryItem& item) {
  const Sizes& s = a.call.size;
  int64_t group;
  const WorkItem work = ordered_item(s, a.order, blockIdx.x, kDqQueries<CONSUMERS>, &group);
  const Sequence& q = work.sequence;
  const int64_t before = work.tile * kDqQueries<CONSUMERS>;
  item.rows = 0;
  if (q.begin + before >= q.end) return;
  item.batch = q.batch;
  item.first_token = q.begin + before;
  item.group = group;
  item.position = q.start + before;
  item.scalars = (q.batch * s.heads + group * a.call.heads_per_group) * s.tokens + item.first_token;
  item.rows = static_cast<int>(min(static_cast<int64_t>(kDqQueries<CONSUMERS>), q.end - item.first_token));
  item.visible = VisibleKeys(s, item.position);
  item.blocks = item.visible.blocks(item.rows, kRows);
  const int64_t head = group * a.call.heads_per_group;
  item.key_row = static_cast<int>(first_chunk_row(s, a.call.chunks, q.index));
  item.key_outer = static_cast<int>(a.call.chunks.compact ? head : q.index * s.heads + head);
}

template <class C, int CONSUMERS>
__device__ __forceinline__ void feed_dq(const DqArguments& a, const CUtensorMap& k_map, const CUtensorMap& v_map,
                                        const CUtensorMap& q_map, const CUtensorMap& dout_map,
                                        DqShared<C, CONSUMERS>& shared) {
  const QueryItem& item = shared.item;
  const int blocks = item.blocks, heads = static_cast<int>(a.call.heads_per_group);
  const int token = static_cast<int>(item.first_token), batch = static_cast<int>(item.batch);
  const int group = static_cast<int>(item.group);
  const Ring<1> queries(shared.queries);
  Ring<1> douts(shared.douts), values(shared.values);
  Ring<2> keys(shared.keys);
  mbarrier_arrive_expect(queries.full(), CONSUMERS * C::kTileBytes);
  for (int w = 0; w < CONSUMERS; ++w) {
    load_panels<C>(q_map, shared_address(shared.q[w]), queries.full(), token + w * kRows, group, batch);
  }
#pragma unroll 1
  for (int head = 0; head < heads; ++head) {
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      const int row = item.key_row + block * kRows, outer = item.key_outer + head;
      keys.wait_empty();
      mbarrier_arrive_expect(keys.full(), C::kTileBytes);
      load_panels<C>(k_map, shared_address(shared.k[keys.slot()]), keys.full(), row, outer);
      keys.next();
      if (block == 0) {
        douts.wait_empty();
        mbarrier_arrive_expect(douts.full(), CONSUMERS * C::kTileBytes);
        for (int w = 0; w < CONSUMERS; ++w) {
          load_panels<C>(dout_map, shared_address(shared.dout[w]), douts.full(), token + w * kRows,
                         group * heads + head, batch);
        }
        douts.next();
      }
      values.wait_empty();
      mbarrier_arrive_expect(values.full(), C::kTileBytes);
      load_panels<C>(v_map, shared_address(shared.v), values.full(), row, outer);
      values.next();
    }
  }
}

template <class C, int CONSUMERS>
__device__ __forceinline__ void consume_dq(const DqArguments& a, DqShared<C, CONSUMERS>& shared, int warpgroup) {
  using T = typename C::T;
  const int thread = threadIdx.x % 128, quad = threadIdx.x % 4;
  const int row = warpgroup * kRows + thread / 32 * 16 + threadIdx.x % 32 / 4;  // of this thread; it also has row + 8
  const QueryItem& item = shared.item;
  const int blocks = warp_uniform(item.blocks), rows = warp_uniform(item.rows);
  const int heads = static_cast<int>(a.call.heads_per_group);

  float first[C::kFirst / 2], second[C::kSecond / 2];  // dQ
#pragma unroll
  for (int i = 0; i < C::kFirst / 2; ++i) first[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < C::kSecond / 2; ++i) second[i] = 0.0f;
  hold_registers(first);
  hold_registers(second);

  if (blocks > 0) {
    const uint64_t q_left = descriptor_k_major(shared_address(shared.q[0]) + warpgroup * C::kTileBytes);
    const uint64_t dout_left = descriptor_k_major(shared_address(shared.dout[0]) + warpgroup * C::kTileBytes);
    const uint64_t k_columns = descriptor_k_major(shared_address(shared.k));
    const uint64_t v_columns = descriptor_k_major(shared_address(shared.v));
    const uint64_t k_rows = descriptor_n_major(shared_address(shared.k), kPanelBytes);
    int end[2];  // row + 8 h sees key c + 2 quad when c < end[h]
#pragma unroll
    for (int h = 0; h < 2; ++h) end[h] = item.visible.end(row + 8 * h) - 2 * quad;
    const int masked = warp_uniform(item.visible.first_masked_block(kRows));
    const int unseen =
        warp_uniform(item.visible.to_any(rows)) - (blocks - 1) * kRows;  // row of the last block: none sees it

    Ring<1> douts(shared.douts), values(shared.values);
    Ring<2> keys(shared.keys);
    float s[kScores], dp[kScores], minus_lse[2], delta[2];
    Ring<1>(shared.queries).wait_full();
    keys.wait_full();
    hold_registers(s);
    wgmma_fence();
    issue_scores<C>(s, q_left, k_columns);
    wgmma_wait<0>();
    hold_registers(s);
    // One block of keys. Nothing is in flight from one to the next: the compiler would not keep track of it.
    int head = 0, block = 0;
#pragma unroll 1
    while (head < heads) {
      if (block == 0) {
        const int64_t scalars = item.scalars + head * a.call.size.tokens + row;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const bool valid = row + 8 * h < rows;
          minus_lse[h] = valid ? a.call.lse[scalars + 8 * h] * -kLog2e : -INFINITY;
          delta[h] = valid ? a.call.delta[scalars + 8 * h] : 0.0f;
        }
        douts.wait_full();
      }
      values.wait_full();
      hold_registers(dp);
      wgmma_fence();
      issue_scores<C>(dp, dout_left, v_columns);
#pragma unroll
      for (int i = 0; i < kScores; ++i) s[i] = exp2_fast(fmaf(s[i], a.call.scale_log2, minus_lse[i / 2 % 2]));
      wgmma_wait<0>();  // dP
      hold_registers(dp);
      leave(values.empty());
      values.next();
      const bool last = block + 1 == blocks;
      if (last) {
        leave(douts.empty());
        douts.next();
      }
#pragma unroll
      for (int i = 0; i < kScores; ++i) dp[i] = s[i] * (dp[i] - delta[i / 2 % 2]);
      if (block >= masked) {
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
          if (block * kRows + i / 4 * 8 + i % 2 >= end[i / 2 % 2]) dp[i] = 0.0f;
        }
      }
      uint32_t ds[kSteps][4];
#pragma unroll
      for (int i = 0; i < kScores / 2; ++i) ds[i / 4][i % 4] = pack2<T>(dp[2 * i], dp[2 * i + 1]);
      const uint32_t offset = keys.slot() * C::kTileBytes, empty = keys.empty();
      if (last && unseen < kRows) {  // each consumer for itself: both write the same zeros
        clear_rows<C, 128>(shared_address(shared.k) + offset, unseen, thread);
        fence_proxy_async();  // ordinary stores, read by wgmma
        named_barrier_sync(kKeysCleared + warpgroup, 128);
      }
      hold_registers(ds);
      hold_registers(first);
      hold_registers(second);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint64_t right = descriptor_add(k_rows, offset + step * 2048);
        wgmma_rs<T, C::kFirst>(first, ds[step], right);
        wgmma_rs<T, C::kSecond>(second, ds[step], descriptor_add(right, C::kFirst / 64 * kPanelBytes));
      }
      wgmma_commit();

      block = last ? 0 : block + 1;
      head += last;
      // After the last block, its S again, for nobody: how many products are in flight is then a constant.
      keys.next();
      const bool more = head < heads;
      if (more) keys.wait_full();
      hold_registers(s);
      wgmma_fence();
      issue_scores<C>(s, q_left, descriptor_add(k_columns, more ? keys.slot() * C::kTileBytes : offset));
      wgmma_wait<1>();  // dQ
      hold_registers(first);
      hold_registers(second);
      hold_registers(ds);
      leave(empty);
      wgmma_wait<0>();  // S of the next block
      hold_registers(s);
    }
  }

  named_barrier_sync(kTilesUsedUp, 128 * CONSUMERS);
  float* const out = reinterpret_cast<float*>(&shared);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float* to = out + (row + 8 * h) * kOutStride<C> + 2 * quad;
#pragma unroll
    for (int i = 0; i < C::kFirst / 8; ++i) {
      *reinterpret_cast<float2*>(to + 8 * i) =
          make_float2(first[4 * i + 2 * h] * a.call.scale, first[4 * i + 2 * h + 1] * a.call.scale);
    }
#pragma unroll
    for (int i = 0; i < C::kSecond / 8; ++i) {
      *reinterpret_cast<float2*>(to + C::kFirst + 8 * i) =
          make_float2(second[4 * i + 2 * h] * a.call.scale, second[4 * i + 2 * h + 1] * a.call.scale);
    }
  }
  named_barrier_sync(kOutputWritten, 128 * CONSUMERS);
  const Sizes& size = a.call.size;
  const RowAngles angles(size, item.position);
  const int head_dim = static_cast<int>(size.head_dim), half = head_dim / 2;
  float* const rows_of_group =
      a.dq + ((item.batch * size.tokens + item.first_token) * size.q_groups + item.group) * head_dim;
#pragma unroll 1
  for (int index = threadIdx.x - 128; index < rows * (C::kDim / 8); index += 128 * CONSUMERS) {
    const int r = index / (C::kDim / 8), piece = index % (C::kDim / 8);
    if (4 * piece >= half) continue;
    float low[4], high[4];
    load4(out + r * kOutStride<C> + 4 * piece, low);
    load4(out + r * kOutStride<C> + 4 * piece + half, high);
    rotate4(low, high, a.cos, a.sin, angles.of(r), half, piece, -1.0f);
    float* to = rows_of_group + r * size.q_groups * head_dim + 4 * piece;
    *reinterpret_cast<float4*>(to) = make_float4(low[0], low[1], low[2], low[3]);
    *reinterpret_cast<float4*>(to + half) = make_float4(high[0], high[1], high[2], high[3]);
  }
}

template <class C, int CONSUMERS>
__global__ void __launch_bounds__(128 * (CONSUMERS + 1), 1)
    chunk_attention_dq_bwd_sm90_kernel(const __grid_constant__ DqArguments a, const __grid_constant__ CUtensorMap k_map,
                                       const __grid_constant__ CUtensorMap v_map,
                                       const __grid_constant__ CUtensorMap q_map,
                                       const __grid_constant__ CUtensorMap dout_map) {
#ifdef RAT_HOPPER_CODE
  using Shared = DqShared<C, CONSUMERS>;
  static_assert(kDqQueries<CONSUMERS> * kOutStride<C> * 4 <= offsetof(Shared, item), "dQ fits the tiles' memory");
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  Shared& shared = *reinterpret_cast<Shared*>(raw_shared);
  if (shared_address(raw_shared) % 1024 != 0) __trap();
  const int warpgroup = warp_uniform(static_cast<int>(threadIdx.x) / 128);
  if (threadIdx.x == 0) {
    shared.init_barriers();
    mbarrier_init_fence();
    describe<CONSUMERS>(a, shared.item);
  }
  __syncthreads();  // barriers and item are ready
  if (shared.item.rows == 0) return;
  // One consumer has the registers anyway.
  if (warpgroup == 0) {
    if constexpr (CONSUMERS > 1) give_registers<kDqProducerRegisters>();
    if (threadIdx.x == 0 && shared.item.blocks > 0) {
      feed_dq<C, CONSUMERS>(a, k_map, v_map, q_map, dout_map, shared);
    }
  } else {
    if constexpr (CONSUMERS > 1) take_registers<kDqConsumerRegisters>();
    consume_dq<C, CONSUMERS>(a, shared, warpgroup - 1);
  }
#endif
}

// ---- launcher ---------------------------------------------------------------------------------------------------------

// How a call is cut, from sizes alone.
struct Plan {
  int64_t shares = 1;        // of the queries of a key tile
  int64_t key_blocks = 0;    // of dkdv
  int64_t query_blocks = 0;  // of dq
  int consumers = 2;         // of dq
  TileOrder order;           // of dq
};

Plan make_plan(const AttentionBwdParams& p) {
  const Sizes& s = p.fwd.size;
  Plan plan;
  const int64_t items = key_tiles(s, p.fwd.chunks, kRows) * s.heads;
  // One block for each multiprocessor, but no share under 512 queries.
  plan.shares = count_shares(items, 1, s.tokens, 512, 132);
  plan.key_blocks = items * plan.shares;
  plan.order = tile_order(s, p.fwd.chunks, s.q_groups, 2);
  plan.query_blocks = tile_blocks(s, kDqQueries<2>, plan.order);
  if (plan.query_blocks < 132) {
    plan.consumers = 1;
    plan.query_blocks = tile_blocks(s, kDqQueries<1>, plan.order);
  }
  return plan;
}

struct Maps {
  CUtensorMap k, v, q, dout;
};

template <class C, int CONSUMERS>
void launch_dq(const DqArguments& a, const Maps& maps, int64_t blocks, cudaStream_t stream) {
  constexpr int kBytes = static_cast<int>(sizeof(DqShared<C, CONSUMERS>));
  static_assert(kBytes <= 227 * 1024);
  const char* name = "chunk_attention_dq_bwd_sm90_kernel";
  allow_shared_memory(chunk_attention_dq_bwd_sm90_kernel<C, CONSUMERS>, kBytes, name);
  chunk_attention_dq_bwd_sm90_kernel<C, CONSUMERS>
      <<<grid_x(blocks, name), 128 * (CONSUMERS + 1), kBytes, stream>>>(a, maps.k, maps.v, maps.q, maps.dout);
  check_launch(name);
}

template <class C>
void launch(const AttentionBwdParams& p, const BwdScratch& scratch, const Plan& plan, const Shares& shares,
            cudaStream_t stream) {
  const Sizes& s = p.fwd.size;
  if (s.sequences * s.heads == 0) return;

  Arguments call;
  call.size = s;
  call.chunks = p.fwd.chunks;
  call.scale = static_cast<float>(p.fwd.scale);
  call.scale_log2 = static_cast<float>(p.fwd.scale) * kLog2e;
  call.lse = static_cast<const float*>(p.fwd.lse);
  call.delta = scratch.delta;
  call.heads_per_group = static_cast<uint32_t>(s.heads / s.q_groups);

  constexpr CUtensorMapDataType type = kMapType<typename C::T>;
  const ChunkStates& c = p.fwd.chunks;
  const int64_t outer = c.compact ? s.heads : s.sequences * s.heads;
  const Maps maps{swizzled_rows_map(c.k, type, s.head_dim, c.rows, outer, kRows),
                  swizzled_rows_map(c.v, type, s.head_dim, c.rows, outer, kRows),
                  token_map(make_product_queries(p, {}, stream), type, s, s.q_groups, kRows),
                  token_map(scratch.dout, type, s, s.heads, kRows)};

  if (plan.key_blocks > 0) {
    DkdvArguments a;
    a.call = call;
    a.dchunk_k = shares.dchunk_k(scratch);
    a.dchunk_v = shares.dchunk_v(scratch);
    a.share_stride = shares.extent;
    a.shares = static_cast<uint32_t>(shares.count);
    constexpr int kBytes = static_cast<int>(sizeof(DkdvShared<C>));
    static_assert(kBytes <= 227 * 1024);
    const char* name = "chunk_attention_dkdv_bwd_sm90_kernel";
    allow_shared_memory(chunk_attention_dkdv_bwd_sm90_kernel<C>, kBytes, name);
    chunk_attention_dkdv_bwd_sm90_kernel<C>
        <<<grid_x(plan.key_blocks, name), kThreads, kBytes, stream>>>(a, maps.k, maps.v, maps.q, maps.dout);
    check_launch(name);
  }
  if (plan.query_blocks > 0) {
    DqArguments a;
    a.call = call;
    a.order = plan.order;
    a.cos = static_cast<const float*>(p.fwd.rotary.cos);
    a.sin = static_cast<const float*>(p.fwd.rotary.sin);
    a.dq = scratch.dq;
    plan.consumers == 2 ? launch_dq<C, 2>(a, maps, plan.query_blocks, stream)
                        : launch_dq<C, 1>(a, maps, plan.query_blocks, stream);
  }
  add_shares(shares, scratch, stream);
}

}  // namespace

namespace sm90 {

const char* bwd_wide_refuses(const AttentionBwdParams& p) {
  constexpr int64_t kMany = INT64_C(1) << 30;
  const Plan plan = make_plan(p);
  return plan.key_blocks > kMany || plan.query_blocks > kMany ? "the call is too large for 32-bit indices" : nullptr;
}

Launch bwd_wide(const AttentionBwdParams& p, BwdScratch& scratch, Arena& arena) {
  const Plan plan = make_plan(p);
  const Shares shares = take_shares(p, plan.shares, arena);
  return [&p, scratch, plan, shares](cudaStream_t stream) {
    const bool full = p.fwd.size.head_dim > 192;
    if (p.fwd.size.dtype == DType::bf16) {
      full ? launch<Wide<bf16, 256>>(p, scratch, plan, shares, stream)
           : launch<Wide<bf16, 192>>(p, scratch, plan, shares, stream);
    } else {
      full ? launch<Wide<f16, 256>>(p, scratch, plan, shares, stream)
           : launch<Wide<f16, 192>>(p, scratch, plan, shares, stream);
    }
  };
}

}  // namespace sm90

KernelList chunk_attention_bwd_wide_sm90_kernels() {
#define RAT_ENTRY(T, DIM)                                                                                              \
  {"chunk_attention_dkdv_bwd_sm90<" #T ", " #DIM ">",                                                                  \
   reinterpret_cast<const void*>(&chunk_attention_dkdv_bwd_sm90_kernel<Wide<T, DIM>>)},                                \
      {"chunk_attention_dq_bwd_sm90<" #T ", " #DIM ", 1>",                                                             \
       reinterpret_cast<const void*>(&chunk_attention_dq_bwd_sm90_kernel<Wide<T, DIM>, 1>)},                           \
  {                                                                                                                    \
    "chunk_attention_dq_bwd_sm90<" #T ", " #DIM ", 2>",                                                                \
        reinterpret_cast<const void*>(&chunk_attention_dq_bwd_sm90_kernel<Wide<T, DIM>, 2>)                            \
  }
  static const KernelEntry entries[] = {RAT_ENTRY(bf16, 192), RAT_ENTRY(bf16, 256), RAT_ENTRY(f16, 192),
                                        RAT_ENTRY(f16, 256)};
#undef RAT_ENTRY
  return {entries, static_cast<int>(sizeof(entries) / sizeof(entries[0]))};
}

}  // namespace rat::cuda
