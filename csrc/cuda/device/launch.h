// Host-side helpers of the launchers: error checks, grid shapes, carving a workspace.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace rat::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("rat_ext: ") + what + ": " + cudaGetErrorString(error));
  }
}

// After every launch. cudaGetLastError clears a launch error (too many resources, no kernel image for this device).
inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Grids are one-dimensional in x (limit 2^31 - 1); y and z stop at 65,535 and are not used for data-dependent sizes.
inline unsigned grid_x(int64_t blocks, const char* kernel) {
  if (blocks > INT32_MAX) {
    throw std::runtime_error(std::string("rat_ext: ") + kernel + " needs " + std::to_string(blocks) +
                             " blocks, more than one grid can hold (2147483647)");
  }
  return static_cast<unsigned>(blocks);
}

// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "current device");
  check(cudaDeviceGetAttribute(&value, attribute, device), "device attribute");
  return value;
}

// Carves 256-byte aligned pieces; with base == nullptr it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return reinterpret_cast<T*>(piece);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace rat::cuda
