"""The shards that ``python -m rat_ext.train prepare`` wrote, as torchtitan's data loader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader

from ..data import Tokens, Windows, collate


class Shards(BaseDataLoader):
    """Windows of T tokens without an end: each round has all of them, in an order of its own.

    The order depends on the seed alone, and what was read is one number, so that a run goes on with the next windows on another
    number of ranks too.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """``dataset_path``: the folder; ``dataset``: "train" or "validation"; ``seed``: of the order."""

        dataset: str = "train"
        dataset_path: str | None = "data"
        seed: int = 0

    def __init__(self, config: Config, *, dp_world_size: int, dp_rank: int, seq_len: int, local_batch_size: int, **unused: Any):
        assert config.dataset_path is not None
        self.windows = Windows(Tokens(config.dataset_path, config.dataset), seq_len, items=1 << 62, seed=config.seed)
        self.ranks, self.rank, self.size = dp_world_size, dp_rank, local_batch_size
        self.read = 0  # windows, by all ranks

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            first = self.read + self.rank * self.size
            batch = collate([self.windows[first + i] for i in range(self.size)])
            self.read += self.ranks * self.size
            tokens, labels = batch["input_ids"], batch["labels"]
            # The model needs none; what cuts rows for context parallelism cuts them as well.
            positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
            yield {"input": tokens, "positions": positions}, labels

    def state_dict(self) -> dict[str, Any]:
        """How many windows were read."""
        return {"windows_read": self.read}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on after them."""
        self.read = int(state_dict.get("windows_read", 0))
