"""The rows of one file or saved data set, by its suffix."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exo_fast.training.data.arrow_rows import read_parquet, read_saved_dataset, saved_names
from exo_fast.training.data.json_rows import read_json_rows
from exo_fast.training.data.places import Place, Source
from exo_fast.training.errors import InputError

FILE_SUFFIXES = (".json", ".jsonl", ".parquet", ".json.gz", ".jsonl.gz")
SPLIT_NAMES = {
    "train": ("train",),
    "eval": ("test", "validation", "eval"),
    "test": ("test", "validation", "eval"),
}


def read_rows(source: Source) -> Iterator[tuple[Place, Any]]:
    """Read the rows of files and saved datasets, as read_records does. Lines of JSONL come undecoded, as JsonLine."""
    if source.path.is_dir() and not source.shards:
        yield from read_saved_dataset(source)
        return
    for path in source.shards or (source.path,):
        yield from read_parquet(path) if path.suffix == ".parquet" else read_json_rows(path)


def _shards(folder: Path, name: str, suffix: str) -> tuple[Path, ...]:
    """Return the parts of one split, in order. Raises InputError if some are missing."""
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


def find_files(path: Path, split: str, hint: str = "") -> Source | None:
    """Find the files of `split` under `path`, as `sources.find_source` describes them; None if there is no such split.

    Raises InputError for a path that is missing (`hint` ends the message), of another kind, ambiguous or without some
    of its shards.
    """
    names = SPLIT_NAMES[split]
    if path.is_file():
        if not path.name.endswith(FILE_SUFFIXES):
            raise InputError(f"{path}: unknown kind of file; one of {', '.join(FILE_SUFFIXES)} is needed.")
        return Source(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such file or directory{hint}.")
    if (path / "dataset_dict.json").is_file():
        available = saved_names(path / "dataset_dict.json", "splits")
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
