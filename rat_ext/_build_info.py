"""Loads the compiled part of the package, and tells what it is.

Importing this module imports ``rat_ext._C``, whereby the ops appear in ``torch.ops.rat_ext``. Whatever can go wrong
there ends in an ``ImportError`` that says what to do.
"""

from __future__ import annotations

import importlib
import re
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType

import torch

from rat_ext._version import __version__

MINIMUM_TORCH = (2, 11)


class BuildInfo(dict):
    """What was compiled: a dict that prints as a table.

    Keys: ``version``, ``build`` (what setup.py decided, and why), ``torch`` and ``torch_target`` (the version at hand
    and the oldest that this build runs on), ``compiler``, ``cpu_isa``, ``cpu_dtypes``, ``head_dims``; ``cuda`` (version
    of the CUDA runtime that is linked in, None without), ``cuda_architectures``, ``cuda_dtypes``, ``cuda_driver`` (the
    newest CUDA that the driver runs), ``device``, ``kernels`` (a list of dicts: ``name``, ``registers``,
    ``static_shared``, ``dynamic_shared``, ``local``, ``max_threads``, ``binary_version``; None without a GPU) and
    ``kernels_problem`` (why ``kernels`` is None).
    """

    def __str__(self) -> str:
        rows = [
            ("rat_ext", self["version"]),
            ("built", self["build"]),
            ("torch", f"{self['torch']} (any from {self['torch_target']} on)"),
            ("compiler", self["compiler"]),
            ("head dim", f"multiples of {self['head_dims'][0]} up to {self['head_dims'][-1]}"),
            ("CPU", f"{self['cpu_isa']}; {', '.join(self['cpu_dtypes'])}"),
        ]
        if self["cuda"]:
            runs = f"driver for CUDA {self['cuda_driver']}" if self["cuda_driver"] else "no driver here"
            rows.append(("CUDA", f"{self['cuda']}, {runs}; {', '.join(self['cuda_dtypes'])}"))
            rows.append(("made for", ", ".join(self["cuda_architectures"])))
        if self["device"]:
            rows.append(("GPU", self["device"]))
        if self["kernels"] is None:
            rows.append(("kernels", self["kernels_problem"]))
        lines = [f"{name:<9} {value}" for name, value in rows]
        if self["kernels"]:
            lines += ["", *self._kernel_table()]
        return "\n".join(lines)

    def _kernel_table(self) -> list[str]:
        width = max(len(k["name"]) for k in self["kernels"])
        lines = [f"{'kernel':<{width}}  registers  static smem  dynamic smem  spill/local  threads  code"]
        for k in sorted(self["kernels"], key=lambda k: k["name"]):
            lines.append(
                f"{k['name']:<{width}}  {k['registers']:>9}  {k['static_shared']:>11}  {k['dynamic_shared']:>12}"
                f"  {k['local']:>11}  {k['max_threads']:>7}  sm_{k['binary_version']}"
            )
        return lines

    __repr__ = __str__


def _load() -> ModuleType:
    found = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if found < MINIMUM_TORCH:
        needed = ".".join(map(str, MINIMUM_TORCH))
        raise ImportError(f"rat_ext needs torch {needed} or newer, found {torch.__version__}")
    folder = Path(__file__).resolve().parent
    try:
        # After torch: the extension names libtorch_cpu.so and libtorch.so, and finds those that torch has loaded.
        return importlib.import_module("rat_ext._C")
    except ImportError as error:
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        if (folder / f"_C{suffix}").exists():
            hint = (
                f"The compiled part, _C{suffix}, is there but does not load beside torch {torch.__version__}. "
                "Build it again: pip install --force-reinstall --no-deps <where rat_ext came from>"
            )
        elif others := sorted(f.name for f in folder.glob("_C.*so")):
            hint = f"The compiled part was built for another Python ({', '.join(others)}); this one needs _C{suffix}."
        elif (folder.parent / "setup.py").exists():
            hint = (
                f"{folder} is the source folder, and nothing is compiled in it. Run 'pip install -e .' in "
                f"{folder.parent}, or, if rat_ext is installed already, start Python in another folder."
            )
        else:
            hint = f"The compiled part, _C{suffix}, is missing from {folder}. Install rat_ext again."
        raise ImportError(f"rat_ext: {error}. {hint}") from error


extension = _load()


def build_info(kernels: bool = True) -> BuildInfo:
    """What was compiled and on what it runs, as a :class:`BuildInfo`: a dict that prints as a table.

    Args:
        kernels: also ask the GPU, where there is one, for every kernel's registers, shared memory and spills. This
            creates a CUDA context on the current device. It never fails: ``info["kernels_problem"]`` says why there
            is no answer.
    """
    info = BuildInfo(extension.build_info(kernels=kernels))
    info["torch"] = torch.__version__
    return info


def _warn_of_mismatch() -> None:
    info = extension.build_info(kernels=False, driver=False)  # an import leaves the driver alone: the process may fork
    if info["version"] != __version__:
        warnings.warn(
            f"rat_ext {__version__} runs with a compiled part of version {info['version']}: build it again",
            stacklevel=2,
        )
    if info["cuda"] and torch.version.cuda is None:
        warnings.warn(
            f"rat_ext was built with CUDA {info['cuda']}, but torch {torch.__version__} is a CPU-only build: "
            "only rat_ext's CPU ops can be used",
            stacklevel=2,
        )


_warn_of_mismatch()
