// rat_attention and chunk_attention: scratch, and the phases of phases.h in order.
#include "host/launch.h"
#include "phases.h"

namespace rat::cuda {
namespace {

struct FwdPlan {
  FwdScratch scratch;
  void* phase;  // workspace of one phase at a time: their lives do not overlap
};

FwdPlan carve(const AttentionFwdParams& a, Carver& carver) {
  FwdPlan plan{};
  plan.scratch.s_self = carver.take<float>(a.size.batch * a.size.heads * a.size.tokens);
  const size_t phase = chunk_prepare_fwd_workspace(a), attention = chunk_attention_fwd_workspace(a);
  plan.phase = carver.take<char>(static_cast<int64_t>(phase > attention ? phase : attention));
  return plan;
}

struct BwdPlan {
  BwdScratch scratch;
  void* phase;
};

BwdPlan carve(const AttentionBwdParams& a, Carver& carver) {
  const Sizes& s = a.fwd.size;
  const ChunkStates& c = a.fwd.chunks;
  BwdPlan plan{};
  const int64_t scalars = s.batch * s.heads * s.tokens;
  const int64_t states = (c.compact ? 1 : s.sequences) * s.heads * c.rows * s.head_dim;
  if (!short_chunks(a.fwd)) {
    plan.scratch.p_self = carver.take<float>(scalars);
    plan.scratch.ds_self = carver.take<float>(scalars);
  }
  plan.scratch.delta = carver.take<float>(scalars);
  plan.scratch.dq = carver.take<float>(s.batch * s.tokens * s.q_groups * s.head_dim);
  plan.scratch.dchunk_k = carver.take<float>(states);
  plan.scratch.dchunk_v = carver.take<float>(states);
  plan.scratch.dout = a.fwd.out_gate.ptr ? a.dv : a.dy;
  size_t phase = chunk_prepare_bwd_workspace(a);
  const size_t attention = chunk_attention_bwd_workspace(a), scan = chunk_scan_bwd_workspace(a);
  if (attention > phase) phase = attention;
  if (scan > phase) phase = scan;
  plan.phase = carver.take<char>(static_cast<int64_t>(phase));
  return plan;
}

void check_call(const AttentionFwdParams& a, int32_t* lengths_out, cudaStream_t stream) {
  const Sizes& s = a.size;
  if (!(s.cu_seqlens || s.lengths || lengths_out)) return;
  check_sequences(s, a.chunks.compact ? -1 : a.chunks.rows, a.rotary.cos ? a.rotary.rows : -1,
                  a.initial.k ? a.initial.rows : -1, lengths_out, stream);
}

}  // namespace

size_t attention_fwd_workspace(const AttentionFwdParams& a) {
  Carver carver(nullptr);
  carve(a, carver);
  return carver.used();
}

void attention_fwd(const AttentionFwdParams& a, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  Carver carver(a.workspace);
  const FwdPlan plan = carve(a, carver);
  check_call(a, a.lengths_out, stream);
  chunk_prepare_fwd(a, plan.scratch, plan.phase, stream);
  if (a.size.batch * a.size.tokens > 0) chunk_attention_fwd(a, plan.scratch, plan.phase, stream);
}

size_t attention_bwd_workspace(const AttentionBwdParams& a) {
  Carver carver(nullptr);
  carve(a, carver);
  return carver.used();
}

void attention_bwd(const AttentionBwdParams& a, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  Carver carver(a.workspace);
  const BwdPlan plan = carve(a, carver);
  check_call(a.fwd, nullptr, stream);
  const bool tokens = a.fwd.size.batch * a.fwd.size.tokens > 0;
  if (tokens) {
    chunk_prepare_bwd(a, plan.scratch, plan.phase, stream);
    chunk_attention_bwd(a, plan.scratch, plan.phase, stream);
  }
  chunk_scan_bwd(a, plan.scratch, plan.phase, stream);
}

}  // namespace rat::cuda
