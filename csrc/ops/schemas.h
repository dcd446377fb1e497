// The operators of rat_ext: every argument and result, once. call.h reads these texts when compiling, rat_ext/_autograd.py when
// importing, so that a new argument is added here and read by name where it is used. CONTRIBUTING.md has all of its places.
//
// Names carry meaning. In `<op>_backward`, an argument that is called like an argument or a result of <op> is that, saved;
// `d` + a result of <op> is the gradient that comes in, and the result `d` + an argument of <op> the one that goes out, of the
// shape and dtype of that argument. A result without a gradient (lse, lengths_out) is not differentiable.
//
// kState: what the caller knows the tensors of a state by, as in "cache.lengths". Empty: by their own names.
#pragma once

#include <string_view>

namespace rat {

// ---- rat_attention and chunk_attention (without gate: k and v are states, k has H heads) --------------------------------

// Arguments that the forward and the backward of both entries share, in order.
#define RAT_STATE                                                                                                      \
  "Tensor? rotary_cos, Tensor? rotary_sin, Tensor? cu_seqlens, Tensor? chunk_k, Tensor? chunk_v, Tensor? running_k, "  \
  "Tensor? running_v, Tensor? lengths, "
#define RAT_INPUTS "Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? gate_bias, Tensor? out_gate, " RAT_STATE
#define RAT_PACKED_INPUTS                                                                                              \
  "Tensor projection, SymInt num_heads, SymInt num_groups, bool has_out_gate, Tensor? gate_bias, " RAT_STATE
#define RAT_OPTIONS "SymInt chunk_size, float scale, SymInt chunk_rows, bool return_state, bool deterministic"
#define RAT_RESULTS                                                                                                    \
  "(Tensor y, Tensor lse, Tensor chunk_k_out, Tensor chunk_v_out, Tensor? running_k_out, Tensor? running_v_out, "      \
  "Tensor? lengths_out)"
#define RAT_GRADS                                                                                                      \
  "Tensor dy, Tensor? dchunk_k_out, Tensor? dchunk_v_out, Tensor? drunning_k_out, Tensor? drunning_v_out, "
#define RAT_SAVED "Tensor y, Tensor lse, Tensor chunk_k_out, Tensor chunk_v_out, "
#define RAT_BACKWARD_OPTIONS "SymInt chunk_size, float scale, bool return_state, bool deterministic"
#define RAT_STATE_GRADS "Tensor? dchunk_k, Tensor? dchunk_v, Tensor? drunning_k, Tensor? drunning_v"

struct RatAttention {
  static constexpr std::string_view kState = "initial_state";
  static constexpr const char* kSchema = "rat_attention(" RAT_INPUTS RAT_OPTIONS ") -> " RAT_RESULTS;
};
struct RatAttentionBackward {
  static constexpr std::string_view kState = "initial_state";
  static constexpr const char* kSchema = "rat_attention_backward(" RAT_GRADS RAT_INPUTS RAT_SAVED RAT_BACKWARD_OPTIONS
                                         ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor? dgate, Tensor? dgate_bias, "
                                         "Tensor? dout_gate, " RAT_STATE_GRADS ")";
};
struct RatAttentionPacked {
  static constexpr std::string_view kState = "initial_state";
  static constexpr const char* kSchema = "rat_attention_packed(" RAT_PACKED_INPUTS RAT_OPTIONS ") -> " RAT_RESULTS;
};
struct RatAttentionPackedBackward {
  static constexpr std::string_view kState = "initial_state";
  static constexpr const char* kSchema =
      "rat_attention_packed_backward(" RAT_GRADS RAT_PACKED_INPUTS RAT_SAVED RAT_BACKWARD_OPTIONS
      ") -> (Tensor dprojection, Tensor? dgate_bias, " RAT_STATE_GRADS ")";
};

#undef RAT_STATE
#undef RAT_INPUTS
#undef RAT_PACKED_INPUTS
#undef RAT_OPTIONS
#undef RAT_RESULTS
#undef RAT_GRADS
#undef RAT_SAVED
#undef RAT_BACKWARD_OPTIONS
#undef RAT_STATE_GRADS

// ---- chunk_recurrence -------------------------------------------------------------------------------------------------

#define RAT_INPUTS                                                                                                     \
  "Tensor x, Tensor gate, Tensor? gate_bias, Tensor? cu_seqlens, Tensor? initial_state, Tensor? lengths, "

struct ChunkRecurrence {
  static constexpr std::string_view kState = "";
  static constexpr const char* kSchema =
      "chunk_recurrence(" RAT_INPUTS "SymInt chunk_size, bool return_state) -> (Tensor y, Tensor? final_state)";
};
struct ChunkRecurrenceBackward {
  static constexpr std::string_view kState = "";
  static constexpr const char* kSchema =
      "chunk_recurrence_backward(Tensor dy, Tensor? dfinal_state, " RAT_INPUTS
      "Tensor y, SymInt chunk_size) -> (Tensor dx, Tensor dgate, Tensor? dgate_bias, Tensor? dinitial_state)";
};

#undef RAT_INPUTS

// ---- a pool of cached sequences ---------------------------------------------------------------------------------------

#define RAT_POOL                                                                                                       \
  "Tensor? slots, Tensor? page_table, Tensor(a!) chunk_k, Tensor(b!) chunk_v, Tensor(c!)? scale_k, "                   \
  "Tensor(d!)? scale_v, Tensor(e!) running_k, Tensor(f!) running_v, Tensor(g!) lengths, Tensor(h!) error, "

struct RatDecodeStep {
  static constexpr std::string_view kState = "cache";
  static constexpr const char* kSchema =
      "rat_decode_step(Tensor q, Tensor k, Tensor v, Tensor gate, Tensor? gate_bias, Tensor? out_gate, "
      "Tensor? rotary_cos, Tensor? rotary_sin, " RAT_POOL
      "Tensor(i!) workspace, SymInt chunk_size, float scale) -> (Tensor y)";
};

// The forward of rat_attention for rows that continue sequences of a pool. No gradient.
struct RatAttentionCached {
  static constexpr std::string_view kState = "cache";
  static constexpr const char* kSchema =
      "rat_attention_cached(Tensor q, Tensor k, Tensor v, Tensor gate, Tensor? gate_bias, Tensor? out_gate, "
      "Tensor? rotary_cos, Tensor? rotary_sin, Tensor? cu_seqlens, " RAT_POOL
      "SymInt chunk_size, float scale) -> (Tensor y)";
};

#undef RAT_POOL

}  // namespace rat
