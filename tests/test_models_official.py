"""Checkpoints of the authors' code: their logits and continuations, files of other sizes, files that are broken or hostile."""

import collections
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="rat_ext.models needs transformers: pip install 'rat_ext[models]'")

import rat_ext
from rat_ext.models import RATForCausalLM, load_official_checkpoint
from rat_ext.models.__main__ import main, parse

DATA = Path(__file__).parent / "data"
NAMES = ("attention", "attention-swa", "rat", "rat-swa", "rnn")
GREEDY = {"do_sample": False, "max_new_tokens": 8}


def path_of(name) -> Path:
    return DATA / f"official_{name}.pth"


def read(name) -> dict:
    with torch.serialization.safe_globals([(collections.OrderedDict, "easydict.EasyDict")]):
        return torch.load(path_of(name), weights_only=True)


def expected(name) -> dict:
    return torch.load(DATA / f"official_{name}.expected.pt", weights_only=True)


def logits_of(model, name):
    return logits_of_tokens(model, expected(name)["input_ids"])


def logits_of_tokens(model, ids):
    with torch.no_grad():
        return model(ids).logits


def assert_right(model, name):
    torch.testing.assert_close(logits_of(model, name), expected(name)["logits"], rtol=0, atol=2e-4)


def plain(config):
    """Nested dicts in place of EasyDicts."""
    return {key: plain(value) for key, value in config.items()} if isinstance(config, dict) else config


def saved(folder, name, change=lambda checkpoint: None) -> Path:
    """A copy of a checkpoint, changed, with a plain configuration."""
    checkpoint = read(name)
    checkpoint["config"] = plain(checkpoint["config"])
    checkpoint = change(checkpoint) or checkpoint
    path = folder / "changed.pth"
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_continuations(name):
    model = load_official_checkpoint(path_of(name))
    assert not model.training and model.dtype == torch.float32 and model.device.type == "cpu"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_right(model, name)
    want = expected(name)
    if "continuation" in want:
        for row, continuation in zip(want["input_ids"], want["continuation"], strict=True):
            assert torch.equal(model.generate(row[None], **GREEDY)[0, 24:], continuation)
        got = model.generate(want["input_ids"], **GREEDY)
        assert torch.equal(got[:, 24:], want["continuation"])


@pytest.mark.parametrize("name", NAMES)
def test_conversion(name, tmp_path, capsys):
    assert main(["convert", str(path_of(name)), str(tmp_path / "out")]) == 0
    assert "layers of width 32" in capsys.readouterr().out
    model = RATForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(model, name), logits_of(load_official_checkpoint(path_of(name)), name))
    sizes = read(name)["config"]["model"]["embedding"]
    assert model.config.max_position_embeddings == sizes["seq_len"] and model.config.initializer_range == 0.3


def test_conversion_by_command(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(rat_ext.__file__).parents[1])}
    command = [sys.executable, "-m", "rat_ext.models", "convert"]
    absent = subprocess.run([*command, "absent.pth", "out"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert absent.returncode == 2
    line = "python -m rat_ext.models: rat_ext.load_official_checkpoint: absent.pth: there is no such file"
    assert absent.stderr.splitlines()[-1] == line and "Traceback" not in absent.stderr


def test_arguments_of_the_command(tmp_path, capsys):
    options = parse(["convert", "a", "b", "--set", "chunk_size=8", "--set", "layer_types=rat", "--set", "rope_theta=1e4"])
    assert options.overrides == {"chunk_size": 8, "layer_types": "rat", "rope_theta": 1e4}
    with pytest.raises(SystemExit):
        parse(["convert", "a", "b", "--set", "chunk_size"])
    assert "argument --set: expected NAME=VALUE, got 'chunk_size'" in capsys.readouterr().err
    assert main(["convert", str(path_of("rat")), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert RATForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16


# ---- other files -------------------------------------------------------------------------------------------------------


def test_the_seeds_tell_the_choices_apart():
    """Each of these is a mistake that a port could make; each is seen."""
    name = "rat-swa"
    for overrides in ({"sliding_window": 5}, {"chunk_size": 8}, {"rms_norm_eps": 1e-5}, {"rope_theta": 5e3}):
        wrong = load_official_checkpoint(path_of(name), **overrides)
        assert (logits_of(wrong, name) - expected(name)["logits"]).abs().max() > 3e-4, overrides


def test_prefixes_and_absent_keys(tmp_path):
    """A compiled model's names; a tied head that is not there; nothing but the tensors and the configuration."""

    def change(checkpoint):
        task = {f"_orig_mod.{key}": x for key, x in checkpoint["task"].items() if "lm_head" not in key}
        return {"task": task, "config": checkpoint["config"]}

    assert_right(load_official_checkpoint(saved(tmp_path, "rat", change)), "rat")

    def inner(checkpoint):
        checkpoint["task"] = {key.replace("backbone.", "backbone._orig_mod."): x for key, x in checkpoint["task"].items()}

    assert_right(load_official_checkpoint(saved(tmp_path, "rat-swa", inner)), "rat-swa")


def test_a_head_of_its_own(tmp_path):
    def change(checkpoint):
        checkpoint["task"]["head.lm_head.weight"] = 2 * checkpoint["task"]["head.lm_head.weight"]
        checkpoint["config"]["task"]["tie_embedding"] = False

    model = load_official_checkpoint(saved(tmp_path, "rat", change))
    assert model.lm_head.weight is not model.model.embed_tokens.weight and not model.config.tie_word_embeddings
    torch.testing.assert_close(logits_of(model, "rat"), 2 * expected("rat")["logits"], rtol=0, atol=4e-4)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(RATForCausalLM.from_pretrained(tmp_path / "out"), "rat"), logits_of(model, "rat"))

    def absent(checkpoint):
        del checkpoint["task"]["head.lm_head.weight"]
        checkpoint["config"]["task"]["tie_embedding"] = False

    with pytest.raises(ValueError, match="head.lm_head.weight is missing, and its config ties no embeddings$"):
        load_official_checkpoint(saved(tmp_path, "rat", absent))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("rat", {"num_attention_heads": 4, "chunk_size": 4}),
        ("rat-swa", {"num_attention_heads": 4, "chunk_size": 4, "sliding_window": 6, "layer_types": "rat-swa"}),
        ("attention", {"num_attention_heads": 4, "layer_types": "attention"}),
        ("attention-swa", {"num_attention_heads": 4, "sliding_window": 6, "layer_types": "attention-swa"}),
        ("rnn", {}),
    ],
)
def test_without_a_configuration(tmp_path, name, overrides):
    """Sizes from shapes, and from the arguments what shapes do not tell."""
    path = saved(tmp_path, name, lambda checkpoint: {"task": checkpoint["task"]})
    assert_right(load_official_checkpoint(path, **overrides), name)
    for missing in overrides:
        rest = {key: value for key, value in overrides.items() if key != missing}
        if name == "rat-swa" and missing == "layer_types":
            continue  # what is not gated, beside gated layers, still may be either
        with pytest.raises(ValueError, match="^rat_ext.load_official_checkpoint: .*; give "):
            load_official_checkpoint(path, **rest)


def test_tensors_alone(tmp_path):
    path = tmp_path / "tensors.pth"
    torch.save(dict(read("rnn")["task"]), path)
    assert_right(load_official_checkpoint(path), "rnn")


@pytest.mark.parametrize("name", NAMES)
def test_without_positions(tmp_path, name):
    """A configuration whose position encoding is empty: nothing is rotated."""

    def change(checkpoint):
        checkpoint["config"]["model"]["embedding"]["pe"] = {"_name_": "empty"}

    model = load_official_checkpoint(saved(tmp_path, name, change), **({"chunk_size": 4} if "rat" in name else {}))
    got, want = logits_of(model, name), expected(name)["logits"]
    size = {"attention": 1, "attention-swa": 1, "rat": 4, "rat-swa": 1, "rnn": 24}[name]
    torch.testing.assert_close(got[:, :size], want[:, :size], rtol=0, atol=2e-4)  # one position: no difference
    assert (got - want).abs().max() > 1e-2 or name == "rnn"
    got = model.generate(expected(name)["input_ids"], **GREEDY)
    assert torch.equal(got[:, 24:], logits_of_tokens(model, got)[:, 23:-1].argmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_become_float32(tmp_path, dtype):
    def change(checkpoint):
        checkpoint["task"] = {key: x.to(dtype) for key, x in checkpoint["task"].items()}

    model = load_official_checkpoint(saved(tmp_path, "rat", change))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    want = {key: x.to(dtype).float() for key, x in read("rat")["task"].items()}
    assert torch.equal(model.model.embed_tokens.weight, want["embedding.wte.weight"])


@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (4, 4), (2, 2), (2, 1)])
def test_heads_go_to_their_groups(tmp_path, heads, groups):
    """Random checkpoints of other head counts, against the authors' tiled groups written down here."""
    from rat_ext import reference, rotary_tables

    torch.manual_seed(0)
    d, dim = 32, 32 // heads
    rows = (d, d, d, groups * dim, groups * dim)
    layer = {
        "seq_layer.in_proj.weight": 0.3 * torch.randn(sum(rows), d),
        "seq_layer.gate_bias": torch.randn(d),
        "seq_layer.input_norm.weight": 1 + 0.1 * torch.randn(d),
        "seq_layer.out_proj.weight": 0.3 * torch.randn(d, d),
        "hidden_layer.ln.weight": torch.ones(d),
        "hidden_layer.fc1.weight": torch.zeros(24, d),
        "hidden_layer.fc2.weight": torch.zeros(d, 24),
    }
    task = {f"backbone.layers.0.{key}": x for key, x in layer.items()}
    task |= {"embedding.wte.weight": torch.randn(11, d), "backbone.ln.weight": torch.ones(d)}
    path = tmp_path / "x.pth"
    torch.save({"task": task}, path)
    model = load_official_checkpoint(path, num_attention_heads=heads, chunk_size=4)
    assert model.config.num_groups == groups and model.config.intermediate_size == 24
    ids = torch.randint(0, 11, (2, 13))
    x = task["embedding.wte.weight"][ids]
    normed = torch.nn.functional.rms_norm(x, (d,), layer["seq_layer.input_norm.weight"], 1e-6)
    out_gate, v, gate, q, k = (
        part.unflatten(-1, (-1, dim)) for part in (normed @ layer["seq_layer.in_proj.weight"].T).split(rows, dim=-1)
    )
    q, k = (x.repeat(1, 1, heads // groups, 1) for x in (q, k))  # tiled: head h has group h mod G
    cos, sin = rotary_tables(4, dim)
    y = reference.rat_attention(
        q, k, v, gate, 4, gate_bias=layer["seq_layer.gate_bias"].view(heads, dim), out_gate=out_gate, rotary_cos=cos,
        rotary_sin=sin,
    )  # fmt: skip
    x = x + y.flatten(2) @ layer["seq_layer.out_proj.weight"].T
    want = torch.nn.functional.rms_norm(x, (d,), None, 1e-6) @ task["embedding.wte.weight"].T
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)


# ---- what is wrong is said in one line ---------------------------------------------------------------------------------


def refused(path, **overrides) -> str:
    with pytest.raises(ValueError) as found:
        load_official_checkpoint(path, **overrides)
    text = str(found.value)
    assert "\n" not in text and len(text) < 400 and text.startswith(f"rat_ext.load_official_checkpoint: {path}: "), text
    return text.removeprefix(f"rat_ext.load_official_checkpoint: {path}: ")


class Hostile:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_file_executes_nothing(tmp_path, zipped):
    trace, path = tmp_path / "executed", tmp_path / "hostile.pth"
    checkpoint = read("rat") | {"config": Hostile(str(trace))}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    assert "more than tensors and plain values" in refused(path)
    path.write_bytes(pickle.dumps(Hostile(str(trace))))
    refused(path)
    assert main(["convert", str(path), str(tmp_path / "out")]) == 2
    assert not trace.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(tmp_path, share):
    whole = path_of("rat").read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(whole[: int(share * len(whole))])
    assert refused(path).startswith("cannot be read: ")


def test_no_checkpoint_at_all(tmp_path):
    assert refused(tmp_path / "absent.pth") == "there is no such file"
    assert refused(tmp_path) == "expected a file, got a folder"
    path = tmp_path / "x.pth"
    for content, words in (
        ([1, 2], "expected a dict with the key 'task', got list"),
        ({"model": {}}, "expected the key 'task', or tensors: 'model' is no tensor but dict"),
        ({"task": [1]}, "task: expected a dict of tensors, got list"),
        ({"task": {"a": 1}}, "task: 'a' is no tensor but int"),
        ({"task": {}}, "the tensor embedding.wte.weight is missing"),
        ({"task": {"embedding.wte.weight": torch.ones(2, 8)}}, "it has no layers (backbone.layers.0....)"),
    ):
        torch.save(content, path)
        assert refused(path) == words
    path.write_text("hello")
    assert refused(path).startswith("cannot be read: ")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "b")
    assert refused(path).startswith("cannot be read: ")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_or_misshapen_tensor(tmp_path, name):
    for key in read(name)["task"]:
        if key == "head.lm_head.weight":
            continue

        def without(checkpoint, key=key):
            checkpoint["task"] = {k: x for k, x in checkpoint["task"].items() if k != key and k != "head.lm_head.weight"}

        def longer(checkpoint, key=key):
            x = checkpoint["task"][key]
            checkpoint["task"][key] = torch.cat((x, x[:1]))
            del checkpoint["task"]["head.lm_head.weight"]

        assert f"the tensor {key} is missing" in refused(saved(tmp_path, name, without))
        if key != "embedding.wte.weight":
            refused(saved(tmp_path, name, longer))


def test_other_wrong_contents(tmp_path):
    def task(**changes):
        def change(checkpoint):
            checkpoint["task"] = dict(checkpoint["task"]) | {key.replace("__", "."): x for key, x in changes.items()}

        return change

    path = saved(tmp_path, "rat", task(backbone__layers__0__seq_layer__conv__weight=torch.ones(3)))
    assert refused(path) == "the tensor backbone.layers.0.seq_layer.conv.weight belongs to no layer that this package has"
    path = saved(tmp_path, "rat", task(backbone__layers__4__hidden_layer__ln__weight=torch.ones(32)))
    assert refused(path) == "the tensors of backbone.layers.2 are missing"
    path = saved(tmp_path, "rat", task(backbone__ln__weight=torch.ones(32, dtype=torch.int64)))
    assert refused(path) == "backbone.ln.weight: expected floats of shape (32,), got int64 of shape (32,)"
    for keys, value, words in (
        (("hidden_cell", "act_fn"), "relu", "config: act_fn: expected gelu, got 'relu'"),
        (("ln",), "layernorm", "config: ln: expected rmsnorm, got 'layernorm'"),
        (("..", "embedding", "pe", "dim"), 4, "config: pe: expected dim 8, the size of a head, got 4"),
        (("..", "embedding", "pe", "_name_"), "rope", "config: pe: expected interrope, got 'rope'"),
        (("..", "embedding", "pe", "_name_"), "alibi", "config: pe: expected interrope, got 'alibi'"),
        (("seq_cell", "num_head"), 5, "its sizes make no model: rat_ext.RATConfig: num_attention_heads: expected "),
        (("seq_cell", "chunk_size"), 0, "its config names no"),
        (("seq_cell", "chunk_size"), "x", "its sizes make no model: rat_ext.RATConfig: chunk_size: expected "),
    ):

        def change(checkpoint, keys=keys, value=value):
            place = checkpoint["config"]["model"]["backbone"]
            for key in keys[:-1]:
                place = checkpoint["config"]["model"] if key == ".." else place[key]
            place[keys[-1]] = value
            checkpoint["config"]["model"]["embedding"]["pe"].pop("chunk_size", None)

        assert refused(saved(tmp_path, "rat", change)).startswith(words)
    assert "bogus" in refused(path_of("rat"), layer_types="bogus")
