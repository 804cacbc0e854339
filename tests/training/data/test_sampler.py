"""Every row once an epoch, batches of like lengths, and an order that depends on seed and epoch alone."""

import numpy as np

from exo_fast.training.data.sampler import GroupedByLength

LENGTHS = np.random.default_rng(0).integers(1, 500, size=203)


def test_every_row_once_in_batches_of_like_lengths() -> None:
    order = list(GroupedByLength(LENGTHS, 8, 1, lambda: 0))
    assert sorted(order) == list(range(203))
    batches = [order[start : start + 8] for start in range(0, 203, 8)]
    padding = sum(LENGTHS[batch].max() * len(batch) for batch in batches) / LENGTHS.sum()
    random = np.random.default_rng(1).permutation(203)
    unsorted = sum(LENGTHS[random[i : i + 8]].max() * len(random[i : i + 8]) for i in range(0, 203, 8)) / LENGTHS.sum()
    assert padding < 1.15 < 1.5 < unsorted
    firsts = [LENGTHS[batch].mean() for batch in batches]
    assert abs(np.corrcoef(firsts, np.arange(len(firsts)))[0, 1]) < 0.5  # long ones do not all come first


def test_seed_and_epoch_decide_the_order() -> None:
    epoch = 0
    sampler, other = (GroupedByLength(LENGTHS, 8, seed, lambda: epoch) for seed in (1, 2))
    first = list(sampler)
    assert list(sampler) == first != list(other)
    epoch = 3
    assert list(sampler) != first
    epoch = 0
    assert list(sampler) == first
