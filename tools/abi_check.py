"""Checks an installed rat_ext against the reference in float64: outputs, gradients, states, decode, errors.

    python tools/abi_check.py --torch 2.13 --kernels 13.0

Small and quick on purpose. It is run with a compiled file that was built against one torch and another torch beside it
(.ci/run does so in both directions), which is the proof that one build runs on every torch from 2.11 on.

--torch: the version that must be found beside it. --kernels: the CUDA version that must be compiled in, or "none".
"""

import argparse
import sys

import torch

import rat_ext
from rat_ext import reference

L, T, H, G, D = 5, 23, 4, 2, 16  # T is no multiple of L


def inputs(batch: int) -> dict:
    torch.manual_seed(0)
    groups = {name: torch.randn(batch, T, G, D, dtype=torch.float64) for name in ("q", "k")}
    heads = {name: torch.randn(batch, T, H, D, dtype=torch.float64) for name in ("v", "gate", "out_gate")}
    cos, sin = rat_ext.rotary_tables(T // L + 2, D, dtype=torch.float64)
    return groups | heads | {"rotary_cos": cos, "rotary_sin": sin}


def with_gradients(function, arguments: dict, **options) -> list:
    arguments = {k: v.clone().requires_grad_(not k.startswith("rotary")) for k, v in arguments.items()}
    y = function(**arguments, **options)
    y.backward(torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y))
    return [y.detach(), *(x.grad for x in arguments.values() if x.requires_grad)]


def compare(what: str, ours, expected) -> None:
    error = max((a - b).abs().max().item() for a, b in zip(ours, expected, strict=True))
    print(f"{what:<28} largest error {error:.1e}")
    if not error < 1e-9:
        sys.exit(f"{what}: rat_ext and its reference disagree")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="")
    parser.add_argument("--kernels", default="")
    wanted = parser.parse_args()
    info = rat_ext.build_info()
    print(info)
    if not torch.__version__.startswith(wanted.torch):
        sys.exit(f"expected torch {wanted.torch}, found {torch.__version__}")
    if wanted.kernels and wanted.kernels != str(info["cuda"]).lower():
        sys.exit(f"expected CUDA {wanted.kernels} to be compiled in, found {info['cuda']}")

    dense, packed = inputs(2), inputs(1)
    cuts = torch.tensor([0, 0, 7, T], dtype=torch.int32)
    for name, arguments, options in (("dense", dense, {}), ("packed", packed, {"cu_seqlens": cuts})):
        results = [with_gradients(m.rat_attention, arguments, chunk_size=L, **options) for m in (rat_ext, reference)]
        compare(f"rat_attention, {name}", *results)
        recurrence = {"x": arguments["v"], "gate": arguments["gate"]}
        options["chunk_size"] = L
        results = [with_gradients(m.chunk_recurrence, recurrence, **options) for m in (rat_ext, reference)]
        compare(f"chunk_recurrence, {name}", *results)

    whole = rat_ext.rat_attention(**dense, chunk_size=L)
    tokens = {k: v for k, v in dense.items() if not k.startswith("rotary")}
    tables = {k: v for k, v in dense.items() if k.startswith("rotary")}
    start = {k: v[:, :12] for k, v in tokens.items()}
    y, cache = rat_ext.rat_attention(**start, **tables, chunk_size=L, return_state=True)
    cache = cache.reserve(T)
    rest = [{k: v[:, t] for k, v in tokens.items()} for t in range(12, T)]
    steps = [rat_ext.rat_decode_step(**token, **tables, cache=cache) for token in rest]
    compare("prefill and decode", [torch.cat([y, torch.stack(steps, 1)], 1)], [whole])

    try:
        rat_ext.rat_attention(**dense, chunk_size=0)
    except ValueError as error:
        print(f"an error arrives as one: {error}")
    else:
        sys.exit("chunk_size=0 raised no ValueError")


if __name__ == "__main__":
    main()
