"""Builds rat_ext._C, one extension file, from four kinds of source. Each kind sees only the headers that it needs:

    csrc/ops/*.cpp    torch's stable ABI (one build runs on every torch from 2.11 on; libtorch_python is not linked)
    csrc/module.cpp   pybind11 and Python
    csrc/cpu/*.cpp    nothing but the C++ library
    csrc/cuda/**.cu   nothing but the CUDA toolkit, whose runtime is linked statically

Environment variables:

    RAT_EXT_CUDA          0: build for the CPU only.  1: fail when the CUDA kernels can't be built.
                          Unset: build them when there are an nvcc and a torch with CUDA.
    TORCH_CUDA_ARCH_LIST  "8.0 9.0a", "8.0;9.0+PTX". Default: see DEFAULT_ARCHITECTURES.
    CUDA_HOME, CUDA_PATH  The CUDA toolkit. Then: nvcc on PATH, /usr/local/cuda, pip's nvidia-cuda-nvcc.
    MAX_JOBS              Compilers to run at once. Default: one a core, and no more than memory allows.
    CXX, CXXFLAGS         C++ compiler, and flags to add.
"""

import concurrent.futures
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import pybind11
    import torch
except ImportError as error:
    sys.exit(f"rat_ext: {error}. Building needs torch >= 2.11 and pybind11; pip's build isolation brings both")
if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < (2, 11):
    sys.exit(f"rat_ext: building needs torch >= 2.11, the environment has {torch.__version__}")

DEFAULT_ARCHITECTURES = "8.0+PTX 9.0a"  # machine code for 8.x and for Hopper; newer chips compile the PTX when loading
MEMORY_PER_JOB = 2 << 30  # bytes that one compiler may need

CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
CXX_FLAGS += ["-Wall", "-Wno-unknown-pragmas", "-Wno-restrict"]  # -Wrestrict: GCC 12 is wrong about std::string
NVCC_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "--expt-relaxed-constexpr"]
NVCC_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "-Xptxas=-v,--warn-on-spills"]
# Files of one x86 instruction set, chosen at run time. Everything else runs on every x86-64.
AVX2_FLAGS = ["-mavx2", "-mfma"]
ISA_FLAGS = {"_avx2": AVX2_FLAGS, "_avx512": [*AVX2_FLAGS, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]}

ROOT = Path(__file__).resolve().parent


class Cuda:
    """An nvcc and what it says of its toolkit. Asking it finds the true folders also behind a wrapper script."""

    def __init__(self, nvcc):
        self.nvcc = str(nvcc)
        told = subprocess.run([self.nvcc, "--dryrun", "none.cu"], capture_output=True, text=True)
        told = dict(re.findall(r"^#\$ (\w+)=(.*)$", told.stdout + told.stderr, re.MULTILINE))
        self.includes = re.findall(r'"-I([^"]+)"', told.get("INCLUDES", ""))
        self.library_folders = re.findall(r'"-L([^"]+)"', told.get("LIBRARIES", ""))
        if "TOP" in told:
            self.library_folders += [f"{told['TOP']}/lib64", f"{told['TOP']}/lib"]
        version = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+\.\d+)", version)
        self.version = release.group(1) if release else None

    @staticmethod
    def find():
        """The first nvcc that runs, or None, and a list of what was looked at."""
        looked = []
        for variable in ("CUDA_HOME", "CUDA_PATH"):
            folder = os.environ.get(variable)
            looked.append((f"{variable}={folder}" if folder else variable, folder and Path(folder) / "bin" / "nvcc"))
        looked.append(("PATH", shutil.which("nvcc")))
        looked.append(("/usr/local/cuda", "/usr/local/cuda/bin/nvcc"))
        spec = importlib.util.find_spec("nvidia")
        found = [nvcc for f in spec.submodule_search_locations for nvcc in Path(f).glob("cu*/bin/nvcc")] if spec else []
        looked.append(("pip's nvidia-cuda-nvcc", found[0] if found else None))
        for _, nvcc in looked:
            if nvcc and os.access(nvcc, os.X_OK):
                cuda = Cuda(nvcc)
                if cuda.version:
                    return cuda, looked
        return None, looked


def choose_cuda():
    """(Cuda or None, the reason in words)."""
    wish = os.environ.get("RAT_EXT_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"rat_ext: RAT_EXT_CUDA must be 0 or 1, not {wish!r}")
    if wish == "0":
        return None, "RAT_EXT_CUDA=0"
    if wish == "" and not torch.version.cuda:
        return (
            None,
            f"torch {torch.__version__} is a build without CUDA (RAT_EXT_CUDA=1 builds them all the same)",
        )
    cuda, looked = Cuda.find()
    places = ", ".join(name for name, _ in looked)
    if cuda is None and wish == "1":
        sys.exit(f"rat_ext: RAT_EXT_CUDA=1, but no nvcc was found (looked at {places})")
    if cuda is None:
        return None, f"no nvcc found (looked at {places})"
    if int(cuda.version.split(".")[0]) < 12:
        too_old = f"{cuda.nvcc} is CUDA {cuda.version}, 12.0 or newer is needed"
        if wish == "1":
            sys.exit(f"rat_ext: RAT_EXT_CUDA=1, but {too_old}")
        return None, too_old
    return cuda, f"{'RAT_EXT_CUDA=1, ' if wish else ''}with {cuda.nvcc}"


def architectures():
    """[("8.0", "80", with PTX), ...] from TORCH_CUDA_ARCH_LIST or the default."""
    text = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or DEFAULT_ARCHITECTURES
    found = []
    for item in re.split(r"[\s;,]+", text):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", item)
        if not match:
            sys.exit(f"rat_ext: TORCH_CUDA_ARCH_LIST={text!r}: {item!r} is not understood; write, say, '8.0 9.0a+PTX'")
        if int(match[1]) >= 8:
            found.append((f"{match[1]}.{match[2]}", match[1] + match[2], bool(match[3])))
    if not found:
        sys.exit(f"rat_ext: TORCH_CUDA_ARCH_LIST={text!r} names no architecture from 8.0 on, the oldest supported")
    return found


def job_count():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limits = [cores]
    if Path("/proc/meminfo").exists():
        free = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
        limits.append(int(free[1]) * 1024 // MEMORY_PER_JOB)
    return int(os.environ.get("MAX_JOBS") or max(1, min(limits)))


def is_current(output, command):
    """Whether `output` was made by this very command from files that have not changed since."""
    record, dependencies = output.with_suffix(".cmd"), output.with_suffix(".d")
    if not (output.exists() and record.exists() and dependencies.exists()) or record.read_text() != shlex.join(command):
        return False
    files = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return all(os.path.exists(f) and os.path.getmtime(f) < output.stat().st_mtime for f in files)


def compile_one(command, output):
    if is_current(output, command):
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True)
    told = done.stdout + done.stderr
    output.with_suffix(".log").write_text(told)  # registers and spills of each kernel: tools/resource_report.py
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\n{told}\nrat_ext: compiling {command[-1]} failed")
    sys.stderr.write(re.sub(r"^(ptxas info|\s+\d+ bytes stack frame).*\n", "", told, flags=re.MULTILINE))
    output.with_suffix(".cmd").write_text(shlex.join(command))


class BuildExtension(build_ext):
    def build_extension(self, ext):
        cuda, reason = choose_cuda()
        if cuda:
            targets = architectures()
            names = " ".join(name + ("+PTX" if ptx else "") for name, _, ptx in targets)
            hopper = any(number in ("90", "90a") for _, number, _ in targets)
            note = f"CPU + CUDA {cuda.version} kernels for {names}, {reason}"
        else:
            note = f"for the CPU only: {reason}"
        print(f"rat_ext: building {note}", flush=True)

        cxx = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("c++") or ""]
        if not shutil.which(cxx[0]):
            sys.exit(f"rat_ext: no C++ compiler found ({cxx[0] or 'looked for g++ and c++ on PATH'}); set CXX")
        python_include = Path(sysconfig.get_path("include"))
        if not (python_include / "Python.h").exists():
            sys.exit(f"rat_ext: no Python.h in {python_include}; install Python's headers (on Debian and Ubuntu: python3-dev)")
        cxx_flags = CXX_FLAGS + shlex.split(os.environ.get("CXXFLAGS", ""))
        folder = Path("build") / f"rat_ext-{sysconfig.get_config_var('SOABI')}-{'cuda' if cuda else 'cpu'}"
        torch_folder = Path(torch.__file__).parent
        definitions = ["-DRAT_EXT_CUDA=1", *(["-DRAT_EXT_SM90=1"] if hopper else [])] if cuda else []
        cuda_headers = [f"-isystem{f}" for f in cuda.includes] if cuda else []
        described = [f'-DRAT_EXT_VERSION="{self.distribution.get_version()}"', f'-DRAT_EXT_BUILD_NOTE="{note}"']
        described += [f'-DRAT_EXT_ARCHITECTURES="{names}"'] if cuda else []

        def host(source, *flags):
            return [*cxx, *cxx_flags, *definitions, *flags, "-MMD"], source

        jobs = []
        if cuda:
            gencode = [f"-gencode=arch=compute_{n},code=sm_{n}" for _, n, _ in targets]
            gencode += [f"-gencode=arch=compute_{n},code=compute_{n}" for _, n, ptx in targets if ptx]
            hopper_only = ["-gencode=arch=compute_90a,code=sm_90a"]  # for files that use Hopper's own instructions
            for source in sorted(ROOT.glob("csrc/cuda/**/*.cu"), key=lambda f: -f.stat().st_size):
                if "sm90" not in source.name:
                    jobs.append(([cuda.nvcc, *NVCC_FLAGS, *gencode, *definitions, "-MMD"], source))
                elif hopper:
                    jobs.append(([cuda.nvcc, *NVCC_FLAGS, *hopper_only, *definitions, "-MMD"], source))
        for source in sorted(ROOT.glob("csrc/ops/*.cpp")):
            jobs.append(host(source, *cuda_headers, f"-isystem{torch_folder / 'include'}"))
        python_headers = [f"-isystem{pybind11.get_include()}", f"-isystem{python_include}"]
        jobs.append(host(ROOT / "csrc/module.cpp", *described, *python_headers))
        for source in sorted(ROOT.glob("csrc/cpu/*.cpp")):
            isa = "_" + source.stem.rpartition("_")[2]
            jobs.append(host(source, *(ISA_FLAGS.get(isa, []) if platform.machine() == "x86_64" else [])))

        objects = []
        with concurrent.futures.ThreadPoolExecutor(job_count()) as pool:
            running = []
            for command, source in jobs:
                source = source.relative_to(ROOT)
                output = folder / source.parent / (source.name + ".o")
                command = [*command, "-MF", str(output.with_suffix(".d")), "-o", str(output), "-c", str(source)]
                running.append(pool.submit(compile_one, command, output))
                objects.append(str(output))
            try:
                for job in running:
                    job.result()
            finally:
                pool.shutdown(cancel_futures=True)  # after a failure: start no other

        # libtorch.so brings libtorch_cuda.so where there is one. `import torch` has loaded them: no path is recorded.
        link = [*cxx, "-shared", *objects, f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch"]
        if cuda:  # hidden, or the dynamic loader would bind the calls to the libcudart.so that torch has loaded
            link += [f"-L{f}" for f in cuda.library_folders] + ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        link += ["-Wl,--exclude-libs,ALL", "-o", self.get_ext_fullpath(ext.name)]
        Path(link[-1]).parent.mkdir(parents=True, exist_ok=True)
        if subprocess.run(link).returncode:
            sys.exit(f"{shlex.join(link)}\nrat_ext: linking failed")


os.chdir(ROOT)
setup(ext_modules=[Extension("rat_ext._C", sources=[])], cmdclass={"build_ext": BuildExtension})
