"""Processes that begin with their imports done: each is forked from a parent that imported them once and did nothing else.

A test that only wants a process of its own, with variables of its own, has one in no time. One that is about how Python
begins or ends wants a new interpreter instead.

Run as a program, ``python forks.py MODULE ...``, it is the parent: a line of JSON in tells what to run, two out give the
process and its exit status.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

HERE = Path(__file__).parent


class Parent:
    """Forks processes that have ``modules``, and finds further ones as this process does. It ends with this process."""

    def __init__(self, *modules: str, **environment: str):
        path = os.pathsep.join([str(HERE), *(p for p in sys.path if p)])
        command = [sys.executable, "-W", "ignore", __file__, *modules]
        environment = os.environ | {"PYTHONPATH": path} | environment
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        atexit.register(self.end)

    def end(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def run(
        self, code: str, *arguments: str, modules: tuple[str, ...] = (), timeout: float = 300, **environment: str
    ) -> subprocess.CompletedProcess:
        """As ``python -c code arguments`` with ``environment``; ``modules`` are imported once, for all processes to come."""
        with tempfile.TemporaryDirectory() as folder:
            said = [str(Path(folder) / name) for name in ("stdout", "stderr")]
            order = {"code": code, "arguments": arguments, "modules": modules, "environment": environment, "said": said}
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
            group = int(self.process.stdout.readline())
            try:
                late = not select.select([self.process.stdout], [], [], timeout)[0]
            finally:
                with contextlib.suppress(ProcessLookupError):  # whatever it left behind, too
                    os.killpg(group, signal.SIGKILL)
            status = int(self.process.stdout.readline())
            out, err = (Path(path).read_text(errors="replace") for path in said)
        if late:
            raise subprocess.TimeoutExpired(code, timeout, out, err)
        return subprocess.CompletedProcess([code, *arguments], status, out, err)


@functools.cache
def with_torch() -> Parent:
    """torch and what rat_ext imports of it, but not rat_ext, which reads its variables when it is imported."""
    return Parent("torch", "torch._dynamo")


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """As rat_ext.testing.run_python, in a process that has torch. Not for GPUs, which the parent may have counted."""
    return with_torch().run(code, *arguments, **environment)


def child(order: dict) -> int:
    """What a forked process does; its exit status."""
    for number, path in zip((1, 2), order["said"], strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(order["environment"])
    sys.argv = ["-c", *order["arguments"]]
    status = 0
    try:
        exec(compile(order["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def main(modules: list[str]) -> None:
    for name in modules:
        importlib.import_module(name)
    for line in sys.stdin:
        order = json.loads(line)
        for name in order["modules"]:
            importlib.import_module(name)
        started, told = os.pipe()
        pid = os.fork()
        if not pid:
            status = 1
            try:
                os.close(started)
                os.setsid()
                os.close(told)
                status = child(order)
            finally:
                os._exit(status)
        os.close(told)
        os.read(started, 1)  # until it has a group of its own, which can be ended whole
        os.close(started)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
