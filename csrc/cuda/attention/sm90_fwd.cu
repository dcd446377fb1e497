// Forward phase 2 on Hopper (sm_90a): softmax of every query over the states of earlier chunks and its own state.
//
// Reads per token and head, in elements of T: v~ (from y) and out_gate, D each; q, D per group; s_self, 4 bytes. Writes y over
// v~, D, and lse, 4 bytes. Keys and values are re-read from L2 once for each query tile. 4 D FLOP per query and visible key.
//
// A persistent grid, one or two blocks per multiprocessor. A tile is kRows queries of one head; it walks blocks of kKeys chunk
// states from the last visible one to the first, so that only its first blocks need a mask.
//   warp 0           one thread decides which tile is next, tells the others, and feeds its K and V blocks through the copy
//                    engine into two rings.
//   warps 1 ... 3    load q and s_self of the next tile, rotate q by chunk index, store it as wgmma reads it; and start
//                    fetching v~ and out_gate of the tile that the consumers begin into L2.
//   warpgroup 1 ...  consumers: 64 queries each. S = Q K^T of a block is issued before P V of the block before, and the
//                    softmax of one warpgroup runs while another one's products do: a turn that named barriers pass on
//                    keeps them so. v~ and out_gate are loaded while the last product runs.
// The running softmax is that of softmax.cuh: it starts from the self term s_self, and exp(s_self - m) v~ joins at the end.
//
// Shared memory: q (2 tiles), K and V rings (kStages blocks each), descriptions of tiles, barriers. Every tile lies in panels
// of 64 columns, 128 bytes per row, 16-byte pieces swizzled: the layout that the copy engine writes and wgmma reads.
//
// Rings (mbarrier.cuh), who fills and who leaves a slot:
//   tiles   warp 0 fills, one arrival;      each loader thread and each consumer warp leaves
//   q       each loader thread fills;       each consumer warp leaves, after its epilogue
//   k, v    the copy engine's bytes fill;   each consumer warp leaves, when its products have read the block
//
// Rows of the last block that no query of the tile sees may hold anything, NaN too. Their scores are masked; their values
// are set to zero in shared memory before the product, since 0 NaN is NaN. A value that some queries of the tile see and others do not
// makes NaN of the others' sums where it is not finite: a warp with such sums attends to its queries one by one (alone.cuh).
//
// What a query becomes depends on itself and the keys that it sees alone, bit for bit: not on its tile, the call, or the room that
// there is for states. kKeys is part of the arithmetic (blocks start at multiples of it), so the number of keys that a query
// sees decides it, and a call with queries of both kinds is two launches. kConsumers is not: it follows the call.
#include <cuda.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../device/rows.cuh"
#include "../device/sequence.cuh"
#include "../host/launch.h"
#include "../ptx/cp_async.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/mma.cuh"
#include "../ptx/registers.cuh"
#include "../ptx/target.cuh"
#include "../ptx/tma.cuh"
#include "../ptx/wgmma.cuh"
#include "alone.cuh"
#include "families.h"
#include "plan.h"
#include "softmax.cuh"
#include "visible.cuh"

namespace rat::cuda {
namespace {

template <class T_, int DIM, int CONSUMERS, int KEYS>
struct Traits {
  using T = T_;
  static constexpr int kDim = DIM;  // head size, padded
  static constexpr int kPanels = DIM / 64;
  static constexpr int kConsumers = CONSUMERS;  // warpgroups
  static constexpr int kRows = 64 * CONSUMERS;  // queries per tile
  static constexpr int kKeys = KEYS;            // chunk states per block
  static constexpr int kStages = DIM == 64 ? 3 : 2;
  static constexpr int kThreads = 128 * (CONSUMERS + 1);
  static constexpr int kLoaders = 96;                                         // warps 1 ... 3
  static constexpr int kBlocks = CONSUMERS == 1 && KEYS + DIM < 256 ? 2 : 1;  // per multiprocessor
  // Registers per thread: the roles share what the block was launched with, a multiple of 8 for each.
  static constexpr int kLaunchRegisters = 65536 / (kThreads * kBlocks) / 8 * 8;
  static constexpr int kProducerRegisters = KEYS + DIM > 128 ? 56 : 80;
  static constexpr int kConsumerRegisters =
      std::min(240, (kLaunchRegisters * (CONSUMERS + 1) - kProducerRegisters) / CONSUMERS / 8 * 8);
  static constexpr bool kShareRegisters = kLaunchRegisters < kConsumerRegisters;
  // The epilogue's operands of both rows of a thread before the last product ends, where registers allow.
  static constexpr bool kFetchBoth = DIM == 64 || CONSUMERS < 3;
  static_assert(DIM % 64 == 0 && KEYS % 16 == 0 && KEYS <= 256 && kConsumerRegisters <= 240);
};

// What a tile of queries is. Made by the thread that feeds K and V, read by everyone.
struct QueryTile {
  int64_t token;  // of row 0, in the row of the token tensors
  int64_t batch;
  int32_t head;
  int32_t rows;     // queries; 0: no more tiles
  int32_t keys;     // chunk states that its last query sees
  int32_t key_row;  // of its first chunk state in the tensor map; in pages, 0
  int32_t key_outer;
  const int32_t* pages;  // of the sequence, or null
  VisibleKeys visible;
  RowAngles angles;
};

// Tiles are described before the one before is fed, while the consumers may be two further behind.
constexpr int kTileSlots = 4;

template <class C>
struct Shared {
  using T = typename C::T;
  alignas(1024) T q[2][C::kPanels][C::kRows * 64];
  alignas(1024) T k[C::kStages][C::kPanels][C::kKeys * 64];
  alignas(1024) T v[C::kStages][C::kPanels][C::kKeys * 64];
  float own[2][C::kRows];  // s_self
  QueryTile tile[kTileSlots];
  RingBarriers<kTileSlots> tile_ring;
  RingBarriers<2> q_ring;
  RingBarriers<C::kStages> k_ring, v_ring;
};

// Hardware barriers of the block; 0 is that of __syncthreads().
enum NamedBarrier {
  kQueriesCleared = 1,  // the loaders, once: padding columns of q are zeros
  kTurn = 2,            // + warpgroup: its turn to issue products. It waits, the warpgroup before it arrives
  kValuesCleared = 8,   // + warpgroup: it alone, after it has set values to zero that no query sees
};

template <class C>
constexpr int shared_bytes() {
  return static_cast<int>(sizeof(Shared<C>)) + 1024;  // the start is rounded up
}

// The order of tiles. Dense: (sequence, head) pairs run in sections whose keys and values fit in L2, late tiles, which see the
// most keys, first. Packed: the same from the last work item to the first.
struct Schedule {
  uint32_t total = 0;
  uint32_t per_row = 1;  // dense: tiles of a sequence
  uint32_t pairs = 1;
  uint32_t section = 1;
  uint32_t from = 0, to = kAllPositions;  // positions of the queries that this launch serves
  static constexpr uint32_t kAllPositions = INT32_MAX;
};

struct Arguments {
  Sizes size;
  Rows q, out_gate, y;
  Rotary rotary;
  ChunkStates chunks;
  const float* s_self;
  float* lse;
  float scale_log2;  // |scale| log2(e), above zero
  float q_sign;      // sign of the scale: q carries it
  uint32_t heads_per_group;
  Schedule schedule;
};

// Index of this block's round-th tile: rounds alternate in direction, so that no block always gets the heaviest.
__device__ __forceinline__ uint32_t tile_index(uint32_t round) {
  return round * gridDim.x + (round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

// Queries of sequence n that the launch serves: positions [low, high).
struct Positions {
  uint32_t begin, start;  // its first token, and the position of that
  uint32_t low, high;
};
__device__ __forceinline__ Positions positions(const Arguments& a, uint32_t n) {
  const uint32_t begin = a.size.cu_seqlens ? static_cast<uint32_t>(a.size.cu_seqlens[n]) : 0;
  const uint32_t end =
      a.size.cu_seqlens ? static_cast<uint32_t>(a.size.cu_seqlens[n + 1]) : static_cast<uint32_t>(a.size.tokens);
  const uint32_t start = a.size.lengths ? static_cast<uint32_t>(a.size.lengths[n]) : 0;
  return {begin, start, max(start, a.schedule.from), min(start + (end - begin), a.schedule.to)};
}

// In 32-bit arithmetic: 64-bit divisions would take longer than a small tile.
template <int ROWS>
__device__ __forceinline__ void describe_tile(const Arguments& a, uint32_t index, QueryTile& tile) {
  const uint32_t heads = static_cast<uint32_t>(a.size.heads);
  uint32_t n, head, in_sequence;
  if (a.size.cu_seqlens) {  // as work_item() does
    head = index % heads;
    const uint32_t item = a.schedule.total / heads - 1 - index / heads;
    const auto first = [&](uint32_t n) { return static_cast<uint32_t>(a.size.cu_seqlens[n]) / ROWS + 2 * n; };
    n = last_sequence(a.size, item, first);
    in_sequence = item - first(n);
  } else {
    const Schedule& s = a.schedule;
    const uint32_t first = s.section == s.pairs ? 0 : index / (s.section * s.per_row) * s.section;
    const uint32_t width = min(s.section, s.pairs - first);
    const uint32_t inside = index - first * s.per_row;
    const uint32_t pair = first + inside % width;
    head = pair % heads;
    n = pair / heads;
    in_sequence = s.per_row - 1 - inside / width;
  }
  const Positions served = positions(a, n);
  const uint32_t position = served.low + in_sequence * ROWS;
  const int32_t owner = a.chunks.entry ? a.chunks.entry[n] : static_cast<int32_t>(n);
  tile.token = served.begin + (position - served.start);
  tile.batch = a.size.cu_seqlens ? 0 : n;
  tile.head = static_cast<int>(head);
  const int rows = position < served.high && owner >= 0
                       ? static_cast<int>(min(static_cast<uint32_t>(ROWS), served.high - position))
                       : 0;
  tile.rows = rows;
  tile.visible = VisibleKeys(a.size, position);
  tile.angles = RowAngles(a.size, position);
  tile.keys = rows > 0 ? tile.visible.to_any(rows) : 0;
  tile.key_row = a.chunks.compact ? static_cast<int>(served.begin / tile.visible.every + n) : 0;
  tile.key_outer = a.chunks.compact ? static_cast<int>(head) : owner * static_cast<int>(heads) + static_cast<int>(head);
  tile.pages = a.chunks.page_table ? a.chunks.page_table + owner * a.chunks.columns : nullptr;
}

// Where the state of key j of the tile begins.
__device__ __forceinline__ int64_t state_offset(const Arguments& a, const QueryTile& tile, int j) {
  int64_t row = static_cast<int64_t>(tile.key_outer) * a.chunks.rows + tile.key_row + j;
  if (tile.pages != nullptr) {
    const int shift = a.chunks.page_shift;
    row = ((tile.pages[j >> shift] * a.size.heads + tile.head) << shift) + (j & ((1 << shift) - 1));
  }
  return row * a.size.head_dim;
}

// Where a launch serves a part of the positions: is there a query?
__device__ __forceinline__ bool any_query(const Arguments& a) {
  bool any = false;
  for (uint32_t n = threadIdx.x; n < static_cast<uint32_t>(a.size.sequences); n += blockDim.x) {
    const Positions served = positions(a, n);
    any |= served.low < served.high;
  }
  return __syncthreads_or(any);
}

__device__ __forceinline__ float sigmoid_fast(float x) { return reciprocal_fast(1.0f + exp2_fast(x * -kLog2e)); }

// Byte offset of column `column` (a multiple of 4) of row `row` in a tile of `rows` rows.
__device__ __forceinline__ uint32_t swizzled(int rows, int row, int column) {
  return static_cast<uint32_t>(column / 64 * rows * 128 + row * 128 + ((column % 64 / 8) ^ (row & 7)) * 16 +
                               column % 8 * 2);
}

// ---- producers --------------------------------------------------------------------------------------------------------

// Rows of a box of the tensor maps: a block of keys, or a part of a page.
template <class C>
__host__ __device__ constexpr int box_rows(int page_rows) {
  constexpr int kPart = C::kKeys & -C::kKeys;  // the largest power of two that divides it
  return page_rows == 0 ? C::kKeys : page_rows < kPart ? page_rows : kPart;
}

// Warp 0: describes tiles, one ahead of feeding them, and asks the copy engine for their blocks. One thread does it; where states
// lie in pages, the whole warp: each lane looks up the page of a box and asks for it.
template <class C, bool PAGED>
__device__ __forceinline__ void feed_blocks(const Arguments& a, const CUtensorMap& k_map, const CUtensorMap& v_map,
                                            Shared<C>& shared) {
  constexpr uint32_t kBytes = C::kKeys * C::kDim * 2;
  constexpr uint32_t kPanelBytes = C::kKeys * 128;
  const uint32_t k_blocks = shared_address(shared.k), v_blocks = shared_address(shared.v);
  tma_prefetch_map(&k_map);
  tma_prefetch_map(&v_map);

  const int lane = threadIdx.x;
  const auto load = [&](const CUtensorMap& map, uint32_t blocks, Ring<C::kStages>& ring, const QueryTile& tile,
                        int row) {
    ring.wait_empty();
    if (lane == 0) mbarrier_arrive_expect(ring.full(), kBytes);
    const uint32_t to = blocks + ring.slot() * kBytes;
    if constexpr (PAGED) {
      __syncwarp();  // the bytes are expected before any is asked for
      const int shift = a.chunks.page_shift, box = box_rows<C>(1 << shift);
      const int first = lane * box, key = row + first;
      if (first < C::kKeys) {
        const int page =
            key < tile.keys ? tile.pages[key >> shift] : -1;  // past the last key: outside, which reads zeros
        const int outer = page * static_cast<int>(a.size.heads) + tile.head;
#pragma unroll
        for (int panel = 0; panel < C::kPanels; ++panel) {
          tma_load(to + panel * kPanelBytes + first * 128, &map, ring.full(), 64 * panel, key & ((1 << shift) - 1),
                   page < 0 ? -1 : outer);
        }
      }
    } else {
#pragma unroll
      for (int panel = 0; panel < C::kPanels; ++panel) {
        tma_load(to + panel * kPanelBytes, &map, ring.full(), 64 * panel, row, tile.key_outer);
      }
    }
    ring.next();
  };

  uint32_t round = 0;
  Ring<kTileSlots> described(shared.tile_ring);
  const auto describe = [&] {
    described.wait_empty();
    if (lane == 0) {
      QueryTile& tile = shared.tile[described.slot()];
      tile.rows = 0;  // unless there is one more
      for (; round * gridDim.x < a.schedule.total && tile.rows == 0; ++round) {
        const uint32_t index = tile_index(round);
        if (index < a.schedule.total) describe_tile<C::kRows>(a, index, tile);
      }
      mbarrier_arrive(described.full());
    }
    if constexpr (PAGED) __syncwarp();  // the other lanes read the description
    described.next();
  };
  Ring<C::kStages> k_ring(shared.k_ring), v_ring(shared.v_ring);
  describe();
#pragma unroll 1
  for (uint32_t tiles = 0;; ++tiles) {
    const QueryTile& tile = shared.tile[tiles % kTileSlots];
    if (tile.rows == 0) break;
    describe();  // the loaders work one tile ahead
    const int blocks = (tile.keys + C::kKeys - 1) / C::kKeys;
    if (blocks == 0) continue;
    // In the order in which the consumers need them: K runs one block ahead of V.
    int row = tile.key_row + (blocks - 1) * C::kKeys;
    load(k_map, k_blocks, k_ring, tile, row);
#pragma unroll 1
    for (int block = 1; block < blocks; ++block, row -= C::kKeys) {
      load(k_map, k_blocks, k_ring, tile, row - C::kKeys);
      load(v_map, v_blocks, v_ring, tile, row);
    }
    load(v_map, v_blocks, v_ring, tile, row);
  }
}

// Two columns of each half of a row of q, rotated. The angles carry the sign of the scale.
template <class T>
__device__ __forceinline__ void rotate_pair(uint32_t& low, uint32_t& high, const float* cos, const float* sin) {
  struct alignas(4) Two {
    T value[2];
  };
  const Two a = *reinterpret_cast<const Two*>(&low), b = *reinterpret_cast<const Two*>(&high);
  const float a0 = to_float(a.value[0]), a1 = to_float(a.value[1]);
  const float b0 = to_float(b.value[0]), b1 = to_float(b.value[1]);
  low = pack2<T>(a0 * cos[0] - b0 * sin[0], a1 * cos[1] - b1 * sin[1]);
  high = pack2<T>(b0 * cos[0] + a0 * sin[0], b1 * cos[1] + a1 * sin[1]);
}

// q of one tile, in pieces of COLUMNS: 8, or 4 where D is no multiple of 16 and the upper half of a row begins between two 16-byte
// pieces. A thread owns the same columns of both halves in a run of rows: it rotates only what it loaded itself, so no barrier
// lies between, and fetches angles only where they change.
template <class C, int COLUMNS>
struct QueryPieces {
  using T = typename C::T;
  static_assert(COLUMNS == 4 || COLUMNS == 8);
  static constexpr int kPieces = C::kDim / 2 / COLUMNS;
  static constexpr int kRun = (C::kRows * kPieces + C::kLoaders - 1) / C::kLoaders;
  static_assert(C::kLoaders % kPieces == 0);
  uint32_t target;
  int half, column, row, end;  // rows [row, end) of the tile, those past the tile's last token included

  __device__ __forceinline__ QueryPieces(const Arguments& a, uint32_t tile, int thread) {
    target = tile;
    half = static_cast<int>(a.size.head_dim) / 2;
    column = thread % kPieces * COLUMNS;
    row = thread / kPieces * kRun;
    end = column < half ? min(row + kRun, C::kRows) : row;
  }
  __device__ __forceinline__ uint32_t low(int r) const { return target + swizzled(C::kRows, r, column); }
  __device__ __forceinline__ uint32_t high(int r) const { return target + swizzled(C::kRows, r, half + column); }

  static __device__ __forceinline__ void copy(uint32_t to, const T* from, bool valid) {
    COLUMNS == 8 ? cp_async16(to, from, valid) : cp_async8(to, from, valid);
  }
  static __device__ __forceinline__ void load_shared(uint32_t (&x)[4], uint32_t from) { load_shared16(x, from); }
  static __device__ __forceinline__ void load_shared(uint32_t (&x)[2], uint32_t from) { load_shared8(x, from); }
  static __device__ __forceinline__ void store_shared(uint32_t to, const uint32_t (&x)[4]) { store_shared16(to, x); }
  static __device__ __forceinline__ void store_shared(uint32_t to, const uint32_t (&x)[2]) { store_shared8(to, x); }

  // Rows past the last token become zeros.
  __device__ __forceinline__ void load(const T* q, int64_t token_stride, int rows) const {
    const T* from = q + row * token_stride + column;
#pragma unroll 1
    for (int r = row; r < end; ++r, from += token_stride) {
      const bool valid = r < rows;
      copy(low(r), valid ? from : q, valid);
      copy(high(r), valid ? from + half : q, valid);
    }
  }

  // After the loads have landed; waits for them itself, with the first angles in flight.
  __device__ __forceinline__ void rotate(const Arguments& a, const QueryTile& tile) const {
    const float* cos = static_cast<const float*>(a.rotary.cos);
    const float* sin = static_cast<const float*>(a.rotary.sin);
    const uint32_t every = tile.angles.every, to_next = tile.angles.to_next;
    const int last = min(end, tile.rows);
    float c[COLUMNS], s[COLUMNS];
    uint32_t index = tile.angles.first, left = to_next - row;
    if (static_cast<uint32_t>(row) >= to_next) {
      const uint32_t past = row - to_next;
      index += 1 + past / every;
      left = every - past % every;
    }
    const auto fetch_angles = [&] {
      const int64_t angle = static_cast<int64_t>(index) * half + column;
#pragma unroll
      for (int i = 0; i < COLUMNS; i += 4) {
        const float4 co = __ldg(reinterpret_cast<const float4*>(cos + angle + i));
        const float4 si = __ldg(reinterpret_cast<const float4*>(sin + angle + i));
        c[i] = co.x, c[i + 1] = co.y, c[i + 2] = co.z, c[i + 3] = co.w;
        s[i] = si.x, s[i + 1] = si.y, s[i + 2] = si.z, s[i + 3] = si.w;
      }
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i) c[i] *= a.q_sign, s[i] *= a.q_sign;
    };
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) c[i] = a.q_sign, s[i] = 0.0f;
    if (cos != nullptr && row < last) fetch_angles();
    cp_async_wait<0>();
    if (cos == nullptr && a.q_sign > 0.0f) return;
#pragma unroll 1
    for (int r = row; r < last; ++r) {
      uint32_t x[COLUMNS / 2], y[COLUMNS / 2];
      load_shared(x, low(r));
      load_shared(y, high(r));
#pragma unroll
      for (int i = 0; i < COLUMNS / 2; ++i) rotate_pair<T>(x[i], y[i], &c[2 * i], &s[2 * i]);
      store_shared(low(r), x);
      store_shared(high(r), y);
      if (--left == 0) {
        ++index;
        left = every;
        if (cos != nullptr && r + 1 < last) fetch_angles();
      }
    }
  }
};

// The 128-byte lines of a (B, T, H, D) tensor at the tile's tokens, on their way to L2.
template <class C>
__device__ __forceinline__ void prefetch_rows(const Rows& tensor, const QueryTile& tile, int thread) {
  constexpr int kLines = C::kDim / 64;
  const char* base = static_cast<const char*>(tensor.ptr) +
                     2 * (tile.batch * tensor.batch + tile.token * tensor.token + tile.head * tensor.head);
  const int64_t stride = 2 * tensor.token;
#pragma unroll 1
  for (int i = thread; i < tile.rows * kLines; i += C::kLoaders) {
    prefetch_l2(base + i / kLines * stride + i % kLines * 128);
  }
}

// Warps 1 ... 3: q and s_self of the next tile, v~ and out_gate of the one that the consumers begin.
template <class C>
__device__ __forceinline__ void feed_queries(const Arguments& a, Shared<C>& shared, int thread) {
  using T = typename C::T;
  constexpr uint32_t kBytes = C::kRows * C::kDim * 2;
  if (a.size.head_dim < C::kDim) {  // padding columns: zeros, once
    for (uint32_t i = thread; i < 2 * kBytes / 16; i += C::kLoaders) clear_shared16(shared_address(shared.q) + 16 * i);
    named_barrier_sync(kQueriesCleared, C::kLoaders);
  }
  Ring<kTileSlots> tile_ring(shared.tile_ring);
#pragma unroll 1
  for (;; tile_ring.next()) {
    const Ring<2> q_ring(shared.q_ring, tile_ring.count);
    tile_ring.wait_full();
    const QueryTile& tile = shared.tile[tile_ring.slot()];
    const int rows = tile.rows;
    q_ring.wait_empty();  // the consumers have left the tile before last
    if (tile_ring.count > 0) {
      // They start the tile before now and want its v~ and out_gate at its end. Not earlier: what all blocks have asked for
      // must stay in L2 until it is used.
      const Ring<kTileSlots> current(shared.tile_ring, tile_ring.count - 1);
      prefetch_rows<C>(a.y, shared.tile[current.slot()], thread);
      if (a.out_gate.ptr != nullptr) prefetch_rows<C>(a.out_gate, shared.tile[current.slot()], thread);
      mbarrier_arrive(current.empty());
    }
    if (rows > 0) {
      const float* own = a.s_self + (tile.batch * a.size.heads + tile.head) * a.size.tokens + tile.token;
#pragma unroll 1
      for (int row = thread; row < C::kRows; row += C::kLoaders) {
        cp_async4(shared_address(&shared.own[q_ring.slot()][row]), row < rows ? own + row : own, row < rows);
      }
      const uint32_t group = static_cast<uint32_t>(tile.head) / a.heads_per_group;
      const T* q = static_cast<const T*>(a.q.ptr) + tile.batch * a.q.batch + tile.token * a.q.token + group * a.q.head;
      const uint32_t target = shared_address(shared.q) + q_ring.slot() * kBytes;
      const auto feed = [&](const auto& pieces) {
        pieces.load(q, a.q.token, rows);
        cp_async_commit();
        pieces.rotate(a, tile);
      };
      if (a.size.head_dim % 16 == 0) {
        feed(QueryPieces<C, 8>(a, target, opaque(thread)));
      } else {
        feed(QueryPieces<C, 4>(a, target, opaque(thread)));
      }
    }
    fence_proxy_async();  // q was written by ordinary stores and cp.async; wgmma reads it
    mbarrier_arrive(q_ring.full());
    if (rows == 0) break;
  }
}

// ---- consumers --------------------------------------------------------------------------------------------------------

// C tiles of a wgmma, as mma.sync's.
template <int COUNT>
using Tiles = float[COUNT / 4][4];
template <int COUNT>
__device__ __forceinline__ Tiles<COUNT>& tiles_of(float (&c)[COUNT]) {
  return reinterpret_cast<Tiles<COUNT>&>(c);
}

// What a warpgroup is at: 64 queries of a tile. The steps of a tile, in order:
//   begin             the softmax starts from the self term
//   first_block       S, softmax
//   next_block        S of a block together with P V of the block before, softmax; once for each further block
//   last_values       P V of the last block, with v~ and out_gate on their way
//   epilogue          v~ joins; y, lse
template <class C>
struct Consumer {
  using T = typename C::T;
  static constexpr int kScores = C::kKeys / 2;  // accumulators of S
  static constexpr int kSteps = C::kKeys / 16;  // of P V
  static constexpr int kOutputs = C::kDim / 2;  // accumulators of O
  static constexpr int kGroups = C::kDim / 32;  // of columns in the epilogue: a lane takes eight in every 32
  static constexpr uint32_t kQBytes = C::kRows * C::kDim * 2, kQPanel = C::kRows * 128;
  static constexpr uint32_t kBytes = C::kKeys * C::kDim * 2, kPanel = C::kKeys * 128;

  const Arguments& a;
  Shared<C>& shared;
  int warpgroup, thread, lane, quad;
  int row;                             // of the tile, and row + 8: this thread's
  uint64_t q_first, k_first, v_first;  // descriptors of slot 0
  Ring<2> q_ring;
  Ring<C::kStages> v_ring;

  float s[kScores], o[kOutputs];
  uint32_t p[kSteps][4];                  // rounded weights
  float own[2], m[2], sum[2], shrink[2];  // of both rows, in powers of two; sums are this lane's share of the quad's
  int visible[2];                         // keys of the block that the row sees, less this thread's first column
  Bytes16 values[2][kGroups], gates[2][kGroups];  // v~ and out_gate

  __device__ __forceinline__ Consumer(const Arguments& a_, Shared<C>& shared_, int warpgroup_)
      : a(a_),
        shared(shared_),
        warpgroup(warpgroup_),
        thread(threadIdx.x % 128),
        lane(threadIdx.x % 32),
        quad(lane % 4),
        row(warpgroup * 64 + thread / 32 * 16 + lane / 4),
        q_first(descriptor_k_major(shared_address(shared.q) + warpgroup * 64 * 128)),
        k_first(descriptor_k_major(shared_address(shared.k))),
        v_first(descriptor_n_major(shared_address(shared.v), kPanel)),
        q_ring(shared.q_ring),
        v_ring(shared.v_ring) {}

  // Descriptions pass in step with q.
  __device__ __forceinline__ Ring<kTileSlots> tile_ring() const {
    return Ring<kTileSlots>(shared.tile_ring, q_ring.count);
  }
  __device__ __forceinline__ const QueryTile& tile() const { return shared.tile[tile_ring().slot()]; }

  // K of the block that lies `ahead` of the one that v_ring is at: scores run up to one block ahead of values.
  __device__ __forceinline__ Ring<C::kStages> k_ring(uint32_t ahead) const {
    return Ring<C::kStages>(shared.k_ring, v_ring.count + ahead);
  }

  // One arrival per warp. A warp's products are done when its wait returns.
  __device__ __forceinline__ void leave(uint32_t barrier) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
  }

  __device__ __forceinline__ void wait_turn() const {
    if constexpr (C::kConsumers > 1) named_barrier_sync(kTurn + warpgroup, 256);
  }
  __device__ __forceinline__ void pass_turn() const {
    if constexpr (C::kConsumers > 1) named_barrier_arrive(kTurn + (warpgroup + 1) % C::kConsumers, 256);
  }

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      own[h] = shared.own[q_ring.slot()][row + 8 * h] * kLog2e;
      m[h] = first_maximum(own[h]);
      sum[h] = 0.0f;
      visible[h] = tile().visible.end(row + 8 * h);
    }
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o[i] = 0.0f;
  }

  // S = Q K^T of the block in a slot of k; in flight until a wait.
  __device__ __forceinline__ void issue_scores(uint32_t slot) {
    const uint64_t q_tile = descriptor_add(q_first, q_ring.slot() * kQBytes);
    const uint64_t k_tile = descriptor_add(k_first, slot * kBytes);
    wgmma_ss<T, C::kKeys, false>(s, q_tile, k_tile);
#pragma unroll
    for (int step = 1; step < C::kDim / 16; ++step) {
      wgmma_ss<T, C::kKeys, true>(s, descriptor_add(q_tile, step / 4 * kQPanel + step % 4 * 32),
                                  descriptor_add(k_tile, step / 4 * kPanel + step % 4 * 32));
    }
    wgmma_commit();
  }

  // O += P V of the block that v_ring is at; in flight until a wait.
  __device__ __forceinline__ void issue_values() {
    const uint64_t v_tile = descriptor_add(v_first, v_ring.slot() * kBytes);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) wgmma_rs<T, C::kDim>(o, p[step], descriptor_add(v_tile, step * 2048));
    wgmma_commit();
  }

  // Scores into weights relative to 2^m, and m raised where it has to be.
  template <bool MASK>
  __device__ __forceinline__ void softmax() {
    Tiles<kScores>& tiles = tiles_of(s);
    constexpr int kTiles = kScores / 4;
    if constexpr (MASK) {
#pragma unroll
      for (int h = 0; h < 2; ++h) mask_row(tiles, h, visible[h], -INFINITY);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top0 = tiles[0][2 * h], top1 = tiles[0][2 * h + 1];
#pragma unroll
      for (int i = 1; i < kTiles; ++i) {
        top0 = fmaxf(top0, tiles[i][2 * h]);
        top1 = fmaxf(top1, tiles[i][2 * h + 1]);
      }
      shrink[h] = raise_maximum(m[h], quad_maximum(fmaxf(top0, top1)) * a.scale_log2);
      sum[h] *= shrink[h];
    }
#pragma unroll
    for (int i = 0; i < kScores; ++i) s[i] = exp2_fast(fmaf(s[i], a.scale_log2, -m[i / 2 % 2]));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum0 = tiles[0][2 * h], sum1 = tiles[0][2 * h + 1];
#pragma unroll
      for (int i = 1; i < kTiles; ++i) {
        sum0 += tiles[i][2 * h];
        sum1 += tiles[i][2 * h + 1];
      }
      sum[h] += sum0 + sum1;
    }
  }

  __device__ __forceinline__ void round_weights() {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) p[i / 4][i % 4] = pack2<T>(s[2 * i], s[2 * i + 1]);
  }

  // Values of the block from row `from` on, which no query sees, become zeros. Every warpgroup clears for itself, so none waits
  // for another; zeros over zeros do no harm.
  __device__ __forceinline__ void clear_values(int from) const {
    const uint32_t v_tile = shared_address(shared.v) + v_ring.slot() * kBytes;
    for (int r = from + thread / 8; r < C::kKeys; r += 16) {
#pragma unroll
      for (int panel = 0; panel < C::kPanels; ++panel)
        clear_shared16(v_tile + panel * kPanel + r * 128 + thread % 8 * 16);
    }
    fence_proxy_async();  // ordinary stores, read by wgmma
    named_barrier_sync(kValuesCleared + warpgroup, 128);
  }

  // The last block that the tile sees into; `block` is its number.
  __device__ __forceinline__ void first_block(int block) {
#pragma unroll
    for (int h = 0; h < 2; ++h) visible[h] -= block * C::kKeys + 2 * quad;
    const Ring<C::kStages> k = k_ring(0);
    k.wait_full();
    hold_registers(s);
    wgmma_fence();
    issue_scores(k.slot());
    const int valid = tile().keys - block * C::kKeys;
    if (valid < C::kKeys) {
      v_ring.wait_full();
      clear_values(valid);
    }
    wgmma_wait<0>();
    hold_registers(s);
    leave(k.empty());
    softmax<true>();
    round_weights();
  }

  // S of this block and P V of the one before are in flight together; the softmax waits for the first alone.
  template <bool MASK>
  __device__ __forceinline__ void next_block() {
    const Ring<C::kStages> k = k_ring(1);
    k.wait_full();
    wait_turn();
    hold_registers(s);
    hold_registers(o);
    hold_registers(p);
    wgmma_fence();
    issue_scores(k.slot());
    v_ring.wait_full();
    wgmma_fence();
    issue_values();
    pass_turn();
    wgmma_wait<1>();
    hold_registers(s);
    leave(k.empty());
#pragma unroll
    for (int h = 0; h < 2; ++h) visible[h] += C::kKeys;
    softmax<MASK>();
    wgmma_wait<0>();
    hold_registers(o);
    hold_registers(p);
    leave(v_ring.empty());
    if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) o[i] *= shrink[i / 2 % 2];
    }
    round_weights();
    v_ring.next();
  }

  // Where this thread's part of the tile lies: 8 columns in every 32 of both its rows. Made at the end of a tile, rather than
  // kept in registers through its loop.
  struct Place {
    T* y;
    const T* out_gate;  // read only where it is given
    float* lse;
    int rows, columns;  // that exist, from this thread's first on
    __device__ __forceinline__ bool has(int h) const { return 8 * h < rows; }
    __device__ __forceinline__ bool has(int h, int g) const { return has(h) && 32 * g < columns; }
  };
  __device__ __forceinline__ Place place() const {
    const QueryTile& t = tile();
    const int64_t token = t.token + row;
    return {static_cast<T*>(a.y.ptr) + t.batch * a.y.batch + token * a.y.token + t.head * a.y.head + 8 * quad,
            static_cast<const T*>(a.out_gate.ptr) + t.batch * a.out_gate.batch + token * a.out_gate.token +
                t.head * a.out_gate.head + 8 * quad,
            a.lse + (t.batch * a.size.heads + t.head) * a.size.tokens + token, t.rows - row,
            static_cast<int>(a.size.head_dim) - 8 * quad};
  }

  // v~ and out_gate of row h, where they may be read in 16-byte pieces; epilogue() reads them otherwise.
  __device__ __forceinline__ void fetch_operands(const Place& at, int h) {
    constexpr uint32_t kOpen = std::is_same_v<T, bf16> ? 0x7f807f80u : 0x7c007c00u;  // +inf twice: a gate of exactly 1
    const bool vector = a.size.aligned16;
    const bool gated = a.out_gate.ptr != nullptr;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      values[h][g] = Bytes16{{0, 0, 0, 0}};
      gates[h][g] = Bytes16{{kOpen, kOpen, kOpen, kOpen}};
      if (vector && at.has(h, g)) {
        values[h][g] = *reinterpret_cast<const Bytes16*>(at.y + 8 * h * a.y.token + 32 * g);
      }
      if (vector && gated && at.has(h, g)) {
        gates[h][g] = *reinterpret_cast<const Bytes16*>(at.out_gate + 8 * h * a.out_gate.token + 32 * g);
      }
    }
  }
  // Of both rows before the last product ends, where registers allow.
  __device__ __forceinline__ void fetch_early(const Place& at) {
    fetch_operands(at, 0);
    if constexpr (C::kFetchBoth) fetch_operands(at, 1);
  }

  __device__ __forceinline__ void last_values(const Place& at) {
    hold_registers(o);
    hold_registers(p);
    wgmma_fence();
    issue_values();
    fetch_early(at);
    wgmma_wait<0>();
    hold_registers(o);
    hold_registers(p);
    leave(v_ring.empty());
    v_ring.next();
  }

  // Of the warp's queries. A sum is NaN where a value that its query does not see is not finite, for 0 times it is NaN.
  __device__ __forceinline__ bool all_finite(const Place& at) const {
    float zeros[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // of both rows, columns in turn
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) zeros[i % 4] = fmaf(o[i], 0.0f, zeros[i % 4]);
    bool finite = true;
#pragma unroll
    for (int h = 0; h < 2; ++h) finite &= !at.has(h) || zeros[2 * h] + zeros[2 * h + 1] == 0.0f;
    return __all_sync(0xffffffffu, finite);
  }

  // In place of both steps of the epilogue: the warp's queries one by one. Its loops are the same for all lanes, and the compiler has
  // to see that: or it would keep what next_block() counts in ordinary registers, at 15 % more instructions.
  __device__ __forceinline__ void attend_one_by_one() const {
    const QueryTile& t = tile();
    const int head_dim = static_cast<int>(a.size.head_dim);
    const int first = warpgroup * 64 + warp_uniform(thread / 32) * 16;
    const int end = warp_uniform(min(first + 16, t.rows));
#pragma unroll 1
    for (int r = first; r < end; ++r) {
      const int64_t token = t.token + r, angle = static_cast<int64_t>(t.angles.of(r)) * (head_dim / 2);
      const auto row_of = [&](const Rows& rows, uint32_t head) {
        return static_cast<T*>(rows.ptr) + t.batch * rows.batch + token * rows.token + head * rows.head;
      };
      LoneQuery<T> query;
      query.q = row_of(a.q, static_cast<uint32_t>(t.head) / a.heads_per_group);
      query.cos = a.rotary.cos ? static_cast<const float*>(a.rotary.cos) + angle : nullptr;
      query.sin = static_cast<const float*>(a.rotary.sin) + angle;
      query.out_gate = a.out_gate.ptr ? row_of(a.out_gate, t.head) : nullptr;
      query.y = row_of(a.y, t.head);
      query.lse = a.lse + (t.batch * a.size.heads + t.head) * a.size.tokens + token;
      query.own = shared.own[q_ring.slot()][r] * kLog2e;
      query.scale_log2 = a.scale_log2;
      query.sign = a.q_sign;
      query.keys = warp_uniform(t.visible.end(r));
      query.head_dim = head_dim;
      attend_alone(query, static_cast<const T*>(a.chunks.k), static_cast<const T*>(a.chunks.v),
                   [&](int j) { return state_offset(a, t, j); });
    }
  }

  __device__ __forceinline__ void epilogue(const Place& at, int h) {
    const bool vector = a.size.aligned16;
    const bool gated = a.out_gate.ptr != nullptr;
    const float own_weight = exp2_fast(own[h] - m[h]);
    const float total = quad_sum(sum[h]) + own_weight;
    const float inverse = reciprocal_fast(total);
    if (at.has(h) && quad == 0) at.lse[8 * h] = (m[h] + __log2f(total)) * kLn2;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      float out[8];
      gather_quad(out, tiles_of(o), 4 * g, h, lane);
      alignas(16) T value[8], gate[8];
      *reinterpret_cast<Bytes16*>(value) = values[h][g];
      *reinterpret_cast<Bytes16*>(gate) = gates[h][g];
      T* y = at.y + 8 * h * a.y.token + 32 * g;
      const T* out_gate = at.out_gate + 8 * h * a.out_gate.token + 32 * g;
      if (!vector && at.has(h, g)) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          value[i] = y[i];
          if (gated) gate[i] = out_gate[i];
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        out[i] = (out[i] + own_weight * to_float(value[i])) * (inverse * sigmoid_fast(to_float(gate[i])));
      }
      if (at.has(h, g)) store8(y, out, vector);
    }
  }
};

template <class C>
__device__ __forceinline__ void consume(const Arguments& a, Shared<C>& shared, int warpgroup) {
  Consumer<C> c(a, shared, warpgroup);
  if (warpgroup == C::kConsumers - 1) c.pass_turn();  // the first turn is warpgroup 0's

  for (;; c.q_ring.next()) {
    c.q_ring.wait_full();  // and the tile's description, which the loaders waited for
    if (c.tile().rows == 0) break;
    c.begin();
    const int blocks = (c.tile().keys + C::kKeys - 1) / C::kKeys;
    if (blocks > 0) {
      const int clear = c.tile().visible.first_masked_block(C::kKeys);
      int block = blocks - 1;
      c.first_block(block);
      --block;
#pragma unroll 1
      for (; block >= clear; --block) c.template next_block<true>();
#pragma unroll 1
      for (; block >= 0; --block) c.template next_block<false>();
      c.v_ring.wait_full();
    }
    const auto at = c.place();
    if (c.tile().keys > 0) {
      c.last_values(at);
    } else {
      c.fetch_early(at);
    }
    if (c.all_finite(at)) {
      c.epilogue(at, 0);
      if constexpr (!C::kFetchBoth) c.fetch_operands(at, 1);
      c.epilogue(at, 1);
    } else {
      c.attend_one_by_one();
    }
    c.leave(c.q_ring.empty());
    c.leave(c.tile_ring().empty());
  }
  if (warpgroup == 0) c.wait_turn();  // the last turn that was passed on
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    chunk_attention_fwd_sm90_kernel(const __grid_constant__ Arguments a, const __grid_constant__ CUtensorMap k_map,
                                    const __grid_constant__ CUtensorMap v_map) {
#ifdef RAT_HOPPER_CODE
  if ((a.schedule.from > 0 || a.schedule.to < Schedule::kAllPositions) && !any_query(a)) return;
  extern __shared__ uint8_t raw_shared[];
  Shared<C>& shared = *reinterpret_cast<Shared<C>*>(
      raw_shared + (1024 - static_cast<uint32_t>(__cvta_generic_to_shared(raw_shared)) % 1024) % 1024);
  const int warpgroup = warp_uniform(static_cast<int>(threadIdx.x) / 128);
  if (threadIdx.x == 0) {
    constexpr uint32_t kConsumerWarps = 4 * C::kConsumers;
    shared.tile_ring.init(1, C::kLoaders + kConsumerWarps);
    shared.q_ring.init(C::kLoaders, kConsumerWarps);
    shared.k_ring.init(1, kConsumerWarps);
    shared.v_ring.init(1, kConsumerWarps);
    mbarrier_init_fence();
  }
  __syncthreads();  // everyone sees the barriers
  if (warpgroup == 0) {
    if constexpr (C::kShareRegisters) give_registers<C::kProducerRegisters>();
    if (threadIdx.x >= 32) {
      feed_queries<C>(a, shared, threadIdx.x - 32);
    } else if (a.chunks.page_table != nullptr) {
      feed_blocks<C, true>(a, k_map, v_map, shared);
    } else if (threadIdx.x == 0) {
      feed_blocks<C, false>(a, k_map, v_map, shared);
    }
  } else {
    if constexpr (C::kShareRegisters) take_registers<C::kConsumerRegisters>();
    consume<C>(a, shared, warpgroup - 1);
  }
#endif
}

// ---- launcher ---------------------------------------------------------------------------------------------------------

// Queries of many keys want large blocks; those of few are bound by the work around each tile, which more warpgroups hide, and by
// keys that a block holds beyond those visible. Where a call has few queries, small tiles fill the chip.
template <class T, int CONSUMERS>
using Wide = Traits<T, 128, CONSUMERS, 128>;
template <class T, int CONSUMERS>
using WideShort = Traits<T, 128, CONSUMERS, 64>;
template <class T, int CONSUMERS>
using Narrow = Traits<T, 64, CONSUMERS, 112>;
template <class T, int CONSUMERS>
using NarrowShort = Traits<T, 64, CONSUMERS, 64>;
constexpr int64_t kShortKeys = 4096;        // that a query sees, of 128 elements
constexpr int64_t kShortNarrowKeys = 1024;  // of 64

float scale_log2(const AttentionFwdParams& params) {
  return mask_safe(static_cast<float>(std::fabs(params.scale) * 1.4426950408889634));
}

// Chunk states as boxes. Where there is room for none, a map that is never read: of memory that is there.
template <class C>
CUtensorMap state_map(const AttentionFwdParams& params, const void* states, const void* any) {
  const Sizes& s = params.size;
  const ChunkStates& c = params.chunks;
  const CUtensorMapDataType type =
      std::is_same_v<typename C::T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const int64_t outer = c.compact ? s.heads : (c.entry ? c.blocks : s.sequences) * s.heads;
  const int64_t rows = rows_of_a_block(c);
  if (c.rows * outer == 0) return swizzled_rows_map(any, type, s.head_dim, 1, 1, C::kKeys);
  return swizzled_rows_map(states, type, s.head_dim, rows, outer,
                           box_rows<C>(c.page_table ? static_cast<int>(rows) : 0));
}

// Queries of positions [from, to).
template <class C>
void launch(const AttentionFwdParams& params, const FwdScratch& scratch, int64_t from, int64_t to,
            cudaStream_t stream) {
  const Sizes& s = params.size;
  Arguments a;
  a.size = s;
  a.q = params.q;
  a.out_gate = params.out_gate;
  a.y = params.y;
  a.rotary = params.rotary;
  a.chunks = params.chunks;
  a.s_self = scratch.s_self;
  a.lse = static_cast<float*>(params.lse);
  a.scale_log2 = scale_log2(params);
  a.q_sign = params.scale < 0 ? -1.0f : 1.0f;
  a.heads_per_group = static_cast<uint32_t>(s.heads / s.q_groups);

  const int64_t tokens = s.lengths ? s.tokens : std::max<int64_t>(0, std::min(s.tokens, to) - from);
  const int64_t per_row = ceil_div(tokens, C::kRows);
  const int64_t total = (s.cu_seqlens ? work_items(s, C::kRows) : s.sequences * per_row) * s.heads;
  if (total == 0) return;
  constexpr int64_t kL2Budget = 10 << 20;  // bytes of keys and values that live in L2 beside what streams through
  const int64_t pairs = s.sequences * s.heads, pair_bytes = 4 * std::max<int64_t>(1, params.chunks.rows) * s.head_dim;
  const int64_t section = std::min(pairs, std::max<int64_t>(1, ceil_div(kL2Budget, pair_bytes)));
  a.schedule.total = static_cast<uint32_t>(total);
  a.schedule.per_row = static_cast<uint32_t>(per_row);
  a.schedule.pairs = static_cast<uint32_t>(pairs);
  a.schedule.section = static_cast<uint32_t>(section);
  a.schedule.from = static_cast<uint32_t>(from);
  a.schedule.to = static_cast<uint32_t>(to);

  const CUtensorMap k_map = state_map<C>(params, params.chunks.k, scratch.s_self);
  const CUtensorMap v_map = state_map<C>(params, params.chunks.v, scratch.s_self);

  constexpr int kBytes = shared_bytes<C>();
  static_assert(kBytes * C::kBlocks <= (228 - C::kBlocks) * 1024);
  const char* name = "chunk_attention_fwd_sm90";
  allow_shared_memory(chunk_attention_fwd_sm90_kernel<C>, kBytes, name);
  const int64_t blocks =
      std::min<int64_t>(total, device_attribute<cudaDevAttrMultiProcessorCount>() * int64_t{C::kBlocks});
  chunk_attention_fwd_sm90_kernel<C><<<grid_x(blocks, name), C::kThreads, kBytes, stream>>>(a, k_map, v_map);
  check_launch(name);
}

// Tiles of one warpgroup, where full ones would leave half of the chip idle or be mostly empty.
template <class C>
void launch_full_or_small(const AttentionFwdParams& params, const FwdScratch& scratch, int64_t from, int64_t to,
                          cudaStream_t stream) {
  using Small = Traits<typename C::T, C::kDim, 1, C::kKeys>;
  const Sizes& s = params.size;
  const int64_t tiles = (s.cu_seqlens ? s.tokens / C::kRows + s.sequences : s.sequences * ceil_div(s.tokens, C::kRows));
  const bool empty = s.batch * s.tokens <= s.sequences * Small::kRows;
  const bool idle = 2 * tiles * s.heads <= device_attribute<cudaDevAttrMultiProcessorCount>();
  empty || idle ? launch<Small>(params, scratch, from, to, stream) : launch<C>(params, scratch, from, to, stream);
}

template <class Short, class Long>
void launch_by_keys(const AttentionFwdParams& params, const FwdScratch& scratch, int64_t short_keys,
                    cudaStream_t stream) {
  // No query sees more keys than there is room for.
  const int64_t all = Schedule::kAllPositions, every = params.size.key_every;
  const bool both = params.chunks.rows > short_keys && every < all / short_keys;
  const int64_t split = both ? std::min(all, (short_keys + 1) * every) : all;
  launch_full_or_small<Short>(params, scratch, 0, split, stream);
  if (split < all) launch_full_or_small<Long>(params, scratch, split, all, stream);
}

template <class T>
void launch_for(const AttentionFwdParams& params, const FwdScratch& scratch, cudaStream_t stream) {
  if (params.size.head_dim > 64) {
    launch_by_keys<WideShort<T, 3>, Wide<T, 2>>(params, scratch, kShortKeys, stream);
  } else {
    launch_by_keys<NarrowShort<T, 3>, Narrow<T, 3>>(params, scratch, kShortNarrowKeys, stream);
  }
}

}  // namespace

namespace sm90 {

const char* fwd_refuses(const AttentionFwdParams& params) {
  const Sizes& s = params.size;
  constexpr int64_t kMany = INT64_C(1) << 30;  // tile and row indices are 32-bit
  if (s.dtype != DType::bf16 && s.dtype != DType::f16) return "the dtype is not bfloat16 or float16";
  if (s.head_dim > 128) return "D is over 128";
  if (!std::isfinite(scale_log2(params))) return "the scale is not finite in float32";
  // Nothing here may depend on how many states or queries there are: a token has the same bits in any call.
  if (params.chunks.rows > 0) {
    if (const char* reason = no_state_map(s, params.chunks)) return reason;
  }
  if (!s.aligned16) return "rows are not 16-byte aligned";
  if (!is_aligned16(params.rotary.cos) || !is_aligned16(params.rotary.sin))
    return "rotary tables are not 16-byte aligned";
  if (s.tokens > kMany || std::max(s.sequences, params.chunks.blocks) * s.heads > kMany ||
      work_items(s, 64) > kMany / s.heads) {
    return "the call is too large for 32-bit indices";
  }
  return no_hopper();
}

Launch fwd(const AttentionFwdParams& params, const FwdScratch& scratch, Arena&) {
  return [&params, scratch](cudaStream_t stream) {
    if (params.size.sequences == 0) return;
    if (params.size.dtype == DType::bf16) {
      launch_for<bf16>(params, scratch, stream);
    } else {
      launch_for<f16>(params, scratch, stream);
    }
  };
}

}  // namespace sm90

namespace {
template <class C>
KernelEntry entry(const char* name) {
  return {name, reinterpret_cast<const void*>(&chunk_attention_fwd_sm90_kernel<C>)};
}
}  // namespace

KernelList chunk_attention_fwd_sm90_kernels() {
  static const KernelEntry entries[] = {
      entry<Wide<bf16, 2>>("chunk_attention_fwd_sm90<bf16, 128>"),
      entry<Wide<bf16, 1>>("chunk_attention_fwd_sm90<bf16, 128, small>"),
      entry<Wide<f16, 2>>("chunk_attention_fwd_sm90<f16, 128>"),
      entry<Wide<f16, 1>>("chunk_attention_fwd_sm90<f16, 128, small>"),
      entry<WideShort<bf16, 3>>("chunk_attention_fwd_sm90<bf16, 128, short>"),
      entry<WideShort<bf16, 1>>("chunk_attention_fwd_sm90<bf16, 128, short, small>"),
      entry<WideShort<f16, 3>>("chunk_attention_fwd_sm90<f16, 128, short>"),
      entry<WideShort<f16, 1>>("chunk_attention_fwd_sm90<f16, 128, short, small>"),
      entry<Narrow<bf16, 3>>("chunk_attention_fwd_sm90<bf16, 64>"),
      entry<Narrow<bf16, 1>>("chunk_attention_fwd_sm90<bf16, 64, small>"),
      entry<Narrow<f16, 3>>("chunk_attention_fwd_sm90<f16, 64>"),
      entry<Narrow<f16, 1>>("chunk_attention_fwd_sm90<f16, 64, small>"),
      entry<NarrowShort<bf16, 3>>("chunk_attention_fwd_sm90<bf16, 64, short>"),
      entry<NarrowShort<bf16, 1>>("chunk_attention_fwd_sm90<bf16, 64, short, small>"),
      entry<NarrowShort<f16, 3>>("chunk_attention_fwd_sm90<f16, 64, short>"),
      entry<NarrowShort<f16, 1>>("chunk_attention_fwd_sm90<f16, 64, short, small>"),
  };
  return {entries, static_cast<int>(sizeof(entries) / sizeof(entries[0]))};
}

}  // namespace rat::cuda
