"""The study: six patterns of layers trained on the same tokens with the same seed, and on associative recall.

    python bench/study.py                 # on all GPUs; writes bench/results/study-<device>-<date>.json after every model
    python bench/study.py --seconds 330   # the same within a time: all models get fewer tokens, the same number
    python bench/study.py --quick         # on a CPU: that it runs
    python bench/study.py --prepare DIR   # the text alone, which --data DIR then takes (no GPU is used)
    python bench/study.py --tokens 16e6 --data DIR --parts language --seconds 120    # as many tokens as that, nothing measured
    python bench/study.py --report FILE   # bench/STUDY.md and its plots, of a result
    python bench/study.py --report FILE --merge OLD    # the same; parts that FILE has not are those of OLD

Parts: language (about 30 M parameters, T = 4096: validation bits per byte against tokens and against time, tokens/s, memory),
long (T = 32,768: tokens/s, memory), step (Trainer's step beside the bare model's), recall (2 to 256 pairs). The models stand in
an order that keeps the most telling where time runs out.

A process per GPU takes one model after the other. Each has a limit of its own: past it the process is ended, what its log says
is kept, and another takes the next model.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import queue
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from rat_ext.models import RATConfig, RATForCausalLM
from rat_ext.train import config as configs
from rat_ext.train import flops
from rat_ext.train import run as runs
from rat_ext.train.data import Tokens, Windows, collate
from rat_ext.train.plot import read_log

STUDY = common.HERE / "STUDY.md"
# By part, the share of the time that it and those before it get.
PARTS = {"language": 0.62, "long": 0.66, "step": 0.72, "recall": 1.0}
SUFFIXES = (".py", ".md", ".rst", ".txt", ".pyi", ".h", ".hpp", ".cuh")
# Name: pattern of layers, chunk size.
MODELS = {
    "rat L=16": ("rat", 16), "attention": ("attention", 16), "rat-swa": ("rat-swa", 16), "attention-swa": ("attention-swa", 16),
    "rat L=64": ("rat", 64), "rnn": ("rnn", 16),
}  # fmt: skip


@dataclass
class Sizes:
    """Of the whole study; the defaults are those of a GPU."""

    hidden: int = 512
    layers: int = 8
    heads: int = 8
    length: int = 4096
    window: int = 1024
    tokens: int = 60_000_000  # at most: as many as the slowest model takes in its time
    tokens_per_step: int = 1 << 15  # so few tokens need steps more than they need large ones
    learning_rate: float = 1.5e-3  # the paper's is 8e-4, of models and steps far larger
    micro_batch: int = 8
    points: int = 5  # evaluations, the end included
    held_out_windows: int = 64  # that every evaluation takes
    megabytes: float = 200  # of text, of which the tokens are drawn
    vocab: int = 8192
    recall_steps: int = 60_000  # at most
    recall_rate: float = 2e-3
    recall_tokens: int = 1 << 14  # of a step
    recall_processes: int = 3  # per GPU: models so small leave room for others
    recall_hidden: int = 256
    recall_heads: int = 8  # many and small: with few, attention stays long where it only guesses among the values
    recall_pairs: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128, 256)
    long: int = 32768
    steps: int = 12
    trainer_tokens: int = 1 << 16  # of a step that is timed under Trainer and without, in one micro-batch
    trainer_steps: int = 24
    held_out: float = 0.01  # share of the documents


QUICK = Sizes(
    hidden=32, layers=2, heads=4, length=128, window=32, tokens=4096, tokens_per_step=1024, micro_batch=4, megabytes=1,
    vocab=512, recall_steps=12, recall_tokens=64, recall_processes=1, recall_hidden=32, recall_heads=4, recall_pairs=(2, 4),
    long=256, steps=4, held_out=0.3, trainer_tokens=512, trainer_steps=4,
)  # fmt: skip


# ---- text ---------------------------------------------------------------------------------------------------------------


def folders() -> list[Path]:
    """Where a machine has sources and prose: Python's own, its packages', the system's."""
    found = [Path(sysconfig.get_paths()[key]) for key in ("stdlib", "purelib", "platlib")]
    found += [Path("/usr/include"), Path("/usr/local/cuda/include"), Path("/usr/share"), Path("/usr/lib/python3/dist-packages")]
    return [path for path in dict.fromkeys(path.resolve() for path in found) if path.is_dir()]


def read(path: str) -> str:
    """A file's text; nothing where it is no text."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(1 << 20)
    except (OSError, UnicodeDecodeError):
        return ""


def gather(roots: list[Path], megabytes: float, path: Path, seconds: float = 15.0) -> int:
    """Sources and prose below ``roots`` as JSON lines, each text once, in an order that depends on the names alone, up to a
    size, or what a slow disk gives in ``seconds``. Returns the number of documents.
    """
    begin, files = time.perf_counter(), set()
    for root in roots:
        for folder, _, names in os.walk(root):
            files |= {os.path.join(folder, name) for name in names if name.endswith(SUFFIXES)}
    listed = sorted(files)
    order = [listed[i] for i in np.random.default_rng(0).permutation(len(listed))]
    size, seen = 0, set()
    with open(path, "w") as out, concurrent.futures.ThreadPoolExecutor(32) as pool:
        for i in range(0, len(order), 1024):
            for text in pool.map(read, order[i : i + 1024]):
                if 200 < len(text) < 1 << 20 and hash(text) not in seen:
                    seen.add(hash(text))
                    out.write(json.dumps({"text": text}) + "\n")
                    size += len(text)
            if size > megabytes * 2**20 or time.perf_counter() - begin > seconds:
                break
    return len(seen)


# In a process of its own: those that encode import what the main module of theirs does. Parts small enough for all cores.
PREPARE = """
import json, sys
from rat_ext.train import prepare
prepare.SLICE, prepare.PART = 1 << 22, (1 << 22, 1 << 28)
prepare.prepare([sys.argv[1]], sys.argv[2], **json.loads(sys.argv[3]))
"""


def tokens_of(roots: list[Path], folder: Path, sizes: Sizes, processes: int | None = None, seconds: float = 15.0) -> dict:
    """Shards in ``folder / "data"``, by :mod:`rat_ext.train.prepare`. Returns the sizes of the splits.

    ``processes`` is how many encode at a time, and how many threads train the tokenizer; None: one per core.
    """
    begin, text, data = time.perf_counter(), folder / "text.jsonl", folder / "data"
    folder.mkdir(parents=True, exist_ok=True)
    documents = gather(roots, sizes.megabytes, text, seconds)
    print(f"-- {documents:,} documents, {text.stat().st_size / 1e6:.0f} MB: {time.perf_counter() - begin:.0f} s", flush=True)
    options = {"vocab": sizes.vocab, "validation": sizes.held_out, "tokenizer_bytes": 1 << 24, "processes": processes}
    threads = {"RAYON_NUM_THREADS": str(processes)} if processes else {}
    subprocess.run(
        [sys.executable, "-c", PREPARE, str(text), str(data), json.dumps(options)], check=True, env=os.environ | threads
    )
    text.unlink()
    return splits_of(folder)


def splits_of(folder: Path) -> dict:
    return json.loads((folder / "data" / "index.json").read_text())["splits"]


# ---- language -----------------------------------------------------------------------------------------------------------


def config_of(name: str, sizes: Sizes) -> dict:
    pattern, chunk = MODELS[name]
    return {
        "pattern": pattern, "chunk_size": chunk, "hidden_size": sizes.hidden, "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads, "sliding_window": sizes.window,
    }  # fmt: skip


def run_of(name: str, data: Path, folder: Path, sizes: Sizes, tokens: int) -> configs.Run:
    """What ``python -m rat_ext.train run`` would read from a file. The last step is one that is logged and evaluated."""
    steps, points = max(1, tokens // sizes.tokens_per_step), 4 * sizes.points
    every = max(1, steps // points)
    recipe = {
        "steps": every * points if steps >= points else steps, "length": sizes.length, "tokens_per_step": sizes.tokens_per_step,
        "micro_batch": sizes.micro_batch, "log_every": every, "eval_every": 4 * every if steps >= points else every,
        "eval_windows": sizes.held_out_windows, "learning_rate": sizes.learning_rate,
    }  # fmt: skip
    output = name.replace(" ", "-").replace("=", "")
    found = {"output": output, "data": str(data), "model": config_of(name, sizes), "train": recipe}
    return configs.parse(found | {"trainer": {"save_strategy": "no"}}, folder)


def language(name: str, data: Path, folder: Path, sizes: Sizes, tokens: int, device: torch.device) -> dict:
    """A model by ``python -m rat_ext.train run``'s own function: what its log says. The model itself is not kept."""
    begin = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    runs.pretrain(run_of(name, data, folder, sizes, tokens), save=False)
    return trained(name, data, folder, sizes, tokens) | {"seconds": time.perf_counter() - begin}


def trained(name: str, data: Path, folder: Path, sizes: Sizes, tokens: int) -> dict:
    """What the log of a run says, also of one that was stopped."""
    run = run_of(name, data, folder, sizes, tokens)
    steps, every = run.train.steps, run.train.log_every
    lines = read_log(run.output / "log.jsonl")
    rates = [line for line in lines if "loss" in line]
    seconds, curve = 0.0, []
    for line in lines:
        if "loss" in line:
            seconds += every * sizes.tokens_per_step / line["tokens_per_second"]
        else:
            curve.append({"tokens": line["tokens"], "seconds": seconds, "bits_per_byte": line["eval_bits_per_byte"]})
    steady = rates[1:] or rates
    return {
        "parameters": flops.parameters(runs.model_config(run, sizes.vocab, 0))[0],
        "steps": rates[-1]["step"] if rates else 0,
        "steps_planned": steps,
        "bits_per_byte": curve[-1]["bits_per_byte"] if curve else None,
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in steady) if steady else None,
        "mfu": statistics.median(line["mfu"] for line in steady) if steady else None,
        "memory_gb": rates[-1].get("memory_gb") if rates else None,
        "curve": curve,
        "final_loss": rates[-1]["loss"] if rates else None,
    }


# ---- recall -------------------------------------------------------------------------------------------------------------


def recall_batch(draw: torch.Generator, batch: int, pairs: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of a key and a value, then every key again in another order, each with its value.

    Returns:
        tokens and the labels after each, ``(batch, 4 pairs)`` int64, where ``draw`` is: the values of the second half, -100
        elsewhere.
    """
    half, options = vocab // 2, {"generator": draw, "device": draw.device}
    keys = 1 + torch.rand(batch, half - 1, **options).topk(pairs).indices
    values = torch.randint(half, 2 * half, (batch, pairs), **options)
    order = torch.rand(batch, pairs, **options).argsort(1)
    asked, answers = keys.gather(1, order), values.gather(1, order)
    tokens = torch.stack((torch.cat((keys, asked), 1), torch.cat((values, answers), 1)), 2).flatten(1)
    labels = torch.full_like(tokens, -100)
    labels[:, 2 * pairs :: 2] = answers
    return tokens, labels


class RecallSteps:
    """Steps of a model on associative recall. On a GPU a step is a CUDA graph, one for each number of pairs: the model is so
    small that the host would be what takes the time.
    """

    def __init__(self, config: RATConfig, sizes: Sizes, device: torch.device, graphs: bool):
        torch.manual_seed(0)
        self.model, self.device, self.sizes = RATForCausalLM(config).to(device).train(), device, sizes
        self.parameters, self.graphs = list(self.model.parameters()), graphs
        rate = torch.tensor(0.0, device=device) if graphs else 0.0
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True, capturable=graphs
        )
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=not graphs)
        self.captured: dict[int, tuple] = {}

    def batch(self, draw: torch.Generator, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
        return recall_batch(draw, max(1, self.sizes.recall_tokens // (4 * pairs)), pairs, self.model.config.vocab_size)

    def eager(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with self.autocast:
            loss = self.model(input_ids=tokens, labels=labels, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.detach()

    def capture(self, pairs: int, tokens: torch.Tensor, labels: torch.Tensor) -> None:
        """The step's graph. The steps before it, which set up what is set up once, are steps of the training too."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.optimizer.zero_grad()
                self.eager(tokens, labels)
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.eager(tokens, labels)
        self.captured[pairs] = (graph, tokens, labels, loss)

    def step(self, draw: torch.Generator, pairs: int, rate: float) -> torch.Tensor:
        """One step, or the few that a capture is made of. Returns the loss."""
        tokens, labels = self.batch(draw, pairs)
        for group in self.optimizer.param_groups:
            if self.graphs:
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        if not self.graphs:
            self.optimizer.zero_grad()
            return self.eager(tokens, labels)
        if pairs not in self.captured:
            self.capture(pairs, tokens, labels)
        graph, static_tokens, static_labels, loss = self.captured[pairs]
        static_tokens.copy_(tokens)
        static_labels.copy_(labels)
        graph.replay()
        return loss

    @torch.no_grad()
    def accuracy(self, numbers: Sequence[int]) -> dict[str, float]:
        """Share of values that are the likeliest, by number of pairs, on sequences that are none of the training."""
        draw, found = torch.Generator(self.device).manual_seed(1), {}
        self.model.eval()
        for pairs in numbers:
            tokens, labels = self.batch(draw, pairs)
            with self.autocast:
                best = self.model(input_ids=tokens, use_cache=False).logits.argmax(-1)
            asked = labels != -100
            found[str(pairs)] = float((best[asked] == labels[asked]).float().mean())
        self.model.train()
        return found


def recall(name: str, sizes: Sizes, limit: float, device: torch.device) -> dict:
    """One model for all numbers of pairs, each step with one of them, drawn at random. Few at first: the next one comes when
    nine values of ten are found of the last one, and all are there in the second half of the steps.

    All steps have as many tokens, so as many values to find. There are ``sizes.recall_steps`` of them, or as many as fit into
    ``limit`` seconds; what is called half of the steps may then be half of the time.
    """
    begin = time.perf_counter()
    most, turn = max(sizes.recall_pairs), len(sizes.recall_pairs)
    pattern, chunk = MODELS[name]
    config = RATConfig(
        vocab_size=4 * most + 2, hidden_size=sizes.recall_hidden, num_hidden_layers=2,
        num_attention_heads=sizes.recall_heads, layer_types=pattern, chunk_size=chunk, sliding_window=max(1, most // 4),
        max_position_embeddings=4 * most, initializer_range=sizes.recall_hidden**-0.5,
    )  # fmt: skip

    def train(graphs: bool) -> dict:
        runner, start = RecallSteps(config, sizes, device, graphs), time.perf_counter()
        draw, choice = torch.Generator(device).manual_seed(0), np.random.default_rng(0)
        numbers, every = sizes.recall_pairs, min(50, max(1, sizes.recall_steps // 200))
        budget = max(0.9 * limit - (start - begin), 0.1)
        step, known, progress, checked, curve = 0, 1, 0.0, 0.0, []
        while progress < 1:
            # Up to full speed in a fiftieth of the run, down to nothing over the last two fifths.
            rate = sizes.recall_rate * min(1.0, 0.02 + 50 * progress, 2.5 * (1 - progress))
            loss = runner.step(draw, numbers[int(choice.integers(known))], rate)
            step += 1
            if step % every:
                continue
            common.sync(device)  # others share the GPU: only what is done tells how far it is
            before = progress
            progress = max(step / sizes.recall_steps, (time.perf_counter() - start) / budget)
            if progress >= 0.5:
                known = turn
            elif known < turn and progress - checked >= 0.005:
                checked, last = progress, numbers[known - 1]
                known += runner.accuracy([last])[str(last)] > 0.9
            if int(10 * before) < int(10 * progress) < 10:
                curve.append({"step": step, "known": known, "accuracy": runner.accuracy(numbers)})
        return {"accuracy": runner.accuracy(numbers), "steps": step, "loss": float(loss), "curve": curve}

    graphs, why = device.type == "cuda", ""
    try:
        result = train(graphs)
    except RuntimeError as error:
        if not graphs:
            raise
        why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        print(f"recall {name}: no CUDA graph ({why})", flush=True)
        result = train(False)
    result |= {"seconds": time.perf_counter() - begin} | ({"no_graph": why} if why else {})
    found, steps = result["accuracy"], result["steps"]
    print(f"recall {name}: {steps:,} steps;", " ".join(f"{pairs}: {value:.2f}" for pairs, value in found.items()), flush=True)
    return result


# ---- long texts, the trainer's own cost ---------------------------------------------------------------------------------


def bare(config: RATConfig, batches: Iterator[torch.Tensor], accumulate: int, steps: int, device: torch.device) -> dict:
    """Seconds of a step of the bare model: forward, backward, clip, fused AdamW. ``batches`` are tokens ``(B, T)`` there.

    The first quarter of the steps is not counted; over the others the host runs ahead, as it may in training.
    """
    torch.manual_seed(0)
    model = RATForCausalLM(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    warm, begin, size = max(2, steps // 4), 0.0, 0
    for number in range(warm + steps):
        if number == warm:
            common.sync(device)
            begin, size = time.perf_counter(), 0
        for _ in range(accumulate):
            tokens = next(batches)
            size += tokens.numel()
            with autocast:
                loss = model(input_ids=tokens, labels=tokens, shift_labels=tokens).loss / accumulate
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    common.sync(device)
    whole = time.perf_counter() - begin
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    del model, optimizer
    common.free()
    return {"seconds": whole / steps, "tokens_per_second": size / whole, "memory_gb": memory}


def same(config: RATConfig, batch: int, length: int, device: torch.device) -> Iterator[torch.Tensor]:
    """One batch of random tokens, on the device, for ever."""
    return itertools.repeat(torch.randint(config.vocab_size, (batch, length), device=device))


def model_of(name: str, sizes: Sizes, length: int) -> RATConfig:
    changes = config_of(name, sizes)
    return RATConfig(
        vocab_size=sizes.vocab, layer_types=changes.pop("pattern"), max_position_embeddings=length, eos_token_id=0, **changes
    )


def speed(sizes: Sizes, device: torch.device) -> float:
    """Tokens per second of the bare model of attention, the slowest."""
    accumulate = sizes.tokens_per_step // sizes.length // sizes.micro_batch
    config = model_of("attention", sizes, sizes.length)
    batches = same(config, sizes.micro_batch, sizes.length, device)
    return bare(config, batches, accumulate, max(4, sizes.steps // 2), device)["tokens_per_second"]


def long(name: str, sizes: Sizes, device: torch.device) -> dict:
    config = model_of(name, sizes, sizes.long)
    return bare(config, same(config, 1, sizes.long, device), 1, sizes.steps, device)


def step(data: Path, folder: Path, sizes: Sizes, device: torch.device) -> dict:
    """rat L = 16, a step of one micro-batch: of the bare model on a batch that is there, of the bare model on the windows of
    the text, and of Trainer, from its log. Trainer's has no evaluation in it. It is timed as ``run`` sets it up, with two
    processes that read the windows ahead, and with transformers' own defaults: a look at each loss, copies that wait. The bare
    model is timed before and after; the shorter counts.
    """
    config, windows = model_of("rat L=16", sizes, sizes.length), sizes.trainer_tokens // sizes.length

    def alone() -> float:
        return bare(config, same(config, windows, sizes.length, device), 1, sizes.trainer_steps, device)["seconds"]

    first = alone()
    text = Windows(Tokens(data), sizes.length, 1 << 30, 0)

    def batches() -> Iterator[torch.Tensor]:
        for first in itertools.count(0, windows):
            yield collate([text[i] for i in range(first, first + windows)])["input_ids"].to(device)

    read = bare(config, batches(), 1, sizes.trainer_steps, device)
    recipe = {
        "steps": 4 * sizes.trainer_steps, "length": sizes.length, "tokens_per_step": sizes.trainer_tokens,
        "micro_batch": windows, "log_every": sizes.trainer_steps, "eval_every": 0,
    }  # fmt: skip
    found = {"read_seconds": read["seconds"], "tokens": sizes.trainer_tokens}
    waits = {"logging_nan_inf_filter": True, "accelerator_config": {"non_blocking": False}}
    variants = {"trainer_seconds": {}, "readers_seconds": {"dataloader_num_workers": 2}, "waits_seconds": waits}
    for key, more in variants.items():
        words = {"output": key, "data": str(data), "model": config_of("rat L=16", sizes), "train": recipe}
        run = configs.parse(words | {"trainer": {"save_strategy": "no"} | more}, folder)
        runs.pretrain(run, save=False)
        rates = [line["tokens_per_second"] for line in read_log(run.output / "log.jsonl") if "loss" in line][1:]
        found[key] = sizes.trainer_tokens / statistics.median(rates)
    found["bare_seconds"] = min(first, alone())
    print("step, ms:", "  ".join(f"{k} {1e3 * v:.1f}" for k, v in found.items() if k != "tokens"), flush=True)
    return found | {"ratio": found["trainer_seconds"] / found["bare_seconds"]}


# ---- a process per GPU --------------------------------------------------------------------------------------------------


def work(pipe: Any, kind: str, data: Path, folder: Path, sizes: Sizes) -> None:
    """Of a process: what comes through the pipe, one after the other. It imports and starts its GPU once for all models."""
    begin, device = time.perf_counter(), torch.device(kind)
    import accelerate  # noqa: F401

    import rat_ext.train.trainer  # noqa: F401

    multiprocessing.set_start_method("fork", force=True)  # of readers: this process was spawned, they need not be
    torch.zeros(1, device=device)
    print(f"-- a process is ready: {time.perf_counter() - begin:.0f} s", flush=True)
    calls = {
        "speed": lambda: speed(sizes, device),
        "language": lambda name, tokens: language(name, data, folder, sizes, tokens, device),
        "long": lambda name: long(name, sizes, device),
        "step": lambda: step(data, folder, sizes, device),
        "recall": lambda name, limit: recall(name, sizes, limit, device),
    }
    pipe.send("ready")
    while True:
        try:
            task = pipe.recv()
        except EOFError:  # the study itself has ended
            return
        try:
            pipe.send((True, calls[task[0]](*task[1:])))
        except Exception as error:
            pipe.send((False, f"{type(error).__name__}: {error}"))
        common.free()


class Worker:
    """A process that has one GPU, or the CPU. It is begun anew after one that was ended."""

    def __init__(self, gpu: int | None, data: Path, folder: Path, sizes: Sizes):
        self.gpu, self.arguments = gpu, ("cpu" if gpu is None else "cuda", data, folder, sizes)
        self.process: Any = None

    def begin(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # No daemon: Trainer's readers are its children.
        self.process = context.Process(target=work, args=(theirs, *self.arguments))
        with _starting:  # a process takes the environment that it is started in
            before = os.environ.get("CUDA_VISIBLE_DEVICES")
            if self.gpu is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = str(self.gpu) if before is None else before.split(",")[self.gpu]
            self.process.start()
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            os.environ |= {} if before is None else {"CUDA_VISIBLE_DEVICES": before}
        theirs.close()
        self.pipe.recv()

    def call(self, task: tuple, limit: float) -> tuple[bool, Any]:
        """(whether it was done, its result or why not)."""
        try:
            if self.process is None:
                self.begin()
            self.pipe.send(task)
            if self.pipe.poll(limit):
                done, found = self.pipe.recv()
            else:
                done, found = False, f"stopped after {limit:.0f} s"
        except (EOFError, OSError):
            done, found = False, "its process died"
        if not done:  # an error may have left a GPU's context broken
            self.end()
        return done, found

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


_starting = threading.Lock()


def study(sizes: Sizes, parts: list[str], roots: list[Path], device: torch.device, seconds: float, options: Any) -> dict:
    """All parts, within ``seconds`` where it can be. The result is written after every model.

    With ``options.tokens`` nothing is measured first: language takes what time it needs, the other parts what is left of it.
    """
    begin = time.perf_counter()
    result = common.record("study", device, sizes=dataclasses.asdict(sizes))
    gpus: list[int | None] = list(range(torch.cuda.device_count())) if device.type == "cuda" else [None]
    result["devices"] = len(gpus)
    old = json.loads(options.merge.read_text()) if options.merge else None
    lock = threading.Lock()

    def passed() -> float:
        return time.perf_counter() - begin

    def keep() -> dict:
        result["seconds"] = round(passed(), 1)
        whole = merged(result, old)
        common.save(whole, options, quiet=True)
        return whole

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept = options.data or folder
        data = (kept / "data").resolve()
        workers = [Worker(gpu, data, folder, sizes) for gpu in gpus]
        # Recall has more of them, whose models are too small to fill a GPU. All other parts have a GPU for themselves.
        more = [Worker(gpu, data, folder, sizes) for _ in range(sizes.recall_processes - 1) for gpu in gpus]
        more = more if "recall" in parts else []
        try:
            with concurrent.futures.ThreadPoolExecutor(len(workers) + len(more)) as pool:
                # Processes begin while the text is prepared. The measurement waits for it: it needs the host.
                first = [pool.submit(worker.begin) for worker in (*workers, *more)]
                if {"language", "step"} & set(parts):
                    result["data"] = splits_of(kept) if options.data else tokens_of(roots, folder, sizes)
                for future in first:
                    future.result()
                print(f"-- text and processes: {passed():.0f} s", flush=True)
                rate = 0.0
                if "language" in parts and not options.tokens:
                    measured = list(pool.map(lambda worker: worker.call(("speed",), 120.0), workers))
                    if not all(done for done, _ in measured):
                        raise RuntimeError(f"the bare model does not run: {measured}")
                    rate = min(value for _, value in measured)
                    print(f"-- attention, bare: {rate:,.0f} tokens/s; {passed():.0f} s", flush=True)
                ready = passed()
                last = max(PARTS[part] for part in parts)
                for part in PARTS:
                    if part not in parts:
                        continue
                    end = ready + (seconds - ready) * PARTS[part] / last
                    names: list[tuple] = [(name,) for name in MODELS]
                    names = {"long": [("rat L=16",), ("attention",)], "step": [()]}.get(part, names)
                    crew = [*workers, *more] if part == "recall" else workers
                    rounds = math.ceil(len(names) / len(crew))
                    share = max((end - passed()) / rounds, 5.0)
                    limit = 1.3 * share
                    if part == "language":
                        if options.tokens:
                            tokens, limit = sizes.tokens, seconds
                        else:  # Trainer and evaluations take a part of the time
                            tokens = int(min(sizes.tokens, rate * 0.7 * (share - 3), result["data"]["train"]["tokens"]))
                        train = run_of("attention", data, folder, sizes, tokens).train
                        result["tokens"] = train.steps * sizes.tokens_per_step
                        names = [(*n, tokens) for n in names]
                        print(f"-- {train.steps:,} steps, {result['tokens']:,} tokens for each model", flush=True)
                    elif part == "recall":
                        names = [(*n, share) for n in names]
                    elif options.tokens:
                        limit = seconds
                    waiting: queue.Queue = queue.Queue()
                    for n in names:
                        waiting.put(n)

                    def serve(worker: Worker, part: str = part, waiting: queue.Queue = waiting, limit: float = limit) -> None:
                        while True:
                            try:
                                task = waiting.get_nowait()
                            except queue.Empty:
                                return
                            start = passed()
                            most = min(limit, seconds - start)
                            done, found = worker.call((part, *task), most) if most > 1 else (False, "no time left")
                            if not done:
                                found = {"failed": found}
                                if part == "language":
                                    found |= trained(task[0], data, folder, sizes, task[1])
                            with lock:
                                if task:
                                    result.setdefault(part, {})[task[0]] = found
                                else:
                                    result[part] = found
                                keep()
                            why = "" if done else f": {found['failed']}"
                            print(f"{part} {' '.join(map(str, task[:1]))}: {passed() - start:.0f} s{why}", flush=True)

                    list(pool.map(serve, crew))
                    print(f"-- {part}: {passed():.0f} s", flush=True)
        finally:
            for worker in (*workers, *more):
                worker.end()
    for part in ("language", "recall"):
        if part in result:
            result[part] = {name: result[part][name] for name in MODELS if name in result[part]}
    return keep()


# Of a result, what says where its numbers come from.
ORIGIN = ("date", "commit", "device", "devices", "torch", "seconds", "sizes", "tokens", "data")


def there(result: dict, part: str) -> bool:
    """Whether a result has a number of a part."""
    found = result.get(part)
    if not found or "failed" in found:
        return False
    return part == "step" or any("failed" not in model or model.get("curve") for model in found.values())


def merged(new: dict, old: dict | None) -> dict:
    """``new``, with the parts of ``old`` that it has not. ``origin`` says of each part what run it is of."""
    found = dict(new)
    found["origin"] = {}
    for part in PARTS:
        source = new if old is None or there(new, part) or not there(old, part) else old
        if part in source:
            found[part] = source[part]
            origin = {key: source[key] for key in ORIGIN if key in source}
            found["origin"][part] = source.get("origin", {}).get(part, origin)
    return found


# ---- the report ---------------------------------------------------------------------------------------------------------


def rows(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def report(result: dict, page: Path) -> None:
    """The page and its plots, of one result. Every number comes from it."""
    from matplotlib.figure import Figure

    if "origin" not in result:
        result = merged(result, None)
    text = [
        "# Study of the patterns\n\nMade by `python bench/study.py`. Each part says what run it is of. Models are small, runs "
        "are minutes: what is here compares the patterns at this size and this much training, and says nothing about more."
    ]
    missing: list[str] = []
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)

    def begin(part: str, title: str) -> dict:
        """A heading, the run that the part is of. Returns the sizes of that run."""
        o = result["origin"][part]
        count = f"{o['devices']} x " if o.get("devices", 1) > 1 else ""
        text.append(f"\n## {title}\n\n{count}{o['device']}, torch {o['torch']}, commit {o['commit']}, {o['date'][:16]} UTC.\n")
        return o["sizes"]

    def done(part: str) -> dict:
        """Of a part, the models that were not stopped; of the others, a line."""
        found = {}
        for name in MODELS:
            model = result[part].get(name)
            if model is None:
                if part != "long":
                    missing.append(f"{part} of {name}: the run ended before it")
            elif "failed" in model:
                if model.get("curve"):
                    at = model["curve"][-1]
                    text.append(
                        f"{name}: {model['failed']}; {at['bits_per_byte']:.4f} bits per byte at {at['tokens']:,} tokens, the "
                        f"learning rate not yet down.\n"
                    )
                missing.append(f"{part} of {name}: {model['failed']}")
            else:
                found[name] = model
        return found

    def draw(name: str, curves: dict[str, tuple[list, list]], **labels: str) -> None:
        if not curves:
            return
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for label, (x, y) in curves.items():
            axes.plot(x, y, marker=".", label=label)
        axes.set(**labels)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(images / name, dpi=100)
        text.append(f"![{labels['ylabel']} against {labels['xlabel']}](images/{name})\n")

    if "language" in result["origin"]:
        sizes, o = begin("language", "Language"), result["origin"]["language"]
        text.append(
            f"T = {sizes['length']}, {o['tokens']:,} tokens of source code and prose that the machine had on its disk, "
            f"drawn from {o['data']['train']['tokens']:,}; {o['tokens'] // sizes['tokens_per_step']:,} steps of "
            f"{sizes['tokens_per_step']:,}. Vocabulary {sizes['vocab']:,}, width {sizes['hidden']}, {sizes['layers']} layers, "
            f"window {sizes['window']}. The paper's recipe (AdamW, a cosine down to 1e-6 over these steps, 5 % warm-up, decay "
            f"0.1, clip 1) with far smaller steps, and one learning rate for all, {sizes.get('learning_rate', 8e-4):g}, tuned "
            f"for none. The same tokens in the same order, one seed. Held out are windows of documents that training never "
            f"saw.\n"
        )
        found = done("language")
        near = found.get("attention", {}).get("bits_per_byte")
        body = [
            [name, f"{m['parameters'] / 1e6:.1f}", f"{m['bits_per_byte']:.4f}",
             f"{m['bits_per_byte'] / near - 1:+.2%}" if near else "-",
             f"{m['tokens_per_second']:,.0f}", f"{m['mfu']:.1%}", f"{m['memory_gb']:.1f}" if m["memory_gb"] else "-"]
            for name, m in found.items()
        ]  # fmt: skip
        head = ["model", "M parameters", "bits per byte, held out", "beside attention", "tokens/s", "MFU", "GB"]
        text.append(rows(head, body))
        if found:
            ranked = sorted(found, key=lambda name: found[name]["bits_per_byte"])
            each = o["tokens"] / statistics.mean(m["parameters"] for m in found.values())
            text.append(f"Best to worst: {', '.join(ranked)}.")
            text.append(
                f"That is {each:.2f} tokens per parameter, where 20 is a usual number and the paper has far more: all models "
                f"are undertrained. Differences below about 1 % are no order: there is one seed."
            )
            if near and any(found[n]["bits_per_byte"] < near for n in ("rat L=16", "rat L=64", "rnn") if n in found):
                text.append(
                    "A pattern with a recurrence in every layer is ahead of attention here. In the paper, trained for long, "
                    "RAT (L = 16) is close to attention, and a recurrence alone is behind both. The likely reason is the short "
                    "training: a gated recurrence favours near tokens from the first step, while attention has to learn where "
                    "to look. It is no sign that a recurrence makes the better model."
                )
            text.append("")
        for key in ("tokens", "seconds"):
            curves = {
                name: ([p[key] for p in m["curve"]], [p["bits_per_byte"] for p in m["curve"]]) for name, m in found.items()
            }
            draw(f"study-{key}.png", curves, xlabel=f"{key} of training", ylabel="bits per byte, held out")
    if "recall" in result["origin"]:
        sizes = begin("recall", "Associative recall")
        words = (
            f"Two layers of width {sizes['recall_hidden']}, {sizes.get('recall_heads', 4)} heads, learning rate "
            f"{sizes['recall_rate']:g}; windows of {max(sizes['recall_pairs']) // 4} tokens. Share of values that the model "
            f"finds. "
        )
        if "recall_tokens" in sizes:
            words += (
                f"Each step has {sizes['recall_tokens']:,} tokens, in sequences of one number of pairs: few at first, more as "
                f"soon as nine values of ten are found, any of them in the second half of the steps. Each model has the same "
                f"time, {sizes['recall_processes']} of them on a GPU at once, and takes as many steps as it can."
            )
        else:
            words += f"Steps of {sizes['recall_batch']} sequences, of all numbers of pairs in turn."
        text.append(words + "\n")
        found = done("recall")
        pairs = [str(n) for n in sizes["recall_pairs"]]
        body = [[name, *(f"{m['accuracy'][n]:.2f}" for n in pairs), f"{m['steps']:,}"] for name, m in found.items()]
        text.append(rows(["model", *pairs, "steps"], body))
        if found and max(m["accuracy"][pairs[0]] for m in found.values()) < 0.9:
            best = max(m["accuracy"][pairs[0]] for m in found.values())
            text.append(
                f"None has learnt the task: even of {pairs[0]} pairs the best finds a share of {best:.2f}. The table shows how "
                f"far so few steps bring each model, not what it can hold once it is trained to the end.\n"
            )
        elif found:
            held = {n: max((int(p) for p in pairs if m["accuracy"][p] >= 0.9), default=0) for n, m in found.items()}
            order = sorted(held, key=held.get, reverse=True)
            words = "Most pairs of which nine values of ten are found: " + ", ".join(f"{n} {held[n]}" for n in order) + "."
            if held.get("attention", 0) < max(held.values()):
                words += (
                    " In the paper it is the recurrence alone that fails, since its state is too small, and attention holds "
                    "them all."
                )
                means = [statistics.mean(p["accuracy"].values()) for p in found.get("attention", {}).get("curve", [])]
                if len(means) > 3 and means[-1] > means[-4]:
                    words += (
                        " Attention has the room for it here too: its curve still rises at the end, so what it lacks is "
                        "training. The table shows how soon each pattern learns, not what it can hold in the end."
                    )
            text.append(words + "\n")
        curves = {name: (pairs, [m["accuracy"][n] for n in pairs]) for name, m in found.items()}
        draw("study-recall.png", curves, xlabel="pairs", ylabel="share recalled")
        curves = {
            name: ([p["step"] for p in m["curve"]], [statistics.mean(p["accuracy"].values()) for p in m["curve"]])
            for name, m in found.items()
            if m.get("curve")
        }
        draw(
            "study-recall-steps.png", curves, xlabel="steps of training", ylabel="share recalled, mean of all numbers of pairs"
        )
    if "long" in result["origin"]:
        sizes = begin("long", "Long texts")
        text.append(f"One sequence of T = {sizes['long']:,}, forward and backward and optimizer. No longer one was run.\n")
        body = [
            [name, f"{m['tokens_per_second']:,.0f}", f"{m['memory_gb']:.1f}" if m["memory_gb"] else "-"]
            for name, m in done("long").items()
        ]
        text.append(rows(["model", "tokens/s", "GB"], body))
    if "ratio" in result.get("step", {}):
        m, sizes = result["step"], begin("step", "Trainer")
        size, kinds = m.get("tokens", sizes["tokens_per_step"]), [("bare model, one batch that is on the GPU", "bare_seconds")]
        kinds += [("bare model, windows of the text", "read_seconds"), ("Trainer, as `run` sets it up", "trainer_seconds")]
        kinds += [("the same, two processes read ahead", "readers_seconds")]
        kinds += [("the same, a look at each loss, copies that wait", "waits_seconds")]
        text.append(f"rat L = 16, a step of {size:,} tokens in one micro-batch; no evaluation is timed.\n")
        body = [[why, f"{1e3 * m[key]:.1f}", f"{m[key] / m['bare_seconds']:.3f}x"] for why, key in kinds if key in m]
        text.append(rows(["", "ms", "beside bare"], body))
        if "tokens" not in m:
            text.append(
                "The bare step has the same batch each time. Trainer looked at each loss, and read and copied its windows "
                "between steps, while the GPU waited; `run` no longer does so. Few steps were timed.\n"
            )
    missing += [f"{part}: not run" for part in PARTS if part not in result["origin"]]
    if missing:
        text.append("\n## Not run\n\n" + "\n".join(f"- {line}" for line in missing) + "\n")
    page.write_text("\n".join(text))


def main() -> int:
    p = common.parser(__doc__.partition("\n")[0])
    p.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    p.add_argument(
        "--text", nargs="+", type=Path, help="folders of sources and prose (default: those of Python and the system)"
    )
    p.add_argument(
        "--tokens", type=lambda x: int(float(x)),
        help=f"of each model's training, so many (default: what fits into --seconds, at most {Sizes.tokens:,})",
    )  # fmt: skip
    p.add_argument("--prepare", type=Path, metavar="DIR", help="prepare the text in a new folder, and stop")
    p.add_argument("--megabytes", type=float, help=f"of text, of which the tokens are drawn (default: {Sizes.megabytes})")
    p.add_argument("--processes", type=int, help="of --prepare, that encode at a time (default: one per core)")
    p.add_argument("--data", type=Path, metavar="DIR", help="what --prepare made")
    p.add_argument("--merge", type=Path, metavar="OLD", help="a result whose parts are kept where this one has none")
    p.add_argument("--seconds", type=float, default=720.0, help="of the whole study (default: %(default)s)")
    p.add_argument(
        "--report", type=Path, metavar="FILE", help="write the page of this result, and stop; with --out also the merged result"
    )
    p.add_argument("--page", type=Path, default=STUDY, help="of --report (default: bench/STUDY.md)")
    options = p.parse_args()
    if options.report:
        result = json.loads(options.report.read_text())
        if options.merge:
            result = merged(result, json.loads(options.merge.read_text()))
        if options.out:
            common.save(result, options)
        report(result, options.page)
        return 0
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        p.error(f"--parts: expected some of {', '.join(PARTS)}, got {unknown.pop()}")
    device, sizes = torch.device(options.device), QUICK if options.quick else Sizes()
    if options.tokens:
        sizes.tokens = options.tokens
    if options.megabytes:
        sizes.megabytes = options.megabytes
    if options.prepare:
        if (options.prepare / "data").exists():
            p.error(f"--prepare: {options.prepare} holds data already")
        tokens_of(options.text or folders(), options.prepare, sizes, options.processes, seconds=60.0)
        return 0
    if options.data and not (options.data / "data" / "index.json").exists():
        p.error(f"--data: {options.data} is no folder that --prepare completed")
    if options.data:
        sizes.vocab = int(json.loads((options.data / "data" / "index.json").read_text())["vocab"])
    result = study(sizes, parts, options.text or folders(), device, options.seconds, options)
    if options.quick:
        with tempfile.TemporaryDirectory() as name:
            report(result, Path(name) / "STUDY.md")
    else:
        common.save(result, options)
        report(result, options.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
