"""The study: six patterns of layers trained on the same tokens with the same seed, and on associative recall.

    python bench/study.py                 # on a GPU, about 12 minutes; writes bench/results/study-<device>-<date>.json
    python bench/study.py --quick         # on a CPU: that it runs
    python bench/study.py --report FILE   # bench/STUDY.md and its plots, of a result

Parts: language (about 30 M parameters, T = 4096: validation bits per byte against tokens and against time, tokens/s, memory),
recall (4 to 256 pairs), long (T = 32,768: tokens/s, memory), step (Trainer's step beside the bare model's).
"""

from __future__ import annotations

import json
import statistics
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np
import torch

from rat_ext.models import RATConfig, RATForCausalLM
from rat_ext.train import config as configs
from rat_ext.train import run as runs
from rat_ext.train.plot import read_log
from rat_ext.train.prepare import prepare

STUDY = common.HERE / "STUDY.md"
PARTS = ("language", "recall", "long", "step")
SUFFIXES = {".py", ".md", ".rst", ".txt", ".pyi", ".h", ".hpp", ".cuh"}
# Name: pattern of layers, chunk size.
MODELS = {
    "rat L=16": ("rat", 16), "rat L=64": ("rat", 64), "attention": ("attention", 16), "rnn": ("rnn", 16),
    "rat-swa": ("rat-swa", 16), "attention-swa": ("attention-swa", 16),
}  # fmt: skip


@dataclass
class Sizes:
    """Of the whole study; the defaults are those of a GPU."""

    hidden: int = 512
    layers: int = 8
    heads: int = 8
    length: int = 4096
    window: int = 1024
    tokens: int = 36_000_000
    tokens_per_step: int = 1 << 17
    micro_batch: int = 16
    megabytes: int = 160  # of text, of which the tokens are drawn
    vocab: int = 8192
    recall_steps: int = 4000
    recall_batch: int = 64
    recall_hidden: int = 256
    recall_pairs: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)
    long: int = 32768
    steps: int = 12
    held_out: float = 0.01  # share of the documents


QUICK = Sizes(
    hidden=32, layers=2, heads=4, length=128, window=32, tokens=4096, tokens_per_step=1024, micro_batch=4, megabytes=1,
    vocab=512, recall_steps=4, recall_batch=4, recall_hidden=32, recall_pairs=(2, 4), long=256, steps=4, held_out=0.3,
)  # fmt: skip


# ---- text ---------------------------------------------------------------------------------------------------------------


def gather(roots: list[Path], megabytes: int, path: Path) -> None:
    """Sources and prose below ``roots`` as JSON lines, in an order that depends on the names alone, up to a size."""
    files = sorted({file for root in roots for file in root.rglob("*") if file.suffix in SUFFIXES and file.is_file()})
    size = 0
    with open(path, "w") as out:
        for i in np.random.default_rng(0).permutation(len(files)):
            if size > megabytes << 20:
                break
            try:
                text = files[i].read_text()
            except (OSError, UnicodeDecodeError):
                continue
            if 200 < len(text) < 1 << 20:
                out.write(json.dumps({"text": text}) + "\n")
                size += len(text)


# ---- language -----------------------------------------------------------------------------------------------------------


def config_of(name: str, sizes: Sizes) -> dict:
    pattern, chunk = MODELS[name]
    return {
        "pattern": pattern, "chunk_size": chunk, "hidden_size": sizes.hidden, "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads, "sliding_window": sizes.window,
    }  # fmt: skip


def language(folder: Path, sizes: Sizes, device: torch.device) -> dict:
    """Every model by ``python -m rat_ext.train run``'s own function: what its log says."""
    found: dict = {}
    steps = sizes.tokens // sizes.tokens_per_step
    every = max(1, steps // 10)
    for name in MODELS:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        recipe = {
            "steps": steps, "length": sizes.length, "tokens_per_step": sizes.tokens_per_step, "micro_batch": sizes.micro_batch,
            "log_every": every, "save_every": steps, "keep": 1, "eval_every": every, "eval_windows": 32,
        }  # fmt: skip
        output = name.replace(" ", "-").replace("=", "")
        run = configs.parse({"output": output, "data": "data", "model": config_of(name, sizes), "train": recipe}, folder)
        result = runs.pretrain(run)
        lines = read_log(run.output / "log.jsonl")
        trained = [line for line in lines if "loss" in line]
        seconds, curve = 0.0, []
        for line in lines:
            if "loss" in line:
                seconds += every * sizes.tokens_per_step / line["tokens_per_second"]
            else:
                curve.append({"tokens": line["tokens"], "seconds": seconds, "bits_per_byte": line["eval_bits_per_byte"]})
        found[name] = {
            "parameters": sum(p.numel() for p in runs.load_model(run, sizes.vocab, 0).parameters()),
            "bits_per_byte": result["eval_bits_per_byte"],
            "tokens_per_second": statistics.median(line["tokens_per_second"] for line in trained[1:]),
            "mfu": statistics.median(line["mfu"] for line in trained[1:]),
            "memory_gb": trained[-1].get("memory_gb"),
            "curve": curve,
            "final_loss": trained[-1]["loss"],
        }
        common.free()
    return found


# ---- recall -------------------------------------------------------------------------------------------------------------


def recall_batch(
    draw: np.random.Generator, batch: int, pairs: int, length: int, vocab: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of a key and a value, then every key again in another order, each with its value; 0 fills up.

    Returns:
        tokens and the labels after each, ``(batch, length)`` int64: the values of the second half, -100 elsewhere.
    """
    tokens = np.zeros((batch, length), dtype=np.int64)
    labels = np.full((batch, length), -100)
    half = vocab // 2
    keys = 1 + draw.random((batch, half - 1)).argsort(1)[:, :pairs]
    values = half + draw.integers(half, size=(batch, pairs))
    order = draw.random((batch, pairs)).argsort(1)
    asked, answers = (np.take_along_axis(x, order, 1) for x in (keys, values))
    tokens[:, : 4 * pairs : 2] = np.concatenate((keys, asked), axis=1)
    tokens[:, 1 : 4 * pairs : 2] = np.concatenate((values, answers), axis=1)
    labels[:, 2 * pairs : 4 * pairs : 2] = answers
    return torch.from_numpy(tokens), torch.from_numpy(labels)


def recall(sizes: Sizes, device: torch.device) -> dict:
    """Share of values that are the likeliest, by number of pairs: one model for all, trained on all numbers in turn."""
    found: dict = {}
    length, vocab = 4 * max(sizes.recall_pairs), 4 * max(sizes.recall_pairs) + 2
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    for name, (pattern, chunk) in MODELS.items():
        torch.manual_seed(0)
        draw, begin = np.random.default_rng(0), time.perf_counter()
        config = RATConfig(
            vocab_size=vocab, hidden_size=sizes.recall_hidden, num_hidden_layers=2, num_attention_heads=4, layer_types=pattern,
            chunk_size=chunk, sliding_window=length // 16, max_position_embeddings=length,
        )  # fmt: skip
        model = RATForCausalLM(config).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, sizes.recall_steps, pct_start=0.1)
        for step in range(sizes.recall_steps):
            pairs = sizes.recall_pairs[step % len(sizes.recall_pairs)]
            tokens, labels = (x.to(device) for x in recall_batch(draw, sizes.recall_batch, pairs, 4 * pairs, vocab))
            with autocast:
                loss = model(input_ids=tokens, labels=labels, shift_labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.eval()
        held, accuracy = np.random.default_rng(1), {}
        for pairs in sizes.recall_pairs:
            tokens, labels = (x.to(device) for x in recall_batch(held, sizes.recall_batch, pairs, 4 * pairs, vocab))
            with torch.no_grad(), autocast:
                best = model(input_ids=tokens, use_cache=False).logits.argmax(-1)
            asked = labels != -100
            accuracy[str(pairs)] = float((best[asked] == labels[asked]).float().mean())
        found[name] = {"accuracy": accuracy, "seconds": time.perf_counter() - begin, "loss": float(loss.detach())}
        print(name, " ".join(f"{pairs}: {value:.2f}" for pairs, value in accuracy.items()), flush=True)
        del model, optimizer
        common.free()
    return found


# ---- long texts, the trainer's own cost ---------------------------------------------------------------------------------


def bare(config: RATConfig, batch: int, length: int, accumulate: int, steps: int, device: torch.device) -> dict:
    """Seconds of a step of the bare model: forward, backward, clip, fused AdamW."""
    torch.manual_seed(0)
    model = RATForCausalLM(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(config.vocab_size, (batch, length), device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        common.sync(device)
        begin = time.perf_counter()
        for _ in range(accumulate):
            with autocast:
                loss = model(input_ids=tokens, labels=tokens, shift_labels=tokens).loss / accumulate
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        common.sync(device)
        times.append(time.perf_counter() - begin)
    seconds = statistics.median(times[2:])
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    del model, optimizer
    common.free()
    return {"seconds": seconds, "tokens_per_second": batch * length * accumulate / seconds, "memory_gb": memory}


def model_of(name: str, sizes: Sizes, length: int) -> RATConfig:
    changes = config_of(name, sizes)
    return RATConfig(
        vocab_size=sizes.vocab, layer_types=changes.pop("pattern"), max_position_embeddings=length, eos_token_id=0, **changes
    )


def long(sizes: Sizes, device: torch.device) -> dict:
    names = ("rat L=16", "attention")
    return {name: bare(model_of(name, sizes, sizes.long), 1, sizes.long, 1, sizes.steps, device) for name in names}


def step(folder: Path, sizes: Sizes, device: torch.device) -> dict:
    """rat L = 16: the bare step, and Trainer's of the same size, from its log."""
    accumulate = sizes.tokens_per_step // sizes.length // sizes.micro_batch
    alone = bare(model_of("rat L=16", sizes, sizes.length), sizes.micro_batch, sizes.length, accumulate, sizes.steps, device)
    recipe = {
        "steps": 4 * sizes.steps, "length": sizes.length, "tokens_per_step": sizes.tokens_per_step,
        "micro_batch": sizes.micro_batch, "log_every": sizes.steps, "save_every": 10**6, "eval_every": 0,
    }  # fmt: skip
    run = configs.parse({"output": "step", "data": "data", "model": config_of("rat L=16", sizes), "train": recipe}, folder)
    runs.pretrain(run)
    rates = [line["tokens_per_second"] for line in read_log(run.output / "log.jsonl") if "loss" in line][1:]
    trainer = sizes.tokens_per_step / statistics.median(rates)
    return {"bare_seconds": alone["seconds"], "trainer_seconds": trainer, "ratio": trainer / alone["seconds"]}


# ---- the report ---------------------------------------------------------------------------------------------------------


def rows(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def report(result: dict, page: Path) -> None:
    """The page and its plots, of one result. Every number comes from it."""
    from matplotlib.figure import Figure

    where = f"{result['device']} (torch {result['torch']}, commit {result['commit']}, {result['date'][:10]})"
    sizes, text = result["sizes"], [f"# Study of the patterns\n\nMade by `python bench/study.py` on {where}.\n"]
    images = page.parent / "images"
    images.mkdir(exist_ok=True)

    def draw(name: str, curves: dict[str, tuple[list, list]], **labels: str) -> None:
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for label, (x, y) in curves.items():
            axes.plot(x, y, marker=".", label=label)
        axes.set(**labels)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(images / name, dpi=120)
        text.append(f"![{labels['ylabel']} against {labels['xlabel']}](images/{name})\n")

    if "language" in result:
        found = result["language"]
        text.append(
            f"\n## Language\n\nT = {sizes['length']}, {sizes['tokens']:,} tokens of sources and prose, "
            f"{sizes['tokens_per_step']:,} per step, the paper's recipe; vocabulary {sizes['vocab']}, width {sizes['hidden']}, "
            f"{sizes['layers']} layers, window {sizes['window']}. The same tokens in the same order, the same seed.\n"
        )
        near = found["attention"]["bits_per_byte"]
        body = [
            [name, f"{m['parameters'] / 1e6:.1f}", f"{m['bits_per_byte']:.4f}", f"{m['bits_per_byte'] / near - 1:+.2%}",
             f"{m['tokens_per_second']:,.0f}", f"{m['mfu']:.1%}", f"{m['memory_gb']:.1f}" if m["memory_gb"] else "-"]
            for name, m in found.items()
        ]  # fmt: skip
        head = ["model", "M parameters", "bits per byte, held out", "beside attention", "tokens/s", "MFU", "GB"]
        text.append(rows(head, body))
        for key in ("tokens", "seconds"):
            curves = {
                name: ([p[key] for p in m["curve"]], [p["bits_per_byte"] for p in m["curve"]]) for name, m in found.items()
            }
            draw(f"study-{key}.png", curves, xlabel=key, ylabel="bits per byte, held out")
    if "recall" in result:
        found = result["recall"]
        text.append(
            f"\n## Associative recall\n\nTwo layers of width {sizes['recall_hidden']}, {sizes['recall_steps']} steps of "
            f"{sizes['recall_batch']} sequences of all numbers of pairs in turn; windows of "
            f"{4 * max(sizes['recall_pairs']) // 16} tokens. Share of values that the model finds.\n"
        )
        pairs = [str(n) for n in sizes["recall_pairs"]]
        text.append(rows(["model", *pairs], [[name, *(f"{m['accuracy'][n]:.2f}" for n in pairs)] for name, m in found.items()]))
        curves = {name: (pairs, [m["accuracy"][n] for n in pairs]) for name, m in found.items()}
        draw("study-recall.png", curves, xlabel="pairs", ylabel="share recalled")
    if "long" in result:
        text.append(f"\n## Long texts\n\nOne sequence of T = {sizes['long']:,}, forward and backward and optimizer.\n")
        body = [
            [name, f"{m['tokens_per_second']:,.0f}", f"{m['memory_gb']:.1f}" if m["memory_gb"] else "-"]
            for name, m in result["long"].items()
        ]
        text.append(rows(["model", "tokens/s", "GB"], body))
    if "step" in result:
        m = result["step"]
        text.append(
            f"\n## Trainer\n\nA step of {sizes['tokens_per_step']:,} tokens, rat L = 16: {1e3 * m['trainer_seconds']:.1f} ms "
            f"under Trainer, {1e3 * m['bare_seconds']:.1f} ms bare: {m['ratio']:.3f}x.\n"
        )
    page.write_text("\n".join(text))


def main() -> int:
    p = common.parser(__doc__.partition("\n")[0])
    p.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    p.add_argument("--text", nargs="+", type=Path, help="folders of sources and prose (default: Python's own and its packages)")
    p.add_argument("--tokens", type=int, help=f"of each model's training (default: {Sizes.tokens:,})")
    p.add_argument("--report", type=Path, metavar="FILE", help=f"write {STUDY.name} of this result, and stop")
    options = p.parse_args()
    if options.report:
        report(json.loads(options.report.read_text()), STUDY)
        return 0
    device, sizes = torch.device(options.device), QUICK if options.quick else Sizes()
    if options.tokens:
        sizes.tokens = options.tokens
    parts = options.parts.split(",")
    result = common.record("study", device, sizes=vars(sizes))
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if {"language", "step"} & set(parts):
            roots = options.text or [Path(sysconfig.get_paths()[key]) for key in ("stdlib", "purelib")]
            gather(roots, sizes.megabytes, folder / "text.jsonl")
            options_of = {"vocab": sizes.vocab, "validation": sizes.held_out, "tokenizer_bytes": 1 << 25}
            prepare([str(folder / "text.jsonl")], folder / "data", **options_of)
            result["data"] = json.loads((folder / "data" / "index.json").read_text())["splits"]
        work = {
            "language": lambda: language(folder, sizes, device), "recall": lambda: recall(sizes, device),
            "long": lambda: long(sizes, device), "step": lambda: step(folder, sizes, device),
        }  # fmt: skip
        for part in parts:
            start = time.perf_counter()
            result[part] = work[part]()
            print(f"-- {part}: {time.perf_counter() - start:.0f} s", flush=True)
            # What is done is kept if the rest is not.
            common.save(result | {"seconds": round(time.perf_counter() - begin, 1)}, options)
    if options.quick:
        with tempfile.TemporaryDirectory() as name:
            report(result, Path(name) / "STUDY.md")
    else:
        report(result, STUDY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
