// Where a token is: sequence, position, chunk. Work is enumerated on the device, so that the host never reads a length.
#pragma once

#include "../../launchers.h"

namespace rat::cuda {

// Of numbers from 0 to 2^32 - 1: positions, tokens, heads, tiles, chunk sizes. The chip has no division; one of 64 bits takes a
// hundred instructions, or a call.
__host__ __device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}
__host__ __device__ __forceinline__ int64_t modulo(int64_t a, int64_t b) {
  return static_cast<uint32_t>(a) % static_cast<uint32_t>(b);
}

// Which of `groups` groups of heads a head belongs to.
__device__ __forceinline__ int64_t group_of(const Sizes& s, int64_t head, int64_t groups) {
  return quotient(head, quotient(s.heads, groups));
}

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

// The search of a packed call: the last sequence n with first(n) <= at. `first` never falls from one sequence to the next, and
// first(0) <= at. Index is int64_t, or uint32_t where a kernel has no time for 64-bit arithmetic.
template <class Index, class First>
__device__ __forceinline__ Index last_sequence(const Sizes& s, Index at, First&& first) {
  Index low = 0, high = static_cast<Index>(s.sequences) - 1;
  while (low < high) {
    const Index middle = (low + high + 1) / 2;
    if (first(middle) <= at) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// ---- work -------------------------------------------------------------------------------------------------------------

// Work is cut into tiles of `tile` tokens. A sequence of len tokens gets at most ceil(len / tile) + 1 tiles (one more, so
// that tiles may start at a chunk boundary before the first token). Dense: sequence n owns items
// [n*tiles_per_row, (n+1)*tiles_per_row). Packed: sequence n owns items from cu_seqlens[n] / tile + 2n on, which never
// overlap: floor(a + b) >= floor(a) + floor(b).
__host__ __device__ __forceinline__ int64_t tiles_per_row(const Sizes& s, int64_t tile) {
  return quotient(s.tokens + tile - 1, tile) + (s.lengths ? 1 : 0);
}

__host__ __device__ __forceinline__ int64_t work_items(const Sizes& s, int64_t tile) {
  return s.cu_seqlens ? s.tokens / tile + 2 * s.sequences : s.sequences * tiles_per_row(s, tile);
}

// The first item of sequence n.
__device__ __forceinline__ int64_t first_item(const Sizes& s, int64_t n, int64_t tile) {
  return s.cu_seqlens ? quotient(s.cu_seqlens[n], tile) + 2 * n : n * tiles_per_row(s, tile);
}

struct WorkItem {
  Sequence sequence;
  int64_t tile;  // index of the tile in its sequence; may lie past the last token: then there is nothing to do
};

__device__ __forceinline__ WorkItem work_item(const Sizes& s, int64_t item, int64_t tile) {
  WorkItem w;
  if (s.cu_seqlens) {
    const int64_t n = last_sequence(s, item, [&](int64_t n) { return first_item(s, n, tile); });
    w.sequence = sequence_at(s, n);
    w.tile = item - (quotient(w.sequence.begin, tile) + 2 * n);
  } else {
    const int64_t per_row = tiles_per_row(s, tile), n = quotient(item, per_row);
    w.sequence = sequence_at(s, n);
    w.tile = item - n * per_row;
  }
  return w;
}

// ---- chunk states -----------------------------------------------------------------------------------------------------

// First row of a sequence's chunk states inside a head's rows, see ChunkStates.
__device__ __forceinline__ int64_t first_chunk_row(const Sizes& s, const ChunkStates& c, int64_t n) {
  return c.compact ? quotient(s.cu_seqlens[n], s.key_every) + n : 0;
}

// Whose states those of sequence n are: an entry of a pool, below 0 where n is skipped, or n itself.
__device__ __forceinline__ int64_t states_owner(const ChunkStates& c, int64_t n) { return c.entry ? c.entry[n] : n; }

// Element offset of chunk row `row` of head h of a pool's sequence.
__device__ __forceinline__ int64_t pool_offset(const Sizes& s, const ChunkStates& c, int64_t owner, int64_t h,
                                               int64_t row) {
  if (c.page_table == nullptr) return owner * c.sequence + h * c.head + row * s.head_dim;
  const int64_t page = c.page_table[owner * c.columns + (row >> c.page_shift)];
  return page * c.sequence + h * c.head + (row & ((int64_t{1} << c.page_shift) - 1)) * s.head_dim;
}

// Element offset of chunk row 0 of (sequence n, head h).
__device__ __forceinline__ int64_t chunk_offset(const Sizes& s, const ChunkStates& c, int64_t n, int64_t h) {
  return n * c.sequence + h * c.head + first_chunk_row(s, c, n) * s.head_dim;
}

// ---- the chunk clock --------------------------------------------------------------------------------------------------

// What a token is to its chunk, token by token, in either direction. The questions are apart, as their facts are in Sizes; one
// counter answers them all, since the op gives the three facts one value and a second counter would cost registers.
// Chunks may be longer than any sequence: what lies further ahead than a tile is clipped, which keeps the counter in 32 bits.
class ChunkClock {
 public:
  __device__ __forceinline__ ChunkClock(const Sizes& s, int64_t position) {
    constexpr int64_t kFar = int64_t{1} << 30;
    const int64_t size = s.reset;
    chunk_ = static_cast<uint32_t>(quotient(position, size));
    const int64_t exact = modulo(position, size);
    length_ = static_cast<int>(size < kFar ? size : kFar);
    if (size <= kFar) {
      offset_ = static_cast<int>(exact);
    } else {
      const int64_t ahead = size - exact;  // 1 ... : tokens up to and with the one that closes the chunk
      const int64_t clipped = ahead < kFar / 2 ? kFar - ahead : (exact < kFar / 2 ? exact : kFar / 2);
      offset_ = static_cast<int>(clipped);
    }
  }

  __device__ __forceinline__ bool resets() const { return offset_ == 0; }  // the recurrence starts anew at this token
  __device__ __forceinline__ bool leaves_key() const { return offset_ == length_ - 1; }  // its state becomes a key
  __device__ __forceinline__ int64_t key() const { return chunk_; }                      // which one
  __device__ __forceinline__ int64_t angle() const { return chunk_; }                    // the rotation of its position

  __device__ __forceinline__ void next() {
    if (++offset_ == length_) {
      offset_ = 0;
      ++chunk_;
    }
  }
  __device__ __forceinline__ void back() {
    if (--offset_ < 0) {
      offset_ = length_ - 1;
      --chunk_;
    }
  }

 private:
  uint32_t chunk_;
  int offset_;  // tokens of the chunk before this one
  int length_;
};

}  // namespace rat::cuda
