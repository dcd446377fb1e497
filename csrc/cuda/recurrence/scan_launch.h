// Host side of the scan kernels: which instantiation serves a call, tile sizes, carries between tiles.
#pragma once

#include <cstdio>
#include <deque>
#include <string>
#include <vector>

#include "../host/launch.h"
#include "../phases.h"
#include "scan.cuh"

namespace rat::cuda {

// An instantiation: element type, lanes of a head, and whether rows are read 16 bytes at a time.
template <class T_, int W_, bool kVector_>
struct Variant {
  using T = T_;
  static constexpr int W = W_;
  static constexpr bool kVector = kVector_;
};

template <class T, class F>
void with_width(const Sizes& s, F&& f) {
  if (!s.aligned16) return f(Variant<T, 32, false>());
  if (s.head_dim <= 64) return f(Variant<T, 8, true>());
  if (s.head_dim <= 128) return f(Variant<T, 16, true>());
  return f(Variant<T, 32, true>());
}

// Calls f with the variant that serves the call.
template <class F>
void with_variant(const Sizes& s, const char* op, F&& f) {
  switch (s.dtype) {
    case DType::f32: return with_width<float>(s, f);
    case DType::bf16: return with_width<bf16>(s, f);
    case DType::f16: return with_width<f16>(s, f);
    default:
      throw std::runtime_error(std::string("rat_ext.") + op +
                               ": dtype: expected float32, bfloat16 or float16 on CUDA, got float64");
  }
}

template <class T, class F>
void for_each_width(F&& f, const char* type) {
  f(Variant<T, 8, true>(), type);
  f(Variant<T, 16, true>(), type);
  f(Variant<T, 32, true>(), type);
  f(Variant<T, 32, false>(), type);
}
template <class F>
void for_each_variant(F&& f) {
  for_each_width<float>(f, "f32");
  for_each_width<bf16>(f, "bf16");
  for_each_width<f16>(f, "f16");
}

// Names and addresses of kernels, for build_info().
class KernelTable {
 public:
  void add(std::string name, const void* function) {
    names_.push_back(std::move(name));
    entries_.push_back({names_.back().c_str(), function});
  }
  template <class V>
  void add(const char* name, V, const char* type, const void* function) {
    add(std::string(name) + "<" + type + ", " + std::to_string(V::W) + (V::kVector ? ">" : ", unaligned>"), function);
  }
  void add(KernelList list) {
    for (int i = 0; i < list.count; ++i) add(list.entries[i].name, list.entries[i].function);
  }
  KernelList list() const { return {entries_.data(), static_cast<int>(entries_.size())}; }

 private:
  std::deque<std::string> names_;
  std::vector<KernelEntry> entries_;
};

// The longest chunk that one lane group walks alone.
constexpr int64_t kMaxChunkFwd = 128;
constexpr int64_t kMaxChunkBwd = 64;
// The longest that the kernels of recurrence/reverse_short.cu keep in registers.
constexpr int64_t kShortChunk = 16;

// Does a recurrence reach across tiles? Never where the states are given (no gate).
inline bool segmented(const Sizes& s, bool gated, int64_t max_chunk) { return gated && s.chunk_size > max_chunk; }

// A multiple of L of about `wanted` tokens; kSegment where chunks are too long; any number where there is no recurrence.
inline int64_t tile_size(const Sizes& s, bool gated, int64_t max_chunk, int64_t wanted) {
  if (!gated) return wanted;
  if (s.chunk_size > max_chunk) return kSegment;
  return s.chunk_size * (s.chunk_size < wanted ? wanted / s.chunk_size : 1);
}

// Sets what every scan kernel needs besides its rows.
template <class V>
void plan_tiles(ScanInput& in, int64_t tile) {
  in.tile = tile;
  in.items = work_items(in.size, tile);
  in.head_batches = ceil_div(in.size.heads, 32 / V::W);
}

inline int64_t carry_elements(const Sizes& s, int streams) {
  return work_items(s, kSegment) * s.heads * streams * s.head_dim;
}

// Room for what tiles hand to each other, where a recurrence reaches across them.
inline Piece<float> take_carry(const Sizes& s, bool gated, int64_t max_chunk, int streams, Arena& arena) {
  return segmented(s, gated, max_chunk) ? arena.take<float>(carry_elements(s, streams)) : Piece<float>();
}

inline ScanInput scan_input(const AttentionFwdParams& p) {
  ScanInput in{};
  in.size = p.size;
  in.q = p.q;
  in.k = p.k;
  in.v = p.v;
  in.gate = p.gate;
  in.gate_bias = static_cast<const float*>(p.gate_bias);
  in.rotary = p.rotary;
  in.scale = static_cast<float>(p.scale);
  in.initial_k = static_cast<const float*>(p.initial.running_k);
  in.initial_v = static_cast<const float*>(p.initial.running_v);
  return in;
}

inline ScanInput scan_input(const RecurrenceFwdParams& p) {
  ScanInput in{};
  in.size = p.size;
  in.k = p.x;
  in.gate = p.gate;
  in.gate_bias = static_cast<const float*>(p.gate_bias);
  in.initial_k = static_cast<const float*>(p.initial);
  return in;
}

// Fills `carry` with the state that each segment starts with and the product of its gates (recurrence/forward.cu).
void scan_carries(ScanInput in, bool attention, float* carry, cudaStream_t stream);

// Turns what each segment makes of a zero entry into what it starts with, along a sequence or against it. `gates` has
// `gate_streams` rows an (item, head), the last of which is the product of the gates; `values` has value_streams rows, of
// which the first `joined` are joined. `outer_k`, `outer_v`: (N, H, D) entry of the first segment, or null: zero.
struct CarryJoin {
  Sizes size;
  int64_t tile;
  const float* gates;
  float* values;
  int gate_streams, value_streams, joined;
  const float* outer_k;
  const float* outer_v;
  bool reverse;
};
void join_carries(const CarryJoin&, cudaStream_t);

// Carried state, outside the tokens (recurrence/sequences.cu). Forward: copies the initial chunk states to the front of `chunks`, and
// gives empty sequences their running state. Backward: the gradients of the same.
void carry_state_fwd(const AttentionFwdParams&, cudaStream_t);
void carry_state_bwd(const AttentionBwdParams&, const BwdScratch&, cudaStream_t);
// dinitial or final state of empty sequences in chunk_recurrence: (N, H, D), from `source` or zeros.
void copy_empty(const Sizes&, const float* source, float* target, cudaStream_t);

// The backward phases 1 and 3 of rat_attention where chunks are short (recurrence/reverse_short.cu): short_chunks() says whether.
// Phase 1 leaves p_self and ds_self alone, phase 3 makes them itself.
Launch chunk_prepare_short_bwd(const AttentionBwdParams&, const BwdScratch&, Arena&);
Launch chunk_scan_short_bwd(const AttentionBwdParams&, const BwdScratch&, Arena&);

// dgate_bias = sum over rows of partial, (rows, columns), in a fixed order (recurrence/backward.cu).
void reduce_gate_bias(const float* partial, int64_t rows, int64_t columns, float* dgate_bias, cudaStream_t stream);

KernelList chunk_recurrence_fwd_kernels();
KernelList chunk_recurrence_bwd_kernels();
KernelList chunk_short_bwd_kernels();

}  // namespace rat::cuda
