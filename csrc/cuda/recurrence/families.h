// The families of the recurrence of rat_attention: phase 1 of the forward, and phases 1 and 3 of the backward, which agree on who
// makes p_tt and ds_tt. choose.cpp picks one per call.
#pragma once

#include "../phases.h"

namespace rat::cuda {

// Chunks of at most kShortChunk tokens, elements of two bytes: the reverse scan keeps a chunk's states in registers, and makes
// p_tt and ds_tt itself.
namespace short_scan {
constexpr int64_t kShortChunk = 16;
const char* refuses(const AttentionBwdParams&);
// All tiles of the call are whole (reverse_tiles.cu): then attention's part of dq may come in its tiles.
bool all_whole(const AttentionBwdParams&);
Launch prepare(const AttentionBwdParams&, const BwdScratch&, Arena&);
Launch reverse(const AttentionBwdParams&, const BwdScratch&, Arena&);
}  // namespace short_scan

// Longer chunks, elements of two bytes: the same in tiles of 16 tokens, which hand gradients to each other. Phase 1 is that of `scan`,
// and leaves the states that tiles start with.
namespace long_scan {
const char* refuses(const AttentionBwdParams&);
bool all_whole(const AttentionBwdParams&);
int64_t tile_states(const AttentionBwdParams&);  // elements
Launch reverse(const AttentionBwdParams&, const BwdScratch&, Arena&);
}  // namespace long_scan

// Forward, chunks of at most kShortChunk tokens, elements of two bytes, calls of few tiles: a block for each, where `scan` has a warp.
// Forward families give the same bits.
namespace few_scan {
const char* refuses(const AttentionFwdParams&);
Launch prepare(const AttentionFwdParams&, const FwdScratch&, const PoolStates*, Arena&);
}  // namespace few_scan

// Every call. Backward phase 1 makes p_tt and ds_tt.
namespace scan {
const char* refuses(const AttentionFwdParams&);
Launch prepare(const AttentionFwdParams&, const FwdScratch&, const PoolStates*, Arena&);
const char* refuses(const AttentionBwdParams&);
Launch prepare(const AttentionBwdParams&, const BwdScratch&, Arena&);
Launch reverse(const AttentionBwdParams&, const BwdScratch&, Arena&);
}  // namespace scan

// State that sequences bring along, outside the tokens, whatever the family (sequences.cu). Forward: copies the initial chunk
// states to the front of `chunks`, and gives empty sequences their running state. Backward: the gradients of the same.
void carry_state_fwd(const AttentionFwdParams&, cudaStream_t);
void carry_state_bwd(const AttentionBwdParams&, const BwdScratch&, cudaStream_t);

}  // namespace rat::cuda
