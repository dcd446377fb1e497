// What the scan kernels share: tiles of tokens, the inputs of a scan, the states that enter a tile.
//
// Words: the *state* of a sequence is k~, v~ after a token. Where chunks are too long for one tile, tiles are *segments*: what
// one passes to its neighbour, along the sequence or against it, is *incoming* there (segments.cu).
#pragma once

#include "../device/rotary.cuh"
#include "../device/rows.cuh"
#include "../device/sequence.cuh"

namespace rat::cuda {

// Tokens of a tile where chunks are too long for one: a segment.
constexpr int64_t kSegment = 64;

// Tile j of a sequence holds positions [first + j*tile, first + (j + 1)*tile), where first is `start` rounded down to a
// multiple of tile, cut to those of this call: where tile is a multiple of L, no chunk is split but by the call's ends.
struct ScanTile {
  int64_t item;  // index among all tiles of the call
  Sequence sequence;
  int64_t token;     // first token, in the sequence's row
  int64_t position;  // its position
  int count;         // tokens, <= 0: nothing to do
  bool first, last;  // of the sequence's tiles that hold tokens
};

__device__ __forceinline__ ScanTile tile_of(const Sizes& s, int64_t item, int64_t size) {
  const WorkItem w = work_item(s, item, size);
  ScanTile t;
  t.item = item;
  t.sequence = w.sequence;
  // Positions are below 2^31, and so is the first tile behind them.
  const uint32_t start = static_cast<uint32_t>(w.sequence.start), length = static_cast<uint32_t>(size);
  const uint32_t stop = start + static_cast<uint32_t>(w.sequence.end - w.sequence.begin);
  const uint32_t base = (start / length + static_cast<uint32_t>(w.tile)) * length;
  const uint32_t low = max(base, start), high = min(base + length, stop);
  t.count = high > low ? static_cast<int>(high - low) : 0;
  t.position = low;
  t.token = w.sequence.begin + (low - start);
  t.first = low == start;
  t.last = high == stop;
  return t;
}

// Tiles of a sequence that hold tokens.
__device__ __forceinline__ int64_t tile_count(const Sequence& q, int64_t size) {
  const int64_t length = q.end - q.begin;
  return length ? quotient(modulo(q.start, size) + length + size - 1, size) : 0;
}

// The running states of a pool, as a scan finds and leaves them.
struct PoolStates {
  const int32_t* entry;  // (N): the sequence of the pool, below 0 where a row is skipped; null: there is no pool
  float* k;              // (P, R, H, D)
  float* v;
  int64_t ring;           // R
  const float* staged_k;  // (N, H, D): the state that a row starts from, where is_staged()
  const float* staged_v;
  // Where closed states go, beside scratch that attention reads; k null: the pool's states are of T.
  ChunkStates quantised;
  float* scale_k;
  float* scale_v;
};

// Offset of the state after the token at `position`.
__device__ __forceinline__ int64_t running_at(const Sizes& s, const PoolStates& p, int64_t owner, int64_t head,
                                              int64_t position) {
  const int64_t place = static_cast<uint32_t>(position) % static_cast<uint32_t>(p.ring);
  return ((owner * p.ring + place) * s.heads + head) * s.head_dim;
}

// May a tile of the row overwrite the state that the row starts from before another one has read it? Tiles hold whole chunks, and
// only a row of as many tokens as the ring has places comes round to that state.
__device__ __forceinline__ bool is_staged(const Sizes& s, const PoolStates& p, const Sequence& q) {
  const int64_t length = q.end - q.begin;
  return length >= p.ring && modulo(q.start, s.reset) != 0 &&
         quotient(q.start, s.reset) != quotient(q.start + length - 1, s.reset);
}

// Inputs of a scan. In rat_attention two streams share the gates, k~ and v~; in chunk_recurrence there is one, called k.
struct ScanInput {
  Sizes size;
  Rows q, k, v, gate;      // q and v only in attention; gate null: f = 0, chunk_attention
  const float* gate_bias;  // (H, D) or null
  Rotary rotary;
  float scale;
  const float* initial_k;  // (N, H, D) state before the first token, or null
  const float* initial_v;
  PoolStates pool;  // in place of those
  float*
      incoming;  // (items, H, 2 or 3, D): the states that segments start with, and the product of their gates; null where no
                 // chunk spans tiles
  int64_t tile;  // tokens of a tile
  int64_t items;
  int64_t head_batches;  // ceil(H / heads of a warp)
};

// Gradients of chunk states: float ones from attention, and of T those of the returned state, or null.
struct ChunkGrads {
  ChunkStates layout;  // its element offsets
  const float* attention_k;
  const float* attention_v;
  const void* returned_k;
  const void* returned_v;
};

// The states that tiles of kStateTile tokens start with, as phase 1 leaves them for the long family of the reverse scan
// (reverse_tiles.cu): of tiles that neither begin a chunk nor, mostly, a sequence.
constexpr int kStateTile = 16;
struct TileStates {
  void* ptr = nullptr;  // (places, H, 2, D) of T: k~ and v~; null: nobody asks for them
  int64_t span = 1;     // tiles are counted from multiples of it
};

// The place of the tile that starts at a token of the sequence's row. Such tokens of a sequence are at least kStateTile apart, and
// without lengths the first is as far from its beginning.
__host__ __device__ __forceinline__ int64_t state_places(const Sizes& s) {
  const int64_t row = quotient(s.tokens + kStateTile - 1, kStateTile);
  return s.cu_seqlens ? row + (s.lengths ? s.sequences : 0) : s.sequences * row;
}
__device__ __forceinline__ int64_t state_place(const Sizes& s, const Sequence& q, int64_t token) {
  const int64_t before =
      s.cu_seqlens ? (s.lengths ? q.index : 0) : q.index * quotient(s.tokens + kStateTile - 1, kStateTile);
  return before + quotient(token, kStateTile);
}

// What a reverse scan receives, besides the inputs that it scans again.
struct ReverseInput {
  ScanInput in;
  Rows dout;            // dO; dy of chunk_recurrence
  const float* p_self;  // (B, H, T)
  const float* ds_self;
  ChunkGrads chunk;
  const float* drunning_k;  // (N, H, D) or null
  const float* drunning_v;
  float*
      incoming_grad;  // (items, H, 2 or 3, D): what the state of each segment's last token receives, and the product of the
                      // segment's gates; null if not segmented
};

// The bias of eight elements, in units of the gates.
template <class T>
__device__ __forceinline__ void load_bias(const ScanInput& in, const Lane& lane, float (&bias)[8]) {
  if (in.gate_bias) {
    load_floats(in.gate_bias + lane.head * in.size.head_dim + lane.d, bias);
#pragma unroll
    for (int i = 0; i < 8; ++i) bias[i] *= kLogitUnit<T>;
  } else {
    zero(bias);
  }
}

// Offset of stream `stream` of (item, head) in an array of `streams` rows for each.
__device__ __forceinline__ int64_t segment_at(const Sizes& s, int64_t item, int64_t head, int streams, int stream) {
  return ((item * s.heads + head) * streams + stream) * s.head_dim;
}

// The state that a tile starts with. A tile whose first token starts the recurrence anew drops it.
template <bool kAttention>
__device__ __forceinline__ void incoming_state(const ScanInput& in, const ScanTile& tile, const Lane& lane,
                                               float (&k)[8], float (&v)[8]) {
  zero(k);
  zero(v);
  constexpr int kStreams = kAttention ? 3 : 2;
  if (in.incoming) {
    load_scratch(in.incoming + segment_at(in.size, tile.item, lane.head, kStreams, 0) + lane.d, k);
    if (kAttention) load_scratch(in.incoming + segment_at(in.size, tile.item, lane.head, kStreams, 1) + lane.d, v);
  } else if (in.initial_k && tile.first) {
    const int64_t at = (tile.sequence.index * in.size.heads + lane.head) * in.size.head_dim + lane.d;
    load_floats(in.initial_k + at, k);
    if (kAttention) load_floats(in.initial_v + at, v);
  }
}

// The same of a row of a pool.
__device__ __forceinline__ void pool_state(const ScanInput& in, const ScanTile& tile, const Lane& lane, int64_t owner,
                                           float (&k)[8], float (&v)[8]) {
  const Sizes& s = in.size;
  zero(k);
  zero(v);
  if (in.incoming) {
    load_scratch(in.incoming + segment_at(s, tile.item, lane.head, 3, 0) + lane.d, k);
    load_scratch(in.incoming + segment_at(s, tile.item, lane.head, 3, 1) + lane.d, v);
  } else if (tile.first && modulo(tile.position, s.reset) != 0) {
    const bool staged = is_staged(s, in.pool, tile.sequence);
    const int64_t at = staged ? (tile.sequence.index * s.heads + lane.head) * s.head_dim
                              : running_at(s, in.pool, owner, lane.head, tile.position - 1);
    load_floats((staged ? in.pool.staged_k : in.pool.k) + at + lane.d, k);
    load_floats((staged ? in.pool.staged_v : in.pool.v) + at + lane.d, v);
  }
}

// Which tile and heads this warp has; false where it has none.
template <int W>
__device__ __forceinline__ bool warp_work(const ScanInput& in, ScanTile& tile, Lane& lane) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (warp >= in.items * in.head_batches) return false;
  const int64_t item = quotient(warp, in.head_batches), batch = modulo(warp, in.head_batches);
  lane = lane_of<W>(batch * (32 / W) + threadIdx.x % 32 / W, in.size.heads, in.size.head_dim);
  tile = tile_of(in.size, item, in.tile);
  return tile.count > 0;
}

}  // namespace rat::cuda
