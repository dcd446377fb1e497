// What the reverse scans share.
#pragma once

#include "scan.cuh"

namespace rat::cuda {

// Adds the gradient of the chunk state that a closing token leaves behind to the gradient of its state.
template <class T, int W>
__device__ __forceinline__ void add_chunk_grad(const ReverseInput& p, const Lane& lane, int64_t n,
                                               const ChunkClock& clock, float (&gk)[8], float (&gv)[8]) {
  const Sizes& s = p.in.size;
  const int64_t at = chunk_offset(s, p.chunk.layout, n, lane.head) + clock.key() * s.head_dim + lane.d;
  float x[8], y[8];
  load_scratch(p.chunk.attention_v + at, y);
  load_scratch(p.chunk.attention_k + at, x);
#pragma unroll
  for (int j = 0; j < 8; ++j) gv[j] += y[j];
  if (p.chunk.returned_v) {
    load_row(static_cast<const T*>(p.chunk.returned_v) + at, y);
#pragma unroll
    for (int j = 0; j < 8; ++j) gv[j] += y[j];
  }
  if (p.chunk.returned_k) {
    load_row(static_cast<const T*>(p.chunk.returned_k) + at, y);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] += y[j];
  }
  if (p.in.rotary.cos) rotate<W>(p.in.rotary, clock.angle(), s.head_dim, lane, -1.0f, x);
#pragma unroll
  for (int j = 0; j < 8; ++j) gk[j] += x[j];
}

}  // namespace rat::cuda
