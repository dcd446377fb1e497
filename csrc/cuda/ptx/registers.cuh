// setmaxnreg: the roles of a block share its registers unevenly. Every warp of a warpgroup calls it. COUNT is a multiple of 8,
// 24 ... 256, and the roles' counts together no more than what the block was launched with. PTX ISA 9.7.19.5 (setmaxnreg).
#pragma once

namespace rat::cuda {

template <int COUNT>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(COUNT));
}

// Waits until others have given enough.
template <int COUNT>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(COUNT));
}

}  // namespace rat::cuda
