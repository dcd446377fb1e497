"""transformers' Trainer with what a long run needs: whole checkpoints, one order on any number of ranks, a log."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ._extra import tqdm, write_whole
from .data import Windows, collate

CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first. Each is whole: a folder gets its name when everything is in it."""
    found = [path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def publish(temporary: Path, path: Path) -> None:
    """Renames a folder that is complete, its content on the disk before its name is."""
    for folder, _, files in os.walk(temporary):
        for name in files:
            with open(Path(folder, name), "rb") as file:
                os.fsync(file.fileno())
    if path.exists():
        remove(path)
    temporary.rename(path)


def remove(path: Path) -> None:
    """Removes a folder under another name first, so that a half is never taken for the whole."""
    trash = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(trash, ignore_errors=True)
    path.rename(trash)
    shutil.rmtree(trash)


class Log(TrainerCallback):
    """JSON lines in ``log.jsonl``, a line for people, a bar where stderr is a terminal. Of the main process."""

    def __init__(self, folder: Path, report: Callable[[dict], dict]):
        self.path, self.report = folder / "log.jsonl", report
        self.bar: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        kept = []
        if self.path.exists():  # what an earlier run logged after the step that this one goes on from
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if _step(line) is not None and _step(line) <= state.global_step]
        write_whole(self.path, lambda name: name.write_text("".join(line + "\n" for line in kept)))
        if state.global_step:
            print(f"goes on from step {state.global_step}", flush=True)
        self.bar = tqdm()(total=state.max_steps, initial=state.global_step, desc="train", disable=None, leave=False)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:  # the end of a run is in the log, also where log_every does not divide it
            control.should_log = True
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        line = {"step": state.global_step} | self.report(logs)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        text = "  ".join(f"{name} {_short(value)}" for name, value in line.items() if name not in ("step", "epoch", "time"))
        print(f"step {state.global_step:>7} of {state.max_steps}  {text}", flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the line that a killed process was writing
        return None


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


class WholeCheckpoints(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """Over a Trainer: checkpoints are written under a temporary name and renamed, and the newest ``keep`` are kept."""

    keep: int

    def set_up(self, keep: int) -> None:
        """Call once after ``__init__``."""
        self.keep, self._saving, self._saved, self._away = keep, False, 0, 0.0
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(Log(Path(self.args.output_dir), self.report))

    def report(self, logs: dict) -> dict:
        """A line of the log, of what Trainer logs."""
        return logs | {"time": time.time()}

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, ".saving.tmp") if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        begin, folder = time.perf_counter(), Path(self.args.output_dir)
        if self._saved == self.state.global_step:
            return
        self._saved = self.state.global_step
        temporary = folder / ".saving.tmp"
        if self.args.should_save:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            publish(temporary / name, folder / name)
            shutil.rmtree(temporary)
            for old in checkpoints(folder)[: -self.keep]:
                remove(old)
        self.accelerator.wait_for_everyone()
        self._away += time.perf_counter() - begin


class Pretrainer(WholeCheckpoints, Trainer):
    """Pretraining on :class:`Windows`.

    Args:
        held_out: windows to evaluate on, or None.
        packed: whether documents are apart.
        flops: floating-point operations per token of a step.
        peak: of a device, per second.
        options: of Trainer.
    """

    def __init__(self, *, held_out: Windows | None, packed: bool, flops: float, peak: float, keep: int, **options: Any):
        train = options["train_dataset"]
        eos = train.tokens.eos if packed else None
        super().__init__(data_collator=functools.partial(collate, eos=eos), **options)
        self.held_out, self.eos, self.flops, self.peak = held_out, eos, flops, peak
        args = self.args
        windows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.step_tokens = windows * train.length
        self._mark: tuple[float, int] | None = None
        self._found: tuple[int, dict[str, float]] = (-1, {})
        self.set_up(keep)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All: the paper decays norms and gate biases as well."""
        return [name for name, _ in model.named_parameters()]

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Of a micro-batch: the formula that MFU is of. Trainer's own counts the parameters anew each time."""
        return inputs["input_ids"].numel() * self.flops

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._mark is None:
            self._mark, self._away = (time.perf_counter(), self.state.global_step), 0.0
        return super().training_step(*args, **kwargs)

    def report(self, logs: dict) -> dict:
        line = super().report(logs) | {"tokens": self.state.global_step * self.step_tokens}
        if "loss" not in logs or self._mark is None:
            return line
        # Trainer has read the loss from the device: what is timed is done.
        seconds = time.perf_counter() - self._mark[0] - self._away
        rate = (self.state.global_step - self._mark[1]) * self.step_tokens / max(seconds, 1e-9)
        self._mark = None
        line |= {"tokens_per_second": round(rate), "mfu": rate / self.args.world_size * self.flops / self.peak}
        if self.args.device.type == "cuda":
            line["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return line

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean loss per label over the held-out windows, and bits per byte of text."""
        assert self.held_out is not None
        if self._found[0] == self.state.global_step:
            return self._found[1]
        begin, world, model = time.perf_counter(), self.args.world_size, self.model_wrapped
        training = model.training
        model.eval()
        size, nothing = self.args.per_device_eval_batch_size, torch.zeros(self.held_out.length, dtype=torch.int64)
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for first in range(0, len(self.held_out), size * world):
            mine = range(first + self.args.process_index * size, first + (self.args.process_index + 1) * size)
            items = [self.held_out[i] for i in mine if i < len(self.held_out)]
            # Every rank takes part in every call: one that has no window left takes one without labels.
            items = items or [{"input_ids": nothing, "labels": nothing - 100}]
            batch = self._prepare_inputs(collate(items, self.eos))
            with self.compute_loss_context_manager():
                loss = model(**batch, num_items_in_batch=1, logits_to_keep=1, use_cache=False).loss
            total += torch.stack([loss.double(), (batch["labels"] != -100).sum().double()])
        model.train(training)
        nats, labels = self.accelerator.reduce(total, "sum").tolist()
        mean = nats / max(labels, 1.0)
        tokens = self.held_out.tokens
        found = {"eval_loss": mean, "eval_bits_per_byte": mean / math.log(2) * len(tokens) / max(tokens.bytes, 1)}
        self._found = (self.state.global_step, found)
        self.log(found)
        self._away += time.perf_counter() - begin
        return found


def finetuner() -> Any:
    """The class that fine-tunes: TRL's, with whole checkpoints. Imported when it is asked for."""
    from trl import SFTTrainer

    return type("Finetuner", (WholeCheckpoints, SFTTrainer), {})
