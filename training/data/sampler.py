"""Samplers that choose the rows of each process, and their order.

Training is defined by its global batches: the order of an epoch is a function of seed and epoch alone, every
`global_batch` rows of it in turn are one optimizer step, and only then are they divided over processes and
micro-batches (`GlobalBatches`). So the number of processes, and how many rows one takes at a time, change nothing but
the order of sums. The last step of an epoch has the rows that are left, divided as evenly as possible; a process that
gets none runs a row that is `Repeated` and counts nothing, because ZeRO gathers parameters in every forward of every
process. (accelerate would fill the last batch up with rows of the first, which then count twice.)

`order_by_length` implements `train_sampling_strategy: group_by_length`: rows are padded to the longest of their
batch, so short ones beside a long one are mostly padding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

BATCHES_SORTED_TOGETHER = 16  # enough that lengths in a batch are close, few enough that it stays random


class Repeated(int):
    """The index of a row that is run so that a process has something to run, and counts nothing."""


class GlobalBatches(Sampler[list[int]]):
    """The micro-batches of one process: lists of row indices, `accumulation` of them to an optimizer step.

    Args:
        order: an epoch's row indices; asked for when an epoch begins.
        rows: how many there are.
        per_process: rows of a whole micro-batch.
        process, processes: the index of this data-parallel process, and their number.
        accumulation: micro-batches of a whole step.
        drop_last: leave out the rows at the end of an epoch that make no whole step.
    """

    def __init__(
        self,
        order: Callable[[], Sequence[int]],
        rows: int,
        *,
        per_process: int,
        process: int,
        processes: int,
        accumulation: int = 1,
        drop_last: bool = False,
    ):
        self.order, self.rows, self.per_process = order, rows, per_process
        self.process, self.processes, self.accumulation = process, processes, accumulation
        self.drop_last = drop_last

    @property
    def global_batch(self) -> int:
        """Rows of a whole optimizer step."""
        return self.per_process * self.processes * self.accumulation

    def __len__(self) -> int:
        whole, rest = divmod(self.rows, self.global_batch)
        return whole * self.accumulation + (0 if self.drop_last else self._micro_batches(rest))

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.order())
        for start in range(0, self.rows, self.global_batch):
            batch = order[start : start + self.global_batch]
            if self.drop_last and len(batch) < self.global_batch:
                return
            count = self._micro_batches(len(batch))
            pieces = np.array_split(np.asarray(batch), count * self.processes)
            for piece in pieces[self.process :: self.processes]:
                yield piece.tolist() or [Repeated(batch[0])]

    def _micro_batches(self, rows: int) -> int:
        return -(-rows // (self.per_process * self.processes))


class EvaluationBatches(Sampler[list[int]]):
    """The batches of one process in evaluation: every row once, as many in each process, filled up with `Repeated`."""

    def __init__(self, rows: int, *, per_process: int, process: int, processes: int):
        self.rows, self.per_process, self.process, self.processes = rows, per_process, process, processes

    def __len__(self) -> int:
        return -(-self.rows // (self.per_process * self.processes))

    def __iter__(self) -> Iterator[list[int]]:
        together = self.per_process * self.processes
        for start in range(0, self.rows, together):
            batch = list(range(start, min(start + together, self.rows)))
            each = -(-len(batch) // self.processes)
            batch += [Repeated(start)] * (each * self.processes - len(batch))
            yield batch[self.process * each : (self.process + 1) * each]


def random_order(rows: int, seed: int, epoch: int) -> list[int]:
    """Return a permutation of the rows, a function of seed and epoch (as accelerate's seedable sampler draws it)."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


def order_by_length(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[int]:
    """Return the indices of `lengths` (rows,), each once. Every `batch_size` of them in turn have similar lengths; the
    batches are in random order. The order depends on the arguments alone; transformers' sampler draws from a generator
    that a resumed run does not have.
    """
    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), BATCHES_SORTED_TOGETHER * batch_size):
        part = order[start : start + BATCHES_SORTED_TOGETHER * batch_size]
        part = part[np.argsort(-lengths[part], kind="stable")]
        batches += [part[begin : begin + batch_size] for begin in range(0, len(part), batch_size)]
    whole = [batch for batch in batches if len(batch) == batch_size]
    rest = [batch for batch in batches if len(batch) < batch_size]  # at most one, which must come last
    shuffled = [whole[index] for index in generator.permutation(len(whole))]
    return [int(index) for batch in (*shuffled, *rest) for index in batch]


@dataclass
class CountedRows(Dataset):
    """A data set's rows, each with whether it counts: a `Repeated` row does not."""

    rows: Dataset

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, bool]:
        return self.rows[index], not isinstance(index, Repeated)


@dataclass
class CountedCollator:
    """A stage's collator, and `counted` (R,) float32: 1 for rows that count, 0 for others."""

    collate: Callable[[list[Any]], dict[str, Any]]

    def __call__(self, items: list[tuple[Any, bool]]) -> dict[str, Any]:
        rows, counted = zip(*items, strict=True)
        return {**self.collate(list(rows)), "counted": torch.tensor(counted, dtype=torch.float32)}
