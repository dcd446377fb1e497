"""rat_ext.models.Generator: tokens of transformers' own generate, whatever else is in the batch."""

import gc
import random

import pytest
import torch

pytest.importorskip("transformers", reason="rat_ext.models needs transformers: pip install 'rat_ext[models]'")

from rat_ext.models import Generator, RATConfig, RATForCausalLM, generator
from rat_ext.models.config import PATTERNS
from rat_ext.models.generator import (
    FILTERED,
    GREEDY,
    SAMPLED,
    STOPS,
    KeysPool,
    Read,
    Step,
    choose,
    make_ring,
    state_bytes,
    uniform,
)

V = 61
LENGTHS = (5, 19, 1, 8, 12)


def model_of(device, pattern="rat-swa", **changes) -> RATForCausalLM:
    torch.manual_seed(0)
    config = RATConfig(**dict(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, chunk_size=4, sliding_window=5,
        max_position_embeddings=64, initializer_range=0.3, layer_types=pattern,
    ) | changes)  # fmt: skip
    return RATForCausalLM(config).eval().to(device)


def prompts_of(lengths=LENGTHS) -> list[list[int]]:
    return [torch.randint(0, V, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]


def hugging_face(model, prompt, tokens, **options) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **options)
    return found[0, len(prompt) :].tolist()


@pytest.fixture
def model(device) -> RATForCausalLM:
    return model_of(device)


# ---- the tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_greedy_tokens_are_those_of_generate(pattern, device):
    """Ragged prompts, more of them than slots: they wait, and slots are used again."""
    model, prompts = model_of(device, pattern), prompts_of()
    generator = Generator(model, max_batch=2, max_length=40)
    found = generator.generate(prompts, max_new_tokens=20)
    assert found == [hugging_face(model, prompt, 20) for prompt in prompts]
    assert generator.running == 0 and sorted(generator.unused) == [0, 1] and generator.modes == [0, 0, 0]


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "swiglu"},
        {"rope_theta": None},
        {"chunk_size": [4, 1], "layer_types": "rat"},
        {"num_groups": 4},
        {"sliding_window": 0},  # a token sees itself alone
    ],
)
def test_other_models(changes, device):
    model, prompts = model_of(device, **changes), prompts_of()
    assert Generator(model, 5, 40).generate(prompts, 15) == [hugging_face(model, prompt, 15) for prompt in prompts]


def test_a_window_longer_than_the_sequences(device):
    model, prompts = model_of(device, "attention-swa", sliding_window=100), prompts_of()
    assert Generator(model, 5, 40).generate(prompts, 15) == [hugging_face(model, prompt, 15) for prompt in prompts]


def test_prefill_in_parts(model):
    """Prompts beyond prefill_tokens join a step later; one that is longer than that joins alone."""
    prompts = prompts_of()
    generator = Generator(model, 5, 40, prefill_tokens=10)
    requests = [generator.submit(prompt, 15) for prompt in prompts]
    generator.step()
    assert generator.running == 1 and len(generator.waiting) == 4
    generator.run()
    assert [request.tokens for request in requests] == [hugging_face(model, prompt, 15) for prompt in prompts]


def test_the_longest_sequence(model):
    """Prompt and new tokens fill max_length; the first token comes from the prefill."""
    prompts = prompts_of((1, 23, 15))
    for prompt in prompts:
        [found] = Generator(model, 1, 24).generate([prompt], 24 - len(prompt))
        assert found == hugging_face(model, prompt, 24 - len(prompt))


def test_compiled_norms(device):
    model, prompts = model_of(device), prompts_of()
    found = Generator(model, 5, 40, compile=True).generate(prompts, 10)
    assert found == Generator(model, 5, 40).generate(prompts, 10)


# ---- how keys are read -------------------------------------------------------------------------------------------------


def test_as_many_columns_as_the_longest_sequence_has(device, monkeypatch):
    """Rings are read up to a bound that grows with the sequences, without a mask once all of them are full."""
    monkeypatch.setattr(generator, "FEWEST", 2)
    model, prompts, seen = model_of(device, "attention-swa"), prompts_of(), []
    found = Generator(model, max_batch=3, max_length=40)
    compute = found._compute
    found._compute = lambda mode, reads: (seen.append(reads), compute(mode, reads))
    assert found.generate(prompts, 20) == [hugging_face(model, prompt, 20) for prompt in prompts]
    window, every = zip(*seen, strict=True)
    assert found.rings == [6, 40] and {read.columns for read in every} >= {24, 32, 40} and all(read.masked for read in every)
    assert {Read(6, True), Read(6, False)} <= set(window)


def test_the_cheaper_way_to_read():
    found = Generator(model_of("cpu", "attention-swa", sliding_window=300), 4, 2048)
    assert found._reads([100]) == (Read(256, True), Read(256, True))
    assert found._reads([301, 600, 700]) == (Read(301, False), Read(768, True))
    assert found._reads([300, 600, 700]) == (Read(301, True), Read(768, True))
    assert found._reads([2048] * 4) == (Read(301, False), Read(2048, True))  # a mask for the last token of all
    found.flash = True  # a GPU's kernels: cuDNN's for as many columns of all slots, flash for those in use
    assert found._reads([700] * 4) == (Read(301, False), Read(768, True))
    assert found._reads([700, 700]) == (Read(0, True), Read(0, True))  # two slots of four
    assert found._reads([2000, 400, 350, 400]) == (Read(301, False), Read(0, True))
    found.dense = False
    assert found._reads([700] * 4) == (Read(0, True), Read(0, True))


def test_a_step_that_cudnn_refuses_reads_what_is_used(monkeypatch):
    found, captured = Generator(model_of("cpu"), 2, 40), []

    def capture(mode, reads):
        captured.append(reads)
        if reads != (Read(0, True),):
            raise RuntimeError("No execution plans support the graph.")
        return "graph"

    monkeypatch.setattr(found, "_capture", capture)
    reads = found._reads([10, 10])
    with pytest.raises(RuntimeError, match="No execution plans"):  # a float32 model has nothing else
        found._prepare(GREEDY, reads, [10, 10])
    found.flash = True
    assert found._prepare(GREEDY, reads, [10, 10]) == (Read(0, True),)
    assert captured == [reads, reads, (Read(0, True),)] and found.graphs == {(GREEDY, (Read(0, True),)): "graph"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ["attention", "attention-swa"])
def test_ways_to_read_agree_with_the_definition(pattern, dtype, device):
    """Ragged slots, one of them without a sequence, whose columns beyond hold what is not to be seen."""
    torch.manual_seed(0)
    config = RATConfig(hidden_size=256, num_attention_heads=4, num_hidden_layers=2, layer_types=pattern, sliding_window=299)
    pool = KeysPool(config, 1, 5, 700, dtype, torch.device(device))
    for x in (pool.keys, pool.values):
        x.normal_()
    used = [min(n, pool.columns) for n in (1, 17, 256, 700, 300)]
    length = torch.tensor([n - 1 for n in (1, 17, 256, 700, 300)], dtype=torch.int32, device=device)
    active = torch.tensor([True, True, True, True, False], device=device)
    q = torch.randn(5, 4, 64, dtype=dtype, device=device)

    def definition(kind: torch.dtype, used: list[int]) -> torch.Tensor:
        rows = []
        for b, n in enumerate(used):
            scores = torch.einsum("hd,rhd->hr", q[b].to(kind), pool.keys[b, :n].to(kind)) * 64**-0.5
            rows.append(torch.einsum("hr,rhd->hd", scores.softmax(-1), pool.values[b, :n].to(kind)))
        return torch.stack(rows).double()

    ways = [(Read(pool.columns, True), used, 4)]
    if pool.columns == 300:
        ways.append((Read(300, False), [300] * 5, 5))
    if pool.flash:
        ways.append((Read(0, True), used, 4))
    for read, seen, rows in ways:
        step = Step(torch.arange(5, device=device), active, length, None, lambda x, angles: x)
        ring = make_ring(pool.columns, read, step, dtype)
        assert ring.used.tolist() == [*used[:4], 1] and ring.used.dtype == torch.int32
        assert (ring.place // pool.columns).tolist() == [0, 1, 2, 3, 4]
        found, want = pool.attend(q, ring)[:rows].double(), definition(torch.float64, seen)[:rows]
        error, eager = (found - want).abs().max(), (definition(dtype, seen)[:rows] - want).abs().max()
        assert error <= 2 * eager + 1e-6, read


# ---- requests that come and go -----------------------------------------------------------------------------------------


def test_requests_that_come_later_have_the_tokens_they_have_alone(model):
    prompts = prompts_of()
    options = [
        {},
        {"temperature": 0.9, "seed": 1},
        {"temperature": 1.3, "top_k": 7, "seed": 2},
        {"temperature": 1.0, "top_p": 0.7, "seed": 3},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": -4},
    ]
    alone = []
    for prompt, option in zip(prompts, options, strict=True):
        generator = Generator(model, 3, 40)
        alone.append(generator.submit(prompt, 12, **option))
        generator.run()
    generator = Generator(model, 3, 40)
    requests = []
    for prompt, option in zip(prompts, options, strict=True):
        requests.append(generator.submit(prompt, 12, **option))
        for _ in range(3):
            generator.step()
    generator.run()
    assert [request.tokens for request in requests] == [request.tokens for request in alone]
    assert {request.finished for request in requests} == {"length"}


def test_seeds(model):
    generator = Generator(model, 4, 40)
    options = dict(max_new_tokens=20, temperature=1.5)
    one, two, three = generator.generate([[3, 4]] * 3, seed=5, **options)
    assert len({tuple(tokens) for tokens in (one, two, three)}) == 3
    assert generator.generate([[3, 4]], seed=6, **options) == [two]
    assert generator.generate([[3, 4]], seed=0, max_new_tokens=20) == [hugging_face(model, [3, 4], 20)]


def test_stop_tokens(model):
    prompt = prompts_of((8,))[0]
    whole = hugging_face(model, prompt, 30)
    stop = next(token for i, token in enumerate(whole) if i > 3 and token not in whole[:i])
    end = whole.index(stop) + 1
    generator = Generator(model, 1, 60)
    request, after = generator.submit(prompt, 30, stop=[60, stop]), generator.submit([1, 2, 3], 5)
    generator.run()
    assert request.tokens == whole[:end] and request.finished == "stop"
    assert request.tokens == hugging_face(model, prompt, 30, eos_token_id=stop)
    assert after.tokens == hugging_face(model, [1, 2, 3], 5)
    first = generator.submit(prompt, 30, stop=whole[0])  # the token of the prefill
    generator.run()
    assert first.tokens == whole[:1] and first.finished == "stop" and generator.running == 0


def test_streaming(model):
    seen = []
    generator = Generator(model, 2, 40)
    requests = [generator.submit(p, 6, on_token=lambda r, t: seen.append((r, t))) for p in prompts_of((5, 9, 7))]
    generator.run()
    for request in requests:
        assert [token for r, token in seen if r is request] == request.tokens
    order = [requests.index(r) for r, _ in seen]
    assert order[:4] == [0, 1, 0, 1]  # as they come, not when a request has ended


def test_a_callback_that_raises_loses_no_token(model):
    def fails(request, token):
        raise KeyError("mine")

    prompts = prompts_of((5, 9))
    generator = Generator(model, 2, 40)
    generator.submit(prompts[0], 4, on_token=fails)
    other = generator.submit(prompts[1], 6)
    errors = 0
    while True:
        try:
            if not generator.step():
                break
        except KeyError:
            errors += 1
    assert errors == 4 and other.tokens == hugging_face(model, prompts[1], 6)


def test_the_first_of_two_errors_is_raised(model):
    def fails(name):
        def on_token(request, token):
            raise KeyError(name)

        return on_token

    generator = Generator(model, 2, 40)
    for name, prompt in zip(("first", "second"), prompts_of((5, 9)), strict=True):
        generator.submit(prompt, 2, on_token=fails(name))
    with pytest.raises(KeyError, match="first"):
        generator.run()


def test_cancelled_requests(model):
    prompts = prompts_of((5, 9, 7))
    generator = Generator(model, 1, 40)
    running, waiting, last = (generator.submit(prompt, 10) for prompt in prompts)
    for _ in range(3):
        generator.step()
    count = len(running.tokens)
    generator.cancel(waiting)
    generator.cancel(running)
    assert running.finished == waiting.finished == "cancelled" and generator.running == 0
    generator.run()
    assert len(running.tokens) == count and waiting.tokens == []
    assert last.tokens == hugging_face(model, prompts[2], 10)
    generator.cancel(last)
    assert last.finished == "length"


@pytest.mark.parametrize("limit", [1, 9, 17])
def test_the_books_of_a_generator(model, device, limit):
    """Prefills are as full as they may be, steps no dearer and no more than they must be, and slots are held by who goes on."""
    draw = random.Random(limit)
    generator = Generator(model, 3, 40, prefill_tokens=limit)
    prefill, compute = generator._prefill, generator._compute

    def joining(batch, slots):
        counts = [len(request.prompt) for request in batch]
        assert len(batch) == len(slots) == len(set(slots)) and (len(batch) == 1 or sum(counts) <= limit)
        if generator.waiting and generator.unused:
            assert sum(counts) + len(generator.waiting[0].prompt) > limit
        assert [generator.owner[slot] for slot in slots] == batch
        prefill(batch, slots)

    def computing(mode, reads):
        assert mode == max(request.mode for request in generator.owner if request is not None)
        compute(mode, reads)

    generator._prefill, generator._compute = joining, computing
    requests = []
    choices = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}, {"temperature": 0.5, "top_p": 0.5}]
    for _ in range(40):
        for _ in range(draw.choice((0, 0, 1, 2))):
            prompt = [draw.randrange(V) for _ in range(draw.randint(1, 9))]
            options = draw.choice(choices) | {"stop": draw.sample(range(V), draw.choice((0, 16)))}
            requests.append(generator.submit(prompt, draw.randint(1, 8), seed=draw.randrange(99), **options))
        if requests and draw.random() < 0.1:
            generator.cancel(draw.choice(requests))
        busy = generator.step()
        owners = generator.owner
        held = [slot for slot, request in enumerate(owners) if request is not None]
        assert sorted([*held, *generator.unused]) == [0, 1, 2] and generator.running == len(held)
        assert generator.modes == [sum(owners[slot].mode == mode for slot in held) for mode in (GREEDY, SAMPLED, FILTERED)]
        assert busy == bool(held or generator.waiting or generator.sent)
        if device.type == "cpu":  # where the host has read every token
            assert not generator.sent and all(owners[slot].finished is None for slot in held)
            assert generator.rows.slot.tolist() == [slot if slot in held else -1 for slot in range(3)]
            lengths = [len(owners[slot].prompt) + len(owners[slot].tokens) - 1 for slot in held]
            assert generator.rows.length[held].tolist() == lengths
            assert [generator.base[slot] + generator.steps for slot in held] == [n + 1 for n in lengths]
    generator.run()
    assert generator.modes == [0, 0, 0] and generator.running == 0 and not generator.waiting and not generator.sent
    for request in requests:
        ended, count = request.finished, len(request.tokens)
        assert ended in ("stop", "length", "cancelled") and count <= request.max_new_tokens
        assert not set(request.tokens[:-1]) & set(request.stop)
        assert ended != "length" or (count == request.max_new_tokens and request.tokens[-1] not in request.stop)
        assert ended != "stop" or request.tokens[-1] in request.stop


def test_steps_of_one_request(model):
    """The prefill gives the first token, each step one more; a prefill is no step."""
    for tokens in (1, 2, 5):
        generator, calls = Generator(model, 2, 40), []
        compute = generator._compute
        generator._compute = lambda *args, calls=calls, compute=compute: (calls.append(1), compute(*args))
        generator.generate([[1, 2, 3]], tokens)
        assert generator.steps == tokens - 1
        if generator.device.type == "cpu":
            assert len(calls) == tokens - 1


MOST = 2**63 - 1


@pytest.mark.parametrize(
    ("argument", "call", "taken", "refused"),
    [
        ("max_batch", lambda g, n: Generator(g.model, n, 40), 1, 0),
        ("max_length", lambda g, n: Generator(g.model, 1, n), 2, 1),
        ("prefill_tokens", lambda g, n: Generator(g.model, 1, 40, prefill_tokens=n), 1, 0),
        ("prompt", lambda g, n: g.submit([n], 5), V - 1, V),
        ("prompt", lambda g, n: g.submit([3, n], 5), 0, -1),
        ("prompt", lambda g, n: g.submit([1] * n, 20), 20, 21),
        ("max_new_tokens", lambda g, n: g.submit([1], n), 1, 0),
        ("temperature", lambda g, n: g.submit([1], 5, temperature=n), 0, -1e-300),
        ("temperature", lambda g, n: g.submit([1], 5, temperature=n), torch.finfo(torch.float32).max, 3.5e38),
        ("top_k", lambda g, n: g.submit([1], 5, top_k=n), 0, -1),
        ("top_k", lambda g, n: g.submit([1], 5, top_k=n), MOST, MOST + 1),
        ("top_p", lambda g, n: g.submit([1], 5, top_p=n), 1, 1.0000001),
        ("top_p", lambda g, n: g.submit([1], 5, top_p=n), 5e-324, 0),
        ("seed", lambda g, n: g.submit([1], 5, seed=n), MOST, MOST + 1),
        ("seed", lambda g, n: g.submit([1], 5, seed=n), -MOST - 1, -MOST - 2),
        ("stop", lambda g, n: g.submit([1], 5, stop=n), MOST, MOST + 1),
        ("stop", lambda g, n: g.submit([1], 5, stop=n), 0, -1),
        ("stop", lambda g, n: g.submit([1], 5, stop=range(n)), STOPS, STOPS + 1),
        ("max_batch", lambda g, n: [g.submit([1], 5, wait=False) for _ in range(n)], 2, 3),
    ],
)
def test_limits(argument, call, taken, refused):
    """A number at its limit is taken, the next one is refused."""
    model = model_of("cpu")
    call(Generator(model, 2, 40), taken)
    with pytest.raises(ValueError, match=rf"^rat_ext\.Generator\.\w+: {argument}: expected .+, got "):
        call(Generator(model, 2, 40), refused)


def test_modes():
    """What a request needs of a step, by its options."""
    for mode, options in (
        (GREEDY, {}),
        (GREEDY, {"top_k": 3, "top_p": 0.5}),
        (SAMPLED, {"temperature": 0.1}),
        (FILTERED, {"temperature": 0.1, "top_k": 1}),
        (FILTERED, {"temperature": 0.1, "top_p": 0.99}),
    ):
        assert Generator(model_of("cpu"), 1, 40).submit([1], 2, **options).mode == mode


# ---- choosing ----------------------------------------------------------------------------------------------------------


def test_uniform_numbers(device):
    seed = torch.arange(200, device=device)[:, None]
    u = uniform(seed, torch.arange(100, device=device, dtype=torch.int32)[None]).flatten()
    assert u.min() >= 0 and u.max() < 1 and len(u.unique()) == len(u)
    counts = torch.histc(u.float(), 20, 0, 1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 50  # chi squared of 19 degrees of freedom: one in 10,000
    pairs = u.view(200, 100)
    for a, b in ((pairs[:, 1:], pairs[:, :-1]), (pairs[1:], pairs[:-1])):
        assert abs(float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])) < 0.03


def draws(device, logits, mode, count=20000, temperature=1.0, top_k=0, top_p=1.0):
    def column(x, dtype):
        return torch.full((count,), x, dtype=dtype, device=device)

    options = column(temperature, torch.float32), column(top_k, torch.int64), column(top_p, torch.float32)
    seeds = torch.arange(count, device=device)
    token = choose(logits.to(device).expand(count, -1), mode, *options, seeds, column(9, torch.int32))
    return torch.bincount(token, minlength=logits.shape[-1]).cpu() / count


def test_frequencies_are_the_probabilities(device):
    logits = torch.tensor([1.0, 3.0, -2.0, 2.0, 0.0])
    for options, kept in (
        ({}, [0, 1, 2, 3, 4]),
        ({"temperature": 2.0}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 100}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.8}, [1, 3]),  # 0.64 + 0.24
        ({"top_p": 0.6}, [1]),
        ({"top_k": 3, "top_p": 0.95}, [0, 1, 3]),
        ({"top_k": 1, "temperature": 50.0}, [1]),
    ):
        want = torch.full((5,), -torch.inf)
        want[kept] = logits[kept] / options.get("temperature", 1.0)
        for mode in (SAMPLED, FILTERED) if not {"top_k", "top_p"} & set(options) else (FILTERED,):
            assert (draws(device, logits, mode, **options) - want.softmax(0)).abs().max() < 0.015, options


def test_a_row_has_one_token_in_every_mode(device):
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).to(device)
    greedy = torch.arange(50, device=device) % 2 == 0
    options = (
        torch.where(greedy, torch.tensor(0.0), torch.tensor(1.0)).to(device), torch.zeros(50, dtype=torch.int64, device=device),
        torch.ones(50, device=device), torch.arange(50, device=device), torch.full((50,), 7, device=device),
    )  # fmt: skip
    sampled, filtered = (choose(logits, mode, *options) for mode in (SAMPLED, FILTERED))
    assert torch.equal(sampled, filtered)
    assert torch.equal(sampled[greedy], choose(logits, GREEDY, *options)[greedy])
    assert not torch.equal(sampled, logits.argmax(-1))


# ---- memory, errors ----------------------------------------------------------------------------------------------------


def test_memory_by_slot():
    sizes = {
        pattern: state_bytes(RATConfig.preset("1.3b", pattern), 4096, torch.bfloat16)
        for pattern in ("attention", "attention-swa", "rat-swa", "rat")
    }
    assert sizes["attention"] == 24 * 4096 * 2 * 2048 * 2
    assert sizes["attention-swa"] == 12 * (4096 + 1025) * 2 * 2048 * 2
    rat = 256 * 2 * 2048 * 2 + 2 * 2048 * 4 + 4  # chunk states, running states, the length
    assert sizes["rat"] == 24 * rat
    assert sizes["rat-swa"] == 12 * (rat + 1025 * 2 * 2048 * 2)


def test_memory_is_that_of_state_bytes(device):
    model = model_of(device)
    assert Generator(model, 3, 40).nbytes == 3 * state_bytes(model.config, 40, torch.float32)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda g: g.submit([1] * 21, 20),
            r"submit: prompt: expected at most max_length = 40 tokens with .*, got 21 \+ 20 max_new",
        ),
        (lambda g: g.submit([], 5), "submit: prompt: expected at least one token, each from 0 to 60, got none"),
        (lambda g: g.submit([1, 61], 5), "submit: prompt: expected at least one token, each from 0 to 60, got 61"),
        (lambda g: g.submit(torch.ones(1, 4), 5), r"submit: prompt: expected one row of tokens, got shape \(1, 4\)"),
        (lambda g: g.submit([1], 0), "submit: max_new_tokens: expected an int from 1 on, got 0"),
        (lambda g: g.submit([1], 5, temperature=-1), "submit: temperature: expected a finite number from 0 on, got -1"),
        (lambda g: g.submit([1], 5, top_k=0.5), "submit: top_k: expected an int of 64 bits from 0 on, got 0.5"),
        (lambda g: g.submit([1], 5, top_k=2**63), "submit: top_k: expected an int of 64 bits from 0 on, got"),
        (lambda g: g.submit([1], 5, temperature=10**400), "submit: temperature: expected a finite number from 0 on, got 1"),
        (lambda g: g.submit([1], 5, stop=[2**63]), "submit: stop: expected up to 16 tokens, got"),
        (lambda g: g.submit([1], 5, stop=None), "submit: stop: expected a sequence of ints, got NoneType"),
        (lambda g: g.submit([1], 5, on_token="x"), "submit: on_token: expected a function or None, got 'x'"),
        (lambda g: g.submit([1], 5, wait="x"), "submit: wait: expected a bool, got 'x'"),
        (lambda g: g.submit(3, 5), "submit: prompt: expected a sequence of ints, got int"),
        (
            lambda g: g.submit(torch.ones(4, device="meta"), 5),
            "submit: prompt: expected one row of tokens, got one on the meta",
        ),
        (lambda g: g.cancel("x"), r"cancel: request: expected what submit\(\) has returned, got str"),
        (lambda g: g.generate(3), "generate: prompts: expected a sequence of prompts, got int"),
        (lambda g: g.generate([[1]], 5, seed="x"), "generate: seed: expected an int, got 'x'"),
        (lambda g: g.submit([1], 5, top_p=0), "submit: top_p: expected a number above 0, up to 1, got 0"),
        (lambda g: g.submit([1], 5, seed=2**63), "submit: seed: expected an int of 64 bits, got 9223372036854775808"),
        (lambda g: g.submit([1], 5, stop=range(STOPS + 1)), "submit: stop: expected up to 16 tokens, got"),
        (
            lambda g: [g.submit([1], 5, wait=False) for _ in range(3)],
            "submit: max_batch: expected a free slot among 2, got 2 requests under way",
        ),
        (lambda g: Generator(g.model, 0, 40), "__init__: max_batch: expected an int from 1 on, got 0"),
        (lambda g: Generator(g.model, 1, 1.5), "__init__: max_length: expected an int from 2 on, got 1.5"),
        (lambda g: Generator(g.model.model, 1, 40), "__init__: model: expected a rat_ext.models.RATForCausalLM, got RATModel"),
    ],
)
def test_errors_are_one_line(model, call, words):
    with pytest.raises(ValueError, match=f"^rat_ext.Generator.{words}") as error:
        call(Generator(model, 2, 40))
    assert "\n" not in str(error.value)


def test_generate_leaves_nothing_behind_an_error(model):
    generator = Generator(model, 2, 40)
    with pytest.raises(ValueError, match="prompt: expected at most max_length"):
        generator.generate([[1, 2], [3] * 50], 5)
    assert not generator.waiting and not generator.step()


# ---- which tokens may be drawn -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", range(8))
def test_top_k_draws_from_k_tokens(device, top_k):
    """All k of them and no other; from all where k is 0, or as many as there are, or more."""
    logits = torch.tensor([0.3, 0.1, 0.5, 0.0, 0.2, 0.4], device=device)
    seed = torch.arange(3000, device=device)
    row = torch.ones(3000, device=device)
    drawn = choose(logits.expand(3000, -1), FILTERED, row, row.long() * top_k, row, seed, row.int())
    assert set(drawn.tolist()) == set(logits.argsort(descending=True)[: top_k or 6].tolist())


def logit_of(weight: float, device) -> torch.Tensor:
    """A float32 whose exponential is a power of two, on this device."""
    near = torch.tensor(weight).log().view(torch.int32) + torch.arange(-4, 5, dtype=torch.int32)
    near = near.view(torch.float32).to(device)
    exact = near[near.exp() == weight]
    if not len(exact):
        pytest.skip(f"no float32 has the exponential {weight} here")
    return exact[0]


@pytest.mark.parametrize(("top_p", "count"), [(0.25, 1), (0.5, 1), (0.501, 2), (0.75, 2), (0.751, 4), (1.0, 4)])
def test_top_p_takes_the_least_number_that_reaches_p(device, top_p, count):
    """Also where they reach it exactly: probabilities 1/2, 1/4, 1/8, 1/8. Those that are alike stay together."""
    logits = torch.stack([torch.zeros((), device=device), *(logit_of(x, device) for x in (0.5, 0.25, 0.25))])
    seed = torch.arange(3000, device=device)
    row = torch.ones(3000, device=device)
    drawn = choose(logits.expand(3000, -1), FILTERED, row, row.long() * 0, row * top_p, seed, row.int())
    assert set(drawn.tolist()) == set(range(count))


@pytest.mark.parametrize("cut", [1, 2, 5])
@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 7}])
def test_a_draw_depends_on_the_seed_and_the_tokens_so_far(model, cut, options):
    """So whoever goes on from some of the tokens, as a prompt, draws the rest of them."""
    generator = Generator(model, 4, 40)
    prompt = [3, 1, 4, 1, 5]
    for seed in range(4):
        [whole] = generator.generate([prompt], 10, seed=seed, **options)
        [rest] = generator.generate([prompt + whole[:cut]], 10 - cut, seed=seed, **options)
        assert rest == whole[cut:]


def test_a_request_that_a_callback_cancels_gets_no_token_more(model):
    """Though one is on its way: both rows of the step had one."""
    generator = Generator(model, 2, 40)
    requests = []

    def cancels(request, token):
        if len(request.tokens) == 3:
            generator.cancel(requests[1])

    requests.append(generator.submit([1, 2], 6, on_token=cancels))
    said = []
    requests.append(generator.submit([3, 4], 6, on_token=lambda request, token: said.append(token)))
    generator.run()
    assert len(requests[0].tokens) == 6 and requests[1].finished == "cancelled"
    assert requests[1].tokens == said and len(said) == 2
    assert sorted(generator.unused) == [0, 1]


@pytest.mark.gpu
def test_garbage_does_not_end_a_capture(model, monkeypatch):
    """A graph of somebody else's that is in a cycle of garbage would be freed by the collector, in the midst of a capture."""
    other, x = torch.cuda.CUDAGraph(), torch.zeros(4, device=model.device)
    with torch.cuda.graph(other):
        x.add_(1)
    held, compute = [other], Generator._compute
    del other

    def littering(self, *arguments):
        if held and torch.cuda.is_current_stream_capturing():
            cycle = [held.pop()]
            cycle.append(cycle)
            del cycle
            [[i] for i in range(3000)]  # more than the collector waits for
        return compute(self, *arguments)

    monkeypatch.setattr(Generator, "_compute", littering)
    threshold = gc.get_threshold()
    gc.set_threshold(100, 1, 1)
    try:
        found = Generator(model, 2, 40).generate([[3, 1, 4]], 6)
    finally:
        gc.set_threshold(*threshold)
    assert not held and gc.isenabled() and len(found[0]) == 6
