"""``python -m rat_ext.train prepare``: what is in the shards, what is skipped, what a stopped run leaves."""

import gzip
import json
import os
import sys

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="needs the extra [train]")
pytest.importorskip("transformers", reason="needs the extra [train]")

from rat_ext.train import __main__ as command
from rat_ext.train import prepare as module
from rat_ext.train._extra import Refused
from rat_ext.train.data import Tokens
from rat_ext.train.prepare import Encoder, documents, plan, prepare

WORDS = "the chunk state holds keys and values of a row while gates forget what the past has said about every token".split()


def story(seed: int, words: int = 60) -> str:
    draw = np.random.default_rng(seed)
    return " ".join(str(word) for word in draw.choice(WORDS, words)) + f" {seed}.\n"


def texts(folder, split: str) -> list[str]:
    """The documents of a split, decoded."""
    tokens, encoder = Tokens(folder, split), Encoder(folder / "tokenizer")
    everything, start, found = tokens.read(0, len(tokens)), 0, []
    for end in np.flatnonzero(everything == tokens.eos):
        found.append(encoder.tokenizer.decode(everything[start:end].tolist(), skip_special_tokens=False))
        start = end + 1
    assert start == len(everything)
    return found


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text" / "sub").mkdir(parents=True)
    for i in range(20):
        (tmp_path / "text" / ("sub" if i % 2 else ".") / f"{i:02d}.txt").write_text(story(i))
    return tmp_path


def make(folder, name="out", **options):
    return prepare([str(folder / "text")], folder / name, **{"processes": 1, "vocab": 320, "validation": 0.2} | options)


def test_every_document_comes_back(folder):
    index = make(folder)
    train, held = texts(folder / "out", "train"), texts(folder / "out", "validation")
    assert sorted(train + held) == sorted(story(i) for i in range(20)) and 0 < len(held) < 10
    assert index["splits"]["train"]["documents"] == len(train) and index["splits"]["validation"]["bytes"] == sum(map(len, held))
    assert index["vocab"] <= 320 and index["dtype"] == "<u2" and not index["skipped"]
    (shard,) = (s for s in index["shards"] if s["split"] == "train")
    table = np.load(folder / "out" / f"{shard['file']}.npy")
    assert table[-1, 0] == shard["tokens"] and table[:, 1].sum() == shard["bytes"] == sum(map(len, train))


def test_what_cannot_be_used_is_skipped_and_listed(folder, capsys):
    text = folder / "text"
    (text / "empty.txt").write_text("")
    (text / "blank.txt").write_text(" \n\t")
    (text / "latin.txt").write_bytes("caf\u00e9 ".encode("latin-1") * 5)
    (text / "huge.txt").write_text("x" * 5000)
    (text / "broken.txt.gz").write_bytes(gzip.compress(story(90).encode() * 5)[:-20])
    (text / "good.txt.gz").write_bytes(gzip.compress(story(91).encode()))
    lines = [
        json.dumps({"text": story(92)}), "{not json", json.dumps({"other": 1}), json.dumps({"text": 5}), "",
        json.dumps({"text": "\ud800"}), json.dumps({"text": "y" * 6000}), json.dumps({"text": story(93)}),
    ]  # fmt: skip
    (text / "lines.jsonl").write_text("\n".join(lines))
    (text / "gone.txt").symlink_to(folder / "absent")
    os.mkfifo(text / "pipe.txt")
    (text / ".hidden").write_text("secret")
    index = make(folder, max_bytes=4096)
    found = texts(folder / "out", "train") + texts(folder / "out", "validation")
    assert sorted(found) == sorted(story(i) for i in (*range(20), 91, 92, 93))
    problems = dict(index["skipped"])
    assert {name.partition(":")[0] for name in problems} == {
        "empty.txt", "blank.txt", "latin.txt", "huge.txt", "broken.txt.gz", "lines.jsonl", "gone.txt", "pipe.txt",
    }  # fmt: skip
    assert problems["latin.txt"].startswith("not UTF-8") and "--max-bytes" in problems["huge.txt"]
    assert problems["broken.txt.gz"].startswith("EOFError") and problems["gone.txt"].startswith("FileNotFoundError")
    assert len([name for name in problems if name.startswith("lines.jsonl:")]) == 5
    assert "skipped latin.txt" in capsys.readouterr().err


def test_a_text_that_spells_eos_is_one_document(folder):
    spelled = f"before {module.EOS} after\n"
    (folder / "text" / "spelled.txt").write_text(spelled)
    make(folder, validation=0.0)
    assert spelled in texts(folder / "out", "train")


def test_slices_of_lines_share_none_and_leave_none_out(tmp_path, monkeypatch):
    lines = [json.dumps({"text": story(i, 3 + i % 17)}, ensure_ascii=False) for i in range(60)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n\n")
    for size in (1, 37, 200, 1 << 20):
        monkeypatch.setattr(module, "SLICE", size)
        settings = module.Settings()
        parts, _ = plan([str(tmp_path / "x.jsonl")], settings)
        found = [d.text for part in parts for piece in part for d in documents(piece, settings)]
        assert found == [story(i, 3 + i % 17) for i in range(60)]


def test_a_long_text_in_pieces_has_the_same_tokens(folder, monkeypatch):
    make(folder)
    encoder = Encoder(folder / "out" / "tokenizer")
    long = " ".join(story(i).strip() for i in range(100))
    whole = encoder.encode([long])[0]
    monkeypatch.setattr(module, "PIECE", 6000)
    assert len(list(module.cut(long))) > 3 and "".join(module.cut("x" * 20000)) == "x" * 20000
    assert (encoder.encode([long])[0] == whole).all()


def test_a_stopped_run_goes_on(folder, monkeypatch):
    monkeypatch.setattr(module, "PART", (1000, 1000))
    whole = make(folder, "whole")
    right, calls = module.encode_part, []

    def stops(out, number, part, settings):
        calls.append(number)
        if len(calls) == 3:
            (out / ".part-00002.json.1.tmp.json").write_text("half")
            raise KeyboardInterrupt
        right(out, number, part, settings)

    monkeypatch.setattr(module, "encode_part", stops)
    with pytest.raises(KeyboardInterrupt):
        make(folder)
    assert not (folder / "out" / "index.json").exists()
    with pytest.raises(Refused, match="that `python -m rat_ext.train prepare` completed"):
        Tokens(folder / "out")
    calls[:] = [None] * 3
    index = make(folder)
    assert calls[3:] == list(range(2, len({s["file"][-5:] for s in index["shards"]})))
    assert index == whole and texts(folder / "out", "train") == texts(folder / "whole", "train")
    assert not list((folder / "out").glob(".*"))
    calls.clear()
    assert make(folder) == index and not calls  # nothing to do


def test_processes_change_nothing(folder, monkeypatch):
    monkeypatch.setattr(module, "PART", (2000, 2000))
    one, two = make(folder, "one"), make(folder, "two", processes=2)
    assert one == two and one["hash"] == two["hash"]
    for shard in one["shards"]:
        name = f"{shard['file']}.bin"
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()


def test_the_hash_tells_content_and_settings(folder):
    first = make(folder, "a")["hash"]
    (folder / "text" / "00.txt").touch()
    assert make(folder, "b")["hash"] == first
    assert make(folder, "c", seed=1)["hash"] != first
    (folder / "text" / "00.txt").write_text(story(77))
    assert make(folder, "d")["hash"] != first


def test_other_inputs_need_another_folder(folder):
    make(folder)
    with pytest.raises(Refused, match="prepare: --out: expected an empty folder, or one of the same inputs and settings"):
        make(folder, vocab=330)
    assert make(folder, vocab=330, overwrite=True)["settings"]["vocab"] == 330
    (folder / "mine").mkdir()
    (folder / "mine" / "file").write_text("kept")
    with pytest.raises(Refused, match="a folder that prepare has made"):
        make(folder, "mine", overwrite=True)
    assert (folder / "mine" / "file").read_text() == "kept"


def test_a_tokenizer_of_a_folder_and_uint32(folder, monkeypatch):
    make(folder)
    index = make(folder, "again", tokenizer=str(folder / "out" / "tokenizer"))
    assert texts(folder / "again", "train") == texts(folder / "out", "train") and index["eos"] == 0
    real = Encoder.__init__

    def wide(self, path):
        real(self, path)
        self.dtype = np.dtype("<u4")

    monkeypatch.setattr(Encoder, "__init__", wide)
    assert make(folder, "wide")["dtype"] == "<u4" and texts(folder / "wide", "train") == texts(folder / "out", "train")
    with pytest.raises(Refused, match="prepare: --tokenizer: expected train, a folder or a name"):
        make(folder, "none", tokenizer=str(folder / "text"))


def test_a_dataset_by_folder(folder):
    datasets = pytest.importorskip("datasets", reason="needs the extra [train]")
    datasets.Dataset.from_dict({"body": [story(i) for i in range(7)] + [""]}).save_to_disk(folder / "set")
    index = prepare([str(folder / "set")], folder / "out", processes=1, vocab=320, validation=0.0, field="body")
    assert texts(folder / "out", "train") == [story(i) for i in range(7)]
    assert [problem for _, problem in index["skipped"]] == ["empty"]
    with pytest.raises(Refused, match="--field: expected a column of .*: body, got text"):
        prepare([str(folder / "set")], folder / "x")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocab": 10}, "prepare: --vocab: expected at least 300, got 10"),
        ({"validation": 1.0}, "prepare: --validation: expected a share from 0 to below 1, got 1.0"),
        ({"processes": 0}, "prepare: --processes: expected at least 1"),
        ({"max_bytes": 1 << 70}, "prepare: --max-bytes: expected at least 1, below 2"),
        ({"tokenizer_bytes": -5}, "prepare: --tokenizer-bytes: expected at least 1"),
        ({"seed": -1}, "prepare: --seed: expected at least 0, got -1"),
    ],
)
def test_wrong_arguments(folder, options, words):
    with pytest.raises(Refused, match=words):
        make(folder, **options)


def test_names_links_and_folders_that_are_odd(folder):
    """Nothing is lost without a word: names that are not UTF-8, links to folders, capital letters, the output in the input."""
    text = folder / "text"
    odd = os.fsencode(text) + b"/\xff.txt"
    with open(odd, "w") as file:
        file.write(story(100))
    (text / "lines.JSONL").write_text("\n".join(json.dumps({"text": story(101 + i)}) for i in range(3)))
    (text / "loop").symlink_to(".", target_is_directory=True)
    (text / "self").symlink_to("self")
    out = text / "o ü t"
    options = {"processes": 1, "vocab": 320, "validation": 0.0}
    index = prepare([str(text)], out, **options)
    assert sorted(texts(out, "train")) == sorted(story(i) for i in [*range(20), *range(100, 104)])
    problems = dict(map(tuple, index["skipped"]))
    assert problems["loop"].startswith("a link to a folder, not followed") and "self" in problems and len(problems) == 2
    assert prepare([str(text)], out, **options) == index  # goes on: what it wrote is no input
    with pytest.raises(Refused, match="prepare: --text: expected files, folders or datasets, got an empty name"):
        prepare([""], folder / "x")


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    walk = os.walk

    def broken(root, onerror=None):
        onerror(PermissionError(13, "Permission denied", str(folder / "text" / "sub")))
        for top, _, files in walk(root):
            if not top.endswith("sub"):
                yield top, [], files

    monkeypatch.setattr(module.os, "walk", broken)
    index = make(folder)
    assert index["skipped"] == [["sub", "a folder that cannot be listed"]]


def test_an_index_needs_a_document_to_train_on(folder, tmp_path):
    (tmp_path / "one.bin").write_bytes(bytes(range(256)))
    with pytest.raises(
        Refused, match=r"--text: expected at least one document to train on, got none; skipped one.bin: not UTF-8"
    ):
        prepare([str(tmp_path / "one.bin")], folder / "out", processes=1)
    with pytest.raises(Refused, match=r"got none; all are held out \(--validation\)"):
        prepare([str(folder / "text" / "00.txt")], folder / "other", processes=1, validation=0.9999)


def test_parquet(folder):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (folder / "rows").mkdir()
    table = arrow.table({"text": [*(story(i) for i in range(7)), None, ""]})
    parquet.write_table(table, folder / "rows" / "a.parquet", row_group_size=2)
    (folder / "rows" / "b.parquet").write_bytes(b"PAR1 broken")
    parquet.write_table(arrow.table({"body": ["x"]}), folder / "rows" / "c.parquet")
    index = prepare([str(folder / "rows")], folder / "out", processes=1, vocab=320, validation=0.0)
    assert texts(folder / "out", "train") == [story(i) for i in range(7)]
    problems = dict(map(tuple, index["skipped"]))
    assert problems["a.parquet:7"] == "'text' is no string" and problems["a.parquet:8"] == "empty"
    assert "ArrowInvalid" in problems["b.parquet"] and problems["c.parquet:0"] == "no field 'text'" and len(problems) == 4


def test_the_largest_number_of_a_token_counts(folder):
    """A tokenizer may leave numbers out: there are fewer tokens than the largest number says."""
    make(folder)
    for name, last in (("gap", 400), ("wide", 70000)):
        tokenizer = json.loads((folder / "out" / "tokenizer" / "tokenizer.json").read_text())
        key = max(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
        tokenizer["model"]["vocab"][key] = last
        (folder / name).mkdir()
        for file in (folder / "out" / "tokenizer").iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
        (folder / name / "tokenizer.json").write_text(json.dumps(tokenizer))
        index = make(folder, f"out {name}", tokenizer=str(folder / name))
        assert index["vocab"] == last + 1 and index["dtype"] == ("<u2" if last < 1 << 16 else "<u4")
        assert texts(folder / f"out {name}", "train") == texts(folder / "out", "train")
    (folder / "gap" / "tokenizer.json").write_bytes((folder / "out" / "tokenizer" / "tokenizer.json").read_bytes())
    with pytest.raises(Refused, match="--out: expected an empty folder, or one of the same inputs and settings"):
        make(folder, "out gap", tokenizer=str(folder / "gap"))


def test_a_disk_that_takes_no_more_is_one_line(folder, capsys, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(module.Path, "write_bytes", full)
    words = ["prepare", "--text", str(folder / "text"), "--out", str(folder / "out"), "--vocab", "320", "--processes", "1"]
    assert command.run(lambda: command.main(words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(": No space left on device")
    monkeypatch.undo()
    assert command.run(lambda: command.main(words)) == 0


def test_the_command(folder, capsys, monkeypatch):
    out = str(folder / "out")
    assert command.main(["prepare", "--text", str(folder / "text"), "--out", out, "--vocab", "320", "--processes", "1"]) == 0
    assert "train: " in capsys.readouterr().out
    (folder / "nothing").mkdir()
    monkeypatch.setattr(sys, "argv", ["x"])
    wrong = ["prepare", "--text", str(folder / "nothing"), "--out", str(folder / "new")]
    assert command.run(lambda: command.main(wrong)) == 2
    assert capsys.readouterr().err == f"prepare: --text: expected at least one file, got none in {folder / 'nothing'}\n"
