// Forward phase 2 on Hopper (sm_90a): softmax of every query over the states of earlier chunks and its own state.
//
// Reads per token and head, in elements of T: v~ (from y) and out_gate, D each; q, D a group; s_self, 4 bytes. Writes y over
// v~, D, and lse, 4 bytes. Keys and values are re-read from L2 once for each query tile. 4 D FLOP per query and visible key.
//
// A persistent grid, one block a multiprocessor. A tile is kRows queries of one head; it walks blocks of kKeys chunk states
// from the last visible one to the first, so that only its first blocks need a mask.
//   warp 0           one thread decides which tile is next, tells the others, and feeds its K and V blocks through the copy
//                    engine into two rings.
//   warps 1 ... 3    load q and s_self of the next tile, rotate q by chunk index, store it as wgmma reads it; and start
//                    fetching v~ and out_gate of the tile that the consumers begin into L2.
//   warpgroup 1 ...  consumers: 64 queries each. S = Q K^T of a block is issued before P V of the block before, and the
//                    softmax of one warpgroup runs while another one's products do: a token passed by named barriers keeps
//                    them in turn. v~ and out_gate are loaded while the last product runs.
// The running softmax starts from the self term: its maximum from s_self, and exp(s_self - m) v~ joins at the end. So no row is
// empty and no -inf reaches the maximum. The maximum moves only when it would grow by more than 2^kSlack: sums and products
// stay exact, since all of a row are relative to the same number, and O is rarely rescaled.
//
// Shared memory: q (2 tiles), K and V rings (kStages blocks each), barriers. Every tile lies in panels of 64 columns, 128 bytes
// a row, 16-byte pieces swizzled: the layout that the copy engine writes and wgmma reads.
//
// Rows of the last block that no query of the tile sees may hold anything, NaN too. Their scores are masked; their values
// are set to zero in shared memory before the product, since 0 NaN is NaN.
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

namespace rat::cuda {
namespace {

template <class T_, int DIM, int CONSUMERS, int KEYS>
struct Traits {
  using T = T_;
  static constexpr int kDim = DIM;  // head size, padded
  static constexpr int kPanels = DIM / 64;
  static constexpr int kConsumers = CONSUMERS;  // warpgroups
  static constexpr int kRows = 64 * CONSUMERS;  // queries a tile
  static constexpr int kKeys = KEYS;            // chunk states a block
  static constexpr int kStages = DIM == 64 ? 3 : 2;
  static constexpr int kThreads = 128 * (CONSUMERS + 1);
  static constexpr int kLoaders = 96;  // warps 1 ... 3
  // Registers a thread: the roles share what the block was launched with, a multiple of 8 for each.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = KEYS + DIM > 128 ? 56 : 80;
  static constexpr int kConsumerRegisters =
      (kLaunchRegisters * (CONSUMERS + 1) - kProducerRegisters) / CONSUMERS / 8 * 8;
  // The epilogue's operands of both rows of a thread before the last product ends, where registers allow.
  static constexpr bool kFetchBoth = DIM == 64 || CONSUMERS == 2;
  static_assert(DIM % 64 == 0 && KEYS % 16 == 0 && KEYS <= 256 && kConsumerRegisters <= 240);
};

// What a tile is. Made by the thread that feeds K and V, read by everyone.
struct Tile {
  int64_t token;  // of row 0, in the row of the token tensors
  int64_t batch;
  int32_t head;
  int32_t rows;     // queries; 0: no more tiles
  int32_t keys;     // chunk states that its last query sees
  int32_t key_row;  // of its first chunk state in the tensor map
  int32_t key_outer;
  uint32_t first;    // chunk of row 0
  uint32_t to_next;  // rows until the next chunk starts
  uint32_t size;     // chunk size, clamped to 32 bits

  __device__ __forceinline__ int chunk(int row) const {
    const uint32_t r = static_cast<uint32_t>(row);
    return static_cast<int>(r < to_next ? first : first + 1 + (r - to_next) / size);
  }
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
  Tile tile[kTileSlots];
  alignas(8) uint64_t tile_full[kTileSlots], tile_empty[kTileSlots];
  uint64_t q_full[2], q_empty[2];
  uint64_t k_full[C::kStages], k_empty[C::kStages], v_full[C::kStages], v_empty[C::kStages];
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
};

struct Arguments {
  Sizes size;
  Rows q, out_gate, y;
  Rotary rotary;
  ChunkStates chunks;
  const float* s_self;
  float* lse;
  float scale_log2;  // |scale| log2(e): scores are in units of log 2
  float q_sign;      // sign of the scale: q carries it
  uint32_t heads_per_group;
  Schedule schedule;
};

// Index of this block's round-th tile: rounds alternate in direction, so that no block always gets the heaviest.
__device__ __forceinline__ uint32_t tile_index(uint32_t round) {
  return round * gridDim.x + (round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

// In 32-bit arithmetic: 64-bit divisions would take longer than a small tile.
template <int ROWS>
__device__ __forceinline__ void describe_tile(const Arguments& a, uint32_t index, Tile& tile) {
  const uint32_t heads = static_cast<uint32_t>(a.size.heads);
  uint32_t n, head, in_sequence;
  if (a.size.cu_seqlens) {  // as work_item() does
    head = index % heads;
    const uint32_t item = a.schedule.total / heads - 1 - index / heads;
    uint32_t high = static_cast<uint32_t>(a.size.sequences) - 1;
    n = 0;
    while (n < high) {
      const uint32_t middle = (n + high + 1) / 2;
      if (static_cast<uint32_t>(a.size.cu_seqlens[middle]) / ROWS + 2 * middle <= item) {
        n = middle;
      } else {
        high = middle - 1;
      }
    }
    in_sequence = item - (static_cast<uint32_t>(a.size.cu_seqlens[n]) / ROWS + 2 * n);
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
  const uint32_t begin = a.size.cu_seqlens ? static_cast<uint32_t>(a.size.cu_seqlens[n]) : 0;
  const uint32_t end =
      a.size.cu_seqlens ? static_cast<uint32_t>(a.size.cu_seqlens[n + 1]) : static_cast<uint32_t>(a.size.tokens);
  const uint32_t start = a.size.lengths ? static_cast<uint32_t>(a.size.lengths[n]) : 0;
  const uint32_t token = begin + in_sequence * ROWS;
  tile.token = token;
  tile.batch = a.size.cu_seqlens ? 0 : n;
  tile.head = static_cast<int>(head);
  const int rows = token < end ? static_cast<int>(min(static_cast<uint32_t>(ROWS), end - token)) : 0;
  tile.rows = rows;
  const uint32_t size =
      a.size.chunk_size < INT64_C(0xffffffff) ? static_cast<uint32_t>(a.size.chunk_size) : 0xffffffffu;
  const uint32_t position = start + in_sequence * ROWS;
  tile.size = size;
  tile.first = position / size;
  tile.to_next = size - position % size;
  tile.keys = rows > 0 ? tile.chunk(rows - 1) : 0;
  tile.key_row = a.chunks.compact ? static_cast<int>(begin / size + n) : 0;
  tile.key_outer = static_cast<int>(a.chunks.compact ? head : n * heads + head);
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// Good to a unit in the last place of a float, without the code that a division spends on subnormal numbers.
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float sigmoid_fast(float x) {
  return reciprocal_fast(1.0f + exp2_fast(x * -1.4426950408889634f));
}

// Byte offset of column `column` (a multiple of 4) of row `row` in a tile of `rows` rows.
__device__ __forceinline__ uint32_t swizzled(int rows, int row, int column) {
  return static_cast<uint32_t>(column / 64 * rows * 128 + row * 128 + ((column % 64 / 8) ^ (row & 7)) * 16 +
                               column % 8 * 2);
}

// ---- producers --------------------------------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void feed_blocks(const Arguments& a, const CUtensorMap& k_map, const CUtensorMap& v_map,
                                            Shared<C>& shared) {
  constexpr uint32_t kBytes = C::kKeys * C::kDim * 2;
  constexpr uint32_t kPanelBytes = C::kKeys * 128;
  const uint32_t k_tile = shared_address(shared.k), v_tile = shared_address(shared.v);
  const uint32_t k_full = shared_address(shared.k_full), k_empty = shared_address(shared.k_empty);
  const uint32_t v_full = shared_address(shared.v_full), v_empty = shared_address(shared.v_empty);
  tma_prefetch_map(&k_map);
  tma_prefetch_map(&v_map);

  const auto load = [&](const CUtensorMap& map, uint32_t tiles, uint32_t full, uint32_t empty, uint32_t count, int row,
                        int outer) {
    const uint32_t slot = count % C::kStages, parity = count / C::kStages % 2;
    mbarrier_wait(empty + 8 * slot, parity ^ 1);  // the consumers have left the slot
    mbarrier_arrive_expect(full + 8 * slot, kBytes);
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      tma_load(tiles + slot * kBytes + panel * kPanelBytes, &map, full + 8 * slot, 64 * panel, row, outer);
    }
  };

  uint32_t round = 0;
  const auto describe = [&](uint32_t number) {
    const uint32_t slot = number % kTileSlots;
    mbarrier_wait(shared_address(&shared.tile_empty[slot]), (number / kTileSlots % 2) ^ 1);
    Tile& tile = shared.tile[slot];
    tile.rows = 0;  // unless there is one more
    for (; round * gridDim.x < a.schedule.total && tile.rows == 0; ++round) {
      const uint32_t index = tile_index(round);
      if (index < a.schedule.total) describe_tile<C::kRows>(a, index, tile);
    }
    mbarrier_arrive(shared_address(&shared.tile_full[slot]));
  };
  uint32_t count = 0;  // blocks so far
  describe(0);
#pragma unroll 1
  for (uint32_t tiles = 0;; ++tiles) {
    const Tile& tile = shared.tile[tiles % kTileSlots];
    if (tile.rows == 0) break;
    describe(tiles + 1);  // the loaders work one tile ahead
    const int outer = tile.key_outer;
    const int blocks = (tile.keys + C::kKeys - 1) / C::kKeys;
    if (blocks == 0) continue;
    // In the order in which the consumers need them: K runs one block ahead of V.
    int row = tile.key_row + (blocks - 1) * C::kKeys;
    load(k_map, k_tile, k_full, k_empty, count, row, outer);
#pragma unroll 1
    for (int block = 1; block < blocks; ++block) {
      load(k_map, k_tile, k_full, k_empty, count + 1, row - C::kKeys, outer);
      load(v_map, v_tile, v_full, v_empty, count, row, outer);
      ++count;
      row -= C::kKeys;
    }
    load(v_map, v_tile, v_full, v_empty, count, row, outer);
    ++count;
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

// q of one tile, in 16-byte pieces. A thread owns the same 8 columns of both halves in a run of rows: it rotates only what it
// loaded itself, so no barrier lies between, and fetches angles only where the chunk changes.
template <class C>
struct QueryPieces {
  using T = typename C::T;
  static constexpr int kPieces = C::kDim / 16;
  static constexpr int kRun = (C::kRows * kPieces + C::kLoaders - 1) / C::kLoaders;
  static_assert(C::kLoaders % kPieces == 0);
  uint32_t target;
  int half, column, row, end;  // rows [row, end) of the tile, those past the tile's last token included

  __device__ __forceinline__ QueryPieces(const Arguments& a, uint32_t tile, int thread) {
    target = tile;
    half = static_cast<int>(a.size.head_dim) / 2;
    column = thread % kPieces * 8;
    row = thread / kPieces * kRun;
    end = column < half ? min(row + kRun, C::kRows) : row;
  }
  __device__ __forceinline__ uint32_t low(int r) const { return target + swizzled(C::kRows, r, column); }
  __device__ __forceinline__ uint32_t high(int r) const { return target + swizzled(C::kRows, r, half + column); }

  // Rows past the last token become zeros.
  __device__ __forceinline__ void load(const T* q, int64_t token_stride, int rows) const {
    const T* from = q + row * token_stride + column;
#pragma unroll 1
    for (int r = row; r < end; ++r, from += token_stride) {
      const bool valid = r < rows;
      cp_async16(low(r), valid ? from : q, valid);
      cp_async16(high(r), valid ? from + half : q, valid);
    }
  }

  // After the loads have landed; waits for them itself, with the first angles in flight.
  __device__ __forceinline__ void rotate(const Arguments& a, const Tile& tile) const {
    const float* cos = static_cast<const float*>(a.rotary.cos);
    const float* sin = static_cast<const float*>(a.rotary.sin);
    const uint32_t size = tile.size, to_next = tile.to_next;
    const int last = min(end, tile.rows);
    float c[8], s[8];
    uint32_t chunk = tile.first, left = to_next - row;
    if (static_cast<uint32_t>(row) >= to_next) {
      const uint32_t past = row - to_next;
      chunk += 1 + past / size;
      left = size - past % size;
    }
    const auto fetch_angles = [&] {
      const int64_t angle = static_cast<int64_t>(chunk) * half + column;
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        const float4 co = __ldg(reinterpret_cast<const float4*>(cos + angle + i));
        const float4 si = __ldg(reinterpret_cast<const float4*>(sin + angle + i));
        c[i] = co.x, c[i + 1] = co.y, c[i + 2] = co.z, c[i + 3] = co.w;
        s[i] = si.x, s[i + 1] = si.y, s[i + 2] = si.z, s[i + 3] = si.w;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) c[i] *= a.q_sign, s[i] *= a.q_sign;
    };
#pragma unroll
    for (int i = 0; i < 8; ++i) c[i] = a.q_sign, s[i] = 0.0f;
    if (cos != nullptr && row < last) fetch_angles();
    cp_async_wait<0>();
    if (cos == nullptr && a.q_sign > 0.0f) return;
#pragma unroll 1
    for (int r = row; r < last; ++r) {
      uint32_t x[4], y[4];
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                   : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                   : "r"(low(r))
                   : "memory");
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                   : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3])
                   : "r"(high(r))
                   : "memory");
#pragma unroll
      for (int i = 0; i < 4; ++i) rotate_pair<T>(x[i], y[i], &c[2 * i], &s[2 * i]);
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(low(r)), "r"(x[0]), "r"(x[1]), "r"(x[2]),
                   "r"(x[3])
                   : "memory");
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(high(r)), "r"(y[0]), "r"(y[1]), "r"(y[2]),
                   "r"(y[3])
                   : "memory");
      if (--left == 0) {
        ++chunk;
        left = size;
        if (cos != nullptr && r + 1 < last) fetch_angles();
      }
    }
  }
};

// The same, two columns at a time, where 16-byte accesses are not legal or D / 2 is no multiple of 8.
template <class C>
__device__ __forceinline__ void load_queries_slowly(const Arguments& a, const Tile& tile, const typename C::T* q,
                                                    uint32_t target, int thread) {
  using T = typename C::T;
  const int half = static_cast<int>(a.size.head_dim) / 2;
  constexpr int kPairs = C::kDim / 4;
#pragma unroll 1
  for (int i = thread; i < C::kRows * kPairs; i += C::kLoaders) {
    const int row = i / kPairs, column = i % kPairs * 2;
    if (column >= half) continue;
    uint32_t x = 0, y = 0;
    if (row < tile.rows) {
      const T* from = q + row * a.q.token + column;
      x = pack2<T>(to_float(from[0]), to_float(from[1]));
      y = pack2<T>(to_float(from[half]), to_float(from[half + 1]));
      float c[2] = {a.q_sign, a.q_sign}, s[2] = {0.0f, 0.0f};
      if (a.rotary.cos != nullptr) {
        const int64_t angle = static_cast<int64_t>(tile.chunk(row)) * half + column;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          c[j] = static_cast<const float*>(a.rotary.cos)[angle + j] * a.q_sign;
          s[j] = static_cast<const float*>(a.rotary.sin)[angle + j] * a.q_sign;
        }
      }
      rotate_pair<T>(x, y, c, s);
    }
    asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(target + swizzled(C::kRows, row, column)), "r"(x) : "memory");
    asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(target + swizzled(C::kRows, row, half + column)), "r"(y) : "memory");
  }
}

// The 128-byte lines of a (B, T, H, D) tensor at the tile's tokens, on their way to L2.
template <class C>
__device__ __forceinline__ void prefetch_rows(const Rows& tensor, const Tile& tile, int thread) {
  constexpr int kLines = C::kDim / 64;
  const char* base = static_cast<const char*>(tensor.ptr) +
                     2 * (tile.batch * tensor.batch + tile.token * tensor.token + tile.head * tensor.head);
  const int64_t stride = 2 * tensor.token;
#pragma unroll 1
  for (int i = thread; i < tile.rows * kLines; i += C::kLoaders) {
    prefetch_l2(base + i / kLines * stride + i % kLines * 128);
  }
}

template <class C>
__device__ __forceinline__ void feed_queries(const Arguments& a, Shared<C>& shared, int thread) {
  using T = typename C::T;
  constexpr uint32_t kBytes = C::kRows * C::kDim * 2;
  const uint32_t q_full = shared_address(shared.q_full), q_empty = shared_address(shared.q_empty);
  const bool vector = a.size.aligned16 && a.size.head_dim % 16 == 0;
  if (a.size.head_dim < C::kDim) {  // padding columns: zeros, once
    for (uint32_t i = thread; i < 2 * kBytes / 16; i += C::kLoaders) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};\n" ::"r"(shared_address(shared.q) + 16 * i), "r"(0)
                   : "memory");
    }
    named_barrier_sync(1, C::kLoaders);
  }
#pragma unroll 1
  for (uint32_t tiles = 0;; ++tiles) {
    mbarrier_wait(shared_address(&shared.tile_full[tiles % kTileSlots]), tiles / kTileSlots % 2);
    const Tile& tile = shared.tile[tiles % kTileSlots];
    const int rows = tile.rows;
    const uint32_t slot = tiles % 2;
    mbarrier_wait(q_empty + 8 * slot, (tiles / 2 % 2) ^ 1);  // the consumers have left the tile before last
    if (tiles > 0) {
      // They start the tile before now and want its v~ and out_gate at its end. Not earlier: what all blocks have asked for
      // must stay in L2 until it is used.
      const uint32_t current = (tiles - 1) % kTileSlots;
      prefetch_rows<C>(a.y, shared.tile[current], thread);
      if (a.out_gate.ptr != nullptr) prefetch_rows<C>(a.out_gate, shared.tile[current], thread);
      mbarrier_arrive(shared_address(&shared.tile_empty[current]));
    }
    if (rows > 0) {
      const float* own = a.s_self + (tile.batch * a.size.heads + tile.head) * a.size.tokens + tile.token;
#pragma unroll 1
      for (int row = thread; row < C::kRows; row += C::kLoaders) {
        cp_async4(shared_address(&shared.own[slot][row]), row < rows ? own + row : own, row < rows);
      }
      const uint32_t group = static_cast<uint32_t>(tile.head) / a.heads_per_group;
      const T* q = static_cast<const T*>(a.q.ptr) + tile.batch * a.q.batch + tile.token * a.q.token + group * a.q.head;
      const uint32_t target = shared_address(shared.q) + slot * kBytes;
      if (vector) QueryPieces<C>(a, target, thread).load(q, a.q.token, rows);
      cp_async_commit();
      if (vector) {
        QueryPieces<C>(a, target, thread).rotate(a, tile);
      } else {
        load_queries_slowly<C>(a, tile, q, target, thread);
        cp_async_wait<0>();
      }
    }
    fence_proxy_async();  // q was written by ordinary stores and cp.async; wgmma reads it
    mbarrier_arrive(q_full + 8 * slot);
    if (rows == 0) break;
  }
}

// ---- consumers --------------------------------------------------------------------------------------------------------

// Scores of one block into weights relative to 2^m, and m raised where it has to be. s: C tiles of a wgmma.
// visible[h]: how many keys of the block row h sees, less this thread's first column; used with MASK only.
template <bool MASK, int COUNT>
__device__ __forceinline__ void softmax_block(float (&s)[COUNT], float (&m)[2], float (&sum)[2], float (&shrink)[2],
                                              float scale_log2, const int (&visible)[2]) {
  constexpr float kSlack = 8.0f;
  constexpr int kTiles = COUNT / 4;
  if constexpr (MASK) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (i / 4 * 8 + i % 2 >= visible[i / 2 % 2]) s[i] = -INFINITY;
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float top0 = s[2 * h], top1 = s[2 * h + 1];
#pragma unroll
    for (int i = 1; i < kTiles; ++i) {
      top0 = fmaxf(top0, s[4 * i + 2 * h]);
      top1 = fmaxf(top1, s[4 * i + 2 * h + 1]);
    }
    float top = fmaxf(top0, top1);
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    top *= scale_log2;
    const bool raise = top > m[h] + kSlack;
    shrink[h] = raise ? exp2_fast(m[h] - top) : 1.0f;
    m[h] = raise ? top : m[h];
    sum[h] *= shrink[h];
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) s[i] = exp2_fast(fmaf(s[i], scale_log2, -m[i / 2 % 2]));
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum0 = s[2 * h], sum1 = s[2 * h + 1];
#pragma unroll
    for (int i = 1; i < kTiles; ++i) {
      sum0 += s[4 * i + 2 * h];
      sum1 += s[4 * i + 2 * h + 1];
    }
    sum[h] += sum0 + sum1;
  }
}

template <class T, int COUNT>
__device__ __forceinline__ void round_weights(uint32_t (&p)[COUNT / 8][4], const float (&s)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT / 2; ++i) p[i / 4][i % 4] = pack2<T>(s[2 * i], s[2 * i + 1]);
}

template <int STEPS>
__device__ __forceinline__ void hold_weights(uint32_t (&p)[STEPS][4]) {
#pragma unroll
  for (int i = 0; i < STEPS; ++i) hold_registers(p[i]);
}

template <class C>
__device__ __forceinline__ void consume(const Arguments& a, Shared<C>& shared, int warpgroup) {
  using T = typename C::T;
  constexpr int kScores = C::kKeys / 2;  // accumulators of S
  constexpr int kSteps = C::kKeys / 16;  // of P V
  constexpr int kOutputs = C::kDim / 2;  // accumulators of O
  constexpr uint32_t kQBytes = C::kRows * C::kDim * 2;
  constexpr uint32_t kQPanel = C::kRows * 128;
  constexpr uint32_t kBytes = C::kKeys * C::kDim * 2;
  constexpr uint32_t kPanel = C::kKeys * 128;
  // Named barriers 2 ... 2 + kConsumers: a warpgroup's turn to issue products. 8 + warpgroup: one warpgroup alone.
  const int own_turn = 2 + warpgroup, next_turn = 2 + (warpgroup + 1) % C::kConsumers;
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, quad = lane % 4;
  const int row = warpgroup * 64 + thread / 32 * 16 + lane / 4;  // and row + 8

  const uint64_t q_first = descriptor_k_major(shared_address(shared.q) + warpgroup * 64 * 128);
  const uint64_t k_first = descriptor_k_major(shared_address(shared.k));
  const uint64_t v_first = descriptor_n_major(shared_address(shared.v), kPanel);
  const uint32_t q_full = shared_address(shared.q_full), q_empty = shared_address(shared.q_empty);
  const uint32_t k_full = shared_address(shared.k_full), k_empty = shared_address(shared.k_empty);
  const uint32_t v_full = shared_address(shared.v_full), v_empty = shared_address(shared.v_empty);

  float s[kScores], o[kOutputs];
  uint32_t p[kSteps][4];

  const auto issue_scores = [&](uint64_t q_tile, uint32_t slot) {
    const uint64_t k_tile = descriptor_add(k_first, slot * kBytes);
    wgmma_ss<T, C::kKeys, false>(s, q_tile, k_tile);
#pragma unroll
    for (int step = 1; step < C::kDim / 16; ++step) {
      wgmma_ss<T, C::kKeys, true>(s, descriptor_add(q_tile, step / 4 * kQPanel + step % 4 * 32),
                                  descriptor_add(k_tile, step / 4 * kPanel + step % 4 * 32));
    }
    wgmma_commit();
  };
  const auto issue_values = [&](uint32_t slot) {
    const uint64_t v_tile = descriptor_add(v_first, slot * kBytes);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) wgmma_rs<T, C::kDim>(o, p[step], descriptor_add(v_tile, step * 2048));
    wgmma_commit();
  };
  // One arrival a warp. A warp's products are done when its wait returns.
  const auto leave = [&](uint32_t barrier) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
  };

  if (warpgroup == C::kConsumers - 1) named_barrier_arrive(2, 256);  // the first turn is warpgroup 0's

  uint32_t count = 0;  // blocks so far
  for (uint32_t tiles = 0;; ++tiles) {
    const uint32_t q_slot = tiles % 2;
    mbarrier_wait(q_full + 8 * q_slot, tiles / 2 % 2);
    const Tile& tile = shared.tile[tiles % kTileSlots];
    if (tile.rows == 0) break;
    float m[2], sum[2] = {0.0f, 0.0f}, shrink[2], own[2];
    int visible[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + 8 * h;
      own[h] = shared.own[q_slot][r] * 1.4426950408889634f;
      m[h] = own[h];
      visible[h] = tile.chunk(r);
    }
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o[i] = 0.0f;

    const int keys = tile.keys, blocks = (keys + C::kKeys - 1) / C::kKeys;
    if (blocks > 0) {
      const int clear = static_cast<int>(tile.first) / C::kKeys;  // blocks that every query of the tile sees whole
      const uint64_t q_tile = descriptor_add(q_first, q_slot * kQBytes);
      const auto slot_of = [](uint32_t block) { return block % C::kStages; };
      const auto parity_of = [](uint32_t block) { return block / C::kStages % 2; };
      int block = blocks - 1;
#pragma unroll
      for (int h = 0; h < 2; ++h) visible[h] -= block * C::kKeys + 2 * quad;

      mbarrier_wait(k_full + 8 * slot_of(count), parity_of(count));
      hold_registers(s);
      wgmma_fence();
      issue_scores(q_tile, slot_of(count));
      const int valid = keys - block * C::kKeys;  // rows of this block that may be read
      if (valid < C::kKeys) {
        mbarrier_wait(v_full + 8 * slot_of(count), parity_of(count));
        const uint32_t v_tile = shared_address(shared.v) + slot_of(count) * kBytes;
        // Every warpgroup clears for itself, so none waits for another; zeros over zeros do no harm.
        for (int r = valid + thread / 8; r < C::kKeys; r += 16) {
#pragma unroll
          for (int panel = 0; panel < C::kPanels; ++panel) {
            asm volatile(
                "st.shared.v4.b32 [%0], {%1, %1, %1, %1};\n" ::"r"(v_tile + panel * kPanel + r * 128 + thread % 8 * 16),
                "r"(0)
                : "memory");
          }
        }
        fence_proxy_async();  // ordinary stores, read by wgmma
        named_barrier_sync(8 + warpgroup, 128);
      }
      wgmma_wait<0>();
      hold_registers(s);
      leave(k_empty + 8 * slot_of(count));
      softmax_block<true>(s, m, sum, shrink, a.scale_log2, visible);
      round_weights<T>(p, s);

      // S of this block and P V of the one before are in flight together; the softmax waits for the first alone.
      const auto advance = [&](auto masked) {
        const uint32_t next = count + 1;
        mbarrier_wait(k_full + 8 * slot_of(next), parity_of(next));
        named_barrier_sync(own_turn, 256);
        hold_registers(s);
        hold_registers(o);
        hold_weights(p);
        wgmma_fence();
        issue_scores(q_tile, slot_of(next));
        mbarrier_wait(v_full + 8 * slot_of(count), parity_of(count));
        wgmma_fence();
        issue_values(slot_of(count));
        named_barrier_arrive(next_turn, 256);
        wgmma_wait<1>();
        hold_registers(s);
        leave(k_empty + 8 * slot_of(next));
#pragma unroll
        for (int h = 0; h < 2; ++h) visible[h] += C::kKeys;
        softmax_block<decltype(masked)::value>(s, m, sum, shrink, a.scale_log2, visible);
        wgmma_wait<0>();
        hold_registers(o);
        hold_weights(p);
        leave(v_empty + 8 * slot_of(count));
        if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
          for (int i = 0; i < kOutputs; ++i) o[i] *= shrink[i / 2 % 2];
        }
        round_weights<T>(p, s);
        count = next;
      };
      --block;
#pragma unroll 1
      for (; block >= clear; --block) advance(std::true_type());
#pragma unroll 1
      for (; block >= 0; --block) advance(std::false_type());

      mbarrier_wait(v_full + 8 * slot_of(count), parity_of(count));
    }

    // Epilogue. v~ and out_gate are fetched while the last product runs; a lane takes eight columns in every 32.
    // What comes from the tile's description is read again, rather than kept in registers through the loop.
    constexpr int kGroups = C::kDim / 32;
    const int rows = tile.rows;
    const int dim = static_cast<int>(a.size.head_dim);
    const bool vector = a.size.aligned16;
    const bool gated = a.out_gate.ptr != nullptr;
    T* y = static_cast<T*>(a.y.ptr) + tile.batch * a.y.batch + (tile.token + row) * a.y.token + tile.head * a.y.head +
           8 * quad;
    const T* z = static_cast<const T*>(a.out_gate.ptr) + tile.batch * a.out_gate.batch +
                 (tile.token + row) * a.out_gate.token + tile.head * a.out_gate.head + 8 * quad;
    constexpr uint32_t kOpen = std::is_same_v<T, bf16> ? 0x7f807f80u : 0x7c007c00u;  // +inf twice: a gate of exactly 1
    Bytes16 values[2][kGroups], gates[2][kGroups];
    const auto inside = [&](int h, int g) { return row + 8 * h < rows && 32 * g + 8 * quad < dim; };
    const auto fetch_operands = [&](int h) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        values[h][g] = Bytes16{{0, 0, 0, 0}};
        gates[h][g] = Bytes16{{kOpen, kOpen, kOpen, kOpen}};
        if (vector && inside(h, g)) {
          values[h][g] = *reinterpret_cast<const Bytes16*>(y + 8 * h * a.y.token + 32 * g);
        }
        if (vector && gated && inside(h, g)) {
          gates[h][g] = *reinterpret_cast<const Bytes16*>(z + 8 * h * a.out_gate.token + 32 * g);
        }
      }
    };
    if (tile.keys > 0) {
      hold_registers(o);
      hold_weights(p);
      wgmma_fence();
      issue_values(count % C::kStages);
      fetch_operands(0);
      if constexpr (C::kFetchBoth) fetch_operands(1);
      wgmma_wait<0>();
      hold_registers(o);
      hold_weights(p);
      leave(v_empty + 8 * (count % C::kStages));
      ++count;
    } else {
      fetch_operands(0);
      if constexpr (C::kFetchBoth) fetch_operands(1);
    }
    float (&tiles_of_o)[kOutputs / 4][4] = reinterpret_cast<float (&)[kOutputs / 4][4]>(o);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = sum[h];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const float own_weight = exp2_fast(own[h] - m[h]);
      total += own_weight;
      const float inverse = reciprocal_fast(total);
      if (row + 8 * h < rows && quad == 0) {
        a.lse[(tile.batch * a.size.heads + tile.head) * a.size.tokens + tile.token + row + 8 * h] =
            (m[h] + __log2f(total)) * 0.6931471805599453f;
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        float out[8];
        gather_quad(out, tiles_of_o, 4 * g, h, lane);
        alignas(16) T value[8], gate[8];
        *reinterpret_cast<Bytes16*>(value) = values[h][g];
        *reinterpret_cast<Bytes16*>(gate) = gates[h][g];
        if (!vector && inside(h, g)) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            value[i] = y[8 * h * a.y.token + 32 * g + i];
            if (gated) gate[i] = z[8 * h * a.out_gate.token + 32 * g + i];
          }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          out[i] = (out[i] + own_weight * to_float(value[i])) * (inverse * sigmoid_fast(to_float(gate[i])));
        }
        if (inside(h, g)) store8(y + 8 * h * a.y.token + 32 * g, out, vector);
      }
      if (!C::kFetchBoth && h == 0) fetch_operands(1);
    }
    leave(q_empty + 8 * q_slot);
    leave(shared_address(&shared.tile_empty[tiles % kTileSlots]));
  }
  if (warpgroup == 0) named_barrier_sync(own_turn, 256);  // the last turn that was passed on
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    chunk_attention_fwd_sm90_kernel(const __grid_constant__ Arguments a, const __grid_constant__ CUtensorMap k_map,
                                    const __grid_constant__ CUtensorMap v_map) {
  extern __shared__ uint8_t raw_shared[];
  Shared<C>& shared = *reinterpret_cast<Shared<C>*>(
      raw_shared + (1024 - static_cast<uint32_t>(__cvta_generic_to_shared(raw_shared)) % 1024) % 1024);
  const int warpgroup = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kTileSlots; ++i) {
      mbarrier_init(shared_address(&shared.tile_full[i]), 1);
      mbarrier_init(shared_address(&shared.tile_empty[i]), 4 * C::kConsumers + C::kLoaders);
    }
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(shared_address(&shared.q_full[i]), C::kLoaders);
      mbarrier_init(shared_address(&shared.q_empty[i]), 4 * C::kConsumers);
    }
    for (int i = 0; i < C::kStages; ++i) {
      mbarrier_init(shared_address(&shared.k_full[i]), 1);
      mbarrier_init(shared_address(&shared.v_full[i]), 1);
      mbarrier_init(shared_address(&shared.k_empty[i]), 4 * C::kConsumers);
      mbarrier_init(shared_address(&shared.v_empty[i]), 4 * C::kConsumers);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(C::kProducerRegisters));
    if (threadIdx.x >= 32) {
      feed_queries<C>(a, shared, threadIdx.x - 32);
    } else if (threadIdx.x == 0) {
      feed_blocks<C>(a, k_map, v_map, shared);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(C::kConsumerRegisters));
    consume<C>(a, shared, warpgroup - 1);
  }
}

// ---- launcher ---------------------------------------------------------------------------------------------------------

// Long sequences of keys want large blocks; short ones are bound by the work around each tile, which more warpgroups hide,
// and by keys that a block holds beyond those visible.
template <class T>
using Wide = Traits<T, 128, 2, 128>;
template <class T>
using WideShort = Traits<T, 128, 3, 64>;
template <class T>
using Narrow = Traits<T, 64, 3, 112>;
template <class T>
using NarrowShort = Traits<T, 64, 3, 64>;
constexpr int64_t kShortRows = 4096;        // chunk states a head, of 128 elements
constexpr int64_t kShortNarrowRows = 1024;  // of 64
constexpr int64_t kRowsForScalarQueries = 4096;

template <class C>
void launch(const AttentionFwdParams& params, const FwdScratch& scratch, cudaStream_t stream) {
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
  a.scale_log2 = static_cast<float>(std::fabs(params.scale) * 1.4426950408889634);
  a.q_sign = params.scale < 0 ? -1.0f : 1.0f;
  a.heads_per_group = static_cast<uint32_t>(s.heads / s.q_groups);

  const int64_t total = work_items(s, C::kRows) * s.heads;
  if (total == 0) return;
  constexpr int64_t kL2Budget = 10 << 20;  // bytes of keys and values that live in L2 beside what streams through
  const int64_t pairs = s.sequences * s.heads, pair_bytes = 4 * params.chunks.rows * s.head_dim;
  const int64_t section = std::min(pairs, std::max<int64_t>(1, ceil_div(kL2Budget, pair_bytes)));
  a.schedule.total = static_cast<uint32_t>(total);
  a.schedule.per_row = static_cast<uint32_t>(tiles_per_row(s, C::kRows));
  a.schedule.pairs = static_cast<uint32_t>(pairs);
  a.schedule.section = static_cast<uint32_t>(section);

  const CUtensorMapDataType type =
      std::is_same_v<typename C::T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const int64_t outer = params.chunks.compact ? s.heads : pairs;
  const CUtensorMap k_map = swizzled_rows_map(params.chunks.k, type, s.head_dim, params.chunks.rows, outer, C::kKeys);
  const CUtensorMap v_map = swizzled_rows_map(params.chunks.v, type, s.head_dim, params.chunks.rows, outer, C::kKeys);

  constexpr int kBytes = shared_bytes<C>();
  static_assert(kBytes <= 227 * 1024);
  const char* name = "chunk_attention_fwd_sm90";
  allow_shared_memory(chunk_attention_fwd_sm90_kernel<C>, kBytes, name);
  const int64_t blocks = std::min<int64_t>(total, device_attribute<cudaDevAttrMultiProcessorCount>());
  chunk_attention_fwd_sm90_kernel<C><<<grid_x(blocks, name), C::kThreads, kBytes, stream>>>(a, k_map, v_map);
  check_launch(name);
}

// Chunk rows of a sequence; of packed ones their mean.
int64_t rows_of_a_sequence(const AttentionFwdParams& params) {
  const int64_t rows = params.chunks.rows;
  return params.chunks.compact && params.size.sequences > 0 ? rows / params.size.sequences : rows;
}

template <class T>
void launch_for(const AttentionFwdParams& params, const FwdScratch& scratch, cudaStream_t stream) {
  const int64_t rows = rows_of_a_sequence(params);
  if (params.size.head_dim > 64) {
    rows <= kShortRows ? launch<WideShort<T>>(params, scratch, stream) : launch<Wide<T>>(params, scratch, stream);
  } else {
    rows <= kShortNarrowRows ? launch<NarrowShort<T>>(params, scratch, stream)
                             : launch<Narrow<T>>(params, scratch, stream);
  }
}

}  // namespace

namespace sm90 {

const char* fwd_refuses(const AttentionFwdParams& params) {
#ifndef RAT_EXT_SM90
  return "this build has no code for sm_90a";
#endif
  const Sizes& s = params.size;
  const ChunkStates& c = params.chunks;
  constexpr int64_t kMany = INT64_C(1) << 30;  // tile and row indices are 32-bit
  if (s.dtype != DType::bf16 && s.dtype != DType::f16) return "the dtype is not bfloat16 or float16";
  if (s.head_dim > 128) return "D is over 128";
  if (!std::isfinite(params.scale) || params.scale == 0.0) return "the scale is 0 or not finite";
  // The tensor maps want dense rows, a 16-byte aligned start, and at least one row.
  if (c.rows <= 0) return "there are no chunk states";
  if (c.rows > kMany) return "there are over 2^30 chunk states per head";
  if (c.head != c.rows * s.head_dim || (!c.compact && c.sequence != s.heads * c.head)) {
    return "chunk states are not contiguous";
  }
  if (reinterpret_cast<uintptr_t>(c.k) % 16 != 0 || reinterpret_cast<uintptr_t>(c.v) % 16 != 0) {
    return "chunk states are not 16-byte aligned";
  }
  // Rows of q that cannot be read in 16-byte pieces are read element by element, which only many keys make up for.
  if ((!s.aligned16 || s.head_dim % 16 != 0) && rows_of_a_sequence(params) < kRowsForScalarQueries) {
    return "rows of q are read element by element, and too few chunk states make up for it";
  }
  if (s.tokens > kMany || s.sequences * s.heads > kMany || work_items(s, 64) > kMany / s.heads) {
    return "the call is too large for 32-bit indices";
  }
  return is_hopper() ? nullptr : "the GPU is not of compute capability 9.0";
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
      entry<Wide<bf16>>("chunk_attention_fwd_sm90<bf16, 128>"),
      entry<Wide<f16>>("chunk_attention_fwd_sm90<f16, 128>"),
      entry<WideShort<bf16>>("chunk_attention_fwd_sm90<bf16, 128, short>"),
      entry<WideShort<f16>>("chunk_attention_fwd_sm90<f16, 128, short>"),
      entry<Narrow<bf16>>("chunk_attention_fwd_sm90<bf16, 64>"),
      entry<Narrow<f16>>("chunk_attention_fwd_sm90<f16, 64>"),
      entry<NarrowShort<bf16>>("chunk_attention_fwd_sm90<bf16, 64, short>"),
      entry<NarrowShort<f16>>("chunk_attention_fwd_sm90<f16, 64, short>"),
  };
  return {entries, static_cast<int>(sizeof(entries) / sizeof(entries[0]))};
}

}  // namespace rat::cuda
