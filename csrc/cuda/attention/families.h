// The kernel families of chunk attention, one file per family and direction. choose.cpp picks one per call.
#pragma once

#include "../phases.h"

namespace rat::cuda {

// Each family says whether it serves a call (null: it does, else why not, in words), and plans it.

// bfloat16 and float16 on Hopper's wgmma and bulk copies.
namespace sm90 {
const char* fwd_refuses(const AttentionFwdParams&);
Launch fwd(const AttentionFwdParams&, const FwdScratch&, Arena&);
const char* bwd_refuses(const AttentionBwdParams&);
Launch bwd(const AttentionBwdParams&, BwdScratch&, Arena&);
// Of head sizes over 128, in a file of their own: bwd() and bwd_refuses() ask them, nobody else. The reasons here come on top of
// those of bwd_refuses().
const char* bwd_wide_refuses(const AttentionBwdParams&);
Launch bwd_wide(const AttentionBwdParams&, BwdScratch&, Arena&);
}  // namespace sm90

// bfloat16 and float16 on tensor cores, compute capability 8.0 and newer.
namespace sm80 {
const char* fwd_refuses(const AttentionFwdParams&);
Launch fwd(const AttentionFwdParams&, const FwdScratch&, Arena&);
const char* bwd_refuses(const AttentionBwdParams&);
Launch bwd(const AttentionBwdParams&, BwdScratch&, Arena&);
}  // namespace sm80

// float32 on the CUDA cores: full float32 products, no TF32.
namespace f32 {
const char* fwd_refuses(const AttentionFwdParams&);
Launch fwd(const AttentionFwdParams&, const FwdScratch&, Arena&);
const char* bwd_refuses(const AttentionBwdParams&);
Launch bwd(const AttentionBwdParams&, BwdScratch&, Arena&);
}  // namespace f32

}  // namespace rat::cuda
