"""``python -m rat_ext.train prepare``: from text to tokens in memory-mapped shards.

The work is cut into parts of some MB of text. A process encodes a part and writes a shard for each split, then the part's
record, under temporary names that are renamed: a run that is killed goes on where it stood. Cuts, splits and shards depend on
the inputs and the settings only, not on the number of processes.

Files of the output folder:
    tokenizer/          what AutoTokenizer loads
    SPLIT-N.bin         tokens, uint16 or uint32, little-endian; each document ends with EOS
    SPLIT-N.npy         (documents, 2) int64: where each document ends in the shard, in tokens, and its bytes of text
    index.json          shards, sizes, settings, what was skipped, a hash of all inputs and settings; written last
"""

from __future__ import annotations

import concurrent.futures
import functools
import gzip
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ._extra import Refused, need, tqdm, write_json, write_whole, wrong

FORMAT = 1
EOS = "<|endoftext|>"
SPLITS = ("train", "validation")
BATCH = 1 << 20  # characters that are encoded at a time
PIECE = 1 << 20  # longer texts are encoded in pieces
SLICE = 1 << 24  # bytes of a file of lines, or of a dataset, that are read at a time
PART = (1 << 24, 1 << 28)  # bytes of text in a part: at least, at most
LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")


@dataclass(frozen=True)
class Settings:
    """What decides the tokens, besides the inputs."""

    tokenizer: str = "train"
    vocab: int = 8192
    field: str = "text"
    validation: float = 0.005  # share of the documents that are held out
    max_bytes: int = 1 << 28  # larger documents are skipped
    tokenizer_bytes: int = 1 << 29  # of text that a tokenizer is trained on
    seed: int = 0


@dataclass(frozen=True)
class Slice:
    """Text of a file, of lines that begin in a range of its bytes, of row groups of a Parquet file, or of rows of a dataset."""

    kind: str  # "file", "lines", "groups" or "rows"
    path: str
    name: str  # of the file, for people, for the split and for the hash
    start: int
    end: int


@dataclass(frozen=True)
class Document:
    """A text, or why there is none."""

    name: str
    text: str = ""
    problem: str = ""
    read: int = 0  # bytes of input that it took


# ---- inputs -------------------------------------------------------------------------------------------------------------


def list_files(paths: list[Path], out: Path | None = None) -> list[tuple[Path, str]]:
    """Every file (path, name), sorted by name. Names that begin with a dot inside a folder, and ``out``, are left out.

    Folders that cannot be listed and links to folders, which are not followed, come as if they were files: reading says why
    there is no text.
    """
    found = []
    for root in paths:
        if root.is_file():
            found.append((root, readable(root.name)))
            continue
        unread: list[OSError] = []
        for folder, folders, files in os.walk(root, onerror=unread.append):
            links = [name for name in folders if Path(folder, name).is_symlink()]
            folders[:] = [name for name in folders if not name.startswith(".") and not _same(Path(folder, name), out)]
            for path in (Path(folder, name) for name in [*files, *links] if not name.startswith(".")):
                found.append((path, readable(path.relative_to(root).as_posix())))
        for path in (Path(error.filename) for error in unread):
            found.append((path, readable(path.relative_to(root).as_posix())))
    return sorted(found, key=lambda item: (item[1], str(item[0])))


def readable(name: str) -> str:
    """A name with what is not UTF-8 in it spelled out, so that it can be hashed and written."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _same(path: Path, other: Path | None) -> bool:
    return other is not None and path.resolve() == other.resolve()


@functools.cache
def load_dataset(name: str) -> Any:
    """The rows of a dataset: a folder that save_to_disk wrote, or a name that load_dataset knows."""
    datasets = need("datasets", "train", "reading a dataset")
    if Path(name).is_dir():
        found = datasets.load_from_disk(name)
        if isinstance(found, datasets.DatasetDict):
            if "train" not in found:
                raise wrong("prepare", "--text", "a dataset with a split train", ", ".join(found))
            found = found["train"]
        return found
    try:
        return datasets.load_dataset(name, split="train")
    except Exception as error:
        raise wrong("prepare", "--text", f"files, folders or a dataset ({' '.join(str(error).split())})", name) from None


def is_dataset(name: str) -> bool:
    path = Path(name)
    return not path.exists() or any((path / file).is_file() for file in ("dataset_info.json", "dataset_dict.json"))


def plan(text: list[str], settings: Settings, out: Path | None = None) -> tuple[list[list[Slice]], str]:
    """The parts, and a hash of names, sizes and times of the inputs and of the settings. ``out`` is no input."""
    slices: list[Slice] = []
    state: list[object] = [FORMAT, asdict(settings)]
    if (file := Path(settings.tokenizer, "tokenizer.json")).is_file():
        state.append(hashlib.sha256(file.read_bytes()).hexdigest())
    files = []
    for name in text:
        if not name:
            raise wrong("prepare", "--text", "files, folders or datasets", "an empty name")
        if is_dataset(name):
            rows = load_dataset(name)
            if settings.field not in rows.column_names:
                raise wrong("prepare", "--field", f"a column of {name}: {', '.join(rows.column_names)}", settings.field)
            state.append((name, rows._fingerprint))
            step = max(1, SLICE // max(1, rows.data.nbytes // max(1, len(rows))))
            slices += [Slice("rows", name, name, i, min(i + step, len(rows))) for i in range(0, len(rows), step)]
        else:
            files.append(Path(name))
    listed = list_files(files, out)
    for path, name in listed:
        try:
            found = path.stat()
            size = 0 if path.is_dir() else found.st_size  # a folder's time changes with what is written into it
            state.append((name, size, 0 if path.is_dir() else found.st_mtime_ns))
        except OSError:
            size = 0  # reading says what is wrong
        if name.lower().endswith(".parquet"):
            slices += [Slice("groups", str(path), name, i, i + 1) for i in range(_groups(path))]
        elif name.lower().endswith((".jsonl", ".ndjson")):
            slices += [Slice("lines", str(path), name, i, min(i + SLICE, size)) for i in range(0, max(size, 1), SLICE)]
        else:
            slices.append(Slice("lines" if name.lower().endswith(LINES) else "file", str(path), name, 0, size))
    if not slices:
        raise wrong("prepare", "--text", "at least one file", f"none in {', '.join(text)}")
    total = sum(s.end - s.start for s in slices if s.kind in ("file", "lines"))
    limit = min(max(total // 256, PART[0]), PART[1])
    parts: list[list[Slice]] = [[]]
    size = 0
    for piece in slices:
        weight = piece.end - piece.start if piece.kind in ("file", "lines") else SLICE
        if parts[-1] and size + weight > limit:
            parts.append([])
            size = 0
        parts[-1].append(piece)
        size += weight
    return parts, hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _groups(path: Path) -> int:
    """How many groups of rows a Parquet file has; 1 where it cannot be read: reading says why."""
    parquet = need("pyarrow.parquet", "train", "reading Parquet")
    try:
        return parquet.read_metadata(path).num_row_groups if path.is_file() else 1
    except (OSError, ValueError):
        return 1


def documents(piece: Slice, settings: Settings) -> Iterator[Document]:
    """The documents of a slice, in order. What cannot be read comes as a problem; what follows it still comes."""
    if piece.kind == "rows":
        rows = load_dataset(piece.path)
        for i in range(piece.start, piece.end):
            yield check(f"{piece.name}:{i}", rows[i][settings.field], 1, settings)
        return
    if Path(piece.path).is_dir():
        link = Path(piece.path).is_symlink()
        problem = "a link to a folder, not followed: name it in --text" if link else "a folder that cannot be listed"
        yield Document(piece.name, problem=problem)
        return
    if Path(piece.path).exists() and not Path(piece.path).is_file():
        yield Document(piece.name, problem="no regular file")  # a pipe would wait for ever
        return
    try:
        yield from {"lines": _lines, "groups": _rows, "file": _file}[piece.kind](piece, settings)
    except (OSError, EOFError, zlib.error, ValueError) as error:  # gzip raises the first three, Arrow the last
        yield Document(piece.name, problem=f"{type(error).__name__}: {' '.join(str(error).split())}")


def _open(piece: Slice):
    return gzip.open(piece.path, "rb") if piece.path.lower().endswith(".gz") else open(piece.path, "rb")


def _file(piece: Slice, settings: Settings) -> Iterator[Document]:
    with _open(piece) as file:
        # In steps: a read takes the memory that it is allowed to fill, before it knows how much there is.
        data = bytearray()
        while len(data) <= settings.max_bytes and (part := file.read(min(settings.max_bytes + 1 - len(data), SLICE))):
            data += part
    if len(data) > settings.max_bytes:
        yield Document(piece.name, problem=f"more than {settings.max_bytes} bytes (--max-bytes)", read=piece.end)
        return
    try:
        yield check(piece.name, data.decode(), piece.end, settings)
    except UnicodeDecodeError as error:
        yield Document(piece.name, problem=f"not UTF-8: byte {error.start} ({error.reason})", read=piece.end)


def _lines(piece: Slice, settings: Settings) -> Iterator[Document]:
    """Lines that begin in [start, end): the slices of a file share no line and leave none out."""
    whole = piece.path.lower().endswith(".gz")
    with _open(piece) as file:
        place = piece.start
        if place:
            file.seek(place - 1)
            place += _rest_of_line(file) - 1
        while whole or place < piece.end:
            line = file.readline(settings.max_bytes + 1)
            if not line:
                return
            name, size = f"{piece.name}:{place}", len(line)
            if size > settings.max_bytes and not line.endswith(b"\n"):
                size += _rest_of_line(file)
                yield Document(name, problem=f"more than {settings.max_bytes} bytes (--max-bytes)", read=size)
            elif line.strip():
                yield _line(name, line, 0 if whole else size, settings)
            place += size


def _rows(piece: Slice, settings: Settings) -> Iterator[Document]:
    """Rows of groups of a Parquet file."""
    file = need("pyarrow.parquet", "train", "reading Parquet").ParquetFile(piece.path)
    if settings.field not in file.schema_arrow.names:
        yield Document(f"{piece.name}:{piece.start}", problem=f"no field {settings.field!r}")
        return
    row = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
    for batch in file.iter_batches(1024, row_groups=list(range(piece.start, piece.end)), columns=[settings.field]):
        for value in batch.column(0):
            yield check(f"{piece.name}:{row}", value.as_py(), 0, settings)
            row += 1


def _rest_of_line(file) -> int:
    """Reads to the end of the line. Its bytes."""
    size = 0
    while part := file.readline(1 << 20):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def _line(name: str, line: bytes, size: int, settings: Settings) -> Document:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        return Document(name, problem=f"not JSON: {' '.join(str(error).split())}", read=size)
    if not isinstance(found, dict) or settings.field not in found:
        return Document(name, problem=f"no field {settings.field!r}", read=size)
    return check(name, found[settings.field], size, settings)


def check(name: str, text: object, size: int, settings: Settings) -> Document:
    """A document of ``text``, or the problem that it has."""
    if not isinstance(text, str):
        return Document(name, problem=f"{settings.field!r} is no string", read=size)
    if not text.strip():
        return Document(name, problem="empty", read=size)
    try:
        if len(text.encode()) > settings.max_bytes:
            return Document(name, problem=f"more than {settings.max_bytes} bytes (--max-bytes)", read=size)
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can hold
        return Document(name, problem=f"not UTF-8: character {error.start} ({error.reason})", read=size)
    return Document(name, text, read=size)


def split_of(name: str, settings: Settings) -> str:
    """The split that a document belongs to, by its name and the seed alone."""
    draw = int.from_bytes(hashlib.blake2b(f"{settings.seed}:{name}".encode(), digest_size=8).digest(), "big") / 2**64
    return SPLITS[draw < settings.validation]


# ---- the tokenizer ------------------------------------------------------------------------------------------------------


def train_tokenizer(parts: list[list[Slice]], settings: Settings, folder: Path) -> None:
    """Byte-level BPE of the training documents. Part by part in an order drawn from the seed, up to a limit of text."""
    tokenizers = need("tokenizers", "train", "prepare")
    order = np.random.default_rng(settings.seed).permutation(len(parts))
    total = min(settings.tokenizer_bytes, sum(piece.end - piece.start for part in parts for piece in part))

    def text() -> Iterator[str]:
        with tqdm()(total=total, desc="tokenizer", unit="B", unit_scale=True, disable=None, leave=False) as bar:
            seen = 0
            for number in order:
                for piece in parts[number]:
                    for document in documents(piece, settings):
                        bar.update(document.read)
                        if document.text and split_of(document.name, settings) == "train":
                            seen += len(document.text)
                            yield document.text
                            if seen >= settings.tokenizer_bytes:
                                return

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=settings.vocab, special_tokens=[EOS], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(text(), trainer)
    fast = need("transformers", "train", "prepare").PreTrainedTokenizerFast
    wrapped = fast(tokenizer_object=tokenizer, eos_token=EOS, bos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False)
    wrapped.save_pretrained(folder)


def make_tokenizer(parts: list[list[Slice]], settings: Settings, folder: Path) -> None:
    """Fills ``folder`` with a tokenizer that has an EOS: a new one, or a copy of one by name."""
    if settings.tokenizer == "train":
        train_tokenizer(parts, settings, folder)
        return
    transformers = need("transformers", "train", "prepare")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(settings.tokenizer)
    except Exception as error:
        why = f"train, a folder or a name ({str(error).splitlines()[0]})"
        raise wrong("prepare", "--tokenizer", why, settings.tokenizer) from None
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise wrong("prepare", "--tokenizer", "one of the library tokenizers, with an EOS token", settings.tokenizer)
    tokenizer.save_pretrained(folder)


def cut(text: str) -> Iterator[str]:
    """Pieces of a long text. A piece begins before a single space between words, where a token of byte-level BPE begins."""
    start = 0
    while len(text) - start > PIECE:
        found = re.search(r"[^\W_](?= [^\W_])", text[start + PIECE - 4096 : start + PIECE])
        end = start + PIECE - 4096 + found.end() if found else start + PIECE
        yield text[start:end]
        start = end
    yield text[start:]


class Encoder:
    """A tokenizer of a folder that treats every text as plain text, special tokens that it may spell included."""

    def __init__(self, folder: Path):
        tokenizers = need("tokenizers", "train", "prepare")
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        eos = config["eos_token"]
        self.eos = self.tokenizer.token_to_id(eos["content"] if isinstance(eos, dict) else eos)
        self.vocab = max(self.tokenizer.get_vocab().values()) + 1  # numbers may be left out: it is not how many there are
        self.dtype = np.dtype("<u2" if self.vocab <= 1 << 16 else "<u4")

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Tokens of each text, EOS at its end."""
        pieces = [list(cut(text)) for text in texts]
        found = iter(self.tokenizer.encode_batch_fast([piece for parts in pieces for piece in parts], add_special_tokens=False))
        result = []
        for parts in pieces:
            arrays = [np.array(next(found).ids, dtype=self.dtype) for _ in parts]
            result.append(np.concatenate([*arrays, np.array([self.eos], dtype=self.dtype)]))
        return result


# ---- a part -------------------------------------------------------------------------------------------------------------

_seen: Any = None  # bytes of input that the processes have read, shared with the one that shows the bar


def start_worker(seen: Any) -> None:
    """Of a process of the pool: one thread each."""
    global _seen
    _seen = seen
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def encode_part(out: Path, number: int, part: list[Slice], settings: Settings) -> None:
    """Writes the shards of a part, then its record."""
    encoder = Encoder(out / "tokenizer")
    tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    ends: dict[str, list[tuple[int, int]]] = {split: [] for split in SPLITS}
    skipped: list[tuple[str, str]] = []
    content = hashlib.sha256()
    waiting: list[Document] = []

    def flush() -> None:
        texts = [document.text for document in waiting]
        for document, array in zip(waiting, encoder.encode(texts), strict=True):
            split, data = split_of(document.name, settings), document.text.encode()
            content.update(document.name.encode() + b"\0" + len(data).to_bytes(8, "little") + data)
            tokens[split].append(array)
            ends[split].append((len(array) + (ends[split][-1][0] if ends[split] else 0), len(data)))
        waiting.clear()

    size = 0
    for piece in part:
        for document in documents(piece, settings):
            if _seen is not None and document.read:
                with _seen.get_lock():
                    _seen.value += document.read
            if document.problem:
                skipped.append((document.name, document.problem))
                continue
            waiting.append(document)
            size += len(document.text)
            if size >= BATCH:
                flush()
                size = 0
    flush()
    shards = []
    for split in SPLITS:
        if tokens[split]:
            name, array, table = f"{split}-{number:05d}", np.concatenate(tokens[split]), np.array(ends[split], dtype=np.int64)
            write_whole(out / f"{name}.bin", functools.partial(Path.write_bytes, data=array.data))
            write_whole(out / f"{name}.npy", functools.partial(np.save, arr=table))
            shards.append(
                {"split": split, "file": name, "tokens": len(array), "documents": len(table), "bytes": int(table[:, 1].sum())}
            )
    write_json(out / f"part-{number:05d}.json", {"shards": shards, "skipped": skipped, "content": content.hexdigest()})


# ---- the command --------------------------------------------------------------------------------------------------------


def prepare(text: list[str], out: str | Path, *, processes: int | None = None, overwrite: bool = False, **options: Any) -> dict:
    """Tokenizes ``text`` (files, folders, datasets) into ``out``. Returns the index. What ``out`` holds is not done again.

    Args:
        text: files, folders, or datasets by folder or name. A .jsonl file has a document per line, a
            .parquet file one per row, another file is a document; .gz is read.
        out: folder to fill.
        processes: how many encode at a time. None: one per core.
        overwrite: empty ``out`` first where it holds something else.
        options: fields of :class:`Settings`.
    """
    settings, out = Settings(**options), Path(out)
    if not 300 <= settings.vocab <= 1 << 31:
        raise wrong("prepare", "--vocab", "at least 300", settings.vocab)
    if not 0 <= settings.validation < 1:
        raise wrong("prepare", "--validation", "a share from 0 to below 1", settings.validation)
    counts = {"max-bytes": settings.max_bytes, "tokenizer-bytes": settings.tokenizer_bytes, "processes": processes}
    for name, value in counts.items():
        if value is not None and not 1 <= value < 1 << 62:
            raise wrong("prepare", f"--{name}", "at least 1, below 2^62", value)
    if settings.seed < 0:
        raise wrong("prepare", "--seed", "at least 0", settings.seed)
    parts, plan_hash = plan(text, settings, out)
    _claim(out, plan_hash, overwrite)
    index_file, folder = out / "index.json", out / "tokenizer"
    if index_file.exists():
        print(f"{out} is complete: nothing to do")
        return json.loads(index_file.read_text())
    if not folder.exists():
        temporary = out / f".tokenizer.{os.getpid()}.tmp"
        make_tokenizer(parts, settings, temporary)
        temporary.rename(folder)
    missing = [i for i in range(len(parts)) if not (out / f"part-{i:05d}.json").exists()]
    _encode(out, parts, missing, settings, processes or len(os.sched_getaffinity(0)))
    return _finish(out, len(parts), settings, plan_hash)


def _claim(out: Path, plan_hash: str, overwrite: bool) -> None:
    """Makes ``out`` the folder of this plan, or says what stands in the way."""
    marker = out / "plan.txt"
    if out.is_dir() and any(out.iterdir()) and (not marker.exists() or marker.read_text() != plan_hash):
        if not overwrite:
            raise wrong("prepare", "--out", "an empty folder, or one of the same inputs and settings (or --overwrite)", out)
        if not marker.exists():
            raise wrong("prepare", "--out", "a folder that prepare has made, to overwrite", out)
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for left in out.glob(".*.tmp*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        write_whole(marker, lambda path: path.write_text(plan_hash))
    except OSError as error:
        raise wrong("prepare", "--out", "a folder that can be written", f"{out}: {error.strerror}") from None


def _encode(out: Path, parts: list[list[Slice]], missing: list[int], settings: Settings, processes: int) -> None:
    global _seen
    total = sum(piece.end - piece.start for i in missing for piece in parts[i])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    _seen = context.Value("q", 0)
    processes = min(processes, len(missing))
    with tqdm()(total=total, desc="encode", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        if processes <= 1:
            before = os.environ.get("TOKENIZERS_PARALLELISM")
            start_worker(_seen)
            for i, number in enumerate(missing, 1):
                encode_part(out, number, parts[number], settings)
                bar.n = _seen.value
                bar.set_postfix_str(f"part {i} of {len(missing)}")
            del os.environ["TOKENIZERS_PARALLELISM"]
            os.environ |= {} if before is None else {"TOKENIZERS_PARALLELISM": before}
            return
        pool = concurrent.futures.ProcessPoolExecutor(
            processes, mp_context=context, initializer=start_worker, initargs=(_seen,)
        )
        with pool:
            waiting = {pool.submit(encode_part, out, number, parts[number], settings) for number in missing}
            try:
                while waiting:
                    done, waiting = concurrent.futures.wait(waiting, 0.2, concurrent.futures.FIRST_COMPLETED)
                    for future in done:
                        future.result()
                    bar.n = _seen.value
                    bar.set_postfix_str(f"part {len(missing) - len(waiting)} of {len(missing)}")
            except concurrent.futures.process.BrokenProcessPool:
                raise Refused("prepare: a process was killed (out of memory?): the same command goes on from here") from None
            finally:
                pool.shutdown(cancel_futures=True)


def _finish(out: Path, parts: int, settings: Settings, plan_hash: str) -> dict:
    """The index of all parts, which makes the folder complete."""
    records = [json.loads((out / f"part-{i:05d}.json").read_text()) for i in range(parts)]
    encoder = Encoder(out / "tokenizer")
    shards = [shard for record in records for shard in record["shards"]]
    skipped = [item for record in records for item in record["skipped"]]
    if not any(shard["split"] == "train" for shard in shards):
        first = f"; skipped {skipped[0][0]}: {skipped[0][1]}" if skipped else "; all are held out (--validation)"
        raise wrong("prepare", "--text", "at least one document to train on", f"none{first}")
    content = [record["content"] for record in records]
    tokenizer = hashlib.sha256((out / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    identity = json.dumps([FORMAT, asdict(settings), tokenizer, content])
    index: dict = {
        "format": FORMAT,
        "hash": hashlib.sha256(identity.encode()).hexdigest(),
        "plan": plan_hash,
        "settings": asdict(settings),
        "dtype": encoder.dtype.str,
        "vocab": encoder.vocab,
        "eos": encoder.eos,
        "splits": {
            split: {
                key: sum(shard[key] for shard in shards if shard["split"] == split) for key in ("documents", "tokens", "bytes")
            }
            for split in SPLITS
        },
        "shards": shards,
        "skipped": skipped,
    }
    write_json(out / "index.json", index)
    for split, sizes in index["splits"].items():
        print(f"{split}: {sizes['documents']:,} documents, {sizes['bytes']:,} bytes, {sizes['tokens']:,} tokens")
    for name, problem in index["skipped"][:20]:
        print(f"skipped {name}: {problem}", file=sys.stderr)
    if len(index["skipped"]) > 20:
        print(f"skipped {len(index['skipped']) - 20} more: see {out / 'index.json'}", file=sys.stderr)
    return index
