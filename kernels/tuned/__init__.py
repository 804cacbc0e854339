"""The choices that a card or a model made for a target: `<target>.json` in this folder.

A table names the configuration of a kernel and the schedule of a chunk by dtype and D, and the share of a card that
scratch may take. Its source is a prediction, until a run on a card writes a measurement in its place:

    {
      "format": 1,
      "target": "sm_90",
      "source": {"kind": "measurement", "card": …, "torch": …, "triton": …, "date": …, "command": …},
      "scratch": {"share": 0.0625, "most": 4294967296},
      "kernels": [
        {"kernel": "linear_logsumexp", "dtype": "bf16", "store": false, "up_to": 1535,
         "blocks": {"BLOCK_N": 128, "BLOCK_V": 256, "BLOCK_D": 64, "PIECE": 64}, "warps": 8, "stages": 3},
        …
      ],
      "schedules": [{"dtype": "bf16", "up_to": null, "schedule": "kept"}]
    }

`up_to` is the largest D that a row is for; rows of the same kernel, dtype and `store` come in ascending order, and the
last has null, so that no D is left out. A kernel or a dtype without rows keeps the rule that its code has, and so does
a target without a table. EXO_FAST_TUNED names a folder whose tables come before the ones shipped here. A table is read
once, when a kernel is launched for the first time, and a fault in it is an error that names the file and the place.
"""

import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from exo_fast.kernels.launch import TYPES, Config
from exo_fast.kernels.targets import Target

FORMAT = 1
FOLDER = Path(__file__).parent
OWN_TABLES = "EXO_FAST_TUNED"
SOURCES = {
    "prediction": ("kind", "model", "board", "date", "command"),
    "measurement": ("kind", "card", "torch", "triton", "date", "command"),
}
BLOCKS = {
    "linear_logsumexp": {"BLOCK_N", "BLOCK_V", "BLOCK_D", "PIECE"},
    "linear_logprobs_backward": {"BLOCK_OWN", "BLOCK_OTHER", "BLOCK_D"},
}
SCHEDULES = {"bf16": ("kept", "chunked", "fused"), "fp16": ("chunked", "fused"), "fp32": ("chunked", "fused")}
T = TypeVar("T")


@dataclass(frozen=True)
class Scratch:
    """The default memory budget: the largest power of two in `share` of the card's memory, at most `most` bytes.

    A power of two, because cards of one kind report slightly different sizes, and another chunk size gives other bits.
    """

    share: float
    most: int

    def budget(self, card: int) -> int:
        """Return the budget in bytes of a card with `card` bytes of memory."""
        return min(self.most, 2 ** math.floor(math.log2(self.share * card)))


# 4 GiB on 80 GB and more: no chunk of a usual head is then too short for the product of dH to fill the card.
SCRATCH = Scratch(share=1 / 16, most=4 * 2**30)


@dataclass(frozen=True)
class Row:
    """The configuration of a kernel for D up to `up_to`, or for any D above the row before if it is None."""

    kernel: str
    dtype: str
    store: bool  # the launches of linear_logsumexp that store U
    up_to: int | None
    config: Config


@dataclass(frozen=True)
class Schedule:
    """The schedule of a chunk for D up to `up_to`: "kept" (bf16 alone), "chunked", or "fused", which has no chunk."""

    dtype: str
    up_to: int | None
    schedule: str


@dataclass(frozen=True)
class Table:
    """All choices for a target, and their source."""

    target: str
    source: Mapping[str, str]
    rows: tuple[Row, ...]
    schedules: tuple[Schedule, ...]
    scratch: Scratch = SCRATCH
    path: str = ""  # of its file

    def config(self, kernel: str, dtype: str, width: int, store: bool, space: list[Config]) -> Config | None:
        """Return the kernel's configuration for D = width, one of `space`, or None if the table has no row for it."""
        row = _first(width, [r for r in self.rows if (r.kernel, r.dtype, r.store) == (kernel, dtype, store)])
        if row is not None and row.config not in space:
            raise ValueError(
                f"{self.path}: {row.config} is not in the tuning space of {kernel} for {dtype} on {self.target}, "
                f"which is {', '.join(map(str, space))}: write the table again, or remove it"
            )
        return None if row is None else row.config

    def schedule(self, dtype: str, width: int) -> str | None:
        """Return the schedule for D = width, or None if the table has no row for it."""
        row = _first(width, [s for s in self.schedules if s.dtype == dtype])
        return None if row is None else row.schedule


def _first(width: int, rows: list[T]) -> T | None:
    return next((row for row in rows if row.up_to is None or width <= row.up_to), None)


@functools.cache
def table(target: str) -> Table | None:
    """Return the table of a target (sm_90, gfx942, …), or None if there is no file of it. Raises ValueError."""
    own = os.environ.get(OWN_TABLES)
    if own and not Path(own).is_dir():
        raise ValueError(f"{OWN_TABLES}={own} is no folder: give one that holds <target>.json, or unset it")
    for folder in (Path(own), FOLDER) if own else (FOLDER,):
        path = folder / f"{target}.json"
        if path.exists():
            found = read_table(path)
            if found.target != target:
                raise ValueError(f"{path}: the table is of {found.target}: rename it to {found.target}.json")
            return found
    return None


def config(
    target: Target, kernel: str, dtype: str, width: int, space: list[Config], store: bool = False
) -> Config | None:
    """Return the configuration that the target's table has for a kernel, or None if it has no row for it."""
    found = table(target.name)
    return None if found is None else found.config(kernel, dtype, width, store, space)


def ranges(best: Mapping[int, T]) -> list[tuple[int | None, T]]:
    """Return the rows (up_to, choice) for the best choice at some values of D: between two of them the nearer one, by
    ratio, counts."""
    found: list[tuple[int | None, T]] = []
    widths = sorted(best)
    for i, width in enumerate(widths):
        last = i == len(widths) - 1
        if last or best[widths[i + 1]] != best[width]:
            found.append((None if last else math.isqrt(width * widths[i + 1]), best[width]))
    return found


# The file -------------------------------------------------------------------------------------------------------------


def write_table(path: str | Path, made: Table) -> None:
    """Write a table, one row a line. Raises ValueError if it could not be read again."""
    path = Path(path)
    rows = [
        {
            "kernel": row.kernel, "dtype": row.dtype, "store": row.store, "up_to": row.up_to,
            "blocks": row.config.constants, "warps": row.config.num_warps, "stages": row.config.num_stages,
        }
        for row in made.rows
    ]  # fmt: skip
    parts = {
        "format": json.dumps(FORMAT),
        "target": json.dumps(made.target),
        "source": json.dumps(dict(made.source)),
        "scratch": json.dumps(asdict(made.scratch)),
        "kernels": _lines(rows),
        "schedules": _lines([asdict(row) for row in made.schedules]),
    }
    text = "{\n" + ",\n".join(f'  "{name}": {value}' for name, value in parts.items()) + "\n}\n"
    parse(text, str(path))
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def _lines(rows: list[dict]) -> str:
    return "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in rows) + "\n  ]" if rows else "[]"


def read_table(path: str | Path) -> Table:
    """Read a table. Raises ValueError, with the file and the place of the fault."""
    return parse(Path(path).read_bytes(), str(path))


def parse(text: str | bytes, path: str) -> Table:
    """Return the table that `text` holds. Raises ValueError, with `path` and the place of the fault."""
    try:
        return _table(json.loads(text), path)
    except ValueError as error:  # of JSON too
        raise ValueError(f"{path}: {error}") from error


def _table(data: Any, path: str) -> Table:
    _keys(data, ("format", "target", "source", "scratch", "kernels", "schedules"), "the table")
    if data["format"] != FORMAT:
        raise ValueError(f"format is {data['format']!r}, and this version reads {FORMAT}")
    source = _mapping(data["source"], "source")
    kind = source.get("kind")
    if kind not in SOURCES:
        raise ValueError(f"source: kind is {kind!r}: give one of {', '.join(SOURCES)}")
    _keys(source, SOURCES[kind], "source")
    for name, value in source.items():
        _text(value, f"source: {name}")
    scratch = data["scratch"]
    _keys(scratch, ("share", "most"), "scratch")
    share = scratch["share"]
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"scratch: share is {share!r}: give a number above 0 and at most 1")
    rows = tuple(_row(row, f"kernels[{i}]") for i, row in enumerate(_list(data["kernels"], "kernels")))
    schedules = tuple(_schedule(row, f"schedules[{i}]") for i, row in enumerate(_list(data["schedules"], "schedules")))
    _ascending([((row.kernel, row.dtype, row.store), row.up_to) for row in rows], "kernels")
    _ascending([((row.dtype,), row.up_to) for row in schedules], "schedules")
    return Table(
        target=_text(data["target"], "target"),
        source=source,
        rows=rows,
        schedules=schedules,
        scratch=Scratch(share, _positive(scratch["most"], "scratch: most")),
        path=path,
    )


def _row(row: Any, place: str) -> Row:
    _keys(row, ("kernel", "dtype", "store", "up_to", "blocks", "warps", "stages"), place)
    kernel, blocks = _one_of(row["kernel"], BLOCKS, f"{place}: kernel"), _mapping(row["blocks"], f"{place}: blocks")
    _keys(blocks, tuple(BLOCKS[kernel]), f"{place}: blocks")
    if not isinstance(row["store"], bool) or (row["store"] and kernel != "linear_logsumexp"):
        raise ValueError(f"{place}: store is {row['store']!r}: give false, or true for linear_logsumexp")
    config = Config(
        {name: _positive(size, f"{place}: {name}") for name, size in blocks.items()},
        num_warps=_positive(row["warps"], f"{place}: warps"),
        num_stages=_positive(row["stages"], f"{place}: stages"),
    )
    return Row(kernel, _one_of(row["dtype"], TYPES, f"{place}: dtype"), row["store"], _up_to(row, place), config)


def _schedule(row: Any, place: str) -> Schedule:
    _keys(row, ("dtype", "up_to", "schedule"), place)
    dtype = _one_of(row["dtype"], SCHEDULES, f"{place}: dtype")
    return Schedule(dtype, _up_to(row, place), _one_of(row["schedule"], SCHEDULES[dtype], f"{place}: schedule"))


def _ascending(rows: list[tuple[tuple, int | None]], place: str) -> None:
    for key in dict.fromkeys(key for key, _ in rows):
        limits = [up_to for other, up_to in rows if other == key]
        words = " ".join(str(part) for part in key)
        if limits[-1] is not None or None in limits[:-1]:
            raise ValueError(f"{place}: the last row of {words} must have up_to null, and no other: they are {limits}")
        if limits[:-1] != sorted(set(limits[:-1])):
            raise ValueError(f"{place}: up_to of {words} must ascend: they are {limits}")


def _keys(found: Any, wanted: tuple[str, ...], place: str) -> None:
    names = set(_mapping(found, place))
    if names != set(wanted):
        wrong = [f"{name} is missing" for name in sorted(set(wanted) - names)]
        wrong += [f"{name} is unknown" for name in sorted(names - set(wanted))]
        raise ValueError(f"{place}: {', '.join(wrong)}")


def _mapping(value: Any, place: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is {value!r}: give an object")
    return value


def _list(value: Any, place: str) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{place} is {value!r}: give a list")
    return value


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{place} is {value!r}: give a text")
    return value


def _one_of(value: Any, wanted: Any, place: str) -> str:
    if not isinstance(value, str) or value not in wanted:
        raise ValueError(f"{place} is {value!r}: give one of {', '.join(wanted)}")
    return value


def _positive(value: Any, place: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{place} is {value!r}: give a whole number above 0")
    return value


def _up_to(row: dict, place: str) -> int | None:
    return None if row["up_to"] is None else _positive(row["up_to"], f"{place}: up_to")
