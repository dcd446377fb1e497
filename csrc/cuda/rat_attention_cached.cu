// rat_attention on a pool of cached sequences, in place: the phases of rat_attention.cpp on the pool's own states, after a plan.
//
//   plan_rows_kernel   one block: what each row is, from slots, lengths and cu_seqlens, which the host does not read. Checks them,
//                      leaves entry, start and cu_seqlens for the kernels after it, which read nothing else of the kind, and
//                      advances the pool's lengths. A row with an error is skipped, and the first one is kept in the pool
//   dequantise_states_kernel  where states are e4m3: those of the rows to scratch, in T, which attention then reads. Moves 3 or 5
//                      bytes for each element of a closed state, and takes scratch for all chunks that the rows have room for
#include <algorithm>

#include "device/claims.cuh"
#include "device/e4m3.cuh"
#include "device/sequence.cuh"
#include "explain.h"
#include "host/kernel_table.h"
#include "host/launch.h"
#include "phases.h"
#include "ptx/depend.cuh"
#include "recurrence/scan_launch.h"

namespace rat::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;

struct RowPlan {
  Sizes size;  // of the caller; without lengths
  Pool pool;
  const int64_t* slots;  // (N) or null
  int64_t rotary_rows;   // negative: nothing is rotated
  int32_t* cu_seqlens;   // (N + 1), or null where size has none
  int32_t* entry;        // (N): the row's sequence of the pool, -1 where it is skipped
  int32_t* start;        // (N): its length before; 0 where the row is skipped
  float* staged_k;       // (N, H, D), or null where nothing is staged: see is_staged()
  float* staged_v;
};

// The first error stays until the host clears it.
__device__ __forceinline__ void raise(const Pool& pool, PoolError code, int64_t row, int64_t slot, int64_t detail) {
  if (atomicCAS(pool.error, 0, static_cast<int32_t>(code)) != 0) return;
  const auto word = [](int64_t x) {
    return static_cast<int32_t>(x < INT32_MIN ? INT32_MIN : x > INT32_MAX ? INT32_MAX : x);
  };
  pool.error[1] = word(row);
  pool.error[2] = word(slot);
  pool.error[3] = word(detail);
}

// By a whole warp: the sequence of the pool that each lane's row goes on with, and its length; -1 where the row is skipped.
__device__ __forceinline__ int64_t take_row(const RowPlan& p, const ClaimedRow& row, int64_t length, int64_t& start) {
  const Pool& pool = p.pool;
  const int64_t slot = row.slot, size = p.size.chunk_size;
  start = 0;
  PoolError error = PoolError::none;
  if (slot >= pool.sequences) {
    error = PoolError::slot;
  } else if (row.repeated) {
    error = PoolError::duplicate;
  }
  const bool grows = row.mine && slot >= 0 && error == PoolError::none && length > 0;
  const int64_t before = grows ? pool.lengths[slot] : 0, after = before + length;
  const int64_t closed = before < 0 ? 0 : after / size;
  bool missing = false;
  if (pool.page_table) {
    const int64_t pages = (min(closed, pool.rows) + pool.page_rows - 1) / pool.page_rows;
    missing = page_missing(pool, pool.rows / pool.page_rows, slot, grows ? pages : 0);
  }
  if (!row.mine || slot < 0) return -1;
  int64_t detail = 0;
  if (grows) {
    detail = before;
    if (before < 0 || before / size > pool.rows) {
      error = PoolError::length;
    } else if (missing || closed > pool.rows || after > INT32_MAX) {
      error = PoolError::full;
    } else if (p.rotary_rows >= 0 && (after - 1) / size >= p.rotary_rows) {
      error = PoolError::rotary;
      detail = p.rotary_rows;
    } else {
      start = before;
      pool.lengths[slot] = static_cast<int32_t>(after);
    }
  }
  if (error == PoolError::none) return slot;
  raise(pool, error, row.n, slot, detail);
  return -1;
}

// Are cu_seqlens what launchers.h says? Else the first place where they are not is an error, and the call is one row of all its
// tokens, which is skipped, and rows of none. By the whole block.
__device__ __forceinline__ bool check_offsets(const RowPlan& p) {
  __shared__ unsigned long long first_wrong;
  const int64_t count = p.size.sequences;
  const int32_t* cu = p.size.cu_seqlens;
  if (threadIdx.x == 0) first_wrong = ~0ull;
  __syncthreads();
  for (int64_t n = threadIdx.x; n <= count; n += kThreads) {
    const int64_t at = cu[n];
    const bool right = n == 0 ? at == 0 : at >= cu[n - 1];
    if (!right || (n == count && at != p.size.tokens)) atomicMin(&first_wrong, static_cast<unsigned long long>(n));
  }
  __syncthreads();
  const bool right = first_wrong == ~0ull;
  if (!right && threadIdx.x == 0) {
    const int64_t n = static_cast<int64_t>(first_wrong);
    raise(p.pool, PoolError::cu_seqlens, n, -1, cu[n]);
  }
  for (int64_t n = threadIdx.x; n <= count; n += kThreads) {
    p.cu_seqlens[n] = right ? cu[n] : n == 0 ? 0 : static_cast<int32_t>(p.size.tokens);
    if (!right && n < count) {
      p.entry[n] = -1;
      p.start[n] = 0;
    }
  }
  return right;
}

// Copies the states that is_staged() rows start from. By the whole block.
__device__ __forceinline__ void stage(const RowPlan& p) {
  __shared__ int32_t rows[kThreads];
  __shared__ int count;
  const Sizes& s = p.size;
  PoolStates states{};
  states.entry = p.entry;
  states.k = static_cast<float*>(p.pool.running_k);
  states.v = static_cast<float*>(p.pool.running_v);
  states.ring = p.pool.ring;
  const int64_t width = s.heads * s.head_dim;  // elements of a row of the pool
  for (int64_t first = 0; first < s.sequences; first += kThreads) {
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    const int64_t n = first + threadIdx.x;
    if (n < s.sequences && p.entry[n] >= 0) {
      Sequence q = sequence_at(s, n);
      q.start = p.start[n];
      if (is_staged(s, states, q)) rows[atomicAdd(&count, 1)] = static_cast<int32_t>(n);
    }
    __syncthreads();
    const int64_t pieces = count * (width / 4);
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < pieces; i += kThreads) {
      const int64_t row = rows[i / (width / 4)], at = i % (width / 4) * 4;
      const int64_t from = running_at(s, states, p.entry[row], 0, p.start[row] - 1) + at;
      *reinterpret_cast<float4*>(p.staged_k + row * width + at) = *reinterpret_cast<const float4*>(states.k + from);
      *reinterpret_cast<float4*>(p.staged_v + row * width + at) = *reinterpret_cast<const float4*>(states.v + from);
    }
    __syncthreads();  // the list is used up
  }
}

__global__ void __launch_bounds__(kThreads) plan_rows_kernel(const __grid_constant__ RowPlan p) {
  const Sizes& s = p.size;
  wait_for_earlier_kernels();
  let_next_kernel_start();
  if (s.cu_seqlens && !check_offsets(p)) return;
  __shared__ Claims claims;
  // A lane for each row, of all warps: a warp goes through the pages of its rows one after another.
  const int each = static_cast<int>(min((s.sequences + kWarps - 1) / kWarps, int64_t{32}));
  visit_rows<kThreads>(claims, p.slots, s.sequences, p.pool.sequences, 0, kWarps * each, each,
                       [&](const ClaimedRow& row) {
                         int64_t length = 0, start;
                         if (row.mine) length = s.cu_seqlens ? s.cu_seqlens[row.n + 1] - s.cu_seqlens[row.n] : s.tokens;
                         const int64_t entry = take_row(p, row, length, start);
                         if (row.mine) {
                           p.entry[row.n] = static_cast<int32_t>(entry);
                           p.start[row.n] = static_cast<int32_t>(start);
                         }
                       });
  if (p.staged_k == nullptr) return;
  __syncthreads();  // entry and start are whole
  stage(p);
}

struct Dequantise {
  Sizes size;            // lengths: those before the call
  ChunkStates from, to;  // e4m3 of the pool; T of the rows
  const float* scale_k;
  const float* scale_v;
  int64_t splits;  // blocks of an owner
  int32_t* self;   // (N): the states of a row in `to` are its own, -1 where it is skipped
};

constexpr int kMoveThreads = 256;

// An owner is a (row, head); a thread takes eight elements at a time.
template <class T>
__global__ void __launch_bounds__(kMoveThreads) dequantise_states_kernel(const __grid_constant__ Dequantise p) {
  const Sizes& s = p.size;
  const int64_t owner = blockIdx.x / p.splits, split = blockIdx.x % p.splits;
  const int64_t n = owner / s.heads, h = owner % s.heads;
  const int64_t entry = p.from.entry[n];
  if (threadIdx.x == 0 && split == 0 && h == 0) p.self[n] = entry < 0 ? -1 : static_cast<int32_t>(n);
  if (entry < 0) return;
  const int64_t pieces = s.head_dim / 8, count = quotient(s.lengths[n], s.key_every) * pieces;
  for (int64_t i = split * kMoveThreads + threadIdx.x; i < count; i += p.splits * kMoveThreads) {
    const int64_t row = i / pieces, d = i % pieces * 8;
    const int64_t at = pool_offset(s, p.from, entry, h, row);
    const int64_t to = n * p.to.sequence + h * p.to.head + row * s.head_dim + d;
    const auto move = [&](const void* source, const float* scales, void* target) {
      float x[8];
      unpack_state(*reinterpret_cast<const StateRaw<e4m3>*>(static_cast<const uint8_t*>(source) + at + d), x);
      const float scale = scales[at / s.head_dim];
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] *= scale;
      store_row(static_cast<T*>(target) + to, x);
    };
    move(p.from.k, p.scale_k, p.to.k);
    move(p.from.v, p.scale_v, p.to.v);
  }
}

void dequantise(const Dequantise& p, cudaStream_t stream) {
  const unsigned blocks = grid_x(p.size.sequences * p.size.heads * p.splits, "dequantise_states");
  switch (p.size.dtype) {
    case DType::f32: dequantise_states_kernel<float><<<blocks, kMoveThreads, 0, stream>>>(p); break;
    case DType::bf16: dequantise_states_kernel<bf16><<<blocks, kMoveThreads, 0, stream>>>(p); break;
    default: dequantise_states_kernel<f16><<<blocks, kMoveThreads, 0, stream>>>(p);
  }
  check_launch("dequantise_states");
}

// Scratch of a call, beside that of the phases.
struct CachedScratch {
  Piece<int32_t> cu_seqlens, entry, start, self;
  Piece<float> lse, staged_k, staged_v;
  Piece<char> chunk_k, chunk_v;  // of T: (N, H, rows, D)
};

CachedScratch take_scratch(const AttentionCachedParams& c, Arena& arena) {
  const Sizes& s = c.fwd.size;
  CachedScratch scratch;
  if (s.cu_seqlens) scratch.cu_seqlens = arena.take<int32_t>(s.sequences + 1);
  scratch.entry = arena.take<int32_t>(s.sequences);
  scratch.start = arena.take<int32_t>(s.sequences);
  scratch.lse = arena.take<float>(s.batch * s.heads * s.tokens);
  // A row of one token has one tile; longer chunks than these pass through the states of segments.
  if (s.tokens > 1 && s.tokens >= c.pool.ring && s.reset > 1 && s.reset <= kMaxChunkFwd) {
    scratch.staged_k = arena.take<float>(s.sequences * s.heads * s.head_dim);
    scratch.staged_v = arena.take<float>(s.sequences * s.heads * s.head_dim);
  }
  if (c.pool.scale_k) {
    const int64_t bytes = s.sequences * s.heads * c.pool.rows * s.head_dim * (s.dtype == DType::f32 ? 4 : 2);
    scratch.self = arena.take<int32_t>(s.sequences);
    scratch.chunk_k = arena.take<char>(bytes);
    scratch.chunk_v = arena.take<char>(bytes);
  }
  return scratch;
}

// The pool's own.
ChunkStates chunk_states(const Sizes& s, const Pool& pool) {
  ChunkStates c;
  c.k = pool.chunk_k;
  c.v = pool.chunk_v;
  c.head = pool.page_rows * s.head_dim;
  c.sequence = s.heads * c.head;
  c.rows = pool.rows;
  c.blocks = pool.pages;
  c.entry = pool.lengths;  // until there is scratch: not null
  c.page_table = pool.page_table;
  if (pool.page_table) {
    c.columns = pool.rows / pool.page_rows;
    while ((int64_t{1} << c.page_shift) < pool.page_rows) ++c.page_shift;
  }
  return c;
}

// The forward that the phases are asked for. Addresses in scratch come later.
AttentionFwdParams cached_forward(const AttentionCachedParams& c) {
  AttentionFwdParams a = c.fwd;
  const Sizes& s = a.size;
  a.size.lengths = c.pool.lengths;  // until there is scratch: not null
  a.chunks = chunk_states(s, c.pool);
  if (c.pool.scale_k) {
    a.chunks.k = a.chunks.v = nullptr;
    a.chunks.head = c.pool.rows * s.head_dim;
    a.chunks.sequence = s.heads * a.chunks.head;
    a.chunks.blocks = s.sequences;
    a.chunks.page_table = nullptr;
  }
  return a;
}

}  // namespace

void attention_cached(const AttentionCachedParams& c, const Allocator& allocator, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  AttentionFwdParams a = cached_forward(c);
  const Sizes& s = a.size;
  if (s.sequences == 0) return;
  const bool tokens = s.batch * s.tokens > 0;
  Arena arena;
  FwdScratch scratch{};
  PoolStates states{};
  const CachedScratch own = take_scratch(c, arena);
  scratch.s_self = arena.take<float>(s.batch * s.heads * s.tokens);
  const size_t mark = arena.mark();
  const Launch prepare = tokens ? chunk_prepare_fwd(a, scratch, &states, arena) : Launch();
  arena.rewind(mark);
  const Launch attend = tokens ? chunk_attention_fwd(a, scratch, arena) : Launch();
  arena.commit(allocator);

  const RowPlan plan{c.fwd.size,     c.pool,    c.slots,   a.rotary.cos ? a.rotary.rows : -1,
                     own.cu_seqlens, own.entry, own.start, own.staged_k,
                     own.staged_v};
  launch_overlapping(plan_rows_kernel, 1, kThreads, 0, stream, "plan_rows", plan);
  if (!tokens) return;

  if (s.cu_seqlens) a.size.cu_seqlens = own.cu_seqlens;
  a.size.lengths = own.start;
  a.chunks.entry = own.entry;
  a.lse = own.lse;
  states.entry = own.entry;
  states.k = static_cast<float*>(c.pool.running_k);
  states.v = static_cast<float*>(c.pool.running_v);
  states.ring = c.pool.ring;
  states.staged_k = own.staged_k;
  states.staged_v = own.staged_v;
  if (c.pool.scale_k) {
    states.quantised = chunk_states(s, c.pool);
    states.quantised.entry = own.entry;
    states.scale_k = c.pool.scale_k;
    states.scale_v = c.pool.scale_v;
    a.chunks.k = own.chunk_k.get();
    a.chunks.v = own.chunk_v.get();
    a.chunks.entry = own.self;
    const int64_t owners = s.sequences * s.heads, most = ceil_div(c.pool.rows * s.head_dim / 8, kMoveThreads * 4);
    const int64_t splits = std::clamp<int64_t>(most, 1, std::max<int64_t>(1, 4096 / owners));
    dequantise({s, states.quantised, a.chunks, c.pool.scale_k, c.pool.scale_v, splits, own.self}, stream);
  }
  prepare(stream);
  attend(stream);
}

NarrowRows narrow_rows(const AttentionCachedParams& c) { return narrow_rows(cached_forward(c)); }

std::vector<Choice> explain_attention_cached(const AttentionCachedParams& c) {
  const AttentionFwdParams a = cached_forward(c);
  std::vector<Choice> choices = explain_attention_fwd(a);
  for (Choice& choice : explain_recurrence_fwd(a)) choices.push_back(std::move(choice));
  return choices;
}

KernelList rat_attention_cached_kernels() {
  static const KernelTable table = [] {
    KernelTable t;
    t.add("plan_rows", plan_rows_kernel);
    t.add("dequantise_states<f32>", dequantise_states_kernel<float>);
    t.add("dequantise_states<bf16>", dequantise_states_kernel<bf16>);
    t.add("dequantise_states<f16>", dequantise_states_kernel<f16>);
    return t;
  }();
  return table.list();
}

}  // namespace rat::cuda
