"""What the commands of rat_ext.train and rat_ext.evaluate share: errors in one line, optional packages, whole files."""

from __future__ import annotations

import errno
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

# A disk that takes no more, or none from this user.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class Refused(ValueError):
    """An input that cannot be worked with; the message is one line."""


def wrong(command: str, argument: str, expected: str, got: object) -> Refused:
    """The error for a wrong argument of a command."""
    return Refused(f"{command}: {argument}: expected {expected}, got {got}")


def one_line(error: BaseException) -> str:
    """What an error says, for a message of one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def check_vocabulary(command: str, argument: str, tokenizer: Any, config: Any) -> None:
    """Refuses a tokenizer with tokens that a model of this package has no row for: a GPU would stop without a reason."""
    size = max(tokenizer.get_vocab().values()) + 1
    if config.model_type == "rat" and size > config.vocab_size:
        raise wrong(command, argument, f"a tokenizer of at most the model's {config.vocab_size} tokens", size)


def read_json(path: Path, command: str, argument: str) -> dict[str, Any]:
    """The object in a file that an earlier command wrote, or one line on what is there instead."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise wrong(command, argument, f"{path} as it was written", one_line(error)) from None
    if not isinstance(found, dict):
        raise wrong(command, argument, f"{path} as it was written", type(found).__name__)
    return found


def need(module: str, extra: str, use: str) -> ModuleType:
    """Imports ``module``, or says in one line which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise
        raise Refused(f'{use} needs {error.name}: pip install "rat_ext[{extra}]"') from None


def tqdm() -> Any:
    """The progress bar, or one that shows nothing where tqdm is not installed."""
    try:
        from tqdm import tqdm as bar
    except ModuleNotFoundError:
        return _Silent
    return bar


class _Silent:
    def __init__(self, *args: Any, **options: Any):
        self.n = 0

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *error: object) -> None: ...

    def refresh(self) -> None: ...

    def update(self, n: int = 1) -> None: ...

    def set_postfix_str(self, text: str, refresh: bool = True) -> None: ...


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a temporary name beside ``path``, then renames: the file is whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a write that fails does not say where
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """``value`` as JSON, whole or not at all."""
    write_whole(path, lambda name: name.write_text(json.dumps(value, indent=1) + "\n"))


def run(main: Callable[[], int]) -> int:
    """``main()``; an input that is refused, or a disk that takes no more, becomes one line and the exit code 2."""
    try:
        return main()
    except Refused as error:
        print(error, file=sys.stderr)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        print(f"{error.filename or 'output'}: {error.strerror}", file=sys.stderr)
    return 2
