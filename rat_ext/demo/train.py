"""Part ``train`` of ``python -m rat_ext``: a byte-level RAT model learns Python from the standard library's sources."""

from __future__ import annotations

import contextlib
import math
import sysconfig
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .console import Console

if TYPE_CHECKING:
    from ..models import RATForCausalLM

CHUNK = 16
PROMPT, WRITTEN = 100, 200
SKIP = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


def read_corpus(folder: Path | None = None, limit: int = 16 << 20) -> tuple[Tensor, Tensor, int, int]:
    """Bytes of the standard library's ``.py`` files: (train, held out, files in train, files held out).

    A file is held out by the checksum of its name, one in ten: the same on every machine, and in no order of the file
        system.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    size = 0
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if SKIP & set(name.parts) or size > limit:
            continue
        text = path.read_bytes()
        size += len(text)
        parts[zlib.crc32(name.as_posix().encode()) % 10 == 0].append(text)
    if min(sum(map(len, part)) for part in parts) < 1 << 16:
        raise RuntimeError(f"no Python sources found in {folder}: the standard library has to be there as files")
    train, held = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts)
    return train, held, len(parts[0]), len(parts[1])


def batch(text: Tensor, size: int, context: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """``(size, context + 1)`` random windows."""
    start = torch.randint(len(text) - context - 1, (size, 1), generator=generator)
    return text[start + torch.arange(context + 1)].to(device, torch.int64)


def bits(model: RATForCausalLM, tokens: Tensor) -> Tensor:
    """Mean bits per byte that the model needs for tokens 1 ... of ``(B, context + 1)``."""
    return model(tokens[:, :-1], shift_labels=tokens[:, 1:], use_cache=False).loss / math.log(2)


def run(console: Console, device: torch.device, budget: float) -> dict:
    """Trains for ``budget`` seconds, writes text. Returns losses, the text, whether decode agreed with the forward."""
    console.title(f"train: a two-layer byte-level RAT model, {budget:.0f} s on {device.type}")
    try:
        from ..models import RATConfig, RATForCausalLM
    except ModuleNotFoundError as error:
        console.print(f"no model: {error.name} is not installed (pip install transformers, or rat_ext[models])")
        return {"losses": [], "skipped": f"{error.name} is not installed"}
    gpu = device.type == "cuda"
    train, held, train_files, held_files = read_corpus()
    console.print(
        f"text: the standard library's sources, {len(train) / 1e6:.1f} MB of {train_files} files to learn from, "
        f"{len(held) / 1e6:.1f} MB of {held_files} files held out"
    )
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    width, size, context = (512, 64, 512) if gpu else (128, 4, 256)
    heads = width // 64 if gpu else width // 32
    config = RATConfig(
        vocab_size=256, hidden_size=width, num_hidden_layers=2, num_attention_heads=heads, num_groups=2, chunk_size=CHUNK,
        hidden_act="swiglu", initializer_range=width**-0.5 / 2, max_position_embeddings=2 * context, layer_types="rat",
    )  # fmt: skip
    model = RATForCausalLM(config).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"model: {parameters / 1e6:.2f} M parameters, width {width}, {heads} heads, L = {CHUNK}, {context} bytes of context"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01)
    autocast = torch.autocast("cuda", torch.bfloat16) if gpu else contextlib.nullcontext()
    sample = torch.Generator().manual_seed(1)
    held_tokens = batch(held, 64 if gpu else 16, context, sample, device)

    losses: list[dict] = []
    best_rate, step, begin, next_look = 2e-3 if gpu else 4e-3, 0, time.perf_counter(), 0.0

    def look() -> None:
        with torch.no_grad(), autocast:
            loss = float(bits(model, held_tokens))
        seen = step * size * context
        losses.append({"seconds": round(time.perf_counter() - begin, 1), "step": step, "bytes": seen, "bits": round(loss, 4)})
        console.print(
            f"{losses[-1]['seconds']:6.1f} s  step {step:5d}  {seen / 1e6:6.2f} MB read  held out {loss:.3f} bits per byte"
        )

    before = 0.0
    with console.bar(budget, "train") as advance:
        while (now := time.perf_counter() - begin) < budget:
            if now >= next_look:
                look()
                next_look += budget / 8
            # The rate rises for 5 % of the time and falls to a tenth along a cosine.
            part = now / budget
            rate = best_rate * min(1.0, (step + 1) / 20, part / 0.05 + 0.05) * (0.55 + 0.45 * math.cos(math.pi * part))
            for group in optimizer.param_groups:
                group["lr"] = rate
            with autocast:
                loss = bits(model, batch(train, size, context, generator, device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 10 == 0:
                advance(now - before, f"step {step}, {float(loss.detach()):.2f} bits per byte")
                before = now
        look()

    text, difference, limit = write(model, held, device)
    agrees = difference <= limit
    learned = losses[-1]["bits"] < losses[0]["bits"]
    console.print(f"\n{PROMPT} bytes of a held-out file, then {WRITTEN} bytes by the model (prefill, then decode steps):\n")
    shown = text[:PROMPT].decode(errors="replace") + " >>> " + text[PROMPT:].decode(errors="replace")
    console.print("\n".join("    " + line for line in shown.splitlines()))
    console.print(
        f"\nlogits of prefill and decode steps against one forward over the same {PROMPT + WRITTEN} bytes: "
        f"largest difference {difference:.1e}, limit {limit:.1e}: {'ok' if agrees else 'WRONG'}"
    )
    if not learned:
        console.print("the loss on held-out files did not fall: WRONG")
    return {
        "losses": losses,
        "unit": "bits per byte, held-out files",
        "parameters": parameters,
        "steps": step,
        "text": text.decode("latin-1"),
        "logit_difference": difference,
        "logit_limit": limit,
        "ok": agrees and learned,
    }


def write(model: RATForCausalLM, held: Tensor, device: torch.device) -> tuple[bytes, float, float]:
    """Prompt and written text; the largest difference of logits, decode to forward; what it may be (float32)."""
    model.eval()
    prompt = held[:PROMPT].to(device, torch.int64)[None]
    torch.manual_seed(0)
    out = model.generate(
        prompt, max_new_tokens=WRITTEN, do_sample=True, temperature=0.7, top_k=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    with torch.no_grad():
        whole = model(out.sequences, use_cache=False).logits[:, PROMPT - 1 : -1]
    difference = float((whole - torch.stack(out.logits, dim=1)).abs().max())
    return bytes(out.sequences[0].tolist()), difference, 1e-4 * max(1.0, float(whole.abs().max()))
