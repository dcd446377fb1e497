// The fetching warp: finds a block's items, checks them, and fills the ring with their chunk states, ahead of the others.
#pragma once

#include "../device/claims.cuh"
#include "../ptx/bulk.cuh"
#include "../ptx/cp_async.cuh"
#include "../ptx/depend.cuh"
#include "args.cuh"

namespace rat::cuda {

// The first error wins; the host zeroes the word when it has seen it.
__device__ __forceinline__ void report_inline(const Decode& a, PoolError code, int row, int64_t slot, int64_t length) {
  const int64_t detail = code == PoolError::rotary ? min(a.p.rotary.rows, int64_t{INT32_MAX}) : length;
  int32_t* const error = a.p.pool.error;
  if (atomicCAS(error, 0, static_cast<int32_t>(code)) != 0) return;
  error[1] = row;
  error[2] = static_cast<int32_t>(min(slot, static_cast<int64_t>(INT32_MAX)));
  error[3] = static_cast<int32_t>(detail);
}

// The same, out of the way of a kernel that is short of registers.
static __device__ __noinline__ void report(const Decode& a, PoolError code, int row, int64_t slot, int64_t length) {
  report_inline(a, code, row, slot, length);
}

// What stands against a row, by itself.
__device__ __forceinline__ PoolError refusal(const Decode& a, int64_t slot, int64_t length) {
  const DecodeParams& p = a.p;
  if (slot >= p.pool.sequences) return PoolError::slot;
  if (length < 0) return PoolError::length;
  const uint32_t rows = static_cast<uint32_t>(min(p.pool.rows, int64_t{INT32_MAX}));
  if (static_cast<uint32_t>(length) / a.chunk_size > rows) return PoolError::length;
  const uint32_t after = static_cast<uint32_t>(length) + static_cast<uint32_t>(a.reserve);
  if (after > INT32_MAX || after / a.chunk_size > rows) return PoolError::full;
  if (p.rotary.cos && (after - 1) / a.chunk_size >= p.rotary.rows) return PoolError::rotary;
  return PoolError::none;
}

// Whether a page is missing for the new tokens of a sequence that is right by itself: each lane for its own, by the whole warp.
__device__ __forceinline__ bool lacks_page(const Decode& a, int64_t slot, uint32_t length, bool asks) {
  const Pool& pool = a.p.pool;
  const uint32_t closed = (length + static_cast<uint32_t>(a.reserve)) / a.chunk_size;
  const uint32_t pages = (closed + static_cast<uint32_t>(pool.page_rows) - 1) >> a.page_shift;
  return page_missing(pool, pool.rows >> a.page_shift, slot, asks ? pages : 0);
}

// What stands against a row that is right by itself: an earlier row of the same slot, a page that is missing. By the whole warp. Not
// inline: see run_block().
static __device__ __noinline__ PoolError refusal_among(const Decode& a, int row, int slot, uint32_t length,
                                                       const SharedHead& head) {
  const Pool& pool = a.p.pool;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (a.p.slots) {
    bool same = false;
#pragma unroll
    for (int i = 0; i < kKnownRows / 32; ++i) same |= 32 * i + lane < row && head.slot[32 * i + lane] == slot;
    if (__any_sync(kFullWarp, same)) return PoolError::duplicate;
  }
  if (pool.page_table && __any_sync(kFullWarp, lacks_page(a, slot, length, lane == 0))) return PoolError::full;
  return PoolError::none;
}

// Where a warp stands in the ring of stages: at a fill, and the place that it has. A place has a barrier that says when it may be
// filled again, and one that says when it is full. On tensor cores a warp does not wait for each fill, and must not confuse one
// with the one before it, of which only the parity differs: there fills have barriers of their own, in turn. The fill of
// kFills before was in a slice that all warps are done with: a warp is at most one slice ahead of the others, and three where
// others join.
struct RingPlace {
  int slot = 0;
  uint32_t round = 0, count = 0;
  __device__ __forceinline__ void advance(int fills, int stages) {
    count += static_cast<uint32_t>(fills);
    for (slot += fills; slot >= stages; slot -= stages) round ^= 1;
  }
  template <class K>
  __device__ __forceinline__ uint32_t full(SharedHead& head) const {
    return shared_address(&head.full[K::kMatrix ? count % K::kFills : slot]);
  }
  template <class K>
  __device__ __forceinline__ uint32_t full_parity() const {
    return K::kMatrix ? count / K::kFills % 2 : round;
  }
  __device__ __forceinline__ uint32_t empty(SharedHead& head) const { return shared_address(&head.empty[slot]); }
};

#if __CUDA_ARCH__ >= 900
// Whether copies by lanes are needed beside bulk ones: rows of e4m3 elements may not be multiples of 16 bytes.
template <class K>
constexpr bool kLaneCopies = K::kScaled;
#else
template <class K>
constexpr bool kLaneCopies = true;
#endif

// Keys [begin, end) of an item into a stage, by the whole warp.
template <class K>
__device__ __forceinline__ void fill_stage(const Decode& a, uint32_t full, uint32_t stage, int entry, int head,
                                           uint32_t begin, uint32_t end) {
  using S = typename K::S;
  const int D = static_cast<int>(a.p.head_dim), lane = static_cast<int>(threadIdx.x) % 32;
  const int count = static_cast<int>(end - begin);
  const char* const keys = static_cast<const char*>(a.p.pool.chunk_k);
  const char* const values = static_cast<const char*>(a.p.pool.chunk_v);
  const int row_bytes = D * static_cast<int>(sizeof(S));
  const uint32_t values_at = stage + K::kStageKeys * row_bytes;
#if __CUDA_ARCH__ >= 900
  if (a.bulk) {
    if (lane == 0) mbarrier_arrive_expect(full, 2 * count * row_bytes);
    __syncwarp();
    // Pieces that are contiguous: a page, or all; keys by even lanes, values by odd ones.
    const int shift = a.p.pool.page_table ? a.page_shift : 31;
    const uint32_t first = begin >> shift, last = (end - 1) >> shift;
    const char* const states = lane % 2 == 0 ? keys : values;
#pragma unroll 1
    for (uint32_t piece = first + lane / 2; piece <= last; piece += 16) {
      const uint32_t from = max(begin, piece << shift), to = piece == last ? end : (piece + 1) << shift;
      bulk_load_once((lane % 2 == 0 ? stage : values_at) + (from - begin) * row_bytes,
                     states + state_row(a, entry, head, from) * row_bytes, (to - from) * row_bytes, full);
    }
  }
#endif
  if constexpr (kLaneCopies<K>) {
    if (!a.bulk) {
      const bool wide = row_bytes % 16 == 0;
      const int unit = wide ? 16 : 8, units = row_bytes / unit;
#pragma unroll 1
      for (int i = lane; i < count * units; i += 32) {
        const int row = i / units, at = i % units * unit;
        const int64_t source = state_row(a, entry, head, begin + row) * row_bytes + at;
        const uint32_t to = row * row_bytes + at;
        if (wide) {
          cp_async16(stage + to, keys + source, true);
          cp_async16(values_at + to, values + source, true);
        } else {
          cp_async8(stage + to, keys + source, true);
          cp_async8(values_at + to, values + source, true);
        }
      }
    }
    if constexpr (K::kScaled) {
      const uint32_t scales = values_at + K::kStageKeys * row_bytes;
#pragma unroll 1
      for (int i = lane; i < count; i += 32) {
        const int64_t row = state_row(a, entry, head, begin + i);
        cp_async4(scales + 4 * i, a.p.pool.scale_k + row, true);
        cp_async4(scales + 4 * (K::kStageKeys + i), a.p.pool.scale_v + row, true);
      }
    }
    if (K::kScaled || !a.bulk) cp_async_arrive(full);
  }
}

// Arrivals that fill a stage: the one that says how many bytes come, and one for each lane where lanes copy.
template <class K>
__device__ __forceinline__ uint32_t fills(const Decode& a) {
  return (a.bulk ? 1 : 0) + (!a.bulk || K::kScaled ? 32 : 0);
}

// Counts an arrival; true for the last of `all`, which leaves the counter at zero.
__device__ __forceinline__ bool last_of(unsigned* counter, unsigned all) {
  return atomicInc(counter, all - 1) == all - 1;
}

// A way of a (row, head) has read the length. Who learns that all have advances it: nobody else will read it in this launch.
__device__ __forceinline__ void advance_length(const Decode& a, int entry, int head, uint32_t length) {
  const unsigned heads = a.heads, ways = static_cast<unsigned>(a.ways);
  if (ways > 1 && !last_of(a.read + static_cast<int64_t>(entry) * heads + head, ways)) return;
  if (last_of(a.heads_in + entry, heads)) {
    a.p.pool.lengths[entry] = static_cast<int32_t>(length + static_cast<uint32_t>(a.tokens));
  }
}

struct Candidate {
  int64_t slot, length;
};

// Reads past L1: it may be done before the kernel that wrote them is through, and again afterwards.
__device__ __forceinline__ Candidate read_candidate(const Decode& a, const int64_t* slots, uint32_t index) {
  Candidate c{-1, 0};
  if (index < a.candidates) {
    const uint32_t row = index % a.pairs / a.heads;
    c.slot = slots ? __ldcg(slots + row) : row;
    if (c.slot >= 0 && c.slot < a.p.pool.sequences) c.length = __ldcg(a.p.pool.lengths + c.slot);
  }
  return c;
}

// Before the kernels before this one are through, nothing may be read that they write. But what they have left so far tells
// where this one will most likely read: those lines are brought into L2, for the block's first pair. By the consumers:
template <class K>
__device__ __forceinline__ void warm_tokens(const Decode& a) {
#if __CUDA_ARCH__ >= 900
  using T = typename K::T;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const uint32_t pair = blockIdx.x % a.pairs, row = pair / a.heads, head = pair % a.heads;
  if (warp >= kInputs || lane * 128 >= a.p.head_dim * static_cast<int64_t>(sizeof(T))) return;
  const Rows& rows = a.input[warp];
  const uint32_t d = lane * (128 / static_cast<uint32_t>(sizeof(T)));
  if (rows.ptr) prefetch_l2(row_of<T>(rows, row, 0, head / a.input_share[warp], d));
#endif
}

// By the fetching warp: states of the block's first pair. If the kernels before are through, as it mostly learns within a few
// glances, they are not asked for twice. Where a block has many pairs, the first is a small part of its time, and asking twice costs
// more than it brings.
template <class K>
__device__ __forceinline__ void warm_states(const Decode& a, const SharedHead& head_of_block) {
#if __CUDA_ARCH__ >= 900
  constexpr int kFewPairs = 2, kGlances = 8;
  if (a.candidates > kFewPairs * gridDim.x) return;
#pragma unroll 1
  for (int i = 0; i < kGlances; ++i) {
    if (*static_cast<const volatile int*>(&head_of_block.through)) return;
  }
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Candidate c = read_candidate(a, a.named, blockIdx.x);
  if (c.slot < 0 || c.slot >= a.p.pool.sequences || c.length <= 0) return;
  const uint32_t head = blockIdx.x % a.pairs % a.heads, chunk = static_cast<uint32_t>(c.length) / a.chunk_size;
  const uint32_t first = blockIdx.x / a.pairs * kSlice;
  const uint32_t end = min(min(chunk, first + kSlice), static_cast<uint32_t>(min(a.p.pool.rows, int64_t{INT32_MAX})));
  if (a.bulk && !a.p.pool.page_table && first < end && lane < 2) {
    const int64_t row_bytes = a.p.head_dim * static_cast<int64_t>(sizeof(typename K::S));
    const char* const states = static_cast<const char*>(lane == 0 ? a.p.pool.chunk_k : a.p.pool.chunk_v);
    bulk_prefetch_l2(states + state_row(a, static_cast<int>(c.slot), static_cast<int>(head), first) * row_bytes,
                     (end - first) * static_cast<uint32_t>(row_bytes));
  }
#endif
}

// By a scanning warp: running states of the block's first pair, and its row of the rotary tables.
template <class K>
__device__ __forceinline__ void warm_running(const Decode& a) {
#if __CUDA_ARCH__ >= 900
  const Pool& pool = a.p.pool;
  const Candidate c = read_candidate(a, a.named, blockIdx.x);
  if (c.slot < 0 || c.slot >= pool.sequences || c.length <= 0) return;
  constexpr uint32_t kLine = 128 / sizeof(float);
  const uint32_t what = threadIdx.x % 32 / 8, d = threadIdx.x % 8 * kLine, D = static_cast<uint32_t>(a.p.head_dim);
  const uint32_t head = blockIdx.x % a.pairs % a.heads, chunk = static_cast<uint32_t>(c.length) / a.chunk_size;
  if (what < 2) {
    const uint32_t turn = (static_cast<uint32_t>(c.length) - 1) % static_cast<uint32_t>(pool.ring);
    const int64_t place = c.slot * pool.ring + turn;
    const void* const states = what == 0 ? pool.running_k : pool.running_v;
    if (d < D) prefetch_l2(static_cast<const float*>(states) + (place * a.heads + head) * D + d);
  } else if (a.p.rotary.cos && d < D / 2 && chunk < a.p.rotary.rows) {
    const void* const table = what == 2 ? a.p.rotary.cos : a.p.rotary.sin;
    prefetch_l2(static_cast<const float*>(table) + static_cast<int64_t>(chunk) * (D / 2) + d);
  }
#endif
}

template <class K>
__device__ __forceinline__ void fetch(const Decode& a, SharedHead& head, uint32_t ring) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Ring<kItems> items(head.items);
  RingPlace place;
  if (a.p.slots && !a.admitted) {
#pragma unroll
    for (int row = lane; row < kKnownRows; row += 32) {
      const int64_t slot = row < a.p.batch ? __ldcg(a.p.slots + row) : -1;
      head.slot[row] = slot >= 0 && slot < a.p.pool.sequences ? static_cast<int>(slot) : -1;
    }
    __syncwarp();
  }
#pragma unroll 1
  for (uint32_t base = blockIdx.x; base < a.candidates; base += 32 * gridDim.x) {
    // Each lane looks at a candidate; then they are gone through in turn.
    const uint32_t mine = base + lane * gridDim.x;
    const Candidate c = read_candidate(a, a.p.slots, mine);
    Item item;
    item.row = static_cast<int>(mine % a.pairs / a.heads);
    item.head = static_cast<int>(mine % a.pairs % a.heads);
    item.way = static_cast<int>(mine / a.pairs);
    item.entry = static_cast<int>(c.slot);
    item.length = static_cast<uint32_t>(c.length);
    item.keys = item.length / a.chunk_size;
    item.offset = item.length - item.keys * a.chunk_size;
    item.slices = max(1, static_cast<int>((item.keys + kSlice - 1) / kSlice));
    // Way w takes slices w, w + ways ... A last slice that is short is no part of its own.
    item.ways = min(a.ways, max(1, static_cast<int>(item.keys / kSlice)));
    item.tail = (item.slices - 1) % item.ways == item.way;
    PoolError error = PoolError::none;
    item.kind = ItemKind::zeros;
    if (c.slot >= 0) {
      error = refusal(a, c.slot, c.length);
      if (error == PoolError::none) item.kind = ItemKind::run;
    }
    const auto fill = [&](int i, int entry, int way, int ways) {
      const uint32_t keys = __shfl_sync(kFullWarp, item.keys, i);
      const int of_head = __shfl_sync(kFullWarp, item.head, i);
#pragma unroll 1
      for (uint32_t begin = way * kSlice; begin < keys;) {
        const uint32_t end = min(keys, begin + K::kStageKeys);
        mbarrier_wait(place.empty(head), place.round ^ 1);
        fill_stage<K>(a, place.template full<K>(head), ring + place.slot * a.stage_bytes, entry, of_head, begin, end);
        place.advance(1, a.stages);
        begin += K::kStageKeys;
        if (begin % kSlice == 0) begin += (ways - 1) * kSlice;
      }
    };
    // Of drafts, the others are told of an item before the states of the one before are asked for: scanning takes its time.
    constexpr bool kAhead = K::kJoiners > 0;
    int told = -1;
    const auto fill_told = [&] {
      if (told >= 0) {
        fill(told, __shfl_sync(kFullWarp, item.entry, told), __shfl_sync(kFullWarp, item.way, told),
             __shfl_sync(kFullWarp, item.ways, told));
      }
    };
#pragma unroll 1
    for (int i = 0; i < 32 && base + i * gridDim.x < a.candidates; ++i) {
      const int entry = __shfl_sync(kFullWarp, item.entry, i), row = __shfl_sync(kFullWarp, item.row, i);
      bool runs = __shfl_sync(kFullWarp, static_cast<int>(item.kind), i) == static_cast<int>(ItemKind::run);
      if (runs && !a.admitted && (a.p.slots || a.p.pool.page_table)) {
        const PoolError found = refusal_among(a, row, entry, __shfl_sync(kFullWarp, item.length, i), head);
        if (found != PoolError::none) {
          runs = false;
          if (lane == i) {
            item.kind = ItemKind::zeros;
            error = found;
          }
        }
      }
      if (lane == i && error != PoolError::none) report(a, error, row, c.slot, c.length);
      // Is the pair another way's?
      const int way = __shfl_sync(kFullWarp, item.way, i), ways = __shfl_sync(kFullWarp, item.ways, i);
      if (runs ? way >= ways : way > 0) continue;
      items.wait_empty();
      if (lane == i) {
        head.item[items.slot()] = item;
        mbarrier_arrive(items.full());
      }
      items.next();
      if constexpr (kAhead) {
        fill_told();
        told = runs ? i : -1;
      } else if (runs) {
        fill(i, entry, way, ways);
      }
    }
    if constexpr (kAhead) fill_told();
    if (item.kind == ItemKind::run && mine < a.candidates) advance_length(a, item.entry, item.head, item.length);
  }
  items.wait_empty();
  if (lane == 0) {
    head.item[items.slot()].kind = ItemKind::end;
    mbarrier_arrive(items.full());
  }
}

}  // namespace rat::cuda
