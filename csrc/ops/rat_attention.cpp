// rat_attention, chunk_attention (the same without a gate), rat_attention_packed, and their backwards; rat_attention on a pool.
#include "pool.h"

namespace rat {
namespace {

// ---- what the forward and the backward read alike -------------------------------------------------------------------------

// q (B, T, G, D); k (B, T, G, D), or (B, T, H, D) without a gate; v, gate, out_gate (B, T, H, D).
template <class Op>
void read_rows(Call<Op>& call, AttentionFwdParams& p) {
  const bool gated = given<"gate">(call);
  call.states_given = !gated;
  if (!gated) call.op = std::is_same_v<Op, RatAttention> ? "chunk_attention" : "chunk_attention_backward";
  lead<"q">(call);
  check_rank<"q">(call, 4, "(B, T, G, D)");
  check_rank<"k">(call, 4, gated ? "(B, T, G, D)" : "(B, T, H, D)");
  check_rank<"v">(call, 4, "(B, T, H, D)");
  Sizes& s = p.size;
  s.batch = size<"v">(call, 0);
  s.tokens = size<"v">(call, 1);
  s.heads = size<"v">(call, 2);
  s.head_dim = size<"v">(call, 3);
  s.q_groups = size<"q">(call, 2);
  s.k_groups = gated ? s.q_groups : s.heads;
  check_chunk_size(call, value<"chunk_size">(call));
  s.set_chunk_size(value<"chunk_size">(call));
  check_head_dim(call, "v", s.head_dim);
  check_groups(call, "q", s.q_groups, s.heads);
  p.q = rows<"q">(call, {s.batch, s.tokens, s.q_groups, s.head_dim});
  p.k = rows<"k">(call, {s.batch, s.tokens, s.k_groups, s.head_dim});
  p.v = rows<"v">(call, {s.batch, s.tokens, s.heads, s.head_dim});
  p.gate = rows<"gate">(call, {s.batch, s.tokens, s.heads, s.head_dim});
  p.out_gate = rows<"out_gate">(call, {s.batch, s.tokens, s.heads, s.head_dim});
}

// All but q, whose part is copied.
template <class Op>
bool all_narrow(const Call<Op>& call, const NarrowRows& narrow) {
  return narrow.k && narrow.v && narrow.gate && (narrow.out_gate || !value<"has_out_gate">(call));
}

template <Name name, class Op>
void settle(Call<Op>& call, Rows& rows, bool narrow) {
  if (given<name>(call) && !narrow) rows = call.rows_of(tensor<name>(call));
}

// Views of one projection (B, T, [q: G, k: G, v: H, gate: H, out_gate: H or none] x D).
void split(const CallBase& call, AttentionFwdParams& p, const Rows& projection, bool has_out_gate) {
  const Sizes& s = p.size;
  int64_t offset = 0;
  const auto next = [&](int64_t heads) {
    Rows part = projection;
    part.head = s.head_dim;
    part.ptr = static_cast<char*>(projection.ptr) + offset * call.element_size();
    offset += heads * s.head_dim;
    return part;
  };
  p.q = next(s.q_groups);
  p.k = next(s.k_groups);
  p.v = next(s.heads);
  p.gate = next(s.heads);
  if (has_out_gate) p.out_gate = next(s.heads);
}

template <class Op>
void split(Call<Op>& call, AttentionFwdParams& p, const View& projection) {
  split(
      call, p,
      {projection.data, p.size.batch > 1 ? projection.strides[0] : 0, p.size.tokens > 1 ? projection.strides[1] : 0, 0},
      value<"has_out_gate">(call));
}

template <class Op>
void read_projection(Call<Op>& call, AttentionFwdParams& p) {
  lead<"projection">(call);
  check_rank<"projection">(call, 3, "(B, T, width)");
  call.check_rows("projection", tensor<"projection">(call));
  const View& projection = call.with_rows(tensor<"projection">(call));
  Sizes& s = p.size;
  s.batch = projection.sizes[0];
  s.tokens = projection.sizes[1];
  s.heads = value<"num_heads">(call);
  s.q_groups = s.k_groups = value<"num_groups">(call);
  if (s.heads < 1) call.fail("num_heads", "expected at least 1, got ", s.heads);
  check_groups(call, "num_groups", s.q_groups, s.heads);
  const bool has_out_gate = value<"has_out_gate">(call);
  const int64_t width = projection.sizes[2];
  if (s.heads > width) call.fail("num_heads", "expected at most the projection's width ", width, ", got ", s.heads);
  const int64_t parts = 2 * s.q_groups + (has_out_gate ? 3 : 2) * s.heads;
  if (width % parts) {
    call.fail("projection", "expected a width that is a multiple of ", parts, " (2 num_groups + ", has_out_gate ? 3 : 2,
              " num_heads), got ", width);
  }
  s.head_dim = width / parts;
  check_chunk_size(call, value<"chunk_size">(call));
  s.set_chunk_size(value<"chunk_size">(call));
  check_head_dim(call, "projection", s.head_dim);
  split(call, p, projection);
}

// Copies rows that have been left where they are, but for those in `narrow`.
template <class Op>
void copy_left_rows(Call<Op>& call, AttentionFwdParams& p, const NarrowRows& narrow) {
  call.leave_narrow = false;
  if constexpr (Call<Op>::template has_argument<"projection">) {
    const View& projection = tensor<"projection">(call);
    if (!all_narrow(call, narrow)) return split(call, p, call.with_rows(projection));
    p.q = call.rows_of(call.columns(projection, 0, p.size.q_groups * p.size.head_dim));
    p.q.head = p.size.head_dim;
  } else {
    settle<"q">(call, p.q, false);
    settle<"k">(call, p.k, narrow.k);
    settle<"v">(call, p.v, narrow.v);
    settle<"gate">(call, p.gate, narrow.gate);
    settle<"out_gate">(call, p.out_gate, narrow.out_gate);
  }
}

// Launches a forward, whose rows are `p` in `params`. Where no backward wants the copies of rows, those rows alone are copied that
// the call's kernels do not read where they are.
template <class Op, class Params>
void launch_forward(Call<Op>& call, Params& params, AttentionFwdParams& p,
                    std::type_identity_t<void (*)(const Params&, const Allocator&)> on_cpu,
                    std::type_identity_t<void (*)(const Params&, const Allocator&, void*)> on_gpu) {
  const NarrowRows narrow = call.has_narrow ? narrow_rows(call, params) : NarrowRows{};
  if (call.has_narrow) copy_left_rows(call, p, narrow);
  launch(call, params, on_cpu, on_gpu);
  if (call.mode != Mode::explain) return;
  if constexpr (Call<Op>::template has_argument<"projection">) {
    call.explain_rows("projection", tensor<"projection">(call), all_narrow(call, narrow));
  } else {
    call.explain_rows("q", tensor<"q">(call), false);
    call.explain_rows("k", tensor<"k">(call), narrow.k);
    call.explain_rows("v", tensor<"v">(call), narrow.v);
    if (given<"gate">(call)) call.explain_rows("gate", tensor<"gate">(call), narrow.gate);
    if (given<"out_gate">(call)) call.explain_rows("out_gate", tensor<"out_gate">(call), narrow.out_gate);
  }
}

template <class Op>
void read_state(Call<Op>& call, AttentionFwdParams& p) {
  Sizes& s = p.size;
  const bool carried = given<"lengths">(call);
  if (carried != given<"chunk_k">(call) || carried != given<"chunk_v">(call) || carried != given<"running_k">(call) ||
      carried != given<"running_v">(call)) {
    call.fail("initial_state", "expected all of its five tensors or none, got some");
  }
  if (!carried) return;
  check_rank<"chunk_k">(call, 4, "(sequences, H, chunks, D)");
  const int64_t chunks = p.initial.rows = size<"chunk_k">(call, 2);
  p.initial.k = packed<"chunk_k">(call, call.dtype, {s.sequences, s.heads, chunks, s.head_dim});
  p.initial.v = packed<"chunk_v">(call, call.dtype, {s.sequences, s.heads, chunks, s.head_dim});
  p.initial.running_k = packed<"running_k">(call, call.acc, {s.sequences, s.heads, s.head_dim});
  p.initial.running_v = packed<"running_v">(call, call.acc, {s.sequences, s.heads, s.head_dim});
  s.lengths = static_cast<const int32_t*>(packed<"lengths">(call, ScalarType::Int, {s.sequences}));
}

// `chunk_rows`: for how many closed chunks there is room, for each sequence or for the whole packed row.
template <class Op>
void set_chunk_states(Call<Op>& call, AttentionFwdParams& p, int64_t chunk_rows) {
  const Sizes& s = p.size;
  const bool carried = given<"lengths">(call);
  const bool compact = given<"cu_seqlens">(call) && !carried && !value<"return_state">(call);
  // Of packed sequences whose states are returned the caller knows the longest; kernels check each.
  int64_t needed = carried ? p.initial.rows : s.tokens / s.key_every + (compact ? s.sequences : 0);
  if (!carried && !compact && given<"cu_seqlens">(call)) needed = 0;
  if (chunk_rows < needed) {
    call.fail("chunk_rows", "expected room for at least ", needed, " chunk states, got ", chunk_rows);
  }
  constexpr int64_t kMost = INT64_C(0xffffff00);  // a tile of keys behind them is below 2^32
  if (call.on_gpu() && chunk_rows > kMost) call.fail("chunk_rows", "expected at most ", kMost, ", got ", chunk_rows);
  p.chunks.rows = chunk_rows;
  p.chunks.compact = compact;
  p.chunks.head = chunk_rows * s.head_dim;
  p.chunks.sequence = compact ? 0 : s.heads * p.chunks.head;
}

// Of what was given the call tells, not pointers: those of tensors without elements or memory are null.
template <class Op>
AttentionFwdParams params_of(Call<Op>& call, int64_t chunk_rows) {
  AttentionFwdParams p;
  if constexpr (Call<Op>::template has_argument<"projection">) {
    read_projection(call, p);
  } else {
    read_rows(call, p);
  }
  Sizes& s = p.size;
  s.dtype = call.kernel_dtype();
  set_sequences(call, s);
  p.gate_bias = gate_bias_of(call, s.heads, s.head_dim);
  p.rotary = rotary_of(call, s.head_dim);
  p.scale = value<"scale">(call);
  read_state(call, p);
  set_chunk_states(call, p, chunk_rows);
  // Positions that only the device knows are checked by the launcher.
  const bool known = !given<"cu_seqlens">(call) && !given<"lengths">(call);
  if (s.tokens > 0) check_rotary_rows(call, known ? (s.tokens - 1) / s.rotate_every + 1 : 1);
  return p;
}

int64_t owners_of(const AttentionFwdParams& p) { return p.chunks.compact ? 1 : p.size.sequences; }

bool has_work(const Sizes& s, bool states) {
  return s.sequences > 0 && s.heads > 0 && (s.batch * s.tokens > 0 || states);
}

// ---- forward ------------------------------------------------------------------------------------------------------------

// An absent result is none rather than an empty tensor, which costs the host about three quarters of what one with elements
// does.
template <class Op>
void forward(Call<Op>& call) {
  call.leave_narrow = !call.saves_copies;
  AttentionFwdParams p = params_of(call, value<"chunk_rows">(call));
  const Sizes& s = p.size;
  const bool return_state = value<"return_state">(call);
  p.y = make_rows<"y">(call, {s.batch, s.tokens, s.heads, s.head_dim});
  p.lse = make<"lse">(call, {s.batch, s.heads, s.tokens}, call.acc);
  // y is the caller's to keep for as long as it likes; chunk states are too, where they are returned.
  if (!return_state) call.expect(2 * owners_of(p) * s.heads * p.chunks.rows * s.head_dim);
  p.chunks.k = make<"chunk_k_out">(call, {owners_of(p), s.heads, p.chunks.rows, s.head_dim}, call.dtype);
  p.chunks.v = make<"chunk_v_out">(call, {owners_of(p), s.heads, p.chunks.rows, s.head_dim}, call.dtype);
  if (return_state) {
    p.running_k = make<"running_k_out">(call, {s.sequences, s.heads, s.head_dim}, call.acc);
    p.running_v = make<"running_v_out">(call, {s.sequences, s.heads, s.head_dim}, call.acc);
    p.lengths_out = static_cast<int32_t*>(make<"lengths_out">(call, {s.sequences}, ScalarType::Int));
  }
  if (!has_work(s, return_state)) return;
  launch_forward(call, p, p, RAT_LAUNCHERS(attention_fwd));
  if (call.mode == Mode::explain) {  // the backward of this call, whose gradients are rows like their inputs
    copy_left_rows(call, p, {});
    AttentionBwdParams b;
    b.fwd = p;
    b.deterministic = value<"deterministic">(call);
    b.dy = p.y;
    b.dq = p.q;
    b.dk = p.k;
    b.dv = p.v;
    b.dgate = p.gate;
    b.dout_gate = p.out_gate;
    explain(call, b);
  }
}

// ---- backward -----------------------------------------------------------------------------------------------------------

template <class Op>
void read_saved(Call<Op>& call, AttentionBwdParams& b) {
  check_rank<"chunk_k_out">(call, 4, "(sequences, H, chunks, D)");
  b.deterministic = value<"deterministic">(call);
  b.fwd = params_of(call, size<"chunk_k_out">(call, 2));
  AttentionFwdParams& p = b.fwd;
  const Sizes& s = p.size;
  p.y = rows<"y">(call, {s.batch, s.tokens, s.heads, s.head_dim});
  p.lse = packed<"lse">(call, call.acc, {s.batch, s.heads, s.tokens});
  p.chunks.k = packed<"chunk_k_out">(call, call.dtype, {owners_of(p), s.heads, p.chunks.rows, s.head_dim});
  p.chunks.v = packed<"chunk_v_out">(call, call.dtype, {owners_of(p), s.heads, p.chunks.rows, s.head_dim});
}

template <class Op>
void read_gradients(Call<Op>& call, AttentionBwdParams& b) {
  const AttentionFwdParams& p = b.fwd;
  const Sizes& s = p.size;
  b.dy = copied_rows<"dy">(call, {s.batch, s.tokens, s.heads, s.head_dim});
  if (p.chunks.compact && (given<"dchunk_k_out">(call) || given<"dchunk_v_out">(call))) {
    call.fail("dchunk_k_out", "expected none for packed sequences, got one");
  }
  b.dchunk_k = copied<"dchunk_k_out">(call, call.dtype, {owners_of(p), s.heads, p.chunks.rows, s.head_dim});
  b.dchunk_v = copied<"dchunk_v_out">(call, call.dtype, {owners_of(p), s.heads, p.chunks.rows, s.head_dim});
  b.drunning_k = copied<"drunning_k_out">(call, call.acc, {s.sequences, s.heads, s.head_dim});
  b.drunning_v = copied<"drunning_v_out">(call, call.acc, {s.sequences, s.heads, s.head_dim});
}

// The small gradients and the kernels; those of the rows are made.
template <class Op>
void finish_backward(Call<Op>& call, AttentionBwdParams& b) {
  const AttentionFwdParams& p = b.fwd;
  const Sizes& s = p.size;
  const bool carried = given<"lengths">(call);
  if (given<"gate_bias">(call)) b.dgate_bias = make<"dgate_bias">(call, {s.heads, s.head_dim}, call.acc);
  if (carried) {
    b.dinitial.rows = p.initial.rows;
    b.dinitial.k = make<"dchunk_k">(call, {s.sequences, s.heads, p.initial.rows, s.head_dim}, call.dtype);
    b.dinitial.v = make<"dchunk_v">(call, {s.sequences, s.heads, p.initial.rows, s.head_dim}, call.dtype);
    b.dinitial.running_k = make<"drunning_k">(call, {s.sequences, s.heads, s.head_dim}, call.acc);
    b.dinitial.running_v = make<"drunning_v">(call, {s.sequences, s.heads, s.head_dim}, call.acc);
  }
  if (has_work(s, carried)) {
    launch(call, b, RAT_LAUNCHERS(attention_bwd));
  } else {
    zero<"dgate_bias">(call);
  }
}

// ---- on a pool ----------------------------------------------------------------------------------------------------------

// Pages of fewer rows are no whole swizzle of Hopper's copy engine, and another family would give a token other bits.
constexpr int64_t kLeastPageRows = 8;

}  // namespace

void run(Call<RatAttentionCached>& call) {
  AttentionCachedParams p;
  AttentionFwdParams& a = p.fwd;
  call.leave_narrow = true;
  read_rows(call, a);
  Sizes& s = a.size;
  s.dtype = call.kernel_dtype();
  set_sequences(call, s);
  a.gate_bias = gate_bias_of(call, s.heads, s.head_dim);
  a.rotary = rotary_of(call, s.head_dim);
  a.scale = value<"scale">(call);
  p.pool = read_pool(call, s.heads, s.head_dim);
  p.slots = read_slots(call, p.pool, s.sequences);
  if (s.tokens > 0) check_rotary_rows(call, 1);
  if (call.on_gpu() && p.pool.page_table && p.pool.page_rows < kLeastPageRows) {
    call.fail("chunk_k", "expected pages of at least ", kLeastPageRows, " rows on a GPU, got ", p.pool.page_rows);
  }
  a.y = make_rows<"y">(call, {s.batch, s.tokens, s.heads, s.head_dim});
  if (has_work(s, true)) launch_forward(call, p, a, RAT_LAUNCHERS(attention_cached));
}

void run(Call<RatAttention>& call) { forward(call); }
void run(Call<RatAttentionPacked>& call) { forward(call); }

void run(Call<RatAttentionBackward>& call) {
  AttentionBwdParams b;
  read_saved(call, b);
  read_gradients(call, b);
  const Sizes& s = b.fwd.size;
  const int64_t per_head = 1 + (given<"gate">(call) ? 1 : 0) + (given<"out_gate">(call) ? 1 : 0);
  call.expect(s.batch * s.tokens * (s.q_groups + s.k_groups + per_head * s.heads) * s.head_dim);
  b.dq = make_rows<"dq">(call, {s.batch, s.tokens, s.q_groups, s.head_dim});
  b.dk = make_rows<"dk">(call, {s.batch, s.tokens, s.k_groups, s.head_dim});
  b.dv = make_rows<"dv">(call, {s.batch, s.tokens, s.heads, s.head_dim});
  if (given<"gate">(call)) b.dgate = make_rows<"dgate">(call, {s.batch, s.tokens, s.heads, s.head_dim});
  if (given<"out_gate">(call)) b.dout_gate = make_rows<"dout_gate">(call, {s.batch, s.tokens, s.heads, s.head_dim});
  finish_backward(call, b);
}

void run(Call<RatAttentionPackedBackward>& call) {
  AttentionBwdParams b;
  read_saved(call, b);
  read_gradients(call, b);
  const Sizes& s = b.fwd.size;
  const int64_t width = size<"projection">(call, 2);
  call.expect(s.batch * s.tokens * width);
  AttentionFwdParams parts;
  parts.size = s;
  split(call, parts, {make<"dprojection">(call, {s.batch, s.tokens, width}, call.dtype), s.tokens * width, width, 0},
        value<"has_out_gate">(call));
  b.dq = parts.q;
  b.dk = parts.k;
  b.dv = parts.v;
  b.dgate = parts.gate;
  b.dout_gate = parts.out_gate;
  finish_backward(call, b);
}

}  // namespace rat
