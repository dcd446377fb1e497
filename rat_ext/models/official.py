"""Checkpoints of the authors' training code, as models of this package. Loading one executes nothing that is in it."""

from __future__ import annotations

import collections
import os
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .config import PATTERNS, RATConfig
from .modeling import RATForCausalLM

KINDS = {"rat": "rat", "attention": "attention", "local_attention": "sliding_attention", "rnn": "rnn"}
NAMES = {
    "seq_layer.in_proj.weight": "mixer.in_proj.weight",
    "seq_layer.gate_bias": "mixer.gate_bias",
    "seq_layer.input_norm.weight": "input_layernorm.weight",
    "seq_layer.out_proj.weight": "mixer.out_proj.weight",
    "hidden_layer.ln.weight": "post_attention_layernorm.weight",
    "hidden_layer.fc1.weight": "mlp.up_proj.weight",
    "hidden_layer.fc2.weight": "mlp.down_proj.weight",
}


class CheckpointError(ValueError):
    """What is wrong with a checkpoint, in one line."""

    def __init__(self, path: str, what: str):
        super().__init__(f"rat_ext.load_official_checkpoint: {path}: {' '.join(what.split())}")


def load_official_checkpoint(path: str | os.PathLike, **overrides: Any) -> RATForCausalLM:
    """A model with the weights of a checkpoint: float32, on the CPU, in eval mode.

    Sizes come from the shapes of the tensors and from the configuration in the file.

    Args:
        path: a file that the authors' code saved: ``task`` holds the tensors, ``config`` the sizes that shapes do not tell.
        overrides: arguments of :class:`RATConfig`, in place of what the file says or lacks.

    Raises:
        ValueError: no such checkpoint, or one with a missing, superfluous or misshapen tensor; one line.
    """
    name = os.fspath(path)
    tensors, config = _read(name)
    try:
        sizes = _sizes(name, tensors, config, overrides)
        made = RATConfig(**sizes)
    except CheckpointError:
        raise
    except Exception as error:  # of the configuration: values that fit no model
        raise CheckpointError(name, f"its sizes make no model: {error}") from None
    state = _convert(name, tensors, made)
    with torch.device("meta"):
        model = RATForCausalLM(made)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _read(path: str) -> tuple[dict[str, Tensor], Mapping]:
    """The tensors by name, without prefixes of wrappers, and the configuration."""
    if not os.path.isfile(path):
        raise CheckpointError(path, "expected a file, got a folder" if os.path.isdir(path) else "there is no such file")
    try:
        # The name of the class that configurations are pickled as stands for a dict; no other class is let in.
        with torch.serialization.safe_globals([(collections.OrderedDict, "easydict.EasyDict")]):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        refused = re.search(r"GLOBAL (\S+)|Unsupported (?:global|class|operand)[^.]*", str(error))
        why = f"it holds more than tensors and plain values ({refused[0]})" if refused else first[0][:200]
        raise CheckpointError(path, f"cannot be read: {why}") from None
    if not isinstance(found, Mapping):
        raise CheckpointError(path, f"expected a dict with the key 'task', got {type(found).__name__}")
    config = found.get("config", {})
    task = found.get("task", found)
    if not isinstance(task, Mapping):
        raise CheckpointError(path, f"task: expected a dict of tensors, got {type(task).__name__}")
    tensors: dict[str, Tensor] = {}
    for key, x in task.items():
        if not isinstance(x, Tensor):
            what = "task" if "task" in found else "expected the key 'task', or tensors"
            raise CheckpointError(path, f"{what}: {key!r} is no tensor but {type(x).__name__}")
        tensors[re.sub(r"(^|(?<=\.))(_orig_mod|module)\.", "", str(key))] = x
    return tensors, config if isinstance(config, Mapping) else {}


def _get(config: Any, *keys: str) -> Any:
    """A nested entry of the configuration, or None."""
    for key in keys:
        if not isinstance(config, Mapping) or key not in config:
            return None
        config = config[key]
    return config


def _cells(config: Mapping, layers: int) -> list[Mapping]:
    """What the configuration says of each layer; empty where it says nothing."""
    backbone = _get(config, "model", "backbone") or {}
    first, second, step = (_get(backbone, key) for key in ("seq_cell", "seq_cell1", "interleave_step"))
    step = step if isinstance(step, int) and step > 0 else 2
    cells = [second if isinstance(second, Mapping) and i % step == 0 else first for i in range(layers)]
    return [cell if isinstance(cell, Mapping) else {} for cell in cells]


def _shape(path: str, tensors: Mapping[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    if name not in tensors:
        raise CheckpointError(path, f"the tensor {name} is missing")
    if tensors[name].dim() != dims:
        raise CheckpointError(path, f"{name}: expected {dims} dimensions, got shape {tuple(tensors[name].shape)}")
    return tuple(tensors[name].shape)


def _sizes(path: str, tensors: Mapping[str, Tensor], config: Mapping, overrides: dict) -> dict[str, Any]:
    """Arguments of the configuration."""
    vocab, width = _shape(path, tensors, "embedding.wte.weight", 2)
    numbers = {int(found[1]) for key in tensors if (found := re.match(r"backbone\.layers\.(\d{1,6})\.", key))}
    layers = max(numbers, default=-1) + 1
    if layers == 0:
        raise CheckpointError(path, "it has no layers (backbone.layers.0....)")
    if missing := sorted(set(range(layers)) - numbers):
        raise CheckpointError(path, f"the tensors of backbone.layers.{missing[0]} are missing")
    cells = _cells(config, layers)
    rows = [_shape(path, tensors, f"backbone.layers.{i}.seq_layer.in_proj.weight", 2)[0] for i in range(layers)]
    gated = [f"backbone.layers.{i}.seq_layer.gate_bias" in tensors for i in range(layers)]
    pe = _get(config, "model", "embedding", "pe") or {}

    kinds = overrides.get("layer_types")
    if isinstance(kinds, str):
        if kinds not in PATTERNS:
            raise CheckpointError(path, f"layer_types: expected a pattern of {', '.join(PATTERNS)}, or a list, got {kinds!r}")
        kinds = [PATTERNS[kinds][i % 2] for i in range(layers)]
    if kinds is None:
        kinds = [_kind(path, i, cells, gated[i], rows[i] == 3 * width) for i in range(layers)]
    heads = overrides.get("num_attention_heads")
    if heads is None:
        heads = _heads(path, cells, pe, width, kinds)
    dim = width // heads if isinstance(heads, int) and heads > 0 and width % heads == 0 else 0  # 0: the configuration refuses
    sizes: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": _shape(path, tensors, "backbone.layers.0.hidden_layer.fc1.weight", 2)[0],
        "layer_types": kinds,
    }
    rat = [i for i, kind in enumerate(kinds) if kind == "rat"]
    if rat and dim:
        groups = {(rows[i] - 3 * width) // (2 * dim) for i in rat}
        if len(groups) > 1 and "num_groups" not in overrides:
            raise CheckpointError(path, f"its RAT layers differ in groups: {sorted(groups)}")
        sizes["num_groups"] = max(groups)
        if "chunk_size" not in overrides:
            lengths = [_get(cells[i], "chunk_size") or _get(pe, "chunk_size") for i in rat]
            if any(length is None for length in lengths):
                raise CheckpointError(path, "its config names no chunk_size; give one: chunk_size=L")
            sizes["chunk_size"] = lengths[0]
            if len(set(lengths)) > 1:
                sizes["chunk_size"] = [lengths[rat.index(i)] if i in rat else 1 for i in range(layers)]
    else:
        sizes["num_groups"] = 1
    sliding = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]
    if sliding and "sliding_window" not in overrides:
        windows = {_get(cells[i], "window_size") for i in sliding}
        if len(windows) > 1 or None in windows:
            raise CheckpointError(path, "its config names no single window_size; give one: sliding_window=W")
        sizes["sliding_window"] = windows.pop()
    sizes |= _rotation(path, pe, kinds, dim)
    deviation = _get(config, "model", "backbone", "init", "initializer_range")
    if isinstance(deviation, (int, float)):
        sizes["initializer_range"] = float(deviation)
    for value in (_get(config, "model", "embedding", "seq_len"), _get(config, "data", "seq_len"), _get(pe, "max_seq_len")):
        if isinstance(value, int):
            sizes["max_position_embeddings"] = value
            break
    act, norm = _get(config, "model", "backbone", "hidden_cell", "act_fn"), _get(config, "model", "backbone", "ln")
    if act not in (None, "gelu") and "hidden_act" not in overrides:
        raise CheckpointError(path, f"config: act_fn: expected gelu, got {act!r}")
    if norm not in (None, "rmsnorm"):
        raise CheckpointError(path, f"config: ln: expected rmsnorm, got {norm!r}")
    head, tied = tensors.get("head.lm_head.weight"), _get(config, "task", "tie_embedding")
    sizes["tie_word_embeddings"] = head is None or (
        head.shape == tensors["embedding.wte.weight"].shape and torch.equal(head, tensors["embedding.wte.weight"])
    )
    if head is None and tied is False:
        raise CheckpointError(path, "the tensor head.lm_head.weight is missing, and its config ties no embeddings")
    return sizes | overrides


def _kind(path: str, i: int, cells: list[Mapping], gated: bool, thrice: bool) -> str:
    """What layer i is: what its tensors can be, and the configuration says."""
    able = {"rnn" if thrice else "rat"} if gated else {"attention", "sliding_attention"}
    said = KINDS.get(str(_get(cells[i], "_name_")))
    if said in able:
        return said
    if not gated and (not thrice or said in ("rat", "rnn")):
        raise CheckpointError(path, f"the tensor backbone.layers.{i}.seq_layer.gate_bias is missing")
    others = {kind for cell in cells if (kind := KINDS.get(str(_get(cell, "_name_")))) in able}
    found = others or able
    if len(found) > 1:
        raise CheckpointError(path, f"its config does not tell what layer {i} is; give layer_types")
    return str(found.pop())


def _rotation(path: str, pe: Any, kinds: Any, dim: int) -> dict[str, Any]:
    """Base of the rotations; None where the configuration names none. RNN layers have none to name."""
    wanted = {{"rat": "interrope", "rnn": ""}.get(kind, "rope") for kind in kinds} - {""}
    name, base = _get(pe, "_name_"), _get(pe, "base")
    if not wanted or name is None:
        return {} if base is None else {"rope_theta": float(base)}
    if name == "empty":
        return {"rope_theta": None}
    if name not in ("rope", "interrope", "rope_interrope") or not wanted <= set(name.split("_")):
        raise CheckpointError(path, f"config: pe: expected {'_'.join(sorted(wanted, reverse=True))}, got {name!r}")
    if dim and _get(pe, "dim") not in (None, dim):
        raise CheckpointError(path, f"config: pe: expected dim {dim}, the size of a head, got {_get(pe, 'dim')!r}")
    return {} if base is None else {"rope_theta": float(base)}


def _heads(path: str, cells: list[Mapping], pe: Any, width: int, kinds: Any) -> int:
    for cell in cells:
        count, dim = _get(cell, "num_head"), _get(cell, "d_head")
        if isinstance(count, int) and count > 0:
            return count
        if isinstance(dim, int) and dim > 0:
            return width // dim
    dim = _get(pe, "dim")
    if isinstance(dim, int) and dim > 0:
        return width // dim
    if set(kinds) == {"rnn"}:  # it has no heads: any that divide its width
        for dim in (128, 64, 256, *range(248, 0, -8)):
            if width % dim == 0:
                return width // dim
    raise CheckpointError(path, "its config names no num_head or d_head; give num_attention_heads")


def _convert(path: str, tensors: Mapping[str, Tensor], config: RATConfig) -> dict[str, Tensor]:
    """The state of the model: rows in this package's order, heads in the order of their groups."""
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in RATForCausalLM(config).state_dict().items()}
    width, heads, dim, groups = config.hidden_size, config.num_attention_heads, config.head_dim, config.num_groups
    names = {"embedding.wte.weight": "model.embed_tokens.weight", "backbone.ln.weight": "model.norm.weight"}
    if not config.tie_word_embeddings:
        names["head.lm_head.weight"] = "lm_head.weight"
    for i, kind in enumerate(config.layer_types):
        for theirs, ours in NAMES.items():
            if "gate_bias" not in theirs or kind in ("rat", "rnn"):
                names[f"backbone.layers.{i}.{theirs}"] = f"model.layers.{i}.{ours}"
    unknown = [key for key in tensors if key not in names and key != "head.lm_head.weight"]
    if unknown:
        raise CheckpointError(path, f"the tensor {unknown[0]} belongs to no layer that this package has")
    state: dict[str, Tensor] = {}
    for theirs, ours in names.items():
        if theirs not in tensors:
            raise CheckpointError(path, f"the tensor {theirs} is missing")
        x, shape = tensors[theirs], shapes[ours]
        if "gate_bias" in theirs and x.dim() == 1 and x.numel() == shape.numel():
            x = x.view(shape)
        if x.shape != shape or not x.is_floating_point():
            got = f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(tensors[theirs].shape)}"
            raise CheckpointError(path, f"{theirs}: expected floats of shape {tuple(shape)}, got {got}")
        state[ours] = x.float()
    # There head h uses group h mod G, here h // (H / G): head p here is that of the same group there.
    place = torch.arange(heads)
    order = (place % (heads // groups)) * groups + place // (heads // groups)

    def by_heads(x: Tensor) -> Tensor:
        return x.unflatten(0, (heads, dim))[order].flatten(0, 1)

    for i, kind in enumerate(config.layer_types):
        prefix = f"model.layers.{i}.mixer."
        rows = state[prefix + "in_proj.weight"]
        if kind == "rat":
            out_gate, v, gate, q, k = rows.split((width, width, width, groups * dim, groups * dim))
            rows = torch.cat((q, k, by_heads(v), by_heads(gate), by_heads(out_gate)))
            state[prefix + "gate_bias"] = state[prefix + "gate_bias"][order]
            state[prefix + "out_proj.weight"] = by_heads(state[prefix + "out_proj.weight"].t()).t().contiguous()
        elif kind == "rnn":
            out_gate, v, gate = rows.split(width)
            rows = torch.cat((v, gate, out_gate))
        else:
            v, q, k = rows.split(width)
            rows = torch.cat((q, k, v))
        state[prefix + "in_proj.weight"] = rows
    # Copies: what is mapped from the file stays no part of the model.
    state = {name: x.clone() for name, x in state.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state
