"""The paper's models: RAT, attention, sliding-window and RNN layers in one decoder, in the form transformers expects."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ..cache import RATCache, state_dtype
from ..ops import chunk_recurrence, rat_attention_packed, rat_decode_step
from . import attention
from .cache import DRAFT, ENDLESS, KeysAndValues, RATModelCache, RATStates, Record, RNNStates
from .config import RATConfig
from .layout import Layout, make_layout, packed_sequences, wrong
from .loss import IGNORED, linear_cross_entropy

# How this version of transformers calls the cache, in arguments and results.
CACHE = "cache" if "cache" in {f.name for f in dataclasses.fields(BaseModelOutputWithPast)} else "past_key_values"


class Linear(nn.Linear):
    """Without a bias; drawn from N(0, std), also by wrappers that reset module by module."""

    def __init__(self, in_features: int, out_features: int, std: float):
        self.std = std
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=self.std)


class Head(Linear):
    """Hidden states to logits of the next token, to the loss, or to both.

    One call a forward, of everything: wrappers that gather its weight, as FSDP2 does in a group with the embedding, count it.
    """

    def forward(self, x: Tensor, labels: Tensor | None = None, keep: slice | Tensor | None = None) -> Any:
        """Logits ``(B, T, V)``; with ``labels`` ``(B * T,)`` the sum of the losses, and logits of columns ``keep``, if any."""
        if labels is None:
            return super().forward(x)
        if self.bias is None and type(self.weight) in (Tensor, nn.Parameter):
            total = linear_cross_entropy(x.flatten(0, 1), self.weight, labels)
        else:  # of a sharded weight only the product is known
            total = _cross_entropy(super().forward(x), labels)
        return total, None if keep is None else super().forward(x[:, keep])


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=IGNORED, reduction="sum")


class Embedding(nn.Embedding):
    """Drawn from N(0, std), also by wrappers that reset module by module."""

    def __init__(self, num_embeddings: int, embedding_dim: int, std: float):
        self.std = std
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=self.std)


class Mixer(nn.Module):
    """What mixes tokens: one projection in, one out. ``(B, T, d_model) -> (B, T, d_model)``.

    Subclasses name the heads of the projection, in order, and compute ``(B, T, H, D)`` of them.
    """

    parts: tuple[int, ...]

    def __init__(self, config: RATConfig, layer: int, parts: tuple[int, ...]):
        super().__init__()
        self.layer, self.parts = layer, parts
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        width = self.num_heads * self.head_dim
        self.in_proj = Linear(width, sum(parts) * self.head_dim, config.initializer_range)
        self.out_proj = Linear(width, width, config.initializer_range)

    def split(self, projection: Tensor) -> tuple[Tensor, ...]:
        """The parts of a projection ``(..., W)``, each ``(..., heads, D)``."""
        return projection.unflatten(-1, (-1, self.head_dim)).split(self.parts, dim=-2)

    def mix(self, projection: Tensor, layout: Layout) -> Tensor:
        """The result for a projection, ``(B, T, H, D)``."""
        raise RuntimeError("a Mixer mixes nothing; its subclasses do")

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        return self.out_proj(self.mix(self.in_proj(x), layout).flatten(2))


class Gated(Mixer):
    """A mixer with a forget gate, whose bias starts at log U(1, L - 1): time scales from one token to a chunk."""

    def __init__(self, config: RATConfig, layer: int, parts: tuple[int, ...], longest: int):
        super().__init__(config, layer, parts)
        self.longest = longest
        self.gate_bias = nn.Parameter(torch.empty(self.num_heads, self.head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The gate's bias: zeros for L <= 2, where the logarithm has no range."""
        if self.longest <= 2:
            init.zeros_(self.gate_bias)
        elif self.gate_bias.device.type != "meta":
            with torch.no_grad():
                # Of its own dtype at least float32: a bias in bfloat16 would be drawn from 256 values.
                drawn = torch.empty_like(self.gate_bias, dtype=state_dtype(self.gate_bias.dtype))
                init.copy_(self.gate_bias, drawn.uniform_(1, self.longest - 1).log_())

    @property
    def bias(self) -> Tensor:
        """The gate's bias; this rank's heads, where the layer is split by heads."""
        bias: Any = self.gate_bias
        return bias.to_local() if hasattr(type(bias), "to_local") else bias  # of the type: a tracer finds it there alone


class RAT(Gated):
    """The layer of the paper: :func:`rat_ext.rat_attention_packed` on q, k, v, gate, out_gate."""

    def __init__(self, config: RATConfig, layer: int):
        groups, heads, self_size = config.num_groups, config.num_attention_heads, config.chunk_sizes[layer]
        super().__init__(config, layer, (groups, groups, heads, heads, heads), self_size)
        self.num_groups, self.chunk_size = groups, self_size

    def mix(self, projection: Tensor, layout: Layout) -> Tensor:
        cos, sin = layout.tables.get(self.chunk_size, (None, None))
        call = functools.partial(
            rat_attention_packed, projection, self.num_heads, self.num_groups, self.chunk_size, gate_bias=self.bias,
            rotary_cos=cos, rotary_sin=sin, cu_seqlens=layout.cu_seqlens,
        )  # fmt: skip
        if layout.cache is None:
            return cast(Tensor, call(context_parallel=layout.context_parallel))
        states = layout.cache.states[self.layer]
        assert isinstance(states, RATStates)
        if states.recording:
            return self._recorded(states, layout, projection)
        if layout.start != 0 and layout.tokens == 1 and layout.cu_seqlens is None and not torch.is_grad_enabled():
            q, k, v, gate, out_gate = self.split(projection)
            state = self._room(states, layout.cache)
            y = rat_decode_step(
                q[:, 0], k[:, 0], v[:, 0], gate[:, 0], state, gate_bias=self.bias, out_gate=out_gate[:, 0],
                rotary_cos=cos, rotary_sin=sin,
            )  # fmt: skip
            return y[:, None]
        y, state = call(initial_state=states.state if layout.start != 0 else None, return_state=True)
        self._store(states, state.detach(), layout)
        return y

    def _recorded(self, states: RATStates, layout: Layout, projection: Tensor) -> Tensor:
        """The result where a crop may follow: the tokens go into a pool, in place, which can take them back."""
        cache, batch, bias = layout.cache, layout.batch, self.bias.detach()
        assert cache is not None
        if torch.is_grad_enabled() and projection.requires_grad:
            raise wrong("past_key_values", "no gradient beside a cache that records (torch.no_grad())", "one")
        cos, sin = layout.tables.get(self.chunk_size, (None, None))
        q, k, v, gate, out_gate = self.split(projection.detach())
        tokens = cache.seen + layout.tokens
        if states.state is None or not states.state.draft_tokens:
            room = max(cache.room(tokens), 0 if states.state is None else states.state.capacity)
            sizes = (batch, gate.shape[-2], self.head_dim, self.chunk_size, room)
            pool = RATCache.empty(*sizes, draft_tokens=DRAFT, dtype=projection.dtype, device=projection.device)
            if states.state is not None:
                pool.write(torch.arange(batch, device=projection.device), states.state)
            states.state = pool
        elif not cache.static and tokens > states.state.capacity:
            states.state = states.state.reserve(cache.room(tokens))
        pool = states.state
        states.count([layout.tokens] * batch if layout.counts is None else layout.counts.tolist())
        if layout.start != 0 and layout.tokens == 1 and layout.cu_seqlens is None:
            y = rat_decode_step(
                q[:, 0], k[:, 0], v[:, 0], gate[:, 0], pool, gate_bias=bias, out_gate=out_gate[:, 0], rotary_cos=cos,
                rotary_sin=sin,
            )  # fmt: skip
            return y[:, None]
        result = rat_attention_packed(
            projection.detach(), self.num_heads, self.num_groups, self.chunk_size, gate_bias=bias, rotary_cos=cos,
            rotary_sin=sin, cu_seqlens=layout.cu_seqlens, cache=pool,
        )  # fmt: skip
        return cast(Tensor, result)

    def _room(self, states: RATStates, cache: RATModelCache) -> RATCache:
        assert states.state is not None
        if not cache.static and cache.seen + 1 > states.state.capacity:
            states.state = states.state.reserve(cache.room(cache.seen + 1))
        return states.state

    def _store(self, states: RATStates, state: RATCache, layout: Layout) -> None:
        cache = layout.cache
        assert cache is not None
        everyone = torch.arange(layout.batch, device=state.lengths.device)
        if state.batch > layout.batch:  # the sequence of all padding
            state = state.read(everyone)
        if not cache.static:
            states.state = state
            return
        if states.state is None:
            assert cache.max_length is not None
            states.state = RATCache.empty(
                layout.batch, self.num_heads, self.head_dim, self.chunk_size, cache.max_length, dtype=state.chunk_k.dtype,
                device=state.chunk_k.device,
            )  # fmt: skip
        rows = states.state.chunk_k.shape[2]
        if state.chunk_k.shape[2] > rows:
            state = state.replace(chunk_k=state.chunk_k[:, :, :rows], chunk_v=state.chunk_v[:, :, :rows])
        states.state.write(everyone, state)


class RNN(Gated):
    """A gated linear recurrence over the whole sequence: v, gate, out_gate; no queries, keys or positions."""

    def __init__(self, config: RATConfig, layer: int):
        heads = config.num_attention_heads
        super().__init__(config, layer, (heads, heads, heads), config.max_position_embeddings)

    def keep(self, states: RNNStates, layout: Layout, v: Tensor, gate: Tensor) -> None:
        """Records a call, before it changes the states, for a later crop."""
        assert layout.lengths is not None
        if not states.recording:
            return
        if states.state is None:
            before = gate.new_zeros(layout.batch, *gate.shape[2:], dtype=state_dtype(gate.dtype))
        else:
            before = states.state.clone()
        counts = [layout.tokens] * layout.batch if layout.counts is None else layout.counts.tolist()
        v, gate = (layout.align(x).detach() for x in (v, gate))
        states.keep(Record(before, layout.lengths.clone(), v, gate, self.bias.detach(), counts))

    def mix(self, projection: Tensor, layout: Layout) -> Tensor:
        v, gate, out_gate = self.split(projection)
        bias, cu_seqlens, cache = self.bias, layout.cu_seqlens, layout.cache
        if cache is None:
            ranks = layout.context_parallel
            y = chunk_recurrence(v, gate, ENDLESS, gate_bias=bias, cu_seqlens=cu_seqlens, context_parallel=ranks)
            return cast(Tensor, y) * out_gate.sigmoid()
        states = cache.states[self.layer]
        assert isinstance(states, RNNStates)
        self.keep(states, layout, v, gate)
        past = layout.start != 0
        y, state = chunk_recurrence(
            v, gate, ENDLESS, gate_bias=bias, cu_seqlens=cu_seqlens, initial_state=states.state if past else None,
            lengths=layout.lengths if past else None, return_state=True,
        )  # fmt: skip
        state = state.detach()[: layout.batch]
        if cache.static and states.state is not None:
            states.state.copy_(state)
        else:
            states.state = state
        return y * out_gate.sigmoid()


class Attention(Mixer):
    """Causal attention with rotation by token, over all tokens or a window: q, k, v."""

    def __init__(self, config: RATConfig, layer: int):
        super().__init__(config, layer, (config.num_attention_heads,) * 3)
        self.window = config.sliding_window if config.layer_types[layer] == "sliding_attention" else None

    def mix(self, projection: Tensor, layout: Layout) -> Tensor:
        q, k, v = self.split(projection)
        if layout.angles is not None:
            q, k = attention.rotate(q, layout.angles), attention.rotate(k, layout.angles)
        if layout.context_parallel is not None:
            from ..parallel import attention as attention_of_ranks

            return attention_of_ranks(q, k, v, layout.context_parallel, window=self.window)
        if layout.cache is None:
            return attention.attend(q, k, v, layout, self.window)
        state = layout.cache.states[self.layer]
        assert isinstance(state, KeysAndValues)
        if layout.start != 0:
            return attention.continue_from(q, k, v, state, layout, self.window)
        y = attention.attend(q, k, v, layout, self.window)
        attention.remember(k, v, state, layout)
        return y


MIXERS: dict[str, type[RAT] | type[Attention] | type[RNN]] = {
    "rat": RAT,
    "attention": Attention,
    "sliding_attention": Attention,
    "rnn": RNN,
}


class FeedForward(nn.Module):
    """GELU or SwiGLU between two projections."""

    def __init__(self, config: RATConfig):
        super().__init__()
        assert config.intermediate_size is not None
        self.gated = config.hidden_act == "swiglu"
        width, hidden, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.up_proj = Linear(width, hidden * (2 if self.gated else 1), std)  # gated: gate, then up
        self.down_proj = Linear(hidden, width, std)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up_proj(x)
        if not self.gated:
            return self.down_proj(F.gelu(x))
        gate, up = x.chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class RATDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm residual block: a mixer of tokens, then a feed-forward."""

    def __init__(self, config: RATConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = MIXERS[config.layer_types[layer]](config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, hidden_states: Tensor, layout: Layout) -> Tensor:
        hidden_states = hidden_states + self.mixer(self.input_layernorm(hidden_states), layout)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class RATPreTrainedModel(PreTrainedModel):
    """What the models share: initialisation, loading, saving."""

    config: RATConfig
    config_class = RATConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RATDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module) -> None:
        """The authors': N(0, initializer_range), ones for norms, log U(1, L - 1) for gate biases."""
        if isinstance(module, Gated):
            module.reset_parameters()
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)


class RATModel(RATPreTrainedModel):
    """The decoder without a head: token numbers ``(B, T)`` to hidden states ``(B, T, d_model)``.

    Attributes:
        context_parallel: a :class:`rat_ext.parallel.ContextParallel`: a call is of this rank's tokens of a longer row, without
            mask or cache, and its labels are ``shift_labels``. :func:`rat_ext.parallel.use_context_parallel` sets it.
    """

    context_parallel: Any = None  # transformers reads annotations: what they name would have to be imported

    def __init__(self, config: RATConfig):
        super().__init__(config)
        self.embed_tokens: nn.Module = Embedding(config.vocab_size, config.hidden_size, config.initializer_range)
        self.layers = nn.ModuleList([RATDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding."""
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RATModelCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: RATModelCache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states after the last norm.

        Args:
            input_ids: ``(B, T)`` int64.
            attention_mask: ``(B, S)``, S >= T, 1 for tokens and 0 for padding, wherever it stands; the last T columns are those
                of this call. Padding is taken out before the first layer: a row is computed as it would be alone. The output of
                a padding column is that of the last token before it.
            position_ids: ``(1, T)``, where it does not rise by one, the next of several packed sequences begins. Otherwise
                unused: positions follow from the mask and the cache.
            past_key_values, cache: a :class:`RATModelCache` to continue from, updated in place. One name is enough.
            inputs_embeds: ``(B, T, d_model)`` in place of ``input_ids``.
            use_cache: return a cache (default: the configuration's, where the model is not in training mode).
            output_hidden_states: also return the input of every layer and the final output.
            return_dict: False for a tuple.
            cu_seq_lens_q: ``(N + 1,)`` int32: sequences packed in one row, as of ``DataCollatorWithFlattening``.
            max_length_q: tokens of the longest of them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise wrong("input_ids, inputs_embeds", "one of them", "none" if input_ids is None else "both")
        if kwargs.get("output_attentions"):
            raise wrong("output_attentions", "False: there are no attention weights in memory", True)
        for name, given, dims in (("input_ids", input_ids, 2), ("inputs_embeds", inputs_embeds, 3)):
            if given is not None and (not isinstance(given, Tensor) or given.dim() != dims):
                got = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
                raise wrong(name, f"a tensor of {dims} dimensions, (B, T{', d_model' * (dims - 2)})", got)
        if input_ids is not None and input_ids.dtype not in (torch.int64, torch.int32):
            raise wrong("input_ids", "int64 or int32", str(input_ids.dtype).removeprefix("torch."))
        if inputs_embeds is not None and inputs_embeds.shape[-1] != self.config.hidden_size:
            raise wrong("inputs_embeds", f"a last dimension of {self.config.hidden_size}", inputs_embeds.shape[-1])
        past = past_key_values if cache is None else cache
        if past is not None and not isinstance(past, RATModelCache):
            raise wrong(CACHE, "a rat_ext.models.RATModelCache or None", type(past).__name__)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.context_parallel is not None:
            for name, value in ((CACHE, past), ("attention_mask", attention_mask), ("cu_seq_lens_q", cu_seq_lens_q)):
                if value is not None:
                    raise wrong(name, "None beside context_parallel", type(value).__name__)
            use_cache, position_ids = False, None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            past, use_cache = None, False  # a layer that is computed twice would write twice
        if cu_seq_lens_q is None and past is None and attention_mask is None and position_ids is not None:
            cu_seq_lens_q = packed_sequences(position_ids)
        if past is None and use_cache and cu_seq_lens_q is None:
            past = RATModelCache(self.config)

        layout = make_layout(self.config, x, past, attention_mask, cu_seq_lens_q, max_length_q, self.context_parallel)
        x = layout.pack(x)
        collected = []
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        for layer in self.layers:
            if output_hidden_states:
                collected.append(layout.unpack(x))
            x = layer(x, layout=layout)
        x = layout.unpack(self.norm(x))
        if layout.cache is not None:
            layout.cache.advance(layout.tokens, layout.counts, layout.valid)
        result = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*collected, x) if output_hidden_states else None,
            **{CACHE: layout.cache if use_cache or past is not None else None},
        )
        return result if self.config.return_dict and return_dict is not False else result.to_tuple()


class RATForCausalLM(RATPreTrainedModel, GenerationMixin):
    """The decoder with a head for the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RATConfig):
        super().__init__(config)
        self.model = RATModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = Head(config.hidden_size, config.vocab_size, config.initializer_range)
        self.post_init()
        self.register_load_state_dict_post_hook(lambda module, keys: module._tie())

    def _tie(self) -> None:
        """Makes the head's weight the embedding's again, where tied: what replaces parameters replaces each by itself."""
        head, embedding = self.get_output_embeddings(), self.get_input_embeddings()
        both = type(head) is Head and type(embedding) is Embedding
        if both and self.config.tie_word_embeddings and head.weight is not embedding.weight:
            head.weight = embedding.weight

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self._tie()
        return result

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RATModelCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: RATModelCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits of the next token, and the loss.

        Args:
            labels: ``(B, T)`` int64, shifted here: the label of column t is predicted from column t - 1. -100 is left out, and
                so is what is padding, is predicted from padding or from another packed sequence. Any other that is no token is
                an error on the CPU, and makes the loss NaN on a GPU.
            logits_to_keep: how many of the last columns get logits, or which columns; 0: all.
            kwargs: ``num_items_in_batch`` divides the sum of the losses in place of the number of labels; ``shift_labels``
                are labels that are shifted already. The rest, and the other arguments: as of :class:`RATModel`.

        Returns:
            loss, where there are labels; logits ``(B, T, V)`` in the model's dtype, but not in training mode beside a loss,
            unless ``config.logits_with_loss``: the loss is computed in pieces; the cache; hidden states.
        """
        items, target = kwargs.pop("num_items_in_batch", None), kwargs.pop("shift_labels", None)
        past = past_key_values if cache is None else cache
        if kwargs.get("cu_seq_lens_q") is None and past is None and attention_mask is None and position_ids is not None:
            kwargs["cu_seq_lens_q"] = packed_sequences(position_ids)
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
            past_key_values=past, use_cache=use_cache, output_hidden_states=output_hidden_states, return_dict=True, **kwargs,
        )  # fmt: skip
        x = outputs.last_hidden_state
        loss = logits = None
        if labels is not None and self.model.context_parallel is not None:
            raise wrong("labels", "None beside context_parallel, but shift_labels, cut as the tokens are", "labels")
        for name, given in (("labels", labels), ("shift_labels", target)):
            if given is not None and (not isinstance(given, Tensor) or given.shape != x.shape[:2]):
                got = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
                raise wrong(name, f"a tensor of shape {tuple(x.shape[:2])}", got)
        if target is None and labels is not None:
            target = _shift(labels, attention_mask, kwargs.get("cu_seq_lens_q"))
        kept: slice | Tensor | None = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if target is None:
            logits = self.lm_head(x[:, kept])
        else:
            if self.training and not self.config.logits_with_loss:
                kept = None
            loss, logits = self._loss(x, target, items, kept)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE: getattr(outputs, CACHE)}
        )
        return result if self.config.return_dict and return_dict is not False else result.to_tuple()

    def _loss(
        self, x: Tensor, labels: Tensor, items: Tensor | int | None, kept: slice | Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Mean over the labels of hidden states ``x`` ``(B, T, d_model)``, and the logits of the columns ``kept``."""
        head, labels = self.lm_head, labels.to(x.device).flatten()
        apart = "forward" in vars(head) or getattr(head, "_distribute_module_applied", False)
        if isinstance(head, Head) and not apart:
            total, logits = head(x, labels, kept)
        else:  # an adapter, a quantised weight or one that is split by columns: only the module knows its logits
            logits = head(x)
            total, logits = _cross_entropy(logits, labels), None if kept is None else logits[:, kept]
        return total / ((labels != IGNORED).sum() if items is None else items), logits

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        if model_kwargs.get(CACHE) is not None or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            return
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "static"):
            raise wrong("cache_implementation", "None, dynamic or static", kind)
        length = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
        cache = RATModelCache(self.config, length, static=True) if kind == "static" else RATModelCache(self.config)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[CACHE] = cache

    def create_masks_for_generate(self, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """The mask as it is: the model takes padding out itself."""
        return attention_mask


def _shift(labels: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The label of each column is that of the next one; none where either is padding, or the next begins a sequence."""
    target = labels[:, 1:]
    if mask is not None:
        valid = mask[:, -labels.shape[1] :].to(labels.device).bool()
        target = torch.where(valid[:, 1:] & valid[:, :-1], target, IGNORED)
    target = F.pad(target, (0, 1), value=IGNORED)
    if cu_seqlens is not None:
        target = target.index_fill(1, (cu_seqlens[1:].to(labels.device).long() - 1) % labels.shape[1], IGNORED)
    return target
