// The Python module rat_ext._C. Importing it loads this library, whereby ops/library.cpp registers the ops; the module
// itself only tells what was compiled. pybind11 is pip's own: torch's copy is not for code of the stable ABI, and no
// torch header is included here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "capability.h"
#ifdef RAT_EXT_CUDA
#include "cuda/explain.h"
#include "cuda/host/kernel_resources.h"
#endif

namespace rat {
extern const uint64_t torch_target_version;  // ops/: TORCH_TARGET_VERSION, from build.txt
namespace cpu {
const char* isa();  // the instruction set that the CPU kernels chose on this machine
}
}  // namespace rat

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// 0x020b000000000000 -> "2.11"
std::string torch_target() {
  const uint64_t version = rat::torch_target_version;
  return std::to_string(version >> 56) + "." + std::to_string((version >> 48) & 0xff);
}

#ifdef RAT_EXT_CUDA
// 13020 -> "13.2"
std::string cuda_version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::vector<std::string> architectures() {
  std::istringstream words(RAT_EXT_ARCHITECTURES);
  return {std::istream_iterator<std::string>(words), std::istream_iterator<std::string>()};
}

void describe_device(py::dict& info) {
  const rat::cuda::DeviceReport report = rat::cuda::device_report();
  py::list kernels;
  for (const rat::cuda::KernelResources& k : report.kernels) {
    py::dict kernel;
    kernel["name"] = k.name;
    kernel["registers"] = k.registers;
    kernel["static_shared"] = k.static_shared;
    kernel["dynamic_shared"] = k.dynamic_shared;
    kernel["local"] = k.local;
    kernel["max_threads"] = k.max_threads;
    kernel["binary_version"] = k.binary_version;
    kernels.append(kernel);
  }
  if (!report.device.empty()) info["device"] = report.device;
  if (!report.problem.empty()) info["kernels_problem"] = report.problem;
  if (!report.kernels.empty()) info["kernels"] = kernels;
}
#endif

void check_forced_kernels() {
#ifdef RAT_EXT_CUDA
  rat::cuda::check_forced();
#else
  const char* variable = std::getenv("RAT_EXT_KERNELS");
  const std::string forced = variable ? variable : "auto";
  if (!forced.empty() && forced != "auto") {
    throw std::invalid_argument(
        "rat_ext: RAT_EXT_KERNELS: expected auto or nothing (this build is for the CPU, whose one family "
        "RAT_EXT_CPU_ISA steers), got '" +
        forced + "'");
  }
#endif
}

py::dict build_info(bool kernels, bool driver) {
  check_forced_kernels();  // Python asks when it imports the package
  py::dict info;
  info["version"] = RAT_EXT_VERSION;
  info["build"] = RAT_EXT_BUILD_NOTE;
  info["torch_target"] = torch_target();
  info["compiler"] = compiler();
  info["cpu_isa"] = rat::cpu::isa();
  py::list head_dims;
  for (int d = 8; d <= 256; d += 8) head_dims.append(d);
  info["head_dims"] = head_dims;
  info["cpu_dtypes"] = std::vector<std::string>{"bfloat16", "float16", "float32", "float64"};
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::list();
  info["cuda_dtypes"] = py::list();
  info["cuda_driver"] = py::none();
  info["device"] = py::none();
  info["kernels"] = py::none();
  info["kernels_problem"] = py::none();
#ifdef RAT_EXT_CUDA
  info["cuda"] = cuda_version(rat::cuda::runtime_version());
  info["cuda_architectures"] = architectures();
  info["cuda_dtypes"] = std::vector<std::string>{"bfloat16", "float16", "float32"};
  if (driver) {
    if (const int version = rat::cuda::driver_version()) info["cuda_driver"] = cuda_version(version);
  }
  if (kernels) {
    describe_device(info);
  } else {
    info["kernels_problem"] = "not asked for";
  }
#else
  static_cast<void>(kernels);
  static_cast<void>(driver);
  info["kernels_problem"] = "built for the CPU only";
#endif
  return info;
}

}  // namespace

// It keeps no state that a lock would have to guard: what the functions ask is found once, by static initialisation.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "The compiled part of rat_ext. Its ops are torch.ops.rat_ext.*";
  m.def("build_info", &build_info, py::arg("kernels") = true, py::arg("driver") = true,
        "What was compiled, as a dict. kernels=True also asks the GPU, if there is one, for each kernel's registers, "
        "shared memory and local (spill) bytes, which creates a CUDA context. driver=True asks the driver for its "
        "version, after which a forked process cannot use CUDA.");
  m.def("require_capability", &rat::require_capability, py::arg("major"), py::arg("minor"), py::arg("name"),
        "Raises RuntimeError unless the kernels run on GPUs of this compute capability.");
}
