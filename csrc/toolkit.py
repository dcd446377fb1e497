# Which nvcc compiles the kernels, and for which architectures: what setup.py needs and torch's helper lacks, for that takes the
# toolkit to be around the nvcc on PATH.
import glob
import os
import re
import shutil
import subprocess
import sys
import sysconfig

OLDEST_CUDA = (13, 0)  # what whole builds were made with; nvcc 13.5 compiled some of the files


def ask(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def choose_nvcc(torch):
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
    """Of "8.0 9.0+PTX" the names and the -gencode flags. Hopper's 9.0 is always 9.0a, for which it has kernels of its own.

    The machine code of 12.0 is made from 10.0's PTX where that is in the list too: no kernel asks for what is 12.0's own, and
    half of the work comes before PTX.
    """
    names, flags = [], []
    for item in re.findall(r"[^\s;,]+", text):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if not match:
            sys.exit(f"rat_ext: TORCH_CUDA_ARCH_LIST={text!r}: {item!r} is not understood; write, say, '8.0 9.0a+PTX'")
        major, minor, feature, ptx = match.groups("")
        if int(major) >= 8:  # older ones, which lists for all of torch name, have no kernels
            number, native = major + minor, "a" if major == "9" else feature
            names.append(f"{major}.{minor}{native}{ptx}")
            shared = number + native == "120" and re.search(r"(^|[\s;,])10\.0(?![af])", text)
            virtual = "100" if shared else number + native
            flags.append(f"-gencode=arch=compute_{virtual},code=sm_{number}{native}")
            flags += [f"-gencode=arch=compute_{number}{feature},code=compute_{number}{feature}"] if ptx else []
    return (names, flags) if names else sys.exit(f"rat_ext: TORCH_CUDA_ARCH_LIST={text!r} names none from 8.0, the oldest, on")
