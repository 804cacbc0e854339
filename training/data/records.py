"""From files to records, each with the place it came from.

A record is whatever one row of the file holds; `examples.py` judges it. Every record keeps its file, row and
(for text formats) line, because an error that cannot be found in an editor is not worth printing. Text is read
row by row, so that a file may be larger than memory, and its rows may not: what never ends (a stream of spaces in a
small .gz, a list in a list in a list …) is refused after MAX_ROW_BYTES.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from exo_fast.training.errors import InputError
from exo_fast.training.paths import is_plain_name, user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from exo_fast.training.data.registry import RawDataset

FILE_SUFFIXES = (".json", ".jsonl", ".parquet", ".json.gz", ".jsonl.gz")
SPLIT_NAMES = {
    "train": ("train",),
    "eval": ("test", "validation", "eval"),
    "test": ("test", "validation", "eval"),
}
JSON_SPACE = " \t\n\r"
DATASET_NAME = r"[A-Za-z0-9_.-]+/[A-Za-z0-9_-]+"
MAX_ROW_BYTES = 64 * 2**20  # 16 million tokens
MAX_NESTING = 100  # lists and objects in one another; Python's own functions stop at less than a thousand
MAX_ROWS = 2**28  # of a file that says how many it has: their objects alone would be 100 GB
BLOCK_BYTES = 2**20
ROWS_PER_BATCH = 1024


@dataclass(frozen=True)
class Place:
    """Where a record stands: `row` counts records from 0, `line` counts text lines from 1 (None in binary formats)."""

    file: str
    row: int
    line: int | None = None

    def __str__(self) -> str:
        return (
            f"{self.file}, row {self.row}" if self.line is None else f"{self.file}, line {self.line} (row {self.row})"
        )


@dataclass(frozen=True)
class Source:
    """One split's data: a file, the `shards` of one in a directory, a saved Hugging Face dataset (`dataset_split` names
    one in a DatasetDict), or a dataset of the registry (`raw`, of which `dataset_split` is "train" or "test")."""

    path: Path
    dataset_split: str | None = None
    raw: RawDataset | None = field(default=None, compare=False)
    shards: tuple[Path, ...] = ()

    @property
    def files(self) -> list[Path]:
        """The files that are read."""
        path = self.path.expanduser()
        folder = path.is_dir() and not self.shards
        return sorted(file for file in path.rglob("*") if file.is_file()) if folder else list(self.shards or [path])

    def __str__(self) -> str:
        name = str(self.path) if self.raw is None else str(self.raw)
        return name if self.dataset_split is None else f"{name}[{self.dataset_split}]"


def find_source(path: str | Path, split: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Source | None:
    """The data of `split` ("train", or "test", also called "eval") under `path`; None when there is no such split.

    `path` is a file (.json, .jsonl, either with .gz, .parquet), a directory written by `Dataset.save_to_disk`, a
    directory with one file per split: train.* and test.* (or validation.*, eval.*), or its shards as Hub downloads have
    them (train-00000-of-00002.parquet, there or in data/), or "NAME/KIND:PATH", a dataset of the registry ("NAME/KIND"
    for one that needs no path; what is there as a path counts as a path). Those that cut text by tokens use
    `tokenizer`, or the one that read_records is given. Raises InputError for a path that is missing, of another kind,
    ambiguous or without some of its shards, and for a dataset that the registry does not have.
    """
    text = str(path)
    path = user_path(path)
    hint = ""
    if not path.exists() and (named := split_name(text)) is not None:
        from exo_fast.training.data.registry import known_names, nearest, open_dataset

        hint = nearest(named[0])
        if named[1] is not None or named[0] in known_names():
            dataset = open_dataset(*named, tokenizer=tokenizer)
            name = "train" if split == "train" else "test"
            return Source(dataset.path or Path(text), name, dataset) if name in dataset.splits() else None
    names = SPLIT_NAMES[split]
    if path.is_file():
        if not path.name.endswith(FILE_SUFFIXES):
            raise InputError(f"{path}: unknown kind of file; one of {', '.join(FILE_SUFFIXES)} is needed.")
        return Source(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such file or directory{hint}.")
    if (path / "dataset_dict.json").is_file():
        available = _saved_names(path / "dataset_dict.json", "splits")
        return next((Source(path, name) for name in names if name in available), None)
    if (path / "state.json").is_file():
        return Source(path) if split == "train" else None
    for name in names:
        found = [Source(file) for suffix in FILE_SUFFIXES if (file := path / f"{name}{suffix}").is_file()]
        found += [
            Source(path, shards=shards)
            for suffix in FILE_SUFFIXES
            for folder in (path, path / "data")
            if (shards := _shards(folder, name, suffix))
        ]
        if len(found) > 1:
            both = [(source.shards or (source.path,))[0] for source in found[:2]]
            names = " and ".join(str(file.relative_to(path)) for file in both)
            raise InputError(f"{path}: both {names} are there; name the one to use.")
        if found:
            return found[0]
    return None


def _shards(folder: Path, name: str, suffix: str) -> tuple[Path, ...]:
    """The parts of one split, in order. Raises InputError where some are missing."""
    form = re.compile(rf"{name}-(\d{{5}})-of-(\d{{5}}){re.escape(suffix)}")
    found = {file: match for file in folder.glob(f"{name}-*{suffix}") if (match := form.fullmatch(file.name))}
    files = sorted(found, key=lambda file: int(found[file][1]))
    numbers, totals = [int(found[file][1]) for file in files], {int(match[2]) for match in found.values()}
    if files and (len(totals) > 1 or numbers != list(range(max(totals)))):
        raise InputError(
            f"{folder}: {len(files)} parts of {name} are there, of {' or '.join(map(str, sorted(totals)))} "
            f"({', '.join(file.name for file in files[:3])}{', …' * (len(files) > 3)}); fetch those that are missing."
        )
    return tuple(files)


def split_name(text: str) -> tuple[str, str | None] | None:
    """("NAME/KIND", PATH) of "NAME/KIND:PATH", with None for the PATH of "NAME/KIND"; None for any other text."""
    found = re.fullmatch(rf"({DATASET_NAME})(?::(.*))?", text)
    return (found[1], found[2]) if found else None


def read_records(source: Source, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[tuple[Place, Any]]:
    """Every record of the source with its place, in order. `tokenizer` is for datasets of the registry that cut text
    by tokens. Raises InputError where the file cannot be read or parsed."""
    if source.raw is not None:
        source.raw.tokenizer = source.raw.tokenizer or tokenizer
        yield from source.raw.records(source.dataset_split)
        return
    for place, row in read_rows(source):
        if isinstance(row, JsonLine):
            try:
                row = row.decoded()
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{place.file}, line {place.line}: not valid JSON: {error.msg}. The file must hold one JSON list, "
                    "or one object on each line (JSONL)."
                ) from error
        yield place, row


class JsonLine(str):
    """A line of a JSONL file, not yet decoded: so that one that cannot be does not hide the next."""

    def decoded(self) -> Any:
        """Its value. Raises JSONDecodeError as decode_json does."""
        start = len(self) - len(self.lstrip(JSON_SPACE))
        value, end = decode_json(self, start)
        if rest := self[end:].strip(JSON_SPACE):
            raise json.JSONDecodeError("Extra data", self, self.index(rest, end))
        return value


def read_rows(source: Source) -> Iterator[tuple[Place, Any]]:
    """As read_records, for files and saved datasets; lines of JSONL come undecoded, as JsonLine."""
    if source.path.is_dir() and not source.shards:
        yield from _read_saved_dataset(source)
        return
    for path in source.shards or (source.path,):
        yield from _read_parquet(path) if path.suffix == ".parquet" else _read_json(path)


# JSON

LONGEST_TOKEN = 16  # more than -Infinity or an escape: an error so near to the end may be for want of the rest
_BLANK = re.compile(f"[{JSON_SPACE}]*")
_DECODER = json.JSONDecoder()
# Halves of surrogate pairs; and what is none: an escaped backslash, and both halves of one.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_WHOLE = re.compile(r"\\\\|\\u[dD][89aAbB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")


def decode_json(text: str, position: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at `position`, and where it ends.

    Raises JSONDecodeError, also for what `json` accepts or fails on otherwise and nothing after it could use: half a
    surrogate pair, which is no text; nesting beyond MAX_NESTING; a whole number of more digits than Python converts.
    """
    try:
        value, end = _DECODER.raw_decode(text, position)
    except RecursionError as error:
        raise json.JSONDecodeError(f"nested deeper than {MAX_NESTING} levels", text, position) from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise json.JSONDecodeError("a number of thousands of digits", text, position) from error
    # Counting brackets costs little, and few rows have so many.
    if text.count("[", position, end) + text.count("{", position, end) > MAX_NESTING and _is_deep(value):
        raise json.JSONDecodeError(f"nested deeper than {MAX_NESTING} levels", text, position)
    if _HALF.search(text, position, end) and _HALF.search(_WHOLE.sub(" ", text[position:end])):
        raise json.JSONDecodeError("half a surrogate pair, which is no character", text, position)
    return value, end


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_NESTING):
        inside = (item for v in level for item in (v.values() if isinstance(v, dict) else v))
        level = [item for item in inside if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def read_json(path: Path) -> Any:
    """The value of a small JSON file. Raises InputError for one that is none, or of more than MAX_ROW_BYTES."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_ROW_BYTES + 1)
        if len(content) > MAX_ROW_BYTES:
            raise InputError(f"{path}: more than {MAX_ROW_BYTES >> 20} MiB, which is not what such a file holds.")
        return JsonLine(content.decode("utf-8-sig")).decoded()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path, content.count(b"\n", 0, error.start) + 1, error.start) from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}.") from error


def _read_json(path: Path) -> Iterator[tuple[Place, Any]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            blocks = (file.read(BLOCK_BYTES) for _ in range(MAX_ROW_BYTES // BLOCK_BYTES))
            stripped = (block.removeprefix(codecs.BOM_UTF8).lstrip(JSON_SPACE.encode()) for block in blocks)
            is_list = next(filter(None, stripped), b"").startswith(b"[")
            file.seek(0)
            yield from _read_json_list(path, file) if is_list else _read_json_lines(path, file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not a readable gzip file: {error}; fetch it again.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error


def _read_json_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[Place, JsonLine]]:
    row, start, number = 0, 0, 0
    # Not text.splitlines(): it also cuts at characters, such as U+2028, that may stand inside a JSON string.
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise _too_long(path, number)
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, number, start + error.start) from error
        start += len(line)
        if text.strip():
            yield Place(str(path), row, number), JsonLine(text.rstrip("\r\n"))
            row += 1


def _read_json_list(path: Path, file: IO[bytes]) -> Iterator[tuple[Place, Any]]:
    text = _Text(path, file)
    text.position = text.skip_space() + 1  # the [
    row = 0
    while text.at(text.skip_space()) != "]":
        line, record = text.value(f"row {row}")
        yield Place(str(path), row, line), record
        row += 1
        if (mark := text.at(text.skip_space())) == ",":
            text.position += 1
        elif mark != "]":
            raise text.fail(f"not valid JSON: a comma or ] is needed after row {row - 1}")
    text.position += 1
    if text.at(text.skip_space()):
        raise text.fail("text after the list's closing ]; one JSON list is needed")


class _Text:
    """A file's text from `position` on, as far as it has been read: `json` decodes only what is there as a whole."""

    def __init__(self, path: Path, file: IO[bytes]):
        self.path, self.file = path, file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.position = "", 0
        self.line, self.counted = 1, 0  # the line of what stands at `counted`
        self.bytes_read, self.ended = 0, False

    def more(self) -> bool:
        """Read on, as much as is waiting already; False at the end of the file."""
        if self.ended:
            return False
        waiting = len(self.text) - self.position
        if waiting > MAX_ROW_BYTES:
            raise _too_long(self.path, self.line_at(self.position))
        block = self.file.read(max(BLOCK_BYTES, waiting))
        self.ended = not block
        held = len(self.decoder.getstate()[0])  # bytes of a character that the last block cut
        try:
            fresh = self.decoder.decode(block, final=self.ended)
        except UnicodeDecodeError as error:
            line = self.line_at(len(self.text)) + block[: max(error.start - held, 0)].count(b"\n")
            raise _not_utf8(self.path, line, self.bytes_read - held + error.start) from error
        self.bytes_read += len(block)
        self.line_at(self.position)
        self.text, self.position, self.counted = self.text[self.position :] + fresh, 0, 0
        return True

    def line_at(self, position: int) -> int:
        """The line of `position`, which may not lie before that of an earlier call."""
        self.line += self.text.count("\n", self.counted, position)
        self.counted = position
        return self.line

    def at(self, position: int) -> str:
        return self.text[position : position + 1]

    def skip_space(self) -> int:
        """Move `position` to the next character that is no white space (or the end), and return it."""
        while True:
            self.position = _BLANK.match(self.text, self.position).end()
            if self.position < len(self.text) or not self.more():
                return self.position

    def value(self, what: str) -> tuple[int, Any]:
        """The value that begins at `position`, and its line; moves to its end."""
        while True:
            try:
                value, end = decode_json(self.text, self.position)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - LONGEST_TOKEN
                if cut and self.more():
                    continue
                self.position = error.pos
                raise self.fail(f"not valid JSON: {error.msg} ({what})") from error
            if end == len(self.text) and self.more():  # so may a number
                continue
            line = self.line_at(self.position)
            self.position = end
            return line, value

    def fail(self, problem: str) -> InputError:
        return InputError(f"{self.path}, line {self.line_at(self.position)}: {problem}.")


def _too_long(path: Path, line: int) -> InputError:
    return InputError(
        f"{path}, line {line}: a row of more than {MAX_ROW_BYTES >> 20} MiB; one JSON list of rows, or one row on each "
        "line (JSONL), is needed."
    )


def _not_utf8(path: Path, line: int, byte: int) -> InputError:
    return InputError(f"{path}, line {line}: not UTF-8 text (byte {byte}); convert the file to UTF-8.")


# Binary formats


def _read_parquet(path: Path) -> Iterator[tuple[Place, Any]]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_row_count(path, file.metadata.num_rows)
        row = 0
        for batch in file.iter_batches(ROWS_PER_BATCH):
            for record in batch.to_pylist():
                yield Place(str(path), row), record
                row += 1
    except InputError:
        raise
    except (
        Exception
    ) as error:  # a decoder of foreign bytes: pyarrow's own, OSError, and those of what Python makes of it
        raise InputError(f"{path}: not a readable parquet file: {first_line(error)}") from error


def _read_saved_dataset(source: Source) -> Iterator[tuple[Place, Any]]:
    """Rows as Python values. Nothing outside the folder is opened: not by the names of its data files, and not by
    columns that hold paths of images or sounds, which are left out."""
    import datasets

    folder = source.path if source.dataset_split is None else source.path / source.dataset_split
    try:
        _saved_names(folder / "state.json", "_data_files")
        dataset = datasets.Dataset.load_from_disk(str(folder)).with_format(None)
        _check_row_count(folder, len(dataset))
        columns = [name for name, feature in dataset.features.items() if not _names_files(feature)]
        for row, record in enumerate(dataset.select_columns(columns)):
            yield Place(str(source), row), record
    except InputError:
        raise
    except Exception as error:  # as above
        raise InputError(f"{source}: not a readable Hugging Face dataset: {first_line(error)}") from error


def _names_files(feature: Any) -> bool:
    """Whether rows of this feature hold paths that `datasets` would open to decode them (Image, Audio, Video, …)."""
    if isinstance(feature, dict):
        return any(map(_names_files, feature.values()))
    if isinstance(feature, list):
        return any(map(_names_files, feature))
    inside = getattr(feature, "feature", None)  # of a List
    if inside is not None:
        return _names_files(inside)
    return hasattr(feature, "decode_example") and type(feature).__name__ != "Json"  # a class of newer versions


def _saved_names(path: Path, key: str) -> list[str]:
    """The names of splits or data files in a JSON file of a saved dataset. Raises InputError for a file of another form
    and for a name that leads out of the folder."""
    value = read_json(path)
    entries = value.get(key) if isinstance(value, dict) else None
    names = [e.get("filename") if isinstance(e, dict) else e for e in entries] if isinstance(entries, list) else [None]
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"{path}: not of a saved Hugging Face dataset: `{key}` must be a list of names.")
        if not is_plain_name(name):
            raise InputError(f"{path}: `{key}` names {name!r}, which is not inside the folder; a plain name is needed.")
    return names


def _check_row_count(path: Path, rows: int) -> None:
    if rows > MAX_ROWS:
        raise InputError(f"{path}: says that it has {rows:,} rows; at most {MAX_ROWS:,} can be read.")


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its name where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
