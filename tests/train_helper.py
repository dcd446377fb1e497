"""A run of ``rat_ext.train`` in small, shared by tests/test_train_run.py and tests/test_evaluate.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import rat_ext

CONFIG = """
output = "run"
data = "data"

[model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 4
pattern = "rat-swa"
chunk_size = 4
sliding_window = 8

[train]
steps = 6
length = 32
tokens_per_step = 256
micro_batch = 2
learning_rate = 1e-2
log_every = 1
save_every = 2
eval_every = 3
bf16 = false
"""


def prepared(folder: Path) -> Path:
    """``folder`` with shards in ``data`` and CONFIG in ``config.toml``."""
    from rat_ext.train.prepare import prepare

    draw = np.random.default_rng(0)
    words = "state chunk gate key value row token past softmax query rotates forgets".split()
    lines = [json.dumps({"text": " ".join(draw.choice(words, int(draw.integers(5, 60))))}) for _ in range(200)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    prepare([str(folder / "text.jsonl")], folder / "data", processes=1, vocab=320, validation=0.1)
    (folder / "config.toml").write_text(CONFIG)
    return folder


def launch(*arguments: str, module: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Python in a process of its own that finds this package."""
    environment = os.environ | {"PYTHONPATH": str(Path(rat_ext.__file__).parents[1]), "MPLBACKEND": "Agg"} | environment
    command = [sys.executable, *(["-m", module] if module else []), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=540)
