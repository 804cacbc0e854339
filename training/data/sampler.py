"""Batches of rows of about one length, in random order: what `train_sampling_strategy: group_by_length` asks for.

Rows are padded to the longest of their batch, so short ones beside a long one are mostly padding. transformers' own
sampler draws from a generator that a resumed run does not have; here an epoch's order is a function of seed and epoch.
"""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

BATCHES_SORTED_TOGETHER = 16  # enough that lengths in a batch are close, few enough that it stays random


class GroupedByLength(Sampler):
    """Indices of `lengths` (rows,), each once an epoch; every `batch_size` of them in turn are of similar length."""

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, epoch: Callable[[], int]):
        """`epoch()` is asked for when an epoch begins: not every wrapper of a sampler passes `set_epoch` on."""
        self.lengths, self.batch_size, self.seed, self.epoch = np.asarray(lengths), batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch()))
        order = generator.permutation(len(self.lengths))
        batches = []
        for start in range(0, len(order), BATCHES_SORTED_TOGETHER * self.batch_size):
            part = order[start : start + BATCHES_SORTED_TOGETHER * self.batch_size]
            part = part[np.argsort(-self.lengths[part], kind="stable")]
            batches += [part[begin : begin + self.batch_size] for begin in range(0, len(part), self.batch_size)]
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        rest = [batch for batch in batches if len(batch) < self.batch_size]  # at most one, which must come last
        for index in generator.permutation(len(whole)):
            yield from whole[index].tolist()
        for batch in rest:
            yield from batch.tolist()
