// Asks the CUDA runtime for the resources of every kernel that a family lists. Launches nothing.
#include "kernel_resources.h"

#include <atomic>

#include "../../capability.h"
#include "../phases.h"
#include "launch.h"

namespace rat::cuda {

int runtime_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return version;
}

void check_device(int32_t device) {
  static std::atomic<uint64_t> known{0};  // a bit for each of the first 64 devices: it has been found fit
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (known.load(std::memory_order_relaxed) & bit) return;
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
  require_capability(major, minor, "cuda:" + std::to_string(device));
  known.fetch_or(bit, std::memory_order_relaxed);
}

DeviceReport device_report() {
  DeviceReport report;
  // A failure here is an answer, not an error of the next launch: cudaGetLastError clears it.
  auto fails = [&](cudaError_t error, const char* what) {
    if (error == cudaSuccess) return false;
    cudaGetLastError();
    report.problem = std::string(what) + ": " + cudaGetErrorString(error);
    return true;
  };
  if (driver_version() == 0) {
    report.problem = "no CUDA driver on this machine";
    return report;
  }
  int count = 0, device = 0;
  cudaDeviceProp properties;
  if (fails(cudaGetDeviceCount(&count), "counting GPUs") || fails(cudaGetDevice(&device), "current GPU") ||
      fails(cudaGetDeviceProperties(&properties, device), "GPU properties")) {
    return report;
  }
  report.device = std::string(properties.name) + ", compute capability " + std::to_string(properties.major) + "." +
                  std::to_string(properties.minor);
  std::vector<KernelList> lists = {chunk_recurrence_kernels(),
                                   chunk_attention_fwd_sm80_kernels(),
                                   chunk_attention_bwd_sm80_kernels(),
                                   chunk_attention_f32_kernels(),
                                   chunk_attention_rotate_reduce_kernels(),
                                   decode_kernels(),
                                   rat_attention_cached_kernels(),
                                   align_rows_kernels()};
#ifdef RAT_EXT_SM90
  if (properties.major == 9) {  // elsewhere they are empty
    lists.insert(lists.begin(), {chunk_attention_fwd_sm90_kernels(), chunk_attention_bwd_sm90_kernels(),
                                 chunk_attention_bwd_wide_sm90_kernels()});
  }
#endif
  for (const KernelList& list : lists) {
    for (int i = 0; i < list.count; ++i) {
      cudaFuncAttributes attributes;
      if (fails(cudaFuncGetAttributes(&attributes, list.entries[i].function), list.entries[i].name)) continue;
      KernelResources kernel;
      kernel.name = list.entries[i].name;
      kernel.registers = attributes.numRegs;
      kernel.static_shared = static_cast<int64_t>(attributes.sharedSizeBytes);
      kernel.dynamic_shared = attributes.maxDynamicSharedSizeBytes;
      kernel.local = static_cast<int64_t>(attributes.localSizeBytes);
      kernel.max_threads = attributes.maxThreadsPerBlock;
      kernel.binary_version = attributes.binaryVersion;
      report.kernels.push_back(kernel);
    }
  }
  return report;
}

}  // namespace rat::cuda
