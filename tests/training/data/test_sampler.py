"""Every row once an epoch, however the global batches are cut, in an order that depends on seed and epoch alone."""

from itertools import zip_longest

import numpy as np
import pytest

from exo_fast.training.data.sampler import EvaluationBatches, GlobalBatches, Repeated, order_by_length, random_order

LENGTHS = np.random.default_rng(0).integers(1, 500, size=203)


def counted(batch: list[int]) -> list[int]:
    return [index for index in batch if not isinstance(index, Repeated)]


def steps(rows: int, per_process: int, processes: int, accumulation: int, **options) -> list[list[int]]:
    """The rows that count of each optimizer step, over all processes and micro-batches."""
    order = np.random.default_rng(1).permutation(rows).tolist()
    samplers = [
        GlobalBatches(
            lambda: order,
            rows,
            per_process=per_process,
            process=process,
            processes=processes,
            accumulation=accumulation,
            **options,
        )
        for process in range(processes)
    ]
    found = [list(sampler) for sampler in samplers]
    assert all(len(batches) == len(sampler) for batches, sampler in zip(found, samplers, strict=True))
    assert len({len(batches) for batches in found}) == 1  # ZeRO gathers in every forward of every process
    assert all(0 < len(batch) <= per_process for batches in found for batch in batches)
    micro = list(zip(*found, strict=True))
    together = [micro[start : start + accumulation] for start in range(0, len(micro), accumulation)]
    return [sorted(row for cut in step for batch in cut for row in counted(batch)) for step in together]


@pytest.mark.parametrize("rows", [1, 11, 12, 13, 25, 53])
@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 3), (4, 3), (3, 2)])
def test_a_step_has_the_same_rows_however_it_is_cut(rows: int, processes: int, accumulation: int) -> None:
    order = np.random.default_rng(1).permutation(rows).tolist()
    expected = [sorted(order[start : start + 12]) for start in range(0, rows, 12)]
    assert steps(rows, 12 // (processes * accumulation), processes, accumulation) == expected


def test_the_last_step_is_divided_as_evenly_as_it_goes() -> None:
    samplers = [
        GlobalBatches(lambda: range(13), 13, per_process=2, process=p, processes=2, accumulation=2) for p in range(2)
    ]
    first, second = (list(sampler) for sampler in samplers)
    assert (first[:2], second[:2]) == ([[0, 1], [4, 5]], [[2, 3], [6, 7]])
    # Five rows are left, for two processes of two rows: two micro-batches each, of 2, 1, 1 and 1.
    assert (first[2:], second[2:]) == ([[8, 9], [11]], [[10], [12]])


def test_a_process_without_a_row_of_its_own_repeats_one_that_does_not_count() -> None:
    (only,) = GlobalBatches(lambda: [7], 1, per_process=2, process=1, processes=2)
    assert only == [7]
    assert counted(only) == []


def test_rows_that_make_no_whole_step_can_be_left_out() -> None:
    assert [len(step) for step in steps(13, 2, 2, 3, drop_last=True)] == [12]


@pytest.mark.parametrize("rows", [1, 5, 8, 9])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_has_every_row_once_and_as_many_in_each_process(rows: int, processes: int) -> None:
    found = [list(EvaluationBatches(rows, per_process=2, process=p, processes=processes)) for p in range(processes)]
    assert sorted(row for batches in found for batch in batches for row in counted(batch)) == list(range(rows))
    for together in zip_longest(*found, fillvalue=()):
        assert len({len(batch) for batch in together}) == 1
    assert len(found[0]) == len(EvaluationBatches(rows, per_process=2, process=0, processes=processes))


def test_every_row_once_in_batches_of_like_lengths() -> None:
    order = order_by_length(LENGTHS, 8, seed=1, epoch=0)
    assert sorted(order) == list(range(203))
    batches = [order[start : start + 8] for start in range(0, 203, 8)]
    padding = sum(LENGTHS[batch].max() * len(batch) for batch in batches) / LENGTHS.sum()
    random = np.random.default_rng(1).permutation(203)
    unsorted = sum(LENGTHS[random[i : i + 8]].max() * len(random[i : i + 8]) for i in range(0, 203, 8)) / LENGTHS.sum()
    assert padding < 1.15 < 1.5 < unsorted
    firsts = [LENGTHS[batch].mean() for batch in batches]
    assert abs(np.corrcoef(firsts, np.arange(len(firsts)))[0, 1]) < 0.5  # long ones do not all come first


@pytest.mark.parametrize(
    "order",
    [lambda seed, epoch: order_by_length(LENGTHS, 8, seed, epoch), lambda seed, epoch: random_order(203, seed, epoch)],
    ids=["by length", "random"],
)
def test_seed_and_epoch_decide_the_order(order) -> None:
    first = order(1, 0)
    assert sorted(first) == list(range(203))
    assert order(1, 0) == first
    assert order(5, 0) != first
    assert order(1, 3) != first
