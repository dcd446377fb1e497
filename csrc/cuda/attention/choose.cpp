// Which family of chunk attention kernels serves a call: decided here and nowhere else. Every family keeps to one contract
// (phases.h), so forward and backward of a call may come from different ones. A new family is one row per table.
#include "families.h"

#include "../host/family.h"

namespace rat::cuda {
namespace {

using FwdTable = FamilyTable<Family<AttentionFwdParams, const FwdScratch>>;
using BwdTable = FamilyTable<Family<AttentionBwdParams, BwdScratch>>;

const FwdTable kFwd("attention_fwd", {{"sm90", sm90::fwd_refuses, sm90::fwd, true},
                                      {"sm80", sm80::fwd_refuses, sm80::fwd},
                                      {"f32", f32::fwd_refuses, f32::fwd}});

const BwdTable kBwd("attention_bwd", {{"sm90", sm90::bwd_refuses, sm90::bwd},
                                      {"sm80", sm80::bwd_refuses, sm80::bwd},
                                      {"f32", f32::bwd_refuses, f32::bwd}});

}  // namespace

Launch chunk_attention_fwd(const AttentionFwdParams& p, const FwdScratch& scratch, Arena& arena) {
  return kFwd.choose(p).plan(p, scratch, arena);
}

bool attention_reads_narrow_rows(const AttentionFwdParams& p) { return kFwd.choose(p).reads_narrow_rows; }

Launch chunk_attention_bwd(const AttentionBwdParams& p, BwdScratch& scratch, Arena& arena) {
  return kBwd.choose(p).plan(p, scratch, arena);
}

std::vector<Choice> explain_attention_fwd(const AttentionFwdParams& p) { return kFwd.explain(p); }
std::vector<Choice> explain_attention_bwd(const AttentionBwdParams& p) { return kBwd.explain(p); }

}  // namespace rat::cuda
