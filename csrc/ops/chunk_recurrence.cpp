// chunk_recurrence and its backward.
#include "call.h"

namespace rat {
namespace {

// What the forward and the backward read alike.
template <class Op>
RecurrenceFwdParams params_of(Call<Op>& call) {
  lead<"x">(call);
  check_rank<"x">(call, 4, "(B, T, G, D)");
  check_rank<"gate">(call, 4, "(B, T, H, D)");
  RecurrenceFwdParams p;
  Sizes& s = p.size;
  s.dtype = call.kernel_dtype();
  s.batch = size<"gate">(call, 0);
  s.tokens = size<"gate">(call, 1);
  s.heads = size<"gate">(call, 2);
  s.head_dim = size<"gate">(call, 3);
  s.k_groups = s.q_groups = size<"x">(call, 2);
  check_chunk_size(call, value<"chunk_size">(call));
  s.set_chunk_size(value<"chunk_size">(call));
  check_head_dim(call, "gate", s.head_dim);
  check_groups(call, "x", s.k_groups, s.heads);
  p.x = rows<"x">(call, {s.batch, s.tokens, s.k_groups, s.head_dim});
  p.gate = rows<"gate">(call, {s.batch, s.tokens, s.heads, s.head_dim});
  set_sequences(call, s);
  p.gate_bias = gate_bias_of(call, s.heads, s.head_dim);
  if (given<"initial_state">(call) != given<"lengths">(call)) {
    call.fail(given<"lengths">(call) ? "initial_state" : "lengths",
              "expected initial_state and lengths together, got one");
  }
  p.initial = packed<"initial_state">(call, call.acc, {s.sequences, s.heads, s.head_dim});
  s.lengths = static_cast<const int32_t*>(packed<"lengths">(call, ScalarType::Int, {s.sequences}));
  return p;
}

bool has_work(const Sizes& s, bool states) {
  return s.sequences > 0 && s.heads > 0 && (s.batch * s.tokens > 0 || states);
}

}  // namespace

void run(Call<ChunkRecurrence>& call) {
  RecurrenceFwdParams p = params_of(call);
  const Sizes& s = p.size;
  const bool return_state = value<"return_state">(call);
  p.y = make_rows<"y">(call, {s.batch, s.tokens, s.heads, s.head_dim});
  if (return_state) p.final_state = make<"final_state">(call, {s.sequences, s.heads, s.head_dim}, call.acc);
  if (has_work(s, return_state)) launch(call, p, RAT_LAUNCHERS(recurrence_fwd));
}

void run(Call<ChunkRecurrenceBackward>& call) {
  RecurrenceBwdParams b;
  b.fwd = params_of(call);
  const Sizes& s = b.fwd.size;
  b.fwd.y = rows<"y">(call, {s.batch, s.tokens, s.heads, s.head_dim});
  b.dy = copied_rows<"dy">(call, {s.batch, s.tokens, s.heads, s.head_dim});
  b.dfinal = copied<"dfinal_state">(call, call.acc, {s.sequences, s.heads, s.head_dim});
  b.dx = make_rows<"dx">(call, {s.batch, s.tokens, s.k_groups, s.head_dim});
  b.dgate = make_rows<"dgate">(call, {s.batch, s.tokens, s.heads, s.head_dim});
  const bool carried = given<"initial_state">(call);
  if (given<"gate_bias">(call)) b.dgate_bias = make<"dgate_bias">(call, {s.heads, s.head_dim}, call.acc);
  if (carried) b.dinitial = make<"dinitial_state">(call, {s.sequences, s.heads, s.head_dim}, call.acc);
  if (has_work(s, carried)) {
    launch(call, b, RAT_LAUNCHERS(recurrence_bwd));
  } else {
    zero<"dgate_bias">(call);
  }
}

}  // namespace rat
