"""From files to records, each with the place it came from.

A record is whatever one row of the file holds; `examples.py` judges it. Every record keeps its file, row and
(for text formats) line, because an error that cannot be found in an editor is not worth printing. JSON lists
are therefore decoded one element at a time: `json.load` forgets where an element stood.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exo_fast.training.errors import InputError

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
    """One split's data: a file, a saved Hugging Face dataset (`dataset_split` names one in a DatasetDict), or a dataset
    of the registry (`raw`, of which `dataset_split` is "train" or "test")."""

    path: Path
    dataset_split: str | None = None
    raw: RawDataset | None = field(default=None, compare=False)

    def __str__(self) -> str:
        name = str(self.path) if self.raw is None else str(self.raw)
        return name if self.dataset_split is None else f"{name}[{self.dataset_split}]"


def find_source(path: str | Path, split: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Source | None:
    """The data of `split` ("train", or "test", also called "eval") under `path`; None when there is no such split.

    `path` is a file (.json, .jsonl, either with .gz, .parquet), a directory written by `Dataset.save_to_disk`, a
    directory with one file per split: train.* and test.* (or validation.*, eval.*), or "NAME/KIND:PATH", a dataset of
    the registry ("NAME/KIND" for one that needs no path; what is there as a path counts as a path). Those that cut
    text by tokens use `tokenizer`, or the one that read_records is given. Raises InputError for a path that is missing,
    of another kind, or ambiguous, and for a dataset that the registry does not have.
    """
    text = str(path)
    path = Path(path).expanduser()
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
        available = json.loads((path / "dataset_dict.json").read_text())["splits"]
        return next((Source(path, name) for name in names if name in available), None)
    if (path / "state.json").is_file():
        return Source(path) if split == "train" else None
    for name in names:
        found = [path / f"{name}{suffix}" for suffix in FILE_SUFFIXES if (path / f"{name}{suffix}").is_file()]
        if len(found) > 1:
            raise InputError(f"{path}: both {found[0].name} and {found[1].name} are there; name the one to use.")
        if found:
            return Source(found[0])
    return None


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
                row = json.loads(row)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{place.file}, line {place.line}: not valid JSON: {error.msg}. The file must hold one JSON list, "
                    "or one object on each line (JSONL)."
                ) from error
        yield place, row


class JsonLine(str):
    """A line of a JSONL file, not yet decoded: so that one that cannot be does not hide the next."""


def read_rows(source: Source) -> Iterator[tuple[Place, Any]]:
    """As read_records, for files and saved datasets; lines of JSONL come undecoded, as JsonLine."""
    if source.path.is_dir():
        yield from _read_saved_dataset(source)
    elif source.path.suffix == ".parquet":
        yield from _read_parquet(source.path)
    else:
        text = _read_text(source.path)
        is_list = text.lstrip(JSON_SPACE)[:1] == "["
        yield from _read_json_list(source.path, text) if is_list else _read_json_lines(source.path, text)


def _read_text(path: Path) -> str:
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig") as file:
                return file.read()
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); convert the file to UTF-8.") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not a readable gzip file: {error}; fetch it again.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error


def _read_json_list(path: Path, text: str) -> Iterator[tuple[Place, Any]]:
    decoder = json.JSONDecoder()
    end, line, counted = len(text), 1, 0

    def skip_space(position: int) -> int:
        while position < end and text[position] in JSON_SPACE:
            position += 1
        return position

    def fail(position: int, problem: str) -> InputError:
        return InputError(f"{path}, line {text.count(chr(10), 0, position) + 1}: {problem}.")

    position, row = skip_space(skip_space(0) + 1), 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            record, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise fail(error.pos, f"not valid JSON: {error.msg} (row {row})") from error
        yield Place(str(path), row, line), record
        position, row = skip_space(position), row + 1
        if text[position : position + 1] == ",":
            position = skip_space(position + 1)
        elif text[position : position + 1] != "]":
            raise fail(position, f"not valid JSON: a comma or ] is needed after row {row - 1}")
    if skip_space(position + 1) != end:
        raise fail(skip_space(position + 1), "text after the list's closing ]; one JSON list is needed")


def _read_json_lines(path: Path, text: str) -> Iterator[tuple[Place, JsonLine]]:
    row = 0
    # Not splitlines(): it also cuts at characters, such as U+2028, that may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield Place(str(path), row, number), JsonLine(line)
            row += 1


def _read_parquet(path: Path) -> Iterator[tuple[Place, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        row = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                yield Place(str(path), row), record
                row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file: {error}.") from error


def _read_saved_dataset(source: Source) -> Iterator[tuple[Place, Any]]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(source.path))
    except (OSError, ValueError) as error:
        raise InputError(f"{source.path}: not a readable Hugging Face dataset: {error}.") from error
    if source.dataset_split is not None:
        dataset = dataset[source.dataset_split]
    for row, record in enumerate(dataset):
        yield Place(str(source), row), record
