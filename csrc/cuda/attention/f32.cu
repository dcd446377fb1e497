// Chunk attention for float32 on the CUDA cores, forward and backward: full float32 products, expf, deterministic.
//
// Blocks of 256 threads, 16 x 16, on square tiles of TILE rows: thread (x, y) owns rows y*R ... y*R + R - 1 of a product and,
// of scores, columns x + 16j; of sums over D, columns 4x ... 4x + 3 of every 64. Tiles lie in shared memory with rows of
// DPAD + 4 floats, so that the 16-byte reads of eight neighbouring rows, one column, touch all banks once. Weights pass
// through shared memory between the two products. The blocks are those of the sm_80 family: (query tile, head) in the
// forward, (query tile, query group) for dq, (key tile, head) for dK and dV.
#include "families.h"
#include "plan.h"
#include "rotate_reduce.h"
#include "softmax.cuh"
#include "tiles.cuh"
#include "visible.cuh"

namespace rat::cuda {
namespace {

constexpr int kThreads = 256;

template <int DPAD, bool BACKWARD>
struct F32Traits {
  static constexpr int kTile = BACKWARD ? (DPAD == 64 ? 64 : DPAD == 128 ? 32 : 16) : DPAD == 256 ? 32 : 64;
  static constexpr int kRows = kTile / 16;  // R
  static constexpr int kStride = DPAD + 4;
  static constexpr int kWeightStride = kTile + 4;
  static constexpr int kTileFloats = kTile * kStride;
  static constexpr int kWeightFloats = kTile * kWeightStride;
  static constexpr int kSharedBytes = 4 * ((BACKWARD ? 4 : 2) * kTileFloats + kWeightFloats + 2 * kTile);
  static_assert(kSharedBytes <= 99 * 1024, "must fit the chips with the least shared memory");
};

struct F32Params {
  Sizes size;
  Rows q, out_gate, y;  // backward: q rotated
  Rows dout;
  const float* cos;
  const float* sin;
  float scale;
  ChunkStates chunks;
  const float* s_self;
  float* lse;
  const float* delta;
  float* dq;
  float* dchunk_k;
  float* dchunk_v;
  TileOrder order;
};

// Rows from `rows` on and columns from D on become zeros.
template <class Traits, int DPAD>
__device__ __forceinline__ void load_rows(float* tile, const float* source, int64_t row_stride, int rows,
                                          int head_dim) {
  for (int index = threadIdx.x; index < Traits::kTile * (DPAD / 4); index += kThreads) {
    const int row = index / (DPAD / 4), column = index % (DPAD / 4) * 4;
    float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (row < rows && column < head_dim) x = *reinterpret_cast<const float4*>(source + row * row_stride + column);
    *reinterpret_cast<float4*>(tile + row * Traits::kStride + column) = x;
  }
}

// s[i][j] = a[row y*R + i] . b[row x + 16j]
template <class Traits, int DPAD>
__device__ __forceinline__ void scores(float (&s)[Traits::kRows][Traits::kRows], const float* a, const float* b) {
  constexpr int R = Traits::kRows;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
  for (int i = 0; i < R; ++i) {
#pragma unroll
    for (int j = 0; j < R; ++j) s[i][j] = 0.0f;
  }
#pragma unroll 4
  for (int d = 0; d < DPAD; d += 4) {
    float4 left[R], right[R];
#pragma unroll
    for (int i = 0; i < R; ++i) {
      left[i] = *reinterpret_cast<const float4*>(a + (y * R + i) * Traits::kStride + d);
      right[i] = *reinterpret_cast<const float4*>(b + (x + 16 * i) * Traits::kStride + d);
    }
#pragma unroll
    for (int i = 0; i < R; ++i) {
#pragma unroll
      for (int j = 0; j < R; ++j) {
        s[i][j] = fmaf(left[i].x, right[j].x, s[i][j]);
        s[i][j] = fmaf(left[i].y, right[j].y, s[i][j]);
        s[i][j] = fmaf(left[i].z, right[j].z, s[i][j]);
        s[i][j] = fmaf(left[i].w, right[j].w, s[i][j]);
      }
    }
  }
}

// sum[i][c] += sum over k of weights[row y*R + i][k] * b[row k][columns 64c + 4x ...], where takes(i, k).
template <class Traits, int DPAD, class Takes>
__device__ __forceinline__ void accumulate(float4 (&sum)[Traits::kRows][DPAD / 64], const float* weights,
                                           const float* b, const Takes& takes) {
  constexpr int R = Traits::kRows;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll 4
  for (int k = 0; k < Traits::kTile; ++k) {
    float w[R];
#pragma unroll
    for (int i = 0; i < R; ++i) w[i] = weights[(y * R + i) * Traits::kWeightStride + k];
#pragma unroll
    for (int c = 0; c < DPAD / 64; ++c) {
      const float4 v = *reinterpret_cast<const float4*>(b + k * Traits::kStride + c * 64 + x * 4);
#pragma unroll
      for (int i = 0; i < R; ++i) {
        if (!takes(i, k)) continue;
        sum[i][c].x = fmaf(w[i], v.x, sum[i][c].x);
        sum[i][c].y = fmaf(w[i], v.y, sum[i][c].y);
        sum[i][c].z = fmaf(w[i], v.z, sum[i][c].z);
        sum[i][c].w = fmaf(w[i], v.w, sum[i][c].w);
      }
    }
  }
}

template <class Traits, int DPAD>
__device__ __forceinline__ void accumulate(float4 (&sum)[Traits::kRows][DPAD / 64], const float* weights,
                                           const float* b) {
  accumulate<Traits, DPAD>(sum, weights, b, [](int, int) { return true; });
}

template <class Traits>
__device__ __forceinline__ void store_weights(float* weights, const float (&s)[Traits::kRows][Traits::kRows]) {
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
  for (int i = 0; i < Traits::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < Traits::kRows; ++j) {
      weights[(y * Traits::kRows + i) * Traits::kWeightStride + x + 16 * j] = s[i][j];
    }
  }
}

template <int R, int C>
__device__ __forceinline__ void clear(float4 (&sum)[R][C]) {
#pragma unroll
  for (int i = 0; i < R; ++i) {
#pragma unroll
    for (int c = 0; c < C; ++c) sum[i][c] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
}

// Chunk states [first, first + kTile) of a head; rows from `keys` on become zeros.
template <class Traits, int DPAD>
__device__ __forceinline__ void load_states(float* tile, const F32Params& p, const void* states, int64_t owner,
                                            int64_t head, int first, int keys, int head_dim) {
  const float* base = static_cast<const float*>(states);
  if (p.chunks.page_table == nullptr) {
    const int64_t offset = chunk_offset(p.size, p.chunks, owner, head) + static_cast<int64_t>(first) * head_dim;
    return load_rows<Traits, DPAD>(tile, base + offset, head_dim, keys - first, head_dim);
  }
  for (int index = threadIdx.x; index < Traits::kTile * (DPAD / 4); index += kThreads) {
    const int row = index / (DPAD / 4), column = index % (DPAD / 4) * 4;
    float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (first + row < keys && column < head_dim) {
      x = *reinterpret_cast<const float4*>(base + pool_offset(p.size, p.chunks, owner, head, first + row) + column);
    }
    *reinterpret_cast<float4*>(tile + row * Traits::kStride + column) = x;
  }
}

template <int DPAD>
__global__ void __launch_bounds__(kThreads, 1) chunk_attention_fwd_f32_kernel(const __grid_constant__ F32Params p) {
  using Traits = F32Traits<DPAD, false>;
  constexpr int R = Traits::kRows;
  extern __shared__ __align__(16) float memory[];
  float* query = memory;
  float* states = query + Traits::kTileFloats;
  float* weights = states + Traits::kTileFloats;

  int64_t head;
  const WorkItem item = ordered_item(p.size, p.order, blockIdx.x, Traits::kTile, &head);
  const Sequence& sequence = item.sequence;
  const int64_t first_token = sequence.begin + item.tile * Traits::kTile;
  const int64_t owner = states_owner(p.chunks, sequence.index);
  if (first_token >= sequence.end || owner < 0) return;
  const int rows = static_cast<int>(min(static_cast<int64_t>(Traits::kTile), sequence.end - first_token));
  const int head_dim = static_cast<int>(p.size.head_dim);
  const int64_t position = sequence.start + item.tile * Traits::kTile;
  const VisibleKeys visible(p.size, position);
  const int keys = visible.to_any(rows);
  const int64_t scalar_base = (sequence.batch * p.size.heads + head) * p.size.tokens + first_token;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;

  // Rotates q in, four columns of each half at a time; pieces past D / 2 clear the columns from D on.
  const int half = head_dim / 2;
  const RowAngles angles(p.size, position);
  const float* q = row_pointer<float>(p.q, sequence.batch, first_token, group_of(p.size, head, p.size.q_groups));
  for (int index = threadIdx.x; index < Traits::kTile * (DPAD / 8); index += kThreads) {
    const int row = index / (DPAD / 8), piece = index % (DPAD / 8);
    const bool inside = 4 * piece < half;
    float low[4] = {0.0f, 0.0f, 0.0f, 0.0f}, high[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (inside && row < rows) {
      const float* from = q + row * p.q.token + 4 * piece;
      load4(from, low);
      load4(from + half, high);
      rotate4(low, high, p.cos, p.sin, angles.of(row), half, piece, 1.0f);
    }
    const int low_column = inside ? 4 * piece : head_dim + (piece - head_dim / 8) * 8;
    const int high_column = inside ? 4 * piece + half : low_column + 4;
    float* to = query + row * Traits::kStride;
    *reinterpret_cast<float4*>(to + low_column) = make_float4(low[0], low[1], low[2], low[3]);
    *reinterpret_cast<float4*>(to + high_column) = make_float4(high[0], high[1], high[2], high[3]);
  }

  float maximum[R], sum[R];  // the softmax starts from the self term
  int end[R];                // the row sees keys [0, end)
  float4 o[R][DPAD / 64];
  clear(o);
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const int row = y * R + i;
    const float own = row < rows ? p.s_self[scalar_base + row] : 0.0f;
    maximum[i] = first_maximum(own);
    sum[i] = x == 0 ? first_sum(own) : 0.0f;
    end[i] = visible.end(row);
  }

  for (int first = 0; first < keys; first += Traits::kTile) {
    __syncthreads();  // states and weights of the block before are used up
    load_states<Traits, DPAD>(states, p, p.chunks.k, owner, head, first, keys, head_dim);
    __syncthreads();  // K (and the first time Q) is whole
    float s[R][R];
    scores<Traits, DPAD>(s, query, states);
#pragma unroll
    for (int i = 0; i < R; ++i) {
      float top = maximum[i];
#pragma unroll
      for (int j = 0; j < R; ++j) {
        s[i][j] *= p.scale;
        if (first + x + 16 * j < end[i]) top = fmaxf(top, s[i][j]);
      }
#pragma unroll
      for (int lanes = 1; lanes < 16; lanes *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, lanes));
      const float factor = expf(maximum[i] - top);
      maximum[i] = top;
      sum[i] *= factor;
#pragma unroll
      for (int j = 0; j < R; ++j) {
        s[i][j] = first + x + 16 * j < end[i] ? expf(s[i][j] - top) : 0.0f;
        sum[i] += s[i][j];
      }
#pragma unroll
      for (int c = 0; c < DPAD / 64; ++c) {
        o[i][c].x *= factor;
        o[i][c].y *= factor;
        o[i][c].z *= factor;
        o[i][c].w *= factor;
      }
    }
    store_weights<Traits>(weights, s);
    __syncthreads();  // K is used up, the weights are whole
    load_states<Traits, DPAD>(states, p, p.chunks.v, owner, head, first, keys, head_dim);
    __syncthreads();  // V is whole
    if (first + Traits::kTile <= visible.to_all()) {
      accumulate<Traits, DPAD>(o, weights, states);
    } else {  // a weight of 0 would not silence a value that is not finite
      accumulate<Traits, DPAD>(o, weights, states, [&](int i, int k) { return first + k < end[i]; });
    }
  }

#pragma unroll
  for (int i = 0; i < R; ++i) {
    float total = sum[i];
#pragma unroll
    for (int lanes = 1; lanes < 16; lanes *= 2) total += __shfl_xor_sync(0xffffffffu, total, lanes);
    const int row = y * R + i;
    if (row >= rows) continue;
    const int64_t token = first_token + row;
    if (x == 0) p.lse[scalar_base + row] = maximum[i] + logf(total);
    const float self_weight = expf(p.s_self[scalar_base + row] - maximum[i]);
    float* to = const_cast<float*>(row_pointer<float>(p.y, sequence.batch, token, head));
#pragma unroll
    for (int c = 0; c < DPAD / 64; ++c) {
      const int column = c * 64 + x * 4;
      if (column >= head_dim) continue;
      float own[4], out[4] = {o[i][c].x, o[i][c].y, o[i][c].z, o[i][c].w};
      load4(to + column, own);
#pragma unroll
      for (int j = 0; j < 4; ++j) out[j] = fmaf(self_weight, own[j], out[j]) / total;
      if (p.out_gate.ptr != nullptr) {
        float logit[4];
        load4(row_pointer<float>(p.out_gate, sequence.batch, token, head) + column, logit);
#pragma unroll
        for (int j = 0; j < 4; ++j) out[j] /= 1.0f + expf(-logit[j]);
      }
      *reinterpret_cast<float4*>(to + column) = make_float4(out[0], out[1], out[2], out[3]);
    }
  }
}

template <int DPAD>
__global__ void __launch_bounds__(kThreads, 1) chunk_attention_dq_bwd_f32_kernel(const __grid_constant__ F32Params p) {
  using Traits = F32Traits<DPAD, true>;
  constexpr int R = Traits::kRows;
  extern __shared__ __align__(16) float memory[];
  float* query = memory;
  float* dout = query + Traits::kTileFloats;
  float* key = dout + Traits::kTileFloats;
  float* value = key + Traits::kTileFloats;
  float* weights = value + Traits::kTileFloats;

  int64_t group;
  const WorkItem item = ordered_item(p.size, p.order, blockIdx.x, Traits::kTile, &group);
  const Sequence& sequence = item.sequence;
  const int64_t first_token = sequence.begin + item.tile * Traits::kTile;
  if (first_token >= sequence.end) return;
  const int rows = static_cast<int>(min(static_cast<int64_t>(Traits::kTile), sequence.end - first_token));
  const int head_dim = static_cast<int>(p.size.head_dim);
  const int64_t position = sequence.start + item.tile * Traits::kTile;
  const VisibleKeys visible(p.size, position);
  const int keys = visible.to_any(rows);
  const int64_t heads = quotient(p.size.heads, p.size.q_groups);
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;

  float4 dq[R][DPAD / 64];
  clear(dq);
  if (keys > 0) {
    load_rows<Traits, DPAD>(query, row_pointer<float>(p.q, sequence.batch, first_token, group), p.q.token, rows,
                            head_dim);
    for (int64_t head = group * heads; head < (group + 1) * heads; ++head) {
      const int64_t chunk_base = chunk_offset(p.size, p.chunks, sequence.index, head);
      const int64_t scalar_base = (sequence.batch * p.size.heads + head) * p.size.tokens + first_token;
      __syncthreads();  // dO of the head before is used up
      load_rows<Traits, DPAD>(dout, row_pointer<float>(p.dout, sequence.batch, first_token, head), p.dout.token, rows,
                              head_dim);
      float lse[R], delta[R];
#pragma unroll
      for (int i = 0; i < R; ++i) {
        const int row = y * R + i;
        lse[i] = row < rows ? p.lse[scalar_base + row] : 0.0f;
        delta[i] = row < rows ? p.delta[scalar_base + row] : 0.0f;
      }
      for (int first = 0; first < keys; first += Traits::kTile) {
        const int64_t offset = chunk_base + static_cast<int64_t>(first) * head_dim;
        __syncthreads();  // K, V and weights of the block before are used up
        load_rows<Traits, DPAD>(key, static_cast<const float*>(p.chunks.k) + offset, head_dim, keys - first, head_dim);
        load_rows<Traits, DPAD>(value, static_cast<const float*>(p.chunks.v) + offset, head_dim, keys - first,
                                head_dim);
        __syncthreads();  // K, V, dO and Q are whole
        float s[R][R], ds[R][R];
        scores<Traits, DPAD>(s, query, key);
        scores<Traits, DPAD>(ds, dout, value);
#pragma unroll
        for (int i = 0; i < R; ++i) {
          const int end = y * R + i < rows ? visible.end(y * R + i) - first : 0;
#pragma unroll
          for (int j = 0; j < R; ++j) {
            ds[i][j] = x + 16 * j < end ? expf(s[i][j] * p.scale - lse[i]) * (ds[i][j] - delta[i]) : 0.0f;
          }
        }
        store_weights<Traits>(weights, ds);
        __syncthreads();  // the weights are whole
        accumulate<Traits, DPAD>(dq, weights, key);
      }
    }
    __syncthreads();  // the Q tile is used up: it takes dQ
  }

#pragma unroll
  for (int i = 0; i < R; ++i) {
#pragma unroll
    for (int c = 0; c < DPAD / 64; ++c) {
      const float4 v = dq[i][c];
      *reinterpret_cast<float4*>(query + (y * R + i) * Traits::kStride + c * 64 + x * 4) =
          make_float4(v.x * p.scale, v.y * p.scale, v.z * p.scale, v.w * p.scale);
    }
  }
  __syncthreads();  // dQ is whole
  const int half = head_dim / 2;
  const RowAngles angles(p.size, position);
  for (int index = threadIdx.x; index < rows * (DPAD / 8); index += kThreads) {
    const int row = index / (DPAD / 8), piece = index % (DPAD / 8);
    if (4 * piece >= half) continue;
    float low[4], high[4];
    load4(query + row * Traits::kStride + 4 * piece, low);
    load4(query + row * Traits::kStride + 4 * piece + half, high);
    rotate4(low, high, p.cos, p.sin, angles.of(row), half, piece, -1.0f);
    float* to =
        p.dq + ((sequence.batch * p.size.tokens + first_token + row) * p.size.q_groups + group) * head_dim + 4 * piece;
    *reinterpret_cast<float4*>(to) = make_float4(low[0], low[1], low[2], low[3]);
    *reinterpret_cast<float4*>(to + half) = make_float4(high[0], high[1], high[2], high[3]);
  }
}

template <int DPAD>
__global__ void __launch_bounds__(kThreads, 1)
    chunk_attention_dkdv_bwd_f32_kernel(const __grid_constant__ F32Params p) {
  using Traits = F32Traits<DPAD, true>;
  constexpr int R = Traits::kRows;
  extern __shared__ __align__(16) float memory[];
  float* query = memory;
  float* dout = query + Traits::kTileFloats;
  float* key = dout + Traits::kTileFloats;
  float* value = key + Traits::kTileFloats;
  float* weights = value + Traits::kTileFloats;
  float* lse = weights + Traits::kWeightFloats;
  float* delta = lse + Traits::kTile;

  const int64_t head = modulo(blockIdx.x, p.size.heads);
  const KeyTile tile = key_tile(p.size, p.chunks, quotient(blockIdx.x, p.size.heads), Traits::kTile);
  if (tile.first >= tile.closed) return;
  const Sequence& sequence = tile.sequence;
  const int keys = static_cast<int>(min(static_cast<int64_t>(Traits::kTile), tile.closed - tile.first));
  const int head_dim = static_cast<int>(p.size.head_dim);
  const int64_t length = sequence.end - sequence.begin;
  const int64_t chunk_base = chunk_offset(p.size, p.chunks, sequence.index, head) + tile.first * head_dim;
  const int64_t scalar_base = (sequence.batch * p.size.heads + head) * p.size.tokens + sequence.begin;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;

  const VisibleFrom seen(p.size, sequence, tile.first);
  int64_t seen_from[R];  // the first token of the sequence that sees key y*R + i
#pragma unroll
  for (int i = 0; i < R; ++i) seen_from[i] = seen.of(y * R + i);
  const int64_t first_seen = max(static_cast<int64_t>(0), seen.of(0));

  float4 dk[R][DPAD / 64], dv[R][DPAD / 64];
  clear(dk);
  clear(dv);
  load_rows<Traits, DPAD>(key, static_cast<const float*>(p.chunks.k) + chunk_base, head_dim, keys, head_dim);
  load_rows<Traits, DPAD>(value, static_cast<const float*>(p.chunks.v) + chunk_base, head_dim, keys, head_dim);
  for (int64_t first = first_seen / Traits::kTile * Traits::kTile; first < length; first += Traits::kTile) {
    const int64_t token = sequence.begin + first;
    const int rows = static_cast<int>(min(static_cast<int64_t>(Traits::kTile), length - first));
    __syncthreads();  // Q, dO, lse, Delta and weights of the tile before are used up
    load_rows<Traits, DPAD>(query,
                            row_pointer<float>(p.q, sequence.batch, token, group_of(p.size, head, p.size.q_groups)),
                            p.q.token, rows, head_dim);
    load_rows<Traits, DPAD>(dout, row_pointer<float>(p.dout, sequence.batch, token, head), p.dout.token, rows,
                            head_dim);
    if (threadIdx.x < Traits::kTile) {
      const bool valid = static_cast<int>(threadIdx.x) < rows;
      lse[threadIdx.x] = valid ? p.lse[scalar_base + first + threadIdx.x] : 0.0f;
      delta[threadIdx.x] = valid ? p.delta[scalar_base + first + threadIdx.x] : 0.0f;
    }
    __syncthreads();  // the tiles are whole
    float weight[R][R], ds[R][R];
    scores<Traits, DPAD>(weight, key, query);
    scores<Traits, DPAD>(ds, value, dout);
#pragma unroll
    for (int i = 0; i < R; ++i) {
#pragma unroll
      for (int j = 0; j < R; ++j) {
        const int row = x + 16 * j;
        const bool sees = first + row >= seen_from[i] && row < rows && y * R + i < keys;
        weight[i][j] = sees ? expf(weight[i][j] * p.scale - lse[row]) : 0.0f;
        ds[i][j] = weight[i][j] * (ds[i][j] - delta[row]);
      }
    }
    store_weights<Traits>(weights, weight);
    __syncthreads();  // P is whole
    accumulate<Traits, DPAD>(dv, weights, dout);
    __syncthreads();  // P is used up
    store_weights<Traits>(weights, ds);
    __syncthreads();  // dS is whole
    accumulate<Traits, DPAD>(dk, weights, query);
  }

#pragma unroll
  for (int i = 0; i < R; ++i) {
    if (y * R + i >= keys) continue;
#pragma unroll
    for (int c = 0; c < DPAD / 64; ++c) {
      const int column = c * 64 + x * 4;
      if (column >= head_dim) continue;
      const int64_t offset = chunk_base + (y * R + i) * static_cast<int64_t>(head_dim) + column;
      const float4 v = dk[i][c];
      *reinterpret_cast<float4*>(p.dchunk_k + offset) =
          make_float4(v.x * p.scale, v.y * p.scale, v.z * p.scale, v.w * p.scale);
      *reinterpret_cast<float4*>(p.dchunk_v + offset) = dv[i][c];
    }
  }
}

F32Params common_params(const AttentionFwdParams& p) {
  F32Params k{};
  k.size = p.size;
  k.q = p.q;
  k.out_gate = p.out_gate;
  k.y = p.y;
  k.cos = static_cast<const float*>(p.rotary.cos);
  k.sin = static_cast<const float*>(p.rotary.sin);
  k.scale = static_cast<float>(p.scale);
  k.chunks = p.chunks;
  k.lse = static_cast<float*>(p.lse);
  return k;
}

template <int DPAD>
void launch_fwd(F32Params k, cudaStream_t stream) {
  using Traits = F32Traits<DPAD, false>;
  const char* name = "chunk_attention_fwd_f32_kernel";
  k.order = tile_order(k.size, k.chunks, k.size.heads, 4);
  const int64_t blocks = tile_blocks(k.size, Traits::kTile, k.order);
  if (blocks == 0) return;
  allow_shared_memory(chunk_attention_fwd_f32_kernel<DPAD>, Traits::kSharedBytes, name);
  chunk_attention_fwd_f32_kernel<DPAD><<<grid_x(blocks, name), kThreads, Traits::kSharedBytes, stream>>>(k);
  check_launch(name);
}

template <int DPAD>
void launch_bwd(F32Params k, cudaStream_t stream) {
  using Traits = F32Traits<DPAD, true>;
  k.order = tile_order(k.size, k.chunks, k.size.q_groups, 4);
  int64_t blocks = tile_blocks(k.size, Traits::kTile, k.order);
  if (blocks > 0) {
    const char* name = "chunk_attention_dq_bwd_f32_kernel";
    allow_shared_memory(chunk_attention_dq_bwd_f32_kernel<DPAD>, Traits::kSharedBytes, name);
    chunk_attention_dq_bwd_f32_kernel<DPAD><<<grid_x(blocks, name), kThreads, Traits::kSharedBytes, stream>>>(k);
    check_launch(name);
  }
  blocks = key_tiles(k.size, k.chunks, Traits::kTile) * k.size.heads;
  if (blocks > 0) {
    const char* name = "chunk_attention_dkdv_bwd_f32_kernel";
    allow_shared_memory(chunk_attention_dkdv_bwd_f32_kernel<DPAD>, Traits::kSharedBytes, name);
    chunk_attention_dkdv_bwd_f32_kernel<DPAD><<<grid_x(blocks, name), kThreads, Traits::kSharedBytes, stream>>>(k);
    check_launch(name);
  }
}

}  // namespace

namespace f32 {

const char* fwd_refuses(const AttentionFwdParams& p) {
  if (p.size.dtype != DType::f32) return "the dtype is not float32";
  return nullptr;
}

Launch fwd(const AttentionFwdParams& p, const FwdScratch& scratch, Arena&) {
  return [&p, scratch](cudaStream_t stream) {
    F32Params k = common_params(p);
    k.s_self = scratch.s_self;
    if (p.size.head_dim <= 64) return launch_fwd<64>(k, stream);
    if (p.size.head_dim <= 128) return launch_fwd<128>(k, stream);
    return launch_fwd<256>(k, stream);
  };
}

const char* bwd_refuses(const AttentionBwdParams& p) { return fwd_refuses(p.fwd); }

Launch bwd(const AttentionBwdParams& p, BwdScratch& scratch, Arena&) {
  return [&p, scratch](cudaStream_t stream) {
    const Sizes& s = p.fwd.size;
    if (s.sequences * s.heads == 0) return;
    F32Params k = common_params(p.fwd);
    k.q = make_product_queries(p, {}, stream);
    k.dout = scratch.dout;
    k.delta = scratch.delta;
    k.dq = scratch.dq;
    k.dchunk_k = scratch.dchunk_k;
    k.dchunk_v = scratch.dchunk_v;
    if (s.head_dim <= 64) return launch_bwd<64>(k, stream);
    if (s.head_dim <= 128) return launch_bwd<128>(k, stream);
    return launch_bwd<256>(k, stream);
  };
}

}  // namespace f32

KernelList chunk_attention_f32_kernels() {
#define RAT_ENTRY(KERNEL, DPAD)                                                                                        \
  {                                                                                                                    \
    "chunk_attention_" #KERNEL "_f32<" #DPAD ">",                                                                      \
        reinterpret_cast<const void*>(&chunk_attention_##KERNEL##_f32_kernel<DPAD>)                                    \
  }
  static const KernelEntry entries[] = {
      RAT_ENTRY(fwd, 64),      RAT_ENTRY(fwd, 128),      RAT_ENTRY(fwd, 256),
      RAT_ENTRY(dq_bwd, 64),   RAT_ENTRY(dq_bwd, 128),   RAT_ENTRY(dq_bwd, 256),
      RAT_ENTRY(dkdv_bwd, 64), RAT_ENTRY(dkdv_bwd, 128), RAT_ENTRY(dkdv_bwd, 256),
  };
#undef RAT_ENTRY
  return {entries, static_cast<int>(sizeof(entries) / sizeof(entries[0]))};
}

}  // namespace rat::cuda
