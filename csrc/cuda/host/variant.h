// Which instantiation of a kernel on lanes of eight elements (device/rows.cuh) serves a call.
#pragma once

#include <stdexcept>
#include <string>

#include "../../launchers.h"
#include "../device/math.cuh"

namespace rat::cuda {

// Element type, lanes of a head, and whether rows are read 16 bytes at a time.
template <class T_, int W_, bool kVector_>
struct Variant {
  using T = T_;
  static constexpr int W = W_;
  static constexpr bool kVector = kVector_;
};

template <class T, class F>
void with_width(const Sizes& s, F&& f) {
  if (!s.aligned16) return f(Variant<T, 32, false>());
  if (s.head_dim <= 64) return f(Variant<T, 8, true>());
  if (s.head_dim <= 128) return f(Variant<T, 16, true>());
  return f(Variant<T, 32, true>());
}

// Calls f with the variant that serves the call.
template <class F>
void with_variant(const Sizes& s, const char* op, F&& f) {
  switch (s.dtype) {
    case DType::f32: return with_width<float>(s, f);
    case DType::bf16: return with_width<bf16>(s, f);
    case DType::f16: return with_width<f16>(s, f);
    default:
      throw std::runtime_error(std::string("rat_ext.") + op +
                               ": dtype: expected float32, bfloat16 or float16 on CUDA, got float64");
  }
}

template <class T, class F>
void for_each_width(F&& f, const char* type) {
  f(Variant<T, 8, true>(), type);
  f(Variant<T, 16, true>(), type);
  f(Variant<T, 32, true>(), type);
  f(Variant<T, 32, false>(), type);
}
// Calls f(variant, name of its type) for all of them.
template <class F>
void for_each_variant(F&& f) {
  for_each_width<float>(f, "f32");
  for_each_width<bf16>(f, "bf16");
  for_each_width<f16>(f, "f16");
}

}  // namespace rat::cuda
