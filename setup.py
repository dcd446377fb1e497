# Builds rat_ext._C through torch.utils.cpp_extension; csrc/build.txt names the sources and the flags. Environment variables:
#
#   RAT_EXT_CUDA          0: for the CPU only.  1: fail when the CUDA kernels can't be built.  Unset: build them where possible.
#   TORCH_CUDA_ARCH_LIST  "8.0 9.0a", "8.0;9.0+PTX". Default: `architectures` in csrc/build.txt.
#   CUDA_HOME, CUDA_PATH  The CUDA toolkit. Then: nvcc on PATH, /usr/local/cuda, pip's nvidia-cuda-nvcc.
#   MAX_JOBS              Compilers to run at once. Default: one per core, and no more than memory allows.
#   CXX, CXXFLAGS         C++ compiler, and flags to add.
import glob
import json
import os
import re
import runpy
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

if sys.platform != "linux":
    sys.exit(f"rat_ext: builds on Linux only, this is {sys.platform}")
try:
    import pybind11
    import torch
except ImportError as error:
    sys.exit(f"rat_ext: {error}. Building needs torch >= 2.11 and pybind11; pip's build isolation brings both")
if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < (2, 11):
    sys.exit(f"rat_ext: building needs torch >= 2.11, the environment has {torch.__version__}")

MEMORY_PER_JOB = 2 << 30  # bytes that one compiler may need

os.chdir(Path(__file__).resolve().parent)
sys.path.insert(0, "csrc")
from toolkit import architectures, ask, choose_nvcc  # noqa: E402

build = {}  # what csrc/build.txt says
for line in Path("csrc/build.txt").read_text().splitlines():
    if line and not line.startswith("#"):
        build.setdefault(line.split(":")[0], []).extend(line.split()[1:])
kinds, include_dirs, library_dirs = ["cpu_sources", "torch_sources", "python_sources"], [pybind11.get_include()], []
cxx_flags = build["cxx_flags"] + ["-g0", "-fstrict-overflow"]  # the two undo what Python's own flags add
nvcc_flags, link_flags = build["nvcc_flags"], build["link_flags"]

nvcc, cuda_version, reason = choose_nvcc(torch)
note = f"for the CPU only: {reason}"
if nvcc:
    names, gencode = architectures(os.environ.get("TORCH_CUDA_ARCH_LIST") or " ".join(build["architectures"]))
    note = f"CPU + CUDA {cuda_version} kernels for {' '.join(names)}, {reason}"
    definitions = ["-DRAT_EXT_CUDA=1"] + ["-DRAT_EXT_SM90=1"] * any(name.startswith("9.0a") for name in names)
    cxx_flags += [*definitions, f'-DRAT_EXT_ARCHITECTURES="{" ".join(names)}"']
    nvcc_flags, link_flags = nvcc_flags + definitions + gencode, link_flags + build["cuda_link_flags"]
    kinds.append("cuda_sources")
    # The nvcc may be a wrapper script, which tells where its toolkit is; a torch without CUDA takes none.
    told = ask(nvcc, "--dryrun", "none.cu")
    include_dirs += dict.fromkeys(re.findall(r'"-I([^"]+)"', told))
    library_dirs += dict.fromkeys(re.findall(r'"-L([^"]+)"', told))
    top = re.search(r"^#\$ TOP=(.*)$", told, re.MULTILINE)
    os.environ["CUDA_HOME"] = os.path.realpath(top[1] if top else Path(nvcc).parent.parent)
    compiler = os.environ.get("PYTORCH_NVCC") or shlex.quote(nvcc)
    os.environ["PYTORCH_NVCC"] = shlex.join([sys.executable, os.path.abspath("tools/keep_log.py"), *shlex.split(compiler)])
    torch.version.cuda = torch.version.cuda or cuda_version

jobs, memory = os.environ.get("MAX_JOBS", ""), re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
if not re.fullmatch(r"(0*[1-9][0-9]*)?", jobs):
    sys.exit(f"rat_ext: MAX_JOBS: expected a whole number from 1 on, got {jobs!r}")
bound = min(len(os.sched_getaffinity(0)), int(memory[1]) * 1024 // MEMORY_PER_JOB)
os.environ["MAX_JOBS"] = jobs or str(max(1, bound))
os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")  # pip's ninja, when its environment is not active

from torch.utils import cpp_extension  # noqa: E402

cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"] if nvcc else None
version = runpy.run_path("rat_ext/_version.py")["__version__"]
cxx_flags += [f'-DRAT_EXT_VERSION="{version}"', f"-DRAT_EXT_BUILD_NOTE={json.dumps(note, ensure_ascii=False)}"]
extension = (cpp_extension.CUDAExtension if nvcc else cpp_extension.CppExtension)(
    "rat_ext._C",
    sorted(file for kind in kinds for pattern in build[kind] for file in glob.glob(pattern, recursive=True)),
    include_dirs=include_dirs,  # before torch's own, among which is another pybind11
    library_dirs=library_dirs,
    extra_compile_args={"cxx": cxx_flags + shlex.split(os.environ.get("CXXFLAGS", "")), "nvcc": nvcc_flags},
    extra_link_args=link_flags,
)
extension.libraries = []  # torch adds torch_python, c10 and a shared CUDA runtime: they would tie the build to one torch


class Build(cpp_extension.BuildExtension):
    def finalize_options(self):
        super().finalize_options()  # an editable install would build in a new folder each time, where ninja finds nothing made
        self.build_temp = f"build/rat_ext-{sysconfig.get_config_var('SOABI')}-{'cuda' if nvcc else 'cpu'}"

    def build_extensions(self):
        compiler, header = shlex.split(cpp_extension.get_cxx_compiler())[0], f"{sysconfig.get_path('include')}/Python.h"
        if not shutil.which(compiler):
            sys.exit(f"rat_ext: no C++ compiler {compiler!r} found; set CXX")
        if not os.path.exists(header):
            sys.exit(f"rat_ext: no {header}; install Python's headers (on Debian and Ubuntu: python3-dev)")
        print(f"rat_ext: building {note}", flush=True)
        super().build_extensions()


setup(ext_modules=[extension], cmdclass={"build_ext": Build})
