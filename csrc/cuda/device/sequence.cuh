// Where a token is: sequence, position, chunk. Work is enumerated on the device, so that the host never reads a length.
#pragma once

#include "../../launchers.h"

namespace rat::cuda {

// One sequence of the call. Tokens are [begin, end) of row `batch`; token t has position start + (t - begin).
struct Sequence {
  int64_t index;  // n
  int64_t batch;  // row of the token tensors
  int64_t begin;
  int64_t end;
  int64_t start;  // tokens seen before this call
};

__device__ __forceinline__ Sequence sequence_at(const Sizes& s, int64_t n) {
  Sequence q;
  q.index = n;
  q.batch = s.cu_seqlens ? 0 : n;
  q.begin = s.cu_seqlens ? s.cu_seqlens[n] : 0;
  q.end = s.cu_seqlens ? s.cu_seqlens[n + 1] : s.tokens;
  q.start = s.lengths ? s.lengths[n] : 0;
  return q;
}

// Work is cut into tiles of `tile` tokens. A sequence of len tokens gets at most ceil(len / tile) + 1 tiles (one more, so
// that tiles may start at a chunk boundary before the first token). Dense: sequence n owns items
// [n*tiles_per_row, (n+1)*tiles_per_row). Packed: sequence n owns items from cu_seqlens[n] / tile + 2n on, which never
// overlap: floor(a + b) >= floor(a) + floor(b).
__host__ __device__ __forceinline__ int64_t tiles_per_row(const Sizes& s, int64_t tile) {
  return (s.tokens + tile - 1) / tile + (s.lengths ? 1 : 0);
}

__host__ __device__ __forceinline__ int64_t work_items(const Sizes& s, int64_t tile) {
  return s.cu_seqlens ? s.tokens / tile + 2 * s.sequences : s.sequences * tiles_per_row(s, tile);
}

struct WorkItem {
  Sequence sequence;
  int64_t tile;  // index of the tile in its sequence; may lie past the last token: then there is nothing to do
};

__device__ __forceinline__ WorkItem work_item(const Sizes& s, int64_t item, int64_t tile) {
  WorkItem w;
  if (s.cu_seqlens) {
    int64_t low = 0, high = s.sequences - 1;  // the last n whose first item is <= item
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (s.cu_seqlens[middle] / tile + 2 * middle <= item) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    w.sequence = sequence_at(s, low);
    w.tile = item - (w.sequence.begin / tile + 2 * low);
  } else {
    const int64_t per_row = tiles_per_row(s, tile);
    w.sequence = sequence_at(s, item / per_row);
    w.tile = item % per_row;
  }
  return w;
}

// First row of a sequence's chunk states inside a head's rows, see ChunkStates.
__device__ __forceinline__ int64_t first_chunk_row(const Sizes& s, const ChunkStates& c, int64_t n) {
  return c.compact ? s.cu_seqlens[n] / s.chunk_size + n : 0;
}

// Element offset of chunk row 0 of (sequence n, head h).
__device__ __forceinline__ int64_t chunk_offset(const Sizes& s, const ChunkStates& c, int64_t n, int64_t h) {
  return n * c.sequence + h * c.head + first_chunk_row(s, c, n) * s.head_dim;
}

}  // namespace rat::cuda
