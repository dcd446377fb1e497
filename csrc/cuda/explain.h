// Which kernel family serves a call, and why: one entry per family of a phase, best first. A phase's choose file answers; nothing
// is launched. No torch, no CUDA header. Params need what decides: sizes, dtype, strides.
#pragma once

#include <string>
#include <vector>

#include "../launchers.h"

namespace rat::cuda {

struct Choice {
  std::string phase;   // "attention_fwd", as in RAT_EXT_KERNELS
  std::string family;  // "sm90"
  bool chosen;         // one per phase; none where no family serves the call
  std::string why;     // in words
};

std::vector<Choice> explain_attention_fwd(const AttentionFwdParams&);
std::vector<Choice> explain_attention_cached(const AttentionCachedParams&);
std::vector<Choice> explain_attention_bwd(const AttentionBwdParams&);
std::vector<Choice> explain_recurrence_fwd(const AttentionFwdParams&);
std::vector<Choice> explain_recurrence_bwd(const AttentionBwdParams&);

// Throws std::invalid_argument where RAT_EXT_KERNELS names a family that no phase has.
void check_forced();

}  // namespace rat::cuda
