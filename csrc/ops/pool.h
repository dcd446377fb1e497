// The arguments RAT_POOL (schemas.h) of the ops that update a pool in place.
#pragma once

#include "call.h"

namespace rat {

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

// (P, H, D), or (P, R, H, D). The ring's size is that of running_k.
template <Name name, class Op>
void* running_in_place(Call<Op>& call, const Pool& p, int64_t heads, int64_t head_dim) {
  if (tensor<"running_k">(call).rank == 3) return in_place<name>(call, call.acc, {p.sequences, heads, head_dim});
  return in_place<name>(call, call.acc, {p.sequences, p.ring, heads, head_dim});
}

// Checks the tensors of a pool for a call of `heads` heads of `head_dim`.
template <class Op>
Pool read_pool(Call<Op>& call, int64_t heads, int64_t head_dim) {
  Pool p;
  check_rank<"chunk_k">(call, 4, given<"page_table">(call) ? "(pages, H, rows, D)" : "(sequences, H, chunks, D)");
  p.pages = size<"chunk_k">(call, 0);
  p.page_rows = size<"chunk_k">(call, 2);
  if (given<"page_table">(call)) {
    check_rank<"page_table">(call, 2, "(sequences, pages of each)");
    if (p.page_rows < 1 || (p.page_rows & (p.page_rows - 1)) != 0) {
      call.fail("chunk_k", "expected pages of a number of rows that is a power of two, got ", p.page_rows);
    }
    p.sequences = size<"page_table">(call, 0);
    p.rows = p.page_rows * size<"page_table">(call, 1);
    // Read, but shared with the host, which changes it between calls that a graph replays.
    p.page_table = static_cast<const int32_t*>(
        in_place<"page_table">(call, ScalarType::Int, {p.sequences, size<"page_table">(call, 1)}));
  } else {
    p.sequences = p.pages;
    p.rows = p.page_rows;
  }
  if (given<"scale_k">(call) != given<"scale_v">(call)) {
    call.fail(given<"scale_k">(call) ? "scale_v" : "scale_k", "expected both scales or none, got one");
  }
  const ScalarType states = given<"scale_k">(call) ? ScalarType::Float8_e4m3fn : call.dtype;
  p.chunk_k = in_place<"chunk_k">(call, states, {p.pages, heads, p.page_rows, head_dim});
  p.chunk_v = in_place<"chunk_v">(call, states, {p.pages, heads, p.page_rows, head_dim});
  if (given<"scale_k">(call)) {
    const Shape sizes = {p.pages, heads, p.page_rows};
    p.scale_k = static_cast<float*>(in_place<"scale_k">(call, ScalarType::Float, sizes));
    p.scale_v = static_cast<float*>(in_place<"scale_v">(call, ScalarType::Float, sizes));
  }
  const View& running = tensor<"running_k">(call);
  p.ring = running.rank == 4 ? running.sizes[1] : 1;
  if (p.ring < 1) call.fail("running_k", "expected room for one state at least, got ", p.ring);
  p.running_k = running_in_place<"running_k">(call, p, heads, head_dim);
  p.running_v = running_in_place<"running_v">(call, p, heads, head_dim);
  p.lengths = static_cast<int32_t*>(in_place<"lengths">(call, ScalarType::Int, {p.sequences}));
  p.error = static_cast<int32_t*>(in_place<"error">(call, ScalarType::Int, {4}));
  return p;
}

// (B): the sequence of each row, or null where row b goes on with sequence b.
template <class Op>
const int64_t* read_slots(Call<Op>& call, const Pool& pool, int64_t batch) {
  if (!given<"slots">(call) && batch > pool.sequences) {
    call.fail("q", "expected at most ", pool.sequences, " rows, one for each sequence of the cache, got ", batch);
  }
  return static_cast<const int64_t*>(packed<"slots">(call, ScalarType::Long, {batch}));
}

}  // namespace rat
