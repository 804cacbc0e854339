"""Datasets by name: "NAME/KIND:PATH", where PATH holds the files as their publisher ships them.

To add one, subclass RawDataset and register it, by the decorator if your own code calls exo_fast:

    @register("mine/sft")
    class Mine(RawDataset):
        def to_record(self, row):
            return {"prompt": row["question"] + "\\n", "chosen": row["answer"]}

or, for the command line, by an entry point of an installed package (its module is imported when the name is asked for):

    [project.entry-points."exo_fast.datasets"]
    "mine/sft" = "my_package.data:Mine"

KIND says what a record holds (KINDS). If PATH holds such records already, say because `exo-fast prepare`, `generate` or
`score` wrote them, they are taken as they are: one name serves a dataset at every step, as in the original.
"""

import importlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sized
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from exo_fast.data.fields import BadField, Missing, field_names
from exo_fast.training.data.faults import collect
from exo_fast.training.data.files import find_files, read_rows
from exo_fast.training.data.json_rows import JsonLine
from exo_fast.training.data.places import Place
from exo_fast.training.errors import InputError, nearest
from exo_fast.training.files import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The content of a record, and the fields that show that a file holds such records already.
KINDS = {
    "sft": ("prompt", "chosen"),
    "pref": ("prompt", "chosen", "rejected"),
    "rw": ("prompt", "completions", "rewards"),
    "class": ("text", "label"),
}
ENTRY_POINT_GROUP = "exo_fast.datasets"
OURS = ("custom", "hh", "imdb", "reviews", "tldr")  # modules beside this one, each registers its names
CUTOFF = 0.75  # for near names: a path such as data/sft is not a misspelt name
DATASET_NAME = r"[A-Za-z0-9_.-]+/[A-Za-z0-9_-]+"


class Drop(Exception):
    """Raised by to_record for a row that is well formed and of no use; its message, a few words, is counted."""


class RawDataset:
    """A dataset as its publisher ships it, and how a row of it becomes a record of its kind.

    A subclass gives `to_record`; `rows` and `splits` too if the data is not one file of rows for each split
    (train.* and test.* of the kinds that find_source knows); `default_options` if there is something to choose.
    """

    needs_path: ClassVar[bool] = True
    default_options: ClassVar[dict[str, Any]] = {}  # by name

    def __init__(
        self,
        name: str,
        path: Path | None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        skip_malformed: bool = False,
        progress: bool = False,
        **options: Any,
    ):
        """Take the options. `skip_malformed`: leave out and count unusable rows instead of raising InputError."""
        for option in options.keys() - self.default_options.keys():
            known = f"it has {', '.join(self.default_options)}" if self.default_options else "it has none"
            raise InputError(f"{option}={options[option]!r}: the dataset {name} has no such option ({known}).")
        self.name, self.path, self.tokenizer = name, path, tokenizer
        self.kind = name.split("/")[1]
        self.skip_malformed, self.progress = skip_malformed, progress
        self.options = {**self.default_options, **options}
        self.dropped: Counter[str] = Counter()  # rows that `records` left out, by reason

    def __str__(self) -> str:
        return self.name if self.path is None else f"{self.name}:{self.path}"

    def splits(self) -> list[str]:
        """Return which of "train" and "test" exist. A single file counts as "train"."""
        if self.path.is_file():
            return ["train"]
        return [split for split in ("train", "test") if find_files(self.path, split) is not None]

    def rows(self, split: str) -> Iterable[tuple[Place, Any]]:
        """Return the raw rows of the split, in the order in which their records are to come."""
        return read_rows(find_files(self.path, split))

    def to_record(self, row: Any) -> dict[str, Any]:
        """Return the record of a raw row. Raises BadField if the row is malformed, and Drop if it is to be left out."""
        raise NotImplementedError

    def records(self, split: str) -> list[tuple[Place, dict[str, Any]]]:
        """Return all records of the split. Raises InputError that lists the first ten malformed rows."""
        self.dropped = Counter()
        rows = self.rows(split)
        bar = tqdm(
            rows,
            desc=f"{self.name} ({split})",
            unit=" rows",
            total=len(rows) if isinstance(rows, Sized) else None,
            disable=not self.progress,
        )
        advice = "\n`exo-fast prepare --skip_malformed` leaves such rows out, and counts them."
        records = collect(f"{self}[{split}]", bar, self._convert, advice)
        if not records:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.items())
            raise InputError(f"{self}[{split}]: every row was left out ({reasons}).")
        return records

    def _convert(self, place: Place, row: Any) -> tuple[Place, dict[str, Any]] | None:
        try:
            if isinstance(row, JsonLine):
                row = _decoded(row)
            if isinstance(row, dict) and all(field in row for field in KINDS[self.kind]):
                return place, row
            return place, self.to_record(row)
        except Drop as reason:
            self.dropped[str(reason)] += 1
        except BadField:
            if not self.skip_malformed:
                raise
            self.dropped["malformed"] += 1
        return None


def _decoded(line: JsonLine) -> Any:
    try:
        return line.decoded()
    except json.JSONDecodeError as error:
        raise BadField("(the whole row)", str(line), f"not valid JSON: {error}; mend or remove the line.") from error


def string_field(row: Any, *path: str | int) -> str:
    """Return the string at `path` in a raw row of objects and lists. Raises BadField if there is no string."""
    value = field_value(row, *path)
    if not isinstance(value, str):
        raise BadField(_dotted(path), value, f"a string is needed, not {type(value).__name__}.")
    return value


def field_value(row: Any, *path: str | int) -> Any:
    """Return the value at `path` in a raw row of objects and lists. Raises BadField if it is missing."""
    for depth, key in enumerate(path):
        if isinstance(key, str) and not isinstance(row, dict):
            raise BadField(_dotted(path[:depth]), row, f"an object with the field `{key}` is needed.")
        if isinstance(key, int) and not (isinstance(row, list) and len(row) > key):
            raise BadField(_dotted(path[:depth]), row, f"a list of at least {key + 1} is needed.")
        if isinstance(key, str) and key not in row:
            raise BadField(_dotted(path[: depth + 1]), Missing(), f"the row has {field_names(row)}; add `{key}`.")
        row = row[key]
    return row


def _dotted(path: tuple[str | int, ...]) -> str:
    if not path:
        return "(the whole row)"
    return str(path[0]) + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path[1:])


# The registry

DatasetClass = TypeVar("DatasetClass", bound=type[RawDataset])
_registered: dict[str, type[RawDataset]] = {}


def register(name: str) -> Callable[[DatasetClass], DatasetClass]:
    """Decorate a RawDataset to make it available as `name`, "NAME/KIND" with a KIND of KINDS. One class may have
    several names. Raises InputError for a name of another form, and for one that another class has."""
    if not re.fullmatch(DATASET_NAME, name) or name.split("/")[1] not in KINDS:
        raise InputError(f"dataset name {name!r}: NAME/KIND is needed, where KIND is one of {', '.join(KINDS)}.")

    def add(dataset: DatasetClass) -> DatasetClass:
        if not (isinstance(dataset, type) and issubclass(dataset, RawDataset)):
            raise InputError(f"dataset {name!r}: {dataset!r} is not a subclass of RawDataset.")
        held = _registered.get(name)
        if held is not None and (held.__module__, held.__qualname__) != (dataset.__module__, dataset.__qualname__):
            raise InputError(f"dataset {name!r} is registered already, by {held.__module__}.{held.__qualname__}.")
        _registered[name] = dataset
        return dataset

    return add


def known_names() -> list[str]:
    """Return all names, sorted. Entry points are listed without being imported, so a broken one breaks no other."""
    for module in OURS:
        importlib.import_module(f"exo_fast.training.data.published.{module}")
    return sorted({*_registered, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def open_dataset(name: str, path: str | None, **options: Any) -> RawDataset:
    """Open the dataset `name` with its data at `path`; `options` as RawDataset takes them.

    Raises InputError for a name that is not known (naming the nearest) or whose entry point cannot be imported, and
    for a path that is missing.
    """
    dataset = _find_class(name)
    folder = user_path(path, name) if path else None
    if folder is None and dataset.needs_path:
        raise InputError(f"{name}: where is its data? Write {name}:PATH.")
    if folder is not None and not folder.exists():
        raise InputError(f"{name}:{folder}: no such file or directory.")
    return dataset(name, folder, **options)


def _find_class(name: str) -> type[RawDataset]:
    known = known_names()
    if name in _registered:
        return _registered[name]
    point = next((point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name == name), None)
    if point is None:
        raise InputError(f"unknown dataset {name!r}{nearest(name, known, cutoff=CUTOFF)}")
    try:
        dataset = point.load()
    except Exception as error:  # whatever someone else's module raises on import
        raise InputError(
            f"dataset {name!r}: its entry point {point.value!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return register(name)(dataset)
