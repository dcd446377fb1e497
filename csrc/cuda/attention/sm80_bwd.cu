// Chunk attention backward on mma.sync, for bfloat16 and float16, compute capability 8.0 and newer. Deterministic: no
// atomics; every sum is taken in one fixed order.
//
// With P_tj = exp(scale (R q)_t . K_j - lse_t) and dS_tj = P_tj (dO_t . V_j - Delta_t), four kernels:
//  0. rotate (rotate_reduce.cu): R q in T to the workspace; a plain copy of q and dO where they cannot be read in 16-byte
//     pieces.
//  1. dq: a block owns (query tile, query group) and loops over the heads of the group and their keys, so that the sum over
//     the group never leaves registers. 3 products: S = Q K^T, dP = dO V^T, dQ += dS K. Rotates back, writes float32.
//  2. dkdv: a block owns (key tile, head, share of the queries) and walks the query tiles from the last token of the sequence
//     to the first that sees the tile, so that blocks of one head that start together find dO and Q in L2. It computes the
//     transposed scores, S^T = K Q^T and dP^T = V dO^T, whose accumulators are the left operands of dV += P^T dO and
//     dK += dS^T Q: probabilities never pass through shared memory. 4 products.
//  3. reduce (rotate_reduce.cu): adds the shares of the queries, where there were too few key tiles to fill the chip without
//     cutting them.
#include "../ptx/mma.cuh"
#include "../ptx/opaque.cuh"
#include "families.h"
#include "rotate_reduce.h"
#include "tiles.cuh"

namespace rat::cuda {
namespace {

struct BwdKernelParams {
  Sizes size;
  Rows q;     // rotated
  Rows dout;  // dO_t
  const float* cos;
  const float* sin;
  float scale;
  float scale_log2;  // scale * log2(e)
  ChunkStates chunks;
  const float* lse;
  const float* delta;
  float* dq;        // (B, T, q_groups, D)
  float* dchunk_k;  // element offsets of ChunkStates; share s of the queries adds s * share_stride
  float* dchunk_v;
  int64_t share_stride;
  int shares;
  TileOrder order;
};

template <int M, int N>
__device__ __forceinline__ void clear(float (&sums)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
    }
  }
}

// ---- dq ---------------------------------------------------------------------------------------------------------------
//
// Warps: each owns MT * 16 query rows and the whole of D. With operands in registers, Q and dO fragments stay there for all
// keys; wide heads fetch them from shared memory at each use.
// Shared memory: dO tile (before it, in the register variant, Q passes through it), the Q tile of the other variant, then two
// stages of {K tile, V tile}. The barrier at the top of an item says that its stage has landed and that the other is free.
// At the end the same memory holds dQ in float32, for the rotation, which pairs columns that lie in different lanes.
template <int DPAD>
struct DqTraits {
  static constexpr bool kRegisters = DPAD <= 128;
  static constexpr int kRowTiles = DPAD <= 64 ? 2 : 1;
  static constexpr int kWarps = DPAD == 96 || DPAD == 128 ? 8 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocks = kWarps == 8 || DPAD > 128 ? 1 : 2;  // on one multiprocessor, bounds the registers
  static constexpr int kQueries = 16 * kRowTiles * kWarps;
  static constexpr int kKeys = DPAD == 256 ? 16 : DPAD == 192 || DPAD == 64 ? 32 : 64;
  static constexpr int kRowsBytes = kQueries * DPAD * 2;
  static constexpr int kStateBytes = kKeys * DPAD * 2;
  static constexpr int kLoopBytes = (kRegisters ? 1 : 2) * kRowsBytes + 2 * 2 * kStateBytes;
  static constexpr int kOutStride = DPAD + 8;  // floats: float2 stores of a warp then cover all banks
  static constexpr int kOutBytes = kQueries * kOutStride * 4;
  static constexpr int kSharedBytes = kLoopBytes > kOutBytes ? kLoopBytes : kOutBytes;
  static_assert(kSharedBytes <= 99 * 1024, "must fit the chips with the least shared memory");
};

// What is needed again between heads and at the end: in shared memory, out of the loop's registers.
struct DqPlace {
  int64_t batch, first_token, group;
  int64_t position;  // of the first row
  int64_t states;    // offset of key 0 of the group's first head
  int rows;
  int masked;  // blocks of keys from here on need a mask
  int blocks;
};

// A thread of a dq block and its steps.
template <class T, int DPAD>
struct DqSteps {
  using Traits = DqTraits<DPAD>;
  static constexpr int MT = Traits::kRowTiles, NT = Traits::kKeys / 8, OT = DPAD / 8;

  const BwdKernelParams& p;
  const DqPlace& place;
  int thread, lane, warp_row;
  int head_dim, keys;
  uint32_t dout_tile, states;  // shared-memory addresses

  __device__ __forceinline__ void load_query(uint32_t tile, const WorkItem& work, int64_t first_token, int64_t group,
                                             int rows) const {
    load_tile<T, Traits::kQueries, DPAD, Traits::kThreads>(
        tile, row_pointer<T>(p.q, work.sequence.batch, first_token, group), p.q.token, rows, head_dim, thread);
  }

  // Of head `head` of the group. The thread is opaque: row offsets are not worth registers from one head to the next.
  __device__ __forceinline__ void load_dout(int head, int heads) const {
    load_tile<T, Traits::kQueries, DPAD, Traits::kThreads>(
        dout_tile, row_pointer<T>(p.dout, place.batch, place.first_token, place.group * heads + head), p.dout.token,
        place.rows, head_dim, opaque(thread));
  }

  __device__ __forceinline__ void load_states(int head, int block, int stage) const {
    const int first = block * Traits::kKeys;
    const int64_t offset = place.states + head * p.chunks.head + static_cast<int64_t>(first) * head_dim;
    const uint32_t to = states + stage * 2 * Traits::kStateBytes;
    load_tile<T, Traits::kKeys, DPAD, Traits::kThreads>(to, static_cast<const T*>(p.chunks.k) + offset, head_dim,
                                                        keys - first, head_dim, thread);
    load_tile<T, Traits::kKeys, DPAD, Traits::kThreads>(
        to + Traits::kStateBytes, static_cast<const T*>(p.chunks.v) + offset, head_dim, keys - first, head_dim, thread);
  }

  // Of rows g and g + 8; lse in powers of two.
  __device__ __forceinline__ void load_scalars(float (&lse)[MT][2], float (&delta)[MT][2], int head, int heads) const {
    const int64_t scalars =
        (place.batch * p.size.heads + place.group * heads + head) * p.size.tokens + place.first_token;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = warp_row + m * 16 + r * 8 + lane / 4;
        lse[m][r] = row < place.rows ? p.lse[scalars + row] * kLog2e : 0.0f;
        delta[m][r] = row < place.rows ? p.delta[scalars + row] : 0.0f;
      }
    }
  }

  // dS from S and, in `ds`, dP.
  __device__ __forceinline__ void gradients(float (&ds)[MT][NT][4], const float (&s)[MT][NT][4],
                                            const float (&lse)[MT][2], const float (&delta)[MT][2]) const {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float weight = exp2_fast(fmaf(s[m][n][i], p.scale_log2, -lse[m][i / 2]));
          ds[m][n][i] = weight * (ds[m][n][i] - delta[m][i / 2]);
        }
      }
    }
  }

  // The lane is opaque: most blocks are seen whole, and row indices are not worth registers.
  __device__ __forceinline__ void mask(float (&ds)[MT][NT][4], int block, const VisibleKeys& visible) const {
    const int again = opaque(lane);
    const int column = block * Traits::kKeys + again % 4 * 2;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        mask_row(ds[m], r, visible.end(warp_row + m * 16 + r * 8 + again / 4) - column, 0.0f);
      }
    }
  }

  // dQ through shared memory, as the rotation pairs columns of different lanes; scaled, rotated back.
  __device__ __forceinline__ void store(float* out, const float (&dq)[MT][OT][4]) const {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int n = 0; n < OT; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float2* to = reinterpret_cast<float2*>(out + (warp_row + m * 16 + r * 8 + lane / 4) * Traits::kOutStride +
                                                 n * 8 + lane % 4 * 2);
          *to = make_float2(dq[m][n][2 * r] * p.scale, dq[m][n][2 * r + 1] * p.scale);
        }
      }
    }
    __syncthreads();  // dQ is whole
    const RowAngles angles(p.size, place.position);
    const int half = head_dim / 2;
    for (int index = thread; index < place.rows * (DPAD / 8); index += Traits::kThreads) {
      const int row = index / (DPAD / 8), piece = index % (DPAD / 8);
      if (4 * piece >= half) continue;
      float low[4], high[4];
      load4(out + row * Traits::kOutStride + 4 * piece, low);
      load4(out + row * Traits::kOutStride + 4 * piece + half, high);
      rotate4(low, high, p.cos, p.sin, angles.of(row), half, piece, -1.0f);
      float* to = p.dq +
                  ((place.batch * p.size.tokens + place.first_token + row) * p.size.q_groups + place.group) * head_dim +
                  4 * piece;
      *reinterpret_cast<float4*>(to) = make_float4(low[0], low[1], low[2], low[3]);
      *reinterpret_cast<float4*>(to + half) = make_float4(high[0], high[1], high[2], high[3]);
    }
  }
};

template <class T, int DPAD>
__global__ void __launch_bounds__(DqTraits<DPAD>::kThreads, DqTraits<DPAD>::kBlocks)
    chunk_attention_dq_bwd_sm80_kernel(const __grid_constant__ BwdKernelParams p) {
  using Traits = DqTraits<DPAD>;
  constexpr int MT = Traits::kRowTiles, NT = Traits::kKeys / 8, OT = DPAD / 8;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ DqPlace place;

  int64_t group;
  const WorkItem work = ordered_item(p.size, p.order, blockIdx.x, Traits::kQueries, &group);
  const Sequence& sequence = work.sequence;
  const int64_t first_token = sequence.begin + work.tile * Traits::kQueries;
  if (first_token >= sequence.end) return;
  const int rows = static_cast<int>(min(static_cast<int64_t>(Traits::kQueries), sequence.end - first_token));
  const int head_dim = static_cast<int>(p.size.head_dim);
  const int64_t position = sequence.start + work.tile * Traits::kQueries;
  const VisibleKeys visible(p.size, position);
  const int blocks = visible.blocks(rows, Traits::kKeys);
  const int heads = static_cast<int>(quotient(p.size.heads, p.size.q_groups));

  const int thread = threadIdx.x, lane = thread % 32, warp_row = thread / 32 * MT * 16;
  const uint32_t dout_tile = shared_address(shared);
  const uint32_t query_tile = Traits::kRegisters ? dout_tile : dout_tile + Traits::kRowsBytes;
  const uint32_t states = dout_tile + (Traits::kRegisters ? 1 : 2) * Traits::kRowsBytes;
  const DqSteps<T, DPAD> steps{p, place, thread, lane, warp_row, head_dim, visible.to_any(rows), dout_tile, states};

  if (thread == 0) {
    place.batch = sequence.batch;
    place.first_token = first_token;
    place.group = group;
    place.position = position;
    place.states = chunk_offset(p.size, p.chunks, sequence.index, group * heads);
    place.rows = rows;
    place.masked = visible.first_masked_block(Traits::kKeys);
    place.blocks = blocks;
  }

  float dq[MT][OT][4];
  clear(dq);
  if (blocks > 0) {
    __syncthreads();  // place is written
    steps.load_query(query_tile, work, first_token, group, rows);
    cp_async_commit();
    steps.load_states(0, 0, 0);
    if (!Traits::kRegisters) steps.load_dout(0, heads);
    cp_async_commit();
    LeftOperand<DPAD, MT, Traits::kRegisters> query, dout;
    if (Traits::kRegisters) {
      cp_async_wait<1>();
      __syncthreads();  // the Q tile has landed
    }
    query.bind(query_tile + warp_row * SwizzledTile<DPAD>::kRowBytes, lane);
    if (Traits::kRegisters) {
      __syncthreads();  // all warps hold their Q: its memory becomes the dO tile
      steps.load_dout(0, heads);
      cp_async_commit();
    }

    float lse[MT][2], delta[MT][2];
    int head = 0, block = 0, stage = 0;
#pragma unroll 1
    while (head < heads) {
      cp_async_wait<0>();
      __syncthreads();  // this stage has landed, the other is used up
      if (block == 0) {
        if (!Traits::kRegisters && head > 0) {
          steps.load_dout(head, heads);
          cp_async_commit();
          cp_async_wait<0>();
          __syncthreads();  // dO has landed
        }
        dout.bind(dout_tile + warp_row * SwizzledTile<DPAD>::kRowBytes, lane);
        steps.load_scalars(lse, delta, head, heads);
        if (Traits::kRegisters) {
          __syncthreads();  // all warps hold their dO: the next head's may come
          if (head + 1 < heads) steps.load_dout(head + 1, heads);
        }
      }
      const bool last = block + 1 == place.blocks;
      if (!last || head + 1 < heads) steps.load_states(last ? head + 1 : head, last ? 0 : block + 1, stage ^ 1);
      cp_async_commit();

      const uint32_t key_tile = states + stage * 2 * Traits::kStateBytes;
      float s[MT][NT][4], ds[MT][NT][4];
      product_over_d<T, DPAD>(s, query, SwizzledTile<DPAD>::lane_columns(key_tile, lane));
      product_over_d<T, DPAD>(ds, dout, SwizzledTile<DPAD>::lane_columns(key_tile + Traits::kStateBytes, lane));
      steps.gradients(ds, s, lse, delta);
      if (block >= place.masked) steps.mask(ds, block, visible);
      uint32_t left[MT][NT / 2][4];
#pragma unroll
      for (int m = 0; m < MT; ++m) pack_left<T>(left[m], ds[m]);
      product_over_rows<T, DPAD, MT, NT / 2, 1>(dq, left, SwizzledTile<DPAD>::lane_rows(key_tile, lane));

      stage ^= 1;
      block = last ? 0 : block + 1;
      head += last;
    }
    cp_async_wait<0>();
    __syncthreads();  // all tiles are used up: their memory takes dQ
  }
  steps.store(reinterpret_cast<float*>(shared), dq);
}

// ---- dK, dV -----------------------------------------------------------------------------------------------------------
//
// Warps: each owns MT * 16 keys. Heads wider than 128 do not fit the registers: there two warps share 16 keys, both compute
// the scores, and each accumulates half of the columns (SPLIT = 2).
// Shared memory: two stages of {Q tile, dO tile}, and their lse and Delta. K and V tiles beside them, or, where fragments
// stay in registers, in the stages' own memory before the loop starts: K in the first, V in the second.
template <int DPAD>
struct DkdvTraits {
  static constexpr bool kKeyRegisters = DPAD == 96 || DPAD == 128;
  static constexpr bool kValueRegisters = DPAD == 96;
  static constexpr int kRowTiles = DPAD <= 64 ? 2 : 1;
  static constexpr int kWarps = DPAD <= 64 ? 4 : 8;
  static constexpr int kSplit = DPAD <= 128 ? 1 : 2;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocks = DPAD <= 64 ? 2 : 1;
  static constexpr int kKeys = 16 * kRowTiles * kWarps / kSplit;
  static constexpr int kQueries = DPAD <= 128 ? 64 : DPAD == 192 ? 32 : 16;  // of a stage
  static constexpr int kStep = kQueries < 32 ? kQueries : 32;                // of them at a time in registers
  static constexpr int kStateBytes = kKeys * DPAD * 2;
  static constexpr int kRowsBytes = kQueries * DPAD * 2;
  static constexpr int kScalars = 2 * 2 * kQueries;  // [stage][lse, Delta][query]
  static constexpr int kStageBytes = 2 * kRowsBytes;
  static constexpr int kLoopBytes = 2 * kStageBytes + kScalars * 4;
  static constexpr int kSharedBytes =
      kLoopBytes + (kKeyRegisters ? 0 : kStateBytes) + (kValueRegisters ? 0 : kStateBytes);
  static_assert(!kKeyRegisters || kStateBytes <= kStageBytes, "K passes through the first stage, V through the second");
  static_assert(kKeyRegisters || !kValueRegisters, "K is the first to stay in registers");
  static_assert(kLoopBytes % 128 == 0, "tiles start at multiples of 128 bytes");
  static_assert(2 * kQueries <= kThreads, "one thread loads one scalar");
  static_assert(kSharedBytes <= 99 * 1024, "must fit the chips with the least shared memory");
};

// What the loop needs rarely: in shared memory, out of its registers. Offsets are those of the sequence's first token.
struct DkdvPlace {
  int64_t seen_from;  // token r of the sequence sees key j of the tile when r >= seen_from + j * key_every
  int64_t sums;       // offset of the first key in dchunk_k, dchunk_v
  int64_t queries, douts, scalars;
  int last_tile;  // of queries
  int last_rows;  // queries of the last tile
  int turns;      // one past the last one
  int keys;
};

// A thread of a dkdv block and its steps.
template <class T, int DPAD>
struct DkdvSteps {
  using Traits = DkdvTraits<DPAD>;
  static constexpr int MT = Traits::kRowTiles, NT = Traits::kStep / 8, SPLIT = Traits::kSplit, OT = DPAD / 8 / SPLIT;

  const BwdKernelParams& p;
  const DkdvPlace& place;
  int thread, lane;
  int warp_row, column_half;
  int head_dim;
  uint32_t stages, scalars;  // shared-memory addresses

  __device__ __forceinline__ void load_states(uint32_t key_tile, uint32_t value_tile, int64_t offset, int keys) const {
    load_tile<T, Traits::kKeys, DPAD, Traits::kThreads>(key_tile, static_cast<const T*>(p.chunks.k) + offset, head_dim,
                                                        keys, head_dim, thread);
    load_tile<T, Traits::kKeys, DPAD, Traits::kThreads>(value_tile, static_cast<const T*>(p.chunks.v) + offset,
                                                        head_dim, keys, head_dim, thread);
  }

  // Q, dO, lse and Delta of a query tile. Turn 0 is the last tile.
  __device__ __forceinline__ void load_queries(int turn, int stage) const {
    const int64_t offset = static_cast<int64_t>(place.last_tile - turn) * Traits::kQueries;
    const int rows = turn == 0 ? place.last_rows : Traits::kQueries;
    const uint32_t to = stages + stage * Traits::kStageBytes;
    load_tile<T, Traits::kQueries, DPAD, Traits::kThreads>(
        to, static_cast<const T*>(p.q.ptr) + place.queries + offset * p.q.token, p.q.token, rows, head_dim, thread);
    load_tile<T, Traits::kQueries, DPAD, Traits::kThreads>(
        to + Traits::kRowsBytes, static_cast<const T*>(p.dout.ptr) + place.douts + offset * p.dout.token, p.dout.token,
        rows, head_dim, thread);
    if (thread < 2 * Traits::kQueries) {
      const int row = thread % Traits::kQueries;
      const float* from = (thread < Traits::kQueries ? p.lse : p.delta) + place.scalars + offset;
      cp_async4(scalars + (stage * 2 * Traits::kQueries + thread) * 4, row < rows ? from + row : from, row < rows);
    }
  }

  // P^T from S^T. `lse` is that of this lane's first query.
  __device__ __forceinline__ void weights(float (&weight)[MT][NT][4], const float* lse) const {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const float2 pair = *reinterpret_cast<const float2*>(lse + n * 8);
      const float low = -pair.x * kLog2e, high = -pair.y * kLog2e;
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weight[m][n][i] = exp2_fast(fmaf(weight[m][n][i], p.scale_log2, i % 2 ? high : low));
        }
      }
    }
  }

  // Query r of the step sees key j of the warp when r >= from + j * key_every.
  __device__ __forceinline__ void mask(float (&weight)[MT][NT][4], int64_t from) const {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int first = clamp_token(from + (m * 16 + r * 8 + lane / 4) * p.size.key_every) - lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          if (n * 8 < first) weight[m][n][2 * r] = 0.0f;
          if (n * 8 + 1 < first) weight[m][n][2 * r + 1] = 0.0f;
        }
      }
    }
  }

  // dS^T from P^T and, in `ds`, dP^T. `delta` is that of this lane's first query.
  __device__ __forceinline__ void gradients(float (&ds)[MT][NT][4], const float (&weight)[MT][NT][4],
                                            const float* delta) const {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const float2 pair = *reinterpret_cast<const float2*>(delta + n * 8);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) ds[m][n][i] = weight[m][n][i] * (ds[m][n][i] - (i % 2 ? pair.y : pair.x));
      }
    }
  }

  // This lane's address in the rows of a tile, as the right operand of add_product().
  __device__ __forceinline__ uint32_t lane_rows(uint32_t tile) const {
    const uint32_t rows = SwizzledTile<DPAD>::lane_rows(tile, lane);
    return SPLIT == 2 ? half_columns(rows, column_half) : rows;
  }

  // sums += left x the rows of a tile
  __device__ __forceinline__ void add_product(float (&sums)[MT][OT][4], const float (&left)[MT][NT][4],
                                              uint32_t rows) const {
    uint32_t packed[MT][NT / 2][4];
#pragma unroll
    for (int m = 0; m < MT; ++m) pack_left<T>(packed[m], left[m]);
    product_over_rows<T, DPAD, MT, NT / 2, SPLIT>(sums, packed, rows);
  }

  __device__ __forceinline__ void store(const float (&dk)[MT][OT][4], const float (&dv)[MT][OT][4]) const {
    float* dk_rows = p.dchunk_k + place.sums;
    float* dv_rows = p.dchunk_v + place.sums;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = warp_row + m * 16 + r * 8 + lane / 4;
#pragma unroll
        for (int n = 0; n < OT; n += 4) {
          float a[8], b[8];
          gather_quad(a, dk[m], n, r, lane);
          gather_quad(b, dv[m], n, r, lane);
          const int column = (SPLIT == 1 ? n * 8 : n / 4 * 64 + column_half * 32) + lane % 4 * 8;
          if (row < place.keys && column < head_dim) {
            const int64_t offset = static_cast<int64_t>(row) * head_dim + column;
#pragma unroll
            for (int i = 0; i < 8; ++i) a[i] *= p.scale;
            store_row(dk_rows + offset, a);
            store_row(dv_rows + offset, b);
          }
        }
      }
    }
  }
};

template <class T, int DPAD>
__global__ void __launch_bounds__(DkdvTraits<DPAD>::kThreads, DkdvTraits<DPAD>::kBlocks)
    chunk_attention_dkdv_bwd_sm80_kernel(const __grid_constant__ BwdKernelParams p) {
  using Traits = DkdvTraits<DPAD>;
  constexpr int MT = Traits::kRowTiles, NT = Traits::kStep / 8, SPLIT = Traits::kSplit, OT = DPAD / 8 / SPLIT;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ DkdvPlace place;

  // Shares of a tile are neighbours, then tiles, heaviest (earliest keys) first, then heads.
  const int share = static_cast<int>(modulo(blockIdx.x, p.shares));
  const int64_t tile_head = quotient(blockIdx.x, p.shares);
  const bool compact = p.chunks.compact;
  const int64_t tiles =
      compact ? p.chunks.rows / Traits::kKeys + p.size.sequences : (p.chunks.rows + Traits::kKeys - 1) / Traits::kKeys;
  const int64_t pair = quotient(tile_head, tiles), head = modulo(pair, p.size.heads);
  const int64_t tile_index = modulo(tile_head, tiles) + (compact ? 0 : quotient(pair, p.size.heads) * tiles);
  const KeyTile tile = key_tile(p.size, p.chunks, tile_index, Traits::kKeys);
  if (tile.first >= tile.closed) return;
  const Sequence& sequence = tile.sequence;
  const int keys = static_cast<int>(min(static_cast<int64_t>(Traits::kKeys), tile.closed - tile.first));
  const int head_dim = static_cast<int>(p.size.head_dim);
  const int length = static_cast<int>(sequence.end - sequence.begin);  // below 2^31, as are all lengths
  const int64_t chunk_base = chunk_offset(p.size, p.chunks, sequence.index, head) + tile.first * head_dim;
  const VisibleFrom visible(p.size, sequence, tile.first);
  const QueryWalk walk = query_walk<Traits::kQueries>(visible, length, share, p.shares);

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_row = (SPLIT == 1 ? warp : warp % (Traits::kWarps / 2)) * MT * 16;
  const int column_half = SPLIT == 1 ? 0 : warp / (Traits::kWarps / 2);
  const uint32_t stages = shared_address(shared);
  const uint32_t scalars = stages + 2 * Traits::kStageBytes;
  const float* scalar_values = reinterpret_cast<const float*>(shared + 2 * Traits::kStageBytes);
  const uint32_t key_states = stages + (Traits::kKeyRegisters ? 0 : Traits::kLoopBytes);
  const uint32_t value_states = stages + (Traits::kValueRegisters ? Traits::kStageBytes
                                          : Traits::kKeyRegisters ? Traits::kLoopBytes
                                                                  : Traits::kLoopBytes + Traits::kStateBytes);
  const DkdvSteps<T, DPAD> steps{p, place, thread, lane, warp_row, column_half, head_dim, stages, scalars};

  if (thread == 0) {
    place.seen_from = visible.from;
    place.sums = chunk_base + share * p.share_stride;
    place.queries =
        sequence.batch * p.q.batch + sequence.begin * p.q.token + group_of(p.size, head, p.size.q_groups) * p.q.head;
    place.douts = sequence.batch * p.dout.batch + sequence.begin * p.dout.token + head * p.dout.head;
    place.scalars = (sequence.batch * p.size.heads + head) * p.size.tokens + sequence.begin;
    place.last_tile = walk.last;
    place.last_rows = length - walk.last * Traits::kQueries;
    place.turns = walk.end;
    place.keys = keys;
  }

  float dk[MT][OT][4], dv[MT][OT][4];
  clear(dk);
  clear(dv);
  if (walk.begin < walk.end) {
    steps.load_states(key_states, value_states, chunk_base, keys);
    cp_async_commit();
    LeftOperand<DPAD, MT, Traits::kKeyRegisters> key;
    LeftOperand<DPAD, MT, Traits::kValueRegisters> value;
    if (Traits::kKeyRegisters) cp_async_wait<0>();
    __syncthreads();  // place is written; in the register variant K and V have landed
    key.bind(key_states + warp_row * SwizzledTile<DPAD>::kRowBytes, lane);
    value.bind(value_states + warp_row * SwizzledTile<DPAD>::kRowBytes, lane);
    if (Traits::kKeyRegisters) __syncthreads();  // all warps hold what passed through the stages
    steps.load_queries(walk.begin, 0);
    cp_async_commit();

    int stage = 0;
#pragma unroll 1
    for (int turn = walk.begin; turn < place.turns; ++turn) {
      cp_async_wait<0>();
      __syncthreads();  // this stage has landed, the other is used up
      if (turn + 1 < place.turns) steps.load_queries(turn + 1, stage ^ 1);
      cp_async_commit();

      const uint32_t query_tile = stages + stage * Traits::kStageBytes;
      const float* lse_row = scalar_values + stage * 2 * Traits::kQueries + lane % 4 * 2;
#pragma unroll 1
      for (int step = 0; step < Traits::kQueries; step += Traits::kStep) {
        // Query r of the step sees key j of the warp when r >= from + j * key_every.
        const int64_t from = place.seen_from + warp_row * p.size.key_every -
                             (static_cast<int64_t>(place.last_tile - turn) * Traits::kQueries + step);
        if (from >= Traits::kStep) continue;  // none sees any
        const uint32_t query_rows = query_tile + step * SwizzledTile<DPAD>::kRowBytes;
        const uint32_t dout_rows = query_rows + Traits::kRowsBytes;
        float weight[MT][NT][4];
        product_over_d<T, DPAD>(weight, key, SwizzledTile<DPAD>::lane_columns(query_rows, lane));
        steps.weights(weight, lse_row + step);
        if (from + (MT * 16 - 1) * p.size.key_every > 0) steps.mask(weight, from);
        const uint32_t dout_lane = steps.lane_rows(dout_rows), query_lane = steps.lane_rows(query_rows);
        steps.add_product(dv, weight, dout_lane);

        float ds[MT][NT][4];
        product_over_d<T, DPAD>(ds, value, SwizzledTile<DPAD>::lane_columns(dout_rows, lane));
        steps.gradients(ds, weight, lse_row + Traits::kQueries + step);
        steps.add_product(dk, ds, query_lane);
      }
      stage ^= 1;
    }
    cp_async_wait<0>();
  }
  __syncthreads();  // place is written also where there was no query
  steps.store(dk, dv);
}

// ---- host -------------------------------------------------------------------------------------------------------------

// How the queries of a key tile are cut: two blocks on each multiprocessor, but no share under 256 queries.
int64_t shares_of(const AttentionBwdParams& p) {
  const Sizes& s = p.fwd.size;
  const int64_t keys = s.head_dim <= 128 ? DkdvTraits<128>::kKeys : DkdvTraits<256>::kKeys;
  return count_shares(key_tiles(s, p.fwd.chunks, keys) * s.heads, 2, s.tokens, 256, 16);
}
static_assert(DkdvTraits<64>::kKeys == 128 && DkdvTraits<96>::kKeys == 128 && DkdvTraits<128>::kKeys == 128 &&
                  DkdvTraits<192>::kKeys == DkdvTraits<256>::kKeys,
              "shares_of knows the key tiles");

template <class T, int DPAD>
void launch_products(BwdKernelParams k, cudaStream_t stream) {
  {
    using Traits = DqTraits<DPAD>;
    k.order = tile_order(k.size, k.chunks, k.size.q_groups, sizeof(T));
    const int64_t blocks = tile_blocks(k.size, Traits::kQueries, k.order);
    if (blocks > 0) {
      const char* name = "chunk_attention_dq_bwd_sm80_kernel";
      allow_shared_memory(chunk_attention_dq_bwd_sm80_kernel<T, DPAD>, Traits::kSharedBytes, name);
      chunk_attention_dq_bwd_sm80_kernel<T, DPAD>
          <<<grid_x(blocks, name), Traits::kThreads, Traits::kSharedBytes, stream>>>(k);
      check_launch(name);
    }
  }
  {
    using Traits = DkdvTraits<DPAD>;
    const int64_t blocks = key_tiles(k.size, k.chunks, Traits::kKeys) * k.size.heads * k.shares;
    if (blocks > 0) {
      const char* name = "chunk_attention_dkdv_bwd_sm80_kernel";
      allow_shared_memory(chunk_attention_dkdv_bwd_sm80_kernel<T, DPAD>, Traits::kSharedBytes, name);
      chunk_attention_dkdv_bwd_sm80_kernel<T, DPAD>
          <<<grid_x(blocks, name), Traits::kThreads, Traits::kSharedBytes, stream>>>(k);
      check_launch(name);
    }
  }
}

template <class T>
void launch(const AttentionBwdParams& p, const BwdScratch& scratch, const Shares& shares, cudaStream_t stream) {
  const Sizes& s = p.fwd.size;
  if (s.sequences * s.heads == 0) return;

  BwdKernelParams k;
  k.size = s;
  k.q = make_product_queries(p, {}, stream);
  k.dout = scratch.dout;
  k.cos = static_cast<const float*>(p.fwd.rotary.cos);
  k.sin = static_cast<const float*>(p.fwd.rotary.sin);
  k.scale = static_cast<float>(p.fwd.scale);
  k.scale_log2 = static_cast<float>(p.fwd.scale) * kLog2e;
  k.chunks = p.fwd.chunks;
  k.lse = static_cast<const float*>(p.fwd.lse);
  k.delta = scratch.delta;
  k.dq = scratch.dq;
  k.shares = static_cast<int>(shares.count);
  k.share_stride = shares.extent;
  k.dchunk_k = shares.dchunk_k(scratch);
  k.dchunk_v = shares.dchunk_v(scratch);

  if (s.head_dim <= 64) {
    launch_products<T, 64>(k, stream);
  } else if (s.head_dim <= 96) {
    launch_products<T, 96>(k, stream);
  } else if (s.head_dim <= 128) {
    launch_products<T, 128>(k, stream);
  } else if (s.head_dim <= 192) {
    launch_products<T, 192>(k, stream);
  } else {
    launch_products<T, 256>(k, stream);
  }

  add_shares(shares, scratch, stream);
}

}  // namespace

namespace sm80 {

const char* bwd_refuses(const AttentionBwdParams& p) { return fwd_refuses(p.fwd); }

Launch bwd(const AttentionBwdParams& p, BwdScratch& scratch, Arena& arena) {
  const Shares shares = take_shares(p, shares_of(p), arena);
  return [&p, scratch, shares](cudaStream_t stream) {
    if (p.fwd.size.dtype == DType::bf16) {
      launch<bf16>(p, scratch, shares, stream);
    } else {
      launch<f16>(p, scratch, shares, stream);
    }
  };
}

}  // namespace sm80

KernelList chunk_attention_bwd_sm80_kernels() {
#define RAT_ENTRY(T, DPAD)                                                                                             \
  {"chunk_attention_dq_bwd_sm80<" #T ", " #DPAD ">",                                                                   \
   reinterpret_cast<const void*>(&chunk_attention_dq_bwd_sm80_kernel<T, DPAD>)},                                       \
  {                                                                                                                    \
    "chunk_attention_dkdv_bwd_sm80<" #T ", " #DPAD ">",                                                                \
        reinterpret_cast<const void*>(&chunk_attention_dkdv_bwd_sm80_kernel<T, DPAD>)                                  \
  }
  static const KernelEntry entries[] = {
      RAT_ENTRY(bf16, 64), RAT_ENTRY(bf16, 96), RAT_ENTRY(bf16, 128), RAT_ENTRY(bf16, 192), RAT_ENTRY(bf16, 256),
      RAT_ENTRY(f16, 64),  RAT_ENTRY(f16, 96),  RAT_ENTRY(f16, 128),  RAT_ENTRY(f16, 192),  RAT_ENTRY(f16, 256),
  };
#undef RAT_ENTRY
  return {entries, static_cast<int>(sizeof(entries) / sizeof(entries[0]))};
}

}  // namespace rat::cuda
