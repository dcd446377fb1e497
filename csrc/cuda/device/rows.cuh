// Rows of D elements: lanes of eight elements each, loads, stores, sums, and a step of the recurrence.
//
// A lane group of W lanes walks one head: lane i holds elements 8i ... 8i + 7 of a row, so that a row of 16-bit elements
// is one 16-byte load per lane. A warp holds 32 / W heads of the same tile, hence its control flow is uniform and shuffles
// use the full mask. Lanes past D, and heads past H, repeat the address of a live one and are masked where they would
// count: in sums over lanes and in stores.
#pragma once

#include "../../launchers.h"
#include "math.cuh"

namespace rat::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// ---- lanes ------------------------------------------------------------------------------------------------------------

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

// Sum over the W lanes of each group, in every lane of it.
template <int W>
__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
  for (int step = W / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

// A value that all lanes hold alike, and of which the compiler is told so: lane 0's. What follows from it lies in uniform
// registers, and a branch on it parts no lanes. One loop that may part them costs a whole kernel its uniform registers.
__device__ __forceinline__ int warp_uniform(int x) { return __shfl_sync(kFullWarp, x, 0); }

// ---- where rows are ---------------------------------------------------------------------------------------------------

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

// ---- eight elements in memory -----------------------------------------------------------------------------------------

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// Eight elements as they lie in memory: loads are issued early and converted where they are used.
template <class T>
struct alignas(16) Raw8 {
  Bytes16 part[sizeof(T) / 2];
};

template <class T>
__device__ __forceinline__ Raw8<T> load_raw(const T* p) {
  return *reinterpret_cast<const Raw8<T>*>(p);
}

template <class T>
__device__ __forceinline__ void store_raw(T* p, const Raw8<T>& raw) {
  *reinterpret_cast<Raw8<T>*>(p) = raw;
}

template <class T>
__device__ __forceinline__ void unpack(const Raw8<T>& raw, float (&x)[8]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __uint_as_float(raw.part[i / 4].word[i % 4]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<T>(raw.part[0].word[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
}

template <class T>
__device__ __forceinline__ void pack(const float (&x)[8], Raw8<T>& raw) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 8; ++i) raw.part[i / 4].word[i % 4] = __float_as_uint(x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) raw.part[0].word[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
  }
}

template <class T>
__device__ __forceinline__ void store_row(T* p, const float (&x)[8]) {
  Raw8<T> raw;
  pack(x, raw);
  store_raw(p, raw);
}

template <class T>
__device__ __forceinline__ void load_row(const T* p, float (&x)[8]) {
  unpack(load_raw(p), x);
}

// Floats that the caller allocated, one by one: they are few.
__device__ __forceinline__ void load_floats(const float* p, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = p[i];
}
__device__ __forceinline__ void store_floats(float* p, const float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) p[i] = x[i];
}

// Floats of scratch memory, which starts at a multiple of 256 bytes; rows of D floats are multiples of 32 bytes.
__device__ __forceinline__ void load_scratch(const float* p, float (&x)[8]) {
  const float4 low = reinterpret_cast<const float4*>(p)[0], high = reinterpret_cast<const float4*>(p)[1];
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}
__device__ __forceinline__ void store_scratch(float* p, const float (&x)[8]) {
  reinterpret_cast<float4*>(p)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(p)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

// ---- eight elements in registers --------------------------------------------------------------------------------------

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

// f and 1 - f of eight logits, with a bias in units of the gates. Not gated: f = 0.
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

// A step of the recurrence: state = f * state + g * x.
__device__ __forceinline__ void advance(const float (&f)[8], const float (&g)[8], const float (&x)[8],
                                        float (&state)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) state[i] = fmaf(f[i], state[i], g[i] * x[i]);
}

}  // namespace rat::cuda
