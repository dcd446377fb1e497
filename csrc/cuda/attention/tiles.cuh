// What the chunk attention families share on the device beside arithmetic: the order of query tiles, the tiles of keys and the
// queries that walk them, and the rotation of q.
#pragma once

#include "../device/rows.cuh"
#include "../device/sequence.cuh"
#include "../host/launch.h"
#include "../phases.h"
#include "plan.h"
#include "visible.cuh"

namespace rat::cuda {

__device__ __forceinline__ WorkItem ordered_item(const Sizes& s, const TileOrder& order, int64_t block, int64_t tile,
                                                 int64_t* lane) {
  if (s.cu_seqlens) {
    *lane = modulo(block, order.lanes);
    return work_item(s, work_items(s, tile) - 1 - quotient(block, order.lanes), tile);
  }
  const int64_t tiles = tiles_per_row(s, tile);
  const int64_t first = quotient(block, order.section * tiles) * order.section;
  const int64_t rest = s.sequences * order.lanes - first;
  const int64_t width = rest < order.section ? rest : order.section;
  const int64_t inside = block - first * tiles;
  const int64_t pair = first + modulo(inside, width);
  *lane = modulo(pair, order.lanes);
  return work_item(s, quotient(pair, order.lanes) * tiles + tiles - 1 - quotient(inside, width), tile);
}

template <class T>
__device__ __forceinline__ const T* row_pointer(const Rows& rows, int64_t batch, int64_t token, int64_t head) {
  return static_cast<const T*>(rows.ptr) + batch * rows.batch + token * rows.token + head * rows.head;
}

template <class T>
struct alignas(sizeof(T) * 4) FourOf {
  T value[4];
};

template <class T>
__device__ __forceinline__ void load4(const T* p, float (&x)[4]) {
  const FourOf<T> four = *reinterpret_cast<const FourOf<T>*>(p);
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = to_float(four.value[i]);
}

// Columns 4i ... 4i+3 of both halves of a row of q, rotated by index c (R_c; direction -1 gives its transpose).
__device__ __forceinline__ void rotate4(float (&low)[4], float (&high)[4], const float* cos, const float* sin,
                                        int64_t c, int half, int i, float direction) {
  if (cos == nullptr) return;
  float cs[4], sn[4];
  load4(cos + c * half + 4 * i, cs);
  load4(sin + c * half + 4 * i, sn);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float a = low[j], b = high[j], sine = direction * sn[j];
    low[j] = a * cs[j] - b * sine;
    high[j] = b * cs[j] + a * sine;
  }
}

// A block's chunk states, in the enumeration of key_tiles().
struct KeyTile {
  Sequence sequence;
  int64_t first;   // first key of the tile
  int64_t closed;  // closed chunks of the sequence: the valid rows. first >= closed: nothing to do
};

__device__ __forceinline__ KeyTile key_tile(const Sizes& s, const ChunkStates& c, int64_t item, int64_t keys) {
  KeyTile k;
  if (c.compact) {
    const auto first_tile = [&](int64_t n) { return quotient(first_chunk_row(s, c, n), keys) + n; };
    const int64_t n = last_sequence(s, item, first_tile);
    k.sequence = sequence_at(s, n);
    k.first = (item - first_tile(n)) * keys;
  } else {
    const int64_t tiles = quotient(c.rows + keys - 1, keys);
    k.sequence = sequence_at(s, quotient(item, tiles));
    k.first = modulo(item, tiles) * keys;
  }
  k.closed = quotient(k.sequence.start + k.sequence.end - k.sequence.begin, s.key_every);
  return k;
}

// The query tiles that one of `shares` shares of a key tile walks: of those that see its first key, counted from the tile of
// the sequence's last token (number `last`) backwards, [begin, end).
struct QueryWalk {
  int last;
  int begin;
  int end;
};

template <int QUERIES, class Count>
__device__ __forceinline__ QueryWalk query_walk(const VisibleFrom& visible, int length, Count share, Count shares) {
  QueryWalk walk;
  walk.last = (length - 1) / QUERIES;
  const int first_seen = clamp_token(visible.from);
  const int64_t tiles = first_seen < length ? walk.last - first_seen / QUERIES + 1 : 0;
  walk.begin = static_cast<int>(quotient(tiles * share, shares));
  walk.end = static_cast<int>(quotient(tiles * (share + 1), shares));
  return walk;
}

}  // namespace rat::cuda
