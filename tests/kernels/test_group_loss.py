"""The group loss kernel against the definitions in float64: sums of any length, K from 2 to 64, all four losses."""

import itertools
import json
import math
from typing import NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from tree import SEED_LOSSES

from exo_fast import reference
from exo_fast.closed_form import losses_and_coefficients
from exo_fast.kernels import group_loss as kernel
from exo_fast.kernels.targets import TARGETS, of_device
from exo_fast.reference import LossOptions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOSS_TYPES = ("exo-pref", "exo-rw", "dpo-pref", "dpo-rw")
CASES = json.loads(SEED_LOSSES.read_text())["cases"]
EPSILON = math.exp(-10) / (1 + math.exp(-10))  # see tests/library/test_reference.py


class Result(NamedTuple):
    losses: Tensor
    policy_logps: Tensor
    coefficients: Tensor
    tokens: Tensor


def launch(
    logps: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    loss_type: str,
    *,
    beta_pi: float = 0.1,
    beta_r: float = 0.1,
    label_smoothing: float = 1e-3,
    upstream: float = 1.0,
    tile: int | None = None,
    groups: range | None = None,
    tokens: bool = True,
) -> Result:
    """One launch over `groups` (all of them by default); what it does not write stays nan."""
    count, candidates = ref_logps.shape
    groups = groups or range(count)

    def empty(*shape: int) -> Tensor:
        return torch.full(shape, math.nan, device=DEVICE)

    result = Result(empty(count), empty(count, candidates), empty(count, candidates), empty(len(logps)))
    config = kernel.configs(of_device(DEVICE), "fp32")[0]
    kernel.group_loss[(len(groups),)](
        *(x.float().to(DEVICE) if x.is_floating_point() else x.to(DEVICE) for x in (logps, cu_seqlens)),
        *(x.float().to(DEVICE) for x in (ref_logps, rewards)),
        *result,
        groups.start,
        beta_pi,
        beta_r,
        label_smoothing,
        upstream,
        CANDIDATES=candidates,
        BLOCK_K=triton.next_power_of_2(candidates),
        EXO=loss_type.startswith("exo"),
        PREF=loss_type.endswith("-pref"),
        WRITE_TOKENS=tokens,
        TILE=tile or config.constants["TILE"],
        num_warps=config.num_warps,
    )
    return Result(*(x.cpu() for x in result))


def problem(lengths: list[int], candidates: int, seed: int = 0, spread: float = 3.0) -> tuple[Tensor, ...]:
    """logps (N,), cu_seqlens, ref_logps and rewards (G, K), in float64 of float32 values; log-ratios of a few nats."""
    g = torch.Generator().manual_seed(seed)
    logps = -torch.rand(sum(lengths), generator=g) * spread
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    shape = (len(lengths) // candidates, candidates)
    sums = reference.sequence_logps(logps.double(), cu_seqlens).view(shape)
    ref_logps = (sums + 5 * torch.randn(shape, generator=g)).float().double()
    return logps.double(), cu_seqlens, ref_logps, torch.randn(shape, generator=g).double()


def check(got: Result, logps: Tensor, cu: Tensor, ref_logps: Tensor, rewards: Tensor, upstream: float, **loss) -> None:
    """Sums against float64; losses and coefficients against float64 of the sums the kernel returned."""
    sums = reference.sequence_logps(logps, cu).view_as(ref_logps)
    torch.testing.assert_close(got.policy_logps.double(), sums, rtol=6e-7, atol=0)
    losses, coefficients = losses_and_coefficients(got.policy_logps.double(), ref_logps, rewards, LossOptions(**loss))
    # float32 carries log q as precisely as the largest log-ratio, a softmax as its exponent
    size = 1 + (loss["beta_pi"] * (got.policy_logps.double() - ref_logps)).abs().amax().item()
    if loss["loss_type"].endswith("-rw"):
        size += (rewards / loss["beta_r"]).abs().amax().item()
    torch.testing.assert_close(got.losses.double(), losses, rtol=2e-6, atol=1e-6 * size)
    torch.testing.assert_close(
        got.coefficients.double() / upstream, coefficients, rtol=2e-6 * size, atol=1e-6 * size * loss["beta_pi"]
    )
    each = torch.repeat_interleave(got.coefficients.flatten(), cu.diff())
    torch.testing.assert_close(got.tokens, each, rtol=0, atol=0)


LENGTHS = {
    2: [1, 1, 1, 40, 700, 3],
    3: [1, 2, 3, 65, 64, 63],
    8: [1, 130, 5, 5, 7, 1, 1, 9] * 2,
    16: [*range(1, 17)],
    64: [1, 2, 33, 5] * 16,
}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("candidates", LENGTHS)
def test_against_float64(candidates: int, loss_type: str) -> None:
    made = problem(LENGTHS[candidates], candidates)
    for beta_pi, beta_r, smoothing in ((0.1, 0.1, 1e-3), (1.5, 2.0, 0.3)):
        loss = {"beta_pi": beta_pi, "beta_r": beta_r, "label_smoothing": smoothing}
        got = launch(*made, loss_type, **loss, upstream=0.25)
        check(got, *made, upstream=0.25, loss_type=loss_type, **loss)


@pytest.mark.parametrize("tile", [64, 128, *(c.constants["TILE"] for c in kernel.configs(of_device(DEVICE), "fp32"))])
def test_every_tile_gives_the_same(tile: int) -> None:
    made = problem([1, 300, 32, 33, 31, 2], 3)
    got = launch(*made, "exo-rw", tile=tile)
    check(got, *made, upstream=1.0, loss_type="exo-rw", beta_pi=0.1, beta_r=0.1, label_smoothing=0.0)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_extreme_log_probs_stay_finite(loss_type: str) -> None:
    lengths = [1, 30, 200, 7]
    made = problem(lengths, 2)
    logps = made[0] - torch.repeat_interleave(torch.tensor([0.0, 1e4, 1e4, 0.0]), torch.tensor(lengths)).double()
    made = (logps.float().double(), *made[1:])
    smoothing = 0.0 if loss_type == "dpo-pref" else 1e-3
    got = launch(*made, loss_type, label_smoothing=smoothing)
    assert all(bool(x.isfinite().all()) for x in got)
    check(got, *made, upstream=1.0, loss_type=loss_type, beta_pi=0.1, beta_r=0.1, label_smoothing=smoothing)


def test_extreme_rewards_stay_finite() -> None:
    logps, cu, ref_logps, rewards = problem([3, 4, 5], 3)
    for loss_type in ("exo-rw", "dpo-rw"):
        got = launch(logps, cu, ref_logps, rewards * 1e4, loss_type)
        assert all(bool(x.isfinite().all()) for x in got)
        loss = {"loss_type": loss_type, "beta_pi": 0.1, "beta_r": 0.1, "label_smoothing": 0.0}
        check(got, logps, cu, ref_logps, (rewards * 1e4).float().double(), 1.0, **loss)


def test_plain_dpo_has_no_nan_where_the_others_have_no_weight() -> None:
    made = problem([5, 6, 7, 8], 4)
    got = launch(*made, "dpo-pref", label_smoothing=0.0)
    check(got, *made, upstream=1.0, loss_type="dpo-pref", beta_pi=0.1, beta_r=0.1, label_smoothing=0.0)
    best = made[3].argmax(1)
    assert (got.coefficients[0, best] < 0).all()
    assert got.coefficients.sum().abs() < 1e-8


@pytest.mark.parametrize("loss_type", ["exo-pref", "dpo-pref"])
@pytest.mark.parametrize("candidates", [2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 16])
def test_tied_best_candidates_share_the_target(candidates: int, loss_type: str) -> None:
    """One group for each number of tied candidates, so also of K whose last lanes are no candidates, and all tied."""
    lengths = [1 + i % 3 for i in range(candidates**2)]
    logps, cu, ref_logps, rewards = problem(lengths, candidates, seed=candidates)
    order = torch.argsort(torch.rand(rewards.shape, generator=torch.Generator().manual_seed(candidates)), dim=1)
    rewards = torch.where(order <= torch.arange(candidates).unsqueeze(1), 9.0, rewards)
    assert (rewards == 9).sum(1).tolist() == list(range(1, candidates + 1))
    for smoothing in (1e-3, 0.3, *([0.0] if loss_type == "dpo-pref" else [])):
        got = launch(logps, cu, ref_logps, rewards, loss_type, label_smoothing=smoothing)
        loss = {"loss_type": loss_type, "beta_pi": 0.1, "beta_r": 0.1, "label_smoothing": smoothing}
        check(got, logps, cu, ref_logps, rewards, 1.0, **loss)
    log_q = torch.log_softmax(0.1 * (got.policy_logps[-1].double() - ref_logps[-1]), dim=0)  # of the last all are tied
    gap = log_q + math.log(candidates)
    by_hand = (log_q.exp() * gap).sum() if loss_type == "exo-pref" else -log_q.mean()
    assert float(got.losses[-1]) == pytest.approx(float(by_hand), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("value", [-0.1, -1 / 3, -11.7], ids=str)
def test_sums_of_a_hundred_thousand_tokens(value: float) -> None:
    """The same number over and over rounds the same way every time: the worst case of a plain float32 sum."""
    lengths = [100_000, 99_999]
    logps = torch.full((sum(lengths),), value, dtype=torch.float32).double()
    cu = torch.tensor([0, *itertools.accumulate(lengths)])
    for tile in (256, 2048):
        got = launch(logps, cu, torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), "exo-rw", tile=tile, tokens=False)
        want = reference.sequence_logps(logps, cu).view(1, 2)
        torch.testing.assert_close(got.policy_logps.double(), want, rtol=2.4e-7, atol=0)


def test_small_terms_beside_large_ones_are_not_lost() -> None:
    g = torch.Generator().manual_seed(0)
    logps = torch.cat([torch.full((64,), -1e4), -torch.rand(20_000, generator=g) * 1e-3]).double()
    cu = torch.tensor([0, 64, len(logps)])
    lost = torch.cat([logps[:64], logps]), torch.tensor([0, 64, 64 + len(logps)])
    for values, bounds in ((logps, cu), lost):
        got = launch(values, bounds, torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), "exo-rw", tile=128, tokens=False)
        want = reference.sequence_logps(values, bounds).view(1, 2)
        torch.testing.assert_close(got.policy_logps.double(), want, rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_groups_finished_in_parts_are_those_finished_together(dtype: torch.dtype) -> None:
    logps, cu, *rest = problem([3, 9, 1, 1, 70, 2, 8, 8, 5, 6], 2)
    made = (logps, cu.to(dtype), *rest)
    whole = launch(*made, "exo-pref", upstream=0.2)
    for part in (range(0, 1), range(1, 4), range(4, 5)):
        got = launch(*made, "exo-pref", upstream=0.2, groups=part)
        outside = [g not in part for g in range(5)]
        rows = slice(int(cu[2 * part.start]), int(cu[2 * part.stop]))
        for a, b in zip(got[:3], whole[:3], strict=True):
            assert torch.equal(a[part.start : part.stop], b[part.start : part.stop])
            assert a[torch.tensor(outside)].isnan().all()
        assert torch.equal(got.tokens[rows], whole.tokens[rows])
        assert int(got.tokens.isnan().sum()) == len(logps) - (rows.stop - rows.start)


def test_the_same_bits_every_time_and_nothing_written_unasked() -> None:
    made = problem([200, 3, 77, 1], 2)
    first, again = launch(*made, "dpo-rw"), launch(*made, "dpo-rw")
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert launch(*made, "dpo-rw", tokens=False).tokens.isnan().all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_original_losses_and_gradients(case: dict) -> None:
    """The original's numbers (as in tests/library/test_reference.py), its gradient made of the token coefficients."""
    hidden = torch.tensor(case["policy_hidden"], dtype=torch.float64)
    width = hidden.shape[1]
    lengths, source, targets = [], [], []
    for row, (ids, mask, prompt) in enumerate(
        zip(case["input_ids"], case["attention_mask"], case["prompt_lens"], strict=True)
    ):
        positions = [t for t in range(width - 1) if t + 1 >= prompt and mask[t + 1]]
        source += [row * width + t for t in positions]
        targets += [ids[t + 1] for t in positions]
        lengths.append(len(positions))
    cu = torch.tensor([0, *itertools.accumulate(lengths)])
    weight = torch.tensor(case["lm_head_weight"], dtype=torch.float64, requires_grad=True)
    ref_hidden = torch.tensor(case["reference_hidden"], dtype=torch.float64)
    rewards = torch.tensor(case["rewards"], dtype=torch.float64)
    logps, ref = (
        reference.linear_logprobs(
            states.flatten(0, 1)[source], weight, torch.tensor(targets), scale=1 / case["temperature"]
        )
        for states in (hidden, ref_hidden)
    )
    ref_logps = reference.sequence_logps(ref.detach(), cu).view_as(rewards)
    got = launch(
        logps.detach(),
        cu,
        ref_logps,
        rewards,
        case["loss_type"],
        beta_pi=case["beta_pi"],
        beta_r=case["beta_r"],
        label_smoothing=EPSILON if case["loss_type"] == "exo-pref" else 0.0,
        upstream=1 / len(rewards),
    )
    constant = math.log1p(math.exp(-10)) if case["loss_type"] == "exo-pref" else 0.0
    assert got.losses.double().mean().item() - constant == pytest.approx(case["loss"], rel=1e-5, abs=1e-6)
    (gradient,) = torch.autograd.grad(logps, weight, got.tokens.double())
    torch.testing.assert_close(gradient, torch.tensor(case["grad_weight"], dtype=torch.float64), atol=1e-6, rtol=1e-5)


def test_the_tuning_space_is_the_same_for_every_dtype_and_its_signatures_are_listed_once() -> None:
    for target in TARGETS.values():
        assert kernel.configs(target, "bf16") == kernel.configs(target, "fp32")
        assert all(config.constants["TILE"] >= 64 for config in kernel.configs(target, "fp32"))
        named = kernel.variants(target, "fp32")
        assert len({variant.name for variant in named}) == len(named) > 0
        assert kernel.variants(target, "bf16") == kernel.variants(target, "fp16") == []
        for variant in named:
            assert list(variant.signature) == kernel.group_loss.arg_names
