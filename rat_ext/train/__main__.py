"""``python -m rat_ext.train prepare`` and ``python -m rat_ext.train run``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ._extra import run


def parser() -> argparse.ArgumentParser:
    from .prepare import Settings

    top = argparse.ArgumentParser(prog="python -m rat_ext.train", description="Prepares text, pretrains and fine-tunes models.")
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser(
        "prepare",
        help="text to tokens",
        description="Tokenizes text into memory-mapped shards. A file is a document; in .jsonl, a line is; in "
        ".parquet, a row; .gz is read. The same command goes on where it was stopped. What cannot be used is listed.",
    )
    one.add_argument("--text", nargs="+", required=True, metavar="PATH", help="folders, files, or datasets by folder or name")
    one.add_argument("--out", required=True, metavar="DIR")
    one.add_argument("--tokenizer", default=Settings.tokenizer, help="'train': a new byte-level BPE; or one by folder or name")
    one.add_argument("--vocab", type=int, default=Settings.vocab, help="of a new tokenizer (default: %(default)s)")
    one.add_argument("--field", default=Settings.field, help="of JSON lines and datasets (default: %(default)s)")
    one.add_argument("--validation", type=float, default=Settings.validation, help="share of documents held out (%(default)s)")
    one.add_argument("--max-bytes", type=int, default=Settings.max_bytes, help="of a document (default: %(default)s)")
    one.add_argument(
        "--tokenizer-bytes",
        type=int,
        default=Settings.tokenizer_bytes,
        help="of text for a new tokenizer (%(default)s)",
    )
    one.add_argument("--seed", type=int, default=Settings.seed, help="of the split and the tokenizer's text")
    one.add_argument("--processes", type=int, help="default: one per core")
    one.add_argument("--overwrite", action="store_true", help="empty DIR where it holds other tokens")
    two = commands.add_parser(
        "run",
        help="pretrain or fine-tune",
        description="Trains by a TOML file (docs/training.md); the same command goes on where it was stopped. Under torchrun, "
        "on all ranks.",
    )
    two.add_argument("config", metavar="CONFIG.toml", type=Path)
    two.add_argument("--sft", metavar="FILE.jsonl", type=Path, help="fine-tune model.path on lines with prompt and answer")
    two.add_argument("--dry-run", action="store_true", help="say what the run needs in memory and time, and stop")
    return top


def main(arguments: list[str] | None = None) -> int:
    options = vars(parser().parse_args(arguments))
    if options.pop("command") == "prepare":
        from .prepare import prepare

        prepare(**options)
        return 0
    from .config import load
    from .run import finetune, pretrain

    config = load(options["config"])
    if options["sft"] is not None:
        finetune(config, options["sft"], dry=options["dry_run"])
    else:
        pretrain(config, dry=options["dry_run"])
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
