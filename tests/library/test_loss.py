"""group_loss and linear_group_loss: both schedules against the definitions, every gradient, odd and extreme inputs."""

import itertools
import weakref

import pytest
import torch
from torch import Tensor

from exo_fast import closed_form, reference
from exo_fast.backends import torch as chunked
from exo_fast.logprobs import linear_logprobs
from exo_fast.loss import GroupLoss, LinearGroupLoss, group_loss, linear_group_loss
from exo_fast.reference import LossOptions
from exo_fast.statistics import linear_logprobs_with_statistics

LOSS_TYPES = ("exo-pref", "exo-rw", "dpo-pref", "dpo-rw")


@pytest.fixture(autouse=True)
def thin_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and chunks small enough that test sizes cross their boundaries."""
    monkeypatch.setattr(chunked, "MIN_ROWS", 1)
    monkeypatch.setattr(chunked, "BLOCK", 32)


def problem(
    lengths: list[int],
    num_candidates: int,
    width: int,
    vocab: int,
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    spread: float = 1.0,
) -> dict:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    n, num_groups = sum(lengths), len(lengths) // num_candidates
    made = {
        "hidden": (normal(n, width) * spread).to(dtype).requires_grad_(),
        "weight": normal(vocab, width).to(dtype).requires_grad_(),
        "targets": torch.randint(vocab, (n,), generator=g),
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        "ref_logps": normal(num_groups, num_candidates) * 3 - 10,
        "rewards": normal(num_groups, num_candidates),
    }
    if bias:
        made["bias"] = normal(vocab).to(dtype).requires_grad_()
    return made


def leaves(made: dict) -> list[Tensor]:
    return [made[name] for name in ("hidden", "weight", "bias") if name in made and made[name].requires_grad]


def two_pass(made: dict, loss_type: str, memory_budget: int | None = None, **head: float) -> Tensor:
    made = dict(made)
    ref_logps, rewards, cu = made.pop("ref_logps"), made.pop("rewards"), made.pop("cu_seqlens")
    logps = linear_logprobs(**made, memory_budget=memory_budget, **head)
    return group_loss(reference.sequence_logps(logps, cu).view_as(rewards), ref_logps, rewards, loss_type=loss_type)


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...], atol: float = 1e-11) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-9)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("num_candidates", [2, 3, 5, 16])
def test_closed_form_coefficients_are_the_derivative(loss_type: str, num_candidates: int) -> None:
    g = torch.Generator().manual_seed(1)
    policy, ref, rewards = torch.randn(3, 4, num_candidates, generator=g, dtype=torch.float64).unbind(0)
    policy = (policy * 20).requires_grad_()
    options = {
        "loss_type": loss_type,
        "beta_pi": 0.3,
        "beta_r": 0.7,
        "label_smoothing": 0.0 if loss_type == "dpo-pref" else 0.01,
    }
    want = reference.group_loss(policy, ref, rewards, **options)
    (derivative,) = torch.autograd.grad(want.sum(), policy)
    losses, coefficients = closed_form.losses_and_coefficients(policy.detach(), ref, rewards, LossOptions(**options))
    assert_same((losses, coefficients), (want.detach(), derivative), atol=1e-12)


def tie(rewards: Tensor, tied: int) -> Tensor:
    """`tied` candidates of each group share its highest reward: not the same places in every group."""
    best = torch.argsort(torch.rand(rewards.shape, generator=torch.Generator().manual_seed(tied)), dim=1)[:, :tied]
    return rewards.scatter(1, best, rewards.amax(1, keepdim=True).expand(-1, tied) + 1)


def shared_target(rewards: Tensor, smoothing: float) -> Tensor:
    """p of each candidate, row by row in Python's own numbers."""
    rows = []
    for row in rewards.tolist():
        tied = row.count(max(row))
        one, other = (1 - smoothing) / tied, smoothing / max(1, len(row) - tied)
        rows.append([1 / tied] * tied if tied == len(row) else [one if r == max(row) else other for r in row])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("loss_type", ["exo-pref", "dpo-pref"])
@pytest.mark.parametrize("num_candidates", [2, 3, 4, 5, 7, 8, 16])
def test_tied_best_candidates_share_the_target(loss_type: str, num_candidates: int) -> None:
    """Loss and gradient by hand from the target, for every number of tied candidates; one is as without `ties`."""
    g = torch.Generator().manual_seed(2)
    policy, ref, rewards = torch.randn(3, 4, num_candidates, generator=g, dtype=torch.float64).unbind(0)
    policy = (policy * 5).requires_grad_()
    log_q = torch.log_softmax(0.3 * (policy - ref), dim=1)
    for tied in range(1, num_candidates + 1):
        made = tie(rewards, tied)
        for smoothing in (0.01, 0.3, *([0.0] if loss_type == "dpo-pref" else [])):
            options = {"loss_type": loss_type, "beta_pi": 0.3, "label_smoothing": smoothing}
            p = shared_target(made, smoothing)
            forward = -(p * log_q).sum(1)
            want = forward if loss_type == "dpo-pref" else (log_q.exp() * (log_q - p.log())).sum(1)
            (derivative,) = torch.autograd.grad(want.sum(), policy, retain_graph=True)
            got = group_loss(policy, ref, made, **options, ties="share", reduction="none")
            assert_same((got, *torch.autograd.grad(got.sum(), policy)), (want, derivative), atol=1e-12)
            closed = closed_form.losses_and_coefficients(policy.detach(), ref, made, LossOptions(**options))
            assert_same(closed, (want.detach(), derivative), atol=1e-12)
            if tied == 1:
                assert torch.equal(got, group_loss(policy, ref, made, **options, reduction="none"))
            else:
                with pytest.raises(ValueError, match=r"rewards\[0\] .* has a tie for the highest"):
                    group_loss(policy, ref, made, **options)


@pytest.mark.parametrize("rows", [None, 5, 1], ids=lambda rows: f"budget-{rows}-rows")
@pytest.mark.parametrize("loss_type", ["exo-pref", "dpo-pref"])
def test_ties_are_shared_in_one_pass_too(loss_type: str, rows: int | None) -> None:
    made = problem([4, 1, 1, 7, 2, 2, 3, 3, 13], 3, 8, 67, bias=True)
    budget = None if rows is None else rows * (67 * 8 + 2 * 32 * 8 + 4 * 8 * 8)
    for tied in (1, 2, 3):
        options = {"loss_type": loss_type, "ties": "share"}
        given = {**made, "rewards": tie(made["rewards"], tied)}
        want, want_logps = linear_group_loss(**given, **options, backend="reference")
        want_grads = torch.autograd.grad(want, leaves(made))
        p = shared_target(given["rewards"], reference.default_label_smoothing(loss_type))
        log_q = torch.log_softmax(0.1 * (want_logps - made["ref_logps"]), dim=1)
        by_hand = -(p * log_q) if loss_type == "dpo-pref" else log_q.exp() * (log_q - p.log())
        torch.testing.assert_close(want, by_hand.sum(1).mean())
        got, logps = linear_group_loss(**given, **options, memory_budget=budget)
        assert_same((got, logps, *torch.autograd.grad(got, leaves(made))), (want, want_logps, *want_grads))
        module = LinearGroupLoss(loss_type, ties="share", memory_budget=budget)
        bias = given.pop("bias")
        assert torch.equal(module(**given, bias=bias)[0], got)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_group_loss_reductions(reduction: str) -> None:
    g = torch.Generator().manual_seed(0)
    policy, ref, rewards = torch.randn(3, 5, 4, generator=g).unbind(0)
    each = reference.group_loss(policy, ref, rewards, loss_type="exo-pref", label_smoothing=1e-3)
    want = each if reduction == "none" else getattr(each, reduction)()
    torch.testing.assert_close(group_loss(policy, ref, rewards, loss_type="exo-pref", reduction=reduction), want)
    module = GroupLoss("exo-pref", reduction=reduction)
    torch.testing.assert_close(module(policy, ref, rewards), want)
    assert "exo-pref" in repr(module)


def test_label_smoothing_defaults_by_loss_type() -> None:
    g = torch.Generator().manual_seed(0)
    args = torch.randn(3, 5, 4, generator=g).unbind(0)
    for loss_type, smoothing in (("dpo-pref", 0.0), ("exo-pref", 1e-3)):
        left_unset = group_loss(*args, loss_type=loss_type)
        torch.testing.assert_close(left_unset, group_loss(*args, loss_type=loss_type, label_smoothing=smoothing))
        assert left_unset != group_loss(*args, loss_type=loss_type, label_smoothing=0.2)


# One-token completions, a prime number of tokens, groups larger and smaller than what the budget holds, V of 1 to 131.
SHAPES = {
    "one-token": ([1, 1], 2, 3, 7),
    "one-word-vocabulary": ([2, 3], 2, 3, 1),
    "one-dimension": ([3, 1, 2, 5], 2, 1, 33),
    "prime": ([1, 9, 11, 2], 2, 5, 131),
    "odd-groups": ([4, 1, 1, 7, 2, 2, 3, 3, 13], 3, 8, 67),
    "k16": ([1, 2] * 8, 16, 4, 64),
}


@pytest.mark.parametrize("rows", [None, 5, 2, 1, 0], ids=lambda rows: f"budget-{rows}-rows")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
def test_one_pass_two_pass_and_reference_agree(shape: str, rows: int | None, softcap: float | None) -> None:
    lengths, num_candidates, width, vocab = SHAPES[shape]
    made = problem(lengths, num_candidates, width, vocab, bias=True)
    head = {"scale": 0.7, "softcap": softcap}
    per_row = vocab * 8 + 2 * min(32, vocab) * 8 + 4 * width * 8
    budget = None if rows is None else max(1, rows * per_row)
    for loss_type in LOSS_TYPES:
        want, want_logps = linear_group_loss(**made, loss_type=loss_type, backend="reference", **head)
        want_grads = torch.autograd.grad(2.5 * want, leaves(made))
        got, logps = linear_group_loss(**made, loss_type=loss_type, backend="torch", memory_budget=budget, **head)
        assert_same((got, logps), (want, want_logps))
        assert not logps.requires_grad
        assert_same(torch.autograd.grad(2.5 * got, leaves(made)), want_grads)
        got = two_pass(made, loss_type, budget, **head)
        assert_same((got, *torch.autograd.grad(2.5 * got, leaves(made))), (want, *want_grads))


def test_budget_decides_what_is_kept_and_what_is_made_again() -> None:
    made = problem([4, 1, 1, 7, 2, 2, 3, 3, 13], 3, 8, 67)
    head = chunked.Head(made["weight"])
    plan = chunked.Plan.of(36, made["hidden"], head, 5 * (67 * 8 + 32 * 8 + 4 * 8 * 8))
    assert plan.rows == 5
    assert chunked.Plan.of(36, made["hidden"], head, 1).rows == 0
    # the first group (6 tokens) is larger than 5 rows, the last (19) larger still: each is a unit of its own
    assert chunked.group_units([0, 6, 17, 36], plan.rows) == [(0, 1), (1, 2), (2, 3)]
    assert chunked.group_units([0, 6, 17, 36], 17) == [(0, 2), (2, 3)]
    assert [(c.start, c.stop) for c in chunked.row_chunks(17, 36, 5)] == [(17, 21), (21, 26), (26, 31), (31, 36)]


@pytest.mark.parametrize("lengths", [[17, 30], [17, 30, 9, 31, 3, 2]], ids=["one-pair", "three-pairs"])
def test_pairs_beyond_the_budget_are_not_made_again(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "MAX_ROWS", 8)
    passes = []
    exponentials = chunked.exponentials
    monkeypatch.setattr(chunked, "exponentials", lambda *args: passes.append(len(args[1])) or exponentials(*args))
    made = problem(lengths, 2, 5, 131, bias=True)
    for loss_type in LOSS_TYPES:
        want, _ = linear_group_loss(**made, loss_type=loss_type, backend="reference")
        passes.clear()
        got, _ = linear_group_loss(**made, loss_type=loss_type, backend="torch", memory_budget=30 * 131 * 8)
        assert sum(passes) == sum(lengths)
        assert_same(torch.autograd.grad(got, leaves(made)), torch.autograd.grad(want, leaves(made)))
    # A budget without room for a second dW: the rows of three pairs are made again, a single pair's still not.
    passes.clear()
    got, _ = linear_group_loss(**made, loss_type="exo-rw", backend="torch", memory_budget=12 * 131 * 8)
    assert (sum(passes) > sum(lengths)) == (len(lengths) > 2)


@pytest.mark.parametrize("budget", [None, 4000, 1], ids=["kept", "partly-kept", "blocks"])
@pytest.mark.parametrize("frozen", ["weight", "hidden", "bias", "weight+bias", "hidden+bias"])
def test_frozen_parts_get_no_gradient_and_the_others_the_same(frozen: str, budget: int | None) -> None:
    made = problem([3, 5, 2, 6], 2, 6, 70, bias=True)
    want, _ = linear_group_loss(**made, loss_type="exo-rw", backend="reference")
    names = [name for name in ("hidden", "weight", "bias") if name not in frozen.split("+")]
    want_grads = torch.autograd.grad(want, [made[name] for name in names])
    for name in frozen.split("+"):
        made[name] = made[name].detach()
    got, _ = linear_group_loss(**made, loss_type="exo-rw", memory_budget=budget)
    assert_same(torch.autograd.grad(got, leaves(made)), want_grads)
    assert_same(torch.autograd.grad(two_pass(made, "exo-rw", budget), leaves(made)), want_grads)


def test_frozen_parts_skip_their_products(monkeypatch: pytest.MonkeyPatch) -> None:
    made = problem([3, 5, 2, 6], 2, 6, 70)
    made["weight"] = made["weight"].detach()

    def never(*_: object) -> None:
        raise AssertionError("a product for a frozen head")

    monkeypatch.setattr(chunked.Gradients, "add_head", never)
    linear_group_loss(**made, loss_type="exo-rw")[0].backward()
    made["hidden"] = made["hidden"].detach()
    monkeypatch.setattr(chunked.Gradients, "unit_hidden", never)
    loss, _ = linear_group_loss(**made, loss_type="exo-rw")
    assert not loss.requires_grad


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("schedule", ["one-pass", "two-pass"])
@pytest.mark.parametrize("budget", [None, 1800, 1], ids=["kept", "partly-kept", "blocks"])
def test_gradcheck(loss_type: str, schedule: str, budget: int | None) -> None:
    made = problem([1, 3, 2, 1], 2, 3, 37, bias=True)
    made["targets"][2] = 36

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        now = {**made, "hidden": hidden, "weight": weight, "bias": bias}
        if schedule == "two-pass":
            return two_pass(now, loss_type, budget, scale=0.8, softcap=4.0)
        return linear_group_loss(**now, loss_type=loss_type, memory_budget=budget, scale=0.8, softcap=4.0)[0]

    assert torch.autograd.gradcheck(function, leaves(made), fast_mode=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("budget", [None, 1], ids=["kept", "blocks"])
def test_low_precision_against_float64_of_the_same_inputs(dtype: torch.dtype, budget: int | None) -> None:
    made = problem([17, 40, 33, 39], 2, 64, 1000, bias=True, dtype=dtype, spread=0.25)
    exact = {k: v.detach().double().requires_grad_() if v.is_floating_point() else v for k, v in made.items()}
    want, want_logps = linear_group_loss(**exact, loss_type="exo-rw", beta_r=1.0, backend="reference")
    want_grads = torch.autograd.grad(want, leaves(exact))
    got, logps = linear_group_loss(**made, loss_type="exo-rw", beta_r=1.0, memory_budget=budget)
    got_grads = torch.autograd.grad(got, leaves(made))
    assert got.dtype == logps.dtype == torch.float32
    assert [g.dtype for g in got_grads] == [dtype] * 3
    torch.testing.assert_close(logps.double(), want_logps, atol=2e-4, rtol=0)  # sums of up to 40 tokens
    # In bf16 three roundings of 1.66e-3 each, root mean square, are inherent: U, the other operand, the result.
    tolerance = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 3.2e-3}[dtype]
    for a, b in zip(got_grads, want_grads, strict=True):
        assert (a.double() - b).norm() < tolerance * b.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [None, 1], ids=["kept", "blocks"])
def test_extreme_logits(dtype: torch.dtype, budget: int | None) -> None:
    """Logits of ±1e4, the largest after the first vocabulary block, so that the first guess of the shift overflows."""
    vocab, width = 101, 4
    weight = torch.zeros(vocab, width, dtype=dtype)
    weight[:, 0] = torch.linspace(-100, 100, vocab)
    hidden = torch.zeros(4, width, dtype=dtype)
    hidden[:, 0] = torch.tensor([100.0, -100.0, 100.0, 1.0])
    made = {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "targets": torch.tensor([100, 0, 0, 50]),  # certain, certain, impossible, ordinary
        "cu_seqlens": torch.tensor([0, 1, 2, 3, 4]),
        "ref_logps": torch.tensor([[0.0, -1.0], [-2e4, -100.0]], dtype=torch.float64),
        "rewards": torch.tensor([[0.0, 1.0], [0.5, 1.0]], dtype=torch.float64),
    }
    exact = {k: v.detach().double().requires_grad_() if v.is_floating_point() else v for k, v in made.items()}
    want, want_logps = linear_group_loss(**exact, loss_type="exo-rw", backend="reference")
    got, logps = linear_group_loss(**made, loss_type="exo-rw", memory_budget=budget)
    torch.testing.assert_close(logps.double(), want_logps, atol=2e-3, rtol=1e-6)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)
    for a, b in zip(torch.autograd.grad(got, leaves(made)), torch.autograd.grad(want, leaves(exact)), strict=True):
        assert torch.isfinite(a).all()
        assert (a.double() - b).norm() <= 4e-3 * b.norm()


def test_not_a_number_is_passed_on_not_hidden() -> None:
    made = problem([2, 2], 2, 3, 50)
    with torch.no_grad():
        made["hidden"][1, 0] = float("nan")
    loss, logps = linear_group_loss(**made, loss_type="exo-rw")
    assert torch.isnan(loss)
    assert torch.isnan(logps[0, 0])
    assert torch.isfinite(logps[0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [None, 6000, 1], ids=["kept", "partly-kept", "blocks"])
def test_same_input_same_bits(dtype: torch.dtype, budget: int | None) -> None:
    made = problem([9, 4, 30, 21], 2, 16, 150, bias=True, dtype=dtype)

    def run() -> list[Tensor]:
        loss, logps = linear_group_loss(**made, loss_type="exo-pref", memory_budget=budget)
        return [loss.detach(), logps, *torch.autograd.grad(loss, leaves(made))]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_autocast_multiplies_in_its_dtype_and_keeps_float32_sums() -> None:
    made = problem([3, 5], 2, 8, 90, dtype=torch.float32)
    rounded = {**made, "hidden": made["hidden"].bfloat16(), "weight": made["weight"].bfloat16()}
    want, want_logps = linear_group_loss(**rounded, loss_type="exo-rw")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, logps = linear_group_loss(**made, loss_type="exo-rw")
    assert torch.equal(got, want)
    assert torch.equal(logps, want_logps)
    grads = torch.autograd.grad(got, leaves(made))
    assert [g.dtype for g in grads] == [torch.float32] * 2


DOORS = {
    "loss": lambda made, **to: linear_group_loss(**made, loss_type="exo-rw", **to)[0],
    "logprobs": lambda made, **to: (linear_logprobs(*rows(made), **to) * coefficients(made)).sum(),
    "statistics": lambda made, **to: (linear_logprobs_with_statistics(*rows(made), **to)[0] * coefficients(made)).sum(),
}


def rows(made: dict) -> list[Tensor]:
    return [made[name] for name in ("hidden", "weight", "targets")]


def coefficients(made: dict) -> Tensor:
    return torch.linspace(-1, 2, len(made["targets"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("door", DOORS)
def test_autocast_does_not_round_the_gradient_of_a_float32_head(door: str, backend: str, dtype: torch.dtype) -> None:
    """A bf16 U costs 2⁻⁹ of an entry, so there the result must be nearer than its rounding to bf16; elsewhere it is as
    exact as sums in float32."""
    made = problem([30, 50, 20, 40], 2, 48, 90, dtype=torch.float32, spread=0.1)
    exact = {name: made[name].to(dtype).double().detach().requires_grad_() for name in ("hidden", "weight")}
    want = torch.autograd.grad(DOORS[door]({**made, **exact}, backend="reference"), exact["weight"])[0]
    with torch.autocast("cpu", dtype=dtype):
        value = DOORS[door](made, backend=backend)
    (got,) = torch.autograd.grad(value, made["weight"])
    assert got.dtype == torch.float32

    def error(of: Tensor) -> float:
        return float((of.double() - want).norm() / want.norm())

    assert error(got) < 0.8 * error(got.to(dtype))
    if backend == "reference" or (backend == "torch" and dtype == torch.float16):
        assert error(got) < 4e-6


def test_autocast_keeps_no_second_copy_of_the_head() -> None:
    """The cast weight lives inside the operator: the graph holds the parameter itself."""
    made = problem([3, 5], 2, 8, 90, dtype=torch.float32)
    kept: list[Tensor] = []
    for door in DOORS.values():
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
            torch.autocast("cpu", dtype=torch.bfloat16),
        ):
            door(made)
    assert [t.dtype for t in kept if t.shape == made["weight"].shape] == [torch.float32] * len(DOORS)


def test_product_setting_is_put_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    made = problem([3, 5], 2, 8, 90, dtype=torch.bfloat16)
    linear_group_loss(**made, loss_type="exo-rw")[0].backward()
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_a_second_backward_gives_the_same() -> None:
    made = problem([3, 5], 2, 4, 20, bias=True)
    loss, _ = linear_group_loss(**made, loss_type="exo-rw")
    first = torch.autograd.grad(loss, leaves(made), retain_graph=True)
    assert_same(torch.autograd.grad(3 * loss, leaves(made)), tuple(3 * g for g in first))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves(made))


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every dW the torch backend has formed, by weak reference: (address, reference)."""
    seen = []
    result = chunked.Gradients.result

    def watched(self: chunked.Gradients) -> tuple:
        seen.append((self.weight.data_ptr(), weakref.ref(self.weight)))
        return result(self)

    monkeypatch.setattr(chunked.Gradients, "result", watched)
    return seen


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_dw_is_scaled_in_place_and_handed_over_not_copied(factor: float, formed: list) -> None:
    made = problem([3, 5], 2, 4, 20, dtype=torch.float32)
    (factor * linear_group_loss(**made, loss_type="exo-rw")[0]).backward()
    (where, _), *more = formed
    assert not more
    assert made["weight"].grad.data_ptr() == where


def test_float32_dw_lives_from_forward_to_backward_and_no_longer(formed: list) -> None:
    made = problem([3, 5], 2, 4, 20, dtype=torch.bfloat16)
    loss, policy_logps = linear_group_loss(**made, loss_type="exo-rw")
    ((_, dw),) = formed
    assert dw() is not None
    loss.backward()
    assert dw() is None
    assert made["weight"].grad.dtype == torch.bfloat16

    formed.clear()
    loss, policy_logps = linear_group_loss(**made, loss_type="exo-rw")
    ((_, dw),) = formed
    del loss
    assert dw() is None
    assert not policy_logps.requires_grad


def test_loss_is_not_differentiable_twice() -> None:
    made = problem([3, 5], 2, 4, 20)
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for loss in (linear_group_loss(**made, loss_type="exo-rw")[0], two_pass(made, "exo-rw")):
        (grad,) = torch.autograd.grad(factor * loss, made["hidden"], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@pytest.mark.parametrize("schedule", ["one-pass", "two-pass"])
def test_backward_under_autocast_rounds_nothing_again(schedule: str) -> None:
    made = problem([3, 5], 2, 8, 90, dtype=torch.float32)

    def loss() -> Tensor:
        return two_pass(made, "exo-rw") if schedule == "two-pass" else linear_group_loss(**made, loss_type="exo-rw")[0]

    want = torch.autograd.grad(loss(), leaves(made))
    kept = loss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = torch.autograd.grad(kept, leaves(made), retain_graph=True)
        again = torch.autograd.grad(kept, leaves(made))  # the one-pass schedule forms its gradients anew
    for a, b, c in zip(first, again, want, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, c)


def test_module_holds_the_options() -> None:
    made = problem([3, 5], 2, 4, 20, bias=True)
    want = linear_group_loss(**made, loss_type="dpo-rw", beta_pi=0.4, scale=0.5)
    module = LinearGroupLoss("dpo-rw", beta_pi=0.4, scale=0.5)
    bias = made.pop("bias")
    assert_same(module(**made, bias=bias), want)
    assert "dpo-rw" in repr(module)


def test_large_vocabulary() -> None:
    made = problem([2, 3], 2, 4, 262144, dtype=torch.float32)
    want, want_logps = linear_group_loss(**made, loss_type="exo-rw", backend="reference")
    got, logps = linear_group_loss(**made, loss_type="exo-rw", memory_budget=2**20)
    torch.testing.assert_close(logps, want_logps, atol=1e-4, rtol=0)
    for a, b in zip(torch.autograd.grad(got, leaves(made)), torch.autograd.grad(want, leaves(made)), strict=True):
        assert (a - b).norm() < 1e-4 * b.norm()
