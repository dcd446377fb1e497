"""Runs by name, for ``--config``. Every field can be changed on the command line: ``--training.steps 100``."""

from __future__ import annotations

from typing import Any

from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.trainer import Trainer

from .data import Shards
from .model import HeadLoss, model_registry
from .parallelize import SaveAttention


def _run(model_spec: Any, training: TrainingConfig, *, warmup: int, **parts: Any) -> Trainer.Config:
    """The paper's recipe: AdamW, a cosine from 8e-4 to 1e-6. Data: what ``rat_ext.train prepare --out data`` wrote."""
    # torchtitan would capture forward and backward in a CUDA graph; what ranks exchange of states is planned by the host.
    training.disable_cuda_graphs = True
    parallelism = {"spmd_backend": "partial_dtensor", "enable_sequence_parallel": False} | parts.pop("parallelism", {})
    return Trainer.Config(
        model_spec=model_spec, loss=HeadLoss.Config(), hf_assets_path="data/tokenizer", dataloader=Shards.Config(),
        optimizer=default_adamw(lr=8e-4), training=training, parallelism=ParallelismConfig(**parallelism),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=warmup, decay_type="cosine", min_lr_factor=1e-6 / 8e-4), **parts,
    )  # fmt: skip


def debug() -> Trainer.Config:
    """Twenty steps of a model of two layers, for any number of ranks."""
    return _run(
        model_registry("debug", "rat-swa"), TrainingConfig(local_batch_size=4, seq_len=64, steps=20), warmup=2,
        activation_checkpoint=None, metrics=MetricsProcessor.Config(log_freq=1),
    )  # fmt: skip


def rat_1_3b_64_gpus() -> Trainer.Config:
    """1.3B, T = 4096, FSDP2 over 64 GPUs of 80 GB: 100 G tokens, 2 M per step in two passes of 4 rows per GPU."""
    return _run(
        model_registry("1.3b"), TrainingConfig(local_batch_size=4, global_batch_size=512, seq_len=4096, steps=47_700),
        warmup=2_400, activation_checkpoint=None, compile=CompileConfig(enable=True, components=["model"]),
        parallelism={"data_parallel_shard_degree": 64}, checkpoint=CheckpointManager.Config(enable=True, interval=1000),
    )  # fmt: skip


def rat_1_3b_1m_tokens_8_gpus() -> Trainer.Config:
    """1.3B, one row of T = 1,048,576 over 8 GPUs: context parallelism, FSDP2 over the same ranks, checkpoints that keep y."""
    return _run(
        model_registry("1.3b"), TrainingConfig(local_batch_size=1, seq_len=1 << 20, steps=2_000), warmup=100,
        activation_checkpoint=SaveAttention.Config(), checkpoint=CheckpointManager.Config(enable=True, interval=100),
        parallelism={"data_parallel_shard_degree": 1, "context_parallel_degree": 8},
    )  # fmt: skip
