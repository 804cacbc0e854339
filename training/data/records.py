"""From files to records, each with the place it came from.

A record is whatever one row of the file holds; `examples.py` judges it. Every record keeps its file, row and
(for text formats) line, because an error that cannot be found in an editor is not worth printing. JSON lists
are therefore decoded one element at a time: `json.load` forgets where an element stood.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exo_fast.training.errors import InputError

FILE_SUFFIXES = (".json", ".jsonl", ".parquet")
SPLIT_NAMES = {"train": ("train",), "eval": ("test", "validation", "eval")}
JSON_SPACE = " \t\n\r"


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
    """One split's data: a file, or a saved Hugging Face dataset (`dataset_split` names one in a DatasetDict)."""

    path: Path
    dataset_split: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.dataset_split is None else f"{self.path}[{self.dataset_split}]"


def find_source(path: str | Path, split: str) -> Source | None:
    """The data of `split` ("train" or "eval") under `path`; None when a directory holds no such split.

    `path` is a file (.json, .jsonl, .parquet), a directory written by `Dataset.save_to_disk`, or a directory
    with one file per split: train.* and test.* (or validation.*, eval.*). Raises InputError for a path that
    is missing, of another kind, or ambiguous.
    """
    path = Path(path).expanduser()
    names = SPLIT_NAMES[split]
    if path.is_file():
        if path.suffix not in FILE_SUFFIXES:
            raise InputError(f"{path}: unknown kind of file; one of {', '.join(FILE_SUFFIXES)} is needed.")
        return Source(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such file or directory.")
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


def read_records(source: Source) -> Iterator[tuple[Place, Any]]:
    """Every record of the source with its place, in order. Raises InputError where the file cannot be read or
    parsed."""
    if source.path.is_dir():
        yield from _read_saved_dataset(source)
    elif source.path.suffix == ".parquet":
        yield from _read_parquet(source.path)
    else:
        text = _read_text(source.path)
        yield from (
            _read_json_list(source.path, text)
            if text.lstrip(JSON_SPACE)[:1] == "["
            else _read_json_lines(source.path, text)
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); convert the file to UTF-8.") from error
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


def _read_json_lines(path: Path, text: str) -> Iterator[tuple[Place, Any]]:
    row = 0
    # Not splitlines(): it also cuts at characters, such as U+2028, that may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {number}: not valid JSON: {error.msg}. The file must hold one JSON list, or "
                "one object on each line (JSONL)."
            ) from error
        yield Place(str(path), row, number), record
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
