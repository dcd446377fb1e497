// What belongs to sequences rather than tokens: checks of lengths that only the device knows, and state that a sequence brings
// along or leaves behind.
#include <algorithm>
#include <cstdio>

#include "families.h"
#include "scan_launch.h"

namespace rat::cuda {
namespace {

constexpr int kThreads = 256;

struct Checks {
  Sizes size;
  int64_t chunk_rows, rotary_rows, initial_rows;  // negative: not to be checked
  int32_t* lengths_out;
};

#define RAT_DEVICE_CHECK(holds, ...)                                                                                   \
  do {                                                                                                                 \
    if (!(holds)) {                                                                                                    \
      printf(__VA_ARGS__);                                                                                             \
      __trap();                                                                                                        \
    }                                                                                                                  \
  } while (false)

// One block: calls have few sequences, and everything after it in the stream relies on what it has seen.
__global__ void __launch_bounds__(kThreads) check_sequences_kernel(const __grid_constant__ Checks p) {
  const Sizes& s = p.size;
  for (int64_t n = threadIdx.x; n < s.sequences; n += kThreads) {
    const Sequence q = sequence_at(s, n);
    const long long name = n, start = q.start, length = q.end - q.begin;
    if (s.cu_seqlens) {
      RAT_DEVICE_CHECK(n > 0 || q.begin == 0, "rat_ext: cu_seqlens: expected its first element to be 0, got %lld\n",
                       static_cast<long long>(q.begin));
      RAT_DEVICE_CHECK(length >= 0,
                       "rat_ext: cu_seqlens: expected no element below the one before, got %lld after %lld\n",
                       static_cast<long long>(q.end), static_cast<long long>(q.begin));
      RAT_DEVICE_CHECK(n + 1 < s.sequences || q.end == s.tokens,
                       "rat_ext: cu_seqlens: expected its last element to be the number of tokens %lld, got %lld\n",
                       static_cast<long long>(s.tokens), static_cast<long long>(q.end));
    }
    RAT_DEVICE_CHECK(start >= 0, "rat_ext: initial_state.lengths[%lld]: expected at least 0, got %lld\n", name, start);
    RAT_DEVICE_CHECK(start + length <= INT32_MAX,
                     "rat_ext: initial_state.lengths[%lld]: expected at most 2147483647 tokens in all, got %lld\n",
                     name, start + length);
    const long long closed = (start + length) / s.key_every;
    RAT_DEVICE_CHECK(
        p.initial_rows < 0 || start / s.key_every <= p.initial_rows,
        "rat_ext: initial_state.lengths[%lld]: expected chunk states for all of its %lld tokens, got %lld\n", name,
        start, static_cast<long long>(p.initial_rows));
    RAT_DEVICE_CHECK(p.chunk_rows < 0 || closed <= p.chunk_rows,
                     "rat_ext: chunk_rows: sequence %lld needs room for %lld chunk states, got %lld "
                     "(is length_bound of the initial state under its lengths?)\n",
                     name, closed, static_cast<long long>(p.chunk_rows));
    const long long rotations = length > 0 ? (start + length - 1) / s.rotate_every + 1 : 0;
    RAT_DEVICE_CHECK(p.rotary_rows < 0 || rotations <= p.rotary_rows,
                     "rat_ext: rotary_cos: sequence %lld needs %lld rows, one for each chunk, got %lld\n", name,
                     rotations, static_cast<long long>(p.rotary_rows));
    if (p.lengths_out) p.lengths_out[n] = static_cast<int32_t>(start + length);
  }
}

#undef RAT_DEVICE_CHECK

struct StateFwd {
  Sizes size;
  CarriedState initial;
  ChunkStates chunks;
  float* running_k;
  float* running_v;
  int64_t splits;  // blocks of an owner
};

// An owner is a (sequence, head). T stands for its size: elements are moved, not read.
template <class T>
__global__ void __launch_bounds__(kThreads) carry_state_fwd_kernel(const __grid_constant__ StateFwd p) {
  const Sizes& s = p.size;
  const int64_t owner = quotient(blockIdx.x, p.splits), split = modulo(blockIdx.x, p.splits);
  const int64_t n = quotient(owner, s.heads), h = modulo(owner, s.heads);
  const Sequence q = sequence_at(s, n);
  if (p.initial.k) {
    const int64_t count = quotient(q.start, s.key_every) * s.head_dim;
    const int64_t from = owner * p.initial.rows * s.head_dim, to = chunk_offset(s, p.chunks, n, h);
#pragma unroll 1
    for (int64_t i = (split * kThreads + threadIdx.x) * 8; i < count; i += p.splits * kThreads * 8) {
      const auto move = [&](const void* source, void* target) {
        store_raw(static_cast<T*>(target) + to + i, load_raw(static_cast<const T*>(source) + from + i));
      };
      move(p.initial.k, p.chunks.k);
      move(p.initial.v, p.chunks.v);
    }
  }
  if (q.begin == q.end && p.running_k && split == 0) {
    const float* k = static_cast<const float*>(p.initial.running_k);
    const float* v = static_cast<const float*>(p.initial.running_v);
    for (int64_t d = threadIdx.x; d < s.head_dim; d += kThreads) {
      const int64_t at = owner * s.head_dim + d;
      p.running_k[at] = k ? k[at] : 0.0f;
      p.running_v[at] = v ? v[at] : 0.0f;
    }
  }
}

struct StateBwd {
  Sizes size;
  ChunkGrads chunk;
  const float* drunning_k;  // (N, H, D) or null
  const float* drunning_v;
  CarriedState dinitial;
  int64_t splits;
};

template <class T>
__global__ void __launch_bounds__(kThreads) carry_state_bwd_kernel(const __grid_constant__ StateBwd p) {
  const Sizes& s = p.size;
  const int64_t owner = quotient(blockIdx.x, p.splits), split = modulo(blockIdx.x, p.splits);
  const int64_t n = quotient(owner, s.heads), h = modulo(owner, s.heads);
  const Sequence q = sequence_at(s, n);
  const bool empty = q.begin == q.end;
  if (p.dinitial.k) {
    const int64_t valid = quotient(q.start, s.key_every) * s.head_dim;
    const int64_t from = chunk_offset(s, p.chunk.layout, n, h), to = owner * p.dinitial.rows * s.head_dim;
    for (int64_t i = split * kThreads + threadIdx.x; i < p.dinitial.rows * s.head_dim; i += p.splits * kThreads) {
      float k = 0.0f, v = 0.0f;
      if (i < valid) {
        if (!empty) {  // nothing attends in an empty sequence
          k = p.chunk.attention_k[from + i];
          v = p.chunk.attention_v[from + i];
        }
        if (p.chunk.returned_k) k += to_float(static_cast<const T*>(p.chunk.returned_k)[from + i]);
        if (p.chunk.returned_v) v += to_float(static_cast<const T*>(p.chunk.returned_v)[from + i]);
      }
      static_cast<T*>(p.dinitial.k)[to + i] = from_float<T>(k);
      static_cast<T*>(p.dinitial.v)[to + i] = from_float<T>(v);
    }
  }
  if (empty && p.dinitial.running_k && split == 0) {
    for (int64_t d = threadIdx.x; d < s.head_dim; d += kThreads) {
      const int64_t at = owner * s.head_dim + d;
      static_cast<float*>(p.dinitial.running_k)[at] = p.drunning_k ? p.drunning_k[at] : 0.0f;
      static_cast<float*>(p.dinitial.running_v)[at] = p.drunning_v ? p.drunning_v[at] : 0.0f;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    copy_empty_kernel(const __grid_constant__ Sizes s, const float* source, float* target) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= s.sequences * s.heads * s.head_dim) return;
  const Sequence q = sequence_at(s, i / (s.heads * s.head_dim));
  if (q.begin == q.end) target[i] = source ? source[i] : 0.0f;
}

// Blocks for each of `owners` that move `elements` each.
int64_t splits_for(int64_t owners, int64_t elements) {
  const int64_t useful = std::max<int64_t>(1, ceil_div(elements, kThreads * 16));
  return std::min(useful, std::max<int64_t>(1, 4096 / owners));
}

}  // namespace

void check_sequences(const Sizes& size, int64_t chunk_rows, int64_t rotary_rows, int64_t initial_rows,
                     int32_t* lengths_out, cudaStream_t stream) {
  if (size.sequences == 0) return;
  check_sequences_kernel<<<1, kThreads, 0, stream>>>(Checks{size, chunk_rows, rotary_rows, initial_rows, lengths_out});
  check_launch("check_sequences");
}

void carry_state_fwd(const AttentionFwdParams& a, cudaStream_t stream) {
  const Sizes& s = a.size;
  const bool maybe_empty = a.running_k && (s.cu_seqlens || s.tokens == 0);
  const int64_t owners = s.sequences * s.heads;
  if (owners == 0 || !(a.initial.k || maybe_empty)) return;
  StateFwd p{};
  p.size = s;
  p.initial = a.initial;
  p.chunks = a.chunks;
  p.running_k = static_cast<float*>(a.running_k);
  p.running_v = static_cast<float*>(a.running_v);
  p.splits = splits_for(owners, a.initial.k ? a.initial.rows * s.head_dim : 0);
  const unsigned blocks = grid_x(owners * p.splits, "carry_state_fwd");
  if (s.dtype == DType::f32) {
    carry_state_fwd_kernel<float><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    carry_state_fwd_kernel<bf16><<<blocks, kThreads, 0, stream>>>(p);
  }
  check_launch("carry_state_fwd");
}

void carry_state_bwd(const AttentionBwdParams& a, const BwdScratch& scratch, cudaStream_t stream) {
  const Sizes& s = a.fwd.size;
  const int64_t owners = s.sequences * s.heads;
  if (owners == 0 || !(a.dinitial.k || a.dinitial.running_k)) return;
  StateBwd p{};
  p.size = s;
  p.chunk = chunk_grads(a, scratch);
  p.drunning_k = static_cast<const float*>(a.drunning_k);
  p.drunning_v = static_cast<const float*>(a.drunning_v);
  p.dinitial = a.dinitial;
  p.splits = splits_for(owners, a.dinitial.k ? a.dinitial.rows * s.head_dim : 0);
  const unsigned blocks = grid_x(owners * p.splits, "carry_state_bwd");
  switch (s.dtype) {
    case DType::f32: carry_state_bwd_kernel<float><<<blocks, kThreads, 0, stream>>>(p); break;
    case DType::bf16: carry_state_bwd_kernel<bf16><<<blocks, kThreads, 0, stream>>>(p); break;
    case DType::f16: carry_state_bwd_kernel<f16><<<blocks, kThreads, 0, stream>>>(p); break;
    default: fail_dtype("rat_attention");
  }
  check_launch("carry_state_bwd");
}

void copy_empty(const Sizes& s, const float* source, float* target, cudaStream_t stream) {
  const int64_t count = s.sequences * s.heads * s.head_dim;
  if (count == 0 || !(s.cu_seqlens || s.tokens == 0)) return;
  copy_empty_kernel<<<grid_x(ceil_div(count, kThreads), "copy_empty"), kThreads, 0, stream>>>(s, source, target);
  check_launch("copy_empty");
}

KernelList chunk_recurrence_kernels() {
  static const KernelTable table = [] {
    KernelTable t;
    t.add(forward_kernels());
    t.add(segments_kernels());
    t.add(prepare_kernels());
    t.add(reverse_kernels());
    t.add(reverse_tiles_kernels());
    t.add("check_sequences", check_sequences_kernel);
    t.add("carry_state_fwd<4 bytes>", carry_state_fwd_kernel<float>);
    t.add("carry_state_fwd<2 bytes>", carry_state_fwd_kernel<bf16>);
    t.add("carry_state_bwd<f32>", carry_state_bwd_kernel<float>);
    t.add("carry_state_bwd<bf16>", carry_state_bwd_kernel<bf16>);
    t.add("carry_state_bwd<f16>", carry_state_bwd_kernel<f16>);
    t.add("copy_empty", copy_empty_kernel);
    return t;
  }();
  return table.list();
}

}  // namespace rat::cuda
