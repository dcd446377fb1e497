"""The configuration of a run: a TOML file, checked in full before any work. The defaults are the paper's recipe."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._extra import Refused, need, wrong


@dataclass
class Train:
    """Section [train]: pretraining. The defaults are the paper's."""

    steps: int = 0  # optimizer steps; or tokens
    tokens: float = 0  # in all
    length: int = 4096  # T
    tokens_per_step: int = 2**21
    micro_batch: int = 8  # windows of T tokens that a rank takes at a time
    learning_rate: float = 8e-4
    min_learning_rate: float = 1e-6
    warmup: float = 0.05  # share of the steps
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.1  # of all parameters
    clip: float = 1.0  # norm of the gradients
    packed: bool = False  # documents are apart (cu_seqlens); False: they run into each other, as in the paper
    shuffle: bool = True
    seed: int = 0
    bf16: bool | None = None  # autocast over float32 weights; None: on a GPU
    compile: bool = False
    checkpointing: bool = False  # of the activations, by layer
    fsdp: bool = False  # FSDP2 instead of DDP
    log_every: int = 10
    save_every: int = 500
    keep: int = 2  # checkpoints
    eval_every: int = 500  # 0: never
    eval_windows: int = 256  # 0: all of the held-out split


@dataclass
class Sft:
    """Section [sft]: fine-tuning on prompts and answers."""

    epochs: float = 1.0
    batch: int = 32  # examples per step
    micro_batch: int = 4
    length: int = 4096  # tokens of an example; longer ones are cut
    learning_rate: float = 2e-5
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    bf16: bool | None = None
    checkpointing: bool = False
    fsdp: bool = False
    log_every: int = 10
    save_every: int = 500
    keep: int = 2


@dataclass
class Lora:
    """Section [lora]: adapters in place of a change of all weights, in fine-tuning."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    modules: list[str] = field(default_factory=lambda: ["in_proj", "out_proj"])
    merge: bool = True  # also write the model with the adapters added to its weights


@dataclass
class Run:
    """The whole file."""

    output: Path
    data: Path | None
    model: dict[str, Any]
    train: Train
    sft: Sft
    lora: Lora | None
    trainer: dict[str, Any]  # further arguments of transformers' TrainingArguments


MOST = {"warmup": 1, "dropout": 1, "seed": 2**32 - 1}
POSITIVE = "length tokens_per_step micro_batch log_every save_every keep batch epochs r alpha clip".split()


def load(path: str | Path) -> Run:
    """Reads a file. Paths in it are relative to its folder."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        tomllib = need("tomli", "train", "reading TOML")
    path = Path(path)
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise wrong("run", "CONFIG", "a file that can be read", f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise wrong("run", "CONFIG", "TOML", f"{path}: {' '.join(str(error).split())}") from None
    return parse(found, path.parent)


def parse(found: dict[str, Any], folder: Path) -> Run:
    """A run of what a file says."""
    known = {"output", "data", "model", "train", "sft", "lora", "trainer"}
    if unknown := sorted(set(found) - known):
        raise wrong("run", unknown[0], f"one of {', '.join(sorted(known))}", "an unknown key")
    for name in ("output", "data"):
        if not isinstance(found.get(name, ""), str):
            raise wrong("run", name, "a path", found[name])
    for name in ("model", "train", "sft", "lora", "trainer"):
        if not isinstance(found.get(name, {}), dict):
            raise wrong("run", name, f"a section [{name}]", found[name])
    if not found.get("output"):
        raise wrong("run", "output", "a folder to write to", "none")
    model = dict(found.get("model", {}))
    if not model:
        raise wrong("run", "model", "size, sizes or path", "no section [model]")
    if "path" in model:
        if extra := sorted(set(model) - {"path"}):
            raise wrong("run", "model", "path alone, or sizes", ", ".join(extra))
        if not isinstance(model["path"], str) or not (folder / model["path"] / "config.json").is_file():
            raise wrong("run", "model.path", "a folder with a model", model["path"])
        model["path"] = str(folder / model["path"])
    run = Run(
        output=folder / found["output"],
        data=folder / found["data"] if found.get("data") else None,
        model=model,
        train=_section(Train, "train", found.get("train", {})),
        sft=_section(Sft, "sft", found.get("sft", {})),
        lora=_section(Lora, "lora", found["lora"]) if "lora" in found else None,
        trainer=dict(found.get("trainer", {})),
    )
    if run.train.tokens_per_step % run.train.length:
        raise wrong("run", "train.tokens_per_step", f"a multiple of length = {run.train.length}", run.train.tokens_per_step)
    if len(run.train.betas) != 2 or not all(type(beta) in (int, float) and 0 <= beta < 1 for beta in run.train.betas):
        raise wrong("run", "train.betas", "two numbers from 0 to below 1", run.train.betas)
    if run.train.min_learning_rate > run.train.learning_rate:
        expected = f"at most learning_rate = {run.train.learning_rate}"
        raise wrong("run", "train.min_learning_rate", expected, run.train.min_learning_rate)
    if run.lora is not None and not all(isinstance(name, str) for name in run.lora.modules):
        raise wrong("run", "lora.modules", "names", run.lora.modules)
    if not run.train.steps and run.train.tokens:
        run.train.steps = -(-int(run.train.tokens) // run.train.tokens_per_step)
    return run


def _section(kind: Any, section: str, found: dict[str, Any]) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(set(found) - set(fields)):
        raise wrong("run", f"{section}.{unknown[0]}", f"one of {', '.join(fields)}", "an unknown key")
    default = kind()
    for name, value in found.items():
        right = getattr(default, name)
        kinds = {bool: (bool,), int: (int,), float: (int, float), list: (list,), type(None): (bool,)}[type(right)]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise wrong("run", f"{section}.{name}", f"{' or '.join(k.__name__ for k in kinds)}", repr(value))
        if (isinstance(value, (int, float)) and not 0 <= value < float("inf")) or (name in POSITIVE and not value):
            raise wrong("run", f"{section}.{name}", "more than 0" if name in POSITIVE else "at least 0", value)
        if isinstance(value, (int, float)) and value > MOST.get(name, value):
            raise wrong("run", f"{section}.{name}", f"at most {MOST[name]}", value)
    return kind(**found)


def model_config(run: Run, vocab: int, eos: int) -> Any:
    """The RATConfig of section [model]: ``size`` and ``pattern`` of the paper, any argument of RATConfig over them."""
    from huggingface_hub.errors import StrictDataclassError

    from ..models import RATConfig

    changes = dict(run.model)
    size, pattern = changes.pop("size", None), changes.pop("pattern", "rat")
    given = {"vocab_size": vocab, "eos_token_id": eos, "bos_token_id": eos, "pad_token_id": eos}
    given |= {"max_position_embeddings": run.train.length}
    fields = {f.name for f in dataclasses.fields(RATConfig)}
    if unknown := sorted(set(changes) - fields):
        raise wrong("run", f"model.{unknown[0]}", "size, pattern, path or an argument of RATConfig", "an unknown key")
    try:
        if size is not None:
            return RATConfig.preset(size, pattern, **given | changes)
        return RATConfig(**{"layer_types": pattern} | given | changes)
    except (ValueError, TypeError, StrictDataclassError) as error:  # the last: a value of another type
        raise Refused(f"run: model: {' '.join(str(error).split())}") from None
