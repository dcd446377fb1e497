// wgmma: matrix products of a warpgroup (4 warps), operands in shared memory or, for A, in registers. PTX ISA 9.7.15.
//
// C is 64 x N float. A thread holds N / 2 of it, as mma.sync's m16n8 tiles side by side: with g = lane / 4, t = lane % 4,
// c[4 i + 2 h + j] is row 16 warp + g + 8 h, column 8 i + 2 t + j.
// A from registers, 64 x 16: a[2 x + h] holds columns 8 x + 2 t, 8 x + 2 t + 1 of row 16 warp + g + 8 h, so that tiles
// 2 k and 2 k + 1 of a C, rounded, are A's k-th step.
#pragma once

#include <cstdint>

#include "../device/math.cuh"
#include "opaque.cuh"

// Kernels that use wgmma are empty in every other pass, and what they alone use is then used by nobody.
#ifndef __CUDA_ARCH_FEAT_SM90_ALL
#pragma nv_diag_suppress 177
#endif

namespace rat::cuda {

// Before the first wgmma, and whenever ordinary instructions wrote registers that the next one reads.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Returns when all but the newest PENDING groups are done.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(PENDING) : "memory");
}

// Descriptor of a tile in the 128-byte swizzle, in panels of 64 columns (128-byte rows), eight rows (1024 bytes) a swizzle
// pattern; panels start at multiples of 1024 bytes.
// Rows are M or N, columns are K: the next eight rows are 1024 bytes on. Steps of K add 32 bytes inside a panel.
__device__ __forceinline__ uint64_t descriptor_k_major(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}
// Rows are K, columns are N: the next eight rows are 1024 bytes on, the next 64 columns `panel` bytes. Steps of K add 16
// rows, 2048 bytes.
__device__ __forceinline__ uint64_t descriptor_n_major(uint32_t address, uint32_t panel) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(panel >> 4) << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
// An offset in bytes added to the address of a descriptor; tiles never cross the end of shared memory.
__device__ __forceinline__ uint64_t descriptor_add(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// c = a b^T, or c += a b^T: a 64 x 16 and b N x 16 both in shared memory, K contiguous.
template <class T, int N, bool ACCUMULATE>
__device__ __forceinline__ void wgmma_ss(float (&c)[N / 2], uint64_t a, uint64_t b);
// c = a b, or c += a b: a 64 x 16 (K contiguous) and b 16 x N (N contiguous) both in shared memory.
template <class T, int N, bool ACCUMULATE>
__device__ __forceinline__ void wgmma_ss_n_major(float (&c)[N / 2], uint64_t a, uint64_t b);
// c += a b: a 64 x 16 in registers, b 16 x N in shared memory, N contiguous.
template <class T, int N>
__device__ __forceinline__ void wgmma_rs(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b);
// c = a b^T, or c += a b^T: a 64 x 16 in registers, b N x 16 in shared memory, K contiguous.
template <class T, int N, bool ACCUMULATE>
__device__ __forceinline__ void wgmma_rs_k_major(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b);

#define RAT_LIST_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define RAT_LIST_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define RAT_LIST_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define RAT_LIST_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define RAT_LIST_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define RAT_LIST_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define RAT_LIST_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define RAT_LIST_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define RAT_LIST_8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define RAT_LIST_9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define RAT_LIST_10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define RAT_LIST_11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define RAT_LIST_12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define RAT_LIST_13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define RAT_LIST_14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define RAT_LIST_15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define RAT_C8(i)                                                                                                      \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]),          \
      "+f"(c[i + 7])

// P0 ... P4 are the numbers of the operands that follow C's registers.
#define RAT_WGMMA_SS(FUNCTION, T, NAME, N, ACCUMULATE, SCALE, TRANSPOSE_B, P0, P1)                                     \
  template <>                                                                                                          \
  __device__ __forceinline__ void FUNCTION<T, N, ACCUMULATE>(float (&c)[N / 2], uint64_t a, uint64_t b) {              \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" RAT_LIST_N##N                    \
                 "}, %" #P0 ", %" #P1 ", " #SCALE ", 1, 1, 0, " #TRANSPOSE_B ";\n"                                     \
                 : RAT_C_N##N                                                                                          \
                 : "l"(a), "l"(b)                                                                                      \
                 : "memory");                                                                                          \
  }
#define RAT_WGMMA_RS(T, NAME, N, P0, P1, P2, P3, P4)                                                                   \
  template <>                                                                                                          \
  __device__ __forceinline__ void wgmma_rs<T, N>(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b) {              \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" RAT_LIST_N##N                    \
                 "}, {%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", 1, 1, 1, 1;\n"                                \
                 : RAT_C_N##N                                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                                  \
                 : "memory");                                                                                          \
  }
#define RAT_WGMMA_RS_K_MAJOR(T, NAME, N, ACCUMULATE, SCALE, P0, P1, P2, P3, P4)                                        \
  template <>                                                                                                          \
  __device__ __forceinline__ void wgmma_rs_k_major<T, N, ACCUMULATE>(float (&c)[N / 2], const uint32_t (&a)[4],        \
                                                                     uint64_t b) {                                     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" RAT_LIST_N##N                    \
                 "}, {%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", " #SCALE ", 1, 1, 0;\n"                       \
                 : RAT_C_N##N                                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                                  \
                 : "memory");                                                                                          \
  }
#define RAT_WGMMA(T, NAME, N, P0, P1, P2, P3, P4)                                                                      \
  RAT_WGMMA_SS(wgmma_ss, T, NAME, N, false, 0, 0, P0, P1)                                                              \
  RAT_WGMMA_SS(wgmma_ss, T, NAME, N, true, 1, 0, P0, P1)                                                               \
  RAT_WGMMA_RS(T, NAME, N, P0, P1, P2, P3, P4)                                                                         \
  RAT_WGMMA_RS_K_MAJOR(T, NAME, N, false, 0, P0, P1, P2, P3, P4)                                                       \
  RAT_WGMMA_RS_K_MAJOR(T, NAME, N, true, 1, P0, P1, P2, P3, P4)
#define RAT_WGMMA_TYPES(N, P0, P1, P2, P3, P4)                                                                         \
  RAT_WGMMA(bf16, "bf16", N, P0, P1, P2, P3, P4)                                                                       \
  RAT_WGMMA(f16, "f16", N, P0, P1, P2, P3, P4)

#define RAT_LIST_N64 RAT_LIST_0 ", " RAT_LIST_1 ", " RAT_LIST_2 ", " RAT_LIST_3
#define RAT_C_N64 RAT_C8(0), RAT_C8(8), RAT_C8(16), RAT_C8(24)
#define RAT_LIST_N112 RAT_LIST_N64 ", " RAT_LIST_4 ", " RAT_LIST_5 ", " RAT_LIST_6
#define RAT_C_N112 RAT_C_N64, RAT_C8(32), RAT_C8(40), RAT_C8(48)
#define RAT_LIST_N128 RAT_LIST_N112 ", " RAT_LIST_7
#define RAT_C_N128 RAT_C_N112, RAT_C8(56)
#define RAT_LIST_N192 RAT_LIST_N128 ", " RAT_LIST_8 ", " RAT_LIST_9 ", " RAT_LIST_10 ", " RAT_LIST_11
#define RAT_C_N192 RAT_C_N128, RAT_C8(64), RAT_C8(72), RAT_C8(80), RAT_C8(88)
#define RAT_LIST_N256 RAT_LIST_N192 ", " RAT_LIST_12 ", " RAT_LIST_13 ", " RAT_LIST_14 ", " RAT_LIST_15
#define RAT_C_N256 RAT_C_N192, RAT_C8(96), RAT_C8(104), RAT_C8(112), RAT_C8(120)

RAT_WGMMA_TYPES(64, 32, 33, 34, 35, 36)
RAT_WGMMA_TYPES(112, 56, 57, 58, 59, 60)
RAT_WGMMA_TYPES(128, 64, 65, 66, 67, 68)
RAT_WGMMA_RS(bf16, "bf16", 192, 96, 97, 98, 99, 100)
RAT_WGMMA_RS(f16, "f16", 192, 96, 97, 98, 99, 100)
RAT_WGMMA_RS(bf16, "bf16", 256, 128, 129, 130, 131, 132)
RAT_WGMMA_RS(f16, "f16", 256, 128, 129, 130, 131, 132)

RAT_WGMMA_SS(wgmma_ss_n_major, bf16, "bf16", 64, false, 0, 1, 32, 33)
RAT_WGMMA_SS(wgmma_ss_n_major, bf16, "bf16", 64, true, 1, 1, 32, 33)
RAT_WGMMA_SS(wgmma_ss_n_major, f16, "f16", 64, false, 0, 1, 32, 33)
RAT_WGMMA_SS(wgmma_ss_n_major, f16, "f16", 64, true, 1, 1, 32, 33)
RAT_WGMMA_SS(wgmma_ss_n_major, bf16, "bf16", 128, true, 1, 1, 64, 65)
RAT_WGMMA_SS(wgmma_ss_n_major, f16, "f16", 128, true, 1, 1, 64, 65)

#undef RAT_LIST_N64
#undef RAT_C_N64
#undef RAT_LIST_N112
#undef RAT_C_N112
#undef RAT_LIST_N128
#undef RAT_C_N128
#undef RAT_LIST_N192
#undef RAT_C_N192
#undef RAT_LIST_N256
#undef RAT_C_N256
#undef RAT_LIST_0
#undef RAT_LIST_1
#undef RAT_LIST_2
#undef RAT_LIST_3
#undef RAT_LIST_4
#undef RAT_LIST_5
#undef RAT_LIST_6
#undef RAT_LIST_7
#undef RAT_LIST_8
#undef RAT_LIST_9
#undef RAT_LIST_10
#undef RAT_LIST_11
#undef RAT_LIST_12
#undef RAT_LIST_13
#undef RAT_LIST_14
#undef RAT_LIST_15
#undef RAT_C8
#undef RAT_WGMMA_SS
#undef RAT_WGMMA_RS
#undef RAT_WGMMA_RS_K_MAJOR
#undef RAT_WGMMA
#undef RAT_WGMMA_TYPES

}  // namespace rat::cuda
