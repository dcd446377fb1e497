"""Windows of the shards that ``prepare`` wrote, in an order that depends on the seed alone; batches of them, packed or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._extra import read_json, wrong

IGNORED = -100


class Tokens:
    """The tokens of a split, as one sequence over memory-mapped shards."""

    def __init__(self, folder: str | Path, split: str = "train"):
        self.folder = Path(folder)
        index = self.folder / "index.json"
        if not index.is_file():
            raise wrong("data", "folder", "one that `python -m rat_ext.train prepare` completed", folder)
        self.index: dict = read_json(index, "data", "folder")
        self.dtype, self.eos = np.dtype(self.index["dtype"]), int(self.index["eos"])
        self.shards = [shard for shard in self.index["shards"] if shard["split"] == split]
        self.ends = np.cumsum([0] + [shard["tokens"] for shard in self.shards])
        self.bytes = sum(shard["bytes"] for shard in self.shards)
        for shard in self.shards:
            path = self.folder / f"{shard['file']}.bin"
            if not path.is_file() or path.stat().st_size != shard["tokens"] * self.dtype.itemsize:
                raise wrong("data", "shard", f"{shard['tokens']} tokens in {path}", "another size, or no file")
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict:
        return vars(self) | {"_maps": {}}  # a process of a loader maps the files itself

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop``, int64; fewer at the end."""
        parts = []
        stop = min(stop, len(self))
        while start < stop:
            i = int(np.searchsorted(self.ends, start, side="right")) - 1
            if i not in self._maps:
                self._maps[i] = np.memmap(self.folder / f"{self.shards[i]['file']}.bin", dtype=self.dtype, mode="r")
            part = self._maps[i][start - self.ends[i] : stop - self.ends[i]]
            parts.append(part.astype(np.int64))
            start += len(part)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


class Windows(torch.utils.data.Dataset):
    """Consecutive windows of T tokens and the token after each of them.

    An item is ``input_ids`` and ``labels``, ``(T,)`` int64 each: label t is the token after input t, and -100 where input t is
    EOS, because nothing tells what document comes next. The last window is filled up with EOS, without labels.

    Args:
        tokens: the split.
        length: T.
        items: how many items there are. None: one per window. With a number, windows are drawn in rounds: each round has every
            full window once, in an order of its own. Item i is the same whatever the number of items, ranks and processes.
        seed: of the orders. None: in the order of the text.
    """

    def __init__(self, tokens: Tokens, length: int, items: int | None = None, seed: int | None = None):
        self.tokens, self.length, self.seed = tokens, length, seed
        self.windows = (len(tokens) - 1) // length if items is not None else -(-(len(tokens) - 1) // length)
        if self.windows < 1:
            raise wrong("data", "tokens", f"more than T = {length if items is not None else 1} in the split", len(tokens))
        self.items = self.windows if items is None else items
        self._round: tuple[int, np.ndarray | None] = (-1, None)

    def __len__(self) -> int:
        return self.items

    def window(self, item: int) -> int:
        """Number of the window that is ``item``."""
        turn, place = divmod(item, self.windows)
        if self.seed is None:
            return place
        if self._round[0] != turn:
            self._round = (turn, np.random.default_rng((self.seed, turn)).permutation(self.windows))
        order = self._round[1]
        assert order is not None
        return int(order[place])

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        if not 0 <= item < self.items:
            raise IndexError(item)  # what ends an iteration
        start = self.window(item) * self.length
        found = self.tokens.read(start, start + self.length + 1)
        inputs = np.full(self.length, self.tokens.eos)
        labels = np.full(self.length, IGNORED)
        inputs[: len(found)] = found[: self.length]
        labels[: len(found) - 1] = found[1:]
        labels[inputs == self.tokens.eos] = IGNORED
        return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}


def collate(items: Sequence[dict[str, Tensor]], eos: int | None = None) -> dict[str, Any]:
    """A batch for the model. ``shift_labels`` says that labels are shifted already; ``labels`` are what Trainer counts.

    Args:
        items: of :class:`Windows`.
        eos: None: ``(B, T)``, documents run into each other as in the paper. A number: one packed row ``(1, B T)`` with
            ``cu_seq_lens_q``: a sequence ends with each window and after each ``eos``.
    """
    inputs = torch.stack([item["input_ids"] for item in items])
    labels = torch.stack([item["labels"] for item in items])
    if eos is None:
        return {"input_ids": inputs, "labels": labels, "shift_labels": labels}
    last = inputs == eos
    last[:, -1] = True
    ends = last.flatten().nonzero()[:, 0] + 1
    sizes = ends.diff(prepend=ends.new_zeros(1))
    cu_seqlens = torch.cat((ends.new_zeros(1), ends)).to(torch.int32)
    labels = labels.view(1, -1)
    return {
        "input_ids": inputs.view(1, -1), "labels": labels, "shift_labels": labels,
        "cu_seq_lens_q": cu_seqlens, "max_length_q": int(sizes.max()),
    }  # fmt: skip
