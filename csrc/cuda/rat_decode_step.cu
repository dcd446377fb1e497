// One or several decode steps for every row of a batch, in one launch: scan the new tokens, attend to the chunk states, append,
// advance.
//
// Bytes: the chunk states, 2 C D per (row, head), read once; the rest is small. Blocks stay and take (row, head) pairs in turn.
// In each, one warp fetches: it reads slots and lengths, checks the row, and copies chunk states into a ring of shared memory,
// as far ahead as the ring allows, into the next pairs too (fetch.cuh). One scans the new tokens, or two (states.cuh). Eight
// attend: by tensor cores, each 32 keys of a slice (matrix.cuh), or their lane groups take keys in turn, a few at a time, each with
// a running softmax in registers (attend.cuh).
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
template <class T>
__device__ __forceinline__ void store_zeros(const Decode& a, const Item& item) {
  const int d = static_cast<int>(threadIdx.x);
  if (d >= a.p.head_dim) return;
#pragma unroll 1
  for (int i = 0; i < a.tokens; ++i) *out_row_of<T>(a.p.y, item.row, i, item.head, d) = from_float<T>(0.0f);
}

// The tokens and elements that a thread joins: token `first`, `first` + step ..., element d.
template <class K>
struct Share {
  static constexpr int kStep = kConsumers / K::kColumns;
  static constexpr int kTokens = (K::N + kStep - 1) / kStep;
  int first, d;
  bool live;
  __device__ __forceinline__ explicit Share(const Decode& a) {
    const int thread = K::kMatrix ? fresh_thread() : static_cast<int>(threadIdx.x);
    first = thread / K::kColumns;
    d = thread % K::kColumns;
    live = d < a.p.head_dim;
  }
};

// Of a pair that blocks share, by the last of its ways: joins the slices, in order. Partial results pass through shared memory, so
// that all are on their way at once: through the ring where the block has no other pair, else where slices' softmaxes lie.
template <class K>
__device__ __forceinline__ void finish_ways(const Decode& a, char* memory, const SharedLayout& layout, const Item& item,
                                            const Share<K>& share, const float* out_gate) {
  SharedHead& head = *reinterpret_cast<SharedHead*>(memory);
  __threadfence();
  consumers_sync();  // partial results are stored before the arrival is counted
  if (threadIdx.x == 0) {
    unsigned* const arrived = a.arrived + static_cast<int64_t>(item.entry) * a.heads + item.head;
    head.last = last_of(arrived, static_cast<unsigned>(item.ways));
    __threadfence();  // and the others' are read after it
  }
  consumers_sync();
  if (head.last == 0) return;

  const bool only = a.candidates <= gridDim.x;
  const float* const room = reinterpret_cast<const float*>(memory + (only ? layout.ring : layout.values));
  const int row = static_cast<int>(a.p.head_dim) + 8;
  const int places = (only ? a.stages * a.stage_bytes : layout.prepared - layout.values) / 4 / row;
  const auto rows_of = [&](int i) { return 1 + static_cast<int>((keys_of(a, item, i) + kSlice - 1) / kSlice); };
  const int most = rows_of(a.tokens - 1), together = max(1, places / most);  // tokens
  Joined joined{kNoScore, 0.0f, 0.0f};
  float own_score = 0.0f, own_value = 0.0f;
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
        for (int at = static_cast<int>(threadIdx.x) * 4; at < count * row; at += kConsumers * 4) {
          cp_async16(to + 4 * at, from + at, true);
        }
      }
      cp_async_commit();
      cp_async_wait<0>();
      __syncwarp();  // its lanes may have left the loop apart
      consumers_sync();
#pragma unroll 1
      for (int i = begin + share.first; i < end && share.live; i += Share<K>::kStep) {
        const float* const rows = room + (i - begin) * count * row;
        const int last = min(count, rows_of(i) - first);
        int at = 0;
        if (first == 0) {  // the own state comes first
          joined = {kNoScore, 0.0f, 0.0f};
          own_score = rows[a.p.head_dim];
          own_value = rows[share.d];
          at = 1;
        }
#pragma unroll 1
        for (; at < last; ++at) {
          const float* const slice = rows + at * row;
          const float2 both = *reinterpret_cast<const float2*>(slice + a.p.head_dim);
          join<typename K::T>(joined, {both.x, both.y, slice[share.d]});
        }
        if (first + count >= most) {
          store_output<K>(a, item, i, share.d, joined, own_score, own_value, out_gate[i * K::kColumns + share.d]);
        }
      }
      __syncwarp();
      consumers_sync();  // they have been read
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

// The same of slice [first, last) by a warp that has keys in one stage alone: it waits for no other. visit(first key, stage),
// where the stage was not fetched too: there may be new keys behind those that were.
template <class K, class Visit>
__device__ __forceinline__ void visit_own_stage(const Decode& a, SharedHead& head, const char* ring, const Item& item,
                                                uint32_t first, uint32_t last, RingPlace& place, const Visit& visit) {
  static_assert(kSlice / K::kStageKeys <= kMostStages / 2);
  const uint32_t own = static_cast<uint32_t>(fresh_thread()) / 32 / K::kReaders, end = min(last, item.keys);
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

template <class K>
__device__ __forceinline__ void consume_item(const Decode& a, char* memory, const SharedLayout& layout,
                                             const Item& item, RingPlace& place, Ring<kPrepared>& prepared, int& turn) {
  using S = typename K::S;
  constexpr int N = K::N, kTokens = Share<K>::kTokens;
  SharedHead& head = *reinterpret_cast<SharedHead*>(memory);
  const int D = static_cast<int>(a.p.head_dim), at = static_cast<int>(prepared.slot());
  const float* const rows = reinterpret_cast<const float*>(memory + layout.prepared) + at * 3 * N * K::kColumns;
  const float *const out_gate = rows + N * K::kColumns, *const own_value = rows + 2 * N * K::kColumns;
  const S* const fresh = reinterpret_cast<const S*>(memory + layout.fresh) + at * 2 * N * D;
  const uint32_t scanned = shared_address(&head.scanned[at]), round = prepared.count / kPrepared % 2;
  const Lane lane = lane_of<K::W>(item.head, a.heads, D);

  Queries<K::kMatrix ? 1 : N> queries;
  prepared.wait_full();
  if constexpr (!K::kMatrix) load_queries<K>(a, item, lane, rows, queries);
  const uint32_t all_keys = keys_of(a, item, a.tokens - 1);
  if (N > 1 && item.tail && all_keys > item.keys)
    mbarrier_wait(scanned, round);  // the chunk states that close are there

  // The tail has the new keys too, which may reach into a slice of their own.
  const int end_slice = item.tail ? max(item.slices, static_cast<int>((all_keys + kSlice - 1) / kSlice)) : item.slices;
  Joined joined[kTokens];
#pragma unroll
  for (Joined& j : joined) j = {kNoScore, 0.0f, 0.0f};
#pragma unroll 1
  for (int slice = item.way; slice < end_slice; slice += slice + 1 < item.slices ? item.ways : 1) {
    const uint32_t first = static_cast<uint32_t>(slice) * kSlice;
    const uint32_t last = min(first + kSlice, slice + 1 < item.slices ? item.keys : all_keys);
    float* values = reinterpret_cast<float*>(memory + layout.values);
    if constexpr (K::kMatrix) {
      const uint32_t mine = first + static_cast<uint32_t>(fresh_thread()) / 32 * kWarpKeys;
      WarpPart<K> part;
      clear(part);
      visit_own_stage<K>(a, head, memory + layout.ring, item, first, last, place, [&](uint32_t base, const S* stage) {
        if (mine < last) {
          attend_matrix<K>(a, item, rows, head.query_unit[at], mine, base, all_keys, shared_address(stage),
                           shared_address(fresh), part);
        }
      });
      turn ^= 1;  // the last slice's may still be read; of those before it, all threads had read when it was shared
      values += turn * K::N * kConsumerWarps * K::kColumns;
      share_slice<K>(head, values, turn, part);
    } else {
      Running r[N];
#pragma unroll
      for (int i = 0; i < N; ++i) clear(r[i]);
      walk_stages<K>(a, head, memory + layout.ring, item, first, last, place, [&](uint32_t base, const S* stage) {
        if (N > 1 && base + K::kStageKeys <= item.keys) {
          attend<K, true>(queries, lane, D, base, item.keys, stage, fresh, head.fresh_scale[at], r);
        } else {
          attend<K, false>(queries, lane, D, base, item.keys, stage, fresh, head.fresh_scale[at], r);
        }
      });
      consumers_sync();  // the last slice's have been read
      share_slice<K>(head, values, lane, r);
    }
    mbarrier_wait(scanned, round);
    consumers_sync();
    const Share<K> share(a);
    if (!share.live) continue;
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      const int i = share.first + j * Share<K>::kStep;
      // A token that comes before the slice's first key has the bits that it has without it.
      if (i >= a.tokens || (N > 1 && slice > 0 && keys_of(a, item, i) <= first)) continue;
      const Joined part = join_warps<K>(head, values, turn, i, share.d);
      if (item.ways == 1) {
        join<typename K::T>(joined[j], part);
      } else {
        store_partial(a, item, i, 1 + slice, share.d, part);
        if (slice + 1 == item.slices) {
          store_partial(a, item, i, 0, share.d, {head.own_score[at][i], 1.0f, own_value[i * K::kColumns + share.d]});
        }
      }
    }
  }
  const Share<K> share(a);
  if (item.ways > 1) {
    finish_ways<K>(a, memory, layout, item, share, out_gate);
  } else if (share.live) {
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      const int i = share.first + j * Share<K>::kStep, own = i * K::kColumns + share.d;
      if (i < a.tokens) {
        store_output<K>(a, item, i, share.d, joined[j], head.own_score[at][i], own_value[own], out_gate[own]);
      }
    }
  }
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(prepared.empty());
  prepared.next();
}

template <class K>
__device__ __forceinline__ void consume(const Decode& a, char* memory, const SharedLayout& layout) {
  SharedHead& head = *reinterpret_cast<SharedHead*>(memory);
  Ring<kItems> items(head.items);
  Ring<kPrepared> prepared(head.prepared);
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
      store_zeros<typename K::T>(a, item);
    } else {
      consume_item<K>(a, memory, layout, item, place, prepared, turn);
    }
    if constexpr (kStays) give_back();
  }
}

template <class K>
__global__ void __launch_bounds__(K::kThreads, K::kBlocks) decode_step_kernel(const __grid_constant__ Decode a) {
  extern __shared__ __align__(128) char memory[];
  SharedHead& head = *reinterpret_cast<SharedHead*>(memory);
  const SharedLayout layout = shared_layout<K>(static_cast<int>(a.p.head_dim));
  if (threadIdx.x == 0) {
    head.items.init(1, kConsumerWarps + K::kScanners);
    head.prepared.init(1, kConsumerWarps);
    for (uint64_t& scanned : head.scanned) mbarrier_init(shared_address(&scanned), 1);
    for (int i = 0; i < kMostStages; ++i) {
      mbarrier_init(shared_address(&head.full[i]), fills<K>(a));
      mbarrier_init(shared_address(&head.empty[i]), K::kReaders);
    }
    head.through = 0;
    mbarrier_init_fence();
  }
  __syncthreads();
  let_next_kernel_start();
  const int warp =
      __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / 32, 0);  // the compiler sees that a warp is of one mind
  if (warp < kConsumerWarps) {
    warm_tokens<K>(a);
    wait_for_earlier_kernels();
    if (threadIdx.x == kConsumers - 1) *static_cast<volatile int*>(&head.through) = 1;
    consume<K>(a, memory, layout);
  } else if (warp == kConsumerWarps) {
    warm_states<K>(a, head);
    wait_for_earlier_kernels();
    fetch<K>(a, head, shared_address(memory) + layout.ring);
  } else {
    if (warp == kConsumerWarps + 1) warm_running<K>(a);
    wait_for_earlier_kernels();
    scan<K>(a, memory, layout, static_cast<uint32_t>(warp) - kConsumerWarps - 1);
  }
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
  const int head_dim = static_cast<int>(a.p.head_dim);
  const int fixed = shared_layout<K>(head_dim).ring;
  a.stage_bytes = stage_bytes<K>(head_dim);
  a.stages = ring_stages<K>(head_dim);
  a.bulk = device_attribute<cudaDevAttrComputeCapabilityMajor>() >= 9 && head_dim * sizeof(typename K::S) % 16 == 0;
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
  t.add(reinterpret_cast<const void*>(decode_step_kernel<K>), "decode_step<%s, %d, %d%s>", types, K::W, K::N,
        K::kMatrix ? ", matrix" : "");
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
