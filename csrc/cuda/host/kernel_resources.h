// What the CUDA runtime tells of each kernel on the GPU at hand. No torch, no CUDA header: module.cpp includes it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace rat::cuda {

struct KernelResources {
  std::string name;
  int registers = 0;           // per thread
  int64_t static_shared = 0;   // bytes per block
  int64_t dynamic_shared = 0;  // bytes per block: the limit now in force, raised by the first launch that needs more
  int64_t local = 0;           // bytes per thread: spills, and arrays that are not in registers
  int max_threads = 0;         // per block
  int binary_version = 0;      // 80, 90: the machine code that runs here
};

struct DeviceReport {
  std::string device;   // name of the current device
  std::string problem;  // why there are no kernels below, or empty
  std::vector<KernelResources> kernels;
};

int runtime_version();  // of the runtime that is linked in: 13000 is CUDA 13.0
int driver_version();   // the newest CUDA that the driver runs, 0 without a driver
DeviceReport device_report();

}  // namespace rat::cuda
