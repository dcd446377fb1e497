"""The models in transformers: definition, padding, packing, generation, caches."""

import copy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers", reason="rat_ext.models needs transformers: pip install 'rat_ext[models]'")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DataCollatorWithFlattening, DynamicCache
from transformers.generation.streamers import BaseStreamer

from rat_ext.models import RATConfig, RATForCausalLM, RATModel, RATModelCache
from rat_ext.models.config import PATTERNS
from rat_ext.models.loss import linear_cross_entropy
from rat_ext.models.modeling import CACHE

V = 61
ALL = sorted(PATTERNS)


def config_of(pattern="rat-swa", **changes) -> RATConfig:
    sizes = dict(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, chunk_size=4, sliding_window=5,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return RATConfig(**sizes | {"layer_types": pattern} | changes)


def model_of(pattern="rat-swa", device="cpu", **changes) -> RATForCausalLM:
    """A model of which no weight is special: norms too are drawn."""
    torch.manual_seed(0)
    model = RATForCausalLM(config_of(pattern, **changes)).eval().to(device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(1 + 0.3 * torch.randn_like(p))
    return model


def tokens_of(device, *shape, seed=1) -> torch.Tensor:
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def padded(rows, side, device):
    """(input_ids, attention_mask) of rows of different lengths."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[b, place], mask[b, place] = row, 1
    return ids, mask


def rows_of(device, lengths=(5, 19, 12, 8)):
    return [tokens_of(device, n, seed=n) for n in lengths]


@pytest.fixture(autouse=True)
def one_thread():
    """A CPU's matrix products cut their sums by rows and threads; with one thread a row's bits do not depend on the others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=ALL)
def model(request, device) -> RATForCausalLM:
    return model_of(request.param, device)


# ---- the configuration, registration -----------------------------------------------------------------------------------


def test_auto_classes():
    config = config_of()
    assert isinstance(AutoConfig.for_model("rat"), RATConfig)
    assert type(AutoModel.from_config(config)) is RATModel
    assert type(AutoModelForCausalLM.from_config(config)) is RATForCausalLM


@pytest.mark.parametrize("pattern", ALL)
def test_patterns(pattern):
    config = config_of(pattern, num_hidden_layers=4)
    even, odd = PATTERNS[pattern]
    assert config.layer_types == [even, odd, even, odd]


# By layers, width and heads; docs/models.md has the same numbers.
COUNTS = {
    "200m": (12, 1024, 16, {"rat": 186_946_560, "attention": 183_788_544, "rat-swa": 185_367_552}),
    "1.3b": (24, 2048, 16, {"rat": 1_298_810_880, "attention": 1_273_595_904, "rat-swa": 1_286_203_392}),
    "7b": (32, 4096, 32, {"rat": 6_641_029_120, "attention": 6_573_789_184, "rat-swa": 6_607_409_152}),
}


@pytest.mark.parametrize("size", COUNTS)
def test_presets(size):
    """Parameters, counted and by hand: embedding, two norms and a feed-forward of 8 d^2 per layer, projections, gate's bias."""
    layers, d, heads, counts = COUNTS[size]
    per_layer = {
        "rat": (4 * d + 2 * 2 * d // heads) * d + d,  # v, gate, out_gate, out; q and k of two groups; the gate's bias
        "attention": 4 * d * d,
    }
    per_layer["rat-swa"] = (per_layer["rat"] + per_layer["attention"]) / 2
    for pattern, parameters in counts.items():
        with torch.device("meta"):
            model = RATForCausalLM(RATConfig.preset(size, pattern))
        c = model.config
        assert (c.num_hidden_layers, c.hidden_size, c.num_attention_heads) == (layers, d, heads)
        assert model.num_parameters() == parameters
        assert parameters == 32000 * d + layers * (per_layer[pattern] + 8 * d * d + 2 * d) + d
        page = Path(__file__).parents[1] / "docs" / "models.md"
        assert not page.exists() or f" {parameters:,} |" in page.read_text()
    with torch.device("meta"):
        model = RATForCausalLM(RATConfig.preset(size))
    if size == "1.3b":
        c = model.config
        assert (c.num_hidden_layers, c.hidden_size, c.head_dim, c.num_groups, c.chunk_size) == (24, 2048, 128, 2, 16)
        assert (c.sliding_window, c.vocab_size, c.intermediate_size) == (1024, 32000, 8192)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": "nope"}, "layer_types: expected a pattern of .*, or a list, got 'nope'"),
        ({"layer_types": ["rat"]}, "layer_types: expected one of .* for each of the 2 layers"),
        ({"layer_types": ["rat", "mamba"]}, "layer_types: expected"),
        ({"chunk_size": 0}, "chunk_size: expected a number from 1 on, or a list of 2 of them, got 0"),
        ({"chunk_size": [4]}, "chunk_size: expected"),
        ({"num_groups": 3}, "num_groups: expected a divisor of num_attention_heads = 4, got 3"),
        ({"num_attention_heads": 3}, "num_attention_heads: expected heads of a size"),
        ({"sliding_window": -1}, "sliding_window: expected an int of at least 0, got -1"),
        ({"sliding_window": "x"}, "sliding_window: expected an int of at least 0, got 'x'"),
        ({"hidden_act": "relu"}, "hidden_act: expected gelu or swiglu, got 'relu'"),
        ({"vocab_size": 64.5}, "vocab_size: expected an int of at least 1, got 64.5"),
        ({"num_attention_heads": "4"}, "num_attention_heads: expected an int of at least 1, got '4'"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps: expected a finite number of at least 0, got -1.0"),
        ({"initializer_range": float("nan")}, "initializer_range: expected a finite number of at least 0, got nan"),
        ({"max_position_embeddings": 0}, "max_position_embeddings: expected an int of at least 1, got 0"),
        ({"rope_theta": "x"}, "rope_theta: expected a finite number above 0, or None, got 'x'"),
    ],
)
def test_wrong_configurations(changes, words):
    with pytest.raises(ValueError, match=f"^rat_ext.RATConfig: {words}"):
        config_of(**changes)
    with pytest.raises(ValueError, match="^rat_ext.RATConfig: preset: expected one of 200m, 1.3b, 7b, got '3b'"):
        RATConfig.preset("3b")


def test_configurations_are_kept(tmp_path):
    config = config_of("rat-swa", chunk_size=[4, 8])
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.layer_types == config.layer_types and again.chunk_sizes == [4, 8] and again.hidden_size == 32


# ---- the definition ----------------------------------------------------------------------------------------------------


def attention_by_hand(q, k, v, window):
    """(B, T, H, D), in float64."""
    back = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    mask = (back >= 0) & (back <= window)
    s = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhts,bshd->bthd", s.masked_fill(~mask, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("act", ["gelu", "swiglu"])
@pytest.mark.parametrize("pattern", ALL)
def test_the_definition(pattern, act):
    """The whole model in float64, written down again from the definition of its layers."""
    from rat_ext import reference, rotary_tables
    from rat_ext.rotary import rotate

    model = model_of(pattern, hidden_act=act).double()
    ids, config = tokens_of("cpu", 2, 23), model.config
    x = model.model.embed_tokens.weight[ids]

    def norm(layer, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * layer.weight

    for kind, layer in zip(config.layer_types, model.model.layers, strict=True):
        parts = (norm(layer.input_layernorm, x) @ layer.mixer.in_proj.weight.T).unflatten(-1, (-1, 8))
        if kind == "rat":
            q, k, v, gate, out_gate = parts.split((2, 2, 4, 4, 4), dim=2)
            cos, sin = rotary_tables(6, 8, dtype=torch.float64)
            y = reference.rat_attention(
                q, k, v, gate, 4, gate_bias=layer.mixer.gate_bias, out_gate=out_gate, rotary_cos=cos, rotary_sin=sin
            )
        elif kind == "rnn":
            v, gate, out_gate = parts.split(4, dim=2)
            f, state, y = (gate + layer.mixer.gate_bias).sigmoid(), 0.0, []
            for t in range(23):
                state = f[:, t] * state + (1 - f[:, t]) * v[:, t]
                y.append(state)
            y = torch.stack(y, dim=1) * out_gate.sigmoid()
        else:
            q, k, v = parts.split(4, dim=2)
            cos, sin = (table[:, None] for table in rotary_tables(23, 8, dtype=torch.float64))
            y = attention_by_hand(rotate(q, cos, sin), rotate(k, cos, sin), v, 5 if kind == "sliding_attention" else 23)
        x = x + y.flatten(2) @ layer.mixer.out_proj.weight.T
        hidden = norm(layer.post_attention_layernorm, x) @ layer.mlp.up_proj.weight.T
        if act == "gelu":
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        else:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = gate * gate.sigmoid() * up
        x = x + hidden @ layer.mlp.down_proj.weight.T
    want = norm(model.model.norm, x) @ model.model.embed_tokens.weight.T
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens", [1, 5, 6, 7, 16, 17, 32, 33, 100])
@pytest.mark.parametrize("window", [0, 1, 5, 31])
def test_windows_in_blocks(device, tokens, window):
    from rat_ext.models.attention import _dense

    q, k, v = torch.randn(3, 2, tokens, 4, 8, dtype=torch.float64)
    want = attention_by_hand(q, k, v, window)
    got = _dense(*(x.float().to(device) for x in (q, k, v)), window)
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-5, atol=1e-5)


def test_initialisation():
    model = RATForCausalLM(RATConfig(vocab_size=500, hidden_size=256, num_hidden_layers=3, num_attention_heads=4,
                                     layer_types=["rat", "rnn", "attention"], max_position_embeddings=4096))  # fmt: skip
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all()
        elif "gate_bias" not in name:
            assert abs(float(p.detach().std()) / 0.02 - 1) < 0.05 and abs(float(p.detach().mean())) < 1e-3, name
    for layer, longest in ((0, 16), (1, 4096)):
        u = model.model.layers[layer].mixer.gate_bias.detach().exp()
        assert 1 <= u.min() and u.max() <= longest - 1
        assert abs(float(u.mean()) / (longest / 2) - 1) < 0.15  # uniform
    for chunk_size in (1, 2):
        assert not RATForCausalLM(config_of("rat", chunk_size=chunk_size)).model.layers[0].mixer.gate_bias.any()


# ---- padding, packing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_row_alone(model, device, side):
    """Bit for bit on the CPU; a GPU's matrix products depend on the number of rows."""
    rows = rows_of(device)
    ids, mask = padded(rows, side, device)
    logits = model(ids, attention_mask=mask).logits
    for b, row in enumerate(rows):
        alone = model(row[None]).logits[0]
        mine = logits[b][mask[b].bool()]
        if device.type == "cpu":
            assert torch.equal(mine, alone)
        torch.testing.assert_close(mine, alone, rtol=1e-3, atol=1e-3)
        last = logits[b, -1]
        torch.testing.assert_close(last, alone[-1], rtol=1e-3, atol=1e-3)  # right padding: the last token's


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_generate_as_alone(model, device, side):
    rows = rows_of(device)
    ids, mask = padded(rows, side, device)
    got = model.generate(ids, attention_mask=mask, max_new_tokens=15, do_sample=False)[:, ids.shape[1] :]
    for b, row in enumerate(rows):
        alone = model.generate(row[None], max_new_tokens=15, do_sample=False)[0, len(row) :]
        assert torch.equal(got[b], alone)


def test_steps_of_padded_rows_are_those_of_the_rows(model, device):
    """Bit for bit on the CPU in bfloat16, whose products there do not depend on the number of rows; several tokens, and one."""
    if device.type != "cpu":
        pytest.skip("a GPU's matrix products depend on the number of rows")
    model, rows = model.bfloat16(), rows_of(device)
    ids, mask = padded(rows, "left", device)
    new = tokens_of(device, 4, 9, seed=4)
    calls = [new[:, :4], new[:, 4:5], new[:, 5:]]

    def run(ids, mask, calls):
        cache, logits = RATModelCache(model.config), []
        with torch.no_grad():
            for call in (ids, *calls):
                logits.append(model(call, attention_mask=mask if call is ids else None, past_key_values=cache).logits)
        return torch.cat(logits[1:], dim=1)

    together = run(ids, mask, calls)
    for b, row in enumerate(rows):
        assert torch.equal(together[b], run(row[None], None, [call[b : b + 1] for call in calls])[0])


def test_padding_anywhere_and_in_pieces(model, device):
    """Holes in the mask; a prompt in three calls with padding in each; a row that is all padding in one of them."""
    ids = tokens_of(device, 3, 30)
    mask = torch.rand(3, 30, generator=torch.Generator().manual_seed(3)).to(device) < 0.7
    mask[1, 10:20] = False
    cache, pieces = RATModelCache(model.config), []
    for a, b in ((0, 10), (10, 20), (20, 29), (29, 30)):
        with torch.no_grad():
            out = model(ids[:, a:b], attention_mask=mask[:, :b].long(), past_key_values=cache)
        pieces.append(out.logits)
    logits = torch.cat(pieces, dim=1)
    assert cache.lengths.tolist() == mask.sum(1).tolist() and cache.get_seq_length() == 30
    for b in range(3):
        alone = model(ids[b][mask[b]][None]).logits[0]
        torch.testing.assert_close(logits[b][mask[b]], alone, rtol=1e-4, atol=1e-4)


def test_the_loss_of_padded_rows_is_that_of_the_rows(model, device):
    rows = rows_of(device)
    for side in ("left", "right"):
        ids, mask = padded(rows, side, device)
        loss = model(ids, attention_mask=mask, labels=ids).loss
        losses = [F.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="sum") for row in rows]
        torch.testing.assert_close(loss, sum(losses) / sum(len(row) - 1 for row in rows), rtol=1e-5, atol=1e-5)


def test_packed_batches(model, device):
    """DataCollatorWithFlattening, with the arguments of flash attention and with positions alone."""
    rows = rows_of(device, (5, 1, 1, 19, 8))
    features = [{"input_ids": row.tolist()} for row in rows]
    for flash in (True, False):
        batch = DataCollatorWithFlattening(return_flash_attn_kwargs=flash, return_seq_idx=flash)(features)
        batch = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
        out = model(**batch)
        alone = [model(row[None]).logits[0] for row in rows]
        torch.testing.assert_close(out.logits[0], torch.cat(alone), rtol=1e-4, atol=1e-4)
        losses = [F.cross_entropy(y[:-1], row[1:], reduction="sum") for y, row in zip(alone, rows, strict=True)]
        torch.testing.assert_close(out.loss, sum(losses) / sum(len(row) - 1 for row in rows), rtol=1e-5, atol=1e-5)
        batch["labels"] = batch["input_ids"]  # without the collator's marks between sequences
        torch.testing.assert_close(model(**batch).loss, out.loss)


def test_gradients_of_a_padded_batch_are_those_of_the_rows(model, device):
    rows = rows_of(device)
    ids, mask = padded(rows, "left", device)
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    padded_grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = sum(len(row) - 1 for row in rows)
    for row in rows:
        model(row[None], labels=row[None], num_items_in_batch=total).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(padded_grads[name], p.grad, rtol=1e-3, atol=1e-4, msg=name)


# ---- calls -------------------------------------------------------------------------------------------------------------


def test_inputs_embeds(model, device):
    ids = tokens_of(device, 2, 9)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    want = model.generate(ids, max_new_tokens=6, do_sample=False)[:, 9:]
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False), want)


def test_logits_to_keep(model, device):
    ids = tokens_of(device, 2, 9)
    whole = model(ids).logits
    assert whole.shape == (2, 9, V)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, whole[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])


def test_labels_and_what_training_returns(model, device):
    ids = tokens_of(device, 2, 9)
    labels = ids.clone()
    labels[0, 2:4] = -100
    want = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    out = model(ids, labels=labels)
    torch.testing.assert_close(out.loss, want)
    assert out.logits.shape == (2, 9, V)
    model.train()
    out = model(ids, labels=labels)
    torch.testing.assert_close(out.loss, want)
    assert out.logits is None and out[CACHE if CACHE in out else "loss"] is not None and out.get(CACHE) is None
    assert model(ids).logits.shape == (2, 9, V)
    model.config.logits_with_loss = True
    assert model(ids, labels=labels).logits.shape == (2, 9, V)
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=7).loss, want * 14 / 7)
    torch.testing.assert_close(model(ids, shift_labels=F.pad(labels[:, 1:], (0, 1), value=-100)).loss, want)


@pytest.mark.parametrize("label", [-1, -99, -101, V, V + 1, 2**40])
def test_labels_that_are_no_token(device, label):
    """An error where the host knows the labels; on a GPU a loss that is no number, and no trap."""
    x, weight = torch.randn(3, 8, device=device, requires_grad=True), torch.randn(V, 8, device=device)
    labels = torch.tensor([0, label, -100], device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=f"labels: expected from 0 to {V - 1}, or -100 for none, got {label}$"):
            linear_cross_entropy(x, weight, labels)
    else:
        assert linear_cross_entropy(x, weight, labels).isnan()
    right = torch.tensor([0, 1, -100], device=device)
    assert torch.equal(linear_cross_entropy(x, weight, right.int()), linear_cross_entropy(x, weight, right))
    for wrong in (labels.float(), labels[:2], labels > 0):
        with pytest.raises(ValueError, match=r"labels: expected int64 or int32 of shape \(3,\), got"):
            linear_cross_entropy(x, weight, wrong)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("x",), {}, "__init__: config: expected a rat_ext.models.RATConfig, got str"),
        ((None, -1), {}, "__init__: max_length: expected an int of at least 0 or None, got -1"),
        ((None, "x"), {}, "__init__: max_length: expected an int of at least 0 or None, got 'x'"),
        ((None, 8), {"batch": -1}, "__init__: batch: expected an int of at least 0 or None, got -1"),
        ((None, 8), {"batch": True}, "__init__: batch: expected an int of at least 0 or None, got True"),
    ],
)
def test_wrong_caches(arguments, options, words):
    config, *rest = arguments
    with pytest.raises(ValueError, match=f"^rat_ext.RATModelCache.{words}"):
        RATModelCache(config or config_of(), *rest, **options)
    with pytest.raises(ValueError, match="^rat_ext.RATModelCache.crop: tokens_to_remove: expected an int, got str"):
        RATModelCache(config_of()).crop("x")


@pytest.mark.parametrize("side", ["left", "right"])
def test_columns_of_padding_have_the_output_of_a_token_of_their_row(model, device, side):
    """Of the last one before; of the first one where none is before. No other row reaches them."""
    rows = rows_of(device, (5, 9, 3, 1))
    ids, mask = padded(rows, side, device)
    y = model(ids, attention_mask=mask).logits
    for b, row in enumerate(rows):
        columns = mask[b].nonzero()[:, 0]
        for t in range(ids.shape[1]):
            before = columns[columns <= t]
            assert torch.equal(y[b, t], y[b, before[-1] if len(before) else columns[0]]), (b, t, len(row))


@pytest.mark.parametrize("static", [False, True])
def test_a_cache_made_while_sampling_serves_later(model, device, static):
    """Made, and used first, in inference mode; then outside of it."""
    ids, logits = tokens_of(device, 2, 9), []
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            cache = RATModelCache(
                model.config, 16 if static else None, static=static, batch=2 if static else None, device=device
            )
            if static:
                model(ids[:, :4], past_key_values=cache)
        with torch.no_grad():
            logits.append(model(ids[:, 4:], past_key_values=cache).logits)
    assert torch.equal(*logits)


def test_a_cache_after_reset_is_a_new_one(model, device):
    """Also of what was padding: calls, what they count and what a crop takes back."""
    ids, mask = padded(rows_of(device, (5, 9, 3)), "left", device)
    used, new = RATModelCache(model.config), RATModelCache(model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=used)
        used.reset()
        for cache in (used, new):
            cache.activate_past_recording()
        for part in (ids[:, :4], ids[:, 4:5], ids[:, 5:9]):
            found = [model(part, past_key_values=cache).logits for cache in (used, new)]
            assert torch.equal(*found)
        assert used.valid is None and used.seen == new.seen == 9 and torch.equal(used.lengths, new.lengths)
        for cache in (used, new):
            cache.crop(-3)
        assert torch.equal(used.lengths, new.lengths)
        assert torch.equal(*(model(ids[:, :2], past_key_values=cache).logits for cache in (used, new)))


@pytest.mark.parametrize("width", [8, 16, 24, 32, 48, 64, 80, 104, 256])
def test_width_of_the_feed_forward(width):
    """8 / 3 of the model's, the next multiple of 8."""
    config = RATConfig(hidden_size=width, num_attention_heads=1, num_groups=1, num_hidden_layers=1, hidden_act="swiglu")
    assert config.intermediate_size == min(n for n in range(0, 3 * width + 8, 8) if 3 * n >= 8 * width)
    assert RATConfig(hidden_size=width, num_attention_heads=1, num_groups=1).intermediate_size == 4 * width


def test_outputs(model, device):
    ids = tokens_of(device, 2, 9)
    rows = rows_of(device)
    padded_ids, mask = padded(rows, "right", device)
    out = model(padded_ids, attention_mask=mask, output_hidden_states=True)
    assert [h.shape for h in out.hidden_states] == [(4, 19, 32)] * 3
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    whole = model(ids, return_dict=False, use_cache=False)
    assert isinstance(whole, tuple) and torch.equal(whole[0], model(ids).logits)
    assert model(ids, use_cache=False)[0].shape == (2, 9, V) and model(ids, use_cache=False).get(CACHE) is None
    assert model.model(ids).last_hidden_state.shape == (2, 9, 32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "input_ids, inputs_embeds: expected one of them, got none"),
        ({"input_ids": 1, "output_attentions": True}, "output_attentions: expected False"),
        ({"input_ids": 1, "attention_mask": torch.ones(2, 8)}, r"attention_mask: expected shape \(2, at least 9\)"),
        ({"input_ids": 1, "attention_mask": torch.zeros(2, 9)}, "attention_mask: expected at least one token"),
        ({"input_ids": 1, "cu_seq_lens_q": torch.tensor([0, 9])}, "cu_seq_lens_q: expected with a batch of one row"),
        ({"input_ids": 1, "past_key_values": DynamicCache()}, f"{CACHE}: expected a rat_ext.models.RATModelCache or None"),
        ({"input_ids": [[1, 2]]}, "input_ids: expected a tensor of 2 dimensions, .* got list"),
        ({"input_ids": torch.tensor([1, 2])}, r"input_ids: expected a tensor of 2 dimensions, \(B, T\), got shape \(2,\)"),
        ({"input_ids": torch.ones(2, 9)}, "input_ids: expected int64 or int32, got float32"),
        ({"inputs_embeds": torch.ones(2, 9, 16)}, "inputs_embeds: expected a last dimension of 32, got 16"),
        ({"inputs_embeds": "x"}, "inputs_embeds: expected a tensor of 3 dimensions, .* got str"),
        ({"input_ids": 1, "attention_mask": "x"}, "attention_mask: expected a tensor or None, got str"),
        (
            {"input_ids": torch.ones(1, 9, dtype=torch.int64), "cu_seq_lens_q": [0, 9]},
            "cu_seq_lens_q: expected a tensor .* got li",
        ),
        (
            {"input_ids": torch.ones(1, 9, dtype=torch.int64), "cu_seq_lens_q": torch.tensor([0, 7, 9]), "max_length_q": 6},
            "max_length_q: expected at least the longest sequence's 7 tokens, got 6",
        ),
        ({"input_ids": 1, "labels": torch.ones(2, 8, dtype=torch.int64)}, r"labels: expected a tensor of shape \(2, 9\), got"),
        ({"input_ids": 1, "labels": "x"}, r"labels: expected a tensor of shape \(2, 9\), got str"),
        ({"input_ids": 1, "shift_labels": torch.ones(2, dtype=torch.int64)}, "shift_labels: expected a tensor of shape"),
    ],
)
def test_wrong_arguments(arguments, words):
    arguments = {
        name: tokens_of("cpu", 2, 9) if type(x) is int and name != "max_length_q" else x for name, x in arguments.items()
    }
    with pytest.raises(ValueError, match=f"^rat_ext.RATModel: {words}"):
        model_of("attention")(**arguments)


# ---- generate ----------------------------------------------------------------------------------------------------------


def test_greedy_is_the_forward(model, device):
    ids = tokens_of(device, 3, 7)
    out = model.generate(
        ids, max_new_tokens=40, do_sample=False, return_dict_in_generate=True, output_logits=True, output_hidden_states=True
    )
    whole = model(out.sequences, use_cache=False).logits[:, 6:-1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), whole, rtol=1e-3, atol=1e-3)
    assert torch.equal(out.sequences[:, 7:], whole.argmax(-1))
    assert out[CACHE].get_seq_length() == 46


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cache_implementations(model, device, kind):
    rows = rows_of(device)
    ids, mask = padded(rows, "left", device)
    options = dict(max_new_tokens=20, do_sample=False)
    want = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(ids, attention_mask=mask, cache_implementation=kind, **options), want)
    with pytest.raises(ValueError, match="cache_implementation: expected None, dynamic or static, got offloaded"):
        model.generate(ids, cache_implementation="offloaded", **options)


def test_sampling(model, device):
    ids = tokens_of(device, 2, 7)
    options = dict(max_new_tokens=10, do_sample=True, temperature=0.8, top_k=20, top_p=0.9)
    torch.manual_seed(0)
    first = model.generate(ids, **options)
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, **options), first)
    assert torch.equal(model.generate(ids, **options | {"top_k": 1}), model.generate(ids, max_new_tokens=10, do_sample=False))
    assert model.generate(ids, num_return_sequences=3, **options).shape == (6, 17)


def test_beams_are_those_without_a_cache(model, device):
    rows = rows_of(device)
    ids, mask = padded(rows, "left", device)
    options = dict(max_new_tokens=12, do_sample=False, num_beams=3)
    want = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), want)
    assert torch.equal(model.generate(ids, attention_mask=mask, cache_implementation="static", **options), want)


class Collector(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streamer_and_stop_tokens(model, device):
    ids, streamer = tokens_of(device, 1, 7), Collector()
    want = model.generate(ids, max_new_tokens=20, do_sample=False)
    got = model.generate(ids, max_new_tokens=20, do_sample=False, streamer=streamer)
    assert streamer.ended and streamer.tokens == got[0].tolist() == want[0].tolist()
    new = want[0, 7:].tolist()
    stop = new[6]
    ended = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=stop, pad_token_id=0)
    assert ended[0, 7:].tolist() == new[: new.index(stop) + 1]


def test_assisted_generation_is_greedy(model, device):
    """A draft model that is often wrong, prompt lookup, and the model as its own assistant: every rollback is exact."""
    ids = tokens_of(device, 1, 17)
    ids[:, 8:16] = ids[:, :8]
    want = model.generate(ids, max_new_tokens=40, do_sample=False)
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        for p in noisy.parameters():
            p.add_(0.03 * torch.randn_like(p))
    for assistant in (noisy, model, model_of("rat", device)):
        got = model.generate(ids, max_new_tokens=40, do_sample=False, assistant_model=assistant)
        assert torch.equal(got, want)
    assert torch.equal(model.generate(ids, max_new_tokens=40, do_sample=False, prompt_lookup_num_tokens=5), want)


def test_a_cache_continues_a_conversation(model, device):
    """generate twice on one cache: the second call computes the new tokens alone."""
    ids = tokens_of(device, 2, 9)
    cache = RATModelCache(model.config)
    first = model.generate(ids, max_new_tokens=6, do_sample=False, **{CACHE: cache})
    more = torch.cat((first, tokens_of(device, 2, 5, seed=9)), dim=1)
    again = model.generate(more, max_new_tokens=6, do_sample=False, **{CACHE: copy.deepcopy(cache)})
    assert torch.equal(again, model.generate(more, max_new_tokens=6, do_sample=False))
    assert cache.get_seq_length() == 14


# ---- the cache ---------------------------------------------------------------------------------------------------------


def states(cache, lengths=None) -> list[torch.Tensor]:
    """What of a cache the next token can see."""
    seen = []
    for layer in cache.states:
        tensors = layer.tensors()
        lengths = cache.lengths.tolist()
        if "chunk_k" in tensors:
            size = layer.chunk_size
            seen += [tensors[name][b, :, : n // size] for name in ("chunk_k", "chunk_v") for b, n in enumerate(lengths)]
            for name in ("running_k", "running_v"):  # of a cache that records: of the last tokens
                ring = tensors[name] if tensors[name].dim() == 4 else tensors[name][:, None]
                seen += [ring[b, (n - 1) % ring.shape[1]] for b, n in enumerate(lengths) if n % size]
            seen.append(tensors["lengths"])
        elif "state" in tensors:
            seen.append(tensors["state"])
        else:
            ring = getattr(layer, "ring", None)
            for x in tensors.values():
                for b, n in enumerate(lengths):
                    window = n if ring is None else min(n, 5)
                    place = torch.arange(n - window, n, device=x.device)
                    seen.append(x[b].index_select(1, place if ring is None else place % ring))
    return seen


def assert_same_states(a, b):
    """Bit for bit on the CPU, where no layer's input passed through attention, whose sums depend on the tokens of a call."""
    exact = a.lengths.device.type == "cpu" and not {"attention", "sliding_attention"} & set(a.config.layer_types)
    for x, y in zip(states(a), states(b), strict=True):
        assert torch.equal(x, y) if exact else torch.allclose(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("removed", [1, 2, 3, 4, 5, 9, 13])
@pytest.mark.parametrize("batch", [1, 3])
def test_crop_leaves_no_trace(model, device, removed, batch):
    """Bit for bit: a prompt, some steps and a draft are taken back in part."""
    ids, draft = tokens_of(device, batch, 21), tokens_of(device, batch, 13, seed=5)

    def seen(*calls):
        cache = RATModelCache(model.config)
        cache.activate_past_recording()
        with torch.no_grad():
            for call in calls:
                if call.shape[1]:
                    out = model(call, past_key_values=cache)
        return cache, out

    cache, _ = seen(ids, draft)
    cache.crop(-removed)
    want, _ = seen(ids, draft[:, : 13 - removed])
    assert cache.get_seq_length() == want.get_seq_length() == 34 - removed
    assert_same_states(cache, want)
    with torch.no_grad():
        logits = [model(draft[:, :3], past_key_values=c).logits for c in (cache, want)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)

    cache, _ = seen(ids, *draft[:, :6].split(1, dim=1))  # one token at a time
    cache.crop(-min(removed, 6))
    want, _ = seen(ids, *draft[:, : 6 - min(removed, 6)].split(1, dim=1))
    assert_same_states(cache, want)


def test_crop_of_rows_with_padding(model, device):
    ids = tokens_of(device, 3, 24)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, 18:20], mask[2, 23] = 0, 0, 0

    def seen(*cuts):
        cache = RATModelCache(model.config)
        cache.activate_past_recording()
        for a, b in zip(cuts[:-1], cuts[1:], strict=True):
            with torch.no_grad():
                model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache)
        return cache

    for cut in (14, 17, 19, 22):
        cache = seen(0, 14, 24)
        cache.crop(cut - 24)
        assert_same_states(cache, seen(0, 14, cut) if cut > 14 else seen(0, 14))
        assert torch.equal(cache.valid, mask[:, :cut].bool()) and cache.get_seq_length() == cut
    with pytest.raises(ValueError, match="RATModelCache.crop: tokens_to_remove: expected at most the 24 tokens seen, got 25"):
        seen(0, 24).crop(-25)


@pytest.mark.parametrize("pattern", ["rat", "rnn", "rat-swa"])
def test_crop_needs_a_record(device, pattern):
    model, ids = model_of(pattern, device), tokens_of(device, 1, 30)
    cache = RATModelCache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="crop: tokens_to_remove: expected as many as were recorded .*, got 3"):
        cache.crop(-3)
    cache.crop(-30)  # all: nothing to remember
    with torch.no_grad():
        assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)


def test_rat_layers_take_tokens_back_in_their_pool(device, monkeypatch):
    """Nothing is computed or copied, however often; the pool grows with what it holds, and goes back 128 tokens at most."""
    model, ids = model_of("rat", device), tokens_of(device, 2, 300)
    cache = RATModelCache(model.config)
    cache.activate_past_recording()
    drafts = iter(range(300, 1000, 9))
    monkeypatch.setattr("rat_ext.models.cache.chunk_recurrence", None)
    with torch.no_grad():
        for begin in range(0, 295, 5):
            draft = tokens_of(device, 2, 4, seed=next(drafts))
            model(torch.cat((ids[:, begin : begin + 5], draft), dim=1), past_key_values=cache)
            before = [x.data_ptr() for layer in cache.states for name, x in layer.tensors().items() if name != "lengths"]
            cache.crop(-4)
            after = [x.data_ptr() for layer in cache.states for name, x in layer.tensors().items() if name != "lengths"]
            assert before == after
        whole = model(ids).logits
        torch.testing.assert_close(model(ids[:, 295:], past_key_values=cache).logits, whole[:, 295:], rtol=1e-4, atol=1e-4)
        assert all(layer.state.lengths.tolist() == [300, 300] for layer in cache.states)

        other = RATModelCache(model.config)
        other.activate_past_recording()
        model(ids, past_key_values=other)
        with pytest.raises(ValueError, match="crop: tokens_to_remove: expected as many as were recorded .*128.*, got 129"):
            other.crop(-129)
        other.crop(-128)
        with pytest.raises(ValueError, match="crop: tokens_to_remove: expected as many as were recorded .*, got 1"):
            other.crop(-1)
        torch.testing.assert_close(model(ids[:, 172:], past_key_values=other).logits, whole[:, 172:], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="past_key_values: expected no gradient beside a cache that records"):
        model(ids[:, :3], past_key_values=other)


def test_crop_to_a_length(model, device):
    """A positive number is how many to keep; where there are fewer, all stay."""
    ids = tokens_of(device, 2, 24)
    with torch.no_grad():
        cache = RATModelCache(model.config)
        cache.activate_past_recording()
        model(ids, past_key_values=cache)
        cache.crop(20)
        assert cache.get_seq_length() == 20 and cache.lengths.tolist() == [20, 20]
        got = model(ids[:, 20:], past_key_values=cache).logits
        torch.testing.assert_close(got, model(ids).logits[:, 20:], rtol=1e-4, atol=1e-4)
        cache.crop(30)
        assert cache.get_seq_length() == 24


def test_an_rnn_takes_back_more_than_its_last_call(device):
    model, ids = model_of("rnn", device), tokens_of(device, 2, 160)
    with torch.no_grad():
        cache = RATModelCache(model.config)
        cache.activate_past_recording()
        for part in (ids[:, :100], ids[:, 100:]):
            model(part, past_key_values=cache)
        cache.crop(-120)
        got = model(ids[:, 40:], past_key_values=cache).logits
        torch.testing.assert_close(got, model(ids).logits[:, 40:], rtol=1e-4, atol=1e-4)


def test_recording_may_begin_late(model, device):
    """A ring that has turned is made larger with what it holds in place."""
    ids = tokens_of(device, 2, 40)
    with torch.no_grad():
        cache = RATModelCache(model.config)
        model(ids[:, :19], past_key_values=cache)
        cache.activate_past_recording()
        model(ids[:, 19:29], past_key_values=cache)
        cache.crop(-7)
        got = model(ids[:, 22:], past_key_values=cache).logits
    torch.testing.assert_close(got, model(ids).logits[:, 22:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("static", [False, True])
def test_rows_of_a_cache(model, device, static):
    rows = rows_of(device)
    ids, mask = padded(rows, "left", device)
    new, order = tokens_of(device, 4, 1, seed=8), torch.tensor([2, 0, 3, 0], device=device)
    with torch.no_grad():
        cache = RATModelCache(model.config, 64, static=static)
        model(ids, attention_mask=mask, past_key_values=cache)
        want = model(new, past_key_values=copy.deepcopy(cache)).logits
        cache.reorder_cache(order)
        assert cache.lengths.tolist() == [12, 5, 8, 5] and cache.batch_size == 4
        torch.testing.assert_close(model(new[order], past_key_values=copy.deepcopy(cache)).logits, want[order])
        if static:
            with pytest.raises(ValueError, match="batch_select_indices: static: expected False"):
                cache.batch_select_indices(order)
            return
        cache.batch_repeat_interleave(2)
        twice = order.repeat_interleave(2)
        torch.testing.assert_close(model(new[twice], past_key_values=copy.deepcopy(cache)).logits, want[twice])
        cache.batch_select_indices(torch.tensor([0, 5], device=device))
        kept = twice[[0, 5]]
        torch.testing.assert_close(model(new[kept], past_key_values=cache).logits, want[kept])
        cache.reset()
        torch.testing.assert_close(model(ids[:2], past_key_values=cache).logits, model(ids[:2]).logits)


def test_a_cache_of_another_batch_or_that_is_full(model, device):
    cache = RATModelCache(model.config, 12, static=True)
    with torch.no_grad():
        model(tokens_of(device, 2, 10), past_key_values=cache)
        with pytest.raises(ValueError, match="begin: batch: expected 2 rows, as in the calls before, got 3"):
            model(tokens_of(device, 3, 1), past_key_values=cache)
        if model.config.layer_types[0] == "attention":
            with pytest.raises(ValueError, match="room: tokens: expected at most max_length = 12 in a static cache, got 13"):
                model(tokens_of(device, 2, 3), past_key_values=cache)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_what_a_cache_tells_transformers(model, device, static, early):
    """Each property and method that generate asks, before and after a call."""
    cache = RATModelCache(model.config, 40, static=static)
    layers = model.config.num_hidden_layers
    kind = "static" if static else "dynamic"
    if early:
        cache.early_initialization(2, 4, 8, torch.float32, device)
    made = early and static
    assert (cache.batch_size, cache.is_initialized, cache.nbytes > 0) == (2 if made else -1, made, made)
    for seen in (0, 9, 10):
        assert cache.get_seq_length() == cache.get_seq_length(1) == cache.seen == seen
        assert cache.get_max_length() == cache.get_max_cache_shape() == (40 if static else -1)
        assert cache.get_mask_sizes(3) == (seen + 3, 0) and cache.has_previous_state() == (seen > 0)
        assert (cache.is_compileable, cache.is_croppable) == (False, True)
        assert cache.is_sliding == cache.is_linear == [False] * layers and len(cache.states) == layers
        with torch.no_grad():
            model(tokens_of(device, 2, 9 if seen == 0 else 1), past_key_values=cache)
        now = 9 if seen == 0 else seen + 1
        assert (cache.batch_size, cache.is_initialized) == (2, True)
        assert repr(cache) == f"RATModelCache({layers} layers, 2 rows, {now} tokens, {kind})"
    with pytest.raises(ValueError, match="RATModelCache.update: a call: expected none"):
        cache.update(None, None, 0)


def test_a_static_cache_takes_max_length_columns(model, device):
    ids = tokens_of(device, 2, 12)
    cache = RATModelCache(model.config, 12, static=True)
    with torch.no_grad():
        model(ids[:, :10], past_key_values=cache)
        last = model(ids[:, 10:], past_key_values=cache).logits
        torch.testing.assert_close(last, model(ids).logits[:, 10:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_static_cache(model, device, dtype):
    """To the byte: no row, column or layer too many."""
    config, length = model.config, 22
    heads, dim = config.num_attention_heads, config.head_dim
    token = heads * dim * dtype.itemsize * 2
    each = {
        "rat": length // config.chunk_sizes[0] * token + 2 * heads * dim * 4 + 4,
        "rnn": heads * dim * 4,
        "attention": length * token,
        "sliding_attention": (config.sliding_window + 2) * token,
    }
    cache = RATModelCache(config, length, static=True, batch=3, dtype=dtype, device=device)
    assert cache.nbytes == 3 * sum(each[kind] for kind in config.layer_types)
    assert {x.shape[0] for layer in cache.states for x in layer.tensors().values()} == {3}
    assert cache.lengths.tolist() == [0, 0, 0] and cache.lengths.dtype == torch.int32


@pytest.mark.parametrize(
    ("name", "taken", "refused"),
    [
        *((name, 1, 0) for name in ("vocab_size", "num_hidden_layers", "num_groups", "intermediate_size", "chunk_size")),
        ("num_groups", 4, 8),
        ("chunk_size", [1, 3], [1, 0]),
        ("sliding_window", 0, -1),
        ("max_position_embeddings", 1, 0),
        ("rms_norm_eps", 0.0, -5e-324),
        ("initializer_range", 0.0, -5e-324),
        ("rope_theta", 5e-324, 0.0),
        ("rope_theta", 1.7e308, float("inf")),
        ("num_attention_heads", 1, 0),
        ("hidden_size", 32, 16),  # heads of 8
        ("hidden_size", 1024, 1056),  # heads of 256
    ],
)
def test_limits_of_a_configuration(name, taken, refused):
    """A number at its limit is taken, the next one is refused."""
    assert getattr(config_of(num_attention_heads=4, **{name: taken}) if name != "num_attention_heads" else
                   config_of(num_groups=1, num_attention_heads=taken), name) == taken  # fmt: skip
    shown = "num_attention_heads" if name == "hidden_size" else name
    with pytest.raises(ValueError, match=f"^rat_ext.RATConfig: {shown}: expected .+, got "):
        config_of(**{name: refused})


def test_memory_of_the_states(device):
    """The 1.3B models at T = 4096, bfloat16, per sequence: chunk states are a sixteenth of keys and values."""
    sizes = {}
    for pattern in ("rat", "attention", "rat-swa", "attention-swa", "rnn"):
        config = RATConfig.preset("1.3b", pattern)
        sizes[pattern] = RATModelCache(config, 4096, static=True, batch=1, dtype=torch.bfloat16, device="meta").nbytes
    token = 2 * 2 * 2048  # bytes of a key and a value
    assert sizes["attention"] == pytest.approx(24 * 4096 * token, rel=1e-3)
    assert sizes["rat"] == pytest.approx(24 * (256 * token + 4 * 2048 * 2), rel=1e-3)
    assert sizes["rat-swa"] == pytest.approx(12 * (256 + 1024) * token, rel=1e-2)
    assert sizes["attention"] / sizes["rat"] > 15 and sizes["rnn"] < 24 * 4 * 2048 + 100


def test_gradients_beside_a_cache(model, device):
    """A step that is not under no_grad: logits as ever, with gradients."""
    ids = tokens_of(device, 2, 9)
    out = model(ids[:, :8])
    step = model(ids[:, 8:], past_key_values=out[CACHE])
    torch.testing.assert_close(step.logits[:, 0], model(ids).logits[:, -1], rtol=1e-4, atol=1e-4)
    step.logits.sum().backward()
    assert model.model.embed_tokens.weight.grad is not None


def test_a_cache_that_records_beside_a_bias_that_learns(device):
    """Gradients are refused where the tokens would carry one; a bias alone has none, by way of a cache in place."""
    model, ids = model_of("rat", device), tokens_of(device, 2, 9)
    for name, p in model.named_parameters():
        p.requires_grad_("gate_bias" in name)
    caches = [RATModelCache(model.config) for _ in range(2)]
    for cache in caches:
        cache.activate_past_recording()
    for part in (ids[:, :4], ids[:, 4:5], ids[:, 5:]):
        y = model(part, past_key_values=caches[0]).logits
        with torch.no_grad():
            assert torch.equal(y, model(part, past_key_values=caches[1]).logits) and not y.requires_grad


def test_chunked_prefill(model, device):
    ids = tokens_of(device, 2, 23)
    options = dict(max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, prefill_chunk_size=6, **options), model.generate(ids, **options))


def test_columns_of_a_ring(device):
    """Each column is written once: the last R tokens of a row; what is dropped goes beside the ring."""
    from rat_ext.models.cache import Window

    ring = Window(3)  # four columns, and the fifth
    position = torch.arange(7, device=device).expand(2, 7)
    counts = torch.tensor([7, 2], device=device)
    assert ring.columns(position, counts).tolist() == [[4, 4, 4, 3, 0, 1, 2], [0, 1, 4, 4, 4, 4, 4]]
    assert ring.columns(position[:, :2] + 3, None).tolist() == [[3, 0], [3, 0]]
