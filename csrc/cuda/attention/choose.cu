// Which family of chunk attention kernels serves a call: decided here and nowhere else. Every family keeps to one contract
// (phases.h), so forward and backward of a call may come from different ones. A new family is one row per table.
#include "families.h"

namespace rat::cuda {
namespace {

constexpr Family<AttentionFwdParams, FwdScratch> kFwd[] = {
    {"sm90", sm90::fwd_refuses, sm90::fwd},
    {"sm80", sm80::fwd_refuses, sm80::fwd},
    {"f32", f32::fwd_refuses, f32::fwd},
};

constexpr Family<AttentionBwdParams, BwdScratch> kBwd[] = {
    {"sm90", sm90::bwd_refuses, sm90::bwd},
    {"sm80", sm80::bwd_refuses, sm80::bwd},
    {"f32", f32::bwd_refuses, f32::bwd},
};

}  // namespace

Launch chunk_attention_fwd(const AttentionFwdParams& p, const FwdScratch& scratch, Arena& arena) {
  return choose("attention_fwd", kFwd, p).plan(p, scratch, arena);
}

Launch chunk_attention_bwd(const AttentionBwdParams& p, const BwdScratch& scratch, Arena& arena) {
  return choose("attention_bwd", kBwd, p).plan(p, scratch, arena);
}

}  // namespace rat::cuda
