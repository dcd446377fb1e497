// Programmatic dependent launch: a kernel that was launched to overlap the one before it. PTX ISA 9.7.13.13.
#pragma once

namespace rat::cuda {

// Returns when the kernels before this one are through and what they wrote is seen.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// The next kernel may start once all blocks have said so, or are through.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

}  // namespace rat::cuda
