// Bulk copies of contiguous bytes, issued by one thread. Addresses and sizes are multiples of 16. PTX ISA 9.7.9.25.4.
#pragma once

#include "memory.cuh"

namespace rat::cuda {

#if __CUDA_ARCH__ >= 900
// To shared memory; the bytes count on `barrier` when they are visible.
__device__ __forceinline__ void bulk_load(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(target),
      "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(barrier)
      : "memory");
}

// Into L2; nothing waits for it.
__device__ __forceinline__ void bulk_prefetch_l2(const void* source, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;\n" ::"l"(__cvta_generic_to_global(source)), "r"(bytes)
               : "memory");
}
#endif

}  // namespace rat::cuda
