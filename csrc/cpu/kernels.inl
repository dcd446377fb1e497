// All kernels for one instruction set. The including file defines RAT_ISA, the name of the set and of its namespace,
// and RAT_VECTOR_BYTES, and has made the compiler generate code for it. It has included every header that is needed
// here before that, so that no function of a header is compiled for the set. Everything but the table has internal
// linkage.

// Vectors wider than the set's registers are passed by value below, only between functions that are always inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace rat::cpu::RAT_ISA {
namespace {

#include "simd.inl"

#include "matmul.inl"

#include "tile.inl"

#include "attention_fwd.inl"

#include "attention_bwd.inl"

#include "recurrence.inl"

#include "decode.inl"

// Calls f with a value of the storage type.
template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f64: return f(double{});
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
  }
}

void run_attention_fwd(const AttentionFwdParams& p, const Plan& plan, const Workspace& w) {
  with_type(p.size.dtype, [&](auto type) { attention_forward<decltype(type)>(p, plan, w); });
}

void run_attention_on_pool(const AttentionFwdParams& p, const Plan& plan, const Workspace& w) {
  with_type(p.size.dtype, [&](auto type) { attention_on_pool<decltype(type)>(p, plan, w); });
}

void run_attention_bwd(const AttentionBwdParams& p, const Plan& plan, const Workspace& w) {
  with_type(p.fwd.size.dtype, [&](auto type) { attention_backward<decltype(type)>(p, plan, w); });
}

void run_recurrence_fwd(const RecurrenceFwdParams& p, const Plan& plan, const Workspace& w) {
  with_type(p.size.dtype, [&](auto type) { recurrence_forward<decltype(type)>(p, plan, w); });
}

void run_recurrence_bwd(const RecurrenceBwdParams& p, const Plan& plan, const Workspace& w) {
  with_type(p.fwd.size.dtype, [&](auto type) { recurrence_backward<decltype(type)>(p, plan, w); });
}

void run_decode_step(const DecodeParams& p, const DecodeWorkspace& w, int64_t token) {
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    p.pool.scale_k ? decode<T, e4m3>(p, w, token) : decode<T, T>(p, w, token);
  });
}

}  // namespace

#define RAT_TEXT(x) #x
#define RAT_NAME(x) RAT_TEXT(x)

const Kernels kernels = {RAT_NAME(RAT_ISA),  run_attention_fwd,  run_attention_on_pool, run_attention_bwd,
                         run_recurrence_fwd, run_recurrence_bwd, run_decode_step};

}  // namespace rat::cpu::RAT_ISA
