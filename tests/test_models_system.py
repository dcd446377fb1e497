"""The models inside what their users run: saving, loading, wrappers, compilers, adapters, quantised weights."""

import copy
import importlib
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("transformers", reason="rat_ext.models needs transformers: pip install 'rat_ext[models]'")

from test_models import ALL, V, config_of, model_of, padded, rows_of, tokens_of
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import rat_ext
import rat_ext.models
from rat_ext.models import RATForCausalLM, RATModel, RATModelCache
from rat_ext.models import loss as losses
from rat_ext.models.loss import linear_cross_entropy
from rat_ext.models.modeling import Linear

dist = pytest.importorskip("torch.distributed")
GREEDY = {"do_sample": False, "max_new_tokens": 6}
MIXED = ["rat", "sliding_attention", "rnn", "attention"]  # every kind of layer


def mixed(device="cpu", **changes) -> RATForCausalLM:
    return model_of(MIXED, device, num_hidden_layers=4, **changes)


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


# ---- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("piece", [1 << 25, 5 * V])
def test_the_loss_in_pieces(device, dtype, piece, monkeypatch):
    """Loss and gradients, at most twice as far from float64 as the eager loss in the same dtype."""
    monkeypatch.setattr(losses, "PIECE", piece)
    x, weight = torch.randn(23, 32, dtype=torch.float64), torch.randn(V, 32, dtype=torch.float64)
    labels = torch.randint(0, V, (23,))
    labels[[0, 5, 22]] = -100

    def run(function, dtype):
        inputs = [t.to(device, dtype, copy=True).requires_grad_() for t in (x, weight)]
        loss = function(*inputs, labels.to(device))
        (0.7 * loss).backward()
        return [t.double().cpu() for t in (loss.detach(), *(t.grad for t in inputs))]

    def eager(x, weight, labels):
        logits = x @ weight.T
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels, reduction="sum")

    exact = run(eager, torch.float64)
    for got, low, want in zip(run(linear_cross_entropy, dtype), run(eager, dtype), exact, strict=True):
        bound = max(2 * float((low - want).abs().max()), 1e-12 if dtype == torch.float64 else 2e-5)
        assert float((got - want).abs().max()) <= bound


def test_the_loss_holds_no_logits_of_all_tokens(device, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.size = max(self.size, x.numel())
            return out

    monkeypatch.setattr(losses, "PIECE", 64 * 1000)
    model = model_of("rat", device, vocab_size=1000).train()
    ids = tokens_of(device, 4, 512)
    with Largest() as seen:
        model(ids, labels=ids).loss.backward()
    assert seen.size < 4 * 512 * 1000 / 4  # feed-forward: 4 * 512 * 128


def test_the_loss_without_labels_or_gradients(device):
    x, weight = torch.randn(3, 8, device=device, requires_grad=True), torch.randn(5, 8, device=device)
    ignored = torch.full((3,), -100, device=device)
    loss = linear_cross_entropy(x, weight, ignored)
    loss.backward()
    assert float(loss.detach()) == 0 and not x.grad.any()
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, ignored + 100).requires_grad


# ---- saving and loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded(device, tmp_path, tied):
    model, ids = mixed(device, tie_word_embeddings=tied), tokens_of(device, 2, 19)
    model.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").exists()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for folder in ("whole", "shards"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder).to(device)
        assert type(again) is RATForCausalLM and not again.training
        assert torch.equal(logits_of(again, ids), logits_of(model, ids))
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    body = RATModel.from_pretrained(tmp_path / "whole").to(device)
    assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_loaded_in_bfloat16(device, tmp_path):
    model, ids = mixed(device), tokens_of(device, 2, 19)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, "auto"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).to(device)
        assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
        assert torch.equal(logits_of(again, ids), logits_of(model, ids))
        assert again.generate(ids, **GREEDY).shape == (2, 25)
        assert torch.isfinite(again(ids, labels=ids).loss)


def test_device_map_and_offload(tmp_path):
    pytest.importorskip("accelerate")
    model, ids = mixed(), tokens_of("cpu", 2, 19)
    model.save_pretrained(tmp_path / "m")
    placed = AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map="cpu", low_cpu_mem_usage=True)
    assert torch.equal(logits_of(placed, ids), logits_of(model, ids))
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    where |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map=where, offload_folder=tmp_path / "off")
    assert offloaded.model.layers[1].mixer.in_proj.weight.device.type == "meta"
    assert torch.equal(logits_of(offloaded, ids), logits_of(model, ids))
    assert torch.equal(offloaded.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


def meta_model(**changes) -> RATForCausalLM:
    with torch.device("meta"):
        return RATForCausalLM(config_of(MIXED, num_hidden_layers=4, **changes))


def assert_tied(model):
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("way", ["init_weights", "each module", "state assigned", "state copied"])
def test_ties_hold_after_a_meta_init(way):
    plain, ids = mixed(), tokens_of("cpu", 2, 19)
    model = meta_model()
    assert_tied(model)
    if way == "state assigned":
        model.load_state_dict(plain.state_dict(), assign=True)
    else:
        model.to_empty(device="cpu")
        assert_tied(model)
        if way == "init_weights":
            model.init_weights()
        elif way == "each module":  # as FSDP1 does
            for module in model.modules():
                if list(module.parameters(recurse=False)):
                    module.reset_parameters()
        else:
            model.load_state_dict(plain.state_dict())
    assert_tied(model)
    assert_tied(copy.deepcopy(model))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    if way.startswith("state"):
        assert torch.equal(logits_of(model, ids), logits_of(plain, ids))
    else:
        for name, p in model.named_parameters():
            if "norm" in name:
                assert (p == 1).all()
            elif "gate_bias" not in name:
                assert abs(float(p.detach().std()) / 0.3 - 1) < 0.1, name
            else:
                assert 0 <= p.min() and p.max() <= float(torch.tensor(63.0).log())
    model.train()(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert_tied(model)


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings(device, tied):
    model, ids = mixed(device, tie_word_embeddings=tied), tokens_of(device, 2, 9)
    before = logits_of(model, ids)
    model.resize_token_embeddings(V + 7)
    after = logits_of(model, ids)
    assert after.shape == (2, 9, V + 7) and model.config.vocab_size == V + 7
    torch.testing.assert_close(after[..., :V], before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model(ids, labels=ids).loss.backward()
    assert model.generate(ids, **GREEDY).shape == (2, 15)


# ---- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(device, reentrant):
    rows = rows_of(device)
    ids, mask = padded(rows, "left", device)
    model = mixed(device).train()
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    model.model.layers[0].mixer.register_forward_hook(lambda *args: calls.append(1))
    model(ids, attention_mask=mask, labels=ids, use_cache=True).loss.backward()
    assert len(calls) == 2
    plain(ids, attention_mask=mask, labels=ids).loss.backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_autocast(device):
    model, ids = mixed(device), tokens_of(device, 2, 19)
    with torch.autocast(device.type, torch.bfloat16):
        out = model(ids, labels=ids)
        got = model.generate(ids, **GREEDY)
    torch.testing.assert_close(out.loss, model(ids, labels=ids).loss, rtol=5e-2, atol=5e-2)
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    assert got.shape == (2, 25)


def test_trainer(tmp_path):
    """transformers' own training loop, with gradients of several batches added up and an evaluation."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [tokens_of("cpu", 24, seed=i % 3) for i in range(24)]
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=12, learning_rate=1e-2, use_cpu=True,
        report_to=[], logging_steps=1, save_steps=12, disable_tqdm=True, gradient_checkpointing=True,
    )  # fmt: skip
    model = mixed()
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:6])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(before, rel=0.2)  # a mean over the labels of both batches
    assert trainer.evaluate()["eval_loss"] < 0.7 * before
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-12")
    assert torch.equal(logits_of(again, rows[0][None]), logits_of(model.eval(), rows[0][None]))


def test_averages_and_copies(device):
    model, ids = mixed(device), tokens_of(device, 2, 40)
    assert not list(model.buffers())
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for tokens in (8, 40, 16):
        model(ids[:, :tokens], labels=ids[:, :tokens]).loss.backward()
        average.update_parameters(model)
    torch.testing.assert_close(average(ids).logits, model(ids).logits)
    assert torch.equal(logits_of(copy.deepcopy(model), ids), logits_of(model, ids))


def test_threads(device):
    """Many at once, of different lengths, while tables grow."""
    model, wrong = mixed(device), []
    ids = tokens_of(device, 1, 300)
    want = {n: logits_of(model, ids[:, :n]) for n in (5, 60, 150, 300)}
    rat_ext.rotary._tables.clear()

    def work(n):
        for _ in range(5):
            if not torch.equal(logits_of(model, ids[:, :n]), want[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in want for _ in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_defaults_of_torch():
    """set_default_dtype and set_default_device decide where parameters are made, and nothing else."""
    script = """
        import torch
        from rat_ext.models import RATConfig, RATForCausalLM
        kinds = ["rat", "sliding_attention", "rnn", "attention"]
        config = RATConfig(vocab_size=61, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, chunk_size=4,
                           sliding_window=5, layer_types=kinds)
        torch.manual_seed(0)
        plain = RATForCausalLM(config).eval()
        ids = torch.randint(0, 61, (2, 19))
        want = plain(ids).logits
        torch.set_default_dtype(torch.bfloat16)
        assert RATForCausalLM(config).dtype == torch.bfloat16
        assert torch.equal(plain(ids).logits, want)
        torch.set_default_dtype(torch.float64)
        assert torch.equal(plain(ids).logits, want)
        assert torch.isfinite(RATForCausalLM(config)(ids, labels=ids).loss)
        torch.set_default_dtype(torch.float32)
        greedy = plain.generate(ids, do_sample=False, max_new_tokens=9)
        torch.set_default_device("meta")
        assert torch.equal(plain(ids).logits, want)
        model = RATForCausalLM(config)
        assert model.device.type == "meta"
        model.load_state_dict(plain.state_dict(), assign=True)
        assert torch.equal(model.eval()(ids).logits, want)
    """
    run(script)


def run(script: str, *arguments: str, wait: bool = True):
    environment = os.environ | {"PYTHONPATH": str(Path(rat_ext.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    if wait:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    return process


def test_distributed(tmp_path):
    """Two ranks of different lengths: DDP, and FSDP2 from a meta init with mixed precision, train what one process would."""
    script = """
        import copy, os, sys, torch, torch.distributed as dist
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from torch.distributed.device_mesh import init_device_mesh
        from rat_ext.models import RATConfig, RATForCausalLM
        rank = int(sys.argv[1])
        dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
        mesh = init_device_mesh("cpu", (2,))
        config = RATConfig(vocab_size=61, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, chunk_size=4,
                           sliding_window=5, layer_types=["rat", "sliding_attention", "rnn", "attention"])
        torch.manual_seed(0)
        plain = RATForCausalLM(config).train()
        rows = [torch.randint(0, 61, (2, n)) for n in (16, 64)]

        def check(model, alike, tolerance):
            alone, losses = copy.deepcopy(plain), []
            model(rows[rank], labels=rows[rank]).loss.backward()
            sum(alone(row, labels=row).loss / 2 for row in rows).backward()
            for (name, a), b in zip(model.named_parameters(), alone.parameters(), strict=True):
                grad = a.grad.full_tensor() if hasattr(a.grad, "full_tensor") else a.grad
                torch.testing.assert_close(grad, b.grad, rtol=tolerance, atol=tolerance, msg=name)

        wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
        check(wrapped, True, 1e-4)
        for step in range(3):
            ids = rows[(rank + step) % 2]
            wrapped(ids, labels=ids).loss.backward()

        for policy, tolerance in ((MixedPrecisionPolicy(), 1e-4), (MixedPrecisionPolicy(torch.bfloat16, torch.float32), 3e-2)):
            with torch.device("meta"):
                model = RATForCausalLM(config)
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            model.to_empty(device="cpu")
            model.init_weights()
            assert model.lm_head.weight is model.model.embed_tokens.weight
            for name, p in model.named_parameters():
                full = p.full_tensor()
                assert torch.isfinite(full).all()
                if "gate_bias" not in name and "norm" not in name:
                    assert abs(float(full.std()) / 0.02 - 1) < 0.1, name
            full = model.model.layers[0].mixer.gate_bias.full_tensor()
            assert full.min() >= 0 and full.max() <= 1.0987 and full.std() > 0.1
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
            set_model_state_dict(model, plain.state_dict(), options=StateDictOptions(full_state_dict=True))
            check(model, False, tolerance)
            assert model.lm_head.weight is model.model.embed_tokens.weight
            model.eval()
            if policy.param_dtype is None:
                got = model.generate(rows[0], do_sample=False, max_new_tokens=6)
                assert torch.equal(got, plain.eval().generate(rows[0], do_sample=False, max_new_tokens=6))
                plain.train()
        # FSDP1, flat shards, also of single mixers: a step goes through the hooks that gather weights, as the prompt does.
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy
        from rat_ext.models.modeling import RAT, RATDecoderLayer
        from rat_ext.models import RATModelCache
        plain.eval()
        wrapped = FullyShardedDataParallel(
            copy.deepcopy(plain), auto_wrap_policy=ModuleWrapPolicy({RATDecoderLayer, RAT}), device_id=torch.device("cpu")
        )
        cache, ids = RATModelCache(config), rows[0]
        with torch.no_grad():
            logits = wrapped(ids, past_key_values=cache).logits
            for _ in range(6):
                new = logits[:, -1:].argmax(-1)
                ids = torch.cat((ids, new), dim=1)
                logits = wrapped(new, past_key_values=cache).logits
        assert torch.equal(ids, plain.generate(rows[0], do_sample=False, max_new_tokens=6))
        dist.barrier()
        os._exit(0)
    """
    ranks = [run(script, str(rank), str(tmp_path / "store"), wait=False) for rank in (0, 1)]
    for process in ranks:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors


# ---- compilers ---------------------------------------------------------------------------------------------------------


class Counter:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward

    def __deepcopy__(self, memo):
        return self


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield Counter()
    torch._dynamo.reset()


@pytest.mark.parametrize("pattern", ALL)
def test_compiled_training_of_any_length(device, compiler, pattern):
    model = model_of(pattern, device).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=compiler)
    for i, tokens in enumerate((19, 40, 77, 133, 260, 517)):
        ids = tokens_of(device, 2, tokens)
        torch.testing.assert_close(compiled(ids, labels=ids).loss, model(ids, labels=ids).loss)
        if i == 0:
            compiled(ids, labels=ids).loss.backward()
            first = compiler.graphs
    assert compiler.graphs == first


def test_compiled_with_padding(device, compiler):
    """No size depends on the mask: other paddings take the same graph."""
    model = mixed(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=compiler)
    with torch.no_grad():
        for i, lengths in enumerate(((5, 19, 12, 8), (19, 19, 1, 18), (30, 2, 9, 30))):
            rows = [tokens_of(device, n, seed=n) for n in lengths]
            for side in ("left", "right"):
                ids, mask = padded(rows, side, device)
                got = compiled(ids, attention_mask=mask, use_cache=False).logits
                torch.testing.assert_close(got, model(ids, attention_mask=mask).logits, rtol=1e-4, atol=1e-4)
            if i == 0:
                first = compiler.graphs
    assert compiler.graphs == first


def test_compiled_steps(device, compiler):
    """A static cache: one graph for every step, however long the row becomes, chunk boundaries and a turned ring included."""
    model, ids = mixed(device), tokens_of(device, 2, 60)
    cache = RATModelCache(model.config, 64, static=True)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    want = logits_of(model, ids)
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
        for t in range(9, 60):
            got = compiled(ids[:, t : t + 1], past_key_values=cache).logits
            torch.testing.assert_close(got[:, 0], want[:, t], rtol=1e-4, atol=1e-4)
            if t == 11:  # the count of tokens is a constant at first
                first = compiler.graphs
    assert compiler.graphs == first <= 2 and cache.get_seq_length() == 60


def test_compiled_generation(device, compiler):
    """With a static cache generate compiles nothing by itself, not even where it is asked to; tokens are the same."""
    from transformers import CompileConfig

    model, rows = mixed(device), rows_of(device)
    ids, mask = padded(rows, "left", device)
    options = dict(max_new_tokens=12, do_sample=False, attention_mask=mask)
    want = model.generate(ids, **options)
    compile_config = CompileConfig(fullgraph=True, backend=compiler, mode=None)
    compile_config._compile_all_devices = True
    got = model.generate(ids, cache_implementation="static", compile_config=compile_config, **options)
    assert torch.equal(got, want) and compiler.graphs == 0


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_gradients(device, backend):
    torch._dynamo.reset()
    model, ids = mixed(device), tokens_of(device, 2, 21)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    out = compiled(ids, labels=ids, use_cache=False)
    torch.testing.assert_close(out.loss, model(ids, labels=ids).loss)
    out.loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    for a, p in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


def test_exported_step(device, tmp_path):
    """torch.export of one step with its caches: they go in, and are updated in place."""

    class Step(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids, cache):
            return self.model(ids, past_key_values=cache).logits

    model, ids = mixed(device), tokens_of(device, 2, 30)
    want = logits_of(model, ids)
    cache = RATModelCache(model.config, 64, static=True)
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
        exported = torch.export.export(Step(model), (ids[:, :1], copy.deepcopy(cache)), strict=False)
        program = exported.module()
        for t in range(9, 30):
            got = program(ids[:, t : t + 1], cache)
            torch.testing.assert_close(got[:, 0], want[:, t], rtol=1e-4, atol=1e-4)
    assert cache.lengths.tolist() == [30, 30]
    exported.example_inputs = None  # a cache is more than tensors: torch.load would ask for leave
    torch.export.save(exported, tmp_path / "step.pt2")
    new = torch.export.load(tmp_path / "step.pt2").module()(ids[:, :1], cache)
    torch.testing.assert_close(new[:, 0], logits_of(model, torch.cat((ids, ids[:, :1]), dim=1))[:, -1], rtol=1e-4, atol=1e-4)


# ---- adapters, quantised weights ---------------------------------------------------------------------------------------


def test_adapters(device, tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = mixed(device), tokens_of(device, 2, 19)
    before = logits_of(model, ids)
    config = peft.LoraConfig(r=4, target_modules=["in_proj", "out_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 4 * 2 * 2 and all("lora" in name for name in trained)
    adapted.train()
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.any() for p in adapted.parameters() if p.requires_grad)
    adapted.eval()
    with_adapter = logits_of(adapted, ids)
    assert (with_adapter - before).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    torch.testing.assert_close(logits_of(again, ids), with_adapter)
    torch.testing.assert_close(logits_of(again.merge_and_unload(), ids), with_adapter, rtol=1e-4, atol=1e-4)
    generated = adapted.generate(input_ids=ids, **GREEDY)
    assert torch.equal(generated[:, 19:], logits_of(adapted, generated)[:, 18:-1].argmax(-1))


def test_an_adapter_on_the_head(device):
    """The loss asks the module for its logits where it is no plain projection."""
    peft = pytest.importorskip("peft")
    model, ids = mixed(device, tie_word_embeddings=False), tokens_of(device, 2, 19)
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    logits = adapted(input_ids=ids).logits
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(adapted(input_ids=ids, labels=ids).loss, want)


def test_quantised_projections(device):
    """int8 weights by torch itself; any module in place of a projection."""
    model, ids = mixed(device), tokens_of(device, 2, 19)
    before = logits_of(model, ids)

    class Int8(nn.Module):
        """Weights of eight bits and a scale per row: no parameter of a floating dtype, no attribute ``weight``."""

        def __init__(self, linear):
            super().__init__()
            scale = linear.weight.detach().abs().amax(1) / 127
            self.register_buffer("scale", scale)
            self.register_buffer("rows", (linear.weight.detach() / scale[:, None]).round().to(torch.int8))

        def forward(self, x):
            return F.linear(x, self.rows.to(x.dtype)) * self.scale.to(x.dtype)

    for parent in model.model.modules():
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear):
                setattr(parent, name, Int8(child))
    after = logits_of(model, ids)
    assert 0 < (after - before).abs().max() < 0.3 * before.abs().max()
    generated = model.generate(ids, **GREEDY)
    assert torch.equal(generated[:, 19:], logits_of(model, generated)[:, 18:-1].argmax(-1))
    assert torch.isfinite(model(ids, labels=ids).loss)


@pytest.mark.parametrize("bits", [8, 4])
def test_torchao(tmp_path, bits):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    model, ids = mixed(), tokens_of("cpu", 2, 19)
    model.save_pretrained(tmp_path)
    kind = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, PerGroup(32))
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TorchAoConfig(kind), device_map="cpu")
    assert type(quantised.model.layers[0].mixer.in_proj.weight) is not nn.Parameter
    logits = logits_of(quantised, ids)
    assert (logits - logits_of(model, ids)).abs().max() < (0.2 if bits == 8 else 1) * logits.abs().max()
    assert quantised.generate(ids, **GREEDY).shape == (2, 25)


def test_transformers_is_only_needed_by_the_models():
    """rat_ext without it; one line from the models."""
    script = """
        import sys
        sys.modules["transformers"] = None
        import rat_ext, rat_ext.layers, rat_ext.cache
        try:
            import rat_ext.models
        except ImportError as error:
            assert str(error) == 'rat_ext.models needs Hugging Face transformers: pip install "rat_ext[models]"', error
        else:
            raise AssertionError
    """
    run(script)


def test_imported_again():
    """A notebook reloads the package: its names are registered as before, and what transformers allows grows no longer."""
    known = rat_ext.models.configuration_utils.ALLOWED_ATTN_LAYER_TYPES
    again = importlib.reload(rat_ext.models)
    assert again.configuration_utils.ALLOWED_ATTN_LAYER_TYPES == known and len(set(known)) == len(known)
    config = AutoConfig.for_model(**config_of().to_dict())
    assert type(config) is again.RATConfig
    with torch.device("meta"):
        assert type(AutoModel.from_config(config)) is again.RATModel
        assert type(AutoModelForCausalLM.from_config(config)) is again.RATForCausalLM
