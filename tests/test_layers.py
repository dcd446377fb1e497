"""The layer, the language model and the arguments of ``python -m rat_ext``: pieces equal the whole, wrong arguments say so."""

import pytest
import torch

from rat_ext.__main__ import parse
from rat_ext.layers import RATLayer
from rat_ext.model import RATLM


def test_layer_in_pieces(device):
    torch.manual_seed(0)
    layer = RATLayer(64, 4, 2, 8, max_length=16, device=device)  # a table of two chunks, which has to grow
    x = torch.randn(2, 50, 64, device=device)
    whole = layer(x)
    first, state = layer(x[:, :21], return_state=True)
    second, state = layer(x[:, 21:40], state, return_state=True)
    cache = state.detach().reserve(50)
    steps = [layer.step(x[:, t], cache) for t in range(40, 50)]
    pieces = torch.cat((first, second, torch.stack(steps, dim=1)), dim=1)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)


def test_layer_packed(device):
    torch.manual_seed(0)
    layer = RATLayer(64, 4, 2, 8, device=device)
    x = torch.randn(1, 50, 64, device=device)
    cuts = [0, 13, 13, 50]
    packed = layer(x, cu_seqlens=torch.tensor(cuts, dtype=torch.int32, device=device))
    alone = [layer(x[:, a:b]) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)


def test_generated_logits_are_those_of_the_forward(device):
    torch.manual_seed(0)
    model = RATLM(32, 64, 2, 4, 2, 4, max_length=8).to(device)
    prompt = torch.randint(0, 32, (3, 7), device=device)
    tokens, logits = model.generate(prompt, 20, top_k=5, return_logits=True)
    assert tokens.shape == (3, 27) and torch.equal(tokens[:, :7], prompt)
    torch.testing.assert_close(logits, model(tokens)[:, 6:-1].detach(), rtol=1e-4, atol=1e-4)
    greedy = model.generate(prompt, 5, temperature=0)
    assert torch.equal(greedy, model.generate(prompt, 5, top_k=1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((64, 5, 1, 4), "num_heads: expected a divisor of d_model = 64, got 5"),
        ((64, 0, 1, 4), "num_heads: expected a divisor of d_model = 64, got 0"),
        ((64, 4, 3, 4), "num_groups: expected a divisor of num_heads = 4, got 3"),
        ((60, 4, 2, 4), "d_model: expected heads whose size .* is a multiple of 8 from 8 to 256, got 60 / 4 = 15"),
        ((2048, 4, 2, 4), "d_model: expected heads whose size .* got 2048 / 4 = 512"),
        ((64, 4, 2, 0), "chunk_size: expected at least 1, got 0"),
    ],
)
def test_layer_errors(arguments, words):
    with pytest.raises(ValueError, match=f"RATLayer: {words}"):
        RATLayer(*arguments)


def test_model_errors():
    model = RATLM(32, 32, 2, 4, 2, 4)
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    for caches in ([], [None]):
        with pytest.raises(ValueError, match=f"caches: expected one for each of the 2 layers, got {len(caches)}"):
            model(tokens, caches)
    for options, words in (
        ({"temperature": -1.0}, "temperature: expected at least 0, got -1.0"),
        ({"top_k": 0}, "top_k: expected at least 1 or None, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            model.generate(tokens, 3, **options)
    with pytest.raises(ValueError, match="expected .* T >= 1 and n >= 1, got"):
        model.generate(tokens[:, :0], 3)


def test_command_line(capsys, tmp_path):
    assert parse([]).parts == ["info", "check", "train", "time"]
    assert parse(["time", "info"]).parts == ["info", "time"]
    for arguments, words in (
        (["bogus"], "unknown part 'bogus'"),
        (["--train-seconds", "0"], "--train-seconds: expected more than 0, got 0.0"),
        (["--train-seconds", "nan"], "--train-seconds: expected more than 0, got nan"),
        (["--json", str(tmp_path / "absent" / "x.json")], "--json: no folder"),
    ):
        with pytest.raises(SystemExit) as stopped:
            parse(arguments)
        assert stopped.value.code == 2 and words in capsys.readouterr().err
