"""Find the files of a split under a path given as `data`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exo_fast.training.errors import InputError, nearest
from exo_fast.training.files import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from exo_fast.training.data.files import find_files, read_rows
from exo_fast.training.data.json_rows import JsonLine
from exo_fast.training.data.places import Place, Source
from exo_fast.training.data.registry import CUTOFF, DATASET_NAME, known_names, open_dataset

SPLITS = ("train", "test")


def find_source(path: str | Path, split: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Source | None:
    """Find the data of `split` ("train", or "test", also called "eval") under `path`; None if there is no such split.

    `path` is a file (.json, .jsonl, either with .gz, .parquet), a directory written by `Dataset.save_to_disk`, a
    directory with one file per split: train.* and test.* (or validation.*, eval.*), or its shards as Hub downloads have
    them (train-00000-of-00002.parquet, there or in data/), or "NAME/KIND:PATH", a dataset of the registry ("NAME/KIND"
    for one that needs no path; an existing path counts as a path). Datasets that cut text by tokens use
    `tokenizer`, or the one passed to read_records. Raises InputError for a path that is missing, of another kind,
    ambiguous or without some of its shards, and for a dataset that the registry does not have.
    """
    text = str(path)
    path = user_path(path)
    hint = ""
    if not path.exists() and (named := split_name(text)) is not None:
        hint = nearest(named[0], known_names(), otherwise="", cutoff=CUTOFF)
        if named[1] is not None or named[0] in known_names():
            dataset = open_dataset(*named, tokenizer=tokenizer)
            name = "train" if split == "train" else "test"
            return Source(dataset.path or Path(text), name, dataset) if name in dataset.splits() else None
    return find_files(path, split, hint)


def find_splits(data: str, split: str) -> dict[str, Source]:
    """Return the data of each split that `split` (train, test or all) asks for, by the name that its output file gets.

    A single file is the split it is named after (train or test), else the one asked for, else train. Raises InputError
    if there is none.
    """
    path = user_path(data, "data")
    if path.is_file():
        stem = re.split(r"\.|-\d{5}-of-\d{5}", path.name)[0]
        name = stem if stem in SPLITS and split == "all" else split
        return {"train" if name == "all" else name: find_source(data, "train")}
    names = SPLITS if split == "all" else (split,)
    splits = {name: source for name in names if (source := find_source(data, name)) is not None}
    if not splits:
        raise InputError(f"data={data!r}: holds no {' or '.join(names)} split.")
    return splits


def split_name(text: str) -> tuple[str, str | None] | None:
    """Split "NAME/KIND:PATH" into ("NAME/KIND", PATH); PATH is None for "NAME/KIND". Return None for other text."""
    found = re.fullmatch(rf"({DATASET_NAME})(?::(.*))?", text)
    return (found[1], found[2]) if found else None


def read_records(source: Source, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[tuple[Place, Any]]:
    """Yield every record of the source with its place, in order. `tokenizer` is for datasets of the registry that cut
    text by tokens. Raises InputError if the file cannot be read or parsed."""
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
