// Rotation by an index of the rotary tables, rotate-half.
#pragma once

#include "rows.cuh"

namespace rat::cuda {

// x of a lane group, rotated by row `angle` of the tables; sign = -1 rotates back. The element that pairs with 8i + j lies D/2
// away: in the same register of another lane if D/2 is a multiple of 8, four registers further if it is not. All lanes take
// part.
template <int W>
__device__ __forceinline__ void rotate(const Rotary& r, int64_t angle, int64_t head_dim, const Lane& lane, float sign,
                                       float (&x)[8]) {
  const int half = static_cast<int>(head_dim / 2);
  const float* cosine = static_cast<const float*>(r.cos) + angle * half;
  const float* sine = static_cast<const float*>(r.sin) + angle * half;
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

}  // namespace rat::cuda
