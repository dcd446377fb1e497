"""The models of several ranks: a row over ranks, heads over ranks."""

import copy
import itertools

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

pytest.importorskip("transformers", reason="rat_ext.models needs transformers: pip install 'rat_ext[models]'")

from rat_ext.models import RATConfig, RATForCausalLM
from rat_ext.models.config import PATTERNS
from rat_ext.parallel import ContextParallel, full_state_dict, parallelize_plan, use_context_parallel

V, TOKENS = 61, 70


def model_of(pattern: str, **changes) -> RATForCausalLM:
    config = RATConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, chunk_size=4, sliding_window=9,
        max_position_embeddings=64, initializer_range=0.3, layer_types=pattern, **changes,
    )  # fmt: skip
    return RATForCausalLM(config).to(ranks.KIND, ranks.EXACT)


def rows_over_ranks(rank: int, world: int) -> dict[str, float]:
    found = {}
    for pattern, sequences in itertools.product(PATTERNS, ([TOKENS], [30, 3, 37])):
        model = model_of(pattern)
        tokens, labels = torch.randint(0, V, (2, 1, TOKENS))
        starts = list(itertools.accumulate([0, *sequences]))
        packed = {} if len(sequences) == 1 else {"cu_seq_lens_q": torch.tensor(starts, dtype=torch.int32)}
        whole = model(tokens, shift_labels=labels, use_cache=False, **packed)
        want = torch.autograd.grad(whole.loss, list(model.parameters()))
        cp = ContextParallel(cu_seqlens=starts)
        assert use_context_parallel(model, cp) == 1
        local = model(cp.shard(tokens), shift_labels=cp.shard(labels), num_items_in_batch=TOKENS)
        got = torch.autograd.grad(local.loss, list(model.parameters()))
        for g in got:
            dist.all_reduce(g)
        differences = [float((a - b).abs().max()) for a, b in zip(got, want, strict=True)]
        with torch.no_grad():
            model.eval()
            use_context_parallel(model, None)
            logits = model(tokens, use_cache=False, **packed).logits
            use_context_parallel(model, cp)
            differences.append(float((model(cp.shard(tokens)).logits - cp.shard(logits)).abs().max()))
        found[f"{pattern}, {sequences}"] = max(differences)
    return found


@pytest.mark.parametrize("world", [3])
def test_rows_over_ranks(tmp_path, world):
    for name, difference in ranks.run("test_parallel_models:rows_over_ranks", world, tmp_path).items():
        assert difference < 1e-10, name


@pytest.mark.parametrize(
    ("argument", "value"), [("attention_mask", torch.ones(1, 8)), ("cu_seq_lens_q", torch.tensor([0, 8])), ("labels", 0)]
)
def test_what_a_row_over_ranks_is_not_given(argument, value):
    model, tokens = model_of("rat"), torch.zeros(1, 8, dtype=torch.int64)
    use_context_parallel(model, ContextParallel(tokens=8))
    with pytest.raises(ValueError, match=f"^rat_ext.RATModel: {argument}: expected None beside context_parallel"):
        model(tokens, **{argument: tokens if argument == "labels" else value})


def heads_over_ranks(rank: int, world: int) -> dict[str, float]:
    mesh, found = init_device_mesh(ranks.KIND, (world,)), {}
    for pattern, act in (("rat-swa", "gelu"), ("rnn", "swiglu")):
        whole = model_of(pattern, num_groups=1, hidden_act=act)
        model = parallelize_module(copy.deepcopy(whole), mesh, parallelize_plan(whole))
        assert isinstance(model.model.layers[0].mixer.gate_bias, DTensor)
        tokens, labels = torch.randint(0, V, (2, 2, 30))
        for m in (whole, model):
            m.train()
            m(tokens, shift_labels=labels).loss.backward()
            # On GPUs optimizers take all parameters at once, which they cannot where some are split and some are not.
            torch.optim.SGD(m.parameters(), lr=0.1, foreach=False).step()
        state = full_state_dict(model)
        found[f"{pattern} after a step"] = max(float((state[name] - x).abs().max()) for name, x in whole.state_dict().items())
        texts = [m.eval().generate(tokens[:, :7], max_new_tokens=9, do_sample=False) for m in (whole, model)]
        found[f"{pattern} generated"] = float((texts[0] != texts[1]).sum())
    return found


def test_heads_over_ranks(tmp_path):
    for name, difference in ranks.run("test_parallel_models:heads_over_ranks", 2, tmp_path).items():
        assert difference < 1e-10, name


def sharded_with_its_embedding(rank: int, world: int) -> float:
    """FSDP2 as accelerate applies it: embedding, last norm and head in one group, whose hooks count one call of each."""
    from torch.distributed.fsdp import fully_shard

    whole = model_of("rat-swa")
    model = copy.deepcopy(whole)
    model._tie()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard([model.model.norm, model.model.embed_tokens, model.lm_head], reshard_after_forward=False)
    fully_shard(model)
    tokens, labels = torch.randint(0, V, (2, 2, 30))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.02) for m in (whole, model)]
    worst = 0.0
    for training in (True, True, False, False, True, True):
        losses, logits = [], []
        for m, optimizer in zip((whole, model), optimizers, strict=True):
            m.train(training)
            found = m(tokens, shift_labels=labels, logits_to_keep=3)
            losses.append(float(found.loss.detach()))
            if training:
                found.loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                logits.append(found.logits.detach())
        worst = max([worst, abs(losses[0] - losses[1]), *(float((a - logits[0]).abs().max()) for a in logits)])
    return worst


def test_sharded_with_its_embedding(tmp_path):
    assert ranks.run("test_parallel_models:sharded_with_its_embedding", 2, tmp_path) < 1e-9
