"""The origin of a row: a file and a line, or a data set and an index."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exo_fast.training.data.registry import RawDataset


@dataclass(frozen=True)
class Place:
    """The place of a record: `row` counts records from 0, `line` counts text lines from 1 (None in binary formats)."""

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
    one in a DatasetDict), or a dataset of the registry (`raw`; `dataset_split` is "train" or "test")."""

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
