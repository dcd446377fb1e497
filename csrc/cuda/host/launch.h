// Host-side helpers of the launchers: error checks, grid shapes.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace rat::cuda {

[[noreturn]] void fail(cudaError_t error, const char* what);

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail(error, what);
}

// After every launch. cudaGetLastError clears a launch error (too many resources, no kernel image for this device).
inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  return device;
}

// A number of each device, looked up once: the runtime takes a fraction of a microsecond, and a call wants several.
class KnownByDevice {
 public:
  template <class LookUp>
  int of_current(const LookUp& look_up) {
    const int device = current_device();
    if (device >= kDevices) return look_up(device);
    if (const int64_t found = known_[device].load(std::memory_order_relaxed)) return static_cast<int>(found - 1);
    const int value = look_up(device);
    known_[device].store(int64_t{value} + 1, std::memory_order_relaxed);
    return value;
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<int64_t> known_[kDevices] = {};  // value + 1
};

// An attribute of the current device.
template <cudaDeviceAttr kAttribute>
int device_attribute() {
  static KnownByDevice known;
  return known.of_current([](int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, kAttribute, device), "device attribute");
    return value;
  });
}

// The major compute capability that the code which runs here was compiled for, __CUDA_ARCH__ / 100: below the device's where the driver
// compiles PTX of an older chip for it. What a kernel leaves out for older chips, the host has to ask of this number. `kernel` is any
// of the library, whose files are all built for the same architectures.
int code_major(const void* kernel);

inline bool is_hopper() {
  return device_attribute<cudaDevAttrComputeCapabilityMajor>() == 9 &&
         device_attribute<cudaDevAttrComputeCapabilityMinor>() == 0;
}

// Null where kernels of RAT_HOPPER_CODE (ptx/target.cuh) run, else why not.
inline const char* no_hopper() {
#ifdef RAT_EXT_SM90
  return is_hopper() ? nullptr : "the GPU is not of compute capability 9.0";
#else
  return "this build has no code for sm_90a";
#endif
}

// Raises the limit of dynamic shared memory where a kernel needs more than the 48 KB that need no asking. The limit holds
// until the process ends: the runtime, which takes microseconds, is told once for each kernel and device.
void raise_shared_memory(const void* kernel, int bytes, const char* name);

template <class Kernel>
void allow_shared_memory(Kernel* kernel, int bytes, const char* name) {
  if (bytes > 48 * 1024) raise_shared_memory(reinterpret_cast<const void*>(kernel), bytes, name);
}

// Of a call in float64, which `op` has no kernels for.
[[noreturn]] void fail_dtype(const char* op);

// Grids are one-dimensional in x (limit 2^31 - 1); y and z stop at 65,535 and are not used for data-dependent sizes.
[[noreturn]] void fail_grid(int64_t blocks, const char* kernel);

inline unsigned grid_x(int64_t blocks, const char* kernel) {
  if (blocks > INT32_MAX) fail_grid(blocks, kernel);
  return static_cast<unsigned>(blocks);
}

// Launches a kernel that may start before the kernels before it are through: it says wait_for_earlier_kernels() (ptx/depend.cuh)
// before it touches what they write or read, in every block and whatever the block does then, so that its own end is theirs too.
// plan_rows and few let the next kernel start behind their own wait (decoding before it): who knows that one of them, or a kernel that
// lets nothing start, comes before may read what came before that.
template <class... Parameters, class... Arguments>
void launch_overlapping(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, int bytes, cudaStream_t stream,
                        const char* name, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid_x(blocks, name));
  config.blockDim = threads;
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = code_major(reinterpret_cast<const void*>(kernel)) >= 9 ? 1 : 0;  // else it does not wait
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
  check_launch(name);
}

}  // namespace rat::cuda
