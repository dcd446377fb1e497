// The fetching warp: finds a block's items, checks them, and fills the ring with their chunk states, ahead of the others.
#pragma once

#include "../ptx/bulk.cuh"
#include "../ptx/cp_async.cuh"
#include "../ptx/depend.cuh"
#include "args.cuh"

namespace rat::cuda {

// The first error wins; the host zeroes the word when it has seen it.
__device__ __forceinline__ void report(const Decode& a, PoolError code, int row, int64_t slot, int64_t detail) {
  int32_t* const error = a.p.pool.error;
  if (atomicCAS(error, 0, static_cast<int32_t>(code)) != 0) return;
  error[1] = row;
  error[2] = static_cast<int32_t>(min(slot, static_cast<int64_t>(INT32_MAX)));
  error[3] = static_cast<int32_t>(detail);
}

// What stands against a row, by the whole warp. `firsts`: slots[lane], of the first 32 rows.
__device__ __forceinline__ PoolError refusal(const Decode& a, int row, int64_t slot, int64_t length, int64_t firsts,
                                             int64_t& detail) {
  const DecodeParams& p = a.p;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  detail = length;
  if (slot >= p.pool.sequences) return PoolError::slot;
  if (p.slots) {
    bool same = lane < row && firsts == slot;
    for (int j = 32 + lane; j < row; j += 32) same = same || p.slots[j] == slot;
    if (__any_sync(kFullWarp, same)) return PoolError::duplicate;
  }
  if (length < 0 || static_cast<uint32_t>(length) / a.chunk_size > static_cast<uint64_t>(p.pool.rows)) {
    return PoolError::length;
  }
  const int64_t after = length + a.reserve;
  if (after > INT32_MAX) return PoolError::full;
  const int64_t closed = static_cast<uint32_t>(after) / a.chunk_size;
  if (closed > p.pool.rows) return PoolError::full;
  if (p.pool.page_table) {
    const int32_t* const table = p.pool.page_table + slot * (p.pool.rows >> a.page_shift);
    const int64_t pages = (closed + p.pool.page_rows - 1) >> a.page_shift;
    bool none = false;
    for (int64_t j = lane; j < pages; j += 32) none = none || table[j] < 0 || table[j] >= p.pool.pages;
    if (__any_sync(kFullWarp, none)) return PoolError::full;
  }
  if (p.rotary.cos && static_cast<uint32_t>(after - 1) / a.chunk_size >= static_cast<uint64_t>(p.rotary.rows)) {
    detail = p.rotary.rows;
    return PoolError::rotary;
  }
  return PoolError::none;
}

// Where the warp stands in the ring of stages.
struct RingPlace {
  int slot = 0;
  uint32_t round = 0;
  __device__ __forceinline__ void next(int stages) {
    if (++slot == stages) {
      slot = 0;
      round ^= 1;
    }
  }
};

// Keys [begin, end) of an item into a stage, by the whole warp.
template <class K>
__device__ __forceinline__ void fill_stage(const Decode& a, SharedHead& head, uint32_t stage, int slot,
                                           const Item& item, uint32_t begin, uint32_t end) {
  using S = typename K::S;
  const int D = static_cast<int>(a.p.head_dim), lane = static_cast<int>(threadIdx.x) % 32;
  const int count = static_cast<int>(end - begin);
  const char* const keys = static_cast<const char*>(a.p.pool.chunk_k);
  const char* const values = static_cast<const char*>(a.p.pool.chunk_v);
  const int row_bytes = D * static_cast<int>(sizeof(S));
  const uint32_t values_at = stage + K::kStageKeys * row_bytes;
  const uint32_t full = shared_address(&head.full[slot]);
#if __CUDA_ARCH__ >= 900
  if (a.bulk) {
    if (lane == 0) mbarrier_arrive_expect(full, 2 * count * row_bytes);
    __syncwarp();
    if (!a.p.pool.page_table) {
      if (lane < 2) {
        const int64_t from = state_row(a, item.entry, item.head, begin) * row_bytes;
        bulk_load(lane == 0 ? stage : values_at, (lane == 0 ? keys : values) + from, count * row_bytes, full);
      }
    } else {
      const uint32_t first = begin >> a.page_shift, pieces = ((end - 1) >> a.page_shift) - first + 1;
      for (uint32_t i = lane; i < 2 * pieces; i += 32) {
        const uint32_t piece = first + i / 2;
        const uint32_t from = max(begin, piece << a.page_shift), to = min(end, (piece + 1) << a.page_shift);
        const int64_t source = state_row(a, item.entry, item.head, from) * row_bytes;
        bulk_load((i % 2 == 0 ? stage : values_at) + (from - begin) * row_bytes, (i % 2 == 0 ? keys : values) + source,
                  (to - from) * row_bytes, full);
      }
    }
    if constexpr (!K::kScaled) return;
  }
#endif
  if (!a.bulk) {
    const bool wide = row_bytes % 16 == 0;
    const int unit = wide ? 16 : 8, units = row_bytes / unit;
    for (int i = lane; i < count * units; i += 32) {
      const int row = i / units, at = i % units * unit;
      const int64_t source = state_row(a, item.entry, item.head, begin + row) * row_bytes + at;
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
    for (int i = lane; i < count; i += 32) {
      const int64_t row = state_row(a, item.entry, item.head, begin + i);
      cp_async4(scales + 4 * i, a.p.pool.scale_k + row, true);
      cp_async4(scales + 4 * (K::kStageKeys + i), a.p.pool.scale_v + row, true);
    }
  }
  cp_async_arrive(full);
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
  const unsigned heads = static_cast<unsigned>(a.p.heads), ways = static_cast<unsigned>(a.ways);
  if (ways > 1 && !last_of(a.read + static_cast<int64_t>(entry) * heads + head, ways)) return;
  if (last_of(a.heads_in + entry, heads)) {
    a.p.pool.lengths[entry] = static_cast<int32_t>(length + static_cast<uint32_t>(a.tokens));
  }
}

struct Candidate {
  int64_t slot, length;
};

// Reads past L1: it may be done before the kernel that wrote them is through, and again afterwards.
__device__ __forceinline__ Candidate read_candidate(const Decode& a, uint32_t index) {
  Candidate c{-1, 0};
  if (index < a.candidates) {
    const uint32_t row = index % a.pairs / static_cast<uint32_t>(a.p.heads);
    c.slot = a.p.slots ? __ldcg(a.p.slots + row) : row;
    if (c.slot >= 0 && c.slot < a.p.pool.sequences) c.length = __ldcg(a.p.pool.lengths + c.slot);
  }
  return c;
}

// Before the kernels before this one are through, nothing may be read that they write. But what they have left so far tells
// where this one will most likely read: those lines are brought into L2. By the consumers, for the block's first pair:
template <class K>
__device__ __forceinline__ void warm_tokens(const Decode& a) {
#if __CUDA_ARCH__ >= 900
  using T = typename K::T;
  const int line = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const uint32_t pair = blockIdx.x % a.pairs;
  const int64_t row = pair / static_cast<uint32_t>(a.p.heads), head = pair % static_cast<uint32_t>(a.p.heads);
  const int64_t q_heads = a.p.heads / a.p.q_groups, k_heads = a.p.heads / a.p.k_groups;
  if (line * 128 >= a.p.head_dim * static_cast<int64_t>(sizeof(T))) return;
  const int64_t d = line * (128 / static_cast<int64_t>(sizeof(T)));
  for (int i = 0; i < a.tokens; ++i) {
    if (warp == 0) prefetch_l2(row_of<T>(a.p.q, row, i, head / q_heads, d));
    if (warp == 1) prefetch_l2(row_of<T>(a.p.k, row, i, head / k_heads, d));
    if (warp == 2) prefetch_l2(row_of<T>(a.p.v, row, i, head, d));
    if (warp == 3) prefetch_l2(row_of<T>(a.p.gate, row, i, head, d));
    if (warp == 4 && a.p.out_gate.ptr) prefetch_l2(row_of<T>(a.p.out_gate, row, i, head, d));
  }
#endif
}

// By the fetching warp: states of the block's first pair.
template <class K>
__device__ __forceinline__ void warm_states(const Decode& a) {
#if __CUDA_ARCH__ >= 900
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Candidate c = read_candidate(a, blockIdx.x);
  if (c.slot < 0 || c.slot >= a.p.pool.sequences || c.length <= 0) return;
  const uint32_t head = blockIdx.x % a.pairs % static_cast<uint32_t>(a.p.heads),
                 length = static_cast<uint32_t>(c.length);
  const int D = static_cast<int>(a.p.head_dim);
  const int64_t place = c.slot * a.p.pool.ring + (length - 1) % static_cast<uint32_t>(a.p.pool.ring);
  if (lane < 16 && lane % 8 * 32 < D) {
    const void* const running = lane < 8 ? a.p.pool.running_k : a.p.pool.running_v;
    prefetch_l2(static_cast<const float*>(running) + (place * a.p.heads + head) * D + lane % 8 * 32);
  }
  const uint32_t chunk = length / a.chunk_size;
  if (lane >= 16 && a.p.rotary.cos && chunk < a.p.rotary.rows && lane % 8 * 32 < D / 2) {
    const void* const table = lane < 24 ? a.p.rotary.cos : a.p.rotary.sin;
    prefetch_l2(static_cast<const float*>(table) + static_cast<int64_t>(chunk) * (D / 2) + lane % 8 * 32);
  }
  const uint32_t first = blockIdx.x / a.pairs * kSlice,
                 end = min(min(chunk, first + kSlice), static_cast<uint32_t>(a.p.pool.rows));
  if (a.bulk && !a.p.pool.page_table && first < end && lane < 2) {
    const int64_t row_bytes = D * static_cast<int64_t>(sizeof(typename K::S));
    const char* const states = static_cast<const char*>(lane == 0 ? a.p.pool.chunk_k : a.p.pool.chunk_v);
    bulk_prefetch_l2(states + state_row(a, static_cast<int>(c.slot), static_cast<int>(head), first) * row_bytes,
                     (end - first) * static_cast<uint32_t>(row_bytes));
  }
#endif
}

template <class K>
__device__ __forceinline__ void fetch(const Decode& a, SharedHead& head, uint32_t ring) {
  const DecodeParams& p = a.p;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Ring<kItems> items(head.items);
  RingPlace place;
  for (uint32_t base = blockIdx.x; base < a.candidates; base += 32 * gridDim.x) {
    const uint32_t mine = base + lane * gridDim.x;
    const int64_t firsts = p.slots && lane < p.batch ? __ldcg(p.slots + lane) : -1;
    const Candidate candidate = read_candidate(a, mine);
    bool runs = false;  // the candidate of this lane
#pragma unroll 1
    for (int i = 0; i < 32; ++i) {
      const uint32_t index = base + i * gridDim.x;
      if (index >= a.candidates) break;
      const uint32_t pair = index % a.pairs;
      const int64_t slot = __shfl_sync(kFullWarp, candidate.slot, i);
      const int64_t length = __shfl_sync(kFullWarp, candidate.length, i);
      Item item;
      item.row = static_cast<int>(pair / static_cast<uint32_t>(p.heads));
      item.head = static_cast<int>(pair % static_cast<uint32_t>(p.heads));
      item.way = static_cast<int>(index / a.pairs);
      item.entry = static_cast<int>(slot);
      item.length = static_cast<uint32_t>(length);
      item.kind = ItemKind::zeros;
      item.slices = 0;
      item.tail = false;
      uint32_t keys = 0;
      if (slot >= 0) {
        int64_t detail;
        const PoolError error = refusal(a, item.row, slot, length, firsts, detail);
        if (error == PoolError::none) {
          item.kind = ItemKind::run;
          keys = item.length / a.chunk_size;
          item.slices = max(1, static_cast<int>((keys + kSlice - 1) / kSlice));
          item.tail = (item.slices - 1) % a.ways == item.way;
          runs = runs || lane == i;
        } else if (lane == 0) {
          report(a, error, item.row, slot, detail);
        }
      }
      // Nothing to do: the pair is another way's.
      if (item.kind == ItemKind::run ? item.way >= item.slices : item.way > 0) continue;
      items.wait_empty();
      if (lane == 0) {
        head.item[items.slot()] = item;
        mbarrier_arrive(items.full());
      }
      items.next();
      for (uint32_t first = item.way * kSlice; first < keys; first += a.ways * kSlice) {
        const uint32_t end = min(keys, first + kSlice);
        for (uint32_t begin = first; begin < end; begin += K::kStageKeys) {
          mbarrier_wait(shared_address(&head.empty[place.slot]), place.round ^ 1);
          fill_stage<K>(a, head, ring + place.slot * a.stage_bytes, place.slot, item, begin,
                        min(end, begin + K::kStageKeys));
          place.next(a.stages);
        }
      }
    }
    if (runs) {
      const uint32_t pair = mine % a.pairs;
      advance_length(a, static_cast<int>(candidate.slot), static_cast<int>(pair % static_cast<uint32_t>(p.heads)),
                     static_cast<uint32_t>(candidate.length));
    }
  }
  items.wait_empty();
  if (lane == 0) {
    head.item[items.slot()].kind = ItemKind::end;
    mbarrier_arrive(items.full());
  }
}

}  // namespace rat::cuda
