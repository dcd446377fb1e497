#include "launch.h"

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace rat::cuda {

void fail(cudaError_t error, const char* what) {
  throw std::runtime_error(std::string("rat_ext: ") + what + ": " + cudaGetErrorString(error));
}

void fail_grid(int64_t blocks, const char* kernel) {
  throw std::runtime_error(std::string("rat_ext: ") + kernel + " needs " + std::to_string(blocks) +
                           " blocks, more than one grid can hold (2147483647)");
}

void fail_dtype(const char* op) {
  throw std::runtime_error(std::string("rat_ext.") + op +
                           ": dtype: expected float32, bfloat16 or float16 on CUDA, got float64");
}

int code_major(const void* kernel) {
  static KnownByDevice known;
  return known.of_current([kernel](int) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), "architecture of the code");
    return attributes.ptxVersion / 10;
  });
}

void raise_shared_memory(const void* kernel, int bytes, const char* name) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> told;
  const std::lock_guard<std::mutex> lock(mutex);
  int& limit = told[{kernel, current_device()}];
  if (bytes <= limit) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  limit = bytes;
}

}  // namespace rat::cuda
