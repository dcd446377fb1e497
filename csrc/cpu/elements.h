// Storage types. 16-bit floats are bits here; simd.inl converts them.
#pragma once

#include <cstdint>

namespace rat::cpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
// Of chunk states alone: 4 bits of exponent, 3 of fraction, no infinity.
struct e4m3 {
  uint8_t bits;
};

// The type that sums are kept in.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

}  // namespace rat::cpu
