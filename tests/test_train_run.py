"""``python -m rat_ext.train run``: windows, recipe, checkpoints that a kill leaves whole, ranks, fine-tuning."""

import dataclasses
import json
import math
import signal
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra [train]")
pytest.importorskip("accelerate", reason="needs the extra [train]")

from train_helper import CONFIG, launch, prepared

from rat_ext.models import RATConfig, RATForCausalLM
from rat_ext.train import __main__ as command
from rat_ext.train import config as configs
from rat_ext.train import flops
from rat_ext.train import run as runs
from rat_ext.train._extra import Refused
from rat_ext.train.data import Tokens, Windows, collate
from rat_ext.train.plot import read_log


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("train"))


def load(base, name, text=CONFIG, **changes):
    """The configuration with another output, and fields of [train] changed."""
    run = configs.parse(configs_of(text) | {"output": name}, base)
    for key, value in changes.items():
        setattr(run.train, key, value)
    return run


def configs_of(text):
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return tomllib.loads(text)


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def trained(base):
    """A run that nothing stopped."""
    run = load(base, "whole")
    return run, runs.pretrain(run)


# ---- data ---------------------------------------------------------------------------------------------------------------


def test_windows_hold_the_tokens_and_what_follows(base):
    tokens = Tokens(base / "data", "validation")
    text = tokens.read(0, len(tokens))
    windows = Windows(tokens, 32)
    assert len(windows) == math.ceil((len(text) - 1) / 32) and len(tokens) % 32 != 1
    inputs = torch.cat([item["input_ids"] for item in windows])
    labels = torch.cat([item["labels"] for item in windows])
    assert (inputs[: len(text)].numpy() == text).all()
    expected = np.where(text[:-1] == tokens.eos, -100, text[1:])
    assert (labels[: len(text) - 1].numpy() == expected).all() and (labels[len(text) - 1 :] == -100).all()
    assert (text == tokens.eos).sum() > 5


def test_tokens_cross_shards(base, tmp_path, monkeypatch):
    from rat_ext.train import prepare as module

    monkeypatch.setattr(module, "PART", (3000, 3000))
    monkeypatch.setattr(module, "SLICE", 3000)
    module.prepare([str(base / "text.jsonl")], tmp_path / "data", processes=1, tokenizer=str(base / "data" / "tokenizer"),
                   validation=0.1)  # fmt: skip
    many, one = Tokens(tmp_path / "data"), Tokens(base / "data")
    assert len(many.shards) > 5 and len(one.shards) == 1
    assert sorted(many.read(0, 10**9)) == sorted(one.read(0, 10**9))
    end = int(many.ends[2])
    assert (many.read(end - 5, end + 7) == many.read(0, 10**9)[end - 5 : end + 7]).all()
    (tmp_path / "data" / f"{many.shards[1]['file']}.bin").write_bytes(b"x")
    with pytest.raises(Refused, match="data: shard: expected"):
        Tokens(tmp_path / "data")


@pytest.mark.parametrize("count", range(9, 42))
def test_a_window_of_a_round_is_full(count):
    """T tokens and the one after; where the text is read in order, the last window may be shorter."""

    class Text:
        eos = 0

        def __len__(self):
            return count

        def read(self, start, stop):
            return np.arange(start + 1, min(stop, count) + 1)

    drawn = Windows(Text(), 8, items=20)
    assert drawn.windows == sum(8 * w + 9 <= count for w in range(10))
    assert all((drawn[i]["labels"] == drawn[i]["input_ids"] + 1).all() for i in range(20))
    ordered = Windows(Text(), 8)
    labels = torch.cat([ordered[i]["labels"] for i in range(len(ordered))])
    assert labels[labels >= 0].tolist() == list(range(2, count + 1))


def test_rounds_have_every_window_once(base):
    windows = Windows(Tokens(base / "data"), 32, 1000, seed=3)
    n = windows.windows
    orders = [[windows.window(r * n + i) for i in range(n)] for r in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(n)) and orders[0] != orders[1] != list(range(n))
    assert [Windows(windows.tokens, 32, 10, seed=3).window(i) for i in range(10)] == orders[0][:10]
    assert [Windows(windows.tokens, 32, 10, seed=4).window(i) for i in range(10)] != orders[0][:10]
    with pytest.raises(Refused, match="data: tokens: expected more than T"):
        Windows(windows.tokens, 10**7, 5)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_step_has_the_same_windows_on_any_number_of_ranks(ranks):
    """As accelerate shares batches among ranks."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, SequentialSampler

    windows, micro, steps = 8, 2, 5
    accumulate = runs.shares(windows, micro, ranks)
    sampler = BatchSampler(SequentialSampler(range(windows * steps)), micro, drop_last=True)
    shards = [list(BatchSamplerShard(sampler, ranks, i)) for i in range(ranks)]
    for step in range(steps):
        mine = [i for shard in shards for batch in shard[step * accumulate : (step + 1) * accumulate] for i in batch]
        assert sorted(mine) == list(range(step * windows, (step + 1) * windows))
    with pytest.raises(Refused, match="windows that divide by micro_batch x ranks = 3 x 1, got 8 windows"):
        runs.shares(8, 3, 1)


def test_packed_documents_are_apart(base):
    tokens = Tokens(base / "data")
    windows = Windows(tokens, 32)
    first = next(i for i in range(len(windows)) if (windows[i]["input_ids"][:-4] == tokens.eos).any())
    items = [windows[i] for i in (first, first + 1)]
    apart, together = collate(items, tokens.eos), collate(items)
    ends = apart["cu_seq_lens_q"].tolist()
    inputs = apart["input_ids"][0]
    assert ends[0] == 0 and ends[-1] == 64 and 32 in ends and apart["cu_seq_lens_q"].dtype == torch.int32
    assert all(end % 32 == 0 or inputs[end - 1] == tokens.eos for end in ends) and apart["max_length_q"] <= 32
    assert len(ends) == 2 + int(sum((item["input_ids"][:-1] == tokens.eos).sum() + 1 for item in items)) - 1
    torch.manual_seed(0)
    model = RATForCausalLM(RATConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, chunk_size=4))
    start, stop = ends[1], ends[2]
    with torch.no_grad():
        whole = model(input_ids=inputs[None], cu_seq_lens_q=apart["cu_seq_lens_q"], max_length_q=apart["max_length_q"])
        alone = model(input_ids=inputs[None, start:stop])
        mixed = model(input_ids=together["input_ids"])
    torch.testing.assert_close(whole.logits[0, start:stop], alone.logits[0], rtol=0, atol=1e-6)
    assert not torch.allclose(mixed.logits.flatten(0, 1)[start:stop], alone.logits[0], atol=1e-4)


# ---- the recipe ---------------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_papers_recipe():
    recipe = configs.Train()
    assert (recipe.length, recipe.tokens_per_step, recipe.learning_rate, recipe.min_learning_rate) == (4096, 2**21, 8e-4, 1e-6)
    assert (recipe.betas, recipe.weight_decay, recipe.warmup, recipe.clip) == ([0.9, 0.95], 0.1, 0.05, 1.0)
    run = configs.parse({"output": "x", "model": {"size": "200m", "pattern": "rat-swa"}}, runs.Path("."))
    config = configs.model_config(run, 32000, 2)
    assert config.hidden_size == 1024 and config.layer_types[:2] == ["rat", "sliding_attention"]
    assert config.eos_token_id == 2 and config.max_position_embeddings == 4096


def test_it_learns_and_writes_what_it_says(trained, base):
    run, result = trained
    lines = read_log(run.output / "log.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6] and [line["tokens"] for line in steps][-1] == 6 * 256
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3 and abs(steps[0]["loss"] - math.log(320)) < 0.3
    assert all(line["tokens_per_second"] > 0 and line["mfu"] > 0 for line in steps)
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
    assert sorted(path.name for path in run.output.iterdir()) == [
        "checkpoint-4", "checkpoint-6", "log.jsonl", "loss.png", "model", "run.json",
    ]  # fmt: skip
    assert (run.output / "loss.png").read_bytes().startswith(b"\x89PNG")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(result["model"]) for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.dtype == torch.float32 and tokenizer.eos_token_id == model.config.eos_token_id == 0
    # The held-out loss is what the model itself says of every token, and bits per byte are of the text.
    held = Tokens(base / "data", "validation")
    total, count = 0.0, 0
    for item in Windows(held, 32):
        logits = model(input_ids=item["input_ids"][None]).logits[0].detach()
        total += float(torch.nn.functional.cross_entropy(logits, item["labels"], ignore_index=-100, reduction="sum"))
        count += int((item["labels"] != -100).sum())
    assert result["eval_loss"] == pytest.approx(total / count, rel=1e-4)
    assert result["eval_bits_per_byte"] == pytest.approx(total / count / math.log(2) * len(held) / held.bytes, rel=1e-4)


def test_every_setting_reaches_the_trainer(base, monkeypatch):
    """None has its default, so that one that is left out, or taken for another, shows."""
    run = load(base, "settings", steps=7, micro_batch=2, learning_rate=3e-3, min_learning_rate=2e-5, warmup=0.3)
    recipe = run.train
    recipe.betas, recipe.weight_decay, recipe.clip, recipe.seed, recipe.bf16 = [0.8, 0.85], 0.03, 0.7, 11, True
    recipe.checkpointing, recipe.log_every, recipe.save_every, recipe.keep = True, 3, 5, 4
    recipe.eval_every, recipe.eval_windows, recipe.compile = 6, 2, True
    run.trainer = {"logging_first_step": True, "accelerator_config": {"even_batches": False}}
    seen = {}

    def make(kind, found):
        seen.update(found)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "make", make)
    with pytest.raises(KeyboardInterrupt):
        runs.pretrain(run)
    gpu = torch.cuda.is_available()
    both = {
        "output_dir": str(run.output), "per_device_train_batch_size": 2, "learning_rate": 3e-3, "weight_decay": 0.03,
        "max_grad_norm": 0.7, "logging_steps": 3, "logging_nan_inf_filter": False, "save_strategy": "steps", "save_steps": 5,
        "bf16": True, "use_cpu": not gpu, "gradient_checkpointing": True, "seed": 11, "data_seed": 11, "report_to": "none",
        "disable_tqdm": True, "ddp_find_unused_parameters": False, "logging_first_step": True,
        "accelerator_config": {"non_blocking": gpu, "even_batches": False},
    }  # fmt: skip
    assert seen == both | {
        "max_steps": 7, "gradient_accumulation_steps": recipe.tokens_per_step // recipe.length // 2, "adam_beta1": 0.8,
        "adam_beta2": 0.85, "warmup_steps": 3, "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 2e-5}, "torch_compile": True, "eval_strategy": "steps", "eval_steps": 6,
        "per_device_eval_batch_size": 2, "train_sampling_strategy": "sequential", "dataloader_drop_last": True,
        "remove_unused_columns": False, "prediction_loss_only": True,
    }  # fmt: skip
    section = configs.Sft(
        micro_batch=2, learning_rate=3e-3, weight_decay=0.03, clip=0.7, seed=11, bf16=True, checkpointing=True, log_every=3,
        save_every=5,
    )  # fmt: skip
    assert runs.arguments(run, section, max_length=9) == both | {"max_length": 9}
    section.bf16 = None
    assert runs.arguments(run, section)["bf16"] == gpu


def test_the_defaults_of_fine_tuning():
    assert dataclasses.asdict(configs.Sft()) == {
        "epochs": 1.0, "batch": 32, "micro_batch": 4, "length": 4096, "learning_rate": 2e-5, "warmup": 0.03,
        "weight_decay": 0.0, "clip": 1.0, "seed": 0, "bf16": None, "checkpointing": False, "fsdp": False, "log_every": 10,
        "save_every": 500, "keep": 2,
    }  # fmt: skip
    assert dataclasses.asdict(configs.Lora()) == {
        "r": 16, "alpha": 32, "dropout": 0.0, "modules": ["in_proj", "out_proj"], "merge": True,
    }  # fmt: skip


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    from rat_ext.train.trainer import checkpoints

    for name in ("checkpoint-100", "checkpoint-9", "checkpoint-10", "checkpoint-x", "checkpoint-7.tmp", ".checkpoint-8"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert checkpoints(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 seconds"), (59.9, "59.9 seconds"), (60, "1.0 minutes"), (3599, "60.0 minutes"), (3600, "1.0 hours"),
        (86399, "24.0 hours"), (86400, "1.0 days"), (216000, "2.5 days"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert runs._duration(seconds) == text


@pytest.mark.parametrize(("windows", "micro", "ranks", "each"), [(8, 8, 1, 1), (8, 2, 1, 4), (8, 2, 4, 1), (24, 2, 3, 4)])
def test_shares_of_a_step(windows, micro, ranks, each):
    assert runs.shares(windows, micro, ranks) == each
    with pytest.raises(Refused, match=f"micro_batch x ranks = {micro} x {ranks}, got {windows + 1} windows"):
        runs.shares(windows + 1, micro, ranks)


@pytest.mark.parametrize(("steps", "warm"), [(40, 2), (41, 3), (47, 3)])  # 5 % of them, rounded up
def test_the_optimizer_is_the_papers(base, monkeypatch, steps, warm):
    """AdamW on every parameter with decay, the schedule, the clip: as Trainer has them when it begins."""
    from rat_ext.train.trainer import Pretrainer

    seen = {}

    def train(self, resume_from_checkpoint=None):
        self.create_optimizer_and_scheduler(steps)
        seen["groups"] = self.optimizer.param_groups
        rates = []
        for _ in range(steps):
            rates.append(self.lr_scheduler.get_last_lr()[0])
            self.optimizer.step()
            self.lr_scheduler.step()
        seen["rates"], seen["clip"] = rates, self.args.max_grad_norm
        raise KeyboardInterrupt

    monkeypatch.setattr(Pretrainer, "train", train)
    with pytest.raises(KeyboardInterrupt):
        runs.pretrain(load(base, f"recipe {steps}", steps=steps, learning_rate=8e-4))
    decayed = [group for group in seen["groups"] if group["params"]]
    assert [(group["weight_decay"], tuple(group["betas"])) for group in decayed] == [(0.1, (0.9, 0.95))]
    model = RATForCausalLM(configs.model_config(load(base, "recipe"), 320, 0))
    assert len(decayed[0]["params"]) == len(list(model.parameters()))
    rates = seen["rates"]
    assert rates.index(max(rates)) == warm and max(rates) == pytest.approx(8e-4, rel=1e-2)
    assert rates[-1] < 1e-5 and rates[-1] >= 1e-6 and seen["clip"] == 1.0
    turned = math.cos(math.pi * (20 - warm) / (steps - warm))
    assert rates[20] == pytest.approx(1e-6 + (8e-4 - 1e-6) * 0.5 * (1 + turned), rel=0.01)


@pytest.mark.parametrize("packed", [False, True])
def test_an_evaluation_leaves_the_model_in_its_mode(base, monkeypatch, packed):
    """It is one of a model that does not train, and changes nothing of it."""
    from rat_ext.train.trainer import Pretrainer

    seen = []

    def train(self, resume_from_checkpoint=None):
        model = self.model_wrapped
        model.register_forward_pre_hook(lambda *_: seen.append((model.training, torch.is_grad_enabled())))
        before = {name: x.clone() for name, x in model.state_dict().items()}
        found = []
        for mode in (True, False):
            model.train(mode)
            self._found = (-1, {})  # what a step has been evaluated to is kept
            found.append(self.evaluate())
            assert all(part.training == mode for part in model.modules())
        assert found[0] == found[1] and equal(before, model.state_dict())
        raise KeyboardInterrupt

    monkeypatch.setattr(Pretrainer, "train", train)
    with pytest.raises(KeyboardInterrupt):
        runs.pretrain(load(base, f"mode {packed}", packed=packed))
    assert set(seen) == {(False, False)}


def test_no_step_waits_for_the_device(base, monkeypatch):
    """Between two lines of the log nothing is read from the device, and no copy to it waits."""
    from rat_ext.train.trainer import Pretrainer

    cuda, seen = torch.cuda.is_available(), []

    def watch(mode):
        if cuda:
            torch.cuda.set_sync_debug_mode(mode)

    step, log = Pretrainer.training_step, Pretrainer._maybe_log_save_evaluate

    def training_step(self, model, inputs, *rest):
        assert self.accelerator.dataloader_config.non_blocking == self.args.dataloader_pin_memory == cuda
        assert not self.args.logging_nan_inf_filter
        seen.append(self.state.global_step)
        if len(seen) > 2:  # whatever is done once is done
            watch("error")
        return step(self, model, inputs, *rest)

    def maybe_log(self, *rest, **options):
        watch("default")
        try:
            return log(self, *rest, **options)
        finally:
            watch("error" if len(seen) > 2 and self.state.global_step < self.state.max_steps else "default")

    monkeypatch.setattr(Pretrainer, "training_step", training_step)
    monkeypatch.setattr(Pretrainer, "_maybe_log_save_evaluate", maybe_log)
    try:
        run = load(base, "ahead", steps=8, log_every=4, save_every=100, eval_every=0)
        runs.pretrain(run, save=False)
    finally:
        watch("default")
    assert seen == [step for step in range(8) for _ in range(4)]
    # What Trainer adds up is the same formula that MFU is of.
    lines = [line for line in read_log(run.output / "log.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [4, 8] and all(math.isfinite(line["loss"]) for line in lines)


def test_a_setting_of_accelerate_leaves_the_others(base):
    run = dataclasses.replace(load(base, "accelerated"), trainer={"accelerator_config": {"even_batches": False}})
    found = runs.arguments(run, run.train)["accelerator_config"]
    assert found == {"non_blocking": torch.cuda.is_available(), "even_batches": False}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = [", "run: CONFIG: expected TOML, got"),
        ('model = {size = "200m"}', "run: output: expected a folder to write to, got none"),
        ('output = "x"', "run: model: expected size, sizes or path, got no section [model]"),
        ('output = "x"\nbogus = 1', "run: bogus: expected one of data, lora, model"),
        (CONFIG + "bogus = 1", "run: train.bogus: expected one of steps"),
        (CONFIG + 'clip = "x"', "run: train.clip: expected int or float, got 'x'"),
        (CONFIG + "clip = true", "run: train.clip: expected int or float, got True"),
        (CONFIG + "clip = 0", "run: train.clip: expected more than 0, got 0"),
        (CONFIG + "weight_decay = -1", "run: train.weight_decay: expected at least 0, got -1"),
        (CONFIG + "[lora]\nr = 0", "run: lora.r: expected more than 0, got 0"),
        (CONFIG.replace("tokens_per_step = 256", "tokens_per_step = 250"), "a multiple of length = 32, got 250"),
        (CONFIG.replace("micro_batch = 2", "micro_batch = 3"), "windows that divide by micro_batch x ranks = 3 x 1"),
        (CONFIG.replace('data = "data"', ""), "run: data: expected a folder that"),
        (CONFIG.replace('data = "data"', 'data = "absent"'), "data: folder: expected one that"),
        (CONFIG.replace("hidden_size", "hiden_size"), "run: model.hiden_size: expected size, pattern, path or an argument of"),
        (CONFIG + '[model2]\npath = "x"', "run: model2"),
        (CONFIG + 'betas = ["a", "b"]', "run: train.betas: expected two numbers from 0 to below 1, got ['a', 'b']"),
        (CONFIG + "betas = [2, 0.9]", "run: train.betas: expected two numbers from 0 to below 1"),
        (CONFIG + "warmup = 3", "run: train.warmup: expected at most 1, got 3"),
        (CONFIG + "min_learning_rate = 1", "run: train.min_learning_rate: expected at most learning_rate = 0.01, got 1"),
        (CONFIG + "seed = 99999999999", "run: train.seed: expected at most 4294967295"),
        (CONFIG + "[lora]", "run: lora: expected --sft"),
        (CONFIG + "[lora]\nmodules = [1]", "run: lora.modules: expected names, got [1]"),
        (CONFIG.replace("num_attention_heads = 4", "num_attention_heads = 5"), "run: model: rat_ext.RATConfig: num_attention"),
        (CONFIG.replace("chunk_size = 4", 'chunk_size = "x"'), "run: model: rat_ext.RATConfig: chunk_size: expected"),
        (CONFIG.replace('"rat-swa"', '"bogus"'), "run: model: rat_ext.RATConfig: layer_types: expected"),
        (CONFIG.replace("chunk_size = 4", 'size = "9b"'), "run: model: rat_ext.RATConfig: preset: expected one of 200m"),
        (CONFIG.replace("chunk_size = 4", 'vocab_size = "x"'), "run: model: "),
        (CONFIG + '[trainer]\nsave_strategy = "bogus"', "run: [trainer] and the recipe: expected what TrainingArguments takes"),
        (CONFIG + "[trainer]\nbogus = 1", "run: trainer.bogus: expected an argument of TrainingArguments"),
    ],
)
def test_a_wrong_configuration_is_one_line(base, capsys, text, words):
    (base / "wrong.toml").write_text(text.replace('output = "run"', 'output = "wrong"'))
    assert command.run(lambda: command.main(["run", str(base / "wrong.toml")])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_the_last_step_is_logged(base):
    """Also of a run that is shorter than log_every; the plot and the held-out loss are of its end."""
    run = load(base, "short", steps=3, log_every=2, eval_every=500, save_every=500)
    found = runs.pretrain(run)
    lines = read_log(run.output / "log.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [2, 3]
    assert [line["eval_loss"] for line in lines if "eval_loss" in line] == [found["eval_loss"]]
    assert found["model"] == str(run.output / "model") and (run.output / "loss.png").exists()


def test_a_file_with_a_byte_order_mark(base):
    (base / "mark.toml").write_text(CONFIG, encoding="utf-8-sig")
    assert configs.load(base / "mark.toml") == configs.load(base / "config.toml")


@pytest.mark.parametrize(("steps", "warm"), [(1, 0), (2, 1), (20, 1), (21, 2)])
def test_a_run_of_one_step_learns(steps, warm):
    assert runs.warm_up(0.05, steps) == warm


def test_folders_of_models_and_data_that_are_broken(base, trained, tmp_path, capsys):
    """Each is one line that names the argument."""
    import shutil

    def refused(*arguments):
        assert command.run(lambda: command.main(["run", *map(str, arguments)])) == 2
        return capsys.readouterr().err.splitlines()[-1]

    shutil.copytree(base / "data", tmp_path / "data")
    (tmp_path / "answers.jsonl").write_text('{"prompt": "state is", "answer": " gate"}')
    recipe = CONFIG[CONFIG.index("[train]") :]
    for name in ("weights", "config", "tokenizer", "other"):
        shutil.copytree(base / "whole" / "model", tmp_path / name)
        (tmp_path / f"{name}.toml").write_text(f'output = "out"\ndata = "data"\n[model]\npath = "{name}"\n{recipe}')
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"no")
    (tmp_path / "config" / "config.json").write_text("{")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    for file in (tmp_path / "tokenizer").glob("tokenizer*"):
        file.unlink()
    assert "run: model.path: expected a model (" in refused(tmp_path / "weights.toml")
    assert "run: model.path: expected a model (" in refused(tmp_path / "config.toml")
    assert "run: model.path: expected a model of rat_ext, to go on with pretraining, got gpt2" in refused(
        tmp_path / "other.toml"
    )
    pytest.importorskip("trl", reason="needs the extra [train]")
    answers = ("--sft", tmp_path / "answers.jsonl")
    assert "run: model.path: expected a folder with a tokenizer (" in refused(tmp_path / "tokenizer.toml", *answers)
    small = json.loads((tmp_path / "tokenizer" / "config.json").read_text()) | {"vocab_size": 100}
    for file in (base / "whole" / "model").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "tokenizer")
    RATForCausalLM(RATConfig(**small)).save_pretrained(tmp_path / "tokenizer")
    assert "run: model.path: expected a tokenizer of at most" in refused(tmp_path / "tokenizer.toml", *answers)
    (tmp_path / "data" / "index.json").write_text("{")
    assert "data: folder: expected " in refused(tmp_path / "tokenizer.toml")


def test_a_run_of_other_settings_needs_another_output(trained):
    run, _ = trained
    changed = dataclasses.replace(run, train=dataclasses.replace(run.train, seed=1))
    with pytest.raises(Refused, match=r"run: output: expected train.seed as in .*run.json: 0 \(or another output\), got 1"):
        runs.pretrain(changed)


def test_the_dry_run(base, capsys):
    assert command.main(["run", str(base / "config.toml"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    for words in ("parameters", "6 steps of 256 tokens", "GB per rank", "TFLOP per second", "time "):
        assert words in text
    assert not (base / "run").exists()


def test_flops_are_those_of_the_products():
    """Against torch's own counter, on attention: every product of a forward."""
    from torch.utils.flop_counter import FlopCounterMode

    config = RATConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, layer_types="attention", use_cache=False
    )
    model = RATForCausalLM(config).eval()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, 256, dtype=torch.int64))
    # torch does not count the attention: two products of 2 x 32 with 128.5 keys on average, in two layers, thrice.
    attention = 3 * 2 * 2 * 2 * 32 * 257 / 2
    assert 3 * counter.get_total_flops() / 256 + attention == pytest.approx(flops.flops_per_token(config, 256))


@pytest.mark.parametrize(
    ("kind", "keys"),
    [("rat", sum(t // 16 + 1 for t in range(256))), ("rnn", 0), ("sliding_attention", sum(min(t, 40) + 1 for t in range(256)))],
)
def test_flops_of_attention_count_the_keys_that_are_seen(kind, keys):
    def of(layers):
        return flops.flops_per_token(
            RATConfig(
                vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_groups=4,
                layer_types=[layers] * 2, chunk_size=16, sliding_window=40,
            ),
            256,
        )  # fmt: skip

    # RAT projects five parts, attention three, of 32 to 32, in two layers.
    parts = {"rat": 5, "rnn": 3, "sliding_attention": 3}[kind]
    products = 6 * (2 * 32 * 32 * (parts + 1 + 8) + 32 * 64)
    assert of(kind) == pytest.approx(products + 12 * 32 * 2 * keys / 256)


# ---- stopped runs -------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from rat_ext.train import trainer
from rat_ext.train.__main__ import main
right, calls = getattr(trainer, sys.argv[1]), []
def dies(*args, **options):
    calls.append(args)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return right(*args, **options)
setattr(trainer, sys.argv[1], dies)
main(["run", sys.argv[3]])
"""


def killed(base, name, function, call, text=CONFIG):
    """Kills a run in the given call of a function of the trainer; what it leaves, goes on in this process."""
    (base / f"{name}.toml").write_text(text.replace('output = "run"', f'output = "{name}"'))
    found = launch("-c", KILLED, function, str(call), str(base / f"{name}.toml"))
    assert found.returncode == -signal.SIGKILL, found.stderr
    return configs.load(base / f"{name}.toml")


def test_a_run_that_is_killed_while_it_saves_goes_on_bit_by_bit(base, trained):
    run = killed(base, "killed", "publish", 2)
    assert [path.name for path in sorted(run.output.glob("check*"))] == ["checkpoint-2"]
    half = run.output / ".saving.tmp" / "checkpoint-4"
    assert (half / "model.safetensors").exists()
    with open(run.output / "log.jsonl", "a") as file:
        file.write('{"step": 5, "los')  # the line that was being written
    runs.pretrain(run)
    assert equal(weights(run.output / "model"), weights(trained[0].output / "model"))
    both = [read_log(folder / "log.jsonl") for folder in (run.output, trained[0].output)]
    keys = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
    assert [[line.get(key) for key in keys] for line in both[0]] == [[line.get(key) for key in keys] for line in both[1]]
    optimizer = [torch.load(folder / "checkpoint-6" / "optimizer.pt") for folder in (run.output, trained[0].output)]
    assert all(equal(optimizer[0]["state"][i], optimizer[1]["state"][i]) for i in optimizer[1]["state"])
    assert not list(run.output.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize(("function", "call"), [("collate", 1), ("collate", 9), ("publish", 1), ("remove", 1), ("publish", 4)])
def test_a_run_that_is_killed_anywhere_goes_on_bit_by_bit(base, trained, function, call):
    run = killed(base, f"killed-{function}-{call}", function, call)
    runs.pretrain(run)
    assert equal(weights(run.output / "model"), weights(trained[0].output / "model"))


def test_a_complete_run_that_is_called_again_keeps_its_model(trained):
    before = weights(trained[0].output / "model")
    assert runs.pretrain(trained[0])["eval_loss"] == trained[1]["eval_loss"]
    assert equal(weights(trained[0].output / "model"), before)
    assert not list(trained[0].output.glob(".*"))


def test_packed_training_and_checkpointing_of_activations(base, trained):
    """Runs apart documents; gradient checkpointing changes no bit of them."""
    plain = load(base, "packed", packed=True, steps=2)
    runs.pretrain(plain)
    spared = load(base, "spared", packed=True, steps=2, checkpointing=True)
    runs.pretrain(spared)
    assert equal(weights(plain.output / "model"), weights(spared.output / "model"))
    first = [read_log(folder / "log.jsonl")[0]["loss"] for folder in (plain.output, trained[0].output)]
    assert first[0] != first[1]


# ---- several ranks ------------------------------------------------------------------------------------------------------


def on_ranks(base, name, ranks, text=CONFIG):
    (base / f"{name}.toml").write_text(text.replace('output = "run"', f'output = "{name}"'))
    path = str(base / f"{name}.toml")
    found = launch("--nproc-per-node", str(ranks), "-m", "rat_ext.train", "run", path, module="torch.distributed.run",
                   OMP_NUM_THREADS="1")  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    return configs.load(path)


def losses(run):
    lines = read_log(run.output / "log.jsonl")
    return [(line["step"], key, line[key]) for line in lines for key in ("loss", "eval_loss") if key in line]


@pytest.mark.slow
def test_two_ranks_go_on_from_one(base, trained):
    """One rank is killed after step 2, two go on: the same windows in each step, the same losses but for the order of sums."""
    run = killed(base, "ranks", "publish", 2)
    on_ranks(base, "ranks", 2)
    assert losses(run) == [(step, key, pytest.approx(value, rel=1e-3)) for step, key, value in losses(trained[0])]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_fsdp2_on_two_ranks(base, trained):
    """Sharded weights, optimizer and checkpoints: the losses of one rank; and it goes on where it stood."""
    text = CONFIG.replace("[train]", "[train]\nfsdp = true")
    run = on_ranks(base, "fsdp", 2, text)
    assert losses(run) == [(step, key, pytest.approx(value, rel=1e-2)) for step, key, value in losses(trained[0])]
    mine, theirs = weights(run.output / "model"), weights(trained[0].output / "model")
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-2, atol=1e-2)
    runs.shutil.rmtree(run.output / "checkpoint-6")
    on_ranks(base, "fsdp", 2, text)
    assert equal(weights(run.output / "model"), mine)


def test_fsdp_is_refused_where_there_is_none(base):
    with pytest.raises(Refused, match=r"run: fsdp: expected GPUs, under torchrun, got 1 rank\(s\)"):
        runs.pretrain(load(base, "no-fsdp", fsdp=True))


# ---- fine-tuning --------------------------------------------------------------------------------------------------------

SFT = """
output = "sft"
[model]
path = "whole/model"
[sft]
epochs = 6
batch = 4
micro_batch = 2
length = 48
learning_rate = 1e-2
log_every = 1
save_every = 9
"""


@pytest.fixture
def examples(base, trained):
    pytest.importorskip("trl", reason="needs the extra [train]")
    lines = [json.dumps({"prompt": f"state {i} is", "answer": " gate"}) for i in range(12)]
    lines += ["{broken", json.dumps({"prompt": "x"}), json.dumps({"prompt": "x", "answer": ""}),
              json.dumps({"prompt": "chunk gate " * 60, "answer": "y"}),
              json.dumps({"prompt": "\ud800", "answer": "y"})]  # fmt: skip
    (base / "answers.jsonl").write_text("\n".join(lines))
    return base / "answers.jsonl"


def test_fine_tuning_learns_the_answers(base, examples, capsys):
    for text in (SFT + "[lora]\nr = 4\n", SFT):
        (base / "sft.toml").write_text(text)
        assert command.main(["run", str(base / "sft.toml"), "--sft", str(examples), "--dry-run"]) == 0
        text = capsys.readouterr().out
        assert "18 steps of 4 examples" in text and "GB per rank" in text and "time  " in text and not (base / "sft").exists()
    assert command.main(["run", str(base / "sft.toml"), "--sft", str(examples)]) == 0
    text = capsys.readouterr().out
    assert "12 examples, 5 lines skipped" in text and "answers.jsonl:13" in text and "sft.length = 48" in text
    lines = [line for line in read_log(base / "sft" / "log.jsonl") if "loss" in line]
    assert len(lines) == 18 and lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base / "sft" / "model")
    tokenizer = AutoTokenizer.from_pretrained(base / "sft" / "model")
    prompt = tokenizer("state 3 is", return_tensors="pt").input_ids
    answer = tokenizer(" gate").input_ids
    written = model.generate(prompt, max_new_tokens=len(answer), do_sample=False)[0, prompt.shape[1] :]
    assert written.tolist() == answer


def test_the_loss_is_of_the_answers_alone(base, examples, monkeypatch):
    """Other prompts of the same tokens' number, labels as they reach the model."""
    from rat_ext.train.trainer import WholeCheckpoints

    seen = []
    monkeypatch.setattr(
        WholeCheckpoints, "training_step", lambda self, model, inputs, *a: seen.append(inputs) or exit(0), False
    )
    run = configs.parse(configs_of(SFT) | {"output": "labels"}, base)
    with pytest.raises(SystemExit):
        runs.finetune(run, examples)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base / "whole" / "model")
    answer = tokenizer(" gate").input_ids + [tokenizer.eos_token_id]
    for row in seen[0]["labels"]:
        assert row[row != -100].tolist() == answer


def test_adapters(base, examples):
    pytest.importorskip("peft", reason="needs the extra [train]")
    run = configs.parse(configs_of(SFT + "[lora]\nr = 4\n") | {"output": "lora"}, base)
    runs.finetune(run, examples)
    assert (run.output / "adapter" / "adapter_config.json").exists()
    before, after = weights(base / "whole" / "model"), weights(run.output / "model")
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"in_proj", "out_proj"}
    text = SFT + "[lora]\nr = 4\nmerge = false\n"
    run = configs.parse(configs_of(text) | {"output": "apart"}, base)
    assert runs.finetune(run, examples) == {"model": str(base / "apart" / "adapter")}
    assert (run.output / "adapter" / "adapter_config.json").exists() and not (run.output / "model").exists()
    run.lora.modules = ["in_proj", "bogus"]
    with pytest.raises(Refused, match="run: lora.modules: expected names of modules of the model, such as .*, got bogus"):
        runs.finetune(run, examples)


def test_fine_tuning_needs_a_model_and_lines(base, trained, tmp_path, capsys):
    pytest.importorskip("trl", reason="needs the extra [train]")
    (base / "sft2.toml").write_text(SFT.replace("whole/model", "absent"))
    arguments = ["run", str(base / "sft2.toml"), "--sft", str(tmp_path / "none.jsonl")]
    assert command.run(lambda: command.main(arguments)) == 2
    (base / "sft2.toml").write_text(SFT)
    assert command.run(lambda: command.main(arguments)) == 2
    (tmp_path / "none.jsonl").write_text("{}")
    assert command.run(lambda: command.main(arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "--sft: expected a file that can be read" in lines[1] and "--sft: expected lines with prompt and answer" in lines[2]
    assert "run: model.path: expected a folder with a model, got absent" in lines[0]
