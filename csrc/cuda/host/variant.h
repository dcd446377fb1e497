// Which instantiation of a kernel on lanes of eight elements (device/rows.cuh) serves a call.
#pragma once

#include "../device/math.cuh"
#include "launch.h"

namespace rat::cuda {

// Element type, and lanes of a head.
template <class T_, int W_>
struct Variant {
  using T = T_;
  static constexpr int W = W_;
};

// Rows of floats are not worth kernels of their own for D up to 64: half of the lanes idle.
template <class T, class F>
void with_width(const Sizes& s, F&& f) {
  if constexpr (sizeof(T) == 2) {
    if (s.head_dim <= 64) return f(Variant<T, 8>());
  }
  if (s.head_dim <= 128) return f(Variant<T, 16>());
  return f(Variant<T, 32>());
}

// Calls f with the variant that serves the call.
template <class F>
void with_variant(const Sizes& s, const char* op, F&& f) {
  switch (s.dtype) {
    case DType::f32: return with_width<float>(s, f);
    case DType::bf16: return with_width<bf16>(s, f);
    case DType::f16: return with_width<f16>(s, f);
    default: fail_dtype(op);
  }
}

template <class T, class F>
void for_each_width(F&& f, const char* type) {
  if constexpr (sizeof(T) == 2) f(Variant<T, 8>(), type);
  f(Variant<T, 16>(), type);
  f(Variant<T, 32>(), type);
}
// Calls f(variant, name of its type) for all of them.
template <class F>
void for_each_variant(F&& f) {
  for_each_width<float>(f, "f32");
  for_each_width<bf16>(f, "bf16");
  for_each_width<f16>(f, "f16");
}

}  // namespace rat::cuda
