// The first and the last step of every backward family, see rotate_reduce.h.
#include "rotate_reduce.h"

#include "tiles.cuh"

namespace rat::cuda {
namespace {

// R_c x of every token and group (x itself without a rotation). A thread owns four columns of each half of a row. 2 D elements
// of traffic per token and group. Clears the counters.
template <class T>
__global__ void __launch_bounds__(256)
    chunk_attention_rotate_bwd_kernel(const __grid_constant__ Sizes s, const __grid_constant__ Rows x, int64_t groups,
                                      const float* cos, const float* sin, const __grid_constant__ Rows out,
                                      const Counters counters) {
  const int pieces = static_cast<int>(s.head_dim / 8);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = index; i < counters.count; i += static_cast<int64_t>(gridDim.x) * blockDim.x) counters.words[i] = 0;
  if (index >= s.batch * s.tokens * groups * pieces) return;
  const int piece = static_cast<int>(index % pieces);
  const int64_t row = index / pieces;
  const int64_t group = row % groups, token = row / groups % s.tokens, batch = row / groups / s.tokens;
  const auto begin = [&](int64_t n) { return s.cu_seqlens[n]; };
  const Sequence sequence = sequence_at(s, s.cu_seqlens ? last_sequence(s, token, begin) : batch);
  if (token >= sequence.end) return;
  const int half = static_cast<int>(s.head_dim / 2);
  const T* from = row_pointer<T>(x, batch, token, group) + 4 * piece;
  float low[4], high[4];
  load4(from, low);
  load4(from + half, high);
  rotate4(low, high, cos, sin, quotient(sequence.start + token - sequence.begin, s.rotate_every), half, piece, 1.0f);
  FourOf<T> a, b;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    a.value[j] = from_float<T>(low[j]);
    b.value[j] = from_float<T>(high[j]);
  }
  T* to = static_cast<T*>(out.ptr) + batch * out.batch + token * out.token + group * out.head + 4 * piece;
  *reinterpret_cast<FourOf<T>*>(to) = a;
  *reinterpret_cast<FourOf<T>*>(to + half) = b;
}

// Adds the shares of the queries, in order, four elements per thread. Rows that are not valid hold anything before and after.
__global__ void __launch_bounds__(256)
    chunk_attention_reduce_bwd_kernel(const float* shares_k, const float* shares_v, int shares, int64_t share_stride,
                                      int64_t count, float* dchunk_k, float* dchunk_v) {
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (index >= 2 * count) return;
  const bool second = index >= count;
  const int64_t offset = second ? index - count : index;
  const float* from = (second ? shares_v : shares_k) + offset;
  float4 sum = *reinterpret_cast<const float4*>(from);
  for (int s = 1; s < shares; ++s) {
    const float4 x = *reinterpret_cast<const float4*>(from + s * share_stride);
    sum.x += x.x;
    sum.y += x.y;
    sum.z += x.z;
    sum.w += x.w;
  }
  *reinterpret_cast<float4*>((second ? dchunk_v : dchunk_k) + offset) = sum;
}

template <class T>
void rotate(const Sizes& s, const Rows& x, int64_t groups, const Rotary& rotary, const Rows& to,
            const Counters& counters, cudaStream_t stream) {
  const char* name = "chunk_attention_rotate_bwd_kernel";
  const int64_t threads = s.batch * s.tokens * groups * (s.head_dim / 8);
  if (threads == 0) return;
  chunk_attention_rotate_bwd_kernel<T><<<grid_x(ceil_div(threads, 256), name), 256, 0, stream>>>(
      s, x, groups, static_cast<const float*>(rotary.cos), static_cast<const float*>(rotary.sin), to, counters);
  check_launch(name);
}

void rotate(const Sizes& s, const Rows& x, int64_t groups, const Rotary& rotary, const Rows& to,
            const Counters& counters, cudaStream_t stream) {
  switch (s.dtype) {
    case DType::bf16: rotate<bf16>(s, x, groups, rotary, to, counters, stream); break;
    case DType::f16: rotate<f16>(s, x, groups, rotary, to, counters, stream); break;
    default: rotate<float>(s, x, groups, rotary, to, counters, stream);
  }
}

}  // namespace

Rows make_product_queries(const AttentionBwdParams& p, const Counters& counters, cudaStream_t stream) {
  const Sizes& s = p.fwd.size;
  if (p.fwd.rotary.cos) {
    rotate(s, p.fwd.q, s.q_groups, p.fwd.rotary, p.dq, counters, stream);
    return p.dq;
  }
  if (counters.count > 0) {
    check(cudaMemsetAsync(counters.words, 0, counters.count * sizeof(uint32_t), stream), "counters");
  }
  return p.fwd.q;
}

Shares take_shares(const AttentionBwdParams& p, int64_t count, Arena& arena) {
  Shares shares;
  shares.count = count;
  shares.extent = states_extent(p.fwd.size, p.fwd.chunks);
  if (count > 1) {
    shares.k = arena.take<float>(count * shares.extent);
    shares.v = arena.take<float>(count * shares.extent);
  }
  return shares;
}

void add_shares(const Shares& shares, const BwdScratch& scratch, cudaStream_t stream) {
  if (shares.count <= 1 || shares.extent == 0) return;
  const char* name = "chunk_attention_reduce_bwd_kernel";
  chunk_attention_reduce_bwd_kernel<<<grid_x(ceil_div(2 * shares.extent / 4, 256), name), 256, 0, stream>>>(
      shares.k, shares.v, static_cast<int>(shares.count), shares.extent, shares.extent, scratch.dchunk_k,
      scratch.dchunk_v);
  check_launch(name);
}

KernelList chunk_attention_rotate_reduce_kernels() {
  static const KernelEntry entries[] = {
      {"chunk_attention_rotate_bwd<bf16>", reinterpret_cast<const void*>(&chunk_attention_rotate_bwd_kernel<bf16>)},
      {"chunk_attention_rotate_bwd<f16>", reinterpret_cast<const void*>(&chunk_attention_rotate_bwd_kernel<f16>)},
      {"chunk_attention_rotate_bwd<float>", reinterpret_cast<const void*>(&chunk_attention_rotate_bwd_kernel<float>)},
      {"chunk_attention_reduce_bwd", reinterpret_cast<const void*>(&chunk_attention_reduce_bwd_kernel)},
  };
  return {entries, static_cast<int>(sizeof(entries) / sizeof(entries[0]))};
}

}  // namespace rat::cuda
