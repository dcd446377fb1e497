// What the scan kernels share: a tile of tokens, lanes of eight elements, gates, rotation, carries between tiles.
//
// A lane group of W lanes walks one head: lane i holds elements 8i ... 8i + 7 of a row, so that a row of 16-bit elements
// is one 16-byte load a lane. A warp holds 32 / W heads of the same tile, hence its control flow is uniform and shuffles
// use the full mask. Lanes past D, and heads past H, repeat the address of a live one and are masked where they would
// count: in sums over lanes and in stores.
#pragma once

#include "../device/elements.cuh"
#include "../device/sequence.cuh"

namespace rat::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// Tokens of a tile where chunks are too long for one: the recurrence is then carried between tiles through memory.
constexpr int64_t kSegment = 64;

// ---- rows -------------------------------------------------------------------------------------------------------------

// Eight elements as they lie in memory: loads are issued early and converted where they are used.
template <class T>
struct alignas(16) Raw8 {
  Bytes16 part[sizeof(T) / 2];
};

template <bool kVector, class T>
__device__ __forceinline__ Raw8<T> load_raw(const T* p) {
  Raw8<T> raw;
  if constexpr (kVector) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) raw.part[i] = reinterpret_cast<const Bytes16*>(p)[i];
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 8; ++i) raw.part[i / 4].word[i % 4] = reinterpret_cast<const uint32_t*>(p)[i];
  } else {
    const uint16_t* half = reinterpret_cast<const uint16_t*>(p);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      raw.part[0].word[i] = half[2 * i] | static_cast<uint32_t>(half[2 * i + 1]) << 16;
    }
  }
  return raw;
}

template <bool kVector, class T>
__device__ __forceinline__ void store_raw(T* p, const Raw8<T>& raw) {
  if constexpr (kVector) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) reinterpret_cast<Bytes16*>(p)[i] = raw.part[i];
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 8; ++i) reinterpret_cast<uint32_t*>(p)[i] = raw.part[i / 4].word[i % 4];
  } else {
    uint16_t* half = reinterpret_cast<uint16_t*>(p);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      half[2 * i] = static_cast<uint16_t>(raw.part[0].word[i]);
      half[2 * i + 1] = static_cast<uint16_t>(raw.part[0].word[i] >> 16);
    }
  }
}

__device__ __forceinline__ void unpack(const Raw8<float>& raw, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = __uint_as_float(raw.part[i / 4].word[i % 4]);
}
__device__ __forceinline__ void unpack(const Raw8<bf16>& raw, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(raw.part[0].word[i] << 16);
    x[2 * i + 1] = __uint_as_float(raw.part[0].word[i] & 0xffff0000u);
  }
}
__device__ __forceinline__ void unpack(const Raw8<f16>& raw, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(raw.part[0].word[i])));
    x[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(raw.part[0].word[i] >> 16)));
  }
}

__device__ __forceinline__ void pack(const float (&x)[8], Raw8<float>& raw) {
#pragma unroll
  for (int i = 0; i < 8; ++i) raw.part[i / 4].word[i % 4] = __float_as_uint(x[i]);
}
__device__ __forceinline__ void pack(const float (&x)[8], Raw8<bf16>& raw) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
    raw.part[0].word[i] = reinterpret_cast<const uint32_t&>(pair);
  }
}
__device__ __forceinline__ void pack(const float (&x)[8], Raw8<f16>& raw) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2 pair = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
    raw.part[0].word[i] = reinterpret_cast<const uint32_t&>(pair);
  }
}

template <bool kVector, class T>
__device__ __forceinline__ void store_row(T* p, const float (&x)[8]) {
  Raw8<T> raw;
  pack(x, raw);
  store_raw<kVector>(p, raw);
}

template <bool kVector, class T>
__device__ __forceinline__ void load_row(const T* p, float (&x)[8]) {
  unpack(load_raw<kVector>(p), x);
}

__device__ __forceinline__ void zero(float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = 0.0f;
}

__device__ __forceinline__ float dot(const float (&x)[8], const float (&y)[8]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = fmaf(x[i], y[i], sum);
  return sum;
}

// Sum over the W lanes of each group, in every lane of it.
template <int W>
__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
  for (int step = W / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

// Gates of elements of two bytes are computed from logits in units of -ln 2, so that e^-x is one multiply-add (the bias comes
// in the same units) and one MUFU.EX2; float ones from plain logits.
template <class T>
constexpr float kLogitUnit = sizeof(T) == 4 ? 1.0f : -1.44269504089f;

// f = sigmoid and 1 - f of x, a logit times kLogitUnit, neither by cancellation. T says how precise the exponential has to be.
template <class T>
__device__ __forceinline__ void gates(float x, float& f, float& g) {
  if constexpr (sizeof(T) == 4) {
    const float e = expf(-fabsf(x));
    const float high = 1.0f / (1.0f + e);
    const float low = e * high;
    f = x < 0.0f ? low : high;
    g = x < 0.0f ? high : low;
  } else {
    // f = 1 / (1 + e), 1 - f = e f. The limit keeps e finite and f normal, .NaN lets a NaN through.
    float e;
    asm("min.NaN.f32 %0, %1, 0f42FA0000;" : "=f"(e) : "f"(x));  // 125
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(e));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(f) : "f"(1.0f + e));
    g = e * f;
  }
}

// ---- lanes and tiles --------------------------------------------------------------------------------------------------

struct Lane {
  int index;     // in its group
  int64_t d;     // first of its eight elements, 0 where it has none
  int64_t head;  // clamped to a head that exists
  bool live;     // has elements of an existing head
};

template <int W>
__device__ __forceinline__ Lane lane_of(int64_t head, int64_t heads, int64_t head_dim) {
  Lane l;
  l.index = static_cast<int>(threadIdx.x) % W;
  const bool inside = l.index * 8 < head_dim;
  l.d = inside ? l.index * 8 : 0;
  l.head = head < heads ? head : heads - 1;
  l.live = inside && head < heads;
  return l;
}

// Tile j of a sequence holds positions [first + j*tile, first + (j + 1)*tile), where first is `start` rounded down to a
// multiple of tile, cut to those of this call: where tile is a multiple of L, no chunk is split but by the call's ends.
struct Tile {
  int64_t item;  // index among all tiles of the call
  Sequence sequence;
  int64_t token;     // first token, in the sequence's row
  int64_t position;  // its position
  int count;         // tokens, <= 0: nothing to do
  bool first, last;  // of the sequence's tiles that hold tokens
};

__device__ __forceinline__ Tile tile_of(const Sizes& s, int64_t item, int64_t size) {
  const WorkItem w = work_item(s, item, size);
  Tile t;
  t.item = item;
  t.sequence = w.sequence;
  const int64_t start = w.sequence.start, stop = start + (w.sequence.end - w.sequence.begin);
  const int64_t base = start - (start ? start % size : 0) + w.tile * size;
  const int64_t low = base > start ? base : start;
  const int64_t high = base + size < stop ? base + size : stop;
  t.count = high > low ? static_cast<int>(high - low) : 0;
  t.position = low;
  t.token = w.sequence.begin + (low - start);
  t.first = low == start;
  t.last = high == stop;
  return t;
}

// Tiles of a sequence that hold tokens, and the item of the first.
__device__ __forceinline__ int64_t tile_count(const Sequence& q, int64_t size) {
  const int64_t length = q.end - q.begin;
  return length ? (q.start % size + length + size - 1) / size : 0;
}
__device__ __forceinline__ int64_t first_item(const Sizes& s, int64_t n, int64_t size) {
  return s.cu_seqlens ? s.cu_seqlens[n] / size + 2 * n : n * tiles_per_row(s, size);
}

// Where a token stands in its chunk. Chunks may be longer than any sequence: what lies further ahead than a tile is
// clipped, which keeps the counters in 32 bits.
struct ChunkClock {
  int64_t chunk;
  int offset;  // tokens of the chunk before this one
  int length;

  __device__ __forceinline__ ChunkClock(int64_t position, int64_t chunk_size) {
    constexpr int64_t kFar = int64_t{1} << 30;
    chunk = position / chunk_size;
    const int64_t exact = position - chunk * chunk_size;
    length = static_cast<int>(chunk_size < kFar ? chunk_size : kFar);
    if (chunk_size <= kFar) {
      offset = static_cast<int>(exact);
    } else {
      const int64_t ahead = chunk_size - exact;  // 1 ... : tokens up to and with the one that closes the chunk
      const int64_t clipped = ahead < kFar / 2 ? kFar - ahead : (exact < kFar / 2 ? exact : kFar / 2);
      offset = static_cast<int>(clipped);
    }
  }
  __device__ __forceinline__ bool opens() const { return offset == 0; }
  __device__ __forceinline__ bool closes() const { return offset == length - 1; }
  __device__ __forceinline__ void next() {
    if (++offset == length) {
      offset = 0;
      ++chunk;
    }
  }
  __device__ __forceinline__ void back() {
    if (--offset < 0) {
      offset = length - 1;
      --chunk;
    }
  }
};

// ---- rotation ---------------------------------------------------------------------------------------------------------

// x of a lane group, rotated by chunk index; sign = -1 rotates back. The element that pairs with 8i + j lies D/2 away:
// in the same register of another lane if D/2 is a multiple of 8, four registers further if it is not. All lanes take part.
template <int W>
__device__ __forceinline__ void rotate(const Rotary& r, int64_t chunk, int64_t head_dim, const Lane& lane, float sign,
                                       float (&x)[8]) {
  const int half = static_cast<int>(head_dim / 2);
  const float* cosine = static_cast<const float*>(r.cos) + chunk * half;
  const float* sine = static_cast<const float*>(r.sin) + chunk * half;
  const bool straddles = half % 8 != 0;
  bool upper[2];
  int i[2], source[2];
#pragma unroll
  for (int m = 0; m < 2; ++m) {  // D/2 is a multiple of 4: four elements at a time lie on one side
    const int d = static_cast<int>(lane.d) + 4 * m;
    upper[m] = d >= half;
    i[m] = upper[m] ? d - half : d;
    source[m] = (upper[m] ? i[m] : d + half) / 8;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {  // elements j and j + 4 in place: other lanes read them as a pair at most
    float y[2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const float straight = __shfl_sync(kFullWarp, x[j + 4 * m], source[m], W);
      const float crossed = __shfl_sync(kFullWarp, x[j + 4 - 4 * m], source[m], W);
      const float c = cosine[i[m] + j], s = upper[m] ? sign * sine[i[m] + j] : -sign * sine[i[m] + j];
      y[m] = fmaf(x[j + 4 * m], c, (straddles ? crossed : straight) * s);
    }
    x[j] = y[0];
    x[j + 4] = y[1];
  }
}

// ---- what the scan kernels read ---------------------------------------------------------------------------------------

// Inputs of a scan. In rat_attention two streams share the gates, k~ and v~; in chunk_recurrence there is one, called k.
struct ScanInput {
  Sizes size;
  Rows q, k, v, gate;      // q and v only in attention; gate null: f = 0, chunk_attention
  const float* gate_bias;  // (H, D) or null
  Rotary rotary;
  float scale;
  const float* initial_k;  // (N, H, D) state before the first token, or null
  const float* initial_v;
  float* carry;  // (items, H, 2 or 3, D): states that tiles start with, product of their gates; null where
                 // no chunk spans tiles
  int64_t tile;  // tokens of a tile
  int64_t items;
  int64_t head_batches;  // ceil(H / heads of a warp)
};

template <class T>
__device__ __forceinline__ const T* row_of(const Rows& r, int64_t batch, int64_t token, int64_t head, int64_t d) {
  return static_cast<const T*>(r.ptr) + batch * r.batch + token * r.token + head * r.head + d;
}
template <class T>
__device__ __forceinline__ T* out_row_of(const Rows& r, int64_t batch, int64_t token, int64_t head, int64_t d) {
  return static_cast<T*>(r.ptr) + batch * r.batch + token * r.token + head * r.head + d;
}

// The row that a pointer is at; moves the pointer to the next one.
template <class P>
__device__ __forceinline__ P* take(P*& row, int64_t stride) {
  P* const at = row;
  row += stride;
  return at;
}

// Floats that the caller allocated: 4-byte alignment is all that is known.
__device__ __forceinline__ void load_floats(const float* p, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = p[i];
}
__device__ __forceinline__ void store_floats(float* p, const float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) p[i] = x[i];
}

// Floats of a workspace, which starts at a multiple of 256 bytes; rows of D floats are multiples of 32.
__device__ __forceinline__ void load_scratch(const float* p, float (&x)[8]) {
  const float4 low = reinterpret_cast<const float4*>(p)[0], high = reinterpret_cast<const float4*>(p)[1];
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}
__device__ __forceinline__ void store_scratch(float* p, const float (&x)[8]) {
  reinterpret_cast<float4*>(p)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(p)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

// In units of the gates.
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

// Offset of stream `s` of (item, head) in a carry array of `streams` rows.
__device__ __forceinline__ int64_t carry_at(const Sizes& s, int64_t item, int64_t head, int streams, int stream) {
  return ((item * s.heads + head) * streams + stream) * s.head_dim;
}

// The state that a tile starts with. A tile whose first token opens a chunk drops it.
template <bool kAttention>
__device__ __forceinline__ void entry_state(const ScanInput& in, const Tile& tile, const Lane& lane, float (&k)[8],
                                            float (&v)[8]) {
  zero(k);
  zero(v);
  constexpr int kStreams = kAttention ? 3 : 2;
  if (in.carry) {
    load_scratch(in.carry + carry_at(in.size, tile.item, lane.head, kStreams, 0) + lane.d, k);
    if (kAttention) load_scratch(in.carry + carry_at(in.size, tile.item, lane.head, kStreams, 1) + lane.d, v);
  } else if (in.initial_k && tile.first) {
    const int64_t at = (tile.sequence.index * in.size.heads + lane.head) * in.size.head_dim + lane.d;
    load_floats(in.initial_k + at, k);
    if (kAttention) load_floats(in.initial_v + at, v);
  }
}

// f and 1 - f of eight elements.
template <class T>
__device__ __forceinline__ void gates_of(const Raw8<T>& raw, const float (&bias)[8], bool gated, float (&f)[8],
                                         float (&g)[8]) {
  if (gated) {
    float x[8];
    unpack(raw, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) gates<T>(fmaf(x[i], kLogitUnit<T>, bias[i]), f[i], g[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      f[i] = 0.0f;
      g[i] = 1.0f;
    }
  }
}

// state = f * state + g * x
__device__ __forceinline__ void advance(const float (&f)[8], const float (&g)[8], const float (&x)[8],
                                        float (&state)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) state[i] = fmaf(f[i], state[i], g[i] * x[i]);
}

// Which tile and heads this warp has; false where it has none.
template <int W>
__device__ __forceinline__ bool warp_work(const ScanInput& in, Tile& tile, Lane& lane) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (warp >= in.items * in.head_batches) return false;
  const int64_t item = warp / in.head_batches, batch = warp % in.head_batches;
  lane = lane_of<W>(batch * (32 / W) + threadIdx.x % 32 / W, in.size.heads, in.size.head_dim);
  tile = tile_of(in.size, item, in.tile);
  return tile.count > 0;
}

}  // namespace rat::cuda
