"""The documents of the tasks in this folder, made here from seeds or read from local files, and how answers are scored.

lm-eval calls the functions that the YAML files name with the run's metadata: the model's arguments, and what
``python -m rat_ext.evaluate`` or ``lm_eval --metadata`` adds to them.
"""

from __future__ import annotations

import collections
import functools
import json
import random
import re
import string
from pathlib import Path
from typing import Any

from rat_ext.train._extra import Refused, one_line, wrong

LENGTHS = (512, 1024, 2048, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PAIRS = (4, 8, 16, 32, 64, 128, 256)

WHO = "The gardener,The pilot,A teacher,The old sailor,My neighbour,The clockmaker,A young doctor,The night porter,The baker"
DID = "watched,repaired,described,counted,painted,carried home,photographed,wrote about,looked for,remembered"
WHAT = "the wooden bridge,a row of lamps,the small harbour,an empty theatre,the north window,a basket of pears,two maps"
WHEN = "before the rain came,in early spring,after a long winter,on market day,while the bells rang,late in the evening"
NAMES = "amber basil cedar delta ember fjord grove heron indigo juniper kestrel laurel maple nectar onyx poplar raven".split()


def _dataset(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import datasets

    return {"test": datasets.Dataset.from_list(rows)}


# ---- bits per byte ------------------------------------------------------------------------------------------------------


def held_out(text: list[str] | str | None = None, field: str = "text", **metadata: Any) -> dict[str, Any]:
    """Documents of files and folders ``text``; without any, of the text that is shipped beside this file."""
    from rat_ext.train.prepare import Settings, documents, plan

    paths = [text] if isinstance(text, str) else list(text or [str(Path(__file__).parent / "held_out.jsonl")])
    settings = Settings(field=field)
    parts, _ = plan(paths, settings)
    found = [document for part in parts for piece in part for document in documents(piece, settings)]
    rows = [{"text": document.text, "name": document.name} for document in found if document.text]
    if not rows:
        problems = "; ".join(f"{document.name}: {document.problem}" for document in found[:3])
        raise Refused(f"rat_bits_per_byte: text: expected at least one document, got none ({problems})")
    return _dataset(rows)


# ---- needle in a haystack -----------------------------------------------------------------------------------------------


@functools.cache
def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise wrong("rat_needle", "tokenizer", "a folder or name of one", f"{name} ({one_line(error)})") from None


def _count(metadata: dict[str, Any]) -> Any:
    """A function that gives the tokens of texts, by the tokenizer of the model that is evaluated."""
    name = metadata.get("tokenizer") or metadata.get("pretrained")
    if not isinstance(name, str):
        raise Refused("rat_needle: metadata: expected tokenizer or pretrained, a folder or name, got neither")
    tokenizer = _tokenizer(name)
    return lambda texts: [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]


def _at_least(task: str, **counts: Any) -> None:
    for name, values in counts.items():
        if not values or min(map(int, values)) < 1:
            raise wrong(task, name, "at least 1", values)


def _sentence(draw: random.Random) -> str:
    return " ".join(draw.choice(part.split(",")) for part in (WHO, DID, WHAT, WHEN)) + "."


def _needle(key: str, value: int) -> str:
    return f"The pass number of {key} is {value}."


def _haystack(draw: random.Random, count: Any, length: int, depth: float, keys: int) -> dict[str, Any]:
    """A prompt of at most ``length`` tokens that asks for the first of ``keys`` needles, which stands at ``depth``."""
    names = draw.sample([f"{a} {b}" for a in NAMES for b in NAMES if a != b], keys)
    needles = [_needle(name, draw.randrange(10000, 100000)) for name in names]
    question = f"\nThe pass number of {names[0]} is"
    room = length - 16 - sum(count([" " + needle for needle in needles])) - count([question])[0]
    if room < 0:
        raise wrong("rat_needle", "lengths", f"at least {length - room} tokens, for needles and the question", length)
    sentences: list[str] = []
    while room > 0:
        more = [_sentence(draw) for _ in range(64)]
        for sentence, size in zip(more, count([" " + sentence for sentence in more]), strict=True):
            room -= size
            if room <= 0:
                break
            sentences.append(sentence)
    for needle in needles[1:]:
        sentences.insert(draw.randint(0, len(sentences)), needle)
    sentences.insert(round(depth * len(sentences)), needles[0])
    answer = needles[0].rstrip(".").rpartition(" ")[2]
    return {"prompt": " ".join(sentences) + question, "answer": answer, "length": length, "depth": depth, "keys": keys}


def _needles(
    keys: int, lengths: Any = LENGTHS, depths: Any = DEPTHS, samples: int = 4, seed: int = 0, **metadata: Any
) -> dict[str, Any]:
    _at_least("rat_needle", samples=[samples])
    if not all(0 <= float(depth) <= 1 for depth in depths):
        raise wrong("rat_needle", "depths", "numbers from 0 to 1", depths)
    count, draw = _count(metadata), random.Random(seed)
    kinds = [(int(n), float(depth)) for n in dict.fromkeys(lengths) for depth in dict.fromkeys(depths)]
    return _dataset([_haystack(draw, count, n, depth, keys) for n, depth in kinds for _ in range(samples)])


def needle(**metadata: Any) -> dict[str, Any]:
    """One key and its value in filler sentences. Metadata: lengths (tokens), depths (0 to 1), samples of each, seed."""
    return _needles(1, **metadata)


def needle_keys(**metadata: Any) -> dict[str, Any]:
    """Eight keys with values; one is asked for."""
    return _needles(8, **metadata)


def found(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the first number that was written is the value."""
    number = re.search(r"\d+", results[0])
    return {"found": float(number is not None and number.group() == doc["answer"])}


# ---- associative recall -------------------------------------------------------------------------------------------------


def recall(pairs: Any = PAIRS, samples: int = 8, queries: int = 4, seed: int = 0, **metadata: Any) -> dict[str, Any]:
    """Key-value pairs, then keys one after the other, each with its value: is the value of the last key the likeliest?

    Metadata: pairs (how many there are), samples of each, queries in a sample, seed.
    """
    _at_least("rat_recall", samples=[samples], pairs=pairs, queries=[queries])
    if max(map(int, pairs)) > 10000:
        raise wrong("rat_recall", "pairs", "at most 10000: a key has three letters", max(pairs))
    draw, rows = random.Random(seed), []
    for n in dict.fromkeys(pairs):
        for _ in range(samples):
            keys: dict[str, int] = {}
            while len(keys) < int(n):
                keys["".join(draw.choices(string.ascii_lowercase, k=3))] = draw.randrange(100, 1000)
            text = "".join(f"{key} = {value}\n" for key, value in keys.items()) + "\n"
            for key in draw.sample(list(keys), min(queries, int(n))):
                rows.append({"prompt": f"{text}{key} =", "answer": f" {keys[key]}", "pairs": int(n)})
                text += f"{key} = {keys[key]}\n"
    return _dataset(rows)


# ---- prompts of local files ---------------------------------------------------------------------------------------------


def prompts(prompts: list[str] | str = (), template: str | None = None, **metadata: Any) -> dict[str, Any]:  # type: ignore[assignment]
    """Lines of JSON files as LongBench (context, input, answers, dataset) and RULER (input, outputs) have them.

    Metadata: prompts (files), template (with {context} and {input}; default: both, with an empty line between).
    """
    if template is not None and "{input}" not in template:
        raise wrong("rat_prompts", "template", "a text with {input}, and {context} where there is one", repr(template))
    rows = []
    for name in [prompts] if isinstance(prompts, str) else prompts:
        try:
            # Not splitlines: a string of JSON may hold other characters that end a line.
            lines = Path(name).read_bytes().split(b"\n")
        except OSError as error:
            raise wrong("rat_prompts", "prompts", "files that can be read", f"{name}: {error.strerror}") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(_prompt(line, f"{name}:{number}", template, Path(name).stem))
    if not rows:
        raise Refused("rat_prompts: prompts: expected files with lines of prompts, got none")
    return _dataset(rows)


def _prompt(line: bytes, place: str, template: str | None, dataset: str) -> dict[str, Any]:
    """The document of a line."""
    try:
        item = json.loads(line)
        context, question, prefix = item.get("context") or "", item["input"], item.get("answer_prefix") or ""
        answers = next(item[key] for key in ("answers", "outputs", "answer") if key in item)
        answers = answers if isinstance(answers, list) else [answers]
        length = int(item.get("length") or 0)
    except (ValueError, KeyError, AttributeError, TypeError, StopIteration, RecursionError):
        answers = []
    if not answers or not all(isinstance(answer, (str, int, float)) and str(answer) for answer in answers):
        text = line[:60].decode(errors="replace")
        raise wrong("rat_prompts", place, "an object with input and answers or outputs", repr(text))
    if not all(isinstance(part, str) for part in (context, question, prefix)):
        raise wrong("rat_prompts", place, "strings: context, input, answer_prefix", repr(line[:60].decode(errors="replace")))
    if template is not None:
        text = question.join(part.replace("{context}", context) for part in template.split("{input}"))
    else:
        text = f"{context}\n\n{question}" if context else question
    return {
        "prompt": text + prefix,
        "answers": [str(answer) for answer in answers],
        "dataset": str(item.get("dataset") or item.get("task") or dataset),
        "length": length,
    }


def _words(text: str) -> list[str]:
    text = re.sub(r"\b(a|an|the)\b", " ", text.lower())
    return "".join(" " if letter in string.punctuation else letter for letter in text).split()


def answered(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """``match``: share of the answers that the text contains, as RULER counts; ``f1``: of words, of the best answer."""
    text = results[0]
    scores = []
    for answer in doc["answers"]:
        mine, theirs = _words(text), _words(answer)
        same = sum((collections.Counter(mine) & collections.Counter(theirs)).values())
        scores.append(2 * same / (len(mine) + len(theirs)) if same else 0.0)
    match = sum(answer.lower() in text.lower() for answer in doc["answers"]) / max(len(doc["answers"]), 1)
    return {"match": match, "f1": max(scores, default=0.0)}
