// Chunk attention backward on Hopper (sm_90a), for bfloat16 and float16 and heads up to 128. Deterministic, unless the caller
// waives it: no sum depends on which block comes first.
//
// With P_tj = exp(scale (R q)_t . K_j - lse_t) and dS_tj = P_tj (do_t . V_j - Delta_t), three steps:
//  0. rotate (attention_tiles.cuh): R q in T to the workspace.
//  1. dqkv: everything in five products, each 2 D FLOP a query and visible key. A block owns the dK, dV of (128 chunk states,
//     head) in registers and walks the query tiles that see them, from the last token of the sequence backwards:
//       S^T = K Q^T,  dP^T = V dO^T,  dV += P^T dO,  dK += dS^T Q,  and  dQ = dS K,  which it adds to a sum in global memory.
//     The transposed scores are, rounded, left operands in registers: P never passes through shared memory, dS once.
//     Where there are few key tiles, shares of the queries are items of their own.
//  2. finish: dQ from its tiles to (B, T, G, D), rotated back and scaled. Then the shares, if any, are added up.
// Reads per (128 keys, query, head): q and do, 2 D elements of T through L2, 8 bytes of lse and Delta; adds D floats in L2.
//
// The sum of dQ over key tiles and over the heads of a group is taken in one order: key tiles first to last, in each the heads
// of the group. Every (query tile, group) has a turn counter; a block adds when the counter shows its rank. Items are handed
// out in that same order by a global counter, so a block only ever waits for blocks that began before it: no deadlock, whatever
// else runs on the GPU. Blocks of one query tile start together and fall in step one tile behind each other; the waiting lies in
// warps of its own, two tiles deep.
//
// One block a multiprocessor:
//   warp 0           one thread takes items, tells the others, and feeds K, V (once an item) and the ring of q, do.
//   warp 1           lse and Delta of the query tiles, beside do in the ring.
//   warps 2, 3       one thread each waits for the turn of a query tile and adds dQ to it through the copy engine.
//   warpgroups 1, 2  consumers, 64 keys each. dS of both meets in shared memory; each computes its half of dQ.
// The products of a tile are queued so that the tensor cores have work meanwhile: dP^T during the exponentials, dV during dS,
// dK while dQ leaves.
//
// Shared memory: K, V; two stages of q, do, lse, Delta; two of dS (one barrier a tile suffices then); dQ on its way out. Tiles
// lie in panels of 64 columns, 128 bytes a row, 16-byte pieces swizzled. dQ lies as the registers do, 16 bytes a thread: so it
// stays in global memory until `finish` puts it in order.
//
// Chunk rows past the closed ones and tokens past the end of a packed sequence may hold anything, NaN too: both are set to
// zero in shared memory. Their lse is +inf, so that their weight is zero.
#include <cuda.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../device/elements.cuh"
#include "../device/sequence.cuh"
#include "../host/launch.h"
#include "../ptx/cp_async.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/mma.cuh"
#include "../ptx/tma.cuh"
#include "../ptx/wgmma.cuh"
#include "families.h"
#include "tiles.cuh"

namespace rat::cuda {
namespace {

template <class T_, int DIM>
struct Traits {
  using T = T_;
  static constexpr int kDim = DIM;  // head size, padded
  static constexpr int kPanels = DIM / 64;
  static constexpr int kKeys = 128;                       // chunk states an item
  static constexpr int kQueries = DIM == 128 ? 64 : 128;  // a tile. A consumer's part of dQ is 64 x 64 either way
  static constexpr int kConsumers = 2;                    // warpgroups
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  static constexpr int kStages = 2;
  static constexpr uint32_t kStateBytes = kKeys * DIM * 2, kStatePanel = kKeys * 128;
  static constexpr uint32_t kRowsBytes = kQueries * DIM * 2, kRowsPanel = kQueries * 128;
  static constexpr uint32_t kScoreBytes = kQueries * kKeys * 2, kScorePanel = kQueries * 128;
  static constexpr int kTileFloats = kQueries * DIM;  // of dQ
  static_assert(DIM == 64 || DIM == 128);
  static_assert(kTileFloats == 64 * 64 * kConsumers);
};

// What an item is. Made by the thread that feeds, read by everyone. Query tile m has tokens [m, m + 1) * kQueries of its
// sequence; the item walks tiles last, last - 1, ... last - steps + 1.
struct Item {
  int64_t scalars;  // offset of the sequence's first token in lse and Delta
  int64_t states;   // offset of the first key in dchunk_k, dchunk_v
  int64_t seen;     // query r of the sequence sees key j of the item when r >= seen + j * chunk_size
  int64_t turns;    // offset of tile 0 of this group in the turn counters; its dQ starts at kTileFloats times that
  int32_t token;    // of the sequence's first token
  int32_t batch;
  int32_t head;
  int32_t group;
  int32_t length;  // tokens of the sequence
  int32_t last;
  int32_t steps;
  int32_t keys;     // valid chunk states; 0: no more items
  int32_t key_row;  // of the first one in the tensor map
  int32_t key_outer;
  int32_t rank;  // turn at which this item adds
};
constexpr int kItemSlots = 4;

template <class C>
struct Shared {
  using T = typename C::T;
  alignas(1024) T k[C::kStateBytes / 2];
  alignas(1024) T v[C::kStateBytes / 2];
  alignas(1024) T q[C::kStages][C::kRowsBytes / 2];
  alignas(1024) T dout[C::kStages][C::kRowsBytes / 2];
  alignas(1024) T ds[2][C::kScoreBytes / 2];  // [query][key]
  alignas(1024) float dq[2][C::kTileFloats];
  float minus_lse[C::kStages][C::kQueries];  // in powers of two
  float delta[C::kStages][C::kQueries];
  Item item[kItemSlots];
  alignas(8) uint64_t item_full[kItemSlots], item_empty[kItemSlots];
  uint64_t state_full, state_empty;
  uint64_t q_full[C::kStages], q_empty[C::kStages], dout_full[C::kStages], dout_empty[C::kStages];
  uint64_t dq_full[2], dq_empty[2];
};

enum NamedBarrier { kScoresWritten = 1, kRowsCleared = 2 };  // both consumers

// Items in order: key tiles first to last, as early ones are seen by the most queries; in each the (sequence, head) pairs, and
// of each the shares of the queries. Compact rows: key tiles as key_tile() numbers them, then heads, then shares.
struct Schedule {
  uint32_t total = 0;
  uint32_t tiles = 1;  // of a sequence
  uint32_t pairs = 1;
  uint32_t shares = 1;
};

struct Arguments {
  Sizes size;
  ChunkStates chunks;
  float scale;
  float scale_log2;
  const float* lse;
  const float* delta;
  float* dq_tiles;  // (query tiles, groups, kTileFloats)
  uint32_t* turns;  // (query tiles, groups), zero at the start
  uint32_t* next;   // item counter, zero at the start
  float* dchunk_k;  // share s of the queries adds s * share_stride
  float* dchunk_v;
  int64_t share_stride;
  bool ordered;  // dQ is summed in order; else the sums start from zeros and nobody waits
  uint32_t heads_per_group;
  uint32_t tiles_per_row;  // query tiles of a dense sequence
  Schedule schedule;
};

// Number of a sequence's first query tile. Packed: sequences own [cu_seqlens[n] / kQueries + n, ...), which never overlap.
template <int QUERIES>
__device__ __forceinline__ int64_t first_query_tile(const Sizes& s, int64_t n, int64_t begin, uint32_t tiles_per_row) {
  return s.cu_seqlens ? begin / QUERIES + n : n * tiles_per_row;
}
template <int QUERIES>
inline int64_t query_tiles(const Sizes& s) {
  return s.cu_seqlens ? s.tokens / QUERIES + s.sequences : s.sequences * ceil_div(s.tokens, QUERIES);
}

__device__ __forceinline__ int clamp_token(int64_t token) {
  return static_cast<int>(token < 0 ? 0 : token > INT32_MAX ? INT32_MAX : token);
}

// False where there is nothing to do.
template <class C>
__device__ __forceinline__ bool describe_item(const Arguments& a, uint32_t index, Item& item) {
  const uint32_t heads = static_cast<uint32_t>(a.size.heads);
  const uint32_t share = index % a.schedule.shares, tile_pair = index / a.schedule.shares;
  int64_t tile_index;
  uint32_t head;
  if (a.chunks.compact) {
    head = tile_pair % heads;
    tile_index = tile_pair / heads;
  } else {
    const uint32_t pair = tile_pair % a.schedule.pairs;
    head = pair % heads;
    tile_index = static_cast<int64_t>(pair / heads) * a.schedule.tiles + tile_pair / a.schedule.pairs;
  }
  const KeyTile tile = key_tile(a.size, a.chunks, tile_index, C::kKeys);
  if (tile.first >= tile.closed) return false;
  const Sequence& q = tile.sequence;
  const int length = static_cast<int>(q.end - q.begin);
  item.scalars = (q.batch * a.size.heads + head) * a.size.tokens + q.begin;
  item.states = chunk_offset(a.size, a.chunks, q.index, head) + tile.first * a.size.head_dim + share * a.share_stride;
  item.seen = (tile.first + 1) * a.size.chunk_size - q.start;
  item.token = static_cast<int>(q.begin);
  item.batch = static_cast<int>(q.batch);
  item.head = static_cast<int>(head);
  item.group = static_cast<int>(head / a.heads_per_group);
  item.turns = first_query_tile<C::kQueries>(a.size, q.index, q.begin, a.tiles_per_row) * a.size.q_groups + item.group;
  item.length = length;
  const int first_seen = clamp_token(item.seen);
  // Query tiles that see the first key, counted from the last token backwards; this share has [begin, end).
  const int last = (length - 1) / C::kQueries;
  const int64_t seen_tiles = first_seen < length ? last - first_seen / C::kQueries + 1 : 0;
  const int begin = static_cast<int>(seen_tiles * share / a.schedule.shares);
  const int end = static_cast<int>(seen_tiles * (share + 1) / a.schedule.shares);
  item.last = last - begin;
  item.steps = end - begin;
  item.keys = static_cast<int>(min(static_cast<int64_t>(C::kKeys), tile.closed - tile.first));
  item.key_row = static_cast<int>(first_chunk_row(a.size, a.chunks, q.index) + tile.first);
  item.key_outer = static_cast<int>(a.chunks.compact ? head : q.index * heads + head);
  item.rank = static_cast<int>(tile.first / C::kKeys * a.heads_per_group + head % a.heads_per_group);
  return true;
}

// ---- warp 0: items, K, V, q, do ---------------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void feed(const Arguments& a, const CUtensorMap& k_map, const CUtensorMap& v_map,
                                     const CUtensorMap& q_map, const CUtensorMap& dout_map, Shared<C>& shared) {
  tma_prefetch_map(&k_map);
  tma_prefetch_map(&v_map);
  tma_prefetch_map(&q_map);
  tma_prefetch_map(&dout_map);
  const uint32_t state_full = shared_address(&shared.state_full), state_empty = shared_address(&shared.state_empty);

  const auto describe = [&](uint32_t number) {
    const uint32_t slot = number % kItemSlots;
    mbarrier_wait(shared_address(&shared.item_empty[slot]), (number / kItemSlots % 2) ^ 1);
    Item& item = shared.item[slot];
    for (;;) {
      const uint32_t index = atomicAdd(a.next, 1u);
      if (index < a.schedule.total) {
        if (describe_item<C>(a, index, item)) break;
      } else {
        item.keys = 0;
        break;
      }
    }
    mbarrier_arrive(shared_address(&shared.item_full[slot]));
  };
  const auto load_rows = [&](const CUtensorMap& map, uint32_t target, uint32_t barrier, int token, int head,
                             int batch) {
    mbarrier_arrive_expect(barrier, C::kRowsBytes);
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      tma_load(target + panel * C::kRowsPanel, &map, barrier, 64 * panel, token, head, batch);
    }
  };

  uint32_t count = 0;  // query tiles so far
  describe(0);
#pragma unroll 1
  for (uint32_t items = 0;; ++items) {
    const Item& item = shared.item[items % kItemSlots];
    if (item.keys == 0) break;
    const int steps = item.steps;
    if (steps > 0) {
      mbarrier_wait(state_empty, (items % 2) ^ 1);
      mbarrier_arrive_expect(state_full, 2 * C::kStateBytes);
#pragma unroll
      for (int panel = 0; panel < C::kPanels; ++panel) {
        const uint32_t offset = panel * C::kStatePanel;
        tma_load(shared_address(shared.k) + offset, &k_map, state_full, 64 * panel, item.key_row, item.key_outer);
        tma_load(shared_address(shared.v) + offset, &v_map, state_full, 64 * panel, item.key_row, item.key_outer);
      }
    } else {  // keeps the phases in step with the items
      mbarrier_wait(state_empty, (items % 2) ^ 1);
      mbarrier_arrive(state_full);
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step, ++count) {
      const uint32_t slot = count % C::kStages, parity = (count / C::kStages % 2) ^ 1;
      const int token = item.token + (item.last - step) * C::kQueries;
      mbarrier_wait(shared_address(&shared.q_empty[slot]), parity);
      load_rows(q_map, shared_address(shared.q[slot]), shared_address(&shared.q_full[slot]), token, item.group,
                item.batch);
      mbarrier_wait(shared_address(&shared.dout_empty[slot]), parity);
      load_rows(dout_map, shared_address(shared.dout[slot]), shared_address(&shared.dout_full[slot]), token, item.head,
                item.batch);
      if (step == 0) describe(items + 1);  // its counter and sequence are fetched while the tiles arrive
    }
    if (steps == 0) describe(items + 1);
  }
}

// ---- warp 1: lse and Delta --------------------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void feed_scalars(const Arguments& a, Shared<C>& shared, int lane) {
  constexpr int kEach = C::kQueries / 32;
  uint32_t count = 0;
#pragma unroll 1
  for (uint32_t items = 0;; ++items) {
    const uint32_t item_slot = items % kItemSlots;
    mbarrier_wait(shared_address(&shared.item_full[item_slot]), items / kItemSlots % 2);
    const Item& item = shared.item[item_slot];
    if (item.keys == 0) break;
    const int steps = item.steps, length = item.length;
    int row = item.last * C::kQueries + lane;
    const float* lse = a.lse + item.scalars;
    const float* delta = a.delta + item.scalars;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, ++count, row -= C::kQueries) {
      float x[kEach], y[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const bool valid = row + 32 * i < length;
        x[i] = valid ? lse[row + 32 * i] * -kLog2e : -INFINITY;
        y[i] = valid ? delta[row + 32 * i] : 0.0f;
      }
      const uint32_t slot = count % C::kStages;
      mbarrier_wait(shared_address(&shared.dout_empty[slot]), (count / C::kStages % 2) ^ 1);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        shared.minus_lse[slot][lane + 32 * i] = x[i];
        shared.delta[slot][lane + 32 * i] = y[i];
      }
      mbarrier_arrive(shared_address(&shared.dout_full[slot]));
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared_address(&shared.item_empty[item_slot]));
  }
}

// ---- warps 2, 3: dQ to global memory, in turn -----------------------------------------------------------------------------

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(x) : "l"(__cvta_generic_to_global(p)) : "memory");
  return x;
}
__device__ __forceinline__ void store_release(uint32_t* p, uint32_t x) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;\n" ::"l"(__cvta_generic_to_global(p)), "r"(x) : "memory");
}

// `slot`: this thread serves every other tile, those of one place of shared memory. A tile's way to global memory and back,
// with the fences around it, takes longer than a tile's products, hence two threads.
template <class C>
__device__ __forceinline__ void drain(const Arguments& a, Shared<C>& shared, uint32_t slot) {
  const uint32_t full = shared_address(&shared.dq_full[slot]), empty = shared_address(&shared.dq_empty[slot]);
  const uint32_t source = shared_address(shared.dq[slot]);
  uint32_t count = 0;
#pragma unroll 1
  for (uint32_t items = 0;; ++items) {
    const uint32_t item_slot = items % kItemSlots;
    mbarrier_wait(shared_address(&shared.item_full[item_slot]), items / kItemSlots % 2);
    const Item& item = shared.item[item_slot];
    if (item.keys == 0) break;
    const int steps = item.steps;
    const uint32_t rank = static_cast<uint32_t>(item.rank);
    int64_t tile = item.turns + item.last * a.size.q_groups;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, ++count, tile -= a.size.q_groups) {
      if (count % 2 != slot) continue;
      uint32_t* turn = a.turns + tile;
      float* target = a.dq_tiles + tile * C::kTileFloats;
      while (a.ordered && load_acquire(turn) != rank) {
      }
      mbarrier_wait(full, count / 2 % 2);
      fence_proxy_async_all();  // the sums before, seen by the acquire, come before this one through the copy engine
      if (a.ordered && rank == 0) {
        bulk_store(target, source, C::kTileFloats * 4);
      } else {
        bulk_add(target, source, C::kTileFloats * 4);
      }
      bulk_commit();
      bulk_wait();
      store_release(turn, rank + 1);
      mbarrier_arrive(empty);
    }
    mbarrier_arrive(shared_address(&shared.item_empty[item_slot]));
  }
}

// ---- consumers --------------------------------------------------------------------------------------------------------

template <int STEPS>
__device__ __forceinline__ void hold_operands(uint32_t (&p)[STEPS][4]) {
#pragma unroll
  for (int i = 0; i < STEPS; ++i) hold_registers(p[i]);
}

// Rows [from, ROWS) of a tile become zeros: by all threads of both consumers.
template <int ROWS, int PANELS>
__device__ __forceinline__ void clear_rows(uint32_t tile, int from, int thread) {
  for (int i = thread; i < (ROWS - from) * 8; i += 256) {
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};\n" ::"r"(tile + panel * ROWS * 128 + from * 128 + i * 16),
                   "r"(0)
                   : "memory");
    }
  }
}

template <class C>
__device__ __forceinline__ void consume(const Arguments& a, Shared<C>& shared, int warpgroup) {
  using T = typename C::T;
  constexpr int kScores = C::kQueries / 2;  // accumulators of S^T
  constexpr int kSteps = C::kQueries / 16;  // of the products over queries
  constexpr int kSums = C::kDim / 2;        // accumulators of dK, of dV
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, quad = lane % 4;
  const int key = warpgroup * 64 + thread / 32 * 16 + lane / 4;  // and key + 8

  const uint64_t k_left = descriptor_k_major(shared_address(shared.k) + warpgroup * 64 * 128);
  const uint64_t v_left = descriptor_k_major(shared_address(shared.v) + warpgroup * 64 * 128);
  const uint64_t q_columns = descriptor_k_major(shared_address(shared.q));
  const uint64_t dout_columns = descriptor_k_major(shared_address(shared.dout));
  const uint64_t q_rows = descriptor_n_major(shared_address(shared.q), C::kRowsPanel);
  const uint64_t dout_rows = descriptor_n_major(shared_address(shared.dout), C::kRowsPanel);
  // dQ: wide heads are halved by columns, narrow ones by queries.
  const uint64_t ds_left = descriptor_k_major(shared_address(shared.ds) + (C::kPanels == 1 ? warpgroup * 64 * 128 : 0));
  const uint64_t k_rows =
      descriptor_n_major(shared_address(shared.k) + (C::kPanels == 1 ? 0 : warpgroup * C::kStatePanel), C::kStatePanel);
  // This lane's address for stmatrix: matrices 0 ... 3 of step k are (queries 16 k ..., keys 0 ...), (same, keys 8 ...),
  // (queries 16 k + 8 ..., keys 0 ...), (same, keys 8 ...) of the warp's 16 keys.
  const uint32_t ds_lane = shared_address(shared.ds) + warpgroup * C::kScorePanel + (lane / 16 * 8 + lane % 8) * 128 +
                           (((thread / 32 * 2 + lane / 8 % 2) ^ lane % 8) * 16);
  const uint32_t dq_thread = shared_address(shared.dq) + warpgroup * (C::kTileFloats * 2) + thread * 16;

  float dk[kSums], dv[kSums], s[kScores], dp[kScores];
  uint32_t p[kSteps][4], ds[kSteps][4];

  const auto leave = [&](uint64_t& barrier) {  // one arrival a warp
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared_address(&barrier));
  };
  // c = left (64 x D) right^T, right being the tile of a stage
  const auto issue_scores = [&](float (&c)[kScores], uint64_t left, uint64_t right) {
    wgmma_ss<T, C::kQueries, false>(c, left, right);
#pragma unroll
    for (int step = 1; step < C::kDim / 16; ++step) {
      wgmma_ss<T, C::kQueries, true>(c, descriptor_add(left, step / 4 * C::kStatePanel + step % 4 * 32),
                                     descriptor_add(right, step / 4 * C::kRowsPanel + step % 4 * 32));
    }
    wgmma_commit();
  };
  const auto issue_sums = [&](float (&c)[kSums], uint32_t (&left)[kSteps][4], uint64_t right) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) wgmma_rs<T, C::kDim>(c, left[step], descriptor_add(right, step * 2048));
    wgmma_commit();
  };

  uint32_t count = 0;  // query tiles so far
#pragma unroll 1
  for (uint32_t items = 0;; ++items) {
    const uint32_t item_slot = items % kItemSlots;
    mbarrier_wait(shared_address(&shared.item_full[item_slot]), items / kItemSlots % 2);
    const Item& item = shared.item[item_slot];
    if (item.keys == 0) break;
#pragma unroll
    for (int i = 0; i < kSums; ++i) dk[i] = dv[i] = 0.0f;
    // Else the zeros move to where the first products are in flight, which then wait for each other.
    hold_registers(dk);
    hold_registers(dv);

    mbarrier_wait(shared_address(&shared.state_full), items % 2);
    const int steps = item.steps;
    if (steps > 0) {
      // Query row + c sees this thread's keys when row + c >= seen[h]; from `clear` on a tile's queries see all 64.
      int seen[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        seen[h] = clamp_token(item.seen + (key + 8 * h) * a.size.chunk_size - 2 * quad);
      }
      const int clear = clamp_token(item.seen + (warpgroup * 64 + 63) * a.size.chunk_size);

      const auto slot_of = [](uint32_t n) { return n % C::kStages; };
      const auto parity_of = [](uint32_t n) { return n / C::kStages % 2; };
      const auto await = [&](uint64_t (&barriers)[C::kStages], uint32_t n) {
        mbarrier_wait(shared_address(&barriers[slot_of(n)]), parity_of(n));
      };

      if (item.keys < C::kKeys) {
        clear_rows<C::kKeys, C::kPanels>(shared_address(shared.k), item.keys, threadIdx.x - 128);
        clear_rows<C::kKeys, C::kPanels>(shared_address(shared.v), item.keys, threadIdx.x - 128);
        fence_proxy_async();  // ordinary stores, read by wgmma
        named_barrier_sync(kRowsCleared, 256);
      }
      // One query tile. Nothing is in flight from one tile to the next: the compiler would not keep track of it.
#pragma unroll 1
      for (int step = 0; step < steps; ++step, ++count) {
        const uint32_t slot = slot_of(count);
        const int row = (item.last - step) * C::kQueries;  // first query of the tile
        await(shared.q_full, count);
        if (step == 0 && item.length - row < C::kQueries) {
          await(shared.dout_full, count);
          clear_rows<C::kQueries, C::kPanels>(shared_address(shared.q[slot]), item.length - row, threadIdx.x - 128);
          clear_rows<C::kQueries, C::kPanels>(shared_address(shared.dout[slot]), item.length - row, threadIdx.x - 128);
          fence_proxy_async();
          named_barrier_sync(kRowsCleared, 256);
        }
        hold_registers(s);
        wgmma_fence();
        issue_scores(s, k_left, descriptor_add(q_columns, slot * C::kRowsBytes));
        await(shared.dout_full, count);
        hold_registers(dp);
        wgmma_fence();
        issue_scores(dp, v_left, descriptor_add(dout_columns, slot * C::kRowsBytes));
        wgmma_wait<1>();
        hold_registers(s);
        const float* minus_lse = shared.minus_lse[slot] + 2 * quad;
#pragma unroll
        for (int i = 0; i < kScores / 4; ++i) {
          const float2 l = *reinterpret_cast<const float2*>(minus_lse + 8 * i);
          s[4 * i] = exp2_fast(fmaf(s[4 * i], a.scale_log2, l.x));
          s[4 * i + 1] = exp2_fast(fmaf(s[4 * i + 1], a.scale_log2, l.y));
          s[4 * i + 2] = exp2_fast(fmaf(s[4 * i + 2], a.scale_log2, l.x));
          s[4 * i + 3] = exp2_fast(fmaf(s[4 * i + 3], a.scale_log2, l.y));
        }
        if (row < clear) {
#pragma unroll
          for (int i = 0; i < kScores; ++i) {
            if (row + i / 4 * 8 + i % 2 < seen[i / 2 % 2]) s[i] = 0.0f;
          }
        }
#pragma unroll
        for (int i = 0; i < kScores / 2; ++i) p[i / 4][i % 4] = pack2<T>(s[2 * i], s[2 * i + 1]);
        hold_operands(p);
        hold_registers(dv);
        wgmma_fence();
        issue_sums(dv, p, descriptor_add(dout_rows, slot * C::kRowsBytes));
        wgmma_wait<1>();
        hold_registers(dp);
        const float* delta = shared.delta[slot] + 2 * quad;
#pragma unroll
        for (int i = 0; i < kScores / 4; ++i) {
          const float2 d = *reinterpret_cast<const float2*>(delta + 8 * i);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            uint32_t& weights = p[i / 2][i % 2 * 2 + h];
            const float2 w = unpack2<T>(weights);
            ds[i / 2][i % 2 * 2 + h] = pack2<T>(w.x * (dp[4 * i + 2 * h] - d.x), w.y * (dp[4 * i + 2 * h + 1] - d.y));
          }
        }
        // The other consumer may still read dS of the tile before, not that of the one before it, whose place this takes:
        // it came to the last barrier after its product with it.
        const uint32_t ds_offset = count % 2 * C::kScoreBytes;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) stmatrix_x4_trans(ds_lane + ds_offset + step * 2048, ds[step]);
        fence_proxy_async();  // ordinary stores, read by wgmma
        named_barrier_sync(kScoresWritten, 256);

        float dq[32];
        hold_registers(dq);
        hold_operands(ds);
        hold_registers(dk);
        wgmma_fence();
        {
          const uint64_t left = descriptor_add(ds_left, ds_offset);
          wgmma_ss_n_major<T, 64, false>(dq, left, k_rows);
#pragma unroll
          for (int step = 1; step < C::kKeys / 16; ++step) {
            wgmma_ss_n_major<T, 64, true>(dq, descriptor_add(left, step / 4 * C::kScorePanel + step % 4 * 32),
                                          descriptor_add(k_rows, step * 2048));
          }
          wgmma_commit();
        }
        issue_sums(dk, ds, descriptor_add(q_rows, slot * C::kRowsBytes));
        wgmma_wait<2>();
        hold_registers(dv);
        hold_operands(p);
        leave(shared.dout_empty[slot]);
        wgmma_wait<1>();
        hold_registers(dq);
        mbarrier_wait(shared_address(&shared.dq_empty[count % 2]), (count / 2 % 2) ^ 1);
        const uint32_t dq_to = dq_thread + count % 2 * (C::kTileFloats * 4);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"r"(dq_to + i * 2048), "f"(dq[4 * i]),
                       "f"(dq[4 * i + 1]), "f"(dq[4 * i + 2]), "f"(dq[4 * i + 3])
                       : "memory");
        }
        fence_proxy_async();  // ordinary stores, read by the copy engine
        leave(shared.dq_full[count % 2]);
        wgmma_wait<0>();
        hold_registers(dk);
        hold_operands(ds);
        leave(shared.q_empty[slot]);
      }
    }
    leave(shared.state_empty);

    const int head_dim = static_cast<int>(a.size.head_dim), keys = item.keys;
    float* to_k = a.dchunk_k + item.states;
    float* to_v = a.dchunk_v + item.states;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int j = key + 8 * h;
      if (j < keys) {
        const int64_t at = static_cast<int64_t>(j) * head_dim + 2 * quad;
#pragma unroll
        for (int i = 0; i < kSums / 4; ++i) {
          if (8 * i < head_dim) {
            *reinterpret_cast<float2*>(to_k + at + 8 * i) =
                make_float2(dk[4 * i + 2 * h] * a.scale, dk[4 * i + 2 * h + 1] * a.scale);
            *reinterpret_cast<float2*>(to_v + at + 8 * i) = make_float2(dv[4 * i + 2 * h], dv[4 * i + 2 * h + 1]);
          }
        }
      }
    }
    leave(shared.item_empty[item_slot]);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    chunk_attention_dqkv_bwd_sm90_kernel(const __grid_constant__ Arguments a, const __grid_constant__ CUtensorMap k_map,
                                         const __grid_constant__ CUtensorMap v_map,
                                         const __grid_constant__ CUtensorMap q_map,
                                         const __grid_constant__ CUtensorMap dout_map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // empty in every other pass
  // At its symbol, not rounded up at run time: every address and descriptor is then a constant and takes no register.
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  Shared<C>& shared = *reinterpret_cast<Shared<C>*>(raw_shared);
  if (shared_address(raw_shared) % 1024 != 0) __trap();
  const int warpgroup = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * C::kConsumers;
    for (int i = 0; i < kItemSlots; ++i) {
      mbarrier_init(shared_address(&shared.item_full[i]), 1);
      mbarrier_init(shared_address(&shared.item_empty[i]), kConsumerWarps + 3);  // and warps 1, 2, 3
    }
    for (int i = 0; i < C::kStages; ++i) {
      mbarrier_init(shared_address(&shared.q_full[i]), 1);
      mbarrier_init(shared_address(&shared.q_empty[i]), kConsumerWarps);
      mbarrier_init(shared_address(&shared.dout_full[i]), 1 + 32);  // the copy, and the lanes of warp 1
      mbarrier_init(shared_address(&shared.dout_empty[i]), kConsumerWarps);
    }
    mbarrier_init(shared_address(&shared.state_full), 1);
    mbarrier_init(shared_address(&shared.state_empty), kConsumerWarps);
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(shared_address(&shared.dq_full[i]), kConsumerWarps);
      mbarrier_init(shared_address(&shared.dq_empty[i]), 1);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(C::kProducerRegisters));
    if (threadIdx.x == 0) {
      feed<C>(a, k_map, v_map, q_map, dout_map, shared);
    } else if (threadIdx.x / 32 == 1) {
      feed_scalars<C>(a, shared, threadIdx.x % 32);
    } else if (threadIdx.x % 32 == 0) {
      drain<C>(a, shared, threadIdx.x / 32 - 2);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(C::kConsumerRegisters));
    consume<C>(a, shared, warpgroup - 1);
  }
#endif
}

// ---- finish -----------------------------------------------------------------------------------------------------------
//
// A block a (query tile, group): thread 128 w + t of consumer w left 8 x 4 floats at [w][i][t], the C tiles of a wgmma.
template <class C>
__global__ void __launch_bounds__(256)
    chunk_attention_finish_bwd_sm90_kernel(const __grid_constant__ Sizes s, const float* tiles, const uint32_t* turns,
                                           uint32_t tiles_per_row, const float* cos, const float* sin, float scale,
                                           float* dq) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kStride = C::kDim + 8;  // float2 stores of a warp then cover all banks
  __shared__ alignas(16) float shared[C::kQueries * kStride];
  const int64_t groups = s.q_groups, group = blockIdx.x % groups, tile = blockIdx.x / groups;
  int64_t n;
  if (s.cu_seqlens) {
    int64_t low = 0, high = s.sequences - 1;  // the last n whose first tile is <= tile
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (s.cu_seqlens[middle] / C::kQueries + middle <= tile) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    n = low;
  } else {
    n = tile / tiles_per_row;
  }
  const Sequence q = sequence_at(s, n);
  const int64_t first =
      (tile - first_query_tile<C::kQueries>(s, n, q.begin, tiles_per_row)) * C::kQueries;  // row of the sequence
  if (q.begin + first >= q.end) return;
  const int rows = static_cast<int>(min(static_cast<int64_t>(C::kQueries), q.end - q.begin - first));
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, part = threadIdx.x / 128;
  const bool any = turns[blockIdx.x] != 0;  // else no key is visible, and the tile was never written
  const float4* from = reinterpret_cast<const float4*>(tiles + static_cast<int64_t>(blockIdx.x) * C::kTileFloats) +
                       part * (C::kTileFloats / 8) + thread;
  float4 c[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) c[i] = any ? from[i * 128] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const int row = thread / 32 * 16 + lane / 4 + (C::kPanels == 1 ? part * 64 : 0);
  const int column = lane % 4 * 2 + (C::kPanels == 1 ? 0 : part * 64);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float* to = shared + row * kStride + column + 8 * i;
    *reinterpret_cast<float2*>(to) = make_float2(c[i].x * scale, c[i].y * scale);
    *reinterpret_cast<float2*>(to + 8 * kStride) = make_float2(c[i].z * scale, c[i].w * scale);
  }
  __syncthreads();
  const TileChunks chunks(q.start + first, s.chunk_size);
  const int head_dim = static_cast<int>(s.head_dim), half = head_dim / 2;
  for (int index = threadIdx.x; index < rows * (C::kDim / 8); index += 256) {
    const int r = index / (C::kDim / 8), piece = index % (C::kDim / 8);
    if (4 * piece >= half) continue;
    float low[4], high[4];
    load4(shared + r * kStride + 4 * piece, low, true);
    load4(shared + r * kStride + 4 * piece + half, high, true);
    rotate4(low, high, cos, sin, chunks.of(r), half, piece, -1.0f);
    float* to = dq + ((q.batch * s.tokens + q.begin + first + r) * groups + group) * head_dim + 4 * piece;
    *reinterpret_cast<float4*>(to) = make_float4(low[0], low[1], low[2], low[3]);
    *reinterpret_cast<float4*>(to + half) = make_float4(high[0], high[1], high[2], high[3]);
  }
#endif
}

// ---- launcher ---------------------------------------------------------------------------------------------------------

struct Plan {
  int64_t query_tiles = 0;
  int64_t shares = 1;
  int64_t items = 0;
  int64_t extent = 0;  // elements of one dchunk tensor
};

template <int DIM>
Plan make_plan(const AttentionBwdParams& p) {
  const Sizes& s = p.fwd.size;
  using C = Traits<bf16, DIM>;
  Plan plan;
  plan.query_tiles = query_tiles<C::kQueries>(s);
  plan.extent = states_extent(s, p.fwd.chunks);
  const int64_t items = key_tiles(s, p.fwd.chunks, C::kKeys) * s.heads;
  // An item for each of 132 multiprocessors, but no share under 1024 queries. More only lengthens the queues of dQ.
  if (items > 0) plan.shares = std::clamp<int64_t>(132 / items, 1, std::max<int64_t>(1, s.tokens / 1024));
  plan.items = items * plan.shares;
  return plan;
}
Plan make_plan(const AttentionBwdParams& p) { return p.fwd.size.head_dim > 64 ? make_plan<128>(p) : make_plan<64>(p); }
constexpr int64_t kTileFloats = Traits<bf16, 128>::kTileFloats;
static_assert(kTileFloats == Traits<bf16, 64>::kTileFloats);

struct Pieces {
  Piece<uint16_t> rotated;
  Piece<float> dq_tiles;
  Piece<uint32_t> counters;  // turns, then the item counter
  int64_t counter_count;
  Piece<float> shares_k;  // (shares, extent) each, where there are several
  Piece<float> shares_v;
};

Pieces take_pieces(const AttentionBwdParams& p, const Plan& plan, Arena& arena) {
  const Sizes& s = p.fwd.size;
  Pieces pieces;
  pieces.rotated = arena.take<uint16_t>(p.fwd.rotary.cos ? s.batch * s.tokens * s.q_groups * s.head_dim : 0);
  pieces.dq_tiles = arena.take<float>(plan.query_tiles * s.q_groups * kTileFloats);
  pieces.counter_count = plan.query_tiles * s.q_groups + 1;
  pieces.counters = arena.take<uint32_t>(pieces.counter_count);
  const int64_t partial = plan.shares > 1 ? plan.shares * plan.extent : 0;
  pieces.shares_k = arena.take<float>(partial);
  pieces.shares_v = arena.take<float>(partial);
  return pieces;
}

CUtensorMap token_map(const Rows& rows, CUtensorMapDataType type, const Sizes& s, int64_t heads, int box_rows) {
  const int64_t any = round_up(s.head_dim, 8);  // a dimension of one has no stride; the map wants a legal one
  return swizzled_map<4>(rows.ptr, type, {s.head_dim, s.tokens, heads, s.batch},
                         {s.tokens > 1 ? rows.token : any, heads > 1 ? rows.head : any, s.batch > 1 ? rows.batch : any},
                         box_rows);
}

template <class C>
void launch(const AttentionBwdParams& p, const BwdScratch& scratch, const Plan& plan, const Pieces& pieces,
            cudaStream_t stream) {
  using T = typename C::T;
  const Sizes& s = p.fwd.size;
  const float* cos = static_cast<const float*>(p.fwd.rotary.cos);
  const float* sin = static_cast<const float*>(p.fwd.rotary.sin);

  Rows q = p.fwd.q;
  if (cos) {
    const char* name = "chunk_attention_rotate_bwd_kernel";
    const int64_t threads = s.batch * s.tokens * s.q_groups * (s.head_dim / 8);
    chunk_attention_rotate_bwd_kernel<T><<<grid_x(ceil_div(threads, 256), name), 256, 0, stream>>>(
        s, q, s.q_groups, cos, sin, reinterpret_cast<T*>(pieces.rotated.get()));
    check_launch(name);
    q = Rows{pieces.rotated.get(), s.tokens * s.q_groups * s.head_dim, s.q_groups * s.head_dim, s.head_dim};
  }
  check(cudaMemsetAsync(pieces.counters, 0, pieces.counter_count * sizeof(uint32_t), stream), "turn counters");
  if (!p.deterministic) {
    const size_t bytes = plan.query_tiles * s.q_groups * kTileFloats * sizeof(float);
    check(cudaMemsetAsync(pieces.dq_tiles, 0, bytes, stream), "sums of dQ");
  }

  Arguments a;
  a.size = s;
  a.chunks = p.fwd.chunks;
  a.scale = static_cast<float>(p.fwd.scale);
  a.scale_log2 = static_cast<float>(p.fwd.scale) * kLog2e;
  a.lse = static_cast<const float*>(p.fwd.lse);
  a.delta = scratch.delta;
  a.dq_tiles = pieces.dq_tiles;
  a.turns = pieces.counters;
  a.next = pieces.counters + pieces.counter_count - 1;
  a.dchunk_k = plan.shares > 1 ? pieces.shares_k : scratch.dchunk_k;
  a.dchunk_v = plan.shares > 1 ? pieces.shares_v : scratch.dchunk_v;
  a.share_stride = plan.extent;
  a.ordered = p.deterministic;
  a.heads_per_group = static_cast<uint32_t>(s.heads / s.q_groups);
  a.tiles_per_row = static_cast<uint32_t>(ceil_div(s.tokens, C::kQueries));
  const int multiprocessors = device_attribute<cudaDevAttrMultiProcessorCount>();
  const int64_t blocks = std::min<int64_t>(plan.items, multiprocessors);
  a.schedule.total = static_cast<uint32_t>(plan.items);
  a.schedule.tiles = static_cast<uint32_t>(std::max<int64_t>(1, ceil_div(p.fwd.chunks.rows, C::kKeys)));
  a.schedule.pairs = static_cast<uint32_t>(s.sequences * s.heads);
  a.schedule.shares = static_cast<uint32_t>(plan.shares);

  const CUtensorMapDataType type =
      std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const ChunkStates& c = p.fwd.chunks;
  const int64_t outer = c.compact ? s.heads : s.sequences * s.heads;
  const CUtensorMap k_map = swizzled_rows_map(c.k, type, s.head_dim, c.rows, outer, C::kKeys);
  const CUtensorMap v_map = swizzled_rows_map(c.v, type, s.head_dim, c.rows, outer, C::kKeys);
  const CUtensorMap q_map = token_map(q, type, s, s.q_groups, C::kQueries);
  const CUtensorMap dout_map = token_map(scratch.dout, type, s, s.heads, C::kQueries);

  constexpr int kBytes = static_cast<int>(sizeof(Shared<C>));
  static_assert(kBytes <= 227 * 1024);
  const char* name = "chunk_attention_dqkv_bwd_sm90_kernel";
  allow_shared_memory(chunk_attention_dqkv_bwd_sm90_kernel<C>, kBytes, name);
  chunk_attention_dqkv_bwd_sm90_kernel<C>
      <<<grid_x(blocks, name), C::kThreads, kBytes, stream>>>(a, k_map, v_map, q_map, dout_map);
  check_launch(name);

  name = "chunk_attention_finish_bwd_sm90_kernel";
  chunk_attention_finish_bwd_sm90_kernel<C><<<grid_x(plan.query_tiles * s.q_groups, name), 256, 0, stream>>>(
      s, pieces.dq_tiles, pieces.counters, a.tiles_per_row, cos, sin, a.scale, scratch.dq);
  check_launch(name);
  if (plan.shares > 1) add_shares(pieces.shares_k, pieces.shares_v, plan.shares, plan.extent, scratch, stream);
}

// A tensor map wants strides that are multiples of 16 bytes, which aligned16 says, and none of zero.
bool has_map(const Rows& rows, const Sizes& s, int64_t heads) {
  const auto legal = [](int64_t size, int64_t stride) {
    return size <= 1 || (stride > 0 && stride < (INT64_C(1) << 38));
  };
  return legal(s.tokens, rows.token) && legal(heads, rows.head) && legal(s.batch, rows.batch);
}

}  // namespace

namespace sm90 {

const char* bwd_refuses(const AttentionBwdParams& p) {
#ifndef RAT_EXT_SM90
  return "this build has no code for sm_90a";
#endif
  const Sizes& s = p.fwd.size;
  const ChunkStates& c = p.fwd.chunks;
  constexpr int64_t kMany = INT64_C(1) << 30;  // tile and row indices are 32-bit
  if (s.dtype != DType::bf16 && s.dtype != DType::f16) return "the dtype is not bfloat16 or float16";
  if (s.head_dim > 128) return "D is over 128";
  if (!s.aligned16) return "rows are not 16-byte aligned";
  if (!std::isfinite(static_cast<float>(p.fwd.scale) * kLog2e)) return "the scale is not finite in float32";
  if (c.rows <= 0) return "there are no chunk states";
  if (c.rows > kMany) return "there are over 2^30 chunk states per head";
  if (c.head != c.rows * s.head_dim || (!c.compact && c.sequence != s.heads * c.head)) {
    return "chunk states are not contiguous";
  }
  if (reinterpret_cast<uintptr_t>(c.k) % 16 != 0 || reinterpret_cast<uintptr_t>(c.v) % 16 != 0) {
    return "chunk states are not 16-byte aligned";
  }
  if (s.tokens > kMany || s.sequences * s.heads > kMany) return "the call is too large for 32-bit indices";
  if (!p.fwd.rotary.cos && !has_map(p.fwd.q, s, s.q_groups)) return "no tensor map describes the rows of q";
  if (!has_map(p.fwd.out_gate.ptr ? p.dv : p.dy, s, s.heads)) return "no tensor map describes the rows of dO";
  const Plan plan = make_plan(p);
  if (plan.items > kMany || plan.query_tiles * s.q_groups > kMany) return "the call is too large for 32-bit indices";
  // Every sequence pads its last tile: many short ones would take more memory than their gradient.
  if (plan.query_tiles * kTileFloats > 2 * s.batch * s.tokens * std::max<int64_t>(s.head_dim, 64)) {
    return "sequences are so short that tiles would be mostly padding";
  }
  return is_hopper() ? nullptr : "the GPU is not of compute capability 9.0";
}

Launch bwd(const AttentionBwdParams& p, const BwdScratch& scratch, Arena& arena) {
  const Plan plan = make_plan(p);
  const Pieces pieces = take_pieces(p, plan, arena);
  return [&p, scratch, plan, pieces](cudaStream_t stream) {
    const bool wide = p.fwd.size.head_dim > 64;
    if (p.fwd.size.dtype == DType::bf16) {
      wide ? launch<Traits<bf16, 128>>(p, scratch, plan, pieces, stream)
           : launch<Traits<bf16, 64>>(p, scratch, plan, pieces, stream);
    } else {
      wide ? launch<Traits<f16, 128>>(p, scratch, plan, pieces, stream)
           : launch<Traits<f16, 64>>(p, scratch, plan, pieces, stream);
    }
  };
}

}  // namespace sm90

KernelList chunk_attention_bwd_sm90_kernels() {
#define RAT_ENTRY(T, DIM)                                                                                              \
  {"chunk_attention_dqkv_bwd_sm90<" #T ", " #DIM ">",                                                                  \
   reinterpret_cast<const void*>(&chunk_attention_dqkv_bwd_sm90_kernel<Traits<T, DIM>>)},                              \
  {                                                                                                                    \
    "chunk_attention_finish_bwd_sm90<" #T ", " #DIM ">",                                                               \
        reinterpret_cast<const void*>(&chunk_attention_finish_bwd_sm90_kernel<Traits<T, DIM>>)                         \
  }
  static const KernelEntry entries[] = {RAT_ENTRY(bf16, 64), RAT_ENTRY(bf16, 128), RAT_ENTRY(f16, 64),
                                        RAT_ENTRY(f16, 128)};
#undef RAT_ENTRY
  return {entries, static_cast<int>(sizeof(entries) / sizeof(entries[0]))};
}

}  // namespace rat::cuda
