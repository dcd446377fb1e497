// Warp-level tensor core products (mma.sync m16n8k16, ldmatrix) and the swizzled shared-memory tile that feeds them.
//
// With g = lane / 4 and t = lane % 4 (PTX ISA 9.7.14.5.8):
//   A, 16 x 16: a[0] row g, columns 2t, 2t+1; a[1] row g + 8; a[2] row g, columns 2t+8, 2t+9; a[3] row g + 8, same columns
//   B, 16 x 8:  b0 rows 2t, 2t+1 of column g; b1 rows 2t+8, 2t+9
//   C, 16 x 8:  c[0], c[1] row g, columns 2t, 2t+1; c[2], c[3] row g + 8
// Two neighbouring C tiles, packed to 16 bits, are therefore an A fragment: no shuffle between two chained products.
#pragma once

#include <cstdint>

#include "../device/math.cuh"
#include "cp_async.cuh"
#include "special.cuh"

namespace rat::cuda {

template <class T>
__device__ __forceinline__ void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_16816<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_16816<f16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements; lanes 8i ... 8i+7 give the row addresses of matrix i. PTX ISA 9.7.14.5.15.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Four 8 x 8 matrices to shared memory: what ldmatrix reads. PTX ISA 9.7.14.5.16.
__device__ __forceinline__ void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

// Four 8 x 8 matrices to shared memory, each transposed: r[i] holds what ldmatrix would give of matrix i, and lanes
// 8i ... 8i+7 the addresses of its columns, 16 bytes each. PTX ISA 9.7.14.5.16.
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// A shared-memory tile of rows of DPAD 16-bit elements. The 16-byte piece `piece` of a row lies where the row's low bits
// put it by XOR, so that ldmatrix (eight rows, one piece) and row-wise 16-byte stores both touch all 32 banks once. Rows that
// are a multiple of 128 bytes permute 8 pieces by row % 8; rows of 64 or 192 bytes already alternate between the two
// halves of the banks and permute 4 pieces by row / 2 % 4. Tiles start at multiples of 128 bytes.
template <int DPAD>
struct SwizzledTile {
  static_assert(DPAD % 32 == 0, "a row is a multiple of 64 bytes");
  static constexpr int kRowBytes = DPAD * 2;
  static constexpr int kPieces = DPAD / 8;
  static constexpr int kGroup = kRowBytes % 128 == 0 ? 8 : 4;

  static __device__ __forceinline__ uint32_t offset(int row, int piece) {
    const int mix = kGroup == 8 ? row & 7 : (row >> 1) & 3;
    return row * kRowBytes + ((piece ^ mix) << 4);
  }
  // From the address of piece 0 or 1 of a row to that of piece + 2k of the same row: an XOR that constants fold into.
  // Adding 8i rows adds 8i * kRowBytes, as the permutation repeats every eight rows.
  static __device__ __forceinline__ uint32_t step(uint32_t address, int k) {
    return (address ^ static_cast<uint32_t>((2 * k % kGroup) << 4)) + (2 * k / kGroup) * (kGroup * 16);
  }
  // The address that a lane gives to ldmatrix, for a 16 x 16 block that starts at row 0, piece 0 of a tile at `base`:
  // - as A (tile rows are rows of A), or transposed as B of two column tiles (tile rows are rows of B);
  static __device__ __forceinline__ uint32_t lane_rows(uint32_t base, int lane) {
    return base + offset(lane & 15, lane >> 4);
  }
  // - as B of two column tiles, not transposed (tile rows are columns of B).
  static __device__ __forceinline__ uint32_t lane_columns(uint32_t base, int lane) {
    return base + offset((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
  }
};

// The left operand of a product over D: MT * 16 rows of a tile, kept in registers or fetched again at each use.
template <int DPAD, int MT, bool IN_REGISTERS>
struct LeftOperand {
  static constexpr int kSteps = DPAD / 16;
  uint32_t address;
  uint32_t fragment[IN_REGISTERS ? kSteps : 1][IN_REGISTERS ? MT : 1][4];

  // `tile` is the address of the first of the warp's rows (a multiple of 8 rows into a tile).
  __device__ __forceinline__ void bind(uint32_t tile, int lane) {
    address = SwizzledTile<DPAD>::lane_rows(tile, lane);
    if constexpr (IN_REGISTERS) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          ldmatrix_x4(fragment[k][m], SwizzledTile<DPAD>::step(address, k) + m * 16 * SwizzledTile<DPAD>::kRowBytes);
        }
      }
    }
  }
  __device__ __forceinline__ void fetch(int k, uint32_t (&a)[MT][4]) const {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      if constexpr (IN_REGISTERS) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = fragment[k][m][i];
      } else {
        ldmatrix_x4(a[m], SwizzledTile<DPAD>::step(address, k) + m * 16 * SwizzledTile<DPAD>::kRowBytes);
      }
    }
  }
};

// c = A B^T over DPAD: A is the left operand, the rows of B are the NT * 8 rows of a tile; `b_lane` from lane_columns.
template <class T, int DPAD, int MT, int NT, bool IN_REGISTERS>
__device__ __forceinline__ void product_over_d(float (&c)[MT][NT][4], const LeftOperand<DPAD, MT, IN_REGISTERS>& left,
                                               uint32_t b_lane) {
  static_assert(NT % 2 == 0, "B comes in pairs of column tiles");
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[m][n][i] = 0.0f;
    }
  }
#pragma unroll
  for (int k = 0; k < DPAD / 16; ++k) {
    uint32_t a[MT][4];
    left.fetch(k, a);
    const uint32_t address = SwizzledTile<DPAD>::step(b_lane, k);
#pragma unroll
    for (int n = 0; n < NT / 2; ++n) {
      uint32_t b[4];
      ldmatrix_x4(b, address + n * 16 * SwizzledTile<DPAD>::kRowBytes);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        mma_16816<T>(c[m][2 * n], a[m], b[0], b[1]);
        mma_16816<T>(c[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// c += A B over KT * 16 rows of a tile: A in registers, `b_lane` from lane_rows. With SPLIT == 2 only half of the columns:
// of every 64, the 32 that start at 32 * half; then b_lane has been passed through half_columns.
template <class T, int DPAD, int MT, int KT, int SPLIT>
__device__ __forceinline__ void product_over_rows(float (&c)[MT][DPAD / 8 / SPLIT][4], const uint32_t (&a)[MT][KT][4],
                                                  uint32_t b_lane) {
  static_assert(SPLIT == 1 || (SPLIT == 2 && SwizzledTile<DPAD>::kGroup == 8), "halves of a swizzle group");
#pragma unroll
  for (int k = 0; k < KT; ++k) {
#pragma unroll
    for (int n = 0; n < DPAD / 16 / SPLIT; ++n) {
      const int pair = SPLIT == 1 ? n : n / 2 * 4 + n % 2;
      uint32_t b[4];
      ldmatrix_x4_trans(b, SwizzledTile<DPAD>::step(b_lane, pair) + k * 16 * SwizzledTile<DPAD>::kRowBytes);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        mma_16816<T>(c[m][2 * n], a[m][k], b[0], b[1]);
        mma_16816<T>(c[m][2 * n + 1], a[m][k], b[2], b[3]);
      }
    }
  }
}

__device__ __forceinline__ uint32_t half_columns(uint32_t b_lane, int half) { return b_lane ^ (half << 6); }

// Turns C tiles into an A fragment.
template <class T, int NT>
__device__ __forceinline__ void pack_left(uint32_t (&a)[NT / 2][4], const float (&c)[NT][4]) {
#pragma unroll
  for (int k = 0; k < NT / 2; ++k) {
    a[k][0] = pack2<T>(c[2 * k][0], c[2 * k][1]);
    a[k][1] = pack2<T>(c[2 * k][2], c[2 * k][3]);
    a[k][2] = pack2<T>(c[2 * k + 1][0], c[2 * k + 1][1]);
    a[k][3] = pack2<T>(c[2 * k + 1][2], c[2 * k + 1][3]);
  }
}

// One row of four neighbouring C tiles (32 columns), held by the four lanes of a quad as columns 2t, 2t+1 of each tile;
// afterwards lane t holds the eight columns of tile t, so that global accesses are 16 bytes of T or 32 bytes of float.
// half is 0 for row g, 1 for row g + 8.
template <int NT>
__device__ __forceinline__ void gather_quad(float (&out)[8], const float (&c)[NT][4], int first, int half, int lane) {
  const bool odd = lane & 1, upper = lane & 2;
  float x[2][4];  // tiles 2i + odd, columns of lanes (0, 1) or (2, 3)
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float even_tile = c[first + 2 * i][2 * half + j], odd_tile = c[first + 2 * i + 1][2 * half + j];
      const float other = __shfl_xor_sync(0xffffffffu, odd ? even_tile : odd_tile, 1);
      x[i][j] = odd ? other : even_tile;
      x[i][2 + j] = odd ? odd_tile : other;
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float other = __shfl_xor_sync(0xffffffffu, upper ? x[0][j] : x[1][j], 2);
    out[j] = upper ? other : x[0][j];
    out[4 + j] = upper ? x[1][j] : other;
  }
}

// Copies ROWS rows of D elements into a tile by 16-byte cp.async: the source and its rows are 16-byte aligned. Rows from
// `rows` on and columns from D on become zeros. `row_stride` in elements. The caller commits the group and waits for it.
template <class T, int ROWS, int DPAD, int THREADS>
__device__ __forceinline__ void load_tile(uint32_t tile, const T* source, int64_t row_stride, int rows, int head_dim,
                                          int thread) {
  // A swizzle group of pieces to neighbouring threads; then rows and groups are constant steps in both memories.
  constexpr int kGroup = SwizzledTile<DPAD>::kGroup;
  constexpr int kRowStep = THREADS / kGroup;
  static_assert(kRowStep % 8 == 0, "the swizzle repeats every eight rows");
  static_assert(ROWS < kRowStep || ROWS % kRowStep == 0, "rows are dealt evenly");
  const int piece = thread % kGroup, row = thread / kGroup;
  if (ROWS < kRowStep && row >= ROWS) return;
  const T* from = source + row * row_stride + piece * 8;
  const uint32_t to = tile + SwizzledTile<DPAD>::offset(row, piece);
#pragma unroll
  for (int i = 0; i < (ROWS + kRowStep - 1) / kRowStep; ++i) {
#pragma unroll
    for (int j = 0; j < SwizzledTile<DPAD>::kPieces / kGroup; ++j) {
      const bool valid = row + i * kRowStep < rows && (piece + j * kGroup) * 8 < head_dim;
      cp_async16(to + i * kRowStep * SwizzledTile<DPAD>::kRowBytes + j * kGroup * 16,
                 valid ? from + j * kGroup * 8 : source, valid);
    }
    from += kRowStep * row_stride;
  }
}

// The same of rows that lie apart: row r begins at row_at(r), which is asked for rows below `rows` alone. `source` is any address
// that may be read.
template <class T, int ROWS, int DPAD, int THREADS, class RowAt>
__device__ __forceinline__ void load_scattered_tile(uint32_t tile, const T* source, const RowAt& row_at, int rows,
                                                    int head_dim, int thread) {
  constexpr int kGroup = SwizzledTile<DPAD>::kGroup;
  constexpr int kRowStep = THREADS / kGroup;
  static_assert(kRowStep % 8 == 0 && (ROWS < kRowStep || ROWS % kRowStep == 0), "as load_tile()");
  const int piece = thread % kGroup, first = thread / kGroup;
  if (ROWS < kRowStep && first >= ROWS) return;
  const uint32_t to = tile + SwizzledTile<DPAD>::offset(first, piece);
#pragma unroll
  for (int i = 0; i < (ROWS + kRowStep - 1) / kRowStep; ++i) {
    const int row = first + i * kRowStep;
    const T* from = (row < rows ? row_at(row) : source) + piece * 8;
#pragma unroll
    for (int j = 0; j < SwizzledTile<DPAD>::kPieces / kGroup; ++j) {
      const bool valid = row < rows && (piece + j * kGroup) * 8 < head_dim;
      cp_async16(to + i * kRowStep * SwizzledTile<DPAD>::kRowBytes + j * kGroup * 16,
                 valid ? from + j * kGroup * 8 : source, valid);
    }
  }
}

}  // namespace rat::cuda
