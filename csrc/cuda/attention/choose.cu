// Which family of chunk attention kernels serves a call: decided here and nowhere else.
//
// RAT_EXT_KERNELS, read once: "auto" (or unset) takes the fastest family that device and arguments allow; "sm80" takes the
// portable one. Every family keeps to one contract (phases.h), so forward and backward of a call may come from different
// ones. A new family is one enumerator, one condition in choose_fwd or choose_bwd, and one case in the functions below.
#include <cstdlib>
#include <cstring>

#include "../host/launch.h"
#include "families.h"

namespace rat::cuda {
namespace {

enum class Family { f32, sm80, sm90 };

bool portable_only() {
  static const bool portable = [] {
    const char* name = std::getenv("RAT_EXT_KERNELS");
    if (name == nullptr || *name == '\0' || std::strcmp(name, "auto") == 0) return false;
    if (std::strcmp(name, "sm80") == 0) return true;
    throw std::runtime_error(std::string("rat_ext: RAT_EXT_KERNELS must be auto or sm80, got '") + name + "'");
  }();
  return portable;
}

Family portable_family(const Sizes& size) {
  if (size.dtype == DType::f32) return Family::f32;
  if (size.dtype == DType::bf16 || size.dtype == DType::f16) return Family::sm80;
  throw std::runtime_error("rat_ext: chunk attention on CUDA supports bfloat16, float16 and float32");
}

Family choose_fwd(const AttentionFwdParams& p) {
  const bool portable = portable_only();
#ifdef RAT_EXT_SM90
  if (!portable && chunk_attention_fwd_sm90_supported(p)) return Family::sm90;
#endif
  static_cast<void>(portable);
  return portable_family(p.size);
}

Family choose_bwd(const AttentionBwdParams& p) {
  const bool portable = portable_only();
#ifdef RAT_EXT_SM90
  if (!portable && chunk_attention_bwd_sm90_supported(p)) return Family::sm90;
#endif
  static_cast<void>(portable);
  return portable_family(p.fwd.size);
}

}  // namespace

size_t chunk_attention_fwd_workspace(const AttentionFwdParams& p) {
  switch (choose_fwd(p)) {
#ifdef RAT_EXT_SM90
    case Family::sm90: return chunk_attention_fwd_sm90_workspace(p);
#endif
    case Family::f32: return f32::chunk_attention_fwd_workspace(p);
    default: return sm80::chunk_attention_fwd_workspace(p);
  }
}

void chunk_attention_fwd(const AttentionFwdParams& p, const FwdScratch& scratch, void* workspace, cudaStream_t stream) {
  switch (choose_fwd(p)) {
#ifdef RAT_EXT_SM90
    case Family::sm90: return chunk_attention_fwd_sm90(p, scratch, workspace, stream);
#endif
    case Family::f32: return f32::chunk_attention_fwd(p, scratch, workspace, stream);
    default: return sm80::chunk_attention_fwd(p, scratch, workspace, stream);
  }
}

size_t chunk_attention_bwd_workspace(const AttentionBwdParams& p) {
  switch (choose_bwd(p)) {
#ifdef RAT_EXT_SM90
    case Family::sm90: return chunk_attention_bwd_sm90_workspace(p);
#endif
    case Family::f32: return f32::chunk_attention_bwd_workspace(p);
    default: return sm80::chunk_attention_bwd_workspace(p);
  }
}

void chunk_attention_bwd(const AttentionBwdParams& p, const BwdScratch& scratch, void* workspace, cudaStream_t stream) {
  switch (choose_bwd(p)) {
#ifdef RAT_EXT_SM90
    case Family::sm90: return chunk_attention_bwd_sm90(p, scratch, workspace, stream);
#endif
    case Family::f32: return f32::chunk_attention_bwd(p, scratch, workspace, stream);
    default: return sm80::chunk_attention_bwd(p, scratch, workspace, stream);
  }
}

}  // namespace rat::cuda
