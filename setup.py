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
import subprocess
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

OLDEST_CUDA = (13, 0)  # what whole builds were made with; nvcc 13.5 compiled some of the files
MEMORY_PER_JOB = 2 << 30  # bytes that one compiler may need


def ask(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def choose_nvcc():
    """nvcc and its version, or None twice for a build without CUDA kernels; the reason in words."""
    wish = os.environ.get("RAT_EXT_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"rat_ext: RAT_EXT_CUDA: expected 0 or 1, got {wish!r}")
    if wish == "0":
        return None, None, "RAT_EXT_CUDA=0"
    if wish == "" and not torch.version.cuda:
        return None, None, f"torch {torch.__version__} is a build without CUDA (RAT_EXT_CUDA=1 builds them all the same)"
    problem = "no nvcc found (looked at CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda and pip's nvidia-cuda-nvcc)"
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [glob.escape(folder) for folder in [*sys.path, sysconfig.get_path("purelib")]]
    from_pip = [nvcc for folder in folders for nvcc in glob.glob(f"{folder}/nvidia/cu*/bin/nvcc")]
    for nvcc in [*(f"{home}/bin/nvcc" for home in homes), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc", *from_pip]:
        runs = nvcc and os.access(nvcc, os.X_OK)
        if release := re.search(r"release (\d+)\.(\d+)", ask(nvcc, "--version") if runs else ""):
            major, minor = (int(n) for n in release.groups())
            if (major, minor) < OLDEST_CUDA:
                problem = "{} is CUDA {}.{}, the oldest that was tried is {}.{}".format(nvcc, major, minor, *OLDEST_CUDA)
            elif torch.version.cuda and int(torch.version.cuda.split(".")[0]) != major:
                problem = f"{nvcc} is CUDA {major}.{minor}, torch {torch.__version__} is made with CUDA {torch.version.cuda}"
            else:
                return nvcc, f"{major}.{minor}", f"{'RAT_EXT_CUDA=1, ' if wish else ''}with {nvcc}"
            break
    return (None, None, problem) if not wish else sys.exit(f"rat_ext: RAT_EXT_CUDA=1, but {problem}")


def architectures(text):
    """Of "8.0 9.0+PTX" the names and the -gencode flags. Hopper's 9.0 is always 9.0a, for which it has kernels of its own."""
    names, flags = [], []
    for item in re.findall(r"[^\s;,]+", text):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if not match:
            sys.exit(f"rat_ext: TORCH_CUDA_ARCH_LIST={text!r}: {item!r} is not understood; write, say, '8.0 9.0a+PTX'")
        major, minor, feature, ptx = match.groups("")
        if int(major) >= 8:  # older ones, which lists for all of torch name, have no kernels
            number, native = major + minor, "a" if major == "9" else feature
            names.append(f"{major}.{minor}{native}{ptx}")
            flags.append(f"-gencode=arch=compute_{number}{native},code=sm_{number}{native}")
            flags += [f"-gencode=arch=compute_{number}{feature},code=compute_{number}{feature}"] if ptx else []
    return (names, flags) if names else sys.exit(f"rat_ext: TORCH_CUDA_ARCH_LIST={text!r} names none from 8.0, the oldest, on")


os.chdir(Path(__file__).resolve().parent)
build = {}  # what csrc/build.txt says
for line in Path("csrc/build.txt").read_text().splitlines():
    if line and not line.startswith("#"):
        build.setdefault(line.split(":")[0], []).extend(line.split()[1:])
kinds, include_dirs, library_dirs = ["cpu_sources", "torch_sources", "python_sources"], [pybind11.get_include()], []
cxx_flags = build["cxx_flags"] + ["-g0", "-fstrict-overflow"]  # the two undo what Python's own flags add
nvcc_flags, link_flags = build["nvcc_flags"], build["link_flags"]

nvcc, cuda_version, reason = choose_nvcc()
note = f"for the CPU only: {reason}"
if nvcc:
    names, gencode = architectures(os.environ.get("TORCH_CUDA_ARCH_LIST") or " ".join(build["architectures"]))
    note = f"CPU + CUDA {cuda_version} kernels for {' '.join(names)}, {reason}"
    definitions = ["-DRAT_EXT_CUDA=1"] + ["-DRAT_EXT_SM90=1"] * any(name.startswith("9.0a") for name in names)
    cxx_flags += [*definitions, f'-DRAT_EXT_ARCHITECTURES="{" ".join(names)}"']
    nvcc_flags, link_flags = nvcc_flags + definitions + gencode, link_flags + build["cuda_link_flags"]
    kinds.append("cuda_sources")
    # torch takes the toolkit to be around the nvcc on PATH, which may be a wrapper script; a torch without CUDA takes none.
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
