// cp.async: 16 (or 8, or 4) bytes from global to shared memory without passing through registers. PTX ISA 9.7.9.25.3.
#pragma once

#include "memory.cuh"

namespace rat::cuda {

// Nothing is read from `source` and zeros are written when `valid` is false. Both addresses are 16-byte aligned.
__device__ __forceinline__ void cp_async16(uint32_t target, const void* source, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(target),
               "l"(__cvta_generic_to_global(source)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async16(uint32_t target, const void* source) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n" ::"r"(target),
               "l"(__cvta_generic_to_global(source))
               : "memory");
}

// The same through L1, for rows that several warps of an SM read.
__device__ __forceinline__ void cp_async16_through_l1(uint32_t target, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;\n" ::"r"(target), "l"(__cvta_generic_to_global(source))
               : "memory");
}

__device__ __forceinline__ void cp_async4(uint32_t target, const void* source, bool valid) {
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(target), "l"(__cvta_generic_to_global(source)),
               "r"(bytes)
               : "memory");
}

// 8-byte aligned.
__device__ __forceinline__ void cp_async8(uint32_t target, const void* source, bool valid) {
  const int bytes = valid ? 8 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(target), "l"(__cvta_generic_to_global(source)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async8(uint32_t target, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;\n" ::"r"(target), "l"(__cvta_generic_to_global(source))
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Returns when all but the newest `PENDING` groups of this thread have landed. Other threads see them after a barrier.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

// An arrival at an mbarrier when all copies that this thread has started have landed. PTX ISA 9.7.13.15.15.
__device__ __forceinline__ void cp_async_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(barrier) : "memory");
}

}  // namespace rat::cuda
