// The kernel families behind chunk_attention_fwd and chunk_attention_bwd of phases.h. attention/choose.cu picks one.
#pragma once

#include "../phases.h"

namespace rat::cuda {

// bfloat16 and float16 on tensor cores, compute capability 8.0 and newer.
namespace sm80 {
size_t chunk_attention_fwd_workspace(const AttentionFwdParams&);
void chunk_attention_fwd(const AttentionFwdParams&, const FwdScratch&, void* workspace, cudaStream_t);
size_t chunk_attention_bwd_workspace(const AttentionBwdParams&);
void chunk_attention_bwd(const AttentionBwdParams&, const BwdScratch&, void* workspace, cudaStream_t);
}  // namespace sm80

// float32 on the CUDA cores: full float32 products, no TF32.
namespace f32 {
size_t chunk_attention_fwd_workspace(const AttentionFwdParams&);
void chunk_attention_fwd(const AttentionFwdParams&, const FwdScratch&, void* workspace, cudaStream_t);
size_t chunk_attention_bwd_workspace(const AttentionBwdParams&);
void chunk_attention_bwd(const AttentionBwdParams&, const BwdScratch&, void* workspace, cudaStream_t);
}  // namespace f32

}  // namespace rat::cuda
