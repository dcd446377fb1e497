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
    if "one group" in more:
        config.model_spec.model.rat.num_groups = 1
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


LAYOUTS = [
    "fsdp",
    "fsdp, untied, accumulate",
    "ddp, save",
    "cp",
    "cp, save, compile",
    "tp",
    "tp, save, one group",
    "tp, compile",
    "fsdp, compile",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_trainer_and_a_plain_loop(tmp_path, data, layout):
    environment = {"TITAN_DATA": str(data / "data"), "TITAN_OUT": str(tmp_path / "out"), "TITAN_LAYOUT": layout}
    steps = ranks.run("test_train_titan:trained", 2, tmp_path, timeout=300, **environment)
    assert len(steps) == STEPS
    for (loss, norm), (loss_plain, norm_plain) in steps:
        assert loss == pytest.approx(loss_plain, rel=1e-5) and norm == pytest.approx(norm_plain, rel=1e-3)
    assert steps[-1][0][0] < steps[0][0][0]


def program(folder: Path, data: Path, *arguments: str, processes: int = 2) -> dict[int, tuple[float, float]]:
    """``torchrun -m torchtitan.train`` on processors; loss and norm by step, of the first rank."""
    command = ["--nproc-per-node", str(processes), "--standalone", str(Path(__file__).with_name("titan_on_cpu.py"))]
    options = {
        "--module": "rat_ext.train.titan", "--config": "debug", "--dataloader.dataset_path": data,
        "--hf_assets_path": data / "tokenizer", "--dump_folder": folder, "--optimizer.implementation": "foreach",
        "--debug.seed": 0,
    }  # fmt: skip
    given = [str(word) for pair in options.items() for word in pair]
    found = train_helper.launch(*command, *given, *arguments, module="torch.distributed.run", OMP_NUM_THREADS="1", LOG_RANK="0")
    assert found.returncode == 0, found.stderr[-4000:]
    text = re.sub(r"\x1b\[[0-9;]*m", "", found.stdout + found.stderr)
    steps = re.findall(r"step: +(\d+) +loss: +([\d.]+) +grad_norm: +([\d.]+)", text)
    return {int(step): (float(loss), float(norm)) for step, loss, norm in steps}


def test_the_program_goes_on_and_writes_a_model(tmp_path, data):
    """From a checkpoint the losses are those of the run that was not stopped; the last one is for from_pretrained."""
    from rat_ext.models import RATForCausalLM
    from rat_ext.train.titan import model_registry

    run = ["--training.steps", "6", "--checkpoint.enable", "--checkpoint.interval", "3", "--checkpoint.last_save_in_hf"]
    whole = program(tmp_path, data / "data", *run)
    assert sorted(whole) == [1, 2, 3, 4, 5, 6] and whole[6] < whole[1]
    last = tmp_path / "checkpoint" / "step-6"
    model_registry("debug", "rat-swa").model.rat.save_pretrained(last)
    model = RATForCausalLM.from_pretrained(last)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert float(model.model.embed_tokens.weight.detach().std()) > 0.01
    last.rename(tmp_path / "written")
    again = program(tmp_path, data / "data", *run)
    assert again == {step: whole[step] for step in (4, 5, 6)}
    for name, x in RATForCausalLM.from_pretrained(tmp_path / "written").state_dict().items():
        torch.testing.assert_close(x, model.state_dict()[name], rtol=0, atol=0)


def test_the_shards_by_ranks(data):
    """Ranks take the windows in turn, and go on with the next on another number of ranks."""
    from rat_ext.train.data import Tokens, Windows
    from rat_ext.train.titan import Shards

    folder = str(data / "data")
    windows = Windows(Tokens(folder), 32, items=100, seed=3)
    config = Shards.Config(dataset_path=folder, seed=3)
    loaders = [config.build(dp_world_size=2, dp_rank=r, seq_len=32, local_batch_size=3, tokenizer=None) for r in range(2)]
    found = [[next(x) for _ in range(2)] for x in map(iter, loaders)]
    rows = torch.cat([found[r][step][0]["input"] for step in range(2) for r in range(2)])
    labels = torch.cat([found[r][step][1] for step in range(2) for r in range(2)])
    assert (rows == torch.stack([windows[i]["input_ids"] for i in range(12)])).all()
    assert (labels == torch.stack([windows[i]["labels"] for i in range(12)])).all()
    assert found[0][0][0]["positions"].tolist() == [list(range(32))] * 3
    alone = config.build(dp_world_size=1, dp_rank=0, seq_len=32, local_batch_size=2, tokenizer=None)
    alone.load_state_dict(loaders[1].state_dict())
    assert (next(iter(alone))[0]["input"][0] == windows[12]["input_ids"]).all()


def built(rank: int, world: int) -> tuple[int, int, int, str]:
    """A configuration of the package in torchtitan's dry run: (numbers on a rank, parameters, passes, how rows are cut)."""
    name, ranks_of_job, length = os.environ["TITAN_LAYOUT"].split()
    dist.destroy_process_group()
    os.environ |= {"NGPU": ranks_of_job, "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": ranks_of_job}
    import titan_on_cpu  # noqa: F401
    from torchtitan.config import ConfigManager

    arguments = ["--module", "rat_ext.train.titan", "--config", name, "--comm.mode", "fake_backend", "--debug.seed", "0"]
    folder = os.environ["TITAN_DATA"]
    arguments += ["--dataloader.dataset_path", folder, "--hf_assets_path", f"{folder}/tokenizer", "--training.seq_len", length]
    arguments += ["--optimizer.implementation", "foreach", "--dump_folder", os.environ["TITAN_OUT"]]
    trainer = ConfigManager().parse_args(arguments).build()
    model = trainer.model_parts[0]
    local = sum(p.to_local().numel() for p in model.parameters())
    result = local, sum(p.numel() for p in model.parameters()), trainer.gradient_accumulation_steps
    return *result, repr(model.model.context_parallel)


# T is less than theirs, for want of text; nothing that is built depends on it.
@pytest.mark.parametrize(
    ("name", "world", "passes", "rows"),
    [("rat_1_3b_64_gpus", 64, 2, "None"), ("rat_1_3b_1m_tokens_8_gpus", 8, 1, "ContextParallel(rank 0 of 8, 512 tokens)")],
)
def test_the_configurations_build(tmp_path, data, name, world, passes, rows):
    environment = {"TITAN_DATA": str(data / "data"), "TITAN_OUT": str(tmp_path / "out")}
    found = ranks.run("test_train_titan:built", 1, tmp_path, timeout=300, TITAN_LAYOUT=f"{name} {world} 512", **environment)
    assert found[1:] == (1298810880, passes, rows)
    assert 1 <= found[0] * world / found[1] < 1.001  # gate biases have 16 rows


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spmd_backend": "spmd_types"}, "parallelism.spmd_backend: expected partial_dtensor, got spmd_types"),
        (
            {"context_parallel_degree": 2, "context_parallel_load_balancer": None},
            "parallelism.context_parallel_load_balancer: expected headtail, an early and a late piece for each rank, got None",
        ),
        (
            {"tensor_parallel_degree": 3},
            "parallelism.tensor_parallel_degree: expected a divisor of num_attention_heads = 4, got 3",
        ),
        (
            {"tensor_parallel_degree": 2, "enable_sequence_parallel": True},
            "parallelism.enable_sequence_parallel: expected False, got True",
        ),
    ],
)
def test_what_the_model_cannot_do(changes, said):
    from rat_ext.train.titan import config_registry

    config = config_registry.debug()
    config.parallelism = dataclasses.replace(config.parallelism, **changes)
    with pytest.raises(ValueError, match=f"^rat_ext.train.titan: {re.escape(said)}$"):
        config.model_spec.model.update_from_config(config=config)


def test_rows_in_the_order_of_ranks_are_not_written_for_others():
    from rat_ext.train.titan import config_registry

    config = config_registry.debug()
    config.parallelism.tensor_parallel_degree, config.checkpoint.last_save_in_hf = 2, True
    with pytest.raises(ValueError, match="checkpoint.last_save_in_hf: expected False beside tensor parallelism, got True$"):
        config.model_spec.model.update_from_config(config=config)


def test_groups_and_ranks_that_do_not_divide():
    from rat_ext.train.titan import config_registry, model_registry

    config = config_registry.debug()
    config.parallelism.tensor_parallel_degree = 2
    spec = model_registry("debug", num_attention_heads=6, hidden_size=48, num_groups=3)
    with pytest.raises(ValueError, match="expected a divisor or a multiple of num_groups = 3, got 2$"):
        spec.model.update_from_config(config=config)
