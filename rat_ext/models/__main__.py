"""``python -m rat_ext.models convert``: a checkpoint of the authors' code as a folder that ``from_pretrained`` loads."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m rat_ext.models", description="Checkpoints of the authors' code.")
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="write a checkpoint as a folder for from_pretrained")
    convert.add_argument("checkpoint", metavar="CHECKPOINT.pth")
    convert.add_argument("folder", metavar="OUT_DIR")
    convert.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights (default: %(default)s)"
    )
    convert.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="an argument of RATConfig, for what the file lacks: --set chunk_size=16",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    options.overrides = {}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals:
            parser.error(f"argument --set: expected NAME=VALUE, got {text!r}")
        options.overrides[name] = _value(value)
    return options


def _value(text: str) -> Any:
    """A number, a list, true or false; else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    from . import load_official_checkpoint

    try:
        model = load_official_checkpoint(options.checkpoint, **options.overrides)
        model.to(getattr(torch, options.dtype)).save_pretrained(options.folder)
    except (ValueError, OSError) as error:
        print(f"python -m rat_ext.models: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    config, count = model.config, model.num_parameters()
    print(f"{options.folder}: {config.num_hidden_layers} layers of width {config.hidden_size}, {count:,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
