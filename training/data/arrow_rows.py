"""Rows of parquet files and of data sets that `datasets` saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exo_fast.training.data.json_rows import read_json
from exo_fast.training.data.places import Place, Source
from exo_fast.training.errors import InputError, first_line
from exo_fast.training.files import is_plain_name

MAX_ROWS = 2**28  # of a file that declares how many it has: their objects alone would be 100 GB
ROWS_PER_BATCH = 1024


def read_parquet(path: Path) -> Iterator[tuple[Place, Any]]:
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
    except Exception as error:  # a decoder of foreign bytes raises pyarrow's errors, OSError and others
        raise InputError(f"{path}: not a readable parquet file: {first_line(error)}") from error


def read_saved_dataset(source: Source) -> Iterator[tuple[Place, Any]]:
    """Read rows as Python values. Nothing outside the folder is opened: not by the names of its data files, and not by
    columns that hold paths of images or sounds, which are left out."""
    import datasets

    folder = source.path if source.dataset_split is None else source.path / source.dataset_split
    try:
        saved_names(folder / "state.json", "_data_files")
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
    """Check whether rows of this feature hold paths that `datasets` would open to decode (Image, Audio, Video, …)."""
    if isinstance(feature, dict):
        return any(map(_names_files, feature.values()))
    if isinstance(feature, list):
        return any(map(_names_files, feature))
    inside = getattr(feature, "feature", None)  # of a List
    if inside is not None:
        return _names_files(inside)
    return hasattr(feature, "decode_example") and type(feature).__name__ != "Json"  # a class of newer versions


def _check_row_count(path: Path, rows: int) -> None:
    if rows > MAX_ROWS:
        raise InputError(f"{path}: says that it has {rows:,} rows; at most {MAX_ROWS:,} can be read.")


def saved_names(path: Path, key: str) -> list[str]:
    """Return the names of splits or data files in a JSON file of a saved dataset. Raises InputError for a file of
    another form and for a name that leads out of the folder."""
    value = read_json(path)
    entries = value.get(key) if isinstance(value, dict) else None
    names = [e.get("filename") if isinstance(e, dict) else e for e in entries] if isinstance(entries, list) else [None]
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"{path}: not of a saved Hugging Face dataset: `{key}` must be a list of names.")
        if not is_plain_name(name):
            raise InputError(f"{path}: `{key}` names {name!r}, which is not inside the folder; a plain name is needed.")
    return names
