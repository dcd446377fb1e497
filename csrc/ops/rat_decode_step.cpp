// rat_decode_step: a few new tokens for each row, against a cache that is updated in place.
#include "pool.h"

namespace rat {
namespace {

// (B, heads, D), or (B, n, heads, D).
template <Name name, class Op>
Rows token_rows(Call<Op>& call, const DecodeParams& p, bool many, int64_t heads) {
  if (!given<name>(call)) return {};
  if (many) return rows<name>(call, {p.batch, p.tokens, heads, p.head_dim});
  call.check_shape(name.view(), tensor<name>(call), {p.batch, heads, p.head_dim});
  call.check_rows(name.view(), tensor<name>(call));
  const View& x = call.with_rows(tensor<name>(call));
  return {x.data, p.batch > 1 ? x.strides[0] : 0, 0, heads > 1 ? x.strides[1] : 0};
}

}  // namespace

int64_t decode_workspace(int64_t pool, int64_t heads, int64_t chunk_rows, int64_t head_dim) {
#ifdef RAT_EXT_CUDA
  DecodeParams p;
  p.batch = p.pool.sequences = pool;
  p.heads = heads;
  p.pool.rows = chunk_rows;
  p.head_dim = head_dim;
  return static_cast<int64_t>(cuda::decode_workspace(p));
#else
  static_cast<void>(pool), static_cast<void>(heads), static_cast<void>(chunk_rows), static_cast<void>(head_dim);
  return 0;
#endif
}

void run(Call<RatDecodeStep>& call) {
  lead<"q">(call);
  const bool many = tensor<"v">(call).rank == 4;
  if (!many) check_rank<"v">(call, 3, "(B, H, D), or 4 (B, n, H, D)");
  check_rank<"q">(call, many ? 4 : 3, many ? "(B, n, G, D)" : "(B, G, D)");
  DecodeParams p;
  p.dtype = call.kernel_dtype();
  p.batch = size<"v">(call, 0);
  p.tokens = many ? size<"v">(call, 1) : 1;
  p.heads = size<"v">(call, many ? 2 : 1);
  p.head_dim = size<"v">(call, many ? 3 : 2);
  p.q_groups = p.k_groups = size<"q">(call, many ? 2 : 1);
  p.chunk_size = value<"chunk_size">(call);
  p.scale = value<"scale">(call);
  check_chunk_size(call, p.chunk_size);
  check_head_dim(call, "v", p.head_dim);
  check_groups(call, "q", p.q_groups, p.heads);
  check_tokens(call, p.tokens);
  p.q = token_rows<"q">(call, p, many, p.q_groups);
  p.k = token_rows<"k">(call, p, many, p.k_groups);
  p.v = token_rows<"v">(call, p, many, p.heads);
  p.gate = token_rows<"gate">(call, p, many, p.heads);
  p.out_gate = token_rows<"out_gate">(call, p, many, p.heads);
  p.gate_bias = gate_bias_of(call, p.heads, p.head_dim);
  p.rotary = rotary_of(call, p.head_dim);
  if (p.tokens > 0) check_rotary_rows(call, 1);
  p.pool = read_pool(call, p.heads, p.head_dim);
  p.slots = read_slots(call, p.pool, p.batch);

  check_rank<"workspace">(call, 1, "(bytes)");
  const int64_t bytes = size<"workspace">(call, 0);
  const int64_t needed = call.on_gpu() ? decode_workspace(p.pool.sequences, p.heads, p.pool.rows, p.head_dim) : 0;
  p.workspace = in_place<"workspace">(call, ScalarType::Byte, {bytes});
  if (bytes < needed) call.fail("workspace", "expected at least ", needed, " bytes, got ", bytes);

  const int64_t row = p.heads * p.head_dim;
  void* const y = many ? make<"y">(call, {p.batch, p.tokens, p.heads, p.head_dim}, call.dtype)
                       : make<"y">(call, {p.batch, p.heads, p.head_dim}, call.dtype);
  p.y = {y, p.tokens * row, row, p.head_dim};
  if (p.batch == 0 || p.heads == 0 || p.tokens == 0) return;
  launch(call, p, RAT_LAUNCHERS(decode_step));
}

}  // namespace rat
