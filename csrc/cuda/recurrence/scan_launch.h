// Host side of the scan kernels: tile sizes, inputs, what passes between segments, and the launchers that the files share.
#pragma once

#include <stdexcept>
#include <string>

#include "../host/kernel_table.h"
#include "../host/launch.h"
#include "../host/variant.h"
#include "../phases.h"
#include "scan.cuh"

namespace rat::cuda {

// ---- tiles ------------------------------------------------------------------------------------------------------------

// The longest chunk that one lane group walks alone.
constexpr int64_t kMaxChunkFwd = kExactChunk;
constexpr int64_t kMaxChunkBwd = 64;

// Does a recurrence reach across tiles? Never where the states are given (no gate).
inline bool segmented(const Sizes& s, bool gated, int64_t max_chunk) { return gated && s.reset > max_chunk; }

// A multiple of L of about `wanted` tokens; kSegment where chunks are too long; any number where there is no recurrence.
inline int64_t tile_size(const Sizes& s, bool gated, int64_t max_chunk, int64_t wanted) {
  if (!gated) return wanted;
  if (s.reset > max_chunk) return kSegment;
  return s.reset * (s.reset < wanted ? wanted / s.reset : 1);
}

// Sets what every scan kernel needs besides its rows.
template <class V>
void plan_tiles(ScanInput& in, int64_t tile) {
  in.tile = tile;
  in.items = work_items(in.size, tile);
  in.head_batches = ceil_div(in.size.heads, 32 / V::W);
  if (in.items * in.head_batches > INT64_C(0xffffffff)) {
    throw std::runtime_error("rat_ext: a scan needs " + std::to_string(in.items * in.head_batches) +
                             " warps, more than it can number (4294967295)");
  }
}

// Tokens of a span of the long family: a chunk of up to kSegment tokens, or a segment. Of chunks that do not fill their last tile
// several, up to 128 tokens, so that little of the span's last tile is idle.
inline int64_t span_tokens(const Sizes& s) {
  return tile_size(s, true, kMaxChunkBwd, s.reset % kStateTile == 0 ? kStateTile : 128);
}

// ---- inputs -----------------------------------------------------------------------------------------------------------

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

inline ChunkGrads chunk_grads(const AttentionBwdParams& a, const BwdScratch& scratch) {
  return {a.fwd.chunks, scratch.dchunk_k, scratch.dchunk_v, a.dchunk_k, a.dchunk_v};
}

// ---- between segments (segments.cu) -----------------------------------------------------------------------------------

// Room for what segments hand to each other, where a recurrence reaches across them: `streams` rows for each (item, head).
inline Piece<float> take_segments(const Sizes& s, bool gated, int64_t max_chunk, int streams, Arena& arena) {
  if (!segmented(s, gated, max_chunk)) return {};
  return arena.take<float>(work_items(s, kSegment) * s.heads * streams * s.head_dim);
}

// Fills `incoming`, of 3 streams in attention and else 2, with the state that each segment starts with and the product of its
// gates.
void scan_segments(ScanInput in, bool attention, float* incoming, cudaStream_t stream);

// Fills p.incoming_grad, of 3 streams in attention and else 2, with what the state of each segment's last token receives from
// the segments after it, and the product of the segment's gates.
void reverse_segments(const ReverseInput& p, bool attention, cudaStream_t stream);

// ---- sequences (sequences.cu) -----------------------------------------------------------------------------------------

// dinitial or final state of empty sequences in chunk_recurrence: (N, H, D), from `source` or zeros.
void copy_empty(const Sizes&, const float* source, float* target, cudaStream_t);

// dgate_bias = sum over rows of partial, (rows, columns), in a fixed order (reverse.cu).
void reduce_gate_bias(const float* partial, int64_t rows, int64_t columns, float* dgate_bias, cudaStream_t stream);

// ---- kernels of each file, for build_info() ---------------------------------------------------------------------------

KernelList forward_kernels();
KernelList segments_kernels();
KernelList prepare_kernels();
KernelList reverse_kernels();
KernelList reverse_tiles_kernels();

}  // namespace rat::cuda
