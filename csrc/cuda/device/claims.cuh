// What a block has to know of all rows of a call: which of them name a sequence of the pool that an earlier row named.
//
// Rows claim their sequence in shared memory, and the first row of each keeps it. A pass over the rows for every kClaims sequences
// of the pool; none where there is one row, which repeats nothing. Nothing outlives the kernel: no counter to clear, so it does
// not matter which streams serve the pool, or that a graph is replayed.
#pragma once

#include <climits>
#include <cstdint>

#include "../../launchers.h"
#include "rows.cuh"

namespace rat::cuda {

constexpr int kClaims = 8192;

struct Claims {
  uint32_t row[kClaims];  // the first of the rows that name a sequence
};

// A row of the call, as a lane sees it. `mine`: the lane has one. Slots outside the pool are never repeated.
struct ClaimedRow {
  bool mine;
  int64_t n, slot;
  bool repeated;
};

// By a whole block of THREADS. Rows [begin, rows) in tiles: each warp has `each` rows of a tile (at most 32), a tile is those of
// all warps, and the next one is `stride` rows behind. visit(row) is called by whole warps. Without slots row n has sequence n.
template <int THREADS, class Visit>
__device__ __forceinline__ void visit_rows(Claims& claims, const int64_t* slots, int64_t rows, int64_t sequences,
                                           int64_t begin, int64_t stride, int each, const Visit& visit) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const bool claim = slots && rows > 1;
  for (int64_t low = 0; low == 0 || (claim && low < sequences); low += kClaims) {
    const int64_t high = min(low + kClaims, sequences);
    if (claim) {
      if (low > 0) __syncthreads();  // the claims before have been read
      for (int i = static_cast<int>(threadIdx.x); i < high - low; i += THREADS) claims.row[i] = UINT_MAX;
      __syncthreads();
#pragma unroll 4
      for (int64_t n = threadIdx.x; n < rows; n += THREADS) {
        const int64_t slot = __ldcg(slots + n);
        if (slot >= low && slot < high) atomicMin(&claims.row[slot - low], static_cast<uint32_t>(n));
      }
      __syncthreads();
    }
    for (int64_t tile = begin; tile < rows; tile += stride) {
      ClaimedRow row{false, tile + warp * each + lane, -1, false};
      row.mine = lane < each && row.n < rows;
      if (row.mine) row.slot = slots ? __ldcg(slots + row.n) : row.n;
      if (claim) {
        const bool inside = row.slot >= 0 && row.slot < sequences;
        row.mine = row.mine && (inside ? row.slot >= low && row.slot < high : low == 0);
        row.repeated = row.mine && inside && claims.row[row.slot - low] != static_cast<uint32_t>(row.n);
      }
      if (__any_sync(kFullWarp, row.mine)) visit(row);
    }
  }
}

// Whether one of the first `pages` pages of a sequence is missing: each lane asks for its own sequence, and the whole warp
// looks. A lane that asks for nothing says pages = 0. `columns`: of the page table.
__device__ __forceinline__ bool page_missing(const Pool& pool, int64_t columns, int64_t slot, int64_t pages) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  bool missing = false;
  for (unsigned asking = __ballot_sync(kFullWarp, pages > 0); asking; asking &= asking - 1) {
    const int who = __ffs(asking) - 1;
    const int64_t count = __shfl_sync(kFullWarp, pages, who);
    const int32_t* const table = pool.page_table + __shfl_sync(kFullWarp, slot, who) * columns;
    bool none = false;
#pragma unroll 2
    for (int64_t page = lane; page < count; page += 32) none |= table[page] < 0 || table[page] >= pool.pages;
    none = __any_sync(kFullWarp, none);
    if (lane == who) missing = none;
  }
  return missing;
}

}  // namespace rat::cuda
