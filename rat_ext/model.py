"""A small language model of RAT layers: enough to train, prefill and decode."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cache import RATCache
from .layers import RATLayer


class SwiGLU(nn.Module):
    """``(..., d_model) -> (..., d_model)``: ``down(silu(gate) * up)``, gate and up from one projection."""

    def __init__(self, d_model: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(d_model, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm residual block: RAT, then a SwiGLU MLP."""

    def __init__(self, layer: RATLayer, d_model: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(d_model), nn.RMSNorm(d_model)
        self.rat, self.mlp = layer, SwiGLU(d_model, hidden)

    def forward(self, x: Tensor, cache: RATCache | None, return_state: bool, cu_seqlens: Tensor | None):
        y = self.rat(self.norm1(x), cache, return_state, cu_seqlens)
        y, state = y if return_state else (y, None)
        x = x + y
        return x + self.mlp(self.norm2(x)), state

    def step(self, x: Tensor, cache: RATCache) -> Tensor:
        x = x + self.rat.step(self.norm1(x), cache)
        return x + self.mlp(self.norm2(x))


class RATLM(nn.Module):
    """Embedding, blocks of :class:`rat_ext.layers.RATLayer` and a SwiGLU MLP, RMSNorm, head.

    Args:
        vocab_size: V.
        d_model: width; hidden width of the MLPs is 8/3 of it, rounded up to a multiple of 8, unless ``hidden`` is
            given.
        num_layers: blocks.
        num_heads, num_groups, chunk_size, max_length: of every RAT layer.
        tie_embeddings: the head uses the embedding's weights.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        num_groups: int,
        chunk_size: int,
        *,
        hidden: int | None = None,
        max_length: int = 2048,
        tie_embeddings: bool = True,
    ):
        super().__init__()
        hidden = hidden or -(-d_model // 3) * 8
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(
            Block(RATLayer(d_model, num_heads, num_groups, chunk_size, max_length=max_length), d_model, hidden)
            for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02 if tie_embeddings else 1.0)
        nn.init.normal_(self.head.weight, std=0.02)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        for block in self.blocks:  # the sum over blocks starts with the variance of one
            for linear in (block.rat.out_proj, block.mlp.down):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5 * (2 * num_layers) ** -0.5)

    def forward(
        self,
        tokens: Tensor,
        caches: list[RATCache] | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[RATCache]]:
        """Logits of the next token at every position.

        Args:
            tokens: ``(B, T)`` int64.
            caches: one state a layer to continue from.
            return_state: also return the states after the last token, one a layer.
            cu_seqlens: ``(N + 1,)`` int32: sequences packed in one row, B = 1.

        Returns:
            ``(B, T, V)``; with ``return_state``, that and a list of :class:`rat_ext.RATCache`.
        """
        if caches is None:
            caches = [None] * len(self.blocks)
        _check_caches(caches, self.blocks)
        x = self.embedding(tokens)
        states = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, state = block(x, cache, return_state, cu_seqlens)
            states.append(state)
        logits = self.head(self.norm(x))
        return (logits, states) if return_state else logits

    @torch.no_grad()
    def step(self, tokens: Tensor, caches: list[RATCache]) -> Tensor:
        """Logits ``(B, V)`` after one more token ``(B,)`` a sequence; updates the caches in place."""
        _check_caches(caches, self.blocks)
        x = self.embedding(tokens)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block.step(x, cache)
        return self.head(self.norm(x))

    def new_caches(self, batch: int, max_length: int) -> list[RATCache]:
        """Empty caches, one a layer."""
        return [block.rat.new_cache(batch, max_length) for block in self.blocks]

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        return_logits: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Continues ``prompt``: one forward over it (prefill), then one decode step a token.

        Args:
            prompt: ``(B, T)`` int64, T >= 1.
            max_new_tokens: n, at least 1.
            temperature: of the softmax that tokens are drawn from; 0 takes the most likely one.
            top_k: draw from the k most likely tokens only.
            generator: source of randomness, on the device of the model.
            return_logits: also return the logits that each new token was drawn from.

        Returns:
            ``(B, T + n)``; with ``return_logits``, that and ``(B, n, V)``.
        """
        if prompt.dim() != 2 or prompt.shape[1] < 1 or max_new_tokens < 1:
            raise ValueError(
                "RATLM.generate: prompt, max_new_tokens: expected (B, T) with T >= 1 and n >= 1, got "
                f"{tuple(prompt.shape)} and {max_new_tokens}"
            )
        if temperature < 0:
            raise ValueError(f"RATLM.generate: temperature: expected at least 0, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"RATLM.generate: top_k: expected at least 1 or None, got {top_k}")
        logits, caches = self(prompt, return_state=True)
        caches = [cache.reserve(prompt.shape[1] + max_new_tokens) for cache in caches]
        tokens, seen, logits = [prompt], [], logits[:, -1]
        for i in range(max_new_tokens):
            if i:
                logits = self.step(tokens[-1][:, 0], caches)
            seen.append(logits)
            tokens.append(_draw(logits, temperature, top_k, generator))
        result = torch.cat(tokens, dim=1)
        return (result, torch.stack(seen, dim=1)) if return_logits else result


def _check_caches(caches: list, blocks: nn.ModuleList) -> None:
    if len(caches) != len(blocks):
        raise ValueError(f"RATLM: caches: expected one for each of the {len(blocks)} layers, got {len(caches)}")


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """A token ``(B, 1)`` from logits ``(B, V)``."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
