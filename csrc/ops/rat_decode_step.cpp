// rat_decode_step: one new token for each row, against a cache that is updated in place.
#include "call.h"

namespace rat {
namespace {

// (B, heads, D)
template <Name name, class Op>
Rows token_rows(Call<Op>& call, int64_t batch, int64_t heads, int64_t head_dim) {
  if (!given<name>(call)) return {};
  const View& x = tensor<name>(call);
  call.check_shape(name.view(), x, {batch, heads, head_dim});
  call.check_rows(name.view(), x);
  return call.aligned_rows({x.data, batch > 1 ? x.strides[0] : 0, 0, heads > 1 ? x.strides[1] : 0});
}

// A tensor of the cache is written, so that a copy would not do. Kernels read it in vectors; those of the CPU need no alignment.
template <Name name, class Op>
void* in_place(Call<Op>& call, ScalarType type, Shape sizes) {
  const View& x = tensor<name>(call);
  call.check_packed(name.view(), x, type, sizes);
  if (call.on_gpu() && reinterpret_cast<uintptr_t>(x.data) % 16) {
    call.fail(name.view(), "expected memory that begins at a multiple of 16 bytes, got ",
              reinterpret_cast<uintptr_t>(x.data) % 16, " bytes past one");
  }
  return x.data;
}

}  // namespace

int64_t decode_workspace(int64_t pool, int64_t heads, int64_t chunk_rows, int64_t head_dim) {
#ifdef RAT_EXT_CUDA
  DecodeParams p;
  p.pool = p.batch = pool;
  p.heads = heads;
  p.rows = chunk_rows;
  p.head_dim = head_dim;
  return static_cast<int64_t>(cuda::decode_workspace(p));
#else
  static_cast<void>(pool), static_cast<void>(heads), static_cast<void>(chunk_rows), static_cast<void>(head_dim);
  return 0;
#endif
}

void run(Call<RatDecodeStep>& call) {
  lead<"q">(call);
  check_rank<"q">(call, 3, "(B, G, D)");
  check_rank<"v">(call, 3, "(B, H, D)");
  DecodeParams p;
  p.dtype = call.kernel_dtype();
  p.batch = size<"v">(call, 0);
  p.heads = size<"v">(call, 1);
  p.head_dim = size<"v">(call, 2);
  p.q_groups = p.k_groups = size<"q">(call, 1);
  p.chunk_size = value<"chunk_size">(call);
  p.scale = value<"scale">(call);
  check_chunk_size(call, p.chunk_size);
  check_head_dim(call, "v", p.head_dim);
  check_groups(call, "q", p.q_groups, p.heads);
  p.q = token_rows<"q">(call, p.batch, p.q_groups, p.head_dim);
  p.k = token_rows<"k">(call, p.batch, p.k_groups, p.head_dim);
  p.v = token_rows<"v">(call, p.batch, p.heads, p.head_dim);
  p.gate = token_rows<"gate">(call, p.batch, p.heads, p.head_dim);
  p.out_gate = token_rows<"out_gate">(call, p.batch, p.heads, p.head_dim);
  p.gate_bias = gate_bias_of(call, p.heads, p.head_dim);
  p.rotary = rotary_of(call, p.head_dim);

  check_rank<"chunk_k">(call, 4, "(sequences, H, chunks, D)");
  p.pool = size<"chunk_k">(call, 0);
  p.rows = size<"chunk_k">(call, 2);
  p.chunk_k = in_place<"chunk_k">(call, call.dtype, {p.pool, p.heads, p.rows, p.head_dim});
  p.chunk_v = in_place<"chunk_v">(call, call.dtype, {p.pool, p.heads, p.rows, p.head_dim});
  p.running_k = in_place<"running_k">(call, call.acc, {p.pool, p.heads, p.head_dim});
  p.running_v = in_place<"running_v">(call, call.acc, {p.pool, p.heads, p.head_dim});
  p.lengths = static_cast<int32_t*>(in_place<"lengths">(call, ScalarType::Int, {p.pool}));
  p.slots = static_cast<const int64_t*>(packed<"slots">(call, ScalarType::Long, {p.batch}));
  if (!given<"slots">(call) && p.batch > p.pool) {
    call.fail("q", "expected at most ", p.pool, " rows, one for each sequence of the cache, got ", p.batch);
  }
  check_rank<"workspace">(call, 1, "(bytes)");
  const int64_t bytes = size<"workspace">(call, 0);
  const int64_t needed = call.on_gpu() ? decode_workspace(p.pool, p.heads, p.rows, p.head_dim) : 0;
  p.workspace = in_place<"workspace">(call, ScalarType::Byte, {bytes});
  if (bytes < needed) call.fail("workspace", "expected at least ", needed, " bytes, got ", bytes);

  p.y = {make<"y">(call, {p.batch, p.heads, p.head_dim}, call.dtype), p.heads * p.head_dim, 0, p.head_dim};
  p.aligned16 = call.aligned;
  if (p.batch == 0 || p.heads == 0) return;
  launch(call, p, RAT_LAUNCHERS(decode_step));
}

}  // namespace rat
