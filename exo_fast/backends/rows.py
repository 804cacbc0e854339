"""Splits of the N rows of a call: into chunks, into rows that count, into groups that are finished together."""

import itertools

from torch import Tensor

Rows = slice | Tensor  # some of the N rows: a range of them, or their indices
TILE = 128  # rows of a chunk on a GPU come in multiples of it: a partly filled tile costs as much as a full one
ELSEWHERE = 2**31 - 1  # a target in another slice of the vocabulary: no column's number, in the kernels' int32 too


def row_chunks(start: int, stop: int, size: int, multiple: int = 1) -> list[slice]:
    """Split [start, stop) into pieces of nearly equal length, at most `size` each. All but the last have a `multiple`
    of rows; `size` must be one too, if there are two pieces or more."""
    n = stop - start
    pieces = -(-n // size)
    bounds = [start + -(-(n * i // pieces) // multiple) * multiple for i in range(pieces)] + [stop] if pieces else []
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def whole_tiles(fit: int, n: int) -> int:
    """Return the rows of a chunk of n rows if the budget holds `fit`: all, or whole tiles, unless not one is full."""
    return n if fit >= n else fit - fit % TILE if fit >= TILE else fit


def kept_rows(targets: Tensor) -> Tensor | None:
    """Return the indices of the rows that are not ignored (target −1), or None if no row is ignored."""
    keep = targets >= 0
    return None if bool(keep.all()) else keep.nonzero().squeeze(1)


def kept_chunks(kept: Tensor | None, n: int, size: int) -> list[Rows]:
    """Return the n rows to work on, `size` at a time: slices, or indices if some rows are ignored."""
    return [chunk if kept is None else kept[chunk] for chunk in row_chunks(0, n, size)]


def group_units(bounds: list[int], rows: int) -> list[tuple[int, int]]:
    """Return groups [first, last) that are finished together: as many whole groups as `rows` hold, at least one.

    `bounds` are the G + 1 token boundaries of the groups. Small groups share a unit so that products stay large.
    """
    units, first = [], 0
    for group in range(1, len(bounds)):
        if bounds[group] - bounds[first] > rows and group - 1 > first:
            units.append((first, group - 1))
            first = group - 1
    if first < len(bounds) - 1:
        units.append((first, len(bounds) - 1))
    return units
