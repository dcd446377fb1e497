// Bulk copies of contiguous bytes, issued by one thread. Addresses and sizes are multiples of 16. PTX ISA 9.7.9.25.4.
#pragma once

#include "memory.cuh"

namespace rat::cuda {

#if __CUDA_ARCH__ >= 900
// To shared memory; the bytes count on `barrier` when they are visible. They are read once: L2 gives them up before all others.
__device__ __forceinline__ void bulk_load_once(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;\n" ::
          "r"(target),
      "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// Into L2; nothing waits for it.
__device__ __forceinline__ void bulk_prefetch_l2(const void* source, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;\n" ::"l"(__cvta_generic_to_global(source)), "r"(bytes)
               : "memory");
}
#endif

}  // namespace rat::cuda
