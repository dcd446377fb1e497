// Chunk attention backward on mma.sync, for bfloat16 and float16, compute capability 8.0 and newer. Deterministic: no
// atomics; every sum is taken in one fixed order.
//
// With P_tj = exp(scale (R q)_t . K_j - lse_t) and dS_tj = P_tj (do_t . V_j - Delta_t), four kernels:
//  0. rotate: R q in T to the workspace; a plain copy of q and do where they cannot be read in 16-byte pieces.
//  1. dq: a block owns (query tile, query group) and loops over the heads of the group and their keys, so that the sum over
//     the group never leaves registers. 3 products: S = Q K^T, dP = dO V^T, dQ += dS K. Rotates back, writes float32.
//  2. dkdv: a block owns (key tile, head, share of the queries) and walks the query tiles from the last token of the sequence
//     to the first that sees the tile, so that blocks of one head that start together find dO and Q in L2. It computes the
//     transposed scores, S^T = K Q^T and dP^T = V dO^T, whose accumulators are the left operands of dV += P^T dO and
//     dK += dS^T Q: probabilities never pass through shared memory. 4 products.
//  3. reduce: adds the shares of the queries, where there were too few key tiles to fill the chip without cutting them.
#include "../ptx/mma.cuh"
#include "families.h"
#include "tiles.cuh"

namespace rat::cuda {
namespace {

struct BwdKernelParams {
  Sizes size;
  Rows q;     // rotated
  Rows dout;  // do_t. Rows of q and dout are 16-byte aligned
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

template <class T, int DPAD>
__global__ void __launch_bounds__(DqTraits<DPAD>::kThreads, DqTraits<DPAD>::kBlocks)
    chunk_attention_dq_bwd_sm80_kernel(const __grid_constant__ BwdKernelParams p) {
  using Traits = DqTraits<DPAD>;
  constexpr int MT = Traits::kRowTiles, NT = Traits::kKeys / 8, OT = DPAD / 8;
  extern __shared__ __align__(128) unsigned char shared[];

  __shared__ int64_t place[4];  // what is needed again between heads and at the end, kept out of the loop's registers
  __shared__ int counts[3];

  int64_t group;
  const WorkItem work = ordered_item(p.size, p.order, blockIdx.x, Traits::kQueries, &group);
  const Sequence& sequence = work.sequence;
  const int64_t first_token = sequence.begin + work.tile * Traits::kQueries;
  if (first_token >= sequence.end) return;
  const int rows = static_cast<int>(min(static_cast<int64_t>(Traits::kQueries), sequence.end - first_token));
  const int head_dim = static_cast<int>(p.size.head_dim);
  const TileChunks chunks(sequence.start + work.tile * Traits::kQueries, p.size.chunk_size);
  const int keys = chunks.of(rows - 1);
  const int blocks = (keys + Traits::kKeys - 1) / Traits::kKeys;
  const int full_blocks = chunks.first / Traits::kKeys;
  const int heads = static_cast<int>(p.size.heads / p.size.q_groups);

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_row = warp * MT * 16;
  const uint32_t dout_tile = shared_address(shared);
  const uint32_t query_tile = Traits::kRegisters ? dout_tile : dout_tile + Traits::kRowsBytes;
  const uint32_t states = dout_tile + (Traits::kRegisters ? 1 : 2) * Traits::kRowsBytes;

  if (thread == 0) {
    place[0] = sequence.batch;
    place[1] = first_token;
    place[2] = group;
    place[3] = chunk_offset(p.size, p.chunks, sequence.index, group * heads);
    counts[0] = rows;
    counts[1] = full_blocks;
    counts[2] = blocks;
  }

  float dq[MT][OT][4];
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < OT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dq[m][n][i] = 0.0f;
    }
  }

  if (blocks > 0) {
    const auto load_states = [&](int head, int block, int stage) {
      const int first = block * Traits::kKeys;
      const int64_t offset = place[3] + head * p.chunks.head + static_cast<int64_t>(first) * head_dim;
      const uint32_t to = states + stage * 2 * Traits::kStateBytes;
      load_tile<T, Traits::kKeys, DPAD, Traits::kThreads>(to, static_cast<const T*>(p.chunks.k) + offset, head_dim,
                                                          keys - first, head_dim, thread);
      load_tile<T, Traits::kKeys, DPAD, Traits::kThreads>(to + Traits::kStateBytes,
                                                          static_cast<const T*>(p.chunks.v) + offset, head_dim,
                                                          keys - first, head_dim, thread);
    };
    const auto load_dout = [&](int head) {
      int again = thread;  // hidden from the compiler, which would otherwise keep row offsets in registers for so long
      asm volatile("" : "+r"(again));
      load_tile<T, Traits::kQueries, DPAD, Traits::kThreads>(
          dout_tile, row_pointer<T>(p.dout, place[0], place[1], place[2] * heads + head), p.dout.token, counts[0],
          head_dim, again);
    };
    __syncthreads();  // place is written

    load_tile<T, Traits::kQueries, DPAD, Traits::kThreads>(
        query_tile, row_pointer<T>(p.q, sequence.batch, first_token, group), p.q.token, rows, head_dim, thread);
    cp_async_commit();
    load_states(0, 0, 0);
    if (!Traits::kRegisters) load_dout(0);
    cp_async_commit();
    LeftOperand<DPAD, MT, Traits::kRegisters> query, dout;
    if (Traits::kRegisters) {
      cp_async_wait<1>();
      __syncthreads();  // the Q tile has landed
    }
    query.bind(query_tile + warp_row * Tile<DPAD>::kRowBytes, lane);
    if (Traits::kRegisters) {
      __syncthreads();  // all warps hold their Q: its memory becomes the dO tile
      load_dout(0);
      cp_async_commit();
    }

    float lse[MT][2], delta[MT][2];  // of rows g and g + 8; lse in powers of two
    int head = 0, block = 0, stage = 0;
#pragma unroll 1
    while (head < heads) {
      cp_async_wait<0>();
      __syncthreads();  // this stage has landed, the other is used up
      if (block == 0) {
        if (!Traits::kRegisters && head > 0) {
          load_dout(head);
          cp_async_commit();
          cp_async_wait<0>();
          __syncthreads();
        }
        dout.bind(dout_tile + warp_row * Tile<DPAD>::kRowBytes, lane);
        const int64_t scalars = (place[0] * p.size.heads + place[2] * heads + head) * p.size.tokens + place[1];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int row = warp_row + m * 16 + r * 8 + lane / 4;
            lse[m][r] = row < counts[0] ? p.lse[scalars + row] * kLog2e : 0.0f;
            delta[m][r] = row < counts[0] ? p.delta[scalars + row] : 0.0f;
          }
        }
        if (Traits::kRegisters) {
          __syncthreads();  // all warps hold their dO: the next head's may come
          if (head + 1 < heads) load_dout(head + 1);
        }
      }
      const bool last = block + 1 == counts[2];
      if (!last || head + 1 < heads) load_states(last ? head + 1 : head, last ? 0 : block + 1, stage ^ 1);
      cp_async_commit();

      const uint32_t key_tile = states + stage * 2 * Traits::kStateBytes;
      float s[MT][NT][4], ds[MT][NT][4];
      product_over_d<T, DPAD>(s, query, Tile<DPAD>::lane_columns(key_tile, lane));
      product_over_d<T, DPAD>(ds, dout, Tile<DPAD>::lane_columns(key_tile + Traits::kStateBytes, lane));
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
      if (block >= counts[1]) {
        int again = lane;  // likewise hidden, as most blocks are seen whole
        asm volatile("" : "+r"(again));
        const int column = block * Traits::kKeys + again % 4 * 2;
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int visible = chunks.of(warp_row + m * 16 + r * 8 + again / 4) - column;
#pragma unroll
            for (int n = 0; n < NT; ++n) {
              if (n * 8 >= visible) ds[m][n][2 * r] = 0.0f;
              if (n * 8 + 1 >= visible) ds[m][n][2 * r + 1] = 0.0f;
            }
          }
        }
      }
      uint32_t left[MT][NT / 2][4];
#pragma unroll
      for (int m = 0; m < MT; ++m) pack_left<T>(left[m], ds[m]);
      product_over_rows<T, DPAD, MT, NT / 2, 1>(dq, left, Tile<DPAD>::lane_rows(key_tile, lane));

      stage ^= 1;
      block = last ? 0 : block + 1;
      head += last;
    }
    cp_async_wait<0>();
    __syncthreads();  // all tiles are used up: their memory takes dQ
  }

  float* out = reinterpret_cast<float*>(shared);
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
  const int half = head_dim / 2;
  for (int index = thread; index < counts[0] * (DPAD / 8); index += Traits::kThreads) {
    const int row = index / (DPAD / 8), piece = index % (DPAD / 8);
    if (4 * piece >= half) continue;
    float low[4], high[4];
    load4(out + row * Traits::kOutStride + 4 * piece, low, true);
    load4(out + row * Traits::kOutStride + 4 * piece + half, high, true);
    rotate4(low, high, p.cos, p.sin, chunks.of(row), half, piece, -1.0f);
    float* to =
        p.dq + ((place[0] * p.size.tokens + place[1] + row) * p.size.q_groups + place[2]) * head_dim + 4 * piece;
    *reinterpret_cast<float4*>(to) = make_float4(low[0], low[1], low[2], low[3]);
    *reinterpret_cast<float4*>(to + half) = make_float4(high[0], high[1], high[2], high[3]);
  }
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

__device__ __forceinline__ int clamp_token(int64_t token) {
  return static_cast<int>(token < 0 ? 0 : token > INT32_MAX ? INT32_MAX : token);
}

template <class T, int DPAD>
__global__ void __launch_bounds__(DkdvTraits<DPAD>::kThreads, DkdvTraits<DPAD>::kBlocks)
    chunk_attention_dkdv_bwd_sm80_kernel(const __grid_constant__ BwdKernelParams p) {
  using Traits = DkdvTraits<DPAD>;
  constexpr int MT = Traits::kRowTiles, NT = Traits::kStep / 8, SPLIT = Traits::kSplit, OT = DPAD / 8 / SPLIT;
  extern __shared__ __align__(128) unsigned char shared[];

  __shared__ int64_t place[5];  // what the loop needs rarely, kept out of its registers
  __shared__ int counts[4];

  // Shares of a tile are neighbours, then tiles, heaviest (earliest keys) first, then heads.
  const int share = static_cast<int>(blockIdx.x % p.shares);
  const int64_t tile_head = blockIdx.x / p.shares;
  const bool compact = p.chunks.compact;
  const int64_t tiles =
      compact ? p.chunks.rows / Traits::kKeys + p.size.sequences : (p.chunks.rows + Traits::kKeys - 1) / Traits::kKeys;
  const int64_t head = tile_head / tiles % p.size.heads;
  const int64_t tile_index = tile_head % tiles + (compact ? 0 : tile_head / tiles / p.size.heads * tiles);
  const KeyTile tile = key_tile(p.size, p.chunks, tile_index, Traits::kKeys);
  if (tile.first >= tile.closed) return;
  const Sequence& sequence = tile.sequence;
  const int keys = static_cast<int>(min(static_cast<int64_t>(Traits::kKeys), tile.closed - tile.first));
  const int head_dim = static_cast<int>(p.size.head_dim);
  const int length =
      static_cast<int>(sequence.end - sequence.begin);  // a sequence is shorter than 2^31, as are lengths
  const int64_t chunk_base = chunk_offset(p.size, p.chunks, sequence.index, head) + tile.first * head_dim;
  // Token r of the sequence sees key j of the tile when r >= seen_from + j * chunk_size.
  const int64_t seen_from = (tile.first + 1) * p.size.chunk_size - sequence.start;

  // Query tiles that see the first key, counted from the last token backwards; this block has [first_turn, turns).
  const int last_tile = (length - 1) / Traits::kQueries;
  const int first_seen = clamp_token(seen_from);
  const int seen_tiles = first_seen < length ? last_tile - first_seen / Traits::kQueries + 1 : 0;
  const int first_turn = static_cast<int>(static_cast<int64_t>(seen_tiles) * share / p.shares);
  const int turns = static_cast<int>(static_cast<int64_t>(seen_tiles) * (share + 1) / p.shares);

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_row = (SPLIT == 1 ? warp : warp % (Traits::kWarps / 2)) * MT * 16;
  const int column_half = SPLIT == 1 ? 0 : warp / (Traits::kWarps / 2);
  const uint32_t stages = shared_address(shared);
  const uint32_t scalars = stages + 2 * 2 * Traits::kRowsBytes;
  const float* scalar_values = reinterpret_cast<const float*>(shared + 2 * 2 * Traits::kRowsBytes);
  const uint32_t key_states = stages + (Traits::kKeyRegisters ? 0 : Traits::kLoopBytes);
  const uint32_t value_states = stages + (Traits::kValueRegisters ? Traits::kStageBytes
                                          : Traits::kKeyRegisters ? Traits::kLoopBytes
                                                                  : Traits::kLoopBytes + Traits::kStateBytes);

  if (thread == 0) {
    place[0] = seen_from;
    place[1] = chunk_base + share * p.share_stride;
    place[2] =
        sequence.batch * p.q.batch + sequence.begin * p.q.token + head / (p.size.heads / p.size.q_groups) * p.q.head;
    place[3] = sequence.batch * p.dout.batch + sequence.begin * p.dout.token + head * p.dout.head;
    place[4] = (sequence.batch * p.size.heads + head) * p.size.tokens + sequence.begin;
    counts[0] = last_tile;
    counts[1] = length - last_tile * Traits::kQueries;  // queries of the last tile
    counts[2] = turns;
    counts[3] = keys;
  }

  float dk[MT][OT][4], dv[MT][OT][4];
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < OT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dk[m][n][i] = dv[m][n][i] = 0.0f;
    }
  }

  if (first_turn < turns) {
    load_tile<T, Traits::kKeys, DPAD, Traits::kThreads>(key_states, static_cast<const T*>(p.chunks.k) + chunk_base,
                                                        head_dim, keys, head_dim, thread);
    load_tile<T, Traits::kKeys, DPAD, Traits::kThreads>(value_states, static_cast<const T*>(p.chunks.v) + chunk_base,
                                                        head_dim, keys, head_dim, thread);
    cp_async_commit();

    const auto load = [&](int turn, int stage) {
      const int64_t offset = static_cast<int64_t>(counts[0] - turn) * Traits::kQueries;
      const int rows = turn == 0 ? counts[1] : Traits::kQueries;
      const uint32_t to = stages + stage * 2 * Traits::kRowsBytes;
      load_tile<T, Traits::kQueries, DPAD, Traits::kThreads>(
          to, static_cast<const T*>(p.q.ptr) + place[2] + offset * p.q.token, p.q.token, rows, head_dim, thread);
      load_tile<T, Traits::kQueries, DPAD, Traits::kThreads>(
          to + Traits::kRowsBytes, static_cast<const T*>(p.dout.ptr) + place[3] + offset * p.dout.token, p.dout.token,
          rows, head_dim, thread);
      if (thread < 2 * Traits::kQueries) {
        const int row = thread % Traits::kQueries;
        const float* from = (thread < Traits::kQueries ? p.lse : p.delta) + place[4] + offset;
        cp_async4(scalars + (stage * 2 * Traits::kQueries + thread) * 4, row < rows ? from + row : from, row < rows);
      }
    };

    LeftOperand<DPAD, MT, Traits::kKeyRegisters> key;
    LeftOperand<DPAD, MT, Traits::kValueRegisters> value;
    if (Traits::kKeyRegisters) cp_async_wait<0>();
    __syncthreads();  // place is written; in the register variant K and V have landed
    key.bind(key_states + warp_row * Tile<DPAD>::kRowBytes, lane);
    value.bind(value_states + warp_row * Tile<DPAD>::kRowBytes, lane);
    if (Traits::kKeyRegisters) __syncthreads();  // all warps hold what passed through the stages
    load(first_turn, 0);
    cp_async_commit();

    int stage = 0;
#pragma unroll 1
    for (int turn = first_turn; turn < counts[2]; ++turn) {
      cp_async_wait<0>();
      __syncthreads();  // this stage has landed, the other is used up
      if (turn + 1 < counts[2]) load(turn + 1, stage ^ 1);
      cp_async_commit();

      const uint32_t query_tile = stages + stage * 2 * Traits::kRowsBytes;
      const float* lse_row = scalar_values + stage * 2 * Traits::kQueries + lane % 4 * 2;
#pragma unroll 1
      for (int step = 0; step < Traits::kQueries; step += Traits::kStep) {
        // Query r of the step sees key j of the warp when r >= from + j * chunk_size.
        const int64_t from = place[0] + warp_row * p.size.chunk_size -
                             (static_cast<int64_t>(counts[0] - turn) * Traits::kQueries + step);
        if (from >= Traits::kStep) continue;  // none sees any
        const uint32_t query_rows = query_tile + step * Tile<DPAD>::kRowBytes;
        const uint32_t dout_tile = query_rows + Traits::kRowsBytes;
        float weight[MT][NT][4];
        product_over_d<T, DPAD>(weight, key, Tile<DPAD>::lane_columns(query_rows, lane));
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const float2 lse = *reinterpret_cast<const float2*>(lse_row + step + n * 8);
          const float low = -lse.x * kLog2e, high = -lse.y * kLog2e;
#pragma unroll
          for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              weight[m][n][i] = exp2_fast(fmaf(weight[m][n][i], p.scale_log2, i % 2 ? high : low));
            }
          }
        }
        if (from + (MT * 16 - 1) * p.size.chunk_size > 0) {
#pragma unroll
          for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const int first = clamp_token(from + (m * 16 + r * 8 + lane / 4) * p.size.chunk_size) - lane % 4 * 2;
#pragma unroll
              for (int n = 0; n < NT; ++n) {
                if (n * 8 < first) weight[m][n][2 * r] = 0.0f;
                if (n * 8 + 1 < first) weight[m][n][2 * r + 1] = 0.0f;
              }
            }
          }
        }
        uint32_t left[MT][NT / 2][4];
#pragma unroll
        for (int m = 0; m < MT; ++m) pack_left<T>(left[m], weight[m]);
        uint32_t dout_lane = Tile<DPAD>::lane_rows(dout_tile, lane);
        uint32_t query_lane = Tile<DPAD>::lane_rows(query_rows, lane);
        if (SPLIT == 2) {
          dout_lane = half_columns(dout_lane, column_half);
          query_lane = half_columns(query_lane, column_half);
        }
        product_over_rows<T, DPAD, MT, NT / 2, SPLIT>(dv, left, dout_lane);

        float ds[MT][NT][4];
        product_over_d<T, DPAD>(ds, value, Tile<DPAD>::lane_columns(dout_tile, lane));
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const float2 delta = *reinterpret_cast<const float2*>(lse_row + Traits::kQueries + step + n * 8);
#pragma unroll
          for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) ds[m][n][i] = weight[m][n][i] * (ds[m][n][i] - (i % 2 ? delta.y : delta.x));
          }
        }
#pragma unroll
        for (int m = 0; m < MT; ++m) pack_left<T>(left[m], ds[m]);
        product_over_rows<T, DPAD, MT, NT / 2, SPLIT>(dk, left, query_lane);
      }
      stage ^= 1;
    }
    cp_async_wait<0>();
  }

  __syncthreads();  // place is written also where there was no query
  float* dk_rows = p.dchunk_k + place[1];
  float* dv_rows = p.dchunk_v + place[1];
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
        if (row < counts[3] && column < head_dim) {
          const int64_t offset = static_cast<int64_t>(row) * head_dim + column;
#pragma unroll
          for (int i = 0; i < 8; ++i) a[i] *= p.scale;
          store8(dk_rows + offset, a, true);
          store8(dv_rows + offset, b, true);
        }
      }
    }
  }
}

// ---- host -------------------------------------------------------------------------------------------------------------

// How the workspace is cut, from sizes alone.
struct Plan {
  bool rotate;            // R q goes to the workspace
  bool copy_dout;         // so does do, where it cannot be read in 16-byte pieces
  int64_t rotated_count;  // elements
  int64_t dout_count;
  int shares;      // of the queries of a key tile
  int64_t extent;  // elements of one dchunk tensor
};

Plan make_plan(const AttentionBwdParams& p) {
  const Sizes& s = p.fwd.size;
  const ChunkStates& c = p.fwd.chunks;
  Plan plan;
  plan.rotate = p.fwd.rotary.cos != nullptr || !s.aligned16;
  plan.copy_dout = !s.aligned16;
  plan.rotated_count = plan.rotate ? s.batch * s.tokens * s.q_groups * s.head_dim : 0;
  plan.dout_count = plan.copy_dout ? s.batch * s.tokens * s.heads * s.head_dim : 0;
  plan.extent = states_extent(s, c);
  // Enough blocks for two on each of 132 multiprocessors, but no share under 256 queries.
  const int64_t keys = s.head_dim <= 128 ? DkdvTraits<128>::kKeys : DkdvTraits<256>::kKeys;
  const int64_t blocks = key_tiles(s, c, keys) * s.heads;
  int64_t shares = blocks > 0 ? 264 / blocks : 1;
  if (shares > s.tokens / 256) shares = s.tokens / 256;
  if (shares > 16) shares = 16;
  plan.shares = static_cast<int>(shares < 1 ? 1 : shares);
  return plan;
}
static_assert(DkdvTraits<32>::kKeys == 128 && DkdvTraits<64>::kKeys == 128 && DkdvTraits<96>::kKeys == 128 &&
                  DkdvTraits<128>::kKeys == 128 && DkdvTraits<192>::kKeys == DkdvTraits<256>::kKeys,
              "make_plan knows the key tiles");

struct Pieces {
  Piece<uint16_t> rotated;
  Piece<uint16_t> dout;
  Piece<float> shares_k;  // (shares, extent) each
  Piece<float> shares_v;
};

Pieces take_pieces(const Plan& plan, Arena& arena) {
  Pieces pieces;
  pieces.rotated = arena.take<uint16_t>(plan.rotated_count);
  pieces.dout = arena.take<uint16_t>(plan.dout_count);
  const int64_t partial = plan.shares > 1 ? plan.shares * plan.extent : 0;
  pieces.shares_k = arena.take<float>(partial);
  pieces.shares_v = arena.take<float>(partial);
  return pieces;
}

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
void launch(const AttentionBwdParams& p, const BwdScratch& scratch, const Plan& plan, const Pieces& pieces,
            cudaStream_t stream) {
  const Sizes& s = p.fwd.size;
  if (s.sequences * s.heads == 0) return;

  BwdKernelParams k;
  k.size = s;
  k.q = p.fwd.q;
  k.dout = scratch.dout;
  const auto copy = [&](Rows& rows, int64_t groups, const float* cos, const float* sin, void* to) {
    const char* name = "chunk_attention_rotate_bwd_kernel";
    const int64_t threads = s.batch * s.tokens * groups * (s.head_dim / 8);
    if (threads == 0) return;
    chunk_attention_rotate_bwd_kernel<T>
        <<<grid_x(ceil_div(threads, 256), name), 256, 0, stream>>>(s, rows, groups, cos, sin, static_cast<T*>(to));
    check_launch(name);
    rows = Rows{to, s.tokens * groups * s.head_dim, groups * s.head_dim, s.head_dim};
  };
  if (plan.rotate) {
    copy(k.q, s.q_groups, static_cast<const float*>(p.fwd.rotary.cos), static_cast<const float*>(p.fwd.rotary.sin),
         pieces.rotated.get());
  }
  if (plan.copy_dout) copy(k.dout, s.heads, nullptr, nullptr, pieces.dout.get());
  k.cos = static_cast<const float*>(p.fwd.rotary.cos);
  k.sin = static_cast<const float*>(p.fwd.rotary.sin);
  k.scale = static_cast<float>(p.fwd.scale);
  k.scale_log2 = static_cast<float>(p.fwd.scale) * kLog2e;
  k.chunks = p.fwd.chunks;
  k.lse = static_cast<const float*>(p.fwd.lse);
  k.delta = scratch.delta;
  k.dq = scratch.dq;
  k.shares = plan.shares;
  k.share_stride = plan.extent;
  k.dchunk_k = plan.shares > 1 ? pieces.shares_k : scratch.dchunk_k;
  k.dchunk_v = plan.shares > 1 ? pieces.shares_v : scratch.dchunk_v;

  if (s.head_dim <= 32) {
    launch_products<T, 32>(k, stream);
  } else if (s.head_dim <= 64) {
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

  if (plan.shares > 1) add_shares(pieces.shares_k, pieces.shares_v, plan.shares, plan.extent, scratch, stream);
}

}  // namespace

namespace sm80 {

const char* bwd_refuses(const AttentionBwdParams& p) { return fwd_refuses(p.fwd); }

Launch bwd(const AttentionBwdParams& p, const BwdScratch& scratch, Arena& arena) {
  const Plan plan = make_plan(p);
  const Pieces pieces = take_pieces(plan, arena);
  return [&p, scratch, plan, pieces](cudaStream_t stream) {
    if (p.fwd.size.dtype == DType::bf16) {
      launch<bf16>(p, scratch, plan, pieces, stream);
    } else {
      launch<f16>(p, scratch, plan, pieces, stream);
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
      RAT_ENTRY(bf16, 32),
      RAT_ENTRY(bf16, 64),
      RAT_ENTRY(bf16, 96),
      RAT_ENTRY(bf16, 128),
      RAT_ENTRY(bf16, 192),
      RAT_ENTRY(bf16, 256),
      RAT_ENTRY(f16, 32),
      RAT_ENTRY(f16, 64),
      RAT_ENTRY(f16, 96),
      RAT_ENTRY(f16, 128),
      RAT_ENTRY(f16, 192),
      RAT_ENTRY(f16, 256),
      {"chunk_attention_rotate_bwd<bf16>", reinterpret_cast<const void*>(&chunk_attention_rotate_bwd_kernel<bf16>)},
      {"chunk_attention_rotate_bwd<f16>", reinterpret_cast<const void*>(&chunk_attention_rotate_bwd_kernel<f16>)},
      {"chunk_attention_reduce_bwd", reinterpret_cast<const void*>(&chunk_attention_reduce_bwd_kernel<float>)},
  };
#undef RAT_ENTRY
  return {entries, static_cast<int>(sizeof(entries) / sizeof(entries[0]))};
}

}  // namespace rat::cuda
