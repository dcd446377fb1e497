// The bulk tensor copy engine (TMA): tensor maps made on the host, copies issued by one thread. PTX ISA 9.7.9.27.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "launch.h"

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

// A map over (outer, rows, columns) 16-bit elements, contiguous, cut into boxes of (1, box_rows, 64): 128-byte rows in
// the 128-byte swizzle, where 16-byte piece p of row r lies at piece p ^ (r % 8). What lies outside is read as zeros.
inline CUtensorMap swizzled_rows_map(const void* base, CUtensorMapDataType type, int64_t columns, int64_t rows,
                                     int64_t outer, int box_rows) {
  static const decltype(&cuTensorMapEncodeTiled) encode = tensor_map_encoder();
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(outer)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(columns * 2), static_cast<cuuint64_t>(rows * columns * 2)};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, type, 3, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("rat_ext: cuTensorMapEncodeTiled failed with code " + std::to_string(result));
  }
  return map;
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

// Starts fetching the 128-byte line of an address into L2; nothing waits for it. An ordinary prefetch: a bulk one for each
// row would queue before the copies of K and V.
__device__ __forceinline__ void prefetch_l2(const void* source) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(__cvta_generic_to_global(source)));
}

// Orders this thread's earlier ordinary accesses to shared memory before later ones by the copy engine and the tensor
// cores, which go through another proxy. Each writing thread needs it before the barrier.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

}  // namespace rat::cuda
