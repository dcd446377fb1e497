// The families of the backward recurrence of rat_attention: phases 1 and 3, which agree on who makes p_tt and ds_tt. choose.cu
// picks one per call.
#pragma once

#include "scan_launch.h"

namespace rat::cuda {

// Chunks of at most kShortChunk tokens, elements of two bytes: the reverse scan keeps a chunk's states in registers, and makes
// p_tt and ds_tt itself.
namespace short_scan {
constexpr int64_t kShortChunk = 16;
const char* refuses(const AttentionBwdParams&);
Launch prepare(const AttentionBwdParams&, const BwdScratch&, Arena&);
Launch reverse(const AttentionBwdParams&, const BwdScratch&, Arena&);
}  // namespace short_scan

// Every call. Phase 1 makes p_tt and ds_tt.
namespace scan {
const char* refuses(const AttentionBwdParams&);
Launch prepare(const AttentionBwdParams&, const BwdScratch&, Arena&);
Launch reverse(const AttentionBwdParams&, const BwdScratch&, Arena&);
}  // namespace scan

}  // namespace rat::cuda
