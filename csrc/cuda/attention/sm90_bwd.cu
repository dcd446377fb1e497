// Chunk attention backward on Hopper (sm_90a), for bfloat16 and float16 and heads up to 128. Deterministic, unless the caller
// waives it: no sum depends on which block comes first.
//
// With P_tj = exp(scale (R q)_t . K_j - lse_t) and dS_tj = P_tj (dO_t . V_j - Delta_t), three steps:
//  0. rotate (rotate_reduce.cu): R q in T to dq's memory.
//  1. dqkv: everything in five products, each 2 D FLOP per query and visible key. A block owns the dK, dV of (128 chunk states,
//     head) in registers and walks the query tiles that see them, from the last token of the sequence backwards:
//       S^T = K Q^T,  dP^T = V dO^T,  dV += P^T dO,  dK += dS^T Q,  and  dQ = dS K,  which it adds to a sum in global memory.
//     The transposed scores are, rounded, left operands in registers: P never passes through shared memory, dS once.
//     Where there are few key tiles, shares of the queries are items of their own.
//  2. finish: dQ from its tiles to (B, T, G, D), rotated back and scaled, in the same memory where the tiles fill it; not where the
//     reverse scan reads the tiles. Shares, if any, are added up.
// Reads per (128 keys, query, head): q and dO, 2 D elements of T through L2, 8 bytes of lse and Delta; adds D floats in L2.
//
// The sum of dQ over key tiles and over the heads of a group is taken in one order, that of the items (Schedule): key tiles first to
// last, in each the heads of the group; in windows of short sequences heads, and of a head the tiles, so that there the bits of dq
// may depend on where a sequence lies in a packed row. Every (query tile, group, part) has a turn counter; a block adds when the
// counter shows its rank. Why nobody waits for ever stands at the item counter, Arguments::next. Blocks of one query tile start
// together and fall in step one tile behind each other; the waiting lies in warps of its own, two tiles deep. A small call has no
// time to fall in step: there the heads of a group are cut into parts, each with a sum and turns of its own, which `finish` adds in
// order.
//
// One block per multiprocessor:
//   warp 0           one thread takes items, tells the others, and feeds K, V (once per item) and the ring of q, dO.
//   warp 1           lse and Delta of the query tiles, beside dO in the ring.
//   warps 2, 3       one thread each waits for the turn of a query tile and adds dQ to it through the copy engine.
//   warpgroups 1, 2  consumers, 64 keys each. dS of both meets in shared memory; each computes its half of dQ.
// The products are queued so that the tensor cores have work meanwhile: dP^T during the exponentials, dV during dS, dK while the
// consumers wait for each other's dS, S^T of the next tile while dQ leaves.
//
// Shared memory: K, V; two stages of q, dO, lse, Delta; two of dS (one barrier per tile suffices then); dQ on its way out. Tiles
// lie in panels of 64 columns, 128 bytes per row, 16-byte pieces swizzled. dQ lies as the registers do, 16 bytes per thread: so it
// stays in global memory (dq_tiles.h) until `finish` puts it in order.
//
// Chunk rows past the closed ones and tokens past the end of a packed sequence may hold anything, NaN too: both are set to
// zero in shared memory. Their lse is +inf, so that their weight is zero.
#include <cuda.h>

#include <algorithm>
#include <cmath>

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
#include "dq_tiles.h"
#include "families.h"
#include "rotate_reduce.h"
#include "row_maps.h"
#include "tiles.cuh"

namespace rat::cuda {
namespace {

template <class T_, int DIM>
struct Traits {
  using T = T_;
  static constexpr int kDim = DIM;  // head size, padded
  static constexpr int kPanels = DIM / 64;
  static constexpr int kKeys = 128;                       // chunk states per item
  static constexpr int kQueries = DIM == 128 ? 64 : 128;  // per tile. A consumer's part of dQ is 64 x 64 either way
  static constexpr int kConsumers = 2;                    // warpgroups
  static constexpr int kConsumerThreads = 128 * kConsumers;
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
  int64_t scalars;      // offset of the sequence's first token in lse and Delta
  int64_t states;       // offset of the first key in dchunk_k, dchunk_v
  VisibleFrom visible;  // which queries see its keys
  int64_t turns;        // offset of tile 0 of this part of the group in the turn counters; its dQ starts at kTileFloats
                        // times that. From a tile to the next it is groups * parts
  int32_t token;        // of the sequence's first token
  int32_t batch;
  int32_t head;
  int32_t group;
  int32_t length;  // tokens of the sequence
  int32_t last;
  int32_t steps;
  int32_t keys;     // valid chunk states; 0: no more items
  int32_t key_row;  // of the first one in the tensor map
  int32_t key_outer;
  // The turn at which this item adds to a query tile: rank + head_rank * (key tiles of the sequence in the item's window that the
  // query tile sees: of `spread`, those before key tile `skip + spread`).
  int32_t rank, head_rank, skip, spread;
  int32_t start;  // position of the sequence's first token
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
  // Filled by / left by. An arrival of a consumer stands for a warp: kConsumerWarps of them.
  RingBarriers<kItemSlots> items;    // warp 0's thread / consumers, the lanes 0 of warp 1, the threads of warps 2 and 3
  RingBarriers<1> states;            // K and V. Warp 0's copies / consumers
  RingBarriers<C::kStages> q_tiles;  // warp 0's copies / consumers
  RingBarriers<C::kStages> dout_tiles;  // dO, lse and Delta. Warp 0's copies and the lanes of warp 1 / consumers
  RingBarriers<2> dq_tiles;             // consumers / the thread of warp 2 (slot 0) or warp 3 (slot 1)

  __device__ __forceinline__ void init_barriers() {
    constexpr uint32_t kConsumerWarps = 4 * C::kConsumers;
    items.init(1, kConsumerWarps + 3);
    states.init(1, kConsumerWarps);
    q_tiles.init(1, kConsumerWarps);
    dout_tiles.init(1 + 32, kConsumerWarps);
    dq_tiles.init(kConsumerWarps, 1);
  }
};

// Of the hardware: 0 is that of __syncthreads(). All threads of both consumers wait at them.
enum NamedBarrier {
  kScoresWritten = 1,  // each consumer has written its half of dS: both read all of it
  kRowsCleared = 2,    // rows past the end of K, V, q or dO are zeros: both multiply them
};

// Items in order: key tiles first to last, as early ones are seen by the most queries; in each the (sequence, head) pairs, and
// of each the shares of the queries. Compact rows, and sequences of one key tile: windows of key tiles as key_tile() numbers them,
// in each the heads, and of a head the tiles: heads of a group, which add to the same dQ, are a window apart.
struct Schedule {
  uint32_t total = 0;
  uint32_t tiles = 1;  // of a sequence
  uint32_t pairs = 1;
  uint32_t shares = 1;
  uint32_t window = 0;     // 0: none
  uint32_t all_tiles = 0;  // key tiles of all sequences
};

struct Arguments {
  Sizes size;
  ChunkStates chunks;
  float scale;
  float scale_log2;
  const float* lse;
  const float* delta;
  float* dq_tiles;  // (query tiles, groups, parts, kTileFloats)
  uint32_t* turns;  // (query tiles, groups, parts), zero at the start
  // The item counter, zero at the start. Why the ordered sum of dQ cannot deadlock: items come from this one counter, and the
  // ranks at which a (query tile, group, part) is added to rise with it. So an item waits only for turns of items with a smaller
  // number, which blocks took before it; and of all unfinished items the smallest waits for none, hence always runs, however
  // few blocks are resident and whatever else runs on the GPU. A block's own items are in rising order too. Handing out items
  // by block index would break this.
  uint32_t* next;
  float* dchunk_k;  // share s of the queries adds s * share_stride
  float* dchunk_v;
  int64_t share_stride;
  bool ordered;  // dQ is summed in order; else the sums start from zeros and nobody waits
  uint32_t heads_per_group;
  uint32_t parts, heads_per_part;
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

// False where there is nothing to do.
template <class C>
__device__ __forceinline__ bool describe_item(const Arguments& a, uint32_t index, Item& item) {
  const uint32_t heads = static_cast<uint32_t>(a.size.heads);
  const uint32_t share = index % a.schedule.shares, tile_pair = index / a.schedule.shares;
  int64_t tile_index, window_begin, window_end;  // of key tiles
  uint32_t head;
  if (const uint32_t window = a.schedule.window; window > 0) {
    const uint32_t begin = tile_pair / (window * heads) * window, inside = tile_pair - begin * heads;
    const uint32_t width = min(window, a.schedule.all_tiles - begin);
    head = inside / width;
    tile_index = begin + inside % width;
    window_begin = begin;
    window_end = begin + width;
  } else {
    const uint32_t pair = tile_pair % a.schedule.pairs;
    head = pair % heads;
    tile_index = static_cast<int64_t>(pair / heads) * a.schedule.tiles + tile_pair / a.schedule.pairs;
    window_begin = tile_index;
    window_end = tile_index + 1;
  }
  const KeyTile tile = key_tile(a.size, a.chunks, tile_index, C::kKeys);
  if (tile.first >= tile.closed) return false;
  const Sequence& q = tile.sequence;
  const int length = static_cast<int>(q.end - q.begin);
  item.scalars = (q.batch * a.size.heads + head) * a.size.tokens + q.begin;
  item.states = chunk_offset(a.size, a.chunks, q.index, head) + tile.first * a.size.head_dim + share * a.share_stride;
  item.visible = VisibleFrom(a.size, q, tile.first);
  item.token = static_cast<int>(q.begin);
  item.batch = static_cast<int>(q.batch);
  item.head = static_cast<int>(head);
  item.group = static_cast<int>(head / a.heads_per_group);
  item.turns = first_query_tile<C::kQueries>(a.size, q.index, q.begin, a.tiles_per_row) * a.size.q_groups * a.parts +
               head / a.heads_per_part;
  item.length = length;
  const QueryWalk walk = query_walk<C::kQueries>(item.visible, length, share, a.schedule.shares);
  item.last = walk.last - walk.begin;
  item.steps = walk.end - walk.begin;
  item.keys = static_cast<int>(min(static_cast<int64_t>(C::kKeys), tile.closed - tile.first));
  item.key_row = static_cast<int>(first_chunk_row(a.size, a.chunks, q.index) + tile.first);
  item.key_outer = static_cast<int>(a.chunks.compact ? head : q.index * heads + head);
  const int64_t sequence_begin = tile_index - tile.first / C::kKeys;
  const int64_t sequence_end = sequence_begin + (tile.closed + C::kKeys - 1) / C::kKeys;
  const int64_t begin = max(window_begin, sequence_begin);
  item.skip = static_cast<int>(begin - sequence_begin);
  item.spread = static_cast<int>(min(window_end, sequence_end) - begin);
  item.rank = static_cast<int>(item.skip * static_cast<int64_t>(a.heads_per_part) + (tile_index - begin));
  item.head_rank = static_cast<int>(head % a.heads_per_part);
  item.start = static_cast<int>(q.start);
  return true;
}

// ---- warp 0: items, K, V, q, dO ---------------------------------------------------------------------------------------

template <class C>
struct Feeder {
  const Arguments& a;
  Shared<C>& shared;

  // Takes the next item with something to do, or says that there is none.
  __device__ __forceinline__ void describe(Ring<kItemSlots>& items) {
    items.wait_empty();
    Item& item = shared.item[items.slot()];
    for (;;) {
      const uint32_t index = atomicAdd(a.next, 1u);
      if (index < a.schedule.total) {
        if (describe_item<C>(a, index, item)) break;
      } else {
        item.keys = 0;
        break;
      }
    }
    mbarrier_arrive(items.full());
    items.next();
  }

  __device__ __forceinline__ void load_states(const CUtensorMap& k_map, const CUtensorMap& v_map, uint32_t full,
                                              const Item& item) {
    mbarrier_arrive_expect(full, 2 * C::kStateBytes);
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      const uint32_t offset = panel * C::kStatePanel;
      tma_load(shared_address(shared.k) + offset, &k_map, full, 64 * panel, item.key_row, item.key_outer);
      tma_load(shared_address(shared.v) + offset, &v_map, full, 64 * panel, item.key_row, item.key_outer);
    }
  }

  __device__ __forceinline__ void load_rows(const CUtensorMap& map, uint32_t target, uint32_t full, int token, int head,
                                            int batch) {
    mbarrier_arrive_expect(full, C::kRowsBytes);
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      tma_load(target + panel * C::kRowsPanel, &map, full, 64 * panel, token, head, batch);
    }
  }
};

template <class C>
__device__ __forceinline__ void feed(const Arguments& a, const CUtensorMap& k_map, const CUtensorMap& v_map,
                                     const CUtensorMap& q_map, const CUtensorMap& dout_map, Shared<C>& shared) {
  tma_prefetch_map(&k_map);
  tma_prefetch_map(&v_map);
  tma_prefetch_map(&q_map);
  tma_prefetch_map(&dout_map);
  Feeder<C> feeder{a, shared};
  Ring<kItemSlots> described(shared.items);
  Ring<1> states(shared.states);
  Ring<C::kStages> q_tiles(shared.q_tiles), dout_tiles(shared.dout_tiles);
  feeder.describe(described);
#pragma unroll 1
  for (uint32_t items = 0;; ++items) {
    const Item& item = shared.item[items % kItemSlots];
    if (item.keys == 0) break;
    const int steps = item.steps;
    states.wait_empty();
    if (steps > 0) {
      feeder.load_states(k_map, v_map, states.full(), item);
    } else {  // keeps the phases in step with the items
      mbarrier_arrive(states.full());
    }
    states.next();
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int token = item.token + (item.last - step) * C::kQueries;
      q_tiles.wait_empty();
      feeder.load_rows(q_map, shared_address(shared.q[q_tiles.slot()]), q_tiles.full(), token, item.group, item.batch);
      q_tiles.next();
      dout_tiles.wait_empty();
      feeder.load_rows(dout_map, shared_address(shared.dout[dout_tiles.slot()]), dout_tiles.full(), token, item.head,
                       item.batch);
      dout_tiles.next();
      // Three tiles before the end its counter and sequence are fetched while tiles arrive. Not earlier: an item that is taken
      // and not begun keeps those waiting whose turns come after its own.
      if (step == max(0, steps - 3)) feeder.describe(described);
    }
    if (steps == 0) feeder.describe(described);
  }
}

// ---- warp 1: lse and Delta --------------------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void feed_scalars(const Arguments& a, Shared<C>& shared, int lane) {
  constexpr int kEach = C::kQueries / 32;
  Ring<C::kStages> dout_tiles(shared.dout_tiles);
#pragma unroll 1
  for (Ring<kItemSlots> items(shared.items);; items.next()) {
    items.wait_full();
    const Item& item = shared.item[items.slot()];
    if (item.keys == 0) break;
    const int steps = item.steps, length = item.length;
    int row = item.last * C::kQueries + lane;
    const float* lse = a.lse + item.scalars;
    const float* delta = a.delta + item.scalars;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, dout_tiles.next(), row -= C::kQueries) {
      float x[kEach], y[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const bool valid = row + 32 * i < length;
        x[i] = valid ? lse[row + 32 * i] * -kLog2e : -INFINITY;
        y[i] = valid ? delta[row + 32 * i] : 0.0f;
      }
      const uint32_t slot = dout_tiles.slot();
      dout_tiles.wait_empty();
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        shared.minus_lse[slot][lane + 32 * i] = x[i];
        shared.delta[slot][lane + 32 * i] = y[i];
      }
      mbarrier_arrive(dout_tiles.full());
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(items.empty());
  }
}

// ---- warps 2, 3: dQ to global memory, in turn -------------------------------------------------------------------------

// `slot`: this thread serves every other tile, those of one place of shared memory. A tile's way to global memory and back,
// with the fences around it, takes longer than a tile's products, hence two threads.
template <class C>
__device__ __forceinline__ void drain(const Arguments& a, Shared<C>& shared, uint32_t slot) {
  const uint32_t source = shared_address(shared.dq[slot]);
  Ring<2> dq_tiles(shared.dq_tiles);
#pragma unroll 1
  for (Ring<kItemSlots> items(shared.items);; items.next()) {
    items.wait_full();
    const Item& item = shared.item[items.slot()];
    if (item.keys == 0) break;
    const int steps = item.steps;
    const uint32_t every = static_cast<uint32_t>(min(a.size.key_every, INT64_C(0xffffffff)));
    const int64_t stride = a.size.q_groups * a.parts;
    int64_t tile = item.turns + item.last * stride;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, dq_tiles.next(), tile -= stride) {
      if (dq_tiles.slot() != slot) continue;
      uint32_t rank = item.rank + item.head_rank;
      if (item.spread > 1) {  // of the sequence's key tiles in the window the query tile sees the first ones
        const int row = min((item.last - step + 1) * C::kQueries, item.length) - 1;
        const int seen = static_cast<int>((static_cast<uint32_t>(item.start + row) / every + C::kKeys - 1) / C::kKeys);
        rank = item.rank + item.head_rank * min(item.spread, seen - item.skip);
      }
      uint32_t* turn = a.turns + tile;
      float* target = a.dq_tiles + tile * C::kTileFloats;
      while (a.ordered && load_acquire(turn) != rank) {
      }
      dq_tiles.wait_full();
      fence_proxy_async_all();  // the sums before, seen by the acquire, come before this one through the copy engine
      if (a.ordered && rank == 0) {
        bulk_store(target, source, C::kTileFloats * 4);
      } else {
        bulk_add(target, source, C::kTileFloats * 4);
      }
      bulk_commit();
      bulk_wait();
      store_release(turn, rank + 1);
      mbarrier_arrive(dq_tiles.empty());
    }
    mbarrier_arrive(items.empty());
  }
}

// ---- consumers --------------------------------------------------------------------------------------------------------

// A thread of a consumer and its steps. Products are issued, not waited for: until the wait a product owns its accumulators
// and its operands in registers, which hold_registers() tells the compiler.
template <class C>
struct Consumer {
  using T = typename C::T;
  static constexpr int kScores = C::kQueries / 2;  // accumulators of S^T, of dP^T
  static constexpr int kSteps = C::kQueries / 16;  // of the products over queries
  static constexpr int kSums = C::kDim / 2;        // accumulators of dK, of dV

  const Arguments& a;
  Shared<C>& shared;
  int warpgroup, thread, lane, quad;
  int key;  // of this thread, in the item; it also has key + 8
  // Descriptors; those of q, dO and dS are of the first place.
  uint64_t k_left, v_left;           // this consumer's keys
  uint64_t q_columns, dout_columns;  // as S^T = K Q^T reads them
  uint64_t q_rows, dout_rows;        // as dK += dS^T Q reads them
  uint64_t ds_left, k_rows;     // this consumer's half of dQ: wide heads are halved by columns, narrow ones by queries
  uint32_t ds_lane, dq_thread;  // where this thread writes dS and dQ

  __device__ __forceinline__ Consumer(const Arguments& a_, Shared<C>& shared_, int warpgroup_)
      : a(a_), shared(shared_), warpgroup(warpgroup_) {
    thread = threadIdx.x % 128, lane = threadIdx.x % 32, quad = lane % 4;
    key = warpgroup * 64 + thread / 32 * 16 + lane / 4;
    k_left = descriptor_k_major(shared_address(shared.k) + warpgroup * 64 * 128);
    v_left = descriptor_k_major(shared_address(shared.v) + warpgroup * 64 * 128);
    q_columns = descriptor_k_major(shared_address(shared.q));
    dout_columns = descriptor_k_major(shared_address(shared.dout));
    q_rows = descriptor_n_major(shared_address(shared.q), C::kRowsPanel);
    dout_rows = descriptor_n_major(shared_address(shared.dout), C::kRowsPanel);
    ds_left = descriptor_k_major(shared_address(shared.ds) + (C::kPanels == 1 ? warpgroup * 64 * 128 : 0));
    k_rows = descriptor_n_major(shared_address(shared.k) + (C::kPanels == 1 ? 0 : warpgroup * C::kStatePanel),
                                C::kStatePanel);
    // For stmatrix: matrices 0 ... 3 of step k are (queries 16 k ..., keys 0 ...), (same, keys 8 ...),
    // (queries 16 k + 8 ..., keys 0 ...), (same, keys 8 ...) of the warp's 16 keys.
    ds_lane = shared_address(shared.ds) + warpgroup * C::kScorePanel + (lane / 16 * 8 + lane % 8) * 128 +
              (((thread / 32 * 2 + lane / 8 % 2) ^ lane % 8) * 16);
    dq_thread = shared_address(shared.dq) + warpgroup * (C::kTileFloats * 2) + thread * 16;
  }

  // One arrival per warp.
  __device__ __forceinline__ void leave(uint32_t barrier) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
  }

  // c = left (64 x D) right^T, right being the tile of a stage
  __device__ __forceinline__ void issue_scores(float (&c)[kScores], uint64_t left, uint64_t right) const {
    wgmma_ss<T, C::kQueries, false>(c, left, right);
#pragma unroll
    for (int step = 1; step < C::kDim / 16; ++step) {
      wgmma_ss<T, C::kQueries, true>(c, descriptor_add(left, step / 4 * C::kStatePanel + step % 4 * 32),
                                     descriptor_add(right, step / 4 * C::kRowsPanel + step % 4 * 32));
    }
    wgmma_commit();
  }

  // c += left (64 x queries) right (queries x D)
  __device__ __forceinline__ void issue_sums(float (&c)[kSums], uint32_t (&left)[kSteps][4], uint64_t right) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) wgmma_rs<T, C::kDim>(c, left[step], descriptor_add(right, step * 2048));
    wgmma_commit();
  }

  // dq = dS K, this consumer's 64 x 64 of it
  __device__ __forceinline__ void issue_dq(float (&dq)[32], uint32_t ds_offset) const {
    const uint64_t left = descriptor_add(ds_left, ds_offset);
    wgmma_ss_n_major<T, 64, false>(dq, left, k_rows);
#pragma unroll
    for (int step = 1; step < C::kKeys / 16; ++step) {
      wgmma_ss_n_major<T, 64, true>(dq, descriptor_add(left, step / 4 * C::kScorePanel + step % 4 * 32),
                                    descriptor_add(k_rows, step * 2048));
    }
    wgmma_commit();
  }

  // Rows [from, ROWS) of two tiles become zeros, for all threads of both consumers. Both tiles have landed.
  template <int ROWS>
  __device__ __forceinline__ void clear_rows(uint32_t tile, uint32_t other, int from) const {
    clear_rows<ROWS>(tile, from);
    clear_rows<ROWS>(other, from);
    fence_proxy_async();  // ordinary stores, read by wgmma
    named_barrier_sync(kRowsCleared, C::kConsumerThreads);
  }
  template <int ROWS>
  __device__ __forceinline__ void clear_rows(uint32_t tile, int from) const {
#pragma unroll 1
    for (int begin = from * 8; begin < ROWS * 8; begin += C::kConsumerThreads) {
      const int i = begin + static_cast<int>(threadIdx.x) - 128;
      if (i >= ROWS * 8) continue;
#pragma unroll
      for (int panel = 0; panel < C::kPanels; ++panel) clear_shared16(tile + panel * ROWS * 128 + i * 16);
    }
  }

  // P^T from S^T in s: in s and, rounded, as a left operand in p. Tiles that start before query `clear` need a mask: query
  // row + c sees this thread's keys when row + c >= seen[h].
  __device__ __forceinline__ void weights(float (&s)[kScores], uint32_t (&p)[kSteps][4], uint32_t slot, int row,
                                          int clear, const int (&seen)[2]) const {
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
  }

  // dS^T from the rounded P^T and dP^T, as a left operand.
  __device__ __forceinline__ void gradients(uint32_t (&ds)[kSteps][4], const uint32_t (&p)[kSteps][4],
                                            const float (&dp)[kScores], uint32_t slot) const {
    const float* delta = shared.delta[slot] + 2 * quad;
#pragma unroll
    for (int i = 0; i < kScores / 4; ++i) {
      const float2 d = *reinterpret_cast<const float2*>(delta + 8 * i);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 w = unpack2<T>(p[i / 2][i % 2 * 2 + h]);
        ds[i / 2][i % 2 * 2 + h] = pack2<T>(w.x * (dp[4 * i + 2 * h] - d.x), w.y * (dp[4 * i + 2 * h + 1] - d.y));
      }
    }
  }

  // For both consumers after the barrier kScoresWritten. The other one may still read dS of the tile before, not that of the one
  // before it, whose place this takes: it came to the last barrier after its product with it.
  __device__ __forceinline__ void share_gradients(const uint32_t (&ds)[kSteps][4], uint32_t ds_offset) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) stmatrix_x4_trans(ds_lane + ds_offset + step * 2048, ds[step]);
    fence_proxy_async();  // ordinary stores, read by wgmma
  }

  __device__ __forceinline__ void hand_over_dq(const float (&dq)[32], const Ring<2>& dq_tiles) const {
    dq_tiles.wait_empty();
    const uint32_t to = dq_thread + dq_tiles.slot() * (C::kTileFloats * 4);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      store_shared16(to + i * 2048, dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
    }
    fence_proxy_async();  // ordinary stores, read by the copy engine
    leave(dq_tiles.full());
  }

  __device__ __forceinline__ void store_sums(const Item& item, const float (&dk)[kSums],
                                             const float (&dv)[kSums]) const {
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
  }
};

template <class C>
__device__ __forceinline__ void consume(const Arguments& a, Shared<C>& shared, int warpgroup) {
  const Consumer<C> me(a, shared, warpgroup);
  constexpr int kScores = Consumer<C>::kScores, kSteps = Consumer<C>::kSteps, kSums = Consumer<C>::kSums;
  float dk[kSums], dv[kSums], s[kScores], dp[kScores];
  uint32_t p[kSteps][4], ds[kSteps][4];
  Ring<1> states(shared.states);
  Ring<C::kStages> q_tiles(shared.q_tiles), dout_tiles(shared.dout_tiles);
  Ring<2> dq_tiles(shared.dq_tiles);

#pragma unroll 1
  for (Ring<kItemSlots> items(shared.items);; items.next()) {
    items.wait_full();
    const Item& item = shared.item[items.slot()];
    const int keys = warp_uniform(item.keys);
    if (keys == 0) break;
#pragma unroll
    for (int i = 0; i < kSums; ++i) dk[i] = dv[i] = 0.0f;
    // Else the zeros move to where the first products are in flight, which then wait for each other.
    hold_registers(dk);
    hold_registers(dv);

    states.wait_full();
    const int steps = warp_uniform(item.steps);
    if (steps > 0) {
      int seen[2];  // by this thread's first query of a tile, of the tiles' queries 2 quad ...
#pragma unroll
      for (int h = 0; h < 2; ++h) seen[h] = clamp_token(item.visible.of(me.key + 8 * h) - 2 * me.quad);
      const int clear =
          warp_uniform(clamp_token(item.visible.of(warpgroup * 64 + 63)));  // from here on queries see all 64 keys

      if (keys < C::kKeys) {
        me.template clear_rows<C::kKeys>(shared_address(shared.k), shared_address(shared.v), keys);
      }
      // The first tile, which may end past the sequence, and its S^T. That of each other tile goes with the products of the
      // tile before.
      const int last = warp_uniform(item.last), rows = warp_uniform(item.length) - last * C::kQueries;
      q_tiles.wait_full();
      if (rows < C::kQueries) {
        dout_tiles.wait_full();
        me.template clear_rows<C::kQueries>(shared_address(shared.q[q_tiles.slot()]),
                                            shared_address(shared.dout[dout_tiles.slot()]), rows);
      }
      hold_registers(s);
      wgmma_fence();
      me.issue_scores(s, me.k_left, descriptor_add(me.q_columns, q_tiles.slot() * C::kRowsBytes));
      wgmma_wait<0>();
      hold_registers(s);
      // One query tile. Nothing is in flight from one tile to the next: the compiler would not keep track of it.
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const uint32_t slot = q_tiles.slot(), rows_offset = slot * C::kRowsBytes;
        const uint32_t q_empty = q_tiles.empty();
        const uint32_t ds_offset = dq_tiles.slot() * C::kScoreBytes;
        const int row = (last - step) * C::kQueries;  // first query of the tile
        dout_tiles.wait_full();
        hold_registers(dp);
        wgmma_fence();
        me.issue_scores(dp, me.v_left, descriptor_add(me.dout_columns, rows_offset));
        me.weights(s, p, slot, row, clear, seen);
        hold_registers(p);
        hold_registers(dv);
        wgmma_fence();
        me.issue_sums(dv, p, descriptor_add(me.dout_rows, rows_offset));
        wgmma_wait<1>();  // dP^T
        hold_registers(dp);
        me.gradients(ds, p, dp, slot);
        me.share_gradients(ds, ds_offset);
        hold_registers(ds);
        hold_registers(dk);
        wgmma_fence();
        me.issue_sums(dk, ds, descriptor_add(me.q_rows, rows_offset));
        named_barrier_sync(kScoresWritten, C::kConsumerThreads);

        float dq[32];
        hold_registers(dq);
        wgmma_fence();
        me.issue_dq(dq, ds_offset);
        wgmma_wait<2>();  // dV
        hold_registers(dv);
        hold_registers(p);
        me.leave(dout_tiles.empty());
        wgmma_wait<1>();  // dK
        hold_registers(dk);
        hold_registers(ds);
        // After the last tile, S^T of that one again, for nobody: how many products are in flight is then a constant. dV and dK
        // have ended because the registers of p and dS are wanted.
        q_tiles.next();
        const bool more = step + 1 < steps;
        if (more) q_tiles.wait_full();
        hold_registers(s);
        wgmma_fence();
        me.issue_scores(s, me.k_left,
                        descriptor_add(me.q_columns, more ? q_tiles.slot() * C::kRowsBytes : rows_offset));
        wgmma_wait<1>();  // dQ
        hold_registers(dq);
        me.hand_over_dq(dq, dq_tiles);
        wgmma_wait<0>();  // S^T of the next tile
        hold_registers(s);
        me.leave(q_empty);
        dout_tiles.next();
        dq_tiles.next();
      }
    }
    me.leave(states.empty());
    states.next();
    me.store_sums(item, dk, dv);
    me.leave(items.empty());
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    chunk_attention_dqkv_bwd_sm90_kernel(const __grid_constant__ Arguments a, const __grid_constant__ CUtensorMap k_map,
                                         const __grid_constant__ CUtensorMap v_map,
                                         const __grid_constant__ CUtensorMap q_map,
                                         const __grid_constant__ CUtensorMap dout_map) {
#ifdef RAT_HOPPER_CODE
  // At its symbol, not rounded up at run time: every address and descriptor is then a constant and takes no register.
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  Shared<C>& shared = *reinterpret_cast<Shared<C>*>(raw_shared);
  if (shared_address(raw_shared) % 1024 != 0) __trap();
  const int warpgroup = warp_uniform(static_cast<int>(threadIdx.x) / 128);
  if (threadIdx.x == 0) {
    shared.init_barriers();
    mbarrier_init_fence();
  }
  __syncthreads();  // the barriers are ready
  if (warpgroup == 0) {
    give_registers<C::kProducerRegisters>();
    if (threadIdx.x == 0) {
      feed<C>(a, k_map, v_map, q_map, dout_map, shared);
    } else if (threadIdx.x / 32 == 1) {
      feed_scalars<C>(a, shared, threadIdx.x % 32);
    } else if (threadIdx.x % 32 == 0) {
      drain<C>(a, shared, threadIdx.x / 32 - 2);
    }
  } else {
    take_registers<C::kConsumerRegisters>();
    consume<C>(a, shared, warpgroup - 1);
  }
#endif
}

// ---- finish -----------------------------------------------------------------------------------------------------------
//
// dQ of a (query tile, group), its parts added: thread 128 w + t of consumer w left 8 x 4 floats at [w][i][t], the C tiles of a
// wgmma. Rows of the tile, scaled, to shared memory.
template <class C>
constexpr int kFinishStride = C::kDim + 8;  // float2 stores of a warp then cover all banks
template <class C>
constexpr int kFinishBytes = C::kQueries * kFinishStride<C> * 4;
template <class C>
__device__ __forceinline__ void gather_dq(const float* tiles, const uint32_t* turns, int64_t tile_group, uint32_t parts,
                                          float scale, float* shared) {
  constexpr int kStride = kFinishStride<C>;
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, half_tile = threadIdx.x / 128;
  const int64_t first_part = tile_group * parts;
  const bool any = turns[first_part] != 0;  // else no key is visible, and no part of the tile was written
  const float4* from =
      reinterpret_cast<const float4*>(tiles + first_part * C::kTileFloats) + half_tile * (C::kTileFloats / 8) + thread;
  float4 c[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) c[i] = any ? from[i * 128] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (uint32_t p = 1; any && p < parts; ++p) {
    from += C::kTileFloats / 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float4 x = from[i * 128];
      c[i].x += x.x;
      c[i].y += x.y;
      c[i].z += x.z;
      c[i].w += x.w;
    }
  }
  const int row = thread / 32 * 16 + lane / 4 + (C::kPanels == 1 ? half_tile * 64 : 0);
  const int column = lane % 4 * 2 + (C::kPanels == 1 ? 0 : half_tile * 64);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float* to = shared + row * kStride + column + 8 * i;
    *reinterpret_cast<float2*>(to) = make_float2(c[i].x * scale, c[i].y * scale);
    *reinterpret_cast<float2*>(to + 8 * kStride) = make_float2(c[i].z * scale, c[i].w * scale);
  }
}

// A block per query tile and `width` of its groups: one, or all where dq is the tiles' own memory. A block has then read all
// of the memory that it writes before it writes it, and no other block touches that.
template <class C>
__global__ void __launch_bounds__(256)
    chunk_attention_finish_bwd_sm90_kernel(const __grid_constant__ Sizes s, const float* tiles, const uint32_t* turns,
                                           uint32_t parts, uint32_t width, uint32_t tiles_per_row, const float* cos,
                                           const float* sin, float scale, float* dq) {
#ifdef RAT_HOPPER_CODE
  constexpr int kStride = kFinishStride<C>;
  extern __shared__ __align__(16) float finish_shared[];  // `width` tiles
  const int64_t groups = s.q_groups, from = static_cast<int64_t>(blockIdx.x) * width, tile = quotient(from, groups);
  const auto first_tile = [&](int64_t n) { return quotient(s.cu_seqlens[n], C::kQueries) + n; };
  const int64_t n = s.cu_seqlens ? last_sequence(s, tile, first_tile) : quotient(tile, tiles_per_row);
  const Sequence q = sequence_at(s, n);
  const int64_t first =
      (tile - first_query_tile<C::kQueries>(s, n, q.begin, tiles_per_row)) * C::kQueries;  // row of the sequence
  if (q.begin + first >= q.end) return;
  const int rows = static_cast<int>(min(static_cast<int64_t>(C::kQueries), q.end - q.begin - first));
  for (uint32_t i = 0; i < width; ++i) {
    gather_dq<C>(tiles, turns, from + i, parts, scale, finish_shared + i * (kFinishBytes<C> / 4));
  }
  __syncthreads();
  const RowAngles angles(s, q.start + first);
  const int head_dim = static_cast<int>(s.head_dim), half = head_dim / 2;
  for (uint32_t i = 0; i < width; ++i) {
    const float* shared = finish_shared + i * (kFinishBytes<C> / 4);
    float* rows_of_group = dq + ((q.batch * s.tokens + q.begin + first) * groups + modulo(from + i, groups)) * head_dim;
    for (int index = threadIdx.x; index < rows * (C::kDim / 8); index += 256) {
      const int r = index / (C::kDim / 8), piece = index % (C::kDim / 8);
      if (4 * piece >= half) continue;
      float low[4], high[4];
      load4(shared + r * kStride + 4 * piece, low);
      load4(shared + r * kStride + 4 * piece + half, high);
      rotate4(low, high, cos, sin, angles.of(r), half, piece, -1.0f);
      float* to = rows_of_group + r * groups * head_dim + 4 * piece;
      *reinterpret_cast<float4*>(to) = make_float4(low[0], low[1], low[2], low[3]);
      *reinterpret_cast<float4*>(to + half) = make_float4(high[0], high[1], high[2], high[3]);
    }
  }
#endif
}

// ---- launcher ---------------------------------------------------------------------------------------------------------

// How a call is cut, from sizes alone.
struct Plan {
  int64_t query_tiles = 0;
  int64_t shares = 1;  // of the queries of a key tile
  int64_t items = 0;
  int64_t parts = 1;   // of the heads of a group
  int64_t tiles = 0;   // key tiles of all sequences
  int64_t window = 0;  // of the schedule
  // The tiles of dQ are the memory of scratch.dq: they fill it, and shared memory holds all groups of one.
  bool in_place = false;
};

template <int DIM>
Plan make_plan(const AttentionBwdParams& p) {
  const Sizes& s = p.fwd.size;
  using C = Traits<bf16, DIM>;
  Plan plan;
  plan.query_tiles = query_tiles<C::kQueries>(s);
  plan.tiles = key_tiles(s, p.fwd.chunks, C::kKeys);
  const int64_t items = plan.tiles * s.heads;
  // One item for each multiprocessor, but no share under 1024 queries. More only lengthens the queues of dQ.
  plan.shares = count_shares(items, 1, s.tokens, 1024, 132);
  plan.items = items * plan.shares;
  // Items that walk few tiles have no time to fall in step: parts, while all sums of dQ stay in L2. More than four cost more than
  // they bring.
  constexpr int64_t kFewTokens = 8192, kMostParts = 4, kBudget = 32 << 20;
  const int64_t bytes = plan.query_tiles * s.q_groups * C::kTileFloats * static_cast<int64_t>(sizeof(float));
  const int64_t group_heads = s.q_groups > 0 ? s.heads / s.q_groups : 1;
  if (p.deterministic && s.tokens <= kFewTokens) {
    while (plan.parts < kMostParts && group_heads % (2 * plan.parts) == 0 && 2 * plan.parts * bytes <= kBudget) {
      plan.parts *= 2;
    }
  }
  // Of many short sequences. Long ones go by key tiles, first to last, which deals out the heaviest first.
  if (p.fwd.chunks.compact || plan.tiles == s.sequences) plan.window = 32;
  plan.in_place = plan.parts == 1 && !s.cu_seqlens && s.tokens % C::kQueries == 0 && s.head_dim == DIM &&
                  s.q_groups * kFinishBytes<C> <= 200 * 1024;
  return plan;
}
Plan make_plan(const AttentionBwdParams& p) { return p.fwd.size.head_dim > 64 ? make_plan<128>(p) : make_plan<64>(p); }
constexpr int64_t kTileFloats = Traits<bf16, 128>::kTileFloats;
static_assert(kTileFloats == Traits<bf16, 64>::kTileFloats && kTileFloats == kDqTileFloats);
static_assert(dq_tile_queries(64) == Traits<bf16, 64>::kQueries && dq_tile_queries(128) == Traits<bf16, 128>::kQueries);

struct Pieces {
  Piece<float> dq_tiles;     // not taken where they lie in scratch.dq
  Piece<uint32_t> counters;  // turns, then the item counter
  int64_t counter_count;
  Shares shares;
};

Pieces take_pieces(const AttentionBwdParams& p, const Plan& plan, Arena& arena) {
  const int64_t tiles = plan.query_tiles * p.fwd.size.q_groups * plan.parts;
  Pieces pieces;
  if (!plan.in_place) pieces.dq_tiles = arena.take<float>(tiles * kTileFloats);
  pieces.counter_count = tiles + 1;
  pieces.counters = arena.take<uint32_t>(pieces.counter_count);
  pieces.shares = take_shares(p, plan.shares, arena);
  return pieces;
}

template <class C>
void launch(const AttentionBwdParams& p, const BwdScratch& scratch, const Plan& plan, const Pieces& pieces,
            cudaStream_t stream) {
  using T = typename C::T;
  const Sizes& s = p.fwd.size;
  const float* cos = static_cast<const float*>(p.fwd.rotary.cos);
  const float* sin = static_cast<const float*>(p.fwd.rotary.sin);

  const Rows queries = make_product_queries(p, {pieces.counters, pieces.counter_count}, stream);
  float* const dq_tiles = plan.in_place ? scratch.dq.get() : pieces.dq_tiles.get();
  if (!p.deterministic) {
    const size_t bytes = plan.query_tiles * s.q_groups * kTileFloats * sizeof(float);
    check(cudaMemsetAsync(dq_tiles, 0, bytes, stream), "sums of dQ");
  }

  Arguments a;
  a.size = s;
  a.chunks = p.fwd.chunks;
  a.scale = static_cast<float>(p.fwd.scale);
  a.scale_log2 = static_cast<float>(p.fwd.scale) * kLog2e;
  a.lse = static_cast<const float*>(p.fwd.lse);
  a.delta = scratch.delta;
  a.dq_tiles = dq_tiles;
  a.turns = pieces.counters;
  a.next = pieces.counters + pieces.counter_count - 1;
  a.dchunk_k = pieces.shares.dchunk_k(scratch);
  a.dchunk_v = pieces.shares.dchunk_v(scratch);
  a.share_stride = pieces.shares.extent;
  a.ordered = p.deterministic;
  a.heads_per_group = static_cast<uint32_t>(s.heads / s.q_groups);
  a.parts = static_cast<uint32_t>(plan.parts);
  a.heads_per_part = a.heads_per_group / a.parts;
  a.tiles_per_row = static_cast<uint32_t>(ceil_div(s.tokens, C::kQueries));
  // As many blocks as the chip runs at once. Their number, unlike that of the shares, changes no bit: only who takes an item.
  const int64_t blocks = std::min<int64_t>(plan.items, device_attribute<cudaDevAttrMultiProcessorCount>());
  a.schedule.total = static_cast<uint32_t>(plan.items);
  a.schedule.tiles = static_cast<uint32_t>(std::max<int64_t>(1, ceil_div(p.fwd.chunks.rows, C::kKeys)));
  a.schedule.pairs = static_cast<uint32_t>(s.sequences * s.heads);
  a.schedule.shares = static_cast<uint32_t>(plan.shares);
  a.schedule.window = static_cast<uint32_t>(plan.window);
  a.schedule.all_tiles = static_cast<uint32_t>(plan.tiles);

  constexpr CUtensorMapDataType type = kMapType<T>;
  const ChunkStates& c = p.fwd.chunks;
  const int64_t outer = c.compact ? s.heads : s.sequences * s.heads;
  const CUtensorMap k_map = swizzled_rows_map(c.k, type, s.head_dim, c.rows, outer, C::kKeys);
  const CUtensorMap v_map = swizzled_rows_map(c.v, type, s.head_dim, c.rows, outer, C::kKeys);
  const CUtensorMap q_map = token_map(queries, type, s, s.q_groups, C::kQueries);
  const CUtensorMap dout_map = token_map(scratch.dout, type, s, s.heads, C::kQueries);

  constexpr int kBytes = static_cast<int>(sizeof(Shared<C>));
  static_assert(kBytes <= 227 * 1024);
  const char* name = "chunk_attention_dqkv_bwd_sm90_kernel";
  allow_shared_memory(chunk_attention_dqkv_bwd_sm90_kernel<C>, kBytes, name);
  chunk_attention_dqkv_bwd_sm90_kernel<C>
      <<<grid_x(blocks, name), C::kThreads, kBytes, stream>>>(a, k_map, v_map, q_map, dout_map);
  check_launch(name);

  add_shares(pieces.shares, scratch, stream);
  if (scratch.dq_in_tiles) return;
  name = "chunk_attention_finish_bwd_sm90_kernel";
  const int64_t width = plan.in_place ? s.q_groups : 1;
  const int finish_bytes = static_cast<int>(width) * kFinishBytes<C>;
  allow_shared_memory(chunk_attention_finish_bwd_sm90_kernel<C>, finish_bytes, name);
  chunk_attention_finish_bwd_sm90_kernel<C>
      <<<grid_x(plan.query_tiles * s.q_groups / width, name), 256, finish_bytes, stream>>>(
          s, dq_tiles, pieces.counters, a.parts, static_cast<uint32_t>(width), a.tiles_per_row, cos, sin, a.scale,
          scratch.dq);
  check_launch(name);
}

}  // namespace

namespace sm90 {

const char* bwd_refuses(const AttentionBwdParams& p) {
  const Sizes& s = p.fwd.size;
  constexpr int64_t kMany = INT64_C(1) << 30;  // tile and row indices are 32-bit
  if (s.dtype != DType::bf16 && s.dtype != DType::f16) return "the dtype is not bfloat16 or float16";
  if (s.head_dim > 256) return "D is over 256";
  if (!std::isfinite(static_cast<float>(p.fwd.scale) * kLog2e)) return "the scale is not finite in float32";
  if (const char* reason = no_state_map(s, p.fwd.chunks)) return reason;
  if (s.tokens > kMany || s.sequences * s.heads > kMany) return "the call is too large for 32-bit indices";
  if (!p.fwd.rotary.cos && !has_map(p.fwd.q, s, s.q_groups)) return "no tensor map describes the rows of q";
  if (!has_map(p.fwd.out_gate.ptr ? p.dv : p.dy, s, s.heads)) return "no tensor map describes the rows of dO";
  if (s.head_dim > 128) {
    if (const char* reason = bwd_wide_refuses(p)) return reason;
    return no_hopper();
  }
  const Plan plan = make_plan(p);
  if (plan.items > kMany || plan.query_tiles * s.q_groups > kMany) return "the call is too large for 32-bit indices";
  // Every sequence pads its last tile: many short ones would take more memory than their gradient.
  if (plan.query_tiles * kTileFloats > 2 * s.batch * s.tokens * std::max<int64_t>(s.head_dim, 64)) {
    return "sequences are so short that tiles would be mostly padding";
  }
  return no_hopper();
}

Launch bwd(const AttentionBwdParams& p, BwdScratch& scratch, Arena& arena) {
  if (p.fwd.size.head_dim > 128) return bwd_wide(p, scratch, arena);
  const Plan plan = make_plan(p);
  const Pieces pieces = take_pieces(p, plan, arena);
  // A tile that sees no key was not written: with whole chunks of 16 tokens every tile sees one.
  scratch.dq_in_tiles = scratch.dq_tiles_welcome && plan.in_place;
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
