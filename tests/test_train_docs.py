"""Every command of docs/training.md, in its order, in small."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import train_helper

for module in ("transformers", "accelerate", "trl", "peft", "lm_eval", "datasets"):
    pytest.importorskip(module, reason="needs the extras [train] and [eval]")

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
SMALL = {
    'size = "200m"': "hidden_size = 32\nnum_hidden_layers = 2\nnum_attention_heads = 4\nsliding_window = 16",
    "steps = 2000 ": "steps = 3\nlength = 64\ntokens_per_step = 256\nwarmup = 0\n#",
    "micro_batch = 8 ": "micro_batch = 2 ",
    "batch = 32": "batch = 2\nmicro_batch = 2",
    "--vocab 8192 --validation 0.01": "--vocab 320 --validation 0.2 --processes 1",
    "rat_bits_per_byte,rat_needle,rat_recall": "rat_bits_per_byte,rat_needle,rat_recall --lengths 300 --samples 1 --pairs 4",
}


@pytest.mark.skipif(not PAGE.exists(), reason="no docs beside the tests")
@pytest.mark.parametrize("ranks", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one", "torchrun"])
def test_every_command(tmp_path, ranks):
    text = PAGE.read_text()
    for large, small in SMALL.items():
        assert large in text, large
        text = text.replace(large, small)
    files = re.findall(r"`(\w+\.toml)`:\n\n```toml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in files] == ["pretrain.toml", "sft.toml"]
    for name, content in files:
        (tmp_path / name).write_text(content)
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks = [block for block in blocks if not block.startswith("pip ") and (ranks or not block.startswith("torchrun "))]
    assert len(blocks) == 5 + ranks
    for folder, numbers in (("text", range(30)), ("held-out", range(2))):
        (tmp_path / folder).mkdir()
        for i in numbers:
            (tmp_path / folder / f"{i}.txt").write_text(f"Text number {i}: the state of a chunk is a key and a value.\n" * 4)
    lines = [json.dumps({"prompt": f"What is {i}?", "answer": " A number."}) for i in range(4)]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines))
    (tmp_path / "bin").mkdir()
    for name, command in (("python", ""), ("torchrun", " -m torch.distributed.run")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{command} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    paths = [str(Path(train_helper.rat_ext.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg",
    }  # fmt: skip
    for block in blocks:
        found = subprocess.run(
            ["bash", "-euc", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert found.returncode == 0, f"{block}\n{found.stdout[-2000:]}\n{found.stderr[-3000:]}"
    for file in ("data/index.json", "run/model/model.safetensors", "run/loss.png", "sft/adapter/adapter_config.json",
                 "evaluation/results.json", "evaluation/rat_needle.png"):  # fmt: skip
        assert (tmp_path / file).exists(), file
    assert "What is a chunk?" in found.stdout
