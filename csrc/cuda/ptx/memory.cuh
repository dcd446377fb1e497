// Loads and stores that C++ cannot say: by shared-memory address, with an order, or for the cache alone. PTX ISA 9.7.9.
#pragma once

#include <cstdint>

namespace rat::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- shared memory, by address, which is a multiple of the bytes that move. PTX ISA 9.7.9.8 (ld), 9.7.9.11 (st). ---

__device__ __forceinline__ void load_shared16(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void store_shared16(uint32_t address, const uint32_t (&x)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

__device__ __forceinline__ void store_shared16(uint32_t address, float x0, float x1, float x2, float x3) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "f"(x0), "f"(x1), "f"(x2), "f"(x3)
               : "memory");
}

__device__ __forceinline__ void load_shared8(uint32_t (&x)[2], uint32_t address) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];\n" : "=r"(x[0]), "=r"(x[1]) : "r"(address) : "memory");
}

__device__ __forceinline__ void store_shared8(uint32_t address, const uint32_t (&x)[2]) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};\n" ::"r"(address), "r"(x[0]), "r"(x[1]) : "memory");
}

__device__ __forceinline__ void store_shared4(uint32_t address, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address), "r"(x) : "memory");
}

// 16 bytes of zeros.
__device__ __forceinline__ void clear_shared16(uint32_t address) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};\n" ::"r"(address), "r"(0) : "memory");
}

// ---- global memory ----------------------------------------------------------------------------------------------------

// What the block that stored the value with store_release() wrote before is seen after this load. PTX ISA 9.7.9.8.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(x) : "l"(__cvta_generic_to_global(p)) : "memory");
  return x;
}

// PTX ISA 9.7.9.11.
__device__ __forceinline__ void store_release(uint32_t* p, uint32_t x) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;\n" ::"l"(__cvta_generic_to_global(p)), "r"(x) : "memory");
}

// The value at `p`, which is counted up, and after `most` begins anew at zero. What the block wrote before a barrier is seen by
// whoever counts next, as after store_release(). PTX ISA 9.7.13.5 (atom).
__device__ __forceinline__ uint32_t atomic_inc_ordered(uint32_t* p, uint32_t most) {
  uint32_t x;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;\n"
               : "=r"(x)
               : "l"(__cvta_generic_to_global(p)), "r"(most)
               : "memory");
  return x;
}

// Four bytes, or what `raw` had where there is nothing to load; a predicate instead of a branch. Volatile keeps the order of
// these loads and stores: rows written may be those that were read. PTX ISA 9.7.9.8, 9.7.9.11.
__device__ __forceinline__ void load_pair_if(uint32_t& raw, uint64_t at, bool valid) {
  asm volatile("{\n.reg .pred valid;\nsetp.ne.s32 valid, %2, 0;\n@valid ld.global.u32 %0, [%1];\n}\n"
               : "+r"(raw)
               : "l"(at), "r"(static_cast<int>(valid)));
}
__device__ __forceinline__ void store_pair_if(uint64_t at, uint32_t raw, bool valid) {
  asm volatile("{\n.reg .pred valid;\nsetp.ne.s32 valid, %2, 0;\n@valid st.global.u32 [%0], %1;\n}\n" ::"l"(at),
               "r"(raw), "r"(static_cast<int>(valid)));
}

// The same of floats, two of them at a multiple of eight bytes.
__device__ __forceinline__ void load_float_if(float& x, const float* at, bool valid) {
  asm volatile("{\n.reg .pred valid;\nsetp.ne.s32 valid, %2, 0;\n@valid ld.global.f32 %0, [%1];\n}\n"
               : "+f"(x)
               : "l"(__cvta_generic_to_global(at)), "r"(static_cast<int>(valid)));
}
__device__ __forceinline__ void load_float2_if(float2& x, const float* at, bool valid) {
  asm volatile("{\n.reg .pred valid;\nsetp.ne.s32 valid, %3, 0;\n@valid ld.global.v2.f32 {%0, %1}, [%2];\n}\n"
               : "+f"(x.x), "+f"(x.y)
               : "l"(__cvta_generic_to_global(at)), "r"(static_cast<int>(valid)));
}

// Adds to a float; nothing waits for it. The sums of one thread in one place are made in its order. PTX ISA 9.7.13.6.
__device__ __forceinline__ void add_global(float* at, float x) {
  asm volatile("red.global.add.f32 [%0], %1;\n" ::"l"(__cvta_generic_to_global(at)), "f"(x) : "memory");
}

// 16 bytes, where `valid`.
__device__ __forceinline__ void store_global16_if(void* at, const uint32_t (&x)[4], bool valid) {
  asm volatile(
      "{\n.reg .pred valid;\nsetp.ne.s32 valid, %5, 0;\n@valid st.global.v4.b32 [%0], {%1, %2, %3, %4};\n}\n" ::"l"(
          __cvta_generic_to_global(at)),
      "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(static_cast<int>(valid))
      : "memory");
}

// Starts fetching the 128-byte line of an address into L2; nothing waits for it. An ordinary prefetch: a bulk one for each
// row would queue before the copies of K and V. PTX ISA 9.7.9.15.
__device__ __forceinline__ void prefetch_l2(const void* source) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(__cvta_generic_to_global(source)));
}

}  // namespace rat::cuda
