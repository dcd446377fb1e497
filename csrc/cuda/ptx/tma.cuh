// The bulk tensor copy engine (TMA): tensor maps made on the host, copies issued by one thread. PTX ISA 9.7.9.27.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../host/launch.h"
#include "memory.cuh"

namespace rat::cuda {

// The driver's cuTensorMapEncodeTiled, asked of the runtime: nothing links libcuda, and importing needs no driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status),
        "cuTensorMapEncodeTiled");
  if (status != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error("rat_ext: the CUDA driver has no cuTensorMapEncodeTiled (needs CUDA 12.0 or newer)");
  }
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

// A map over 16-bit elements with contiguous columns, cut into boxes of box_rows rows of 64 columns: 128-byte rows in the
// 128-byte swizzle, where 16-byte piece p of row r lies at piece p ^ (r % 8). What lies outside is read as zeros.
// sizes: columns, rows, and RANK - 2 outer ones; strides: of all but the columns, in elements.
template <int RANK>
inline CUtensorMap swizzled_map(const void* base, CUtensorMapDataType type, const int64_t (&sizes)[RANK],
                                const int64_t (&strides)[RANK - 1], int box_rows) {
  static const decltype(&cuTensorMapEncodeTiled) encode = tensor_map_encoder();
  cuuint64_t size[RANK], stride[RANK - 1];
  cuuint32_t box[RANK], steps[RANK];
  for (int i = 0; i < RANK; ++i) {
    size[i] = static_cast<cuuint64_t>(sizes[i]);
    box[i] = i == 0 ? 64 : i == 1 ? static_cast<cuuint32_t>(box_rows) : 1;
    steps[i] = 1;
  }
  for (int i = 0; i + 1 < RANK; ++i) stride[i] = static_cast<cuuint64_t>(strides[i] * 2);
  CUtensorMap map;
  const CUresult result =
      encode(&map, type, RANK, const_cast<void*>(base), size, stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("rat_ext: cuTensorMapEncodeTiled failed with code " + std::to_string(result));
  }
  return map;
}

// (outer, rows, columns), contiguous.
inline CUtensorMap swizzled_rows_map(const void* base, CUtensorMapDataType type, int64_t columns, int64_t rows,
                                     int64_t outer, int box_rows) {
  return swizzled_map<3>(base, type, {columns, rows, outer}, {columns, rows * columns}, box_rows);
}

__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// One box to shared memory; its bytes count on `barrier` when they are visible.
__device__ __forceinline__ void tma_load(uint32_t target, const CUtensorMap* map, uint32_t barrier, int column, int row,
                                         int outer) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];\n" ::"r"(target),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(outer)
      : "memory");
}

__device__ __forceinline__ void tma_load(uint32_t target, const CUtensorMap* map, uint32_t barrier, int column, int row,
                                         int inner, int outer) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];\n" ::"r"(target),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(inner), "r"(outer)
      : "memory");
}

// `bytes` of shared memory to global memory, stored or added as floats. Bulk groups are a thread's own. PTX ISA 9.7.9.25.4.
__device__ __forceinline__ void bulk_store(void* target, uint32_t source, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n" ::"l"(__cvta_generic_to_global(target)),
               "r"(source), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_add(float* target, uint32_t source, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n" ::"l"(
                   __cvta_generic_to_global(target)),
               "r"(source), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }
// Returns when the targets of this thread's groups have been written.
__device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory"); }

// Orders this thread's earlier ordinary accesses to shared memory before later ones by the copy engine and the tensor
// cores, which go through another proxy. Each writing thread needs it before the barrier.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }
// The same for all memory, and for the copy engine's accesses before ordinary ones.
__device__ __forceinline__ void fence_proxy_async_all() { asm volatile("fence.proxy.async;\n" ::: "memory"); }

}  // namespace rat::cuda
