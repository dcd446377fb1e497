"""The models of the paper at 1.3B: decoding, generation, training, each beside its peer (with --resume maybe of an older run).

Rows come in the order of their worth and are written as they are found: one that fails, runs out of memory or comes after
--time-limit costs no other. Where memory does not suffice, a row takes a smaller batch, and says which. Weights and states are
random, of normal numbers: zeros would draw less power.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable

import torch
from common import (
    Deadline,
    ceilings,
    device_kernels,
    flash_attention_3,
    free,
    number,
    parser,
    record,
    result_path,
    save,
    sync,
    table,
    write,
)
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from rat_ext.models import Generator, RATConfig, RATForCausalLM, attention
from rat_ext.models.generator import GREEDY, KeysPool, RATPool, Ring, RNNPool, add_norm, state_bytes
from rat_ext.parallel.checkpoint import SAVED

PEAK = 989e12  # FLOP per second of an H100's or H200's tensor cores in bfloat16, dense, as their data sheets say
FULL = {"length": 4096, "long": 131072, "batch": 64, "prompts": 256, "prompt": 3072, "new": 1024, "steps": 40, "host": 64}
TINY = {"length": 64, "long": 96, "batch": 2, "prompts": 4, "prompt": 24, "new": 8, "steps": 3, "host": 4}
# What a slot needs in a step beside its states: logits twice, the projections, the residual stream; and what a device keeps.
WORKING, RESERVE = 400e3, 2.0e9


def keep() -> tuple:
    """Of a layer that is computed again: what keeps the results of attention, ours and the peer's alike."""
    names = ("cudnn_attention", "flash_attention", "efficient_attention", "flash_attention_for_cpu")
    peers = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in names]
    return create_selective_checkpoint_contexts([*SAVED, *peers])


class Bench:
    """The device, the sizes and the one model that is in memory."""

    def __init__(self, device: torch.device, tiny: bool, deadline: Deadline, profile: bool):
        self.device, self.tiny, self.size = device, tiny, TINY if tiny else FULL
        self.deadline, self.profile = deadline, profile
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

    def kernels(self, function: Callable[[], object]) -> dict | None:
        """With --profile: milliseconds and calls by kernel of one call, the longest first."""
        return device_kernels(function, self.device) if self.profile else None

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
        rows.token.random_(0, generator.config.vocab_size)
        rows.length.fill_(length)
        rows.limit.fill_(2**30)

    def graph(self, generator: Generator, length: int) -> Callable[[], object]:
        """One greedy step of sequences of up to ``length`` tokens, on a GPU as a replay."""
        tokens = [length] * generator.max_batch
        reads = generator._reads(tokens)
        if self.device.type != "cuda":
            return lambda: generator._compute(GREEDY, reads)
        generator.graphs.clear()
        free()  # what the graph of before kept
        reads = generator._prepare(GREEDY, reads, tokens)
        return generator.graphs.pop((GREEDY, reads)).replay

    @torch.no_grad()
    def step(self, generator: Generator, length: int) -> float:
        """Milliseconds of a step whose last call comes to ``length`` tokens."""
        steps, warm = self.size["steps"], 2
        run = self.graph(generator, length)
        self.fill(generator, length - steps - warm)
        for _ in range(warm):
            run()
        ms = self.milliseconds(run, steps)
        if int(generator.rows.length.min()) != length or not bool((generator.rows.slot >= 0).all()):
            raise RuntimeError("the steps did not all count")
        for pool in generator.pools:
            if isinstance(pool, RATPool):
                pool.cache.check()
        return ms

    def decode(self, pattern: str, batch: int | None = None) -> dict:
        """Steps of ``batch`` sequences, or as many as fit, that end at T tokens."""
        model, what = self.load(pattern), {}
        bytes_each = what["state_bytes"] = state_bytes(model.config, self.size["length"], self.dtype)
        if batch is None:
            batch = 3
            if self.device.type == "cuda":
                free()
                what["free_gb"] = torch.cuda.mem_get_info(self.device)[0] / 1e9
                batch = int((what["free_gb"] * 1e9 - RESERVE) / (bytes_each + WORKING))
        return what | self.smaller(lambda n: self.decode_at(model, n, bytes_each), batch, 0.95)

    def smaller(self, measure: Callable[[int], dict], batch: int, share: float) -> dict:
        """``measure(batch)``, or that of a smaller batch, ``share`` of the last one, where memory does not suffice."""
        while True:
            try:
                return measure(batch)
            except torch.OutOfMemoryError as error:
                message = str(error).splitlines()[0]
            if batch == 1 or self.deadline.over():
                raise RuntimeError(f"out of memory at B={batch}: {message}")
            print(f"  out of memory at B={batch}", flush=True)
            batch = max(1, min(batch - 1, int(batch * share)))
            free()

    @torch.no_grad()
    def decode_at(self, model: RATForCausalLM, batch: int, bytes_each: int) -> dict:
        length = self.size["length"]
        generator = Generator(model, batch, length, compile=True)
        compiled = {name: getattr(generator, name) for name in ("add_norm", "rotate")}
        ms: dict[str, float] = {}
        left_out: dict[str, str] = {}

        dense = generator.dense

        def way(name: str, functions: dict, attend: Callable | None = None) -> None:
            generator.dense = dense  # false after a way that found no kernel
            for key, function in functions.items():
                setattr(generator, key, function)
            for pool in generator.pools:
                if isinstance(pool, KeysPool) and attend is not None:
                    pool.attend = attend(pool)
            try:
                ms[name] = self.step(generator, length)
            except Exception as error:
                if name == "generator" and isinstance(error, torch.OutOfMemoryError):
                    raise
                left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
                print(f"  {name} is left out: {left_out[name]}", flush=True)

        eager = {"add_norm": add_norm, "rotate": attention.rotate}
        way("generator", eager)
        attends: dict[str, Callable | None] = {"generator": None}
        if any(isinstance(pool, KeysPool) for pool in generator.pools):
            attends |= self.attends()
            for name in list(attends)[1:]:
                way(name, eager, attends[name])
            for pool in generator.pools:
                vars(pool).pop("attend", None)
        # Ours is what the Generator does; a peer has the best of all ways.
        counted = [name for name in ms if name == "generator" or model.config.layer_types[0] == "attention"]
        if not counted:
            raise RuntimeError(f"no way of a step works: {left_out}")
        best = min(counted, key=lambda name: ms[name])
        if not self.tiny and not self.deadline.over():  # Dynamo and Inductor are slow to start
            way(f"{best}, compiled", compiled, attends[best])
            counted += [name for name in ms if name == f"{best}, compiled"]
        best_ms = min(ms[name] for name in counted)
        run = None
        if self.profile and self.device.type == "cuda":
            run = self.graph(generator, length)
            self.fill(generator, length - 2)
        kernels = self.kernels(run) if run else None
        read = batch * bytes_each + sum(p.nbytes for p in model.parameters())
        floor = read / self.limits["copy_gb_s"] / 1e6
        return {
            "batch": batch, "state_mb": bytes_each / 1e6, "ms": ms, "left_out": left_out, "floor_ms": floor,
            "of_floor": floor / best_ms, "tokens_per_s": batch / best_ms * 1e3, "kernels": kernels,
        }  # fmt: skip

    def attends(self) -> dict[str, Callable]:
        """Other ways to attend to a pool of keys than the Generator's. Dense ones read all columns: as many, where all
        sequences are as long as they are here."""

        def dense(backend: SDPBackend | None) -> Callable:
            def of(pool: KeysPool) -> Callable:
                def attend(q: torch.Tensor, ring: Ring) -> torch.Tensor:
                    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
                        keys, values = pool.keys.transpose(1, 2), pool.values.transpose(1, 2)
                        return F.scaled_dot_product_attention(q[:, :, None], keys, values)[:, :, 0]

                return attend

            return of

        if self.device.type != "cuda":
            return {"sdpa": dense(None)}

        def used(pool: KeysPool) -> Callable:
            return lambda q, ring: KeysPool.attend(pool, q, dataclasses.replace(ring, columns=0))

        found = {"sdpa cudnn": dense(SDPBackend.CUDNN_ATTENTION), "flash": used}
        function, why = flash_attention_3()
        if function is None:
            print(f"  {why}")
            return found

        def flash3(pool: KeysPool) -> Callable:
            return lambda q, ring: function(q[:, None], pool.keys, pool.values, cache_seqlens=ring.used)[:, 0]

        return found | {"FlashAttention-3": flash3}

    def end_to_end(self) -> dict:
        """Prompts and new tokens through the Generator, beside its prefill alone and its step alone."""
        model = self.load("rat")
        return self.smaller(lambda batch: self.end_to_end_of(model, batch), self.size["prompts"], 0.5)

    def end_to_end_of(self, model: RATForCausalLM, batch: int) -> dict:
        prompt, new = self.size["prompt"], self.size["new"]
        at_once = 65536
        generator = Generator(model, batch, prompt + new, prefill_tokens=at_once, compile=not self.tiny)
        ids = torch.randint(0, model.config.vocab_size, (batch, prompt)).tolist()
        part = ids[: max(1, at_once // prompt)]
        generator.generate(part, 3)  # what is compiled, and the graph
        sync(self.device)
        kernels = self.kernels(lambda: generator.generate(part, 1))
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
            "of_step_and_prefill": (prefill + (new - 1) * step) / total, "kernels": kernels,
        }  # fmt: skip

    def host(self) -> dict:
        """One sequence: wall clock and the calling thread's time per token after the first, generate of transformers and
        Generator; and the Generator's step alone, as replays in a row."""
        model, new = self.load("rat"), self.size["host"]
        prompt = torch.randint(0, model.config.vocab_size, (1, 16), device=self.device)
        mask, row = torch.ones_like(prompt), prompt.cpu()
        generator = Generator(model, 1, 16 + new + 2, compile=not self.tiny)

        def theirs(tokens: int) -> None:
            model.generate(prompt, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)

        def mine(tokens: int) -> None:
            generator.generate(row, tokens)

        def seconds(run: Callable[[int], None], tokens: int) -> tuple[float, float]:
            sync(self.device)
            wall, thread = time.perf_counter(), time.thread_time()
            run(tokens)
            sync(self.device)
            return time.perf_counter() - wall, time.thread_time() - thread

        found = {}
        for name, run in (("generate", theirs), ("generator", mine)):
            run(3)
            first, all_of_them = seconds(run, 1), seconds(run, new + 1)
            found[f"{name}_wall_us"] = (all_of_them[0] - first[0]) / new * 1e6
            found[f"{name}_host_us"] = (all_of_them[1] - first[1]) / new * 1e6
            found[f"{name}_first_ms"] = first[0] * 1e3
        found["step_us"] = self.step(generator, 16 + new + 2) * 1e3
        if self.profile and self.device.type == "cuda":
            run_step = self.graph(generator, 16 + new + 2)
            self.fill(generator, 16 + new)
            found["kernels"] = self.kernels(run_step)
        return found | {"new": new, "ratio": found["generate_wall_us"] / found["generator_wall_us"]}

    # ---- training ----

    def flop(self, config: RATConfig, tokens: int, length: int, parameters: int) -> float:
        """Needed by a train step: 6 N per token, and two products of attention forward, four backward. No recomputation."""
        total = 6.0 * parameters * tokens
        for i, kind in enumerate(config.layer_types):
            keys = length / 2
            if kind == "rat":
                keys = length / config.chunk_sizes[i] / 2
            elif kind == "sliding_attention":
                keys = min(config.sliding_window, length / 2)
            if kind != "rnn":
                total += 6 * 2.0 * tokens * keys * config.hidden_size
        return total

    def train(self, pattern: str, length: int, batch: int, checkpoints: str, repeats: int) -> dict:
        """Forward, backward and a fused AdamW step in bfloat16; half of the batch where memory does not suffice.

        ``checkpoints``: "", "layers" to compute each layer again, or "kept": all of it but what attention gave.
        """
        self.drop()
        model = self.load(pattern).train().requires_grad_(True)
        self.pattern = ""  # no other row is to find a model that has been trained
        if checkpoints:
            model.gradient_checkpointing_enable(
                {"use_reentrant": False} | ({"context_fn": keep} if checkpoints == "kept" else {})
            )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=self.device.type == "cuda")

        def step(ids: torch.Tensor) -> None:
            model(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        kernels = sdpa_kernel(backends, set_priority=True) if self.device.type == "cuda" else contextlib.nullcontext()
        layers = model.model.layers

        def measure(batch: int) -> dict:
            optimizer.zero_grad()
            ids = torch.randint(0, model.config.vocab_size, (batch, length), device=self.device)
            model.model.layers = layers[:1]  # every library and every shape, at a small part of the cost
            step(ids)
            model.model.layers = layers
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            ms = statistics.median(self.milliseconds(lambda: step(ids), 1) for _ in range(repeats))
            return {"batch": batch, "ms": ms, "kernels": self.kernels(lambda: step(ids)) if repeats > 1 else None}

        with kernels:
            step(torch.zeros(1, min(length, 1024), dtype=torch.int64, device=self.device))  # the optimizer's states
            found = self.smaller(measure, batch, 0.5)
        batch, ms = found["batch"], found["ms"]
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None
        work = self.flop(model.config, batch * length, length, model.num_parameters()) / ms * 1e3
        return {
            **found, "length": length, "tokens_per_s": batch * length / ms * 1e3, "tflop_s": work / 1e12,
            "mfu": work / PEAK, "of_matmul": work / 1e12 / self.limits["matmul_tflop_s"], "peak_gb": peak,
        }  # fmt: skip


def rows(bench: Bench) -> list[tuple[str, Callable[[], dict]]]:
    """Name and measurement, the most worth first; a peer comes right after its row."""
    length, long, batch = (bench.size[name] for name in ("length", "long", "batch"))
    micro = 2 if bench.tiny else 8

    def largest(pattern: str) -> tuple[str, Callable[[], dict]]:
        return f"largest batch T={length} {pattern}", lambda: bench.decode(pattern)

    return [
        largest("rat"),
        (f"step B={batch} T={length} rat", lambda: bench.decode("rat", batch)),
        largest("attention"),
        (f"train T={length} rat", lambda: bench.train("rat", length, micro, "", 3)),
        (f"train T={long} B=1 rat", lambda: bench.train("rat", long, 1, "layers", 2)),
        (f"train T={long} B=1 attention", lambda: bench.train("attention", long, 1, "layers", 1)),
        largest("rat-swa"),
        largest("attention-swa"),
        ("end to end rat", bench.end_to_end),
        ("host B=1 rat", bench.host),
        (f"step B={batch} T={length} attention", lambda: bench.decode("attention", batch)),
        (f"train T={length} attention", lambda: bench.train("attention", length, micro, "", 3)),
        (f"train T={long} B=1, attention kept, rat", lambda: bench.train("rat", long, 1, "kept", 2)),
        (f"train T={long} B=1, attention kept, attention", lambda: bench.train("attention", long, 1, "kept", 1)),
    ]


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
        us = (
            f"us per token: generate {wall} (host {host}), Generator {mine} (host {mine_host}; step alone {row['step_us']:.0f})"
        )
        us += f"; first token after {row['generate_first_ms']:.0f} and {row['generator_first_ms']:.0f} ms"
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
    states = f"B={row['batch']}, states {row['state_mb']:.4g} MB each"
    return [row["name"], rate, f"{states}; {ways}; floor {number(row['floor_ms'])} ms ({row['of_floor']:.0%})"]


def main() -> int:
    p = parser(__doc__)
    p.set_defaults(time_limit=240.0)
    p.add_argument("--tiny", action="store_true", help="a model of two small layers: to see that it runs; implies --quick")
    p.add_argument("--resume", action="store_true", help="keep the rows of --out, and measure the others")
    p.add_argument("--profile", action="store_true", help="also list the kernels of steps and train steps, on a GPU")
    options = p.parse_args()
    options.quick |= options.tiny
    if options.quick and not options.tiny:
        p.error("--quick: of this bench, --tiny")
    device, deadline = torch.device(options.device), Deadline(options.time_limit)
    bench = Bench(device, options.tiny, deadline, options.profile)
    bench.limits = ceilings(device, bench.dtype, True)
    result = record("model", device, ceilings=bench.limits, rows=[])
    path = result_path(result, options)
    if options.resume:
        if path is None or not path.exists():
            p.error(f"--resume: no rows to keep at {path}")
        kept = json.loads(path.read_text())["rows"]
        result["rows"] = [row for row in kept if not row["name"].startswith("ratio")]
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
        if path is not None:
            write(result, path)
        if broken and path is not None:
            left = ["--resume", "--out", str(path), "--time-limit", str(options.time_limit - deadline.seconds())]
            return subprocess.run([sys.executable, *sys.argv, *left]).returncode or 1
        free()
    result["rows"] += ratios(result["rows"])
    print()
    table(["", "", ""], [row["words"] for row in result["rows"]])
    save(result, options)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
