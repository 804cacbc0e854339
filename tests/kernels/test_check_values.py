"""The kernel of the argument checks: it finds every fault that the checks on the CPU name, and nothing else."""

import pytest
import torch
from device_work import launches_on_a_gpu
from torch import Tensor

from exo_fast.backends import checks
from exo_fast.backends.checks import Groups, checked_targets
from exo_fast.kernels import check_values as kernel
from exo_fast.logprobs import linear_logprobs
from exo_fast.loss import linear_group_loss
from exo_fast.reference import LossOptions
from exo_fast.statistics import linear_logprobs_with_statistics

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB, SEQUENCES = 7, 6  # (2, 3) groups


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take tensors of the CPU for tensors that cannot be read without waiting. On a GPU the host reads the answer: a
    failed assertion would leave nothing usable behind (`tests/gpu/test_backend.py` has one in a process of its own)."""
    monkeypatch.setattr(checks, "readable", lambda value: False)

    def assert_here(good: Tensor, message: str) -> None:
        if not bool(good):
            raise RuntimeError(message)

    if torch.cuda.is_available():
        monkeypatch.setattr(torch, "_assert_async", assert_here)


def groups(loss_type: str = "exo-pref", ties: str = "error", **changes: Tensor) -> Groups:
    made = {"ref_logps": torch.linspace(-900, 2, SEQUENCES), "rewards": torch.tensor([0.5, 3, -1, 2, 2, 4])} | changes
    ref_logps, rewards = (value.view(2, 3).to(DEVICE) for value in made.values())
    return Groups(ref_logps, rewards, LossOptions(loss_type, beta_r=0.1), ties)


def check(targets: list[int], bounds: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    flat, cu_seqlens = (torch.tensor(values, dtype=dtype, device=DEVICE) for values in (targets, bounds))
    return checked_targets("triton", flat, VOCAB, cu_seqlens=cu_seqlens, groups=groups())


def check_groups(found: Groups) -> None:
    checked_targets("triton", torch.tensor([3], device=DEVICE), VOCAB, groups=found)


RIGHT = list(range(SEQUENCES + 1))  # a token each, but two in the last sequence
BOUNDS = [0, 1, 2, 3, 4, 5, 7]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_right_values_pass(dtype: torch.dtype) -> None:
    wanted = check(RIGHT, BOUNDS, dtype=dtype)
    assert wanted.dtype == torch.int64
    assert wanted.tolist() == RIGHT


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("place", [0, 3, 6])
@pytest.mark.parametrize("wrong", [-1, -100, VOCAB, 2**31 - 1, -(2**31)])
def test_a_wrong_target_fails(wrong: int, place: int, dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match=kernel.FAULT):
        check([wrong if i == place else y for i, y in enumerate(RIGHT)], BOUNDS, dtype=dtype)


@pytest.mark.parametrize(
    "bounds",
    [[1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 8], [0, 1, 1, 3, 4, 5, 7], [0, 3, 2, 4, 5, 6, 7],
     [0, 2**63 - 1, -2, 4, 5, 6, 7], [0, 0, 2, 3, 4, 5, 7], [0, 1, 2, 3, 4, 7, 7]],
    ids=str,
)  # fmt: skip
def test_wrong_boundaries_fail(bounds: list[int]) -> None:
    with pytest.raises(RuntimeError, match=kernel.FAULT):
        check(RIGHT, bounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("place", range(SEQUENCES))
@pytest.mark.parametrize("name", ["ref_logps", "rewards"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_fail(value: float, name: str, place: int, dtype: torch.dtype) -> None:
    numbers = torch.arange(SEQUENCES, dtype=dtype)
    for loss_type in ("dpo-pref", "exo-rw"):
        check_groups(groups(loss_type, **{name: numbers}))
    numbers[place] = value
    for loss_type in ("dpo-pref", "exo-rw"):
        with pytest.raises(RuntimeError, match=kernel.FAULT):
            check_groups(groups(loss_type, **{name: numbers}))


def test_ties_fail_only_where_they_are_refused() -> None:
    tied = torch.tensor([0.5, 3, -1, 2, 4, 4])
    check_groups(groups("exo-pref", "share", rewards=tied))
    check_groups(groups("exo-rw", rewards=tied))
    with pytest.raises(RuntimeError, match=kernel.FAULT):
        check_groups(groups("dpo-pref", rewards=tied))
    below_zero = torch.tensor([-5.0, -3, -5, -2, -2, -1])  # lanes beyond K have no reward
    check_groups(groups("dpo-pref", rewards=below_zero))
    with pytest.raises(RuntimeError, match=kernel.FAULT):
        check_groups(groups("dpo-pref", rewards=torch.full((SEQUENCES,), -3e38)))


def test_rewards_that_beta_r_makes_infinite_fail() -> None:
    large = torch.tensor([1e38, 0, 0, 0, 0, 0])
    check_groups(groups("exo-pref", "share", rewards=large))
    with pytest.raises(RuntimeError, match=kernel.FAULT):
        check_groups(groups("exo-rw", rewards=large))


def test_float64_is_left_to_torch() -> None:
    doubled = groups(rewards=torch.arange(SEQUENCES, dtype=torch.float64))
    check_groups(doubled)
    with pytest.raises(ValueError, match="a tie for the highest reward"):
        check_groups(groups(rewards=torch.zeros(SEQUENCES, dtype=torch.float64)))


@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 4097, 9001])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_ignored_targets_are_renumbered(ignore_index: int, dtype: torch.dtype, n: int) -> None:
    targets = torch.arange(n, dtype=dtype, device=DEVICE) % VOCAB
    targets[::3] = ignore_index
    wanted = checked_targets("triton", targets.view(1, n), VOCAB, ignore_index=ignore_index)
    assert wanted.dtype == torch.int64
    assert torch.equal(wanted, targets.long().masked_fill(targets == ignore_index, -1))
    if n:
        targets[-1] = VOCAB
        with pytest.raises(RuntimeError, match=kernel.FAULT):
            checked_targets("triton", targets, VOCAB, ignore_index=ignore_index)


@pytest.mark.parametrize("candidates", [2, 3, 64, 5000])
@pytest.mark.parametrize("count", [1, 3, 70])
def test_every_group_is_read(count: int, candidates: int) -> None:
    ref_logps, rewards = torch.zeros(count, candidates, device=DEVICE), torch.zeros(count, candidates, device=DEVICE)
    rewards[:, -1] = 1
    options = LossOptions("dpo-pref")
    check_groups(Groups(ref_logps, rewards, options, "error"))
    rewards[-1, 0] = 1
    with pytest.raises(RuntimeError, match=kernel.FAULT):
        check_groups(Groups(ref_logps, rewards, options, "error"))


def problem() -> dict[str, Tensor]:
    return {
        "hidden": torch.randn(7, 16).bfloat16(), "weight": torch.randn(VOCAB, 16).bfloat16(),
        "targets": torch.tensor(RIGHT), "cu_seqlens": torch.tensor(BOUNDS, dtype=torch.int32),
        "ref_logps": groups().ref_logps.cpu(), "rewards": groups().rewards.cpu(),
    }  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what a GPU would be given")
@pytest.mark.parametrize("loss_type", ["exo-pref", "dpo-rw"])
def test_the_checks_are_two_launches(loss_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were 30 of a loss (31 with *-rw) and 9 of log-probs, targets renumbered."""
    made = problem()
    operands = [made[name] for name in ("hidden", "weight", "targets")]
    with launches_on_a_gpu(monkeypatch) as counts:
        linear_group_loss(**made, loss_type=loss_type, backend="triton")
    assert counts == {"check_values": 1, "_assert_async": 1, "_to_copy": 1}  # the last: int32 boundaries to int64
    for function in (linear_logprobs, linear_logprobs_with_statistics):
        with launches_on_a_gpu(monkeypatch) as counts:
            function(*operands, backend="triton")
        assert counts == {"check_values": 1, "_assert_async": 1}
