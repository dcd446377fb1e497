// The same attention on tensor cores: states of two bytes, rows of 64 or 128 elements. A draft costs as much as one token.
//
// A warp takes 32 keys of a slice. Scores are K q, outputs V^T p, in products of 16 x 16 by 16 x 8. Columns 2i and 2i + 1 belong
// to token i: its query, or its weights, as a high and a low part in the states' type, 16 bits of precision or more together.
// Columns know nothing of each other: a token has the same bits in every column, and whatever the others hold.
//
// With g = lane / 4 and t = lane % 4, a lane reads 16 bytes of a row at a time, and what a product calls row or column follows:
// - keys: rows g and g + 8 are those keys; the lane's columns are elements 8t ... 8t + 7 of each 32, four for each step.
// - values: rows g and g + 8 are a pair of the elements that the lane has, one of eight such pairs or four; columns 2t, 2t + 1,
//   2t + 8, 2t + 9 are keys 2t, 2t + 8, 2t + 1, 2t + 9: of the first two, and of the others, one lane has the weights.
// Rows lie one behind the other, so that a piece of every row is in the same banks. Lanes that would collide read their two
// pieces in different order.
#pragma once

#include "../ptx/memory.cuh"
#include "../ptx/mma.cuh"
#include "attend.cuh"

namespace rat::cuda {

// A sum of both parts. An infinite one stands alone: the other part would be infinite with any sign.
__device__ __forceinline__ float of_parts(float high, float low) {
  return fabsf(high) == INFINITY ? high : __fadd_rn(high, low);
}

// Scores of the lane's four keys, 16m + g + 8r, for token t. row(i): the address of key i of the warp.
template <class K, class Row>
__device__ __forceinline__ void matrix_scores(int lane, const float* queries, const float* units, const Row& row,
                                              float (&score)[2][2]) {
  using T = typename K::T;
  const int g = lane / 4, t = lane % 4;
  const bool swapped = g % 2 == 1, present = g / 2 < K::N;
  // Of a query, the high parts and behind them the low ones: see prepare_query().
  const uint32_t query =
      shared_address(queries) + ((present ? g / 2 : 0) * 2 + g % 2) * K::kColumns * 2 + 16 * static_cast<uint32_t>(t);
  float c[2][4];
#pragma unroll
  for (int m = 0; m < 2; ++m) c[m][0] = c[m][1] = c[m][2] = c[m][3] = 0.0f;
#pragma unroll(K::kBlocks == 2 ? 1 : 2)  // registers
  for (int both = 0; both < K::kColumns / 32; both += 2) {
    uint32_t b[2][2][2];
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      uint32_t x[4];
      load_shared16(x, query + 64 * (both + w));
#pragma unroll
      for (int i = 0; i < 4; ++i) b[w][i / 2][i % 2] = present ? x[i] : 0;
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      uint32_t x[2][2][4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t from = row(16 * m + g + 8 * r) + 16 * t + 64 * both;
#pragma unroll
        for (int w = 0; w < 2; ++w) load_shared16(x[r][w], from + 64 * (swapped ? 1 - w : w));
      }
#pragma unroll
      for (int w = 0; w < 2; ++w) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const auto word = [&](int r, int i) { return swapped ? x[r][1 - w][i] : x[r][w][i]; };
          const uint32_t a[4] = {word(0, 2 * h), word(1, 2 * h), word(0, 2 * h + 1), word(1, 2 * h + 1)};
          mma_16816<T>(c[m], a, b[w][h][0], b[w][h][1]);
        }
      }
    }
  }
  float unit = 1.0f;
  if constexpr (std::is_same_v<T, f16>) unit = units[t];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) score[m][r] = __fmul_rn(of_parts(c[m][2 * r], c[m][2 * r + 1]), unit);
  }
}

// The softmax of a warp's keys for token t: of the values, elements 8 (g * kPieces + i) + j.
template <class K>
struct WarpPart {
  static constexpr int kPieces = K::kColumns / 64;
  float maximum, sum;
  float value[kPieces][8];
};

template <class K>
__device__ __forceinline__ void clear(WarpPart<K>& part) {
  part.maximum = kNoScore;
  part.sum = 0.0f;
#pragma unroll
  for (int i = 0; i < WarpPart<K>::kPieces; ++i) zero(part.value[i]);
}

// Weights from scores, as the right operand of the second product.
template <class K>
__device__ __forceinline__ void matrix_weights(int lane, const float (&score)[2][2], WarpPart<K>& part,
                                               uint32_t (&b)[2][2]) {
  using T = typename K::T;
  const int g = lane / 4, t = lane % 4;
  float top = fmaxf(fmaxf(score[0][0], score[0][1]), fmaxf(score[1][0], score[1][1]));
  top = fmaxf(top, kNoScore);
#pragma unroll
  for (int step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, step));
  float weight[2][2];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) weight[m][r] = weight_of<T>(__fadd_rn(score[m][r], -top));
  }
  part.maximum = top;
  part.sum = __fadd_rn(__fadd_rn(weight[0][0], weight[0][1]), __fadd_rn(weight[1][0], weight[1][1]));
#pragma unroll
  for (int step = 4; step < 32; step *= 2) {
    part.sum = __fadd_rn(part.sum, __shfl_xor_sync(kFullWarp, part.sum, step));
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    uint32_t high, low;
    split<T>(weight[m][0], weight[m][1], high, low);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int source = 4 * (2 * t + half) + g / 2;
      const uint32_t of_high = __shfl_sync(kFullWarp, high, source), of_low = __shfl_sync(kFullWarp, low, source);
      b[m][half] = g % 2 == 0 ? of_high : of_low;
    }
  }
}

// Weighted values. kMasked: keys from `limit` on, counted from the warp's first, are left out. A lane keeps them or does not.
template <class K, bool kMasked, class Row>
__device__ __forceinline__ void matrix_values(int lane, const uint32_t (&b)[2][2], const Row& row, int limit,
                                              bool keeps, float (&value)[WarpPart<K>::kPieces][8]) {
  constexpr int kPieces = WarpPart<K>::kPieces;
  static_assert(kPieces <= 2);
  const int g = lane / 4, t = lane % 4;
  const bool swapped = kPieces == 2 && t % 2 == 1;
#pragma unroll(K::kBlocks == 2 || kMasked ? 1 : 2)
  for (int half = 0; half < 2; ++half) {  // of 16 bytes: fewer registers at a time
    float c[kPieces][2][4];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
#pragma unroll
      for (int f = 0; f < 2; ++f) c[i][f][0] = c[i][f][1] = c[i][f][2] = c[i][f][3] = 0.0f;
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const uint32_t b0 = m == 0 ? b[0][0] : b[1][0], b1 = m == 0 ? b[0][1] : b[1][1];
      uint32_t x[4][kPieces][2];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int key = 16 * m + 2 * t + n / 2 + 8 * (n % 2);
        const uint32_t from = row(key) + 16 * kPieces * g + 8 * half;
#pragma unroll
        for (int w = 0; w < kPieces; ++w) {
          load_shared8(x[n][w], from + 16 * (swapped ? 1 - w : w));
          if (kMasked && key >= limit) x[n][w][0] = x[n][w][1] = 0;
        }
      }
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
#pragma unroll
        for (int f = 0; f < 2; ++f) {
          const auto word = [&](int n) { return swapped ? x[n][kPieces - 1 - i][f] : x[n][i][f]; };
          const uint32_t w0 = word(0), w1 = word(1), w2 = word(2), w3 = word(3);
          const uint32_t rows[4] = {__byte_perm(w0, w1, 0x5410), __byte_perm(w0, w1, 0x7632),
                                    __byte_perm(w2, w3, 0x5410), __byte_perm(w2, w3, 0x7632)};
          mma_16816<typename K::T>(c[i][f], rows, b0, b1);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
#pragma unroll
      for (int f = 0; f < 2; ++f) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float of_key = of_parts(c[i][f][2 * r], c[i][f][2 * r + 1]);
          value[i][2 * f + r] = keeps && half == 0 ? of_key : value[i][2 * f + r];
          value[i][4 + 2 * f + r] = keeps ? of_key : value[i][4 + 2 * f + r];
        }
      }
    }
  }
}

// Keys of a warp, from `at` on, in a stage that begins at key `base`.
template <class K>
__device__ __forceinline__ void attend_matrix(const Decode& a, const Item& item, const float* queries,
                                              const float* units, uint32_t at, uint32_t base, uint32_t all_keys,
                                              uint32_t stage, uint32_t fresh, WarpPart<K>& part) {
  constexpr int kRow = K::kColumns * 2;
  const int lane = fresh_thread() % 32;
  const int g = lane / 4, t = lane % 4;
  const uint32_t keys = stage + (at - base) * kRow, values = keys + K::kStageKeys * kRow;
  float score[2][2];
  uint32_t b[2][2];
  if (at + kWarpKeys <= item.keys) {  // every token sees all, and none is new
    matrix_scores<K>(lane, queries, units, [&](int i) { return keys + i * kRow; }, score);
    matrix_weights<K>(lane, score, part, b);
    matrix_values<K, false>(lane, b, [&](int i) { return values + i * kRow; }, kWarpKeys, true, part.value);
    return;
  }
  // New ones lie elsewhere.
  const int old = static_cast<int>(item.keys) - static_cast<int>(at);
  const auto place = [&](int i) { return min(i - old, K::N - 1); };
  matrix_scores<K>(
      lane, queries, units, [&](int i) { return K::N > 1 && i >= old ? fresh + place(i) * kRow : keys + i * kRow; },
      score);
  const auto limit = [&](int token) { return static_cast<int>(keys_of<K>(a, item, token)) - static_cast<int>(at); };
  const int seen = limit(min(t, a.tokens - 1));
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (16 * m + g + 8 * r >= seen) score[m][r] = -INFINITY;
    }
  }
  matrix_weights<K>(lane, score, part, b);
  const auto value_row = [&](int i) {
    return K::N > 1 && i >= old ? fresh + (K::N + place(i)) * kRow : values + i * kRow;
  };
  // A key that the token does not see is left out: 0 times its value may be NaN. Tokens may see different ones.
  if constexpr (K::N == 1) {
    matrix_values<K, true>(lane, b, value_row, old, true, part.value);
  } else {
    const int count = all_keys == item.keys ? 1 : a.tokens;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      matrix_values<K, true>(lane, b, value_row, limit(i), count == 1 || t == i, part.value);
    }
  }
}

// Brings the warps' softmaxes of a slice to shared memory. warp: which keys it has; alone: the first has all.
template <class K>
__device__ __forceinline__ void share_slice(SharedHead& head, float* values, int turn, int warp, bool alone,
                                            const WarpPart<K>& part) {
  const int lane = fresh_thread() % 32;
  const int g = lane / 4, t = lane % 4;
  if (t >= K::N || (alone && warp > 0)) return;
  float* const to = values + (t * kConsumerWarps + warp) * K::kColumns + 8 * WarpPart<K>::kPieces * g;
#pragma unroll
  for (int i = 0; i < WarpPart<K>::kPieces; ++i) store_scratch(to + 8 * i, part.value[i]);
  if (g == 0) {
    head.maximum[turn][t][warp] = part.maximum;
    head.sum[turn][t][warp] = part.sum;
  }
}

}  // namespace rat::cuda
