// How a call is cut into blocks, from sizes alone: what the attention families plan alike on the host. The device side of the
// same counts is in tiles.cuh.
#pragma once

#include <cstdint>

#include "../device/sequence.cuh"
#include "../host/launch.h"

namespace rat::cuda {

// Blocks of a kernel over (query tile, lane), where a lane is a head or a query group. The cost of a tile grows with its
// index, so late tiles are launched first. (sequence, lane) pairs run in sections whose keys and values fit in L2.
struct TileOrder {
  int64_t lanes = 1;
  int64_t section = 1;
};

inline int64_t tile_blocks(const Sizes& s, int64_t tile, const TileOrder& order) {
  return work_items(s, tile) * order.lanes;
}

inline TileOrder tile_order(const Sizes& s, const ChunkStates& chunks, int64_t lanes, int64_t element_bytes) {
  constexpr int64_t kBudget = 24 << 20;
  const int64_t bytes = 2 * chunks.rows * s.head_dim * element_bytes;
  TileOrder order;
  order.lanes = lanes;
  order.section = bytes > 0 ? (kBudget + bytes - 1) / bytes : s.sequences * lanes;
  if (order.section > s.sequences * lanes) order.section = s.sequences * lanes;
  if (order.section < 1) order.section = 1;
  return order;
}

// Key tiles of `keys` chunk rows, enumerated without a host read of any length. Per-sequence rows: ceil(rows / keys) tiles for
// each sequence. Compact: sequence n owns items from first_row(n) / keys + n on; they never overlap, as in work_item.
inline int64_t key_tiles(const Sizes& s, const ChunkStates& c, int64_t keys) {
  return c.compact ? c.rows / keys + s.sequences : s.sequences * ceil_div(c.rows, keys);
}

// Elements between the first and the last of a head's chunk rows, in the offsets of ChunkStates.
inline int64_t states_extent(const Sizes& s, const ChunkStates& c) {
  if (s.sequences * s.heads == 0) return 0;
  return (c.compact ? 0 : (s.sequences - 1) * c.sequence) + (s.heads - 1) * c.head + c.rows * s.head_dim;
}

// Rows of a head that follow each other: of a page, or all.
inline int64_t rows_of_a_block(const ChunkStates& c) { return c.page_table ? int64_t{1} << c.page_shift : c.rows; }

// What bulk copies of chunk states want of them; null where it is so, else what is wrong.
inline const char* no_state_map(const Sizes& s, const ChunkStates& c) {
  if (c.rows <= 0) return "there are no chunk states";
  if (c.rows > INT64_C(1) << 30) return "there are over 2^30 chunk states per head";
  if (c.head != rows_of_a_block(c) * s.head_dim || (!c.compact && c.sequence != s.heads * c.head)) {
    return "chunk states are not contiguous";
  }
  return nullptr;
}

}  // namespace rat::cuda
