// What every backward family does before its products and after them. The kernels stand in one translation unit,
// rotate_reduce.cu: a kernel template that two objects instantiate is merged by the linker, and theirs may have been compiled
// for different architectures.
#pragma once

#include <algorithm>

#include "../phases.h"

namespace rat::cuda {

// Counters that have to be zero when the products begin: the kernel that rotates q clears them by the way.
struct Counters {
  uint32_t* words = nullptr;
  int64_t count = 0;
};

// Gives the rows of q that the products read, rotated, and clears the counters. All kernels read q many times, through cp.async or
// the copy engine, which cannot rotate: R q lies in dq's memory until the reverse scan overwrites it with dq.
Rows make_product_queries(const AttentionBwdParams&, const Counters&, cudaStream_t);

// Where key tiles are few, the queries that see one are cut into shares, each an item of work with sums of its own, which
// add_shares() adds up in order.
struct Shares {
  int64_t count = 1;
  int64_t extent = 0;  // elements of one dchunk tensor, and from a share's sums to the next one's
  Piece<float> k, v;   // (count, extent) each, in the offsets of ChunkStates; not taken where there is one share

  float* dchunk_k(const BwdScratch& scratch) const { return count > 1 ? k.get() : scratch.dchunk_k.get(); }
  float* dchunk_v(const BwdScratch& scratch) const { return count > 1 ? v.get() : scratch.dchunk_v.get(); }
};

// How many shares: enough for `each` items on every multiprocessor, but none of fewer than `queries` queries, and no more than
// `most`. The multiprocessors are those of an H100, whatever the chip has: the order of a sum depends on the number of shares,
// and results are to have the same bits on every GPU.
inline int64_t count_shares(int64_t items, int64_t each, int64_t tokens, int64_t queries, int64_t most) {
  constexpr int64_t kMultiprocessors = 132;
  if (items == 0) return 1;
  return std::clamp<int64_t>(each * kMultiprocessors / items, 1,
                             std::max<int64_t>(1, std::min(tokens / queries, most)));
}

Shares take_shares(const AttentionBwdParams&, int64_t count, Arena&);

// Where there are several: their sums go to scratch.dchunk_k, scratch.dchunk_v.
void add_shares(const Shares&, const BwdScratch&, cudaStream_t);

}  // namespace rat::cuda
