// The tiles in which sm90_bwd.cu adds up dQ, and in which the reverse scan may read it. Host and device.
//
// A tile is `queries` tokens of a row times all D columns of a group, 8,192 floats: tile (n, m, g) of a dense call, where rows are
// multiples of a tile, is number (n * (T / queries) + m) * groups + g. It lies as the registers of wgmma's products do: a half of 64
// rows and 64 columns for each of the two warpgroups (D = 128: its columns; D = 64: its rows), and in it, for each 8 columns, 16
// bytes for each thread: elements (row, column), (row, column + 1), (row + 8, column), (row + 8, column + 1).
#pragma once

#include <cstdint>

namespace rat::cuda {

constexpr int kDqTileFloats = 8192;

#if defined(__CUDACC__)
#define RAT_BOTH __host__ __device__ __forceinline__
#else
#define RAT_BOTH inline
#endif

// Tokens of a tile, by D: 64 or 128.
RAT_BOTH constexpr int dq_tile_queries(int head_dim) { return kDqTileFloats / head_dim; }

// Offset of element (row, column) in its tile; the column is even, and the next one lies beside it.
RAT_BOTH int dq_tile_offset(int head_dim, int row, int column) {
  const int half = head_dim == 128 ? column / 64 : row / 64;
  const int thread = row % 64 / 16 * 32 + row % 8 * 4 + column % 8 / 2;
  return half * (kDqTileFloats / 2) + column % 64 / 8 * 512 + thread * 4 + row % 16 / 8 * 2;
}

#undef RAT_BOTH

}  // namespace rat::cuda
