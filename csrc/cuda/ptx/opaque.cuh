// Values whose origin is hidden from the compiler. No instruction comes of it.
#pragma once

#include <cstdint>
#include <type_traits>

namespace rat::cuda {

// The value itself. What depends on it is computed anew at each use: the compiler would otherwise see that a loop always needs
// the same row offsets, and keep them in registers that the loop has none of.
template <class V>
__device__ __forceinline__ V opaque(V value) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8);
  if constexpr (std::is_same_v<V, float>) {
    asm volatile("" : "+f"(value));
  } else if constexpr (sizeof(V) == 4) {
    asm volatile("" : "+r"(value));
  } else {
    asm volatile("" : "+l"(value));
  }
  return value;
}

// What was made from these registers before is made anew after: there are none to keep it in.
__device__ __forceinline__ void forget(uint32_t& a, uint32_t& b, uint32_t& c) {
  asm volatile("" : "+r"(a), "+r"(b), "+r"(c));
}

// Keeps ordinary uses of these registers from moving across: the compiler does not know that a wgmma in flight owns them until
// the wait.
template <class R, int COUNT>
__device__ __forceinline__ void hold_registers(R (&r)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if constexpr (std::is_same_v<R, float>) {
      asm volatile("" : "+f"(r[i])::"memory");
    } else {
      asm volatile("" : "+r"(r[i])::"memory");
    }
  }
}

// The same of A operands, four registers per step.
template <int STEPS>
__device__ __forceinline__ void hold_registers(uint32_t (&a)[STEPS][4]) {
#pragma unroll
  for (int i = 0; i < STEPS; ++i) hold_registers(a[i]);
}

}  // namespace rat::cuda
