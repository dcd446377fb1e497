// One or several decode steps for every row of a batch, in one launch: scan the new tokens, attend to the chunk states, append,
// advance.
//
// Bytes: the chunk states, 2 C D per (row, head), read once; the rest is small. Blocks stay and take (row, head) pairs in turn.
// In each, one warp fetches: it reads slots and lengths, checks the row, and copies chunk states into a ring of shared memory,
// as far ahead as the ring allows, into the next pairs too (fetch.cuh). One scans the new tokens, or two (states.cuh). Eight
// attend: by tensor cores, each 32 keys of a slice (matrix.cuh), or their lane groups take keys in turn, a few at a time, each with
// a running softmax in registers (attend.cuh). They also join what they have of a slice, and slices; in drafts of many pairs four
// more warps do, and those that attend go on.
//
// Keys are cut into slices of a fixed number. A slice has its own softmax, and slices are joined in order. So a row's bits
// depend on its own length alone: not on the batch, not on how many blocks share a pair, and not on the number of new tokens.
// Where blocks share a pair (a way is the part of one), the slices meet in scratch memory, and the last of the ways joins them.
//
// Nothing from a length is decided on the host: a CUDA graph may replay the step. For the step a length is read once in each way, by
// its fetching warp; the last way of a row to have read it advances it. Counters belong to the sequences of the pool, partial
// results to the call: steps over disjoint sequences may run at the same time. A counter wraps to zero with the last arrival, so
// the workspace is zeroed once, when the cache is made.
//
// What is not finite becomes what the definition makes of it: a score of -inf weighs 0, also where a group has seen
// nothing else; one of +inf or NaN, or nothing but -inf, makes y NaN; and the weight of each key that the token sees
// multiplies its value, 0 * inf = NaN, but no value that it does not see.
#include <algorithm>
#include <type_traits>

#include "decode/attend.cuh"
#include "decode/fetch.cuh"
#include "decode/matrix.cuh"
#include "recurrence/scan_launch.h"

namespace rat::cuda {
namespace {

// All tokens of a (row, head) that is skipped.
template <class K>
__device__ __forceinline__ void store_zeros(const Decode& a, const Item& item) {
  static_assert(K::kColumns <= K::kJoinThreads);
  const int d = join_thread<K>();
  if (d >= a.p.head_dim) return;
  using T = typename K::T;
#pragma unroll 1
  for (int i = 0; i < a.tokens; ++i) *out_row_of<T>(a.p.y, item.row, i, item.head, d) = from_float<T>(0.0f);
}

// Of a pair that blocks share, by the last of its ways: joins the slices, in order. Partial results pass through shared memory, so
// that all are on their way at once: through the ring where the block has no other pair, else where the last slice's softmaxes lie.
template <class K>
__device__ __forceinline__ void finish_ways(const Decode& a, char* memory, const SharedLayout& layout, const Item& item,
                                            float* values, const float* out_gate) {
  constexpr int kEach = Share<K>::kEach;
  static_assert(K::N <= K::kJoinThreads / 32);  // a warp for each token, below
  SharedHead& head = *reinterpret_cast<SharedHead*>(memory);
  join_sync<K>();  // all have stored their part
  const int thread = join_thread<K>(), warp = thread / 32, lane = thread % 32;
  if (thread == 0) {
    unsigned* const arrived = a.arrived + static_cast<int64_t>(item.entry) * a.heads + item.head;
    // Releases what the block has stored, and acquires what the others had before they arrived.
    head.last =
        atomic_inc_ordered(arrived, static_cast<unsigned>(item.ways) - 1) == static_cast<unsigned>(item.ways) - 1;
  }
  join_sync<K>();
  if (head.last == 0) return;

  const bool only = a.candidates <= gridDim.x;
  float* const room = only ? reinterpret_cast<float*>(memory + layout.ring) : values;
  const int D = static_cast<int>(a.p.head_dim), row = D + 8;
  const int places = (only ? a.stages * a.stage_bytes / 4
                           : (K::kMatrix && K::kJoiners == 0 ? 2 : 1) * K::N * kConsumerWarps * K::kColumns) /
                     row;
  const auto rows_of = [&](int i) { return 1 + static_cast<int>((keys_of<K>(a, item, i) + kSlice - 1) / kSlice); };
  const int most = rows_of(a.tokens - 1), together = max(1, places / most);  // tokens
  const Share<K> share(a);
  Joined<kEach> joined;
  float own_score = 0.0f, own_value[kEach], top = kNoScore;
#pragma unroll 1
  for (int begin = 0; begin < a.tokens; begin += together) {
    const int end = min(begin + together, a.tokens);
#pragma unroll 1
    for (int first = 0; first < most; first += places) {  // more than once with one token alone
      const int count = min(places, most - first);
#pragma unroll 1
      for (int i = begin; i < end; ++i) {
        const float* const from = partial_row(a, item, i, first);
        const uint32_t to = shared_address(room + (i - begin) * count * row);
#pragma unroll 1
        for (int at = thread * 4; at < count * row; at += K::kJoinThreads * 4) {
          cp_async16(to + 4 * at, from + at, true);
        }
      }
      cp_async_commit();
      cp_async_wait<0>();
      __syncwarp();  // its lanes may have left the loop apart
      join_sync<K>();
      // A warp for each token finds the weights that a slice and those before it are joined by: behind the maximum and the sum.
      if (warp < end - begin) {
        float* const of_token = room + warp * count * row + D;
        if (first == 0) top = kNoScore;
#pragma unroll 1
        for (int base = first == 0 ? 1 : 0; base < count; base += 32) {
          float* const at = of_token + (base + lane) * row;
          const float maximum = base + lane < count ? *at : kNoScore;
          float upto = maximum;
#pragma unroll
          for (int step = 1; step < 32; step *= 2) {
            const float lower = __shfl_up_sync(kFullWarp, upto, step);
            if (lane >= step) upto = fmaxf(upto, lower);
          }
          upto = fmaxf(upto, top);
          float before = __shfl_up_sync(kFullWarp, upto, 1);
          if (lane == 0) before = top;
          top = __shfl_sync(kFullWarp, upto, 31);
          if (base + lane < count) {
            at[0] = upto;
            at[2] = weight_of<typename K::T>(before - upto);
            at[3] = weight_of<typename K::T>(maximum - upto);
          }
        }
      }
      __syncwarp();
      join_sync<K>();
      if (share.live && share.token >= begin && share.token < end) {
        const float* const rows = room + (share.token - begin) * count * row;
        const int last = min(count, rows_of(share.token) - first);
        int at = 0;
        if (first == 0) {  // the own state comes first
          clear(joined);
          own_score = rows[D];
          load_floats(rows + share.d, own_value);
          at = 1;
        }
#pragma unroll 2
        for (; at < last; ++at) {
          const float* const slice = rows + at * row;
          const float4 of = *reinterpret_cast<const float4*>(slice + D);
          float value[kEach];
          load_floats(slice + share.d, value);
          joined.maximum = of.x;
          join(joined, of.z, of.w, of.y, value);
        }
        if (first + count >= most) store_output<K>(a, item, share, joined, own_score, own_value, out_gate);
      }
      __syncwarp();
      join_sync<K>();  // they have been read
    }
  }
}

// Waits for the stages of keys [first, last) in turn, and gives each back. visit(first key, stage).
template <class K, class Visit>
__device__ __forceinline__ void walk_stages(const Decode& a, SharedHead& head, const char* ring, const Item& item,
                                            uint32_t first, uint32_t last, RingPlace& place, const Visit& visit) {
#pragma unroll 1
  for (uint32_t base = first; base < last; base += K::kStageKeys) {
    const bool fetched = base < item.keys;
    if (fetched) mbarrier_wait(place.template full<K>(head), place.template full_parity<K>());
    visit(base, reinterpret_cast<const typename K::S*>(ring + place.slot * a.stage_bytes));
    if (fetched) {
      __syncwarp();
      if (threadIdx.x % 32 == 0) mbarrier_arrive(place.empty(head));
      place.advance(1, a.stages);
    }
  }
}

// The same of slice [first, last) by a warp that has keys in one stage alone: it waits for no other. warp: which keys.
// visit(first key, stage), where the stage was not fetched too: there may be new keys behind those that were.
template <class K, class Visit>
__device__ __forceinline__ void visit_own_stage(const Decode& a, SharedHead& head, const char* ring, const Item& item,
                                                uint32_t first, uint32_t last, int warp, RingPlace& place,
                                                const Visit& visit) {
  static_assert(kSlice / K::kStageKeys <= K::kFills / (K::kJoiners > 0 ? 4 : 2));
  const uint32_t own = static_cast<uint32_t>(warp / K::kReaders), end = min(last, item.keys);
  const uint32_t fills = end > first ? (end - first + K::kStageKeys - 1) / K::kStageKeys : 0;
  RingPlace mine = place;
  mine.advance(static_cast<int>(own), a.stages);
  if (own < fills) mbarrier_wait(mine.template full<K>(head), mine.template full_parity<K>());
  visit(first + own * K::kStageKeys, reinterpret_cast<const typename K::S*>(ring + mine.slot * a.stage_bytes));
  if (own < fills) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(mine.empty(head));
  }
  place.advance(static_cast<int>(fills), a.stages);
}

// What lies in shared memory for an item: its place in both rings.
template <class K>
struct OfItem {
  const float *queries, *out_gate, *own_value;
  const typename K::S* fresh;
  __device__ __forceinline__ OfItem(const char* memory, const SharedLayout& layout, int head_dim, uint32_t at) {
    constexpr int kRows = K::N * K::kColumns;
    queries = reinterpret_cast<const float*>(memory + layout.prepared) + at * 3 * kRows;
    out_gate = queries + kRows;
    own_value = out_gate + kRows;
    fresh = reinterpret_cast<const typename K::S*>(memory + layout.fresh) + at * 2 * K::N * head_dim;
  }
};

// The tail has the new keys too, which may reach into a slice of their own.
__device__ __forceinline__ int end_slice_of(const Item& item, uint32_t all_keys) {
  return item.tail ? max(item.slices, static_cast<int>((all_keys + kSlice - 1) / kSlice)) : item.slices;
}
__device__ __forceinline__ int slice_after(const Item& item, int slice) {
  return slice + (slice + 1 < item.slices ? item.ways : 1);
}
__device__ __forceinline__ uint32_t last_key_of(const Item& item, int slice, uint32_t all_keys) {
  return min(static_cast<uint32_t>(slice + 1) * kSlice, slice + 1 < item.slices ? item.keys : all_keys);
}

// Joins a slice that all warps have shared.
template <class K>
__device__ __forceinline__ void join_slice(const Decode& a, SharedHead& head, const float* values, const Item& item,
                                           int turn, uint32_t at, const float* own_values, int slice, bool alone,
                                           Joined<Share<K>::kEach>& joined) {
  constexpr int kEach = Share<K>::kEach;
  const Share<K> share(a);
  if (!share.live) return;
  // A token that comes before the slice's first key has the bits that it has without it.
  if (K::N > 1 && slice > 0 && keys_of<K>(a, item, share.token) <= static_cast<uint32_t>(slice) * kSlice) return;
  Joined<kEach> part;
  if (K::kMatrix && alone) {
    join_warps<K, true>(head, values, turn, share, part);
  } else {
    join_warps<K, false>(head, values, turn, share, part);
  }
  if (item.ways == 1) {
    join<typename K::T>(joined, part);
  } else {
    store_partial(a, item, share.token, 1 + slice, share.d, part);
    if (slice + 1 == item.slices) {
      part.maximum = head.own_score[at][share.token];
      part.sum = 1.0f;
      load_floats(own_values + share.token * K::kColumns + share.d, part.value);
      store_partial(a, item, share.token, 0, share.d, part);
    }
  }
}

// All slices of an item are joined: its outputs.
template <class K>
__device__ __forceinline__ void finish_item(const Decode& a, char* memory, const SharedLayout& layout, const Item& item,
                                            uint32_t at, const OfItem<K>& of, float* values,
                                            const Joined<Share<K>::kEach>& joined) {
  const SharedHead& head = *reinterpret_cast<const SharedHead*>(memory);
  if (item.ways > 1) return finish_ways<K>(a, memory, layout, item, values, of.out_gate);
  const Share<K> share(a);
  if (!share.live) return;
  float own_value[Share<K>::kEach];
  load_floats(of.own_value + share.token * K::kColumns + share.d, own_value);
  store_output<K>(a, item, share, joined, head.own_score[at][share.token], own_value, of.out_gate);
}

// A warp's part of a slice, on tensor cores.
template <class K>
__device__ __forceinline__ void attend_slice(const Decode& a, char* memory, const SharedLayout& layout,
                                             const Item& item, const OfItem<K>& of, uint32_t at, uint32_t scanned,
                                             uint32_t round, int slice, uint32_t last, uint32_t all_keys, int warp,
                                             RingPlace& place, WarpPart<K>& part) {
  SharedHead& head = *reinterpret_cast<SharedHead*>(memory);
  const uint32_t first = static_cast<uint32_t>(slice) * kSlice;
  const uint32_t mine = first + static_cast<uint32_t>(warp) * kWarpKeys;
  clear(part);
  visit_own_stage<K>(a, head, memory + layout.ring, item, first, last, warp, place,
                     [&](uint32_t base, const typename K::S* stage) {
                       if (mine >= last) return;
                       // The chunk states that close are wanted here.
                       if (K::N > 1 && all_keys > item.keys && mine + kWarpKeys > item.keys)
                         mbarrier_wait(scanned, round);
                       attend_matrix<K>(a, item, of.queries, head.query_unit[at], mine, base, all_keys,
                                        shared_address(stage), shared_address(of.fresh), part);
                     });
}

template <class K>
__device__ __forceinline__ void consume_item(const Decode& a, char* memory, const SharedLayout& layout,
                                             const Item& item, RingPlace& place, Ring<kPrepared>& queries,
                                             Ring<kPrepared>& scanned, int& turn) {
  using S = typename K::S;
  constexpr int N = K::N;
  SharedHead& head = *reinterpret_cast<SharedHead*>(memory);
  const int D = static_cast<int>(a.p.head_dim);
  const uint32_t at = queries.slot();
  const OfItem<K> of(memory, layout, D, at);
  const Lane lane = lane_of<K::W>(item.head, a.heads, D);

  Queries<K::kMatrix ? 1 : N> own;
  queries.wait_full();
  if constexpr (!K::kMatrix) load_queries<K>(a, item, lane, of.queries, own);
  const uint32_t all_keys = keys_of<K>(a, item, a.tokens - 1);
  if (!K::kMatrix && N > 1 && item.tail && all_keys > item.keys) scanned.wait_full();  // chunk states that close

  const int end_slice = end_slice_of(item, all_keys);
  float* values = reinterpret_cast<float*>(memory + layout.values);
  Joined<Share<K>::kEach> joined;
  clear(joined);
#pragma unroll 1
  for (int slice = item.way; slice < end_slice; slice = slice_after(item, slice)) {
    const uint32_t first = static_cast<uint32_t>(slice) * kSlice, last = last_key_of(item, slice, all_keys);
    const bool alone = last <= first + kWarpKeys;
    if constexpr (K::kMatrix) {
      const int warp = fresh_thread() / 32;
      WarpPart<K> part;
      attend_slice<K>(a, memory, layout, item, of, at, scanned.full(), scanned.count / kPrepared % 2, slice, last,
                      all_keys, warp, place, part);
      turn ^= 1;  // the last slice's may still be read; of those before it, all threads had read when it was shared
      values = reinterpret_cast<float*>(memory + layout.values) + turn * K::N * kConsumerWarps * K::kColumns;
      share_slice<K>(head, values, turn, warp, alone, part);
    } else {
      Running r[N];
#pragma unroll
      for (int i = 0; i < N; ++i) clear(r[i]);
      walk_stages<K>(a, head, memory + layout.ring, item, first, last, place, [&](uint32_t base, const S* stage) {
        if (N > 1 && base + K::kStageKeys <= item.keys) {
          attend<K, true>(own, lane, D, base, item.keys, stage, of.fresh, head.fresh_scale[at], r);
        } else {
          attend<K, false>(own, lane, D, base, item.keys, stage, of.fresh, head.fresh_scale[at], r);
        }
      });
      join_sync<K>();  // the last slice's have been read
      share_slice<K>(head, values, lane, r);
    }
    scanned.wait_full();
    join_sync<K>();
    join_slice<K>(a, head, values, item, turn, at, of.own_value, slice, alone, joined);
  }
  finish_item<K>(a, memory, layout, item, at, of, reinterpret_cast<float*>(memory + layout.values), joined);
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    mbarrier_arrive(queries.empty());
    mbarrier_arrive(scanned.empty());
  }
  queries.next();
  scanned.next();
}

template <class K>
__device__ __forceinline__ void consume(const Decode& a, char* memory, const SharedLayout& layout) {
  SharedHead& head = *reinterpret_cast<SharedHead*>(memory);
  Ring<kItems> items(head.items);
  Ring<kPrepared> queries(head.queries), scanned(head.scanned);
  RingPlace place;
  int turn = 0;  // of the two places for a slice's softmaxes
#pragma unroll 1
  for (;;) {
    items.wait_full();
    // Where registers are short, the item is read where it lies as often as it is needed, and given back last.
    constexpr bool kStays = K::kMatrix || K::N > 1;
    const std::conditional_t<kStays, const Item&, Item> item = head.item[items.slot()];
    const auto give_back = [&] {
      __syncwarp();
      if (threadIdx.x % 32 == 0) mbarrier_arrive(items.empty());
      items.next();
    };
    if constexpr (!kStays) give_back();
    if (item.kind == ItemKind::end) return;
    if (item.kind == ItemKind::zeros) {
      store_zeros<K>(a, item);
    } else {
      consume_item<K>(a, memory, layout, item, place, queries, scanned, turn);
    }
    if constexpr (kStays) give_back();
  }
}

// Where other warps join: a warp that attends goes from its part of a slice to that of the next, of the same item or another.
template <class K>
__device__ __forceinline__ void attend_items(const Decode& a, char* memory, const SharedLayout& layout) {
  SharedHead& head = *reinterpret_cast<SharedHead*>(memory);
  Ring<kItems> items(head.items);
  Ring<kPrepared> queries(head.queries);
  Ring<kParts> parts(head.parts);
  const uint32_t scanned = shared_address(head.scanned.full);
  RingPlace place;
  int turn = 0;  // the warps take turns at slices that are not whole
#pragma unroll 1
  for (;;) {
    items.wait_full();
    const Item& item = head.item[items.slot()];
    if (item.kind == ItemKind::end) return;
    if (item.kind == ItemKind::run) {
      // Its place among what is scanned is that of its queries.
      const uint32_t at = queries.slot();
      const OfItem<K> of(memory, layout, static_cast<int>(a.p.head_dim), at);
      const uint32_t all_keys = keys_of<K>(a, item, a.tokens - 1);
      const int end_slice = end_slice_of(item, all_keys);
      queries.wait_full();
#pragma unroll 1
      for (int slice = item.way; slice < end_slice; slice = slice_after(item, slice)) {
        const uint32_t first = static_cast<uint32_t>(slice) * kSlice, last = last_key_of(item, slice, all_keys);
        const int warps = static_cast<int>((last - first + kWarpKeys - 1) / kWarpKeys);
        const int warp = (fresh_thread() / 32 - (warps < kConsumerWarps ? turn : 0)) & (kConsumerWarps - 1);
        turn += warps;
        WarpPart<K> part;
        attend_slice<K>(a, memory, layout, item, of, at, scanned + 8 * at, queries.count / kPrepared % 2, slice, last,
                        all_keys, warp, place, part);
        parts.wait_empty();
        const int slot = static_cast<int>(parts.slot());
        share_slice<K>(head,
                       reinterpret_cast<float*>(memory + layout.values) + slot * K::N * kConsumerWarps * K::kColumns,
                       slot, warp, warps <= 1, part);
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(parts.full());
        parts.next();
      }
      if (threadIdx.x % 32 == 0) mbarrier_arrive(queries.empty());
      queries.next();
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(items.empty());
    items.next();
  }
}

// The warps that join.
template <class K>
__device__ __forceinline__ void join_items(const Decode& a, char* memory, const SharedLayout& layout) {
  SharedHead& head = *reinterpret_cast<SharedHead*>(memory);
  Ring<kItems> items(head.items);
  Ring<kPrepared> scanned(head.scanned);
  Ring<kParts> parts(head.parts);
  const auto leave = [](uint32_t barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
  };
#pragma unroll 1
  for (;;) {
    items.wait_full();
    const Item& item = head.item[items.slot()];
    if (item.kind == ItemKind::end) return;
    if (item.kind == ItemKind::zeros) {
      store_zeros<K>(a, item);
    } else {
      const uint32_t at = scanned.slot();
      const OfItem<K> of(memory, layout, static_cast<int>(a.p.head_dim), at);
      const uint32_t all_keys = keys_of<K>(a, item, a.tokens - 1);
      const int end_slice = end_slice_of(item, all_keys);
      Joined<Share<K>::kEach> joined;
      clear(joined);
      scanned.wait_full();
#pragma unroll 1
      for (int slice = item.way; slice < end_slice;) {
        const bool alone = last_key_of(item, slice, all_keys) <= static_cast<uint32_t>(slice) * kSlice + kWarpKeys;
        const int slot = static_cast<int>(parts.slot());
        float* const values =
            reinterpret_cast<float*>(memory + layout.values) + slot * K::N * kConsumerWarps * K::kColumns;
        parts.wait_full();
        join_slice<K>(a, head, values, item, slot, at, of.own_value, slice, alone, joined);
        slice = slice_after(item, slice);
        if (slice >= end_slice) finish_item<K>(a, memory, layout, item, at, of, values, joined);
        leave(parts.empty());
        parts.next();
      }
      leave(scanned.empty());
      scanned.next();
    }
    leave(items.empty());
    items.next();
  }
}

// The order of the code counts. On an H200 what lies in the first 64 KB of a kernel is at hand when it starts; what lies behind is
// fetched when it is first run, 2 to 6 us for a warp's way through its products. So what all calls need comes first, and what few
// need is not inlined. Of the branches here, the compiler puts the last one first.
template <class K>
__device__ __forceinline__ void run_block(const Decode& a) {
  extern __shared__ __align__(128) char memory[];
  SharedHead& head = *reinterpret_cast<SharedHead*>(memory);
  const SharedLayout layout = shared_layout<K>(static_cast<int>(a.p.head_dim));
  if (threadIdx.x == 0) {
    head.items.init(1, kConsumerWarps + K::kScanners + K::kJoiners);
    head.queries.init(1, kConsumerWarps);
    head.scanned.init(1, K::kJoiners > 0 ? K::kJoiners : kConsumerWarps);
    if constexpr (K::kJoiners > 0) head.parts.init(kConsumerWarps, K::kJoiners);
    for (int i = 0; i < kMostStages; ++i) {
      mbarrier_init(shared_address(&head.full[i]), fills<K>(a));
      mbarrier_init(shared_address(&head.empty[i]), K::kReaders);
    }
    if constexpr (K::kMatrix) {
      for (int i = kMostStages; i < K::kFills; ++i) mbarrier_init(shared_address(&head.full[i]), fills<K>(a));
    }
    head.through = 0;
    mbarrier_init_fence();
  }
  __syncthreads();
  let_next_kernel_start();
  const int warp =
      __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / 32, 0);  // the compiler sees that a warp is of one mind
  if (K::kJoiners > 0 && warp > kConsumerWarps + K::kScanners) {
    wait_for_earlier_kernels();
    if constexpr (K::kJoiners > 0) join_items<K>(a, memory, layout);
  } else if (warp > kConsumerWarps) {
    if (warp == kConsumerWarps + 1) warm_running<K>(a);
    wait_for_earlier_kernels();
    scan<K>(a, memory, layout, static_cast<uint32_t>(warp) - kConsumerWarps - 1);
  } else if (warp == kConsumerWarps) {
    warm_states<K>(a, head);
    wait_for_earlier_kernels();
    fetch<K>(a, head, shared_address(memory) + layout.ring);
  } else {
    warm_tokens<K>(a);
    wait_for_earlier_kernels();
    if (threadIdx.x == kConsumers - 1) *static_cast<volatile int*>(&head.through) = 1;
    if constexpr (K::kJoiners > 0) {
      attend_items<K>(a, memory, layout);
    } else {
      consume<K>(a, memory, layout);
    }
  }
}

// Whether the architecture has the kernel. Before Hopper, warps that attend and do not join would be short of registers.
template <class K>
__host__ __device__ constexpr bool runs_on(int major) {
  return K::kJoiners == 0 || major >= 9;
}

template <class K>
__global__ void __launch_bounds__(K::kThreads, K::kBlocks) decode_step_kernel(const __grid_constant__ Decode a) {
#ifdef __CUDA_ARCH__
  if constexpr (runs_on<K>(__CUDA_ARCH__ / 100)) run_block<K>(a);
#endif
}

// The slots of the rows that are served, for calls of many rows or of several launches: -1 for a row that has an error, with which
// it is skipped in all. A step of many rows would else compare each (row, head) with every row before it.
constexpr int kAdmitThreads = 1024;
constexpr int kAdmitEach = 4;  // rows of a warp, which goes through their pages one after another
constexpr int kAdmitRows = kAdmitThreads / 32 * kAdmitEach;

__global__ void __launch_bounds__(kAdmitThreads) decode_admit_kernel(const __grid_constant__ Decode a, int64_t* slots) {
  __shared__ Claims claims;
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const Pool& pool = a.p.pool;
  const auto admit = [&](const ClaimedRow& row) {
    PoolError error = PoolError::none;
    int64_t length = 0;
    const bool named = row.mine && row.slot >= 0;
    if (named) {
      if (row.slot < pool.sequences) length = __ldcg(pool.lengths + row.slot);
      error = refusal(a, row.slot, length);
      if (error == PoolError::none && row.repeated) error = PoolError::duplicate;
    }
    const bool asks = named && error == PoolError::none;
    if (pool.page_table && lacks_page(a, row.slot, static_cast<uint32_t>(length), asks)) error = PoolError::full;
    if (row.mine) slots[row.n] = error == PoolError::none ? row.slot : -1;
    if (error != PoolError::none) report_inline(a, error, static_cast<int>(row.n), row.slot, length);
  };
  visit_rows<kAdmitThreads>(claims, a.p.slots, a.p.batch, pool.sequences, int64_t{blockIdx.x} * kAdmitRows,
                            int64_t{gridDim.x} * kAdmitRows, kAdmitEach, admit);
}

struct Counters {
  Piece<unsigned> heads_in, read, arrived;
};

Counters take_counters(const DecodeParams& p, Arena& workspace) {
  Counters c;
  c.heads_in = workspace.take<unsigned>(p.pool.sequences);
  c.read = workspace.take<unsigned>(p.pool.sequences * p.heads);
  c.arrived = workspace.take<unsigned>(p.pool.sequences * p.heads);
  return c;
}

// Stages of the ring: it takes what shared memory is left to a block, of which 1 KB is the system's. Where that is short, a block
// takes the multiprocessor for itself; 0 where a block offers no room even so. How many there are does not show in the results.
template <class K>
int ring_stages(int head_dim) {
  const int fixed = shared_layout<K>(head_dim).ring, bytes = stage_bytes<K>(head_dim);
  const int most = device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>();
  const int shared =
      std::min(device_attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>() / K::kBlocks - 1024, most);
  const int stages = (shared - fixed) / bytes;
  if (stages >= 2) return std::min(stages, kMostStages);
  return std::clamp((most - fixed) / bytes, 0, 2);
}

template <class K>
void launch(Decode a, cudaStream_t stream) {
  auto* const kernel = decode_step_kernel<K>;
  const int major = code_major(reinterpret_cast<const void*>(kernel));
  if constexpr (K::kJoiners > 0) {
    const auto blocks = static_cast<uint32_t>(device_attribute<cudaDevAttrMultiProcessorCount>());
    if (a.candidates <= blocks || !runs_on<K>(major)) return launch<typename K::OnePair>(a, stream);
  }
  const int head_dim = static_cast<int>(a.p.head_dim);
  const int fixed = shared_layout<K>(head_dim).ring;
  a.stage_bytes = stage_bytes<K>(head_dim);
  a.stages = ring_stages<K>(head_dim);
  a.bulk = major >= 9 && head_dim * sizeof(typename K::S) % 16 == 0;
  const int bytes = fixed + a.stages * a.stage_bytes;
  allow_shared_memory(kernel, bytes, "decode_step");
  const int64_t resident = int64_t{device_attribute<cudaDevAttrMultiProcessorCount>()} * K::kBlocks;
  launch_overlapping(kernel, std::min<int64_t>(a.candidates, resident), K::kThreads, bytes, stream, "decode_step", a);
}

// Calls f with the Kind that serves the call.
template <class T, class S, int W, class F>
void with_tokens(const DecodeParams& p, int64_t tokens, F&& f) {
  if constexpr (kHasMatrix<T, S, W>) {
    if (p.head_dim == W * 8) {
      if (tokens == 1) return f(MatrixKind<T, W, 1>());
      return f(MatrixKind<T, W, kMostTokens>());
    }
  }
  if constexpr (kHasLanes<T, S, W>) {
    if constexpr (kHasDrafts<T, S, W>) {
      if (tokens > 1) return f(Kind<T, S, W, kMostTokens>());
    }
    f(Kind<T, S, W, 1>());
  } else {
    with_tokens<T, S, 2 * W>(p, tokens, f);
  }
}
template <class T, class S, class F>
void with_columns(const DecodeParams& p, int64_t tokens, F&& f) {
  if (p.head_dim <= 64) return with_tokens<T, S, 8>(p, tokens, f);
  if (p.head_dim <= 128) return with_tokens<T, S, 16>(p, tokens, f);
  with_tokens<T, S, 32>(p, tokens, f);
}
template <class T, class F>
void with_states(const DecodeParams& p, int64_t tokens, F&& f) {
  p.pool.scale_k ? with_columns<T, e4m3>(p, tokens, f) : with_columns<T, T>(p, tokens, f);
}
template <class F>
void with_kind(const DecodeParams& p, int64_t tokens, F&& f) {
  switch (p.dtype) {
    case DType::f32: return with_states<float>(p, tokens, f);
    case DType::f16: return with_states<f16>(p, tokens, f);
    case DType::bf16: return with_states<bf16>(p, tokens, f);
    default: fail_dtype("rat_decode_step");
  }
}

Rows from_token(Rows rows, int64_t token, int64_t element) {
  if (rows.ptr) rows.ptr = static_cast<char*>(rows.ptr) + token * rows.token * element;
  return rows;
}

}  // namespace

size_t decode_workspace(const DecodeParams& p) {
  Arena workspace;
  take_counters(p, workspace);
  return workspace.bytes();
}

void decode_step(const DecodeParams& p, const Allocator& allocator, void* stream_) {
  if (p.batch == 0 || p.heads == 0 || p.tokens == 0) return;
  const auto stream = static_cast<cudaStream_t>(stream_);
  Decode a{};
  a.p = p;
  // The counters live as long as the cache, the partial results as long as the call.
  Arena workspace, scratch;
  const Counters counters = take_counters(p, workspace);
  workspace.commit({[](void* memory, size_t) { return memory; }, p.workspace});
  a.heads_in = counters.heads_in;
  a.read = counters.read;
  a.arrived = counters.arrived;
  const int64_t most_slices = std::max<int64_t>(1, ceil_div(p.pool.rows, kSlice)), pairs = p.batch * p.heads;
  // Of a launch. Where drafts have no kernel, or shared memory is too small for it, tokens go one by one, with the same bits.
  int64_t most_tokens = 1;
  if (p.tokens > 1) {
    with_kind(p, kMostTokens, [&](auto kind) {
      using K = decltype(kind);
      if (ring_stages<K>(static_cast<int>(p.head_dim)) > 0) most_tokens = std::min<int64_t>(p.tokens, K::N);
    });
  }
  a.admitted = p.tokens > most_tokens || (p.slots && p.batch > kKnownRows);
  a.entries = 1 + most_slices;
  // Few pairs: a way for each block that the chip holds. More: enough that all blocks have about as much to do.
  const int64_t resident = 2 * int64_t{device_attribute<cudaDevAttrMultiProcessorCount>()};
  const int64_t ways = (pairs <= resident ? 1 : 4) * resident / pairs;
  a.ways = static_cast<int>(std::clamp<int64_t>(ways, 1, most_slices));
  Piece<float> partial;
  Piece<int64_t> admitted;
  if (a.ways > 1) partial = scratch.take<float>(pairs * most_tokens * a.entries * (p.head_dim + 8));
  if (a.admitted) admitted = scratch.take<int64_t>(p.batch);
  scratch.commit(allocator);
  a.partial = partial;
  a.chunk_size = static_cast<uint32_t>(std::min<int64_t>(p.chunk_size, int64_t{1} << 31));
  grid_x(pairs * a.ways, "decode_step");
  a.heads = static_cast<uint32_t>(p.heads);
  for (int i = 0; i < kInputs; ++i) {
    const int64_t groups = i == kQuery ? p.q_groups : i == kKey ? p.k_groups : p.heads;
    a.input_share[i] = static_cast<uint32_t>(p.heads / groups);
  }
  a.pairs = static_cast<uint32_t>(pairs);
  a.candidates = static_cast<uint32_t>(pairs * a.ways);
  for (int64_t rows = p.pool.page_rows; p.pool.page_table && rows > 1; rows /= 2) ++a.page_shift;
  a.scale = static_cast<float>(p.scale * 1.4426950408889634);
  a.named = p.slots;
  if (a.admitted) {
    a.reserve = static_cast<int>(p.tokens);
    const int64_t blocks =
        std::min<int64_t>(ceil_div(p.batch, kAdmitRows), device_attribute<cudaDevAttrMultiProcessorCount>());
    launch_overlapping(decode_admit_kernel, blocks, kAdmitThreads, 0, stream, "decode_admit", a, admitted.get());
    a.p.slots = admitted;
  }
  const int64_t element = p.dtype == DType::f32 ? 4 : 2;
  for (int64_t done = 0; done < p.tokens; done += a.tokens) {
    a.tokens = static_cast<int>(std::min<int64_t>(p.tokens - done, most_tokens));
    a.reserve = a.tokens;
    const Rows* const inputs[kInputs] = {&p.q, &p.k, &p.v, &p.gate, &p.out_gate};
    for (int i = 0; i < kInputs; ++i) a.input[i] = from_token(*inputs[i], done, element);
    a.p.y = from_token(p.y, done, element);
    with_kind(a.p, a.tokens, [&](auto kind) { launch<decltype(kind)>(a, stream); });
  }
}

namespace {

template <class K>
void add_kernel(KernelTable& t, const char* types) {
  t.add(reinterpret_cast<const void*>(decode_step_kernel<K>), "decode_step<%s, %d, %d%s%s>", types, K::W, K::N,
        K::kMatrix ? ", matrix" : "", K::kJoiners > 0 ? ", many" : "");
}
template <class T, class S, int W>
void add_counts(KernelTable& t, const char* types) {
  if constexpr (kHasLanes<T, S, W>) {
    add_kernel<Kind<T, S, W, 1>>(t, types);
    if constexpr (kHasDrafts<T, S, W>) add_kernel<Kind<T, S, W, kMostTokens>>(t, types);
  }
  if constexpr (kHasMatrix<T, S, W>) {
    add_kernel<MatrixKind<T, W, 1>>(t, types);
    add_kernel<MatrixKind<T, W, kMostTokens>>(t, types);
    add_kernel<MatrixKind<T, W, kMostTokens, false>>(t, types);
  }
}
template <class T, class S>
void add_widths(KernelTable& t, const char* types) {
  add_counts<T, S, 8>(t, types);
  add_counts<T, S, 16>(t, types);
  add_counts<T, S, 32>(t, types);
}

}  // namespace

KernelList decode_kernels() {
  static const KernelTable table = [] {
    KernelTable t;
    add_widths<bf16, bf16>(t, "bf16");
    add_widths<bf16, e4m3>(t, "bf16, e4m3");
    add_widths<float, float>(t, "f32");
    add_widths<f16, f16>(t, "f16");
    add_widths<float, e4m3>(t, "f32, e4m3");
    add_widths<f16, e4m3>(t, "f16, e4m3");
    t.add("decode_admit", decode_admit_kernel);
    return t;
  }();
  return table.list();
}

}  // namespace rat::cuda
