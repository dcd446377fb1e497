// Which keys a query sees, and where masking starts: the answer of every family, forward and backward.
//
// Key j of a sequence is the state of position (j + 1) key_every - 1. A query sees the keys before it,
// [0, position / key_every): so the rows of a tile of queries see prefixes that grow from row to row, and a key is seen by all
// tokens from one on.
#pragma once

#include "../device/divisor.h"
#include "../device/sequence.cuh"

namespace rat::cuda {

// position / every of the rows of a tile of consecutive tokens. In 32-bit arithmetic: positions are below 2^31, and 64-bit
// divisions would take longer than a small tile.
struct RowSteps {
  uint32_t first;    // of row 0
  uint32_t to_next;  // rows until the next step
  uint32_t every;

  RowSteps() = default;
  __device__ __forceinline__ RowSteps(int64_t position, int64_t every_) {
    const uint32_t row_0 = static_cast<uint32_t>(position);
    every = static_cast<uint32_t>(every_);
    first = row_0 / every;
    to_next = every - row_0 % every;
  }
  // The same, where the host has made a divisor of `every`.
  __device__ __forceinline__ RowSteps(uint32_t position, uint32_t every_, const Divisor& divisor)
      : first(divisor.quotient(position)), to_next(every_ - (position - first * every_)), every(every_) {}
  __device__ __forceinline__ int of(int row) const {
    const uint32_t r = static_cast<uint32_t>(row);
    return static_cast<int>(r < to_next ? first : first + 1 + (r - to_next) / every);
  }
};

// The angle of a row: its index in the rotary tables.
struct RowAngles : RowSteps {
  RowAngles() = default;
  __device__ __forceinline__ RowAngles(const Sizes& s, int64_t position) : RowSteps(position, s.rotate_every) {}
  __device__ __forceinline__ RowAngles(const RowSteps& steps) : RowSteps(steps) {}
};

// The keys that the rows of a tile of queries see.
struct VisibleKeys : RowSteps {
  VisibleKeys() = default;
  __device__ __forceinline__ VisibleKeys(const Sizes& s, int64_t position) : RowSteps(position, s.key_every) {}
  __device__ __forceinline__ VisibleKeys(const RowSteps& steps) : RowSteps(steps) {}

  __device__ __forceinline__ int end(int row) const { return of(row); }              // the row sees keys [0, end)
  __device__ __forceinline__ int to_all() const { return static_cast<int>(first); }  // every row sees keys [0, to_all)
  __device__ __forceinline__ int to_any(int rows) const { return end(rows - 1); }    // none of `rows` rows sees more
  // Of blocks of `size` keys: the first that needs a mask, and how many some row sees into.
  __device__ __forceinline__ int first_masked_block(int size) const { return to_all() / size; }
  __device__ __forceinline__ int blocks(int rows, int size) const { return (to_any(rows) + size - 1) / size; }
};

// The same relation from a tile of keys: key j of the tile is seen by the tokens of the sequence from `from + j every` on
// (tokens of the sequence count from 0; a negative number: by all).
struct VisibleFrom {
  int64_t from;
  int64_t every;

  VisibleFrom() = default;
  __device__ __forceinline__ VisibleFrom(const Sizes& s, const Sequence& sequence, int64_t first_key)
      : from((first_key + 1) * s.key_every - sequence.start), every(s.key_every) {}
  __device__ __forceinline__ int64_t of(int key) const { return from + key * every; }
};

// A token of a sequence, or a number beyond either end, as a token that exists or is past every one.
__device__ __forceinline__ int clamp_token(int64_t token) {
  return static_cast<int>(token < 0 ? 0 : token > INT32_MAX ? INT32_MAX : token);
}

// One row of a block of scores that lies in C tiles (mma.cuh, wgmma.cuh): r is 0 for row g, 1 for row g + 8. `end` is what the
// row sees, less the block's first key and this lane's first column. The rest becomes `value`.
template <int TILES>
__device__ __forceinline__ void mask_row(float (&scores)[TILES][4], int r, int end, float value) {
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    if (n * 8 >= end) scores[n][2 * r] = value;
    if (n * 8 + 1 >= end) scores[n][2 * r + 1] = value;
  }
}

}  // namespace rat::cuda
