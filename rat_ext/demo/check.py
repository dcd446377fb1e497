"""Part ``check`` of ``python -m rat_ext``: the ops against their definition in float64, by the rule of the tests."""

from __future__ import annotations

import torch

from ..ops import rat_attention, rat_decode_step
from ..testing import Case, attention_case, define, evaluate, judge
from .console import Console

DECODED = 20  # tokens at the end of a case


def cases(device: torch.device) -> dict[str, Case]:
    """A handful that covers dtypes, partial chunks, L = 1, L >= T, packing, decode across chunk boundaries."""
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    packed = {"dim": 64, "sequences": (1, 0, 77, 16, 56)}
    usual = {"tokens": 200, "dim": 64}
    listed: list[tuple[str, torch.dtype, dict]] = [
        ("usual", f32, usual),
        ("odd sizes", f32, {"batch": 3, "tokens": 101, "heads": 3, "groups": 1, "dim": 40, "chunk_size": 7}),
        ("attention", f32, {"tokens": 90, "chunk_size": 1}),
        ("recurrence", f32, {"tokens": 150, "chunk_size": 1 << 40}),
        ("packed rows", f32, packed),
        ("usual", bf16, usual),
        ("wide heads", bf16, {"batch": 1, "tokens": 130, "groups": 4, "dim": 256, "chunk_size": 32}),
        ("packed rows", bf16, packed),
        ("usual", f16, usual),
    ]
    if device.type == "cuda":
        listed.append(("longer", bf16, {"batch": 4, "tokens": 2048, "heads": 16, "dim": 128}))
    else:
        listed.append(("usual", torch.float64, usual))
    made = {}
    for name, dtype, sizes in listed:
        case = attention_case(device, dtype, return_state="sequences" not in sizes, **sizes)
        (batch, tokens, heads, dim), groups = case.tensors["v"].shape, case.tensors["q"].shape[2]
        described = f"B={batch} T={tokens} H={heads} G={groups} D={dim} L={case.chunk_size}"
        made[f"{str(dtype).removeprefix('torch.'):<8} {name:<12} {described}"] = case
    return made


def in_two(q, k, v, gate, chunk_size, *, out_gate, return_state, **options):
    """rat_attention in two calls, cut inside a chunk: the second continues from the state of the first."""
    middle, state, ys = v.shape[1] * 3 // 5 + 1, None, []
    for part in (slice(0, middle), slice(middle, None)):
        q1, k1, v1, gate1, out1 = (x[:, part] for x in (q, k, v, gate, out_gate))
        y, state = rat_attention(
            q1, k1, v1, gate1, chunk_size, out_gate=out1, initial_state=state, return_state=return_state, **options
        )
        ys.append(y)
    return torch.cat(ys, dim=1), state


def by_steps(q, k, v, gate, chunk_size, *, out_gate, return_state, cu_seqlens=None, **options):
    """rat_attention, whose last tokens are decoded one by one."""
    tokens = v.shape[1]
    q1, k1, v1, gate1, out1 = (x[:, : tokens - DECODED] for x in (q, k, v, gate, out_gate))
    y, cache = rat_attention(q1, k1, v1, gate1, chunk_size, out_gate=out1, return_state=return_state, **options)
    cache = cache.reserve(tokens)
    ys = [y]
    for t in range(tokens - DECODED, tokens):
        q1, k1, v1, gate1, out1 = (x[:, t] for x in (q, k, v, gate, out_gate))
        ys.append(rat_decode_step(q1, k1, v1, gate1, cache, out_gate=out1, **options)[:, None])
    return torch.cat(ys, dim=1), cache


def _define(case: Case):
    """:func:`rat_ext.testing.define`. Its many small operations gain nothing from a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return define(case)
    finally:
        torch.set_num_threads(threads)


def check_case(case: Case) -> list[dict]:
    """One row per phase: of the tensor nearest to its limit, error, eager error and limit relative to its largest value."""
    exact, eager, grads, floor = _define(case)
    whole, _ = evaluate(rat_attention, case, grads=grads)
    results = {"forward": (whole, "y"), "backward": (whole, "d")}
    if case.options["return_state"]:
        results["prefill"] = (evaluate(in_two, case, backward=False)[0], "y")
        results["decode"] = (evaluate(by_steps, case, backward=False)[0], "y")
    rows = []
    for phase, (actual, kind) in results.items():
        wanted = {key: x for key, x in exact.items() if key.startswith("d") == (kind == "d")}
        try:
            found = list(judge(actual, eager, wanted, case.dtype, floor))
        except AssertionError as error:  # shapes, lengths, values that are not finite
            rows.append({"phase": phase, "tensor": str(error), "ok": False} | dict.fromkeys(("error", "eager_error", "limit")))
            continue
        worst = max(found, key=lambda row: row["error"] / row["limit"] if row["limit"] else float(row["error"] > 0))
        size = worst["largest"] or 1.0
        figures = {"error": worst["error"] / size, "eager_error": worst["eager"] / size, "limit": worst["limit"] / size}
        rows.append({"phase": phase, "tensor": worst["tensor"], **figures, "ok": worst["error"] <= worst["limit"]})
    return rows


def run(console: Console, device: torch.device) -> dict:
    """All cases; prints the table. Returns ``{"rows": [...], "ok": bool}``."""
    console.title("check: compiled ops against the definition in float64")
    rows: list[dict] = []
    shown: list[tuple[str, ...]] = []
    listed = cases(device)
    with console.bar(len(listed), "check") as advance:
        for name, case in listed.items():
            for i, row in enumerate(check_case(case)):
                rows.append({"case": name, **row})
                figures = ("" if row[key] is None else f"{row[key]:.1e}" for key in ("error", "eager_error", "limit"))
                mark = "ok" if row["ok"] else "WRONG"
                shown.append(("" if i else name, row["phase"], *figures, row["tensor"], mark))
            advance(1, name)
    console.table(("case", "phase", "rat_ext", "eager", "limit", "worst tensor", ""), shown)
    wrong = sum(not row["ok"] for row in rows)
    console.print(
        "Errors, largest or root mean square, are relative to the largest value of the tensor nearest to its limit: twice the "
        "eager error and a few roundings."
    )
    console.print(f"{len(rows) - wrong} of {len(rows)} agree" + (f", {wrong} DISAGREE" if wrong else ""))
    return {"rows": rows, "ok": not wrong}
