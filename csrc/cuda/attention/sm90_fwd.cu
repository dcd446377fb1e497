// Forward phase 2 on Hopper (sm_90a): softmax of every query over the states of earlier chunks and its own state.
//
// Reads per token and head, in elements of T: v~ (from y) and out_gate, D each; q, D per group and unit; s_self, 4 bytes. Writes y
// over v~, D, and lse, 4 bytes. Keys and values are re-read from L2 once for each query tile. 4 D FLOP per query and visible key.
//
// A persistent grid, one or two blocks per multiprocessor. A tile is kRows queries of one head; it walks blocks of kKeys chunk
// states from the last visible one to the first, so that only its first blocks need a mask. Where a call has many tiles, a block
// takes the same queries of up to four heads of a group one after the other, a unit: q is loaded and rotated once for them.
//   warp 0           one thread decides which tile is next, tells the others, and feeds its K and V blocks through the copy
//                    engine into two rings.
//   warps 1 ... 3    loaders, one each, or all, for a warpgroup of consumers and its 64 queries: q, rotated by chunk index, as
//                    wgmma reads it; s_self; v~ and out_gate as soon as those of the tile before have been used.
//   warpgroup 1 ...  consumers: 64 queries each. S = Q K^T of a block is issued before P V of the block before, whose product runs
//                    while the softmax takes the exponentials of S. A turn that named barriers pass on lets one warpgroup's
//                    products run under another one's softmax. Half of the gates are taken while the last product runs.
// Where a call has no more tiles of 64 queries than there are multiprocessors, roles are split, since a lone warpgroup leaves the
// tensor cores idle through its softmax: warpgroup 1 takes P V and the epilogue alone, and
//   warpgroups 2, 3  scorers: S = Q K^T, softmax and rounded weights of every other block. Only the maximum goes from one to the other,
//                    so that the exponentials of a block run under the products of its neighbours. Each row sees the same arithmetic.
// The running softmax is that of softmax.cuh: it starts from the self term s_self, and exp(s_self - m) v~ joins at the end.
//
// Shared memory: q, K and V rings (kStages blocks each), v~ and out_gate, descriptions of tiles, barriers. Every tile lies in panels
// of 64 columns, 128 bytes per row, 16-byte pieces swizzled: the layout that the copy engine writes and wgmma reads. ldmatrix
// gives v~ and out_gate in the layout of the products; stmatrix puts y where v~ was, from where it leaves in whole rows.
//
// Rings (mbarrier.cuh), who fills and who leaves a slot:
//   tiles      warp 0 fills, one arrival;               each loader thread and each consumer warp leaves
//   start      (no ring) each loader thread arrives when s_self of a tile, and q where it changes, are there
//   q_left     (no ring) each consumer warp arrives when its last product has read q of a unit; each warp of a scorer when it has q
//   operands   each loader thread's copies fill;        each consumer warp leaves, after its epilogue
//   k, v       the copy engine's bytes fill;            each warp whose products read the block leaves, when they have
//   weights    (split) each warp of a scorer fills;     each consumer warp leaves, when its products have read them
//   scored     (split, no ring) each warp of a scorer arrives when the largest scores of a block are there
// s_self has two slots and needs no leaving: a loader is at most one tile ahead, since it has waited for the operands' place.
//
// Rows of the last block behind the sequence's chunk states may hold anything, NaN too. Their scores are masked; their values
// are set to zero in shared memory before the product, since 0 NaN is NaN. A value that some queries of the tile do not see makes NaN
// of their sums where it is not finite: a warp with such sums attends to its queries one by one (alone.cuh).
//
// What a query becomes depends on itself and the keys that it sees alone, bit for bit: not on its tile, the call, or the room that
// there is for states. kKeys is part of the arithmetic (blocks start at multiples of it), so up to 128 elements the number of keys
// that a query sees decides it, and a call with queries of both kinds is two launches. kConsumers and kSplit are not: they follow
// the call.
#include <cuda.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <type_traits>

#include "../device/rows.cuh"
#include "../device/sequence.cuh"
#include "../host/launch.h"
#include "../ptx/cp_async.cuh"
#include "../ptx/depend.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/mma.cuh"
#include "../ptx/opaque.cuh"
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

template <class T_, int DIM, int CONSUMERS, int KEYS, bool SPLIT = false>
struct Traits {
  using T = T_;
  static constexpr int kDim = DIM;  // head size, padded
  static constexpr int kPanels = DIM / 64;
  static constexpr int kConsumers = CONSUMERS;  // warpgroups
  static constexpr int kRows = 64 * CONSUMERS;  // queries per tile
  static constexpr int kKeys = KEYS;            // chunk states per block
  static constexpr bool kSplit = SPLIT;
  static constexpr int kScorers = SPLIT ? 2 : 0;                               // warpgroups
  static constexpr int kStages = SPLIT && KEYS <= 64 ? 4 : DIM == 64 ? 3 : 2;  // of the ring of values
  static constexpr int kKeyStages = SPLIT && KEYS <= 64 ? 4 : DIM == 64 || CONSUMERS == 3 ? 3 : 2;
  static constexpr int kUnitLog2 = KEYS <= 64 ? 2 : 0;  // heads of a unit, at most: long tiles hide how q comes
  static constexpr int kWarpgroups = 1 + CONSUMERS + kScorers;
  static constexpr int kThreads = 128 * kWarpgroups;
  static constexpr int kLoaders = 3 / CONSUMERS * 32;  // threads that serve one warpgroup
  static constexpr int kBlocks = CONSUMERS == 1 && !SPLIT && KEYS + DIM < 256 ? 2 : 1;  // per multiprocessor
  // Registers per thread: the roles share what the block was launched with, a multiple of 8 for each.
  static constexpr int kLaunchRegisters = 65536 / (kThreads * kBlocks) / 8 * 8;
  static constexpr int kProducerRegisters = KEYS + DIM > 128 ? 56 : 80;
  static constexpr int kScorerRegisters = SPLIT ? 144 : 0;
  static constexpr int kConsumerRegisters = std::min(
      240, (kLaunchRegisters * kWarpgroups - kProducerRegisters - kScorers * kScorerRegisters) / CONSUMERS / 8 * 8);
  static constexpr bool kShareRegisters = kLaunchRegisters < kConsumerRegisters;
  static_assert(DIM % 64 == 0 && KEYS % 16 == 0 && KEYS <= 256 && kConsumerRegisters <= 240);
  static_assert(!SPLIT || CONSUMERS == 1);
};

// What a tile of queries is. Made by the thread that feeds K and V, read by everyone.
struct QueryTile {
  int64_t token;  // of row 0, in the row of the token tensors
  int64_t batch;
  int32_t head;
  int32_t rows;     // queries; 0: no more tiles
  int32_t keys;     // chunk states that its last query sees
  int32_t closed;   // chunk states of the sequence, seen or not: rows that hold something
  int32_t key_row;  // of its first chunk state in the tensor map; in pages, 0
  int32_t key_outer;
  bool first, last;      // of the unit of heads that share q
  const int32_t* pages;  // of the sequence, or null
  VisibleKeys visible;
  RowAngles angles;
};

// x / every is x times this >> 16 for all x below 256: what it is too large by, less than every / 65536, times x is below 1 / every
// where every is up to 256; where it is more, x times this is below 65536.
inline uint32_t inverse_of(int64_t every) {
  const uint32_t least = static_cast<uint32_t>(std::min<int64_t>(every, 65535));
  return (65535 + least) / least;
}

// Tiles are described before the one before is fed, while the consumers may be two further behind.
constexpr int kTileSlots = 4;

// What the loaders of a warpgroup hand to it.
struct RowBarriers {
  alignas(8) uint64_t start[2];  // s_self of a tile is there, and q where it is another one: each loader arrives
  uint64_t q_left;               // its products have read q of a unit: each of its warps arrives
  RingBarriers<1> operands;      // v~ and out_gate: each loader's copies fill, each of its warps leaves
};

// What scorers hand to the consumer, and to each other. Slots alternate as scorers do.
template <class C>
struct Handover {
  static constexpr uint32_t kPanel = 64 * 128;                           // of 64 columns of weights, in bytes
  alignas(1024) typename C::T weight[2][(C::kKeys + 63) / 64][64 * 64];  // of a block, rounded, as wgmma reads them
  float4 sum_and_shrink[2][128];  // by thread, of its two rows: sums of the block's weights; what sums so far shrink by
  float2 maximum[2][128];         // by thread, of its two rows: what the weights are relative to
  float top[2][64];               // largest score of a row in the block, in powers of two
  uint64_t scored[2];             // top is there: each warp of a scorer arrives
  RingBarriers<2> weights;        // all the rest: each warp of a scorer fills, each consumer warp leaves
};
struct NoHandover {};

template <class C>
struct Shared {
  using T = typename C::T;
  alignas(1024) T q[C::kPanels][C::kRows * 64];
  alignas(1024) T k[C::kKeyStages][C::kPanels][C::kKeys * 64];
  alignas(1024) T v[C::kStages][C::kPanels][C::kKeys * 64];
  alignas(1024) T value[C::kConsumers][C::kPanels][64 * 64];  // v~ of a warpgroup's queries, then y
  alignas(1024) T gate[C::kConsumers][C::kPanels][64 * 64];   // out_gate
  float own[2][C::kRows];                                     // s_self
  QueryTile tile[kTileSlots];
  RingBarriers<kTileSlots> tile_ring;
  RingBarriers<C::kKeyStages> k_ring;
  RingBarriers<C::kStages> v_ring;
  RowBarriers rows[C::kConsumers];
  std::conditional_t<C::kSplit, Handover<C>, NoHandover> handover;
};

// Hardware barriers of the block; 0 is that of __syncthreads().
enum NamedBarrier {
  kTurn = 2,             // + warpgroup: its turn to issue products. It waits, the warpgroup before it arrives
  kValuesCleared = 8,    // + warpgroup: it alone, after it has set values to zero that are none
  kPaddingCleared = 11,  // + warpgroup: its loaders, once: padding columns are zeros
};

template <class C>
constexpr int shared_bytes() {
  return static_cast<int>(sizeof(Shared<C>));
}

// The order of tiles. Dense: (sequence, head) pairs run in sections whose keys and values fit in L2, late tiles, which see the
// most keys, first. Packed: the same from the last work item to the first.
struct Schedule {
  uint32_t total = 0;
  uint32_t per_row = 1;  // dense: tiles of a sequence
  uint32_t pairs = 1;
  uint32_t section = 1;
  uint32_t unit_log2 =
      0;  // consecutive tiles that differ in the head alone and share q: a block takes them one after the other
  uint32_t from = 0, to = kAllPositions;  // positions of the queries that this launch serves
  static constexpr uint32_t kAllPositions = INT32_MAX;
};

struct Arguments {
  Sizes size;
  Rows q, out_gate, y;
  bool narrow_gate;  // rows of out_gate are narrow (launchers.h)
  bool overlaps;     // blocks may begin before the kernels before this one are through
  Rotary rotary;
  ChunkStates chunks;
  const float* s_self;
  float* lse;
  float scale_log2;  // |scale| log2(e), above zero
  float q_sign;      // sign of the scale: q carries it
  Divisor heads_per_group, heads, pairs, key_every, rotate_every;
  uint32_t inverse_every;
  Schedule schedule;
};

// Index of this block's round-th unit: rounds alternate in direction, so that no block always gets the heaviest.
__device__ __forceinline__ uint32_t unit_index(uint32_t round) {
  return round * gridDim.x + (round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

// Where it may be read before wait_for_earlier_kernels(), from L2: this multiprocessor's L1 may still have what lay there before. Else
// through L1, where the search for a tile's sequence finds what the one before it read.
__device__ __forceinline__ uint32_t fresh(const Arguments& a, const int32_t* from) {
  return static_cast<uint32_t>(a.overlaps ? __ldcg(from) : *from);
}

// Queries of sequence n that the launch serves: positions [low, high).
struct Positions {
  uint32_t begin, start, stop;  // its first token, the position of that, and the one behind its last
  uint32_t low, high;
};
__device__ __forceinline__ Positions positions(const Arguments& a, uint32_t n) {
  const uint32_t begin = a.size.cu_seqlens ? fresh(a, a.size.cu_seqlens + n) : 0;
  const uint32_t end = a.size.cu_seqlens ? fresh(a, a.size.cu_seqlens + n + 1) : static_cast<uint32_t>(a.size.tokens);
  const uint32_t start = a.size.lengths ? fresh(a, a.size.lengths + n) : 0;
  const uint32_t stop = start + (end - begin);
  return {begin, start, stop, max(start, a.schedule.from), min(stop, a.schedule.to)};
}

// A few hundred instructions, which everyone waits for at the start of a block: 32-bit arithmetic, and few divisions.
template <int ROWS>
__device__ __forceinline__ void describe_tile(const Arguments& a, uint32_t index, QueryTile& tile) {
  const uint32_t heads = static_cast<uint32_t>(a.size.heads);
  uint32_t n, head, in_sequence;
  if (a.size.cu_seqlens) {  // as work_item() does
    const uint32_t from_last = a.heads.quotient(index);
    head = index - from_last * heads;
    const uint32_t item = a.heads.quotient(a.schedule.total) - 1 - from_last;
    const auto first = [&](uint32_t n) { return fresh(a, a.size.cu_seqlens + n) / ROWS + 2 * n; };
    n = last_sequence(a.size, item, first);
    in_sequence = item - first(n);
  } else {
    const Schedule& s = a.schedule;
    uint32_t pair, from_last;
    if (s.section == s.pairs) {
      from_last = a.pairs.quotient(index);
      pair = index - from_last * s.pairs;
    } else {
      const uint32_t first = index / (s.section * s.per_row) * s.section;
      const uint32_t width = min(s.section, s.pairs - first), inside = index - first * s.per_row;
      from_last = inside / width;
      pair = first + (inside - from_last * width);
    }
    n = a.heads.quotient(pair);
    head = pair - n * heads;
    in_sequence = s.per_row - 1 - from_last;
  }
  const Positions served = positions(a, n);
  const uint32_t position = served.low + in_sequence * ROWS;
  const int32_t owner = static_cast<int32_t>(a.chunks.entry ? fresh(a, a.chunks.entry + n) : n);
  tile.token = served.begin + (position - served.start);
  tile.batch = a.size.cu_seqlens ? 0 : n;
  tile.head = static_cast<int>(head);
  const int rows = position < served.high && owner >= 0
                       ? static_cast<int>(min(static_cast<uint32_t>(ROWS), served.high - position))
                       : 0;
  tile.rows = rows;
  tile.visible = RowSteps(position, static_cast<uint32_t>(a.size.key_every), a.key_every);
  tile.angles = RowSteps(position, static_cast<uint32_t>(a.size.rotate_every), a.rotate_every);
  tile.keys = rows > 0 ? tile.visible.to_any(rows) : 0;
  tile.closed = static_cast<int>(a.key_every.quotient(served.stop));
  tile.key_row = a.chunks.compact ? static_cast<int>(a.key_every.quotient(served.begin) + n) : 0;
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

// Where a launch serves a part of the positions: is there a query? What it loads, tiles are described from.
__device__ __forceinline__ bool any_query(const Arguments& a) {
  bool any = false;
  for (uint32_t n = threadIdx.x; n < static_cast<uint32_t>(a.size.sequences); n += blockDim.x) {
    const Positions served = positions(a, n);
    any |= served.low < served.high && (!a.chunks.entry || static_cast<int32_t>(fresh(a, a.chunks.entry + n)) >= 0);
  }
  return __syncthreads_or(any);
}

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
  const int lane = threadIdx.x;
  const auto load = [&](const CUtensorMap& map, uint32_t blocks, auto& ring, const QueryTile& tile, int row) {
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
      const uint32_t log2 = a.schedule.unit_log2, unit_tiles = 1u << log2, units = a.schedule.total >> log2;
      tile.rows = 0;  // unless there is one more
      while ((round >> log2) * gridDim.x < units && tile.rows == 0) {
        const uint32_t unit = unit_index(round >> log2), inside = round & (unit_tiles - 1);
        if (unit < units) describe_tile<C::kRows>(a, (unit << log2) + inside, tile);
        tile.first = inside == 0;
        tile.last = inside == unit_tiles - 1;
        round = tile.rows > 0 ? round + 1 : (round | (unit_tiles - 1)) + 1;  // heads of a unit have the same rows
      }
      mbarrier_arrive(described.full());
    }
    if constexpr (PAGED) __syncwarp();  // the other lanes read the description
    described.next();
  };
  Ring<C::kKeyStages> k_ring(shared.k_ring);
  Ring<C::kStages> v_ring(shared.v_ring);
#pragma unroll 1
  for (uint32_t tiles = 0;; ++tiles) {
    const QueryTile& tile = shared.tile[(tiles - 1) % kTileSlots];
    if (tiles > 0 && tile.rows == 0) break;
    describe();
    if (tiles == 0) {  // the loaders work one tile ahead
      wait_for_earlier_kernels();
      continue;
    }
    const int blocks = (tile.keys + C::kKeys - 1) / C::kKeys;
    if (blocks == 0) continue;
    // In the order in which the consumers need them: K runs one block ahead of V.
    int row = tile.key_row + (blocks - 1) * C::kKeys;
#pragma unroll 1
    for (int block = 0; block <= blocks; ++block, row -= C::kKeys) {
      if (block < blocks) load(k_map, k_blocks, k_ring, tile, row);
      if (block > 0) load(v_map, v_blocks, v_ring, tile, row + C::kKeys);
    }
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
  static constexpr int kRun = (64 * kPieces + C::kLoaders - 1) / C::kLoaders;
  static_assert(C::kLoaders % kPieces == 0);
  uint32_t target;
  int base;                    // the warpgroup's first row in the tile
  int half, column, row, end;  // rows [row, end) of the warpgroup, those past the tile's last token included

  __device__ __forceinline__ QueryPieces(const Arguments& a, uint32_t tile, int first_row, int thread) {
    target = tile;
    base = first_row;
    half = static_cast<int>(a.size.head_dim) / 2;
    column = thread % kPieces * COLUMNS;
    row = thread / kPieces * kRun;
    end = column < half ? min(row + kRun, 64) : row;
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

  // Rows past the last token become zeros. `q` is the row of the tile's first query, `rows` what the warpgroup has.
  __device__ __forceinline__ void load(const T* q, int64_t token_stride, int rows) const {
    const T* from = q + (base + row) * token_stride + column;
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
    const int last = min(end, tile.rows - base);
    const uint32_t in_tile = base + row;
    float c[COLUMNS], s[COLUMNS];
    uint32_t index = tile.angles.first, left = to_next - in_tile;
    if (in_tile >= to_next) {
      const uint32_t past = in_tile - to_next;
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

// The 128-byte lines of `rows` rows of a (B, T, H, D) tensor, on their way to L2.
template <class C>
__device__ __forceinline__ void prefetch_rows(const void* first, int64_t token_stride, int rows, int thread) {
  constexpr int kLines = C::kDim / 64;
  const char* base = static_cast<const char*>(first);
#pragma unroll 1
  for (int i = thread; i < rows * kLines; i += C::kLoaders) {
    prefetch_l2(base + i / kLines * 2 * token_stride + i % kLines * 128);
  }
}

// 64 rows of a (B, T, H, D) tensor on their way to shared memory, from row `base` of a tile that begins at `tile`. `rows` exist from
// there on: those past the last token become zeros. Narrow rows (launchers.h) take the short loop: code here costs every call.
template <class C>
__device__ __forceinline__ void copy_rows(uint32_t to, const typename C::T* tile, int64_t token_stride, int base,
                                          int head_dim, int rows, int thread, bool narrow) {
  constexpr int kPieces = C::kDim / 8, kStep = C::kLoaders / kPieces;
  static_assert(C::kLoaders % kPieces == 0);
  const int column = thread % kPieces * 8;
  if (column >= head_dim) return;
  const typename C::T* source = tile + (base + thread / kPieces) * token_stride + column;
  if constexpr (8 % kStep == 0) {
    if (rows >= 64 && !narrow) {  // nothing to ask at each row, and addresses that constants fold into
      const uint32_t first = to + swizzled(64, thread / kPieces, column);
#pragma unroll
      for (int r = 0; r < 64; r += kStep, source += kStep * token_stride) {
        cp_async16((first ^ (r % 8 * 16)) + r * 128, source);
      }
      return;
    }
  }
#pragma unroll 1
  for (int r = thread / kPieces; r < 64; r += kStep, source += kStep * token_stride) {
    const uint32_t place = to + swizzled(64, r, column);
    const typename C::T* const from = r < rows ? source : tile;
    if (narrow) {
      cp_async8(place, from, r < rows);
      cp_async8(place + 8, from + 4, r < rows);
    } else {
      cp_async16(place, from, r < rows);
    }
  }
}

// Warps 1 ... 3, each or all for one warpgroup of consumers: s_self, and q where it is another one, of the next tile; v~ and
// out_gate of it as soon as those of the tile before have been used.
template <class C>
__device__ __forceinline__ void feed_queries(const Arguments& a, Shared<C>& shared, int warpgroup, int thread) {
  using T = typename C::T;
  constexpr uint32_t kPanel = C::kRows * 128, kOperandBytes = 64 * C::kDim * 2;
  RowBarriers& barriers = shared.rows[warpgroup];
  const int base = 64 * warpgroup, head_dim = static_cast<int>(a.size.head_dim);
  const uint32_t q_target = shared_address(shared.q) + base * 128;
  const uint32_t values = shared_address(shared.value[warpgroup]), gates = shared_address(shared.gate[warpgroup]);
  const bool gated = a.out_gate.ptr != nullptr;
  if (head_dim < C::kDim) {  // padding columns: zeros, once
    for (uint32_t i = thread; i < 64 * 8 * C::kPanels; i += C::kLoaders) {
      clear_shared16(q_target + i / 512 * kPanel + i % 512 * 16);
      clear_shared16(values + 16 * i);
      clear_shared16(gates + 16 * i);
    }
    named_barrier_sync(kPaddingCleared + warpgroup, C::kLoaders);
  }
  Ring<kTileSlots> tile_ring(shared.tile_ring);
  Ring<1> operands(barriers.operands);
  uint32_t units = 0;
#pragma unroll 1
  for (;; tile_ring.next(), operands.next()) {
    tile_ring.wait_full();
    const QueryTile& tile = shared.tile[tile_ring.slot()];
    if (tile.rows == 0) break;
    const int rows = tile.rows - base;
    const auto row_of = [&](const Rows& tensor, uint32_t head) {
      return static_cast<const T*>(tensor.ptr) + tile.batch * tensor.batch + tile.token * tensor.token +
             head * tensor.head;
    };
    const T* value = row_of(a.y, tile.head);
    const T* gate = row_of(a.out_gate, tile.head);
    const uint32_t slot = tile_ring.count % 2, start = shared_address(&barriers.start[slot]);
    // The warpgroup has left the tile before last: it has used that one's operands.
    const float* own = a.s_self + (tile.batch * a.size.heads + tile.head) * a.size.tokens + tile.token;
    const auto ask_own = [&] {
#pragma unroll 1
      for (int row = thread; row < 64; row += C::kLoaders) {
        cp_async4(shared_address(&shared.own[slot][base + row]), row < rows ? own + base + row : own, row < rows);
      }
    };
    const bool block_begins = tile_ring.count == 0;
    if (!block_begins) ask_own();
    if (tile.first) {
      const T* q = row_of(a.q, a.heads_per_group.quotient(static_cast<uint32_t>(tile.head)));
      if (units > 0) {  // the unit before may have q's place
        prefetch_rows<C>(q + base * a.q.token, a.q.token, min(rows, 64), thread);
        mbarrier_wait(shared_address(&barriers.q_left), (units & 1) ^ 1);
      }
      ++units;
      const auto feed = [&](const auto& pieces) {
        pieces.load(q, a.q.token, rows);
        cp_async_commit();
        pieces.rotate(a, tile);
      };
      if (head_dim % 16 == 0) {
        feed(QueryPieces<C, 8>(a, q_target, base, opaque(thread)));
      } else {
        feed(QueryPieces<C, 4>(a, q_target, base, opaque(thread)));
      }
      if (block_begins) {
        wait_for_earlier_kernels();
        ask_own();
        cp_async_commit();
        cp_async_wait<0>();
      }
      fence_proxy_async();  // q was written by ordinary stores and cp.async; wgmma reads it
      mbarrier_arrive(start);
    } else {
      cp_async_arrive(start);
    }
    operands.wait_empty();
    copy_rows<C>(values, value, a.y.token, base, head_dim, rows, thread, false);
    if (gated) copy_rows<C>(gates, gate, a.out_gate.token, base, head_dim, rows, thread, a.narrow_gate);
    cp_async_arrive(operands.full());
    mbarrier_arrive(tile_ring.empty());
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
//   last_values       P V of the last block
//   epilogue          v~ joins, from shared memory in the products' layout; y takes its place
//   store             y
// Split, a scorer goes from begin to score_block, once for each block of its own, and the consumer from begin to add_blocks, which is
// P V of all blocks but the last.
template <class C>
struct Consumer {
  using T = typename C::T;
  static constexpr int kScores = C::kKeys / 2;  // accumulators of S
  static constexpr int kSteps = C::kKeys / 16;  // of P V
  static constexpr int kOutputs = C::kDim / 2;  // accumulators of O
  static constexpr uint32_t kQPanel = C::kRows * 128;
  static constexpr uint32_t kBytes = C::kKeys * C::kDim * 2, kPanel = C::kKeys * 128;

  const Arguments& a;
  Shared<C>& shared;
  int warpgroup, thread, lane, quad;
  int row;                             // of the tile, and row + 8: this thread's
  uint64_t q_first, k_first, v_first;  // descriptors, of slot 0
  Ring<kTileSlots> tile_ring;
  Ring<C::kStages> v_ring;

  float s[kScores], o[kOutputs];
  uint32_t p[kSteps][4];             // rounded weights
  uint32_t q_rows[C::kDim / 16][4];  // a scorer's q
  // Steps of the epilogue whose gates are taken while the last product runs: half, as far as there are registers.
  static constexpr int kEarly = C::kDim <= 128 ? C::kDim / 32 : 4;
  float own_weight[2], total[2];          // of both rows, at the end
  float share[8 * kEarly];                // sigmoid(gate) / total
  float own[2], m[2], sum[2], shrink[2];  // of both rows, in powers of two; sums are this lane's share of the quad's
  int visible[2];                         // keys of the block that the row sees, less this thread's first column

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
        tile_ring(shared.tile_ring),
        v_ring(shared.v_ring) {}

  __device__ __forceinline__ const QueryTile& tile() const { return shared.tile[tile_ring.slot()]; }
  __device__ __forceinline__ RowBarriers& barriers() const { return shared.rows[warpgroup]; }
  __device__ __forceinline__ const float* own_scores() const { return shared.own[tile_ring.count % 2]; }
  __device__ __forceinline__ Ring<1> operands() const { return Ring<1>(barriers().operands, tile_ring.count); }

  // K of the block that lies `ahead` of the one that v_ring is at: scores run up to one block ahead of values.
  __device__ __forceinline__ Ring<C::kKeyStages> k_ring(uint32_t ahead) const {
    return Ring<C::kKeyStages>(shared.k_ring, v_ring.count + ahead);
  }

  // One arrival per warp. A warp's products are done when its wait returns.
  __device__ __forceinline__ void leave(uint32_t barrier) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
  }

  // Done with the tile, and with its operands.
  __device__ __forceinline__ void leave_tile() {
    leave(operands().empty());
    leave(tile_ring.empty());
    tile_ring.next();
  }

  __device__ __forceinline__ void wait_turn() const {
    if constexpr (C::kConsumers > 1) named_barrier_sync(kTurn + warpgroup, 256);
  }
  __device__ __forceinline__ void pass_turn() const {
    if constexpr (C::kConsumers > 1) named_barrier_arrive(kTurn + (warpgroup + 1) % C::kConsumers, 256);
  }

  // What a row of the tile sees, tile().visible.end(row): by a multiplication with inverse_of(every).
  __device__ __forceinline__ int keys_of(int row) const {
    const QueryTile& t = tile();
    const uint32_t r = static_cast<uint32_t>(row), to_next = t.visible.to_next;
    const uint32_t steps = ((r - to_next) * a.inverse_every >> 16) + 1;
    return static_cast<int>(t.visible.first + (r < to_next ? 0 : steps));
  }

  __device__ __forceinline__ void begin() {
    mbarrier_wait(shared_address(&barriers().start[tile_ring.count % 2]), tile_ring.count / 2 % 2);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      own[h] = own_scores()[row + 8 * h] * kLog2e;
      m[h] = first_maximum(own[h]);
      sum[h] = 0.0f;
      visible[h] = keys_of(row + 8 * h);
    }
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o[i] = 0.0f;
  }

  // S = Q K^T of the block in a slot of k; in flight until a wait.
  __device__ __forceinline__ void issue_scores(uint32_t slot) {
    const uint64_t q_tile = q_first;
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
    if constexpr (C::kSplit) {
      const uint64_t p_tile = descriptor_k_major(shared_address(shared.handover.weight[v_ring.count % 2]));
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        wgmma_ss_n_major<T, C::kDim, true>(o, descriptor_add(p_tile, step / 4 * Handover<C>::kPanel + step % 4 * 32),
                                           descriptor_add(v_tile, step * 2048));
      }
    } else {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) wgmma_rs<T, C::kDim>(o, p[step], descriptor_add(v_tile, step * 2048));
    }
    wgmma_commit();
  }

  // The largest score of both rows, in powers of two.
  __device__ __forceinline__ void largest_scores(float (&top)[2]) {
    const Tiles<kScores>& tiles = tiles_of(s);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top0 = tiles[0][2 * h], top1 = tiles[0][2 * h + 1];
#pragma unroll
      for (int i = 1; i < kScores / 4; ++i) {
        top0 = fmaxf(top0, tiles[i][2 * h]);
        top1 = fmaxf(top1, tiles[i][2 * h + 1]);
      }
      top[h] = quad_maximum(fmaxf(top0, top1)) * a.scale_log2;
    }
  }

  // Scores into weights relative to 2^m, and the sums of both rows.
  __device__ __forceinline__ void exponentials(float (&block_sum)[2]) {
    const Tiles<kScores>& tiles = tiles_of(s);
#pragma unroll
    for (int i = 0; i < kScores; ++i) s[i] = exp2_fast(fmaf(s[i], a.scale_log2, -m[i / 2 % 2]));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum0 = tiles[0][2 * h], sum1 = tiles[0][2 * h + 1];
#pragma unroll
      for (int i = 1; i < kScores / 4; ++i) {
        sum0 += tiles[i][2 * h];
        sum1 += tiles[i][2 * h + 1];
      }
      block_sum[h] = sum0 + sum1;
    }
  }

  // Adds a block's sums. Spelled out: split or not, a row has the same bits.
  __device__ __forceinline__ void add_sums(const float (&block_sum)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) sum[h] = fmaf(sum[h], shrink[h], block_sum[h]);
  }

  // Scores into weights relative to 2^m, and m raised where it has to be.
  template <bool MASK>
  __device__ __forceinline__ void softmax() {
    if constexpr (MASK) {
#pragma unroll
      for (int h = 0; h < 2; ++h) mask_row(tiles_of(s), h, visible[h], -INFINITY);
    }
    float top[2], block_sum[2];
    largest_scores(top);
#pragma unroll
    for (int h = 0; h < 2; ++h) shrink[h] = raise_maximum(m[h], top[h]);
    exponentials(block_sum);
    add_sums(block_sum);
  }

  // The sums of values follow a maximum that was raised.
  __device__ __forceinline__ void shrink_outputs() {
    if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) o[i] *= shrink[i / 2 % 2];
    }
  }

  __device__ __forceinline__ void round_weights() {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) p[i / 4][i % 4] = pack2<T>(s[2 * i], s[2 * i + 1]);
  }

  // Values of the last block that no chunk has written become zeros; `block` is its number. Every warpgroup clears for itself, so none
  // waits for another; zeros over zeros do no harm.
  __device__ __forceinline__ void clear_values(int block) const {
    const int valid = tile().closed - block * C::kKeys;
    if (valid < C::kKeys) {
      v_ring.wait_full();
      clear_values_from(valid);
    }
  }
  __device__ __forceinline__ void clear_values_from(int from) const {
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
    const Ring<C::kKeyStages> k = k_ring(0);
    k.wait_full();
    hold_registers(s);
    wgmma_fence();
    issue_scores(k.slot());
    clear_values(block);
    wgmma_wait<0>();
    hold_registers(s);
    leave(k.empty());
    softmax<true>();
    round_weights();
  }

  // S of this block and P V of the one before are in flight together; the softmax waits for the first alone.
  template <bool MASK>
  __device__ __forceinline__ void next_block() {
    const Ring<C::kKeyStages> k = k_ring(1);
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
    // The exponentials run while P V does: ptxas would move them behind the wait, but not across a branch. This one waits for what
    // is there.
    hold_registers(s);
    v_ring.wait_full();
    wgmma_wait<0>();
    hold_registers(o);
    hold_registers(p);
    leave(v_ring.empty());
    shrink_outputs();
    round_weights();
    v_ring.next();
  }

  // By a scorer: q of the tile to registers, where products take it without reading shared memory again for each block: reads of
  // shared memory are what bounds them.
  __device__ __forceinline__ void take_queries() {
    const uint32_t rows = shared_address(shared.q) + swizzled(64, thread / 32 * 16 + lane % 16, lane / 16 * 8);
#pragma unroll
    for (int step = 0; step < C::kDim / 16; ++step) {
      ldmatrix_x4(q_rows[step], (rows ^ (step % 4 * 32)) + step / 4 * kQPanel);
    }
  }

  // By a scorer: block `block` of the tile, the n-th of all that were scored. The maximum goes from block to block, so the largest
  // scores of the block before, which is the other scorer's, are awaited: they are there before its exponentials.
  __device__ __forceinline__ void score_block(uint32_t n, int block, bool first, bool mask) {
    Handover<C>& handover = shared.handover;
    const uint32_t slot = n % 2;
    const Ring<C::kKeyStages> k(shared.k_ring, n);
    k.wait_full();
    hold_registers(s);
    hold_registers(q_rows);
    wgmma_fence();
    const uint64_t k_tile = descriptor_add(k_first, k.slot() * kBytes);
    wgmma_rs_k_major<T, C::kKeys, false>(s, q_rows[0], k_tile);
#pragma unroll
    for (int step = 1; step < C::kDim / 16; ++step) {
      wgmma_rs_k_major<T, C::kKeys, true>(s, q_rows[step], descriptor_add(k_tile, step / 4 * kPanel + step % 4 * 32));
    }
    wgmma_commit();
    wgmma_wait<0>();
    hold_registers(q_rows);
    hold_registers(s);
    leave(k.empty());
    if (mask) {
#pragma unroll
      for (int h = 0; h < 2; ++h) mask_row(tiles_of(s), h, visible[h] - block * C::kKeys, -INFINITY);
    }
    float top[2], block_sum[2];
    largest_scores(top);
    // Waited for before this block's are written, and between tiles too: so no scorer gets past its next block before the other has
    // read what this one wrote, and two slots and their parities are enough.
    if (n > 0) {
      mbarrier_wait(shared_address(&handover.scored[slot ^ 1]), (n - 1) / 2 % 2);
      if (!first) {
#pragma unroll
        for (int h = 0; h < 2; ++h) raise_maximum(m[h], handover.top[slot ^ 1][row + 8 * h]);
      }
    }
    if (quad == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) handover.top[slot][row + 8 * h] = top[h];
    }
    leave(shared_address(&handover.scored[slot]));
#pragma unroll
    for (int h = 0; h < 2; ++h) shrink[h] = raise_maximum(m[h], top[h]);
    exponentials(block_sum);
    const Ring<2> weights(handover.weights, n);
    weights.wait_empty();
    handover.sum_and_shrink[slot][thread] = make_float4(block_sum[0], block_sum[1], shrink[0], shrink[1]);
    handover.maximum[slot][thread] = make_float2(m[0], m[1]);
    const uint32_t rows =
        shared_address(handover.weight[slot]) + swizzled(64, thread / 32 * 16 + lane % 16, lane / 16 * 8);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t rounded[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) rounded[i] = pack2<T>(s[8 * step + 2 * i], s[8 * step + 2 * i + 1]);
      stmatrix_x4((rows ^ (step % 4 * 32)) + step / 4 * Handover<C>::kPanel, rounded);
    }
    fence_proxy_async();  // ordinary stores, read by wgmma
    leave(weights.full());
  }

  // By a split tile's consumer: what comes with the weights of the block that v_ring is at.
  __device__ __forceinline__ Ring<2> weights() const { return Ring<2>(shared.handover.weights, v_ring.count); }
  __device__ __forceinline__ void take_sums() {
    const Ring<2> ring = weights();
    ring.wait_full();
    const float4 x = shared.handover.sum_and_shrink[ring.slot()][thread];
    const float2 maximum = shared.handover.maximum[ring.slot()][thread];
    const float block_sum[2] = {x.x, x.y};
    shrink[0] = x.z, shrink[1] = x.w;
    m[0] = maximum.x, m[1] = maximum.y;
    add_sums(block_sum);
  }

  // By a split tile's consumer: P V of all blocks but the last, which is left to last_values().
  __device__ __forceinline__ void add_blocks(int blocks) {
    clear_values(blocks - 1);
    take_sums();  // of no values yet: nothing shrinks
#pragma unroll 1
    for (int left = blocks - 1; left > 0; --left) {
      v_ring.wait_full();
      hold_registers(o);
      wgmma_fence();
      issue_values();
      wgmma_wait<0>();
      hold_registers(o);
      leave(v_ring.empty());
      leave(weights().empty());
      v_ring.next();
      take_sums();
      shrink_outputs();
    }
  }

  __device__ __forceinline__ void last_values() {
    hold_registers(o);
    if constexpr (!C::kSplit) hold_registers(p);
    wgmma_fence();
    issue_values();
    weigh();
    hold_registers(share);
    operands().wait_full();  // as in next_block()
    wgmma_wait<0>();
    hold_registers(o);
    if constexpr (!C::kSplit) hold_registers(p);
    leave(v_ring.empty());
    if constexpr (C::kSplit) leave(weights().empty());
    v_ring.next();
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
      query.q = row_of(a.q, a.heads_per_group.quotient(static_cast<uint32_t>(t.head)));
      query.cos = a.rotary.cos ? static_cast<const float*>(a.rotary.cos) + angle : nullptr;
      query.sin = static_cast<const float*>(a.rotary.sin) + angle;
      query.out_gate = a.out_gate.ptr ? row_of(a.out_gate, t.head) : nullptr;
      query.y = row_of(a.y, t.head);
      query.lse = a.lse + (t.batch * a.size.heads + t.head) * a.size.tokens + token;
      query.own = own_scores()[r] * kLog2e;
      query.scale_log2 = a.scale_log2;
      query.sign = a.q_sign;
      query.keys = warp_uniform(t.visible.end(r));
      query.head_dim = head_dim;
      attend_alone<C::kDim>(query, static_cast<const T*>(a.chunks.k), static_cast<const T*>(a.chunks.v),
                            [&](int j) { return state_offset(a, t, j); });
    }
  }

  // What the sums are divided by and what v~ weighs, and lse. Needs no product.
  __device__ __forceinline__ void weigh() {
    const QueryTile& t = tile();
    const int thread = opaque(static_cast<int>(threadIdx.x)) % 128,
              row = warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4;
    float* lse = a.lse + (t.batch * a.size.heads + t.head) * a.size.tokens + t.token + row;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      own_weight[h] = exp2_fast(own[h] - m[h]);
      total[h] = quad_sum(sum[h]) + own_weight[h];
      if (row + 8 * h < t.rows && thread % 4 == 0) lse[8 * h] = (m[h] + __log2f(total[h])) * kLn2;
    }
    operands().wait_full();
    const Operands at(*this);
#pragma unroll
    for (int step = 0; step < kEarly; ++step) {
      uint32_t gate[4];
      at.fetch_gate(gate, step);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 g = unpack2<T>(gate[i]);
        share[8 * step + 2 * i] = gated_share(g.x, total[i % 2]);
        share[8 * step + 2 * i + 1] = gated_share(g.y, total[i % 2]);
      }
    }
  }

  // v~ and out_gate of the warp's 16 rows in shared memory. ldmatrix and stmatrix have the products' layout: of a step of 16 columns,
  // word 2 x + h of a lane is columns 8 x + 2 quad, + 1 of its row h. Lanes give the addresses of rows lane % 16, piece lane / 16.
  struct Operands {
    static constexpr uint32_t kToGate = static_cast<uint32_t>(offsetof(Shared<C>, gate) - offsetof(Shared<C>, value));
    uint32_t rows;
    bool gated;
    __device__ __forceinline__ explicit Operands(const Consumer& c) {
      const int thread = opaque(static_cast<int>(threadIdx.x)) % 128, lane = thread % 32;
      rows = shared_address(c.shared.value[c.warpgroup]) + swizzled(64, thread / 32 * 16 + lane % 16, lane / 16 * 8);
      gated = c.a.out_gate.ptr != nullptr;
    }
    __device__ __forceinline__ uint32_t place(int step) const {
      return (rows ^ (step % 4 * 32)) + step / 4 * (64 * 128);
    }
    __device__ __forceinline__ void fetch_gate(uint32_t (&gate)[4], int step) const {
      constexpr uint32_t kOpen =
          std::is_same_v<T, bf16> ? 0x7f807f80u : 0x7c007c00u;  // +inf twice: a gate of exactly 1
#pragma unroll
      for (int i = 0; i < 4; ++i) gate[i] = kOpen;
      if (gated) ldmatrix_x4(gate, place(step) + kToGate);
    }
  };

  // Of the warp's queries. A sum is NaN where a value that its query does not see is not finite, for 0 times it is NaN. Asked of the
  // sums, not of y: what lies in the padding columns of v~'s place is nobody's, and may be NaN of a tile before.
  __device__ __forceinline__ bool all_finite() const {
    float zeros[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // of both rows, columns in turn
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) zeros[i % 4] = fmaf(o[i], 0.0f, zeros[i % 4]);
    bool finite = true;
#pragma unroll
    for (int h = 0; h < 2; ++h) finite &= row + 8 * h >= tile().rows || zeros[2 * h] + zeros[2 * h + 1] == 0.0f;
    return __all_sync(0xffffffffu, finite);
  }

  // y over v~ in shared memory.
  __device__ __forceinline__ void epilogue() const {
    const Operands at(*this);
    uint32_t value[2][4], gate[2][4];  // of a step and of the next one
    const auto fetch = [&](int step) {
      ldmatrix_x4(value[step % 2], at.place(step));
      if (step >= kEarly) at.fetch_gate(gate[step % 2], step);
    };
    fetch(0);
#pragma unroll
    for (int step = 0; step < C::kDim / 16; ++step) {
      if (step + 1 < C::kDim / 16) fetch(step + 1);
      uint32_t y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int h = i % 2, first = 8 * step + 2 * i;
        const float2 v = unpack2<T>(value[step % 2][i]);
        float part[2];
        if (step < kEarly) {
          part[0] = share[first], part[1] = share[first + 1];
        } else {
          const float2 g = unpack2<T>(gate[step % 2][i]);
          part[0] = gated_share(g.x, total[h]), part[1] = gated_share(g.y, total[h]);
        }
        y[i] = pack2<T>(fmaf(own_weight[h], v.x, o[first]) * part[0], fmaf(own_weight[h], v.y, o[first + 1]) * part[1]);
      }
      stmatrix_x4(at.place(step), y);
    }
  }
  // sigmoid(gate) / total
  static __device__ __forceinline__ float gated_share(float gate, float total) {
    return reciprocal_fast(fmaf(exp2_fast(gate * -kLog2e), total, total));
  }

  // y of the warp's rows to memory, 16 bytes a lane and whole rows at a time.
  __device__ __forceinline__ void store() const {
    // Of 24 pieces a warp has one row at a time, and 8 lanes have none.
    constexpr int kPieces = C::kDim / 8, kStep = 32 / kPieces;
    const QueryTile& t = tile();
    const int thread = opaque(static_cast<int>(threadIdx.x)) % 128, lane = thread % 32;
    const int piece = lane % kPieces, r = thread / 32 * 16 + lane / kPieces, left = t.rows - warpgroup * 64 - r;
    const bool has_piece = (32 % kPieces == 0 || lane < kPieces) && 8 * piece < static_cast<int>(a.size.head_dim);
    const int rows = has_piece ? left : 0;
    const int64_t step = kStep * a.y.token;
    const uint32_t from = shared_address(shared.value[warpgroup]) + swizzled(64, r, piece * 8);
    T* y = static_cast<T*>(a.y.ptr) + t.batch * a.y.batch + (t.token + warpgroup * 64 + r) * a.y.token +
           t.head * a.y.head + 8 * piece;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 / kStep; ++i) {
      uint32_t x[4];
      load_shared16(x, (from ^ (i * kStep % 8 * 16)) + i * kStep * 128);
      store_global16_if(y, x, i * kStep < rows);
      y += step;
    }
  }
};

// Tiles from the one that c is at, to the last: false; or to one with queries, of the warp, that have to be attended to one by one.
template <class C>
__device__ __forceinline__ bool consume_tiles(Consumer<C>& c) {
  for (;; c.leave_tile()) {
    c.tile_ring.wait_full();
    if (c.tile().rows == 0) return false;
    c.begin();
    const int blocks = (c.tile().keys + C::kKeys - 1) / C::kKeys;
    if (blocks > 0) {
      const int clear = c.tile().visible.first_masked_block(C::kKeys);
      int block = blocks - 1;
      if constexpr (C::kSplit) {
        c.add_blocks(blocks);
      } else {
        c.first_block(block);
        --block;
#pragma unroll 1
        for (; block >= clear; --block) c.template next_block<true>();
#pragma unroll 1
        for (; block >= 0; --block) c.template next_block<false>();
      }
      c.v_ring.wait_full();
    }
    if (!C::kSplit && c.tile().last) c.leave(shared_address(&c.barriers().q_left));
    if (c.tile().keys > 0) {
      c.last_values();
    } else {
      c.weigh();
    }
    if (!c.all_finite()) return true;
    c.epilogue();
    c.store();
  }
}

template <class C>
__device__ __forceinline__ void consume(const Arguments& a, Shared<C>& shared, int warpgroup) {
  Consumer<C> c(a, shared, warpgroup);
  wait_for_earlier_kernels();
  if (warpgroup == C::kConsumers - 1) c.pass_turn();  // the first turn is warpgroup 0's
  // What hardly any call needs lies behind what all need.
  while (consume_tiles(c)) {
    __syncwarp();  // lse is written again
    c.attend_one_by_one();
    c.leave_tile();
  }
  if (warpgroup == 0) c.wait_turn();  // the last turn that was passed on
}

// A scorer takes every other block of keys, across tiles.
template <class C>
__device__ __forceinline__ void score(const Arguments& a, Shared<C>& shared, uint32_t scorer) {
  Consumer<C> c(a, shared, 0);
  uint32_t passed = 0;  // blocks of the tiles before
  for (;; c.tile_ring.next()) {
    c.tile_ring.wait_full();
    if (c.tile().rows == 0) break;
    c.begin();
    c.take_queries();
    if (c.tile().last) c.leave(shared_address(&c.barriers().q_left));
#pragma unroll
    for (int h = 0; h < 2; ++h) c.visible[h] -= 2 * c.quad;
    const int blocks = (c.tile().keys + C::kKeys - 1) / C::kKeys;
    const int clear = c.tile().visible.first_masked_block(C::kKeys);
#pragma unroll 1
    for (int i = (passed + scorer) % 2; i < blocks; i += 2) {
      const int block = blocks - 1 - i;
      c.score_block(passed + i, block, i == 0, i == 0 || block >= clear);
    }
    passed += blocks;
    c.leave(c.tile_ring.empty());
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    chunk_attention_fwd_sm90_kernel(const __grid_constant__ Arguments a, const __grid_constant__ CUtensorMap k_map,
                                    const __grid_constant__ CUtensorMap v_map) {
#ifdef RAT_HOPPER_CODE
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  Shared<C>& shared = *reinterpret_cast<Shared<C>*>(raw_shared);
  if (shared_address(raw_shared) % 1024 != 0) __trap();
  const int warpgroup = warp_uniform(static_cast<int>(threadIdx.x) / 128);
  if (threadIdx.x == 0) {
    tma_prefetch_map(&k_map);
    tma_prefetch_map(&v_map);
    constexpr uint32_t kConsumerWarps = 4 * C::kConsumers, kScorerWarps = 4 * C::kScorers;
    shared.tile_ring.init(1, C::kLoaders * C::kConsumers + kConsumerWarps + kScorerWarps);
    for (int i = 0; i < C::kConsumers; ++i) {
      RowBarriers& rows = shared.rows[i];
      for (int slot = 0; slot < 2; ++slot) mbarrier_init(shared_address(&rows.start[slot]), C::kLoaders);
      mbarrier_init(shared_address(&rows.q_left), C::kSplit ? kScorerWarps : 4);
      rows.operands.init(C::kLoaders, 4);
    }
    shared.k_ring.init(1, kConsumerWarps);  // split: one scorer reads a block of keys
    shared.v_ring.init(1, kConsumerWarps);
    if constexpr (C::kSplit) {
      for (uint64_t& scored : shared.handover.scored) mbarrier_init(shared_address(&scored), 4);
      shared.handover.weights.init(4, 4);
    }
    mbarrier_init_fence();
  }
  // The kernel before this one is phase 1 or another launch of this phase. Neither lets this one start before all that came before
  // phase 1 is through. So what is not phase 1's may be read before the wait: where rows are, and q. Who needs more waits.
  if ((a.schedule.from > 0 || a.schedule.to < Schedule::kAllPositions) && !any_query(a)) {
    wait_for_earlier_kernels();
    return;
  }
  __syncthreads();  // everyone sees the barriers
  // ptxas lays out the last branch first. By times (bench/notes/chunk_attention.md), code over 64 KB behind a kernel's start is fetched
  // anew at each launch, while everyone waits: so those come first for whom the others wait, and with them what has little code.
  if (warpgroup != 0 && warpgroup <= C::kConsumers) {
    if constexpr (C::kShareRegisters) take_registers<C::kConsumerRegisters>();
    consume<C>(a, shared, warpgroup - 1);
  } else if (warpgroup != 0) {
    if constexpr (C::kSplit) {
      take_registers<C::kScorerRegisters>();
      score<C>(a, shared, static_cast<uint32_t>(warpgroup - 1 - C::kConsumers));
    }
  } else {
    if constexpr (C::kShareRegisters) give_registers<C::kProducerRegisters>();
    if (threadIdx.x < 32) {
      if (a.chunks.page_table != nullptr) {
        feed_blocks<C, true>(a, k_map, v_map, shared);
      } else if (threadIdx.x == 0) {
        feed_blocks<C, false>(a, k_map, v_map, shared);
      }
    } else {
      const int group = warp_uniform((static_cast<int>(threadIdx.x) - 32) / C::kLoaders);
      if (group < C::kConsumers) feed_queries<C>(a, shared, group, (threadIdx.x - 32) % C::kLoaders);
    }
  }
#endif
}

// ---- launcher ---------------------------------------------------------------------------------------------------------

// Queries of many keys want large blocks; those of few are bound by the work around each tile, which more warpgroups hide, and by
// keys that a block holds beyond those visible. Where a call has few queries, small tiles fill the chip.
template <class T, int CONSUMERS, bool SPLIT = false>
using Wide = Traits<T, 128, CONSUMERS, 128, SPLIT>;
template <class T, int CONSUMERS, bool SPLIT = false>
using WideShort = Traits<T, 128, CONSUMERS, 64, SPLIT>;
template <class T, int CONSUMERS, bool SPLIT = false>
using Narrow = Traits<T, 64, CONSUMERS, 112, SPLIT>;
template <class T, int CONSUMERS, bool SPLIT = false>
using NarrowShort = Traits<T, 64, CONSUMERS, 64, SPLIT>;
// Over 128 elements shared memory holds the operands of one warpgroup, and two blocks of 64 keys in each ring.
template <class T>
using Wider = Traits<T, 192, 1, 64>;
template <class T>
using Widest = Traits<T, 256, 1, 64>;
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
  a.narrow_gate = !rows_are_wide(params.out_gate, 2);
  a.rotary = params.rotary;
  a.chunks = params.chunks;
  a.s_self = scratch.s_self;
  a.lse = static_cast<float*>(params.lse);
  a.scale_log2 = scale_log2(params);
  a.q_sign = params.scale < 0 ? -1.0f : 1.0f;
  const int64_t heads_per_group = s.heads / s.q_groups;
  a.heads_per_group = Divisor(heads_per_group);
  a.heads = Divisor(s.heads);
  a.key_every = Divisor(s.key_every);
  a.rotate_every = Divisor(s.rotate_every);
  a.inverse_every = inverse_of(s.key_every);

  const int64_t tokens = s.lengths ? s.tokens : std::max<int64_t>(0, std::min(s.tokens, to) - from);
  const int64_t per_row = ceil_div(tokens, C::kRows);
  const int64_t total = (s.cu_seqlens ? work_items(s, C::kRows) : s.sequences * per_row) * s.heads;
  if (total == 0) return;
  constexpr int64_t kL2Budget = 10 << 20;  // bytes of keys and values that live in L2 beside what streams through
  const int64_t pairs = s.sequences * s.heads, pair_bytes = 4 * std::max<int64_t>(1, params.chunks.rows) * s.head_dim;
  const int64_t places = device_attribute<cudaDevAttrMultiProcessorCount>() * int64_t{C::kBlocks};
  // Heads of a group that a block takes one after the other, with the same q: as long as blocks still have many units to share.
  uint32_t unit_log2 = 0;
  while (unit_log2 < C::kUnitLog2 && (heads_per_group >> unit_log2) % 2 == 0 && (total >> unit_log2) >= 32 * places) {
    ++unit_log2;
  }
  const int64_t unit = int64_t{1} << unit_log2;
  const int64_t section = std::min(pairs, std::max<int64_t>(1, ceil_div(ceil_div(kL2Budget, pair_bytes), unit)) * unit);
  a.schedule.total = static_cast<uint32_t>(total);
  a.schedule.per_row = static_cast<uint32_t>(per_row);
  a.schedule.pairs = static_cast<uint32_t>(pairs);
  a.pairs = Divisor(pairs);
  a.schedule.section = static_cast<uint32_t>(section);
  a.schedule.unit_log2 = unit_log2;
  a.schedule.from = static_cast<uint32_t>(from);
  a.schedule.to = static_cast<uint32_t>(to);

  const CUtensorMap k_map = state_map<C>(params, params.chunks.k, scratch.s_self);
  const CUtensorMap v_map = state_map<C>(params, params.chunks.v, scratch.s_self);

  constexpr int kBytes = shared_bytes<C>();
  static_assert(kBytes * C::kBlocks <= (228 - C::kBlocks) * 1024);
  const char* name = "chunk_attention_fwd_sm90";
  allow_shared_memory(chunk_attention_fwd_sm90_kernel<C>, kBytes, name);
  const int64_t blocks = std::min<int64_t>(total >> unit_log2, places);
  // Where a block has one tile, what comes before it is worth hiding.
  a.overlaps = blocks == total >> unit_log2;
  if (a.overlaps) {
    launch_overlapping(chunk_attention_fwd_sm90_kernel<C>, blocks, C::kThreads, kBytes, stream, name, a, k_map, v_map);
  } else {
    chunk_attention_fwd_sm90_kernel<C><<<grid_x(blocks, name), C::kThreads, kBytes, stream>>>(a, k_map, v_map);
    check_launch(name);
  }
}

// Tiles of 64 queries, where full ones would leave half of the chip idle or be mostly empty. Where there are no more of them than
// multiprocessors, more warpgroups share one.
template <class C>
void launch_full_or_small(const AttentionFwdParams& params, const FwdScratch& scratch, int64_t from, int64_t to,
                          cudaStream_t stream) {
  using Small = Traits<typename C::T, C::kDim, 1, C::kKeys>;
  using Split = Traits<typename C::T, C::kDim, 1, C::kKeys, true>;
  const Sizes& s = params.size;
  const auto tiles = [&](int64_t rows) {
    return s.cu_seqlens ? s.tokens / rows + s.sequences : s.sequences * ceil_div(s.tokens, rows);
  };
  const int64_t multiprocessors = device_attribute<cudaDevAttrMultiProcessorCount>();
  const bool empty = s.batch * s.tokens <= s.sequences * Small::kRows;
  const bool idle = 2 * tiles(C::kRows) * s.heads <= multiprocessors;
  if (tiles(Split::kRows) * s.heads <= multiprocessors) {
    launch<Split>(params, scratch, from, to, stream);
  } else {
    empty || idle ? launch<Small>(params, scratch, from, to, stream) : launch<C>(params, scratch, from, to, stream);
  }
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
  constexpr int64_t all = Schedule::kAllPositions;
  if (params.size.head_dim > 192) {
    launch<Widest<T>>(params, scratch, 0, all, stream);
  } else if (params.size.head_dim > 128) {
    launch<Wider<T>>(params, scratch, 0, all, stream);
  } else if (params.size.head_dim > 64) {
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
  if (s.head_dim > 256) return "D is over 256";
  if (!std::isfinite(scale_log2(params))) return "the scale is not finite in float32";
  // Nothing here may depend on how many states or queries there are: a token has the same bits in any call.
  if (params.chunks.rows > 0) {
    if (const char* reason = no_state_map(s, params.chunks)) return reason;
  }
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
      entry<Wide<bf16, 1, true>>("chunk_attention_fwd_sm90<bf16, 128, split>"),
      entry<Wide<f16, 2>>("chunk_attention_fwd_sm90<f16, 128>"),
      entry<Wide<f16, 1>>("chunk_attention_fwd_sm90<f16, 128, small>"),
      entry<Wide<f16, 1, true>>("chunk_attention_fwd_sm90<f16, 128, split>"),
      entry<WideShort<bf16, 3>>("chunk_attention_fwd_sm90<bf16, 128, short>"),
      entry<WideShort<bf16, 1>>("chunk_attention_fwd_sm90<bf16, 128, short, small>"),
      entry<WideShort<bf16, 1, true>>("chunk_attention_fwd_sm90<bf16, 128, short, split>"),
      entry<WideShort<f16, 3>>("chunk_attention_fwd_sm90<f16, 128, short>"),
      entry<WideShort<f16, 1>>("chunk_attention_fwd_sm90<f16, 128, short, small>"),
      entry<WideShort<f16, 1, true>>("chunk_attention_fwd_sm90<f16, 128, short, split>"),
      entry<Narrow<bf16, 3>>("chunk_attention_fwd_sm90<bf16, 64>"),
      entry<Narrow<bf16, 1>>("chunk_attention_fwd_sm90<bf16, 64, small>"),
      entry<Narrow<bf16, 1, true>>("chunk_attention_fwd_sm90<bf16, 64, split>"),
      entry<Narrow<f16, 3>>("chunk_attention_fwd_sm90<f16, 64>"),
      entry<Narrow<f16, 1>>("chunk_attention_fwd_sm90<f16, 64, small>"),
      entry<Narrow<f16, 1, true>>("chunk_attention_fwd_sm90<f16, 64, split>"),
      entry<NarrowShort<bf16, 3>>("chunk_attention_fwd_sm90<bf16, 64, short>"),
      entry<NarrowShort<bf16, 1>>("chunk_attention_fwd_sm90<bf16, 64, short, small>"),
      entry<NarrowShort<bf16, 1, true>>("chunk_attention_fwd_sm90<bf16, 64, short, split>"),
      entry<NarrowShort<f16, 3>>("chunk_attention_fwd_sm90<f16, 64, short>"),
      entry<NarrowShort<f16, 1>>("chunk_attention_fwd_sm90<f16, 64, short, small>"),
      entry<NarrowShort<f16, 1, true>>("chunk_attention_fwd_sm90<f16, 64, short, split>"),
      entry<Wider<bf16>>("chunk_attention_fwd_sm90<bf16, 192>"),
      entry<Wider<f16>>("chunk_attention_fwd_sm90<f16, 192>"),
      entry<Widest<bf16>>("chunk_attention_fwd_sm90<bf16, 256>"),
      entry<Widest<f16>>("chunk_attention_fwd_sm90<f16, 256>"),
  };
  return {entries, static_cast<int>(sizeof(entries) / sizeof(entries[0]))};
}

}  // namespace rat::cuda
