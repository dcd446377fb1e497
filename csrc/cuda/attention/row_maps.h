// Tensor maps over the rows of q and dO, for the backward kernels that read them through the copy engine.
#pragma once

#include <type_traits>

#include "../device/math.cuh"
#include "../ptx/tma.cuh"
#include "plan.h"

namespace rat::cuda {

template <class T>
constexpr CUtensorMapDataType kMapType =
    std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;

inline CUtensorMap token_map(const Rows& rows, CUtensorMapDataType type, const Sizes& s, int64_t heads, int box_rows) {
  const int64_t any = round_up(s.head_dim, 8);  // a dimension of one has no stride; the map wants a legal one
  return swizzled_map<4>(rows.ptr, type, {s.head_dim, s.tokens, heads, s.batch},
                         {s.tokens > 1 ? rows.token : any, heads > 1 ? rows.head : any, s.batch > 1 ? rows.batch : any},
                         box_rows);
}

// A tensor map wants strides that are multiples of 16 bytes, as those of all rows are, and none of zero.
inline bool has_map(const Rows& rows, const Sizes& s, int64_t heads) {
  const auto legal = [](int64_t size, int64_t stride) {
    return size <= 1 || (stride > 0 && stride < (INT64_C(1) << 38));
  };
  return legal(s.tokens, rows.token) && legal(heads, rows.head) && legal(s.batch, rows.batch);
}

}  // namespace rat::cuda
