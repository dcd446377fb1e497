"""torchtitan's trainer on rat_ext's models: two processes, gloo, CPU, against a plain loop."""

import dataclasses
import importlib.util
import os
import re
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
import train_helper

if importlib.util.find_spec("torchtitan") is None:
    pytest.skip("needs torchtitan: pip install 'rat_ext[titan]'", allow_module_level=True)
pytest.importorskip("triton", reason="torchtitan imports triton")
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS, LENGTH, ROWS = 4, 64, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return train_helper.prepared(tmp_path_factory.mktemp("titan"))


def configuration(layout: str, world: int):
    """The debug run in float32 over ``world`` ranks; ``layout`` says what is over them, and with what."""
    from rat_ext.train.titan import SaveAttention, config_registry

    config = config_registry.debug()
    folder = Path(os.environ["TITAN_DATA"])
    config.hf_assets_path, config.dataloader.dataset_path = str(folder / "tokenizer"), str(folder)
    config.dump_folder = os.environ["TITAN_OUT"]
    training, parallelism = config.training, config.parallelism
    training.steps, training.seq_len, training.global_batch_size = STEPS, LENGTH, ROWS
    training.mixed_precision_param = "float32"
    config.lr_scheduler.warmup_steps = 0
    config.optimizer.implementation = "foreach"
    config.debug.seed = 0
    kind, *more = layout.split(", ")
    training.local_batch_size = ROWS // world if kind in ("fsdp", "ddp") else ROWS
    if kind == "ddp":
        parallelism.data_parallel_replicate_degree = world
    if kind == "cp":
        parallelism.context_parallel_degree = world
    if kind == "tp":
        parallelism.tensor_parallel_degree = world
    if "save" in more:
        config.activation_checkpoint = SaveAttention.Config()
    if "compile" in more:
        config.compile.enable, config.compile.components, config.compile.backend = True, ["model"], "aot_eager"
    if "untied" in more:
        config.model_spec.model.rat.tie_word_embeddings = False
    if "accumulate" in more:
        training.local_batch_size //= 2
    return config


def plain(rat, state: dict, folder: str) -> list[tuple[float, float]]:
    """Loss and norm of the gradients by step, of a loop without torchtitan; the same windows, the same recipe."""
    from rat_ext.models import RATForCausalLM
    from rat_ext.train.data import Tokens, Windows

    model = RATForCausalLM(rat)
    model.load_state_dict(state)
    windows = Windows(Tokens(folder), LENGTH, items=STEPS * ROWS, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-4, betas=(0.9, 0.95), weight_decay=0.1)
    found = []
    for step in range(STEPS):
        rows = [windows[step * ROWS + i] for i in range(ROWS)]
        tokens, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
        loss = model(tokens, shift_labels=labels, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append((float(loss.detach()), float(norm)))
    return found


def trained(rank: int, world: int) -> list[tuple]:
    """What the trainer logged, and what the plain loop finds from the same weights."""
    import titan_on_cpu  # noqa: F401

    from rat_ext.parallel import full_state_dict

    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
    config = configuration(os.environ["TITAN_LAYOUT"], world)
    config.lr_scheduler.decay_ratio = 0.0  # the plain loop's rate stays
    trainer = config.build()
    logged = []
    trainer.metrics_processor.log = lambda step, loss, worst, norm, **more: logged.append((loss, norm))
    trainer.metrics_processor.should_log = lambda step: True
    state = {name: x.clone() for name, x in full_state_dict(trainer.model_parts[0]).items()}
    trainer.train()
    trainer.close()
    want = plain(config.model_spec.model.rat, state, os.environ["TITAN_DATA"]) if rank == 0 else []
    return list(zip(logged, want, strict=rank == 0))


LAYOUTS = ["fsdp", "fsdp, untied, accumulate", "ddp, save", "cp", "cp, save, compile", "tp", "tp, save", "fsdp, compile"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_trainer_and_a_plain_loop(tmp_path, data, layout):
    environment = {"TITAN_DATA": str(data / "data"), "TITAN_OUT": str(tmp_path / "out"), "TITAN_LAYOUT": layout}
    steps = ranks.run("test_train_titan:trained", 2, tmp_path, timeout=300, **environment)
    assert len(steps) == STEPS
    for (loss, norm), (loss_plain, norm_plain) in steps:
        assert loss == pytest.approx(loss_plain, rel=1e-5) and norm == pytest.approx(norm_plain, rel=1e-3)
    assert steps[-1][0][0] < steps[0][0][0]
