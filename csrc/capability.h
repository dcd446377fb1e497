// Which GPUs the CUDA kernels run on. No torch, no CUDA: tests ask it about GPUs that are not there.
#pragma once

#include <stdexcept>
#include <string>

namespace rat {

inline void require_capability(int major, int minor, const std::string& name) {
  if (major >= 8) return;
  throw std::runtime_error("rat_ext: device: expected a GPU of compute capability 8.0 or newer, got " + name +
                           " of compute capability " + std::to_string(major) + "." + std::to_string(minor));
}

}  // namespace rat
