// Which family serves the recurrence of rat_attention: decided here and nowhere else. In the backward one row gives both phases, so
// that they agree. chunk_recurrence has one family.
#include "families.h"

#include "../host/family.h"

namespace rat::cuda {
namespace {

struct ForwardFamily {
  const char* name;
  const char* (*refuses)(const AttentionFwdParams&);  // null where it serves the call, else the reason in words
  Launch (*prepare)(const AttentionFwdParams&, const FwdScratch&, const PoolStates*, Arena&);
  bool reads_narrow_rows;  // of k, v and gate (launchers.h)
};

const FamilyTable<ForwardFamily> kForward("recurrence_fwd", {{"few", few_scan::refuses, few_scan::prepare, false},
                                                             {"scan", scan::refuses, scan::prepare, true}});

struct ReverseFamily {
  const char* name;
  const char* (*refuses)(const AttentionBwdParams&);  // null where it serves the call, else the reason in words
  Launch (*prepare)(const AttentionBwdParams&, const BwdScratch&, Arena&);
  Launch (*reverse)(const AttentionBwdParams&, const BwdScratch&, Arena&);
  bool makes_weights;  // phase 3 makes p_tt and ds_tt; else phase 1 leaves them in scratch memory
  bool (*reads_dq_tiles)(const AttentionBwdParams&);  // or null: never
  int64_t (*tile_states)(const AttentionBwdParams&);  // elements that phase 1 leaves for phase 3, or null: none
};

const FamilyTable<ReverseFamily> kReverse(
    "recurrence_bwd",
    {{"short", short_scan::refuses, short_scan::prepare, short_scan::reverse, true, short_scan::all_whole, nullptr},
     {"long", long_scan::refuses, scan::prepare, long_scan::reverse, false, long_scan::all_whole,
      long_scan::tile_states},
     {"scan", scan::refuses, scan::prepare, scan::reverse, false, nullptr, nullptr}});

}  // namespace

Launch chunk_prepare_fwd(const AttentionFwdParams& a, const FwdScratch& scratch, const PoolStates* pool, Arena& arena) {
  return kForward.choose(a).prepare(a, scratch, pool, arena);
}

bool recurrence_reads_narrow_rows(const AttentionFwdParams& a) { return kForward.choose(a).reads_narrow_rows; }

bool short_chunks(const AttentionBwdParams& a) { return kReverse.choose(a).makes_weights; }

bool scan_reads_dq_tiles(const AttentionBwdParams& a) {
  const auto asked = kReverse.choose(a).reads_dq_tiles;
  return asked && asked(a);
}

int64_t tile_states_elements(const AttentionBwdParams& a) {
  const auto asked = kReverse.choose(a).tile_states;
  return asked ? asked(a) : 0;
}

Launch chunk_prepare_bwd(const AttentionBwdParams& a, const BwdScratch& scratch, Arena& arena) {
  return kReverse.choose(a).prepare(a, scratch, arena);
}

Launch chunk_scan_bwd(const AttentionBwdParams& a, const BwdScratch& scratch, Arena& arena) {
  const Launch reverse = kReverse.choose(a).reverse(a, scratch, arena);
  return [&a, scratch, reverse](cudaStream_t stream) {
    carry_state_bwd(a, scratch, stream);
    reverse(stream);
  };
}

std::vector<Choice> explain_recurrence_fwd(const AttentionFwdParams& a) { return kForward.explain(a); }
std::vector<Choice> explain_recurrence_bwd(const AttentionBwdParams& a) { return kReverse.explain(a); }

}  // namespace rat::cuda
