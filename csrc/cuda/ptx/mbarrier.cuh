// mbarrier: barriers in shared memory that count arrivals and, for bulk copies, bytes. PTX ISA 9.7.13.15.
#pragma once

#include <cstdint>

#include "memory.cuh"

namespace rat::cuda {

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine; the block's threads still need a __syncthreads().
__device__ __forceinline__ void mbarrier_init_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
#endif
}

// One arrival, with release semantics: what this thread wrote or read before is done for whoever waits.
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// One arrival that also makes the phase wait for `bytes` of bulk copies.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of the given parity is complete. A fresh barrier counts as having completed parity 1.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again_%=:\n"
#if __CUDA_ARCH__ >= 900
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
#else
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1;\n"
#endif
      "@!done bra again_%=;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A ring of SLOTS places in shared memory that producers fill and consumers leave, in order. `full` completes a phase when a
// slot is filled, `empty` when it is left.
template <int SLOTS>
struct RingBarriers {
  alignas(8) uint64_t full[SLOTS];
  uint64_t empty[SLOTS];  // right behind: Ring keeps one address

  // By one thread, before any other uses them: arrivals that make a slot full, and that make it empty.
  __device__ __forceinline__ void init(uint32_t fills, uint32_t leaves) {
    for (int i = 0; i < SLOTS; ++i) {
      mbarrier_init(shared_address(&full[i]), fills);
      mbarrier_init(shared_address(&empty[i]), leaves);
    }
  }
};

// Where a thread stands in a ring. Each that takes part walks the slots on its own, and all in the same order:
//   producer:  ring.wait_empty(); fill ring.slot(), arriving at ring.full();    ring.next();
//   consumer:  ring.wait_full();  use ring.slot(), then arrive at ring.empty(); ring.next();
template <int SLOTS>
struct Ring {
  uint32_t barriers;  // address
  uint32_t count;     // slots passed so far

  __device__ __forceinline__ explicit Ring(const RingBarriers<SLOTS>& of, uint32_t passed = 0)
      : barriers(shared_address(&of)), count(passed) {}

  __device__ __forceinline__ uint32_t slot() const { return count % SLOTS; }
  __device__ __forceinline__ uint32_t full() const { return barriers + 8 * slot(); }
  __device__ __forceinline__ uint32_t empty() const { return barriers + 8 * SLOTS + 8 * slot(); }
  __device__ __forceinline__ void wait_full() const { mbarrier_wait(full(), count / SLOTS % 2); }
  // The first round finds every slot empty.
  __device__ __forceinline__ void wait_empty() const { mbarrier_wait(empty(), (count / SLOTS % 2) ^ 1); }
  __device__ __forceinline__ void next() { ++count; }
};

// bar.sync / bar.arrive: the sixteen hardware barriers of a block. 0 belongs to __syncthreads(). `threads` counts those
// that wait and those that only arrive. PTX ISA 9.7.13.1.
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace rat::cuda
