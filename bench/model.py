"""The models of the paper at 1.3B: decoding, generation, training, each beside its peer in the same run.

Rows come in the order of their worth and are written as they are found: one that fails, runs out of memory or comes after
--time-limit costs no other. Weights and states are random, of normal numbers: zeros would draw less power.
"""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable

import torch
from common import Deadline, ceilings, free, number, parser, record, save, sync, table
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from rat_ext.models import Generator, RATConfig, RATForCausalLM
from rat_ext.models.generator import GREEDY, KeysPool, RATPool, RNNPool, state_bytes

PEAK = 989e12  # FLOP per second of an H100's tensor cores in bfloat16, dense, as its data sheet says
FULL = {"length": 4096, "long": 131072, "batch": 64, "prompts": 256, "prompt": 3072, "new": 1024, "steps": 40, "host": 64}
TINY = {"length": 64, "long": 96, "batch": 2, "prompts": 4, "prompt": 24, "new": 8, "steps": 3, "host": 4}
# What a slot needs in a step beside its states: logits twice, the projections, the residual stream; and what a device keeps.
WORKING, RESERVE = 400e3, 2.0e9


class Bench:
    """The device, the sizes and the one model that is in memory."""

    def __init__(self, device: torch.device, tiny: bool):
        self.device, self.tiny, self.size = device, tiny, TINY if tiny else FULL
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.limits: dict = {}
        self.pattern, self.model = "", None

    def config(self, pattern: str) -> RATConfig:
        if not self.tiny:
            return RATConfig.preset("1.3b", pattern)
        sizes = dict(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, sliding_window=16)
        return RATConfig(layer_types=pattern, **sizes)

    def load(self, pattern: str) -> RATForCausalLM:
        if self.pattern != pattern:
            self.drop()
            torch.manual_seed(0)
            with torch.device(self.device):
                self.model = RATForCausalLM(self.config(pattern)).to(self.dtype)
            self.pattern = pattern
        return self.model.eval().requires_grad_(False)

    def drop(self) -> None:
        self.pattern, self.model = "", None
        free()

    # ---- clocks ----

    def milliseconds(self, function: Callable[[], object], calls: int) -> float:
        """Of one of ``calls`` calls in a row."""
        sync(self.device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        sync(self.device)
        return (time.perf_counter() - start) / calls * 1e3

    # ---- decoding ----

    def fill(self, generator: Generator, length: int) -> None:
        """Puts random sequences of ``length`` tokens into every slot."""
        for pool in generator.pools:
            if isinstance(pool, RATPool):
                states = (pool.cache.chunk_k, pool.cache.chunk_v, pool.cache.running_k, pool.cache.running_v)
                pool.cache.lengths.fill_(length)
            else:
                states = (pool.state,) if isinstance(pool, RNNPool) else (pool.keys, pool.values)
            for x in states:
                x.normal_()
        rows = generator.rows
        rows.slot.copy_(torch.arange(generator.max_batch))
        rows.token.random_(0, self.config("rat").vocab_size)
        rows.length.fill_(length)
        rows.limit.fill_(2**30)

    @torch.no_grad()
    def step(self, generator: Generator, length: int) -> float:
        """Milliseconds of a step whose last call comes to ``length`` tokens."""
        steps, warm = self.size["steps"], 2
        if self.device.type == "cuda":
            run = generator._capture(GREEDY).replay
        else:
            run = lambda: generator._compute(GREEDY)  # noqa: E731
        self.fill(generator, length - steps - warm)
        for _ in range(warm):
            run()
        ms = self.milliseconds(run, steps)
        if int(generator.rows.length.min()) != length or not bool((generator.rows.slot >= 0).all()):
            raise RuntimeError("the steps did not all count")
        return ms

    @torch.no_grad()
    def decode(self, pattern: str, batch: int | None = None) -> dict:
        """Steps of ``batch`` sequences, or as many as fit, that end at T tokens."""
        length, model = self.size["length"], self.load(pattern)
        bytes_each = state_bytes(model.config, length, self.dtype)
        what: dict = {"state_mb": bytes_each / 1e6}
        if batch is None:
            batch = 3
            if self.device.type == "cuda":
                free()
                what["free_gb"] = torch.cuda.mem_get_info(self.device)[0] / 1e9
                batch = int((what["free_gb"] * 1e9 - RESERVE) / (bytes_each + WORKING))
        generator = Generator(model, batch, length)
        ms = {"generator": self.step(generator, length)}
        if any(isinstance(pool, KeysPool) for pool in generator.pools):
            # The same keys by scaled_dot_product_attention over all columns: right here, where all sequences are as long.
            with contextlib.suppress(RuntimeError):
                for pool in generator.pools:
                    if isinstance(pool, KeysPool):
                        pool.attend = lambda q, used, p=pool: F.scaled_dot_product_attention(
                            q[:, :, None], p.keys.transpose(1, 2), p.values.transpose(1, 2)
                        )[:, :, 0]
                ms["sdpa over all columns"] = self.step(generator, length)
        read = batch * bytes_each + sum(p.nbytes for p in model.parameters())
        floor = read / self.limits["copy_gb_s"] / 1e6
        # Ours is what the Generator does; a peer has the best of all ways.
        best = min(ms.values()) if pattern.startswith("attention") else ms["generator"]
        return what | {
            "batch": batch, "ms": ms, "floor_ms": floor, "of_floor": floor / best, "tokens_per_s": batch / best * 1e3,
        }  # fmt: skip

    def end_to_end(self) -> dict:
        """Prompts and new tokens through the Generator, beside its prefill alone and its step alone."""
        size, model = self.size, self.load("rat")
        batch, prompt, new = size["prompts"], size["prompt"], size["new"]
        generator = Generator(model, batch, prompt + new, prefill_tokens=65536)
        ids = torch.randint(0, model.config.vocab_size, (batch, prompt)).tolist()
        generator.generate([ids[0]], 3)  # the graph
        start = time.perf_counter()
        generator.generate(ids, 1)
        prefill = time.perf_counter() - start
        start = time.perf_counter()
        tokens = generator.generate(ids, new)
        total = time.perf_counter() - start
        if [len(row) for row in tokens] != [new] * batch:
            raise RuntimeError("tokens are missing")
        step = self.step(generator, prompt + new // 2) / 1e3
        return {
            "batch": batch, "prompt": prompt, "new": new, "seconds": total, "prefill_seconds": prefill, "step_ms": step * 1e3,
            "tokens_per_s": batch * new / total, "step_tokens_per_s": batch / step,
            "of_step_rate": batch * new / total / (batch / step),
            "of_step_and_prefill": (prefill + (new - 1) * step) / total,
        }  # fmt: skip

    def host(self) -> dict:
        """One sequence: wall clock and the calling thread's time per token, generate of transformers and Generator."""
        model, new = self.load("rat"), self.size["host"]
        prompt = torch.randint(0, model.config.vocab_size, (1, 16), device=self.device)
        generator = Generator(model, 1, 16 + new + 1)

        def theirs() -> None:
            model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, pad_token_id=0)

        def mine() -> None:
            generator.generate(prompt.cpu(), new)

        found = {}
        for name, run in (("generate", theirs), ("generator", mine)):
            run()
            sync(self.device)
            wall, thread = time.perf_counter(), time.thread_time()
            run()
            sync(self.device)
            found[f"{name}_wall_us"] = (time.perf_counter() - wall) / new * 1e6
            found[f"{name}_host_us"] = (time.thread_time() - thread) / new * 1e6
        return found | {"new": new, "ratio": found["generate_wall_us"] / found["generator_wall_us"]}

    # ---- training ----

    def flop(self, config: RATConfig, tokens: int, length: int, parameters: int) -> float:
        """Needed by a train step: 6 N per token, and two products of attention forward, five backward. No recomputation."""
        total = 6.0 * parameters * tokens
        for i, kind in enumerate(config.layer_types):
            keys = length / 2
            if kind == "rat":
                keys = length / config.chunk_sizes[i] / 2
            elif kind == "sliding_attention":
                keys = min(config.sliding_window, length / 2)
            if kind != "rnn":
                total += 7 * 2.0 * tokens * keys * config.hidden_size
        return total

    def train(self, pattern: str, length: int, batch: int, checkpointing: bool, repeats: int) -> dict:
        """Forward, backward and a fused AdamW step in bfloat16; half of the batch where memory does not suffice."""
        self.drop()
        model = self.load(pattern).train().requires_grad_(True)
        self.pattern = ""  # no other row is to find a model that has been trained
        if checkpointing:
            model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=self.device.type == "cuda")

        def step(ids: torch.Tensor) -> None:
            model(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        kernels = sdpa_kernel(backends, set_priority=True) if self.device.type == "cuda" else contextlib.nullcontext()
        with kernels:
            step(torch.zeros(1, min(length, 8192), dtype=torch.int64, device=self.device))  # libraries, the optimizer's states
            while True:
                ids = torch.randint(0, model.config.vocab_size, (batch, length), device=self.device)
                try:
                    if repeats > 1:
                        step(ids)
                    ms = statistics.median(self.milliseconds(lambda ids=ids: step(ids), 1) for _ in range(repeats))
                    break
                except torch.OutOfMemoryError:
                    if batch == 1:
                        raise
                batch //= 2
                optimizer.zero_grad()
                free()
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None
        work = self.flop(model.config, batch * length, length, model.num_parameters()) / ms * 1e3
        return {
            "batch": batch, "length": length, "ms": ms, "tokens_per_s": batch * length / ms * 1e3, "tflop_s": work / 1e12,
            "mfu": work / PEAK, "of_matmul": work / 1e12 / self.limits["matmul_tflop_s"], "peak_gb": peak,
        }  # fmt: skip


def rows(bench: Bench) -> list[tuple[str, Callable[[], dict]]]:
    """Name and measurement, the most worth first; a peer comes right after its row."""
    length, long, batch = (bench.size[name] for name in ("length", "long", "batch"))
    micro = 2 if bench.tiny else 8
    found: list[tuple[str, Callable[[], dict]]] = [
        (f"largest batch T={length} {pattern}", lambda p=pattern: bench.decode(p)) for pattern in ("rat", "attention")
    ]
    found += [(f"train T={length} rat", lambda: bench.train("rat", length, micro, False, 3))]
    found += [
        (f"largest batch T={length} {pattern}", lambda p=pattern: bench.decode(p)) for pattern in ("rat-swa", "attention-swa")
    ]
    found += [
        (f"step B={batch} T={length} rat", lambda: bench.decode("rat", batch)),
        ("end to end rat", bench.end_to_end),
        (f"train T={long} B=1 rat", lambda: bench.train("rat", long, 1, True, 2)),
        (f"train T={long} B=1 attention", lambda: bench.train("attention", long, 1, True, 1)),
        ("host B=1 rat", bench.host),
        (f"step B={batch} T={length} attention", lambda: bench.decode("attention", batch)),
        (f"train T={length} attention", lambda: bench.train("attention", length, micro, False, 3)),
    ]
    return found


def ratios(found: list[dict]) -> list[dict]:
    """Of each row that has a peer: how many times as many tokens per second."""
    rates = {row["name"]: row for row in found if "tokens_per_s" in row}
    lines = []
    for name, row in rates.items():
        head, _, pattern = name.rpartition(" ")
        peer = rates.get(f"{head} {pattern.replace('rat', 'attention')}")
        if pattern in ("rat", "rat-swa") and peer:
            ratio = row["tokens_per_s"] / peer["tokens_per_s"]
            line = {"name": f"ratio {name}", "ratio": ratio, "of": peer["name"]}
            lines.append(line | {"words": words(line)})
    return lines


def words(row: dict) -> list[str]:
    """What the table says of a row: its name, the figure, and what it was made of."""
    if "error" in row:
        return [row["name"], "-", row["error"]]
    if row["name"].startswith("ratio"):
        return [row["name"], f"{row['ratio']:.2f}x", f"tokens per second, against {row['of']}"]
    if "generate_wall_us" in row:
        names = ("generate_wall_us", "generate_host_us", "generator_wall_us", "generator_host_us")
        wall, host, mine, mine_host = (f"{row[name]:.0f}" for name in names)
        us = f"us per token: generate {wall} (host {host}), Generator {mine} (host {mine_host})"
        return [row["name"], f"{row['ratio']:.1f}x", us]
    rate = f"{row['tokens_per_s']:.0f} tokens/s"
    if "mfu" in row:
        more = f"B={row['batch']}, {row['ms']:.0f} ms, {row['tflop_s']:.0f} TFLOP/s, MFU {row['mfu']:.1%}"
        return [row["name"], rate, more + f", {row['of_matmul']:.0%} of a matrix product"]
    if "of_step_rate" in row:
        more = f"{row['batch']} x ({row['prompt']} + {row['new']}) in {row['seconds']:.1f} s"
        share = f"{row['of_step_rate']:.0%} of the step's rate"
        alone = f"prefill alone {row['prefill_seconds']:.1f} s; {row['of_step_and_prefill']:.0%} of the rate of the two alone"
        return [row["name"], rate, f"{more}; {share}; {alone}"]
    ways = ", ".join(f"{name} {number(ms)} ms" for name, ms in row["ms"].items())
    states = f"B={row['batch']}, states {row['state_mb']:.1f} MB each"
    return [row["name"], rate, f"{states}; {ways}; floor {number(row['floor_ms'])} ms ({row['of_floor']:.0%})"]


def main() -> int:
    p = parser(__doc__)
    p.set_defaults(time_limit=240.0)
    p.add_argument("--tiny", action="store_true", help="a model of two small layers: to see that it runs; implies --quick")
    p.add_argument("--resume", action="store_true", help="keep the rows of --out, and measure the others")
    options = p.parse_args()
    options.quick |= options.tiny
    if options.quick and not options.tiny:
        p.error("--quick: of this bench, --tiny")
    if options.resume and options.out is None:
        p.error("--resume: needs --out")
    device, deadline = torch.device(options.device), Deadline(options.time_limit)
    bench = Bench(device, options.tiny)
    bench.limits = ceilings(device, bench.dtype, True)
    result = record("model", device, ceilings=bench.limits, rows=[])
    if options.resume and options.out.exists():
        result["rows"] = [row for row in json.loads(options.out.read_text())["rows"] if not row["name"].startswith("ratio")]
    done = {row["name"] for row in result["rows"]}
    print(f"{result['device']}, torch {result['torch']}, commit {result['commit']}\n", flush=True)
    failed = broken = False
    for name, measure in rows(bench):
        peer = name.split()[-1].startswith("attention")
        if name in done or not re.search(options.rows, name) or (peer and options.no_peers):
            continue
        if deadline.over():
            print(f"{name}: left out, --time-limit")
            continue
        begin = time.perf_counter()
        try:
            row = {"name": name} | measure()
        except Exception as error:
            failed = True
            traceback.print_exc()
            row = {"name": name, "error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]}
            bench.drop()
        row["words"] = words(row)
        result["rows"].append(row)
        print(*row["words"], f"[{time.perf_counter() - begin:.0f} s]", sep="  ", flush=True)
        try:
            sync(device)
        except RuntimeError:  # this process has lost the device
            broken = True
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
        if broken and options.out is not None:
            left = str(options.time_limit - deadline.seconds())
            return subprocess.run([sys.executable, *sys.argv, "--resume", "--time-limit", left]).returncode or 1
        free()
    result["rows"] += ratios(result["rows"])
    print()
    table(["", "", ""], [row["words"] for row in result["rows"]])
    save(result, options)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
