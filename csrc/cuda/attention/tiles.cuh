// What the chunk attention families share beside arithmetic: which chunk a row of a query tile is in, in which order tiles
// are launched, and the rotation of q.
#pragma once

#include "../device/elements.cuh"
#include "../device/sequence.cuh"
#include "../host/launch.h"
#include "../phases.h"
#include "plan.h"
#include "visible.cuh"

namespace rat::cuda {

// Chunks of the rows of a query tile, in 32-bit arithmetic, for any chunk size.
struct TileChunks {
  int first;         // chunk of row 0
  uint32_t to_next;  // rows until the next chunk starts
  uint32_t size;     // chunk size, clamped: a tile has far fewer rows

  __device__ __forceinline__ TileChunks(int64_t position, int64_t chunk_size) {
    constexpr int64_t kMany = 1 << 30;
    first = static_cast<int>(position / chunk_size);
    const int64_t rest = chunk_size - position % chunk_size;
    to_next = static_cast<uint32_t>(rest < kMany ? rest : kMany);
    size = static_cast<uint32_t>(chunk_size < kMany ? chunk_size : kMany);
  }
  __device__ __forceinline__ int of(int row) const {
    const uint32_t r = static_cast<uint32_t>(row);
    return r < to_next ? first : first + 1 + static_cast<int>((r - to_next) / size);
  }
};

__device__ __forceinline__ WorkItem ordered_item(const Sizes& s, const TileOrder& order, int64_t block, int64_t tile,
                                                 int64_t* lane) {
  if (s.cu_seqlens) {
    *lane = block % order.lanes;
    return work_item(s, work_items(s, tile) - 1 - block / order.lanes, tile);
  }
  const int64_t tiles = tiles_per_row(s, tile);
  const int64_t first = block / (order.section * tiles) * order.section;
  const int64_t rest = s.sequences * order.lanes - first;
  const int64_t width = rest < order.section ? rest : order.section;
  const int64_t inside = block - first * tiles;
  const int64_t pair = first + inside % width;
  *lane = pair % order.lanes;
  return work_item(s, pair / order.lanes * tiles + tiles - 1 - inside / width, tile);
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
__device__ __forceinline__ void load4(const T* p, float (&x)[4], bool vector) {
  if (vector) {
    const FourOf<T> four = *reinterpret_cast<const FourOf<T>*>(p);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = to_float(four.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = to_float(p[i]);
  }
}

// Columns 4i ... 4i+3 of both halves of a row of q, rotated by chunk c (R_c; direction -1 gives its transpose).
__device__ __forceinline__ void rotate4(float (&low)[4], float (&high)[4], const float* cos, const float* sin,
                                        int64_t c, int half, int i, float direction) {
  if (cos == nullptr) return;
  const bool vector = ((reinterpret_cast<uintptr_t>(cos) | reinterpret_cast<uintptr_t>(sin)) & 15) == 0;
  float cs[4], sn[4];
  load4(cos + c * half + 4 * i, cs, vector);
  load4(sin + c * half + 4 * i, sn, vector);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float a = low[j], b = high[j], sine = direction * sn[j];
    low[j] = a * cs[j] - b * sine;
    high[j] = b * cs[j] + a * sine;
  }
}

// Backward only: R_c x of every token and group (x itself without a rotation), (B, T, groups, D) of T contiguous. The heads
// of a group and all backward kernels read R q many times, through cp.async or the copy engine, which cannot rotate and need
// 16-byte alignment. 2 D elements of traffic a token and group.
template <class T>
__global__ void __launch_bounds__(256)
    chunk_attention_rotate_bwd_kernel(const __grid_constant__ Sizes s, const __grid_constant__ Rows x, int64_t groups,
                                      const float* cos, const float* sin, T* out) {
  const int pieces = static_cast<int>(s.head_dim / 8);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= s.batch * s.tokens * groups * pieces) return;
  const int piece = static_cast<int>(index % pieces);
  const int64_t row = index / pieces;
  const int64_t group = row % groups, token = row / groups % s.tokens, batch = row / groups / s.tokens;
  int64_t n = batch;
  if (s.cu_seqlens) {
    int64_t low = 0, high = s.sequences - 1;  // the last n that starts at or before the token
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (s.cu_seqlens[middle] <= token) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    n = low;
  }
  const Sequence sequence = sequence_at(s, n);
  if (token >= sequence.end) return;
  const int half = static_cast<int>(s.head_dim / 2);
  const T* from = row_pointer<T>(x, batch, token, group) + 4 * piece;
  float low[4], high[4];
  load4(from, low, s.aligned16);
  load4(from + half, high, s.aligned16);
  rotate4(low, high, cos, sin, (sequence.start + token - sequence.begin) / s.chunk_size, half, piece, 1.0f);
  FourOf<T> a, b;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    a.value[j] = from_float<T>(low[j]);
    b.value[j] = from_float<T>(high[j]);
  }
  T* to = out + row * s.head_dim + 4 * piece;
  *reinterpret_cast<FourOf<T>*>(to) = a;
  *reinterpret_cast<FourOf<T>*>(to + half) = b;
}

struct KeyTile {
  Sequence sequence;
  int64_t first;   // first key of the tile
  int64_t closed;  // closed chunks of the sequence: the valid rows. first >= closed: nothing to do
};

__device__ __forceinline__ KeyTile key_tile(const Sizes& s, const ChunkStates& c, int64_t item, int64_t keys) {
  KeyTile k;
  if (c.compact) {
    int64_t low = 0, high = s.sequences - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (first_chunk_row(s, c, middle) / keys + middle <= item) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    k.sequence = sequence_at(s, low);
    k.first = (item - (first_chunk_row(s, c, low) / keys + low)) * keys;
  } else {
    const int64_t tiles = (c.rows + keys - 1) / keys;
    k.sequence = sequence_at(s, item / tiles);
    k.first = item % tiles * keys;
  }
  k.closed = (k.sequence.start + k.sequence.end - k.sequence.begin) / s.chunk_size;
  return k;
}

// Adds the shares of the queries, in order. Rows that are not valid hold anything before and after.
template <class Acc>
__global__ void __launch_bounds__(256)
    chunk_attention_reduce_bwd_kernel(const Acc* shares_k, const Acc* shares_v, int shares, int64_t share_stride,
                                      int64_t count, Acc* dchunk_k, Acc* dchunk_v) {
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (index >= 2 * count) return;
  const bool second = index >= count;
  const int64_t offset = second ? index - count : index;
  const float* from = (second ? shares_v : shares_k) + offset;
  float4 sum = *reinterpret_cast<const float4*>(from);
  for (int s = 1; s < shares; ++s) {
    const float4 x = *reinterpret_cast<const float4*>(from + s * share_stride);
    sum.x += x.x;
    sum.y += x.y;
    sum.z += x.z;
    sum.w += x.w;
  }
  *reinterpret_cast<float4*>((second ? dchunk_v : dchunk_k) + offset) = sum;
}

inline void add_shares(const float* shares_k, const float* shares_v, int64_t shares, int64_t extent,
                       const BwdScratch& scratch, cudaStream_t stream) {
  if (extent == 0) return;
  const char* name = "chunk_attention_reduce_bwd_kernel";
  chunk_attention_reduce_bwd_kernel<float><<<grid_x(ceil_div(2 * extent / 4, 256), name), 256, 0, stream>>>(
      shares_k, shares_v, static_cast<int>(shares), extent, extent, scratch.dchunk_k, scratch.dchunk_v);
  check_launch(name);
}

}  // namespace rat::cuda
