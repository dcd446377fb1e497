"""``python -m rat_ext.evaluate``: its tasks can be solved, are scored rightly, and agree with the model asked directly."""

import json
import math
import random
import re
import sys

import pytest
import torch

pytest.importorskip("lm_eval.api.model", reason="needs the extra [eval]")
pytest.importorskip("transformers", reason="needs the extra [eval]")

from lm_eval.api.model import LM

from rat_ext.evaluate import __main__ as command
from rat_ext.evaluate.tasks import rat_tasks
from rat_ext.models import RATConfig, RATForCausalLM
from rat_ext.train._extra import Refused, run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a small random model and a byte-level tokenizer."""
    from transformers import PreTrainedTokenizerFast

    from rat_ext.train.prepare import Settings, plan, train_tokenizer

    folder = tmp_path_factory.mktemp("model")
    settings = Settings(vocab=300)
    train_tokenizer(plan([str(command.TASKS / "held_out.jsonl")], settings)[0], settings, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    torch.manual_seed(0)
    config = RATConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, chunk_size=8, eos_token_id=0,
        bos_token_id=0, pad_token_id=0, max_position_embeddings=256,
    )  # fmt: skip
    RATForCausalLM(config).save_pretrained(folder)
    return str(folder)


class Knows(LM):
    """Answers every question of the tasks from their prompts, but for a share of them."""

    wrong = 0.0

    def __init__(self, **options):
        super().__init__()
        self.options, self.draw = options, random.Random(0)

    def loglikelihood(self, requests):
        found = []
        for context, answer in (request.args for request in requests):
            key = context.rpartition("\n")[2].removesuffix(" =")
            right = f"\n{key} = {answer.strip()}\n" in "\n" + context and self.draw.random() >= self.wrong
            found.append((-1.0, right))
        return found

    def generate_until(self, requests):
        found = []
        for context, _ in (request.args for request in requests):
            key = re.search(r"number of (.+) is$", context).group(1)
            value = re.search(rf"number of {key} is (\d+)\.", context).group(1)
            found.append(" no idea" if self.draw.random() < self.wrong else f" {value}. The")
        return found

    def loglikelihood_rolling(self, requests):
        return [-1.0 for _ in requests]


@pytest.fixture
def knows(monkeypatch):
    from lm_eval.models import huggingface

    monkeypatch.setattr(huggingface, "HFLM", Knows)
    return Knows


def test_every_task_can_be_solved_and_is_told_apart(model, knows, tmp_path, capsys, monkeypatch):
    arguments = [model, "--tasks", "rat_needle,rat_needle_keys,rat_recall", "--lengths", "400", "600", "--depths", "0", "0.5",
                 "1", "--samples", "3", "--pairs", "4", "9", "--out", str(tmp_path)]  # fmt: skip
    assert command.main(arguments) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["results"]["rat_needle"] == {"found": 1.0} and results["results"]["rat_recall"] == {"acc": 1.0}
    cells = results["by"]["rat_needle_keys"]
    assert [(cell["length"], cell["depth"]) for cell in cells] == [(n, d) for n in (400, 600) for d in (0.0, 0.5, 1.0)]
    assert all(cell["found"] == 1.0 and cell["samples"] == 3 for cell in cells)
    assert [(cell["pairs"], cell["acc"], cell["samples"]) for cell in results["by"]["rat_recall"]] == [
        (4, 1.0, 12),
        (9, 1.0, 12),
    ]
    for name in ("rat_needle.png", "rat_needle_keys.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert (
        re.search(r"rat_needle +length 600, depth 0.5 +found +1.0000", text) and (tmp_path / "results.txt").read_text() in text
    )
    monkeypatch.setattr(knows, "wrong", 0.5)
    assert command.main(arguments) == 0
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert 0.2 < results["rat_needle"]["found"] < 0.8 and 0.2 < results["rat_recall"]["acc"] < 0.8


@pytest.mark.parametrize("make", [rat_tasks.needle, rat_tasks.needle_keys])
def test_needles_stand_where_they_should(model, make):
    rows = make(pretrained=model, lengths=[400, 800], depths=[0.0, 0.5, 1.0], samples=2)["test"]
    assert rows[:3] == make(pretrained=model, lengths=[400, 800], depths=[0.0, 0.5, 1.0], samples=2)["test"][:3]
    assert rows[0] != make(pretrained=model, lengths=[400], depths=[0.0], samples=1, seed=1)["test"][0]
    count = rat_tasks._count({"pretrained": model})
    for row, size in zip(rows, count(list(rows["prompt"])), strict=True):
        assert row["length"] - 60 < size <= row["length"] - 8
        name = re.search(r"number of (.+) is$", row["prompt"]).group(1)
        needle = f"The pass number of {name} is {row['answer']}."
        place = row["prompt"].index(needle) / len(row["prompt"])
        assert row["prompt"].count(needle) == 1 and abs(place - row["depth"]) < 0.2
        assert row["prompt"].count("The pass number of") == row["keys"] + 1


def test_scores_of_needles_and_prompts():
    assert rat_tasks.found({"answer": "12345"}, [" 12345."])["found"] == 1.0
    assert rat_tasks.found({"answer": "12345"}, [" 54321 12345"])["found"] == 0.0
    assert rat_tasks.found({"answer": "12345"}, [""])["found"] == 0.0
    scores = rat_tasks.answered({"answers": ["The red fox", "Oslo"]}, ["It is a red fox, I think."])
    assert scores["match"] == 0.0 and scores["f1"] == pytest.approx(2 * 2 / (6 + 2))
    assert rat_tasks.answered({"answers": ["Oslo", "Rome"]}, ["oslo"])["match"] == 0.5


def test_bits_per_byte_is_what_the_model_says(model, tmp_path):
    (tmp_path / "a.txt").write_text("A short text, held out.\n")
    (tmp_path / "b.txt").write_text("Another one: \u00e9\u00e8 " + "and longer " * 40)
    results = command.evaluate(model, ["rat_bits_per_byte"], text=[str(tmp_path)], batch_size="2")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    net, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    bits = size = 0.0
    for path in sorted(tmp_path.iterdir()):
        ids = torch.tensor([[0, *tokenizer(path.read_text()).input_ids]])
        assert ids.shape[1] <= 256
        with torch.no_grad():
            logits = net(input_ids=ids).logits[0, :-1]
        bits += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")) / math.log(2)
        size += path.stat().st_size
    assert results["results"]["rat_bits_per_byte"]["bits_per_byte"] == pytest.approx(bits / size, rel=1e-4)
    assert results["versions"]["torch"] == torch.__version__


def test_the_shipped_text_and_generation(model):
    """All of it on a model: padded batches, generation, text of the package."""
    results = command.evaluate(
        model,
        ["rat_bits_per_byte", "rat_needle", "rat_recall"],
        lengths=[300],
        depths=[0.5],
        samples=3,
        pairs=[4],
        batch_size="2",
    )
    assert 2 < results["results"]["rat_bits_per_byte"]["bits_per_byte"] < 9
    assert results["results"]["rat_needle"]["found"] == 0.0  # random weights know nothing
    assert len(rat_tasks.held_out()["test"]) >= 8


def test_prompts_of_local_files(model, tmp_path):
    lines = [
        {"context": "Long text.", "input": "Who?", "answers": ["Ann", "Bob"], "dataset": "qa", "length": 7},
        {"input": "RULER text", "outputs": ["1234"], "answer_prefix": " It is", "length": 4096},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    rows = list(rat_tasks.prompts(prompts=[str(path)])["test"])
    assert [row["prompt"] for row in rows] == ["Long text.\n\nWho?", "RULER text It is"]
    assert [row["answers"] for row in rows] == [["Ann", "Bob"], ["1234"]]
    assert [(row["dataset"], row["length"]) for row in rows] == [("qa", 7), ("prompts", 4096)]
    template = "Read {context} Answer {input}"
    assert rat_tasks.prompts(prompts=str(path), template=template)["test"][0]["prompt"] == "Read Long text. Answer Who?"
    results = command.evaluate(model, ["rat_prompts"], prompts=[str(path)])
    assert {cell["dataset"] for cell in results["by"]["rat_prompts"]} == {"qa", "prompts"}
    path.write_text('{"input": "x"}')
    with pytest.raises(ValueError, match="rat_prompts: .*prompts.jsonl:1: expected an object with input and answers"):
        rat_tasks.prompts(prompts=[str(path)])


@pytest.mark.parametrize(
    "line",
    [
        b'{"input": "a", "answers": null}',
        b'{"input": "a", "answers": []}',
        b'{"input": "a", "answers": [""]}',
        b'{"input": 1, "answers": ["x"]}',
        b'{"input": "a", "context": ["x"], "answers": ["x"]}',
        b'{"input": "a", "answers": ["x"], "length": "long"}',
        b'{"input": "\xe9", "answers": ["x"]}',
        b"[1]",
    ],
)
def test_a_line_that_is_no_prompt_is_named(line, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"input": "a", "answers": 1.5}\n\n' + line)
    with pytest.raises(Refused, match=r"rat_prompts: .*prompts.jsonl:3: expected (an object with input and answers|strings)"):
        rat_tasks.prompts(prompts=str(path))


def test_lines_of_prompts_end_with_a_newline_alone(tmp_path):
    """Not with other characters that Unicode calls the end of a line; a mark of the byte order is none of the text."""
    path = tmp_path / "prompts.jsonl"
    row = {"input": "a\u2028b\x85", "context": "see {input}", "answers": ["x"]}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode() + b"\r\n")
    (found,) = rat_tasks.prompts(prompts=str(path), template="{context}: {input}")["test"]
    assert found["prompt"] == "see {input}: a\u2028b\x85"
    for options, words in (
        ({"prompts": str(tmp_path / "none")}, "prompts: expected files that can be read"),
        ({"prompts": str(path), "template": "x"}, "template: expected a text with {input}"),
    ):
        with pytest.raises(Refused, match=words):
            rat_tasks.prompts(**options)


def test_a_tokenizer_of_another_folder(model, tmp_path):
    import shutil

    shutil.copytree(model, tmp_path / "bare")
    for file in (tmp_path / "bare").glob("tokenizer*"):
        file.unlink()
    options = {"lengths": [200], "depths": [0.5, 0.5], "samples": 1}
    results = command.evaluate(str(tmp_path / "bare"), ["rat_need*s"], tokenizer=model, **options | {"lengths": [420]})
    assert results["by"] == {"rat_needle_keys": [{"length": 420, "depth": 0.5, "found": 0.0, "samples": 1}]}
    small = json.loads((tmp_path / "bare" / "config.json").read_text()) | {"vocab_size": 100}
    RATForCausalLM(RATConfig(**small)).save_pretrained(tmp_path / "small")
    with pytest.raises(Refused, match="evaluate: --tokenizer: expected a tokenizer of at most the model's 100 tokens, got 300"):
        command.evaluate(str(tmp_path / "small"), ["rat_recall"], tokenizer=model)
    with pytest.raises(Refused, match=r"evaluate: MODEL: expected a model, its tokenizer \(or --tokenizer\)"):
        command.evaluate(str(tmp_path / "bare"), ["rat_recall"])


def test_prompts_are_not_cut(model):
    """What lm-eval is given fits: else the first pairs of a long list would be missing."""
    options = {"pairs": [4, 40], "samples": 3, "device": "cpu"}
    words = r"evaluate: --max-length: expected at least (\d+), the tokens of rat_recall with 40 --pairs, got "
    with pytest.raises(Refused, match=words + "256, the default") as refused:
        command.evaluate(model, ["rat_recall"], **options)
    most = int(re.search(words, str(refused.value)).group(1))
    texts = rat_tasks.recall(pairs=[40], samples=3)["test"]
    assert most - max(map(len, rat_tasks._tokenizer(model)([x["prompt"] + x["answer"] for x in texts]).input_ids)) in (-1, 0)
    with pytest.raises(Refused, match=f"{words}{most - 1}$"):
        command.evaluate(model, ["rat_recall"], max_length=most - 1, **options)
    assert len(command.evaluate(model, ["rat_recall"], max_length=most, **options)["by"]["rat_recall"]) == 2


def test_what_is_refused(model, tmp_path, capsys, monkeypatch):
    def refused(*arguments):
        assert run(lambda: command.main([*arguments, "--out", str(tmp_path / "out")])) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "evaluate: --tasks: expected tasks of lm-eval or of rat_bits_per_byte" in refused(model, "--tasks", "rat_bogus")
    assert "evaluate: MODEL: expected a folder with a model" in refused(str(tmp_path), "--tasks", "rat_recall")
    for words, said in (
        (("--tasks", ","), "--tasks: expected names of tasks"),
        (("--tasks", "rat_recall", "--batch-size", "0"), "--batch-size: expected auto, or a number from 1 on, got 0"),
        (("--tasks", "rat_recall", "--limit", "-1"), "--limit: expected more than 0"),
        (("--tasks", "rat_recall", "--max-length", "1"), "--max-length: expected at least 2"),
        (("--tasks", "rat_prompts", "--max-length", "64"), "--max-length: expected more than 64"),
        (("--tasks", "rat_recall", "--dtype", "bogus"), "--dtype: expected auto, or a dtype"),
        (("--tasks", "rat_recall", "--device", "bogus"), "--device: expected a device"),
    ):
        with pytest.raises(Refused, match=said):
            command.main([model, *words, "--out", str(tmp_path / "out")])
    for make, options, said in (
        (rat_tasks.needle, {"lengths": [40]}, "rat_needle: lengths: expected at least .* tokens, .* got 40"),
        (rat_tasks.needle, {"depths": [2.0]}, "rat_needle: depths: expected numbers from 0 to 1"),
        (rat_tasks.needle, {"samples": 0}, "rat_needle: samples: expected at least 1"),
        (rat_tasks.recall, {"pairs": [0]}, "rat_recall: pairs: expected at least 1"),
        (rat_tasks.recall, {"pairs": [20000]}, "rat_recall: pairs: expected at most 10000"),
        (rat_tasks.recall, {"samples": 0}, "rat_recall: samples: expected at least 1"),
    ):
        with pytest.raises(Refused, match=said):
            make(pretrained=model, **options)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    capsys.readouterr()
    assert refused(model, "--tasks", "rat_recall") == 'rat_ext.evaluate needs lm_eval: pip install "rat_ext[eval]"'
    with pytest.raises(Refused, match="--out: expected a folder that can be written"):
        (tmp_path / "file").write_text("")
        command.main([model, "--tasks", "rat_recall", "--out", str(tmp_path / "file" / "x")])
