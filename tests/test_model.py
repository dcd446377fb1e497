"""The language model: decoding equals the forward, sampling, ties, initialisation, wrong arguments say so."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rat_ext.model
from rat_ext.model import RATLM, _draw

SIZES = (32, 64, 2, 4, 2, 4)


def model_of(device="cpu", **options) -> RATLM:
    """A model of which no weight is special: norms too are drawn."""
    torch.manual_seed(0)
    model = RATLM(*SIZES, max_length=8, **options).to(device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(1 + 0.5 * torch.randn_like(p))
        model.embedding.weight.mul_(10)
    return model


def tokens_of(device, *shape) -> torch.Tensor:
    return torch.randint(0, 32, shape, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.parametrize("tied", [True, False])
def test_generated_logits_are_those_of_the_forward(device, tied):
    model = model_of(device, tie_embeddings=tied)
    prompt = tokens_of(device, 3, 7)
    tokens, logits = model.generate(prompt, 20, top_k=5, return_logits=True)
    assert tokens.shape == (3, 27) and torch.equal(tokens[:, :7], prompt)
    torch.testing.assert_close(logits, model(tokens)[:, 6:-1].detach(), rtol=1e-4, atol=1e-4)
    greedy = model.generate(prompt, 5, temperature=0)
    assert torch.equal(greedy, model.generate(prompt, 5, top_k=1))


def test_steps_are_the_forward(device):
    """Every norm of a block, the last norm and the head: a step uses those of the forward. Slots pick entries of a pool."""
    model = model_of(device)
    tokens = tokens_of(device, 2, 15)
    whole = model(tokens).detach()
    pool = model.new_caches(5, 20)
    slots = torch.tensor([3, 1], device=device)
    for t in range(15):
        logits = model.step(tokens[:, t], pool, slots) if t % 2 else model(tokens[:, t], pool, slots=slots)
        torch.testing.assert_close(logits, whole[:, t], rtol=1e-4, atol=1e-4)
        assert not logits.requires_grad
    assert [cache.lengths.tolist() for cache in pool] == [[0, 15, 0, 15, 0]] * 2


def test_packed_sequences_reach_every_layer(device):
    model = model_of(device)
    tokens, cuts = tokens_of(device, 1, 50), [0, 13, 13, 50]
    packed, states = model(tokens, cu_seqlens=torch.tensor(cuts, dtype=torch.int32, device=device), return_state=True)
    pairs = [(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    torch.testing.assert_close(packed, torch.cat([model(tokens[:, a:b]) for a, b in pairs], dim=1), rtol=1e-4, atol=1e-4)
    assert [state.lengths.tolist() for state in states] == [[b - a for a, b in pairs]] * 2


def test_continued_from_states(device):
    model = model_of(device)
    tokens = tokens_of(device, 2, 21)
    first, states = model(tokens[:, :10], return_state=True)
    second = model(tokens[:, 10:], states)
    torch.testing.assert_close(torch.cat((first, second), dim=1), model(tokens), rtol=1e-4, atol=1e-4)


# ---- sampling --------------------------------------------------------------------------------------------------------


def share_of(logits, count=4000, **options) -> torch.Tensor:
    """How often each token is drawn."""
    options = {"temperature": 1.0, "top_k": None, "generator": torch.Generator().manual_seed(0)} | options
    drawn = _draw(torch.tensor(logits).expand(count, -1), **options)
    assert drawn.shape == (count, 1)
    return drawn.flatten().bincount(minlength=len(logits)) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 1e30, 1e300])
@pytest.mark.parametrize("top_k", [None, 2, 3, 4, 1000])
def test_drawn_as_often_as_they_should_be(temperature, top_k):
    """softmax(logits / temperature) over the k most likely."""
    logits = [1.0, -0.5, 2.0, 0.3]
    kept = sorted(logits)[-min(top_k or 4, 4) :]
    want = torch.tensor([x / temperature if x in kept else float("-inf") for x in logits]).softmax(0)
    got = share_of(logits, temperature=temperature, top_k=top_k)
    torch.testing.assert_close(got, want, rtol=0, atol=0.03)
    assert not got[want == 0].any()


@given(k=st.integers(1, 12), seed=st.integers(0, 100))
def test_top_k_keeps_k_of_equals(k, seed):
    """Of equally likely tokens too."""
    assert int((share_of([0.0] * 10, 1000, top_k=k, generator=torch.Generator().manual_seed(seed)) > 0).sum()) == min(k, 10)


@given(
    temperature=st.floats(min_value=0.0, max_value=1e-5, allow_subnormal=True),
    top_k=st.sampled_from([None, 1, 2, 9]),
    offset=st.sampled_from([0.0, 1e4, -1e4]),
)
def test_cold(temperature, top_k, offset):
    """However small the temperature: the most likely token, and any of those that are equally likely."""
    assert share_of([offset, offset + 1, offset - 3], 50, temperature=temperature, top_k=top_k)[1] == 1
    assert torch.isfinite(share_of([offset] * 3, 50, temperature=temperature, top_k=top_k)).all()


def test_a_tiny_temperature_is_greedy(device):
    model, prompt = model_of(device), tokens_of(device, 3, 7)
    assert torch.equal(model.generate(prompt, 5, temperature=1e-40), model.generate(prompt, 5, temperature=0))


# ---- ties, initialisation ----------------------------------------------------------------------------------------------


def emptied(device):
    with torch.device("meta"):
        model = RATLM(*SIZES)
    return model.to_empty(device=device)


def assert_tied(model):
    assert model.head.weight is model.embedding.weight
    assert sum(p.numel() for p in model.parameters()) == sum(x.numel() for x in model.state_dict().values())
    x = torch.randn(3, 64, device=model.embedding.weight.device)
    before = model.head(x).detach()
    with torch.no_grad():
        model.embedding.weight.mul_(2)
        torch.testing.assert_close(model.head(x), 2 * before)
        model.embedding.weight.mul_(0.5)


def test_ties_hold(device):
    model = model_of(device)
    assert_tied(model)
    assert_tied(copy.deepcopy(model))
    empty = emptied(device)
    empty.reset_parameters()
    assert_tied(empty)
    with torch.device("meta"):
        assigned = RATLM(*SIZES)
    assigned.load_state_dict(model.state_dict(), assign=True)
    assert_tied(assigned)
    tokens = tokens_of(device, 2, 9)
    assert torch.equal(assigned(tokens), model(tokens))
    optimizer = torch.optim.SGD(assigned.parameters(), lr=0.1)
    assigned(tokens).logsumexp(-1).sum().backward()
    optimizer.step()
    assert_tied(assigned)


def test_untied():
    model = model_of(tie_embeddings=False)
    assert model.head.weight is not model.embedding.weight and "head.weight" in model.state_dict()


def check_initialised(model, tied):
    """Deviations of each kind of weight: 2 layers of width 256."""
    want = {"embedding.weight": 0.02 if tied else 1.0, "head.weight": 0.02}
    for name, p in model.named_parameters():
        for ending, std in (
            ("in_proj.weight", 256**-0.5),
            ("out_proj.weight", 256**-0.5 * 4**-0.5),
            ("down.weight", p.shape[-1] ** -0.5 * 4**-0.5),
            ("up.weight", (3 * 256) ** -0.5),
        ):
            if name.endswith(ending):
                want[name] = std
        if "norm" in name:
            assert (p == 1).all()
        elif not name.endswith("gate_bias"):
            assert abs(float(p.detach().std()) / want[name] - 1) < 0.05, name
        else:
            assert p.isfinite().all() and float(p.detach().max()) == pytest.approx(0.6931472)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("way", ["made", "reset", "each module", "own parameters"])
def test_initialisation(device, tied, way):
    sizes = (128, 256, 2, 4, 2, 4)
    with torch.device("meta" if way != "made" else device):
        model = RATLM(*sizes, tie_embeddings=tied)
    if way == "own parameters":  # as FSDP does: each module that has parameters of its own, parents first
        for module in model.modules():
            if list(module.parameters(recurse=False)):
                module.to_empty(device=device, recurse=False)
                module.reset_parameters()
    elif way != "made":
        model.to_empty(device=device)
        if way == "reset":
            model.reset_parameters()
        else:
            model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    check_initialised(model, tied)


# ---- wrong arguments -------------------------------------------------------------------------------------------------


def test_errors():
    model = RATLM(32, 32, 2, 4, 2, 4)
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    for caches in ([], [None]):
        with pytest.raises(ValueError, match=f"caches: expected one for each of the 2 layers, got {len(caches)}"):
            model(tokens, caches)
    for options, words in (
        ({"temperature": -1.0}, "temperature: expected at least 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature: expected at least 0, got nan"),
        ({"temperature": float("inf")}, "temperature: expected at least 0, got inf"),
        ({"top_k": 0}, "top_k: expected at least 1 or None, got 0"),
        ({"top_k": 2.5}, "top_k: expected at least 1 or None, got 2.5"),
    ):
        with pytest.raises(ValueError, match=words):
            model.generate(tokens, 3, **options)
    with pytest.raises(ValueError, match="expected .* T >= 1 and n >= 1, got"):
        model.generate(tokens[:, :0], 3)
    caches = model.new_caches(1, 8)
    for options in ({}, {"caches": caches, "return_state": True}, {"caches": caches, "cu_seqlens": tokens[0]}):
        with pytest.raises(ValueError, match=r"^RATLM: tokens: expected shape \(B, T\), or \(B,\) with .*, got \(1,\)$"):
            model(tokens[:, 0], **options)
    with pytest.raises(ValueError, match=r"^RATLM: slots: expected with tokens of shape \(B,\), got .* \(1, 5\)$"):
        model(tokens, slots=tokens[:, 0])


def test_generate_only_calls(device):
    """What wraps a model generates too, though it has no other method of it."""
    model, prompt = model_of(device), tokens_of(device, 2, 5)
    want = model.generate(prompt, 6, temperature=0)
    assert torch.equal(rat_ext.model.generate(lambda *args, **options: model(*args, **options), prompt, 6, temperature=0), want)
