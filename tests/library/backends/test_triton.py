"""The whole Triton backend behind the public functions, in Triton's interpreter, against float64.

Sizes are odd on purpose and small because the interpreter is slow; `tests/gpu` repeats the comparison at real sizes.
"""

import itertools
from types import ModuleType

import pytest
import torch
from torch import Tensor

from exo_fast import reference
from exo_fast.backends import interpreted
from exo_fast.logprobs import linear_logprobs
from exo_fast.loss import linear_group_loss

pytestmark = pytest.mark.skipif(not interpreted(), reason="runs in Triton's interpreter: set TRITON_INTERPRET=1")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16, FP32)
GRADIENT_ERROR = {BF16: 3e-3, FP16: 3e-3, FP32: 1e-5}


class Blocks(dict):
    """A block size for every key: large vocabulary blocks, since the interpreter's time goes by operations."""

    def __init__(self, vocab_block: int):
        from exo_fast.kernels.launch import Config

        sizes = {"BLOCK_N": 64, "BLOCK_V": vocab_block, "BLOCK_D": 128, "PIECE": vocab_block}
        self.linear = Config(sizes, 4)
        self.fused = Config({"BLOCK_OWN": 128, "BLOCK_OTHER": 128, "BLOCK_D": 128}, 4)

    def __contains__(self, key: tuple) -> bool:
        return key[0] in ("linear_logsumexp", "linear_logprobs_backward")

    def get(self, key: tuple, default=None):
        return {"linear_logsumexp": self.linear, "linear_logprobs_backward": self.fused}.get(key[0], default)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch):
    """The backend's module, with chunks of any number of rows allowed."""
    from exo_fast.backends import triton

    monkeypatch.setattr(triton, "MIN_ROWS", 1)
    monkeypatch.setattr(triton, "configured", Blocks(256))
    return triton


def head(n: int, width: int, vocab: int, dtype: torch.dtype, *, bias: bool = False, spread: float = 1.0) -> dict:
    g = torch.Generator().manual_seed(n * vocab + width)
    made = {
        "hidden": torch.randn(n, width, generator=g) * spread,
        "weight": torch.randn(vocab, width, generator=g) * (3 / width**0.5),
    }
    if bias:
        made["bias"] = torch.randn(vocab, generator=g)
    made = {name: value.to(dtype).requires_grad_() for name, value in made.items()}
    return {**made, "targets": torch.randint(vocab, (n,), generator=g)}


def groups(num_groups: int, num_candidates: int, n: int) -> dict:
    """Ragged candidates that share n tokens. `ref_logps` is the log-ratio check_group_loss puts them at, over −3."""
    sequences = num_groups * num_candidates
    g = torch.Generator().manual_seed(n)
    cuts = torch.randperm(n - 1, generator=g)[: sequences - 1].add(1).sort().values.tolist()
    ref = torch.randn(num_groups, num_candidates, generator=g)
    rewards = torch.randn(num_groups, num_candidates, generator=g)
    return {"cu_seqlens": torch.tensor([0, *cuts, n]), "ref_logps": ref, "rewards": rewards}


def in_float64(made: dict) -> dict:
    return {
        name: value.detach().double().requires_grad_() if value.is_floating_point() else value
        for name, value in made.items()
    }


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


def assert_gradients(made: dict, exact: dict, limit: float) -> None:
    for name in ("hidden", "weight", "bias"):
        if name in made and made[name].requires_grad:
            assert relative(made[name].grad, exact[name].grad) <= limit, name


def check_logprobs(made: dict, limit: float, **options) -> Tensor:
    """Log-probs and gradients of a loss on them, against the definitions in float64."""
    exact = in_float64(made)
    budget = options.pop("memory_budget", None)
    got = linear_logprobs(**made, memory_budget=budget, backend="triton", **options)
    want = reference.linear_logprobs(**exact, **options)
    assert got.dtype == FP32
    assert (got - want).square().mean().sqrt() <= 1e-5
    upstream = torch.linspace(-1, 2, len(got))
    (got * upstream).sum().backward()
    (want * upstream.double()).sum().backward()
    assert_gradients(made, exact, limit)
    return got.detach()


def check_group_loss(made: dict, batch: dict, limit: float, loss_type: str = "exo-rw", **options) -> Tensor:
    exact = in_float64(made)
    budget, ties = options.pop("memory_budget", None), options.pop("ties", "error")
    # References that the policy is near: far from them the losses saturate, and their derivative is all rounding.
    with torch.no_grad():
        tokens = reference.linear_logprobs(**exact, **options)
        sums = reference.sequence_logps(tokens, batch["cu_seqlens"]).view_as(batch["ref_logps"])
        batch = {**batch, "ref_logps": (sums + 3 * batch["ref_logps"]).float()}
    loss, logps = linear_group_loss(
        **made, **batch, loss_type=loss_type, memory_budget=budget, backend="triton", ties=ties, **options
    )
    smoothing = {} if loss_type != "dpo-pref" else {"label_smoothing": 0.0}
    wide = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    want, want_logps = reference.linear_group_loss(**exact, **wide, loss_type=loss_type, **smoothing, **options)
    assert abs(float(loss - want)) <= 1e-5 * max(1.0, abs(float(want)))
    torch.testing.assert_close(logps, want_logps.float(), rtol=1e-6, atol=1e-4)
    (loss * 2.5).backward()
    (want * 2.5).backward()
    assert_gradients(made, exact, limit)
    return loss.detach()


SIZES = list(itertools.product((1, 7, 64, 129), (2, 131, 1000), (8, 80, 576)))


@pytest.mark.parametrize(("i", "size"), list(enumerate(SIZES)), ids=["x".join(map(str, size)) for size in SIZES])
def test_logprobs_at_odd_sizes(backend, i: int, size: tuple[int, int, int]) -> None:
    n, vocab, width = size
    for dtype in DTYPES:
        # Of one or two entries a row, a single rounding is the whole error: √2 · 2⁻⁹ at most.
        limit = GRADIENT_ERROR[dtype] if n * vocab > 64 or dtype == FP32 else 4e-3
        check_logprobs(head(n, width, vocab, dtype, bias=i % 2 == 0), limit)


# Many blocks of the vocabulary; with one row or less than a block, and with two blocks of rows and of D.
LARGE = [(1, 576, BF16), (7, 80, FP16), (64, 8, BF16), *((65, 136, dtype) for dtype in DTYPES)]


@pytest.mark.parametrize(("n", "width", "dtype"), LARGE, ids=[f"{n}x{d}-{t}" for n, d, t in LARGE])
def test_a_real_vocabulary(backend, n: int, width: int, dtype: torch.dtype) -> None:
    backend.configured = Blocks(4096)
    made = head(n, width, 50257, dtype)
    check_logprobs(made, GRADIENT_ERROR[dtype])
    if n >= 64:
        made["hidden"].grad = made["weight"].grad = None
        check_group_loss(made, groups(4, 3, n), GRADIENT_ERROR[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{"softcap": 5.0}, {"scale": 0.25}, {"softcap": 30.0, "scale": -1.5}],
    ids=["softcap", "scale", "both"],
)
def test_head_arithmetic(backend, dtype: torch.dtype, options: dict) -> None:
    for budget in (None, 1):
        check_logprobs(head(19, 80, 131, dtype, bias=True), GRADIENT_ERROR[dtype], memory_budget=budget, **options)
        made, batch = head(19, 80, 131, dtype, bias=True), groups(3, 3, 19)
        check_group_loss(made, batch, GRADIENT_ERROR[dtype], memory_budget=budget, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_groups", "num_candidates", "n"), [(3, 2, 7), (20, 3, 64), (8, 8, 129), (1, 64, 129)])
@pytest.mark.parametrize("budget", [None, "chunk", 1], ids=["whole", "chunks", "fused"])
def test_group_loss(backend, dtype, num_groups: int, num_candidates: int, n: int, budget: str | int | None) -> None:
    """All rows at once; chunks whose boundaries lie inside and between sequences; no chunk at all."""
    made, batch = head(n, 80, 131, dtype), groups(num_groups, num_candidates, n)
    if budget == "chunk":
        rows = backend.Rows(made["hidden"].detach(), backend.Head(made["weight"].detach()), made["targets"])
        budget = (
            5 * backend.chunk_kind(rows).row_bytes(rows) if n < 64 else 17 * backend.chunk_kind(rows).row_bytes(rows)
        )
    for loss_type in ("exo-pref", "exo-rw", "dpo-pref", "dpo-rw") if n < 64 else ("exo-rw",):
        for value in made.values():
            value.grad = None
        check_group_loss(made, batch, GRADIENT_ERROR[dtype], loss_type, memory_budget=budget)


@pytest.mark.parametrize("loss_type", ["exo-pref", "dpo-pref"])
@pytest.mark.parametrize("budget", [None, 1], ids=["whole", "fused"])
def test_tied_best_candidates_share_the_target(backend, loss_type: str, budget: int | None) -> None:
    made, batch = head(19, 16, 131, FP32), groups(3, 5, 19)
    batch["rewards"] = torch.tensor([[8.0, 8, 7, 6, 8], [1, 2, 0, 0, 0], [3, 3, 3, 3, 3]])
    check_group_loss(made, batch, GRADIENT_ERROR[FP32], loss_type, memory_budget=budget, ties="share")


@pytest.mark.parametrize("loss_type", ["exo-pref", "exo-rw"])
def test_rewards_that_only_float64_tells_apart(backend, loss_type: str) -> None:
    """1e9 + 1 and 1e9 are one number in float32: no tie, and the best is not the first."""
    made, batch = head(19, 16, 131, FP32), groups(3, 2, 19)
    batch["rewards"] = torch.tensor([[1e9, 1e9 + 1], [0.0, 1.0], [1e9 + 2, 1e9]], dtype=torch.float64)
    check_group_loss(made, batch, GRADIENT_ERROR[FP32], loss_type)


@pytest.mark.parametrize("dtype", DTYPES)
def test_boundaries_that_only_the_device_knows(backend, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Without a host copy of cu_seqlens more rows than fit take two passes."""
    monkeypatch.setattr(backend, "group_bounds", lambda cu_seqlens, candidates: None)
    made, batch = head(64, 80, 131, dtype), groups(5, 3, 64)
    check_group_loss(made, batch, GRADIENT_ERROR[dtype], memory_budget=20_000)


@pytest.mark.parametrize("need", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ()], ids="-".join)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("budget", [None, 1])
def test_only_what_is_needed(backend, need: tuple[str, ...], dtype: torch.dtype, budget: int | None) -> None:
    made = head(19, 80, 131, dtype, bias=True)
    for name in ("hidden", "weight", "bias"):
        made[name].requires_grad_(name in need)
    if need:
        check_logprobs(made, GRADIENT_ERROR[dtype], memory_budget=budget)
        for name in need:
            made[name].grad = None
        check_group_loss(made, groups(3, 3, 19), GRADIENT_ERROR[dtype], memory_budget=budget)
    else:
        loss, _ = linear_group_loss(**made, **groups(3, 3, 19), loss_type="exo-rw", backend="triton")
        assert not loss.requires_grad
    for name in {"hidden", "weight", "bias"} - set(need):
        assert made[name].grad is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("budget", [None, 40_000, 1])
def test_ignored_rows(backend, dtype: torch.dtype, budget: int | None) -> None:
    made = head(64, 80, 131, dtype, bias=True)
    made["targets"][::3] = -100
    logps = check_logprobs(made, GRADIENT_ERROR[dtype], memory_budget=budget)
    assert (logps[::3] == 0).all()
    assert (made["hidden"].grad[::3] == 0).all()
    everything = {**head(5, 8, 131, dtype), "targets": torch.full((5,), -100)}
    logps = linear_logprobs(**everything, backend="triton")
    logps.sum().backward()
    assert not logps.any()
    assert not everything["weight"].grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("budget", [None, 1])
def test_extreme_logits(backend, dtype: torch.dtype, budget: int | None) -> None:
    """Logits of ±1e4: a target far below the rest (whose logit is no shift for them), and one of probability 1."""
    vocab, width = 131, 16
    weight = torch.zeros(vocab, width)
    weight[0, 0], weight[1, 0], weight[2, 1] = 100.0, -100.0, 100.0
    weight[3:] = torch.randn(vocab - 3, width, generator=torch.Generator().manual_seed(0)) * 0.1
    hidden = torch.zeros(6, width)
    hidden[:, 0], hidden[2:, 0] = 100.0, 0.1
    hidden[2:4, 1] = 100.0
    targets = torch.tensor([0, 1, 2, 0, 5, 7])  # p = 1, logit −1e4 against 1e4, p = 1, p = 0, ordinary ones
    made = {"hidden": hidden, "weight": weight}
    made = {name: value.to(dtype).requires_grad_() for name, value in made.items()} | {"targets": targets}
    got = linear_logprobs(**made, memory_budget=budget, backend="triton")
    exact = in_float64(made)
    want = reference.linear_logprobs(**exact)
    assert got[0] == 0
    assert got[2] == 0
    assert (got <= 0).all()
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-5)
    got.sum().backward()
    want.sum().backward()
    assert_gradients(made, exact, GRADIENT_ERROR[dtype])
    batch = {
        "cu_seqlens": torch.tensor([0, 1, 3, 4, 6]),
        "ref_logps": torch.tensor([[0.1, -0.2], [0.3, 0.0]]),
    }
    batch["rewards"] = torch.tensor([[1.0, 0.5], [0.1, 0.2]])
    for value in (made["hidden"], made["weight"]):
        value.grad = None
    check_group_loss(made, batch, GRADIENT_ERROR[dtype], memory_budget=budget)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("budget", [None, 1])
def test_nan_is_not_swallowed(backend, dtype: torch.dtype, budget: int | None) -> None:
    """A run that diverges must show it, in log-probs and gradients."""
    made = head(7, 16, 131, dtype)
    with torch.no_grad():
        made["hidden"][3, 0] = float("nan")
    logps = linear_logprobs(**made, memory_budget=budget, backend="triton")
    logps.sum().backward()
    assert torch.isnan(logps).tolist() == [i == 3 for i in range(7)]
    assert torch.isnan(made["hidden"].grad[3]).all()
    assert torch.isfinite(made["hidden"].grad[:3]).all()
    assert torch.isnan(made["weight"].grad).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("budget", [None, 1])
def test_tokens_that_a_bias_rules_out(backend, dtype: torch.dtype, budget: int | None) -> None:
    """Whole blocks of −inf, as a padded vocabulary has them, first and last."""
    made = head(7, 16, 900, dtype, bias=True)
    with torch.no_grad():
        made["bias"][:300] = float("-inf")
        made["bias"][600:] = float("-inf")
        made["targets"] = 300 + made["targets"] % 300
    made["bias"].requires_grad_(False)
    check_logprobs(made, GRADIENT_ERROR[dtype], memory_budget=budget)
    check = groups(1, 3, 7)
    for name in ("hidden", "weight"):
        made[name].grad = None
    check_group_loss(made, check, GRADIENT_ERROR[dtype], memory_budget=budget)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_rows(backend, dtype: torch.dtype, frozen: bool) -> None:
    made = head(1, 16, 131, dtype, bias=True)
    hidden = torch.empty(0, 16, dtype=dtype, requires_grad=True)
    parameters = [made["weight"].requires_grad_(not frozen), made["bias"].requires_grad_(not frozen)]
    targets = torch.empty(0, dtype=torch.long)
    logps = linear_logprobs(hidden, parameters[0], targets, bias=parameters[1], backend="triton")
    logps.sum().backward()
    assert hidden.grad.shape == (0, 16)
    if not frozen:
        assert not any(p.grad.any() for p in parameters)


def test_a_row_that_overflows_is_made_again_alone(backend) -> None:
    """U of flagged rows comes from their exact maximum; neighbours in the block keep their shift."""
    made = head(40, 16, 131, BF16)
    with torch.no_grad():
        made["hidden"][7] *= 300
        rows = backend.Rows(made["hidden"].detach(), backend.Head(made["weight"].detach()), made["targets"])
        logits = reference.logits(made["hidden"].double(), made["weight"].double())
        made["targets"][7] = logits[7].argmin()
        chunk, logps = backend.Kept(rows, 40), rows.floats(40)
        chunk.fill(rows, logps)
        shift = logits.gather(1, made["targets"].unsqueeze(1)).squeeze(1)
        shift[7] = logits[7].max()
        assert logits[7].max() - logits[7].min() > 90
        torch.testing.assert_close(rows.stats[0].double(), shift, rtol=1e-5, atol=1e-5)
        u = (logits - shift.unsqueeze(1)).exp()
        u[torch.arange(40), made["targets"]] -= u.sum(1)
        kept = chunk.buffer[:, :131].double()
        assert ((kept - u).abs() <= u.abs() * 2**-8 + 1e-30).all()
        assert torch.isfinite(chunk.buffer).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_and_any_chunk(backend, dtype: torch.dtype) -> None:
    batch = groups(6, 3, 64)
    results = []
    for budget in (None, None, 60_000, 60_000, 20_000, 1, 1):
        made = head(64, 80, 131, dtype, bias=True)
        loss, _ = linear_group_loss(**made, **batch, loss_type="exo-rw", memory_budget=budget, backend="triton")
        loss.backward()
        results.append([loss.detach(), *(made[name].grad for name in ("hidden", "weight", "bias"))])
    for first, second in ((0, 1), (2, 3), (5, 6)):
        assert all(torch.equal(a, b) for a, b in zip(results[first], results[second], strict=True))
    for other in (2, 4, 5):
        for a, b in zip(results[0], results[other], strict=True):
            assert relative(a, b.double()) <= (2e-6 if dtype == FP32 else 4e-3)


def test_every_configuration_gives_the_same(backend) -> None:
    """Block sizes change the order of sums, and nothing else."""
    from exo_fast.kernels.targets import TARGETS, of_device

    name = of_device(torch.device("cpu")).name
    for dtype, word in ((BF16, "bf16"), (FP32, "fp32")):
        seen = {}
        for target in TARGETS.values():
            for config in backend.linear_kernel.configs(target, word):
                seen[str(config.constants)] = config
        spaces = {
            "linear_logsumexp": list(seen.values()),
            "linear_logprobs_backward": backend.fused_kernel.configs(TARGETS[name], word)
            + backend.fused_kernel.configs(TARGETS["gfx1100"], word),
        }
        for kernel, space in spaces.items():
            for config in space:
                backend.configured = {(kernel, name, word, 24): config}
                budget = 1 if kernel == "linear_logprobs_backward" else None
                check_group_loss(
                    head(19, 24, 301, dtype, bias=True), groups(3, 3, 19), GRADIENT_ERROR[dtype], memory_budget=budget
                )


def test_bf16_can_be_chunked_too(backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "SCHEDULE", "chunked")
    check_group_loss(head(129, 80, 131, BF16, bias=True), groups(8, 3, 129), GRADIENT_ERROR[BF16])


@pytest.mark.parametrize("dtype", DTYPES)
def test_operands_of_any_layout(backend, dtype: torch.dtype) -> None:
    """Views: rows of a wider matrix, a transposed head, a head whose rows start at odd addresses, an odd D."""
    made = head(19, 80, 131, dtype)
    plain = linear_logprobs(**{k: v.detach() for k, v in made.items()}, backend="triton")
    wide = torch.cat([made["hidden"].detach(), torch.full((19, 9), float("nan"), dtype=dtype)], 1)
    transposed = made["weight"].detach().T.contiguous().T
    shifted = torch.cat([torch.zeros(1, dtype=dtype), made["weight"].detach().flatten()])[1:].view(131, 80)
    for hidden, weight in ((wide[:, :80], transposed), (made["hidden"].detach(), shifted)):
        got = linear_logprobs(hidden, weight, made["targets"], backend="triton")
        torch.testing.assert_close(got, plain, rtol=1e-6, atol=1e-5)
    check_logprobs(head(7, 13, 131, dtype), GRADIENT_ERROR[dtype])
    columns = torch.randn(131, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    biased = {**{name: value.detach() for name, value in made.items()}, "backend": "triton"}
    strided = linear_logprobs(**biased, bias=columns[:, 0])
    assert torch.equal(strided, linear_logprobs(**biased, bias=columns[:, 0].contiguous()))


def test_rows_beyond_two_to_the_31_elements(backend) -> None:
    """Offsets are 64-bit: rows 2³¹ elements apart, in memory of which only the touched pages exist."""
    far, width = 2**31 + 64, 16
    g = torch.Generator().manual_seed(0)
    for which in ("hidden", "weight"):
        made = {"hidden": torch.randn(2, width, generator=g), "weight": torch.randn(2, width, generator=g)}
        made = {name: value.to(BF16) for name, value in made.items()}
        targets = torch.tensor([1, 0])
        want = reference.linear_logprobs(made["hidden"].double(), made["weight"].double(), targets)
        sparse = torch.empty(far + width, dtype=BF16).as_strided((2, width), (far, 1))
        sparse.copy_(made[which])
        made[which] = sparse
        got = linear_logprobs(**made, targets=targets, backend="triton")
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    # U too: its second row lies beyond 2³¹ elements.
    rows = backend.Rows(*(torch.randn(2, width, generator=g).to(BF16),), backend.Head(made["weight"]), targets)
    chunk = backend.Kept(rows, 2)
    near, logps = chunk.buffer, rows.floats(2)
    chunk.fill(rows, logps)
    chunk.buffer = torch.empty(far + 16, dtype=BF16).as_strided((2, 16), (far, 1))
    chunk.fill(rows, logps)
    assert torch.equal(chunk.buffer, near)


def test_autotuning_times_the_space_once(backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by default; on, the fastest of the space is kept for its kernel, target, dtype and width."""
    rows = backend.Rows(torch.randn(4, 8), backend.Head(torch.randn(16, 8)), torch.tensor([1, 2, 3, 4]))
    static = backend.linear_kernel.config(rows.target, rows.dtype, 8)
    backend.configured = {}
    space = backend.linear_kernel.configs(rows.target, rows.dtype)
    timed = []

    def fake_bench(launch, return_mode):
        launch()
        return -len(timed)

    monkeypatch.setattr("triton.testing.do_bench", fake_bench)
    rows.device = torch.device("cuda")
    assert rows.config(backend.linear_kernel, static, timed.append) is static
    monkeypatch.setenv("EXO_FAST_AUTOTUNE", "1")
    assert rows.config(backend.linear_kernel, static, timed.append) == space[-1]
    assert timed == space
    assert rows.config(backend.linear_kernel, static, timed.append) == space[-1]
    assert timed == space


# What the target's table chooses: schedules, and the rows of a chunk.


@pytest.fixture
def own_table(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that gives sm_90, the interpreter's target, a table of schedules."""
    from exo_fast.kernels import tuned

    def write(*schedules, **parts) -> None:
        source = {"kind": "prediction", "model": "test", "board": "H100", "date": "2026-12-01", "command": "test"}
        tuned.write_table(tmp_path / "sm_90.json", tuned.Table("sm_90", source, (), schedules, **parts))
        tuned.table.cache_clear()

    monkeypatch.setenv(tuned.OWN_TABLES, str(tmp_path))
    tuned.table.cache_clear()
    yield write
    tuned.table.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_table_chooses_the_schedule_by_width(backend, own_table, dtype: torch.dtype) -> None:
    from exo_fast.kernels.tuned import Schedule

    def rows(width: int):
        made = head(9, width, 40, dtype)
        return backend.Rows(made["hidden"], backend.Head(made["weight"]), made["targets"])

    word = backend.DTYPES[dtype]
    first = "kept" if dtype == BF16 else "fused"
    own_table(Schedule(word, 31, first), Schedule(word, 63, "chunked"), Schedule(word, None, "fused"))
    assert [backend.schedule(rows(width)) for width in (31, 32, 63, 64)] == [first, "chunked", "chunked", "fused"]
    for width in (31, 32, 64):  # all of them are right
        check_group_loss(head(19, width, 131, dtype, bias=True), groups(3, 3, 19), GRADIENT_ERROR[dtype])
    own_table()  # without a row: kept in bf16, chunked in other dtypes
    assert backend.schedule(rows(64)) == ("kept" if dtype == BF16 else "chunked")


def test_a_schedule_is_launched_as_chosen(backend, own_table, monkeypatch: pytest.MonkeyPatch) -> None:
    from exo_fast.kernels.tuned import Schedule

    launched: list[str] = []
    launch = backend.launch

    def count(kernel, *arguments, **options) -> None:
        launched.append(kernel.__name__)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(backend, "launch", count)
    only = {"kept": "target_shift", "chunked": "logits_to_grad", "fused": "linear_logprobs_backward"}
    for chosen, kernel in only.items():
        own_table(Schedule("bf16", None, chosen))
        launched.clear()
        loss, _ = linear_group_loss(**head(19, 24, 131, BF16), **groups(3, 3, 19), loss_type="exo-rw", backend="triton")
        loss.backward()
        assert {name for name in only.values() if name in launched} == {kernel}


@pytest.mark.parametrize(
    ("fit", "n", "want"),
    [(13325, 16384, 13312), (3331, 16384, 3328), (128, 200, 128), (127, 200, 127), (5000, 4999, 4999), (0, 9, 0)],
)
def test_rows_of_a_chunk_fill_whole_tiles(backend, fit: int, n: int, want: int) -> None:
    assert backend.whole_tiles(fit, n) == want


@pytest.mark.parametrize(
    ("start", "stop", "size", "lengths"),
    [
        (0, 8192, 3328, [2816, 2688, 2688]),
        (0, 16384, 13312, [8192, 8192]),
        (7, 136, 128, [128, 1]),
        (5, 105, 40, [33, 33, 34]),  # a budget of less than a tile
        (0, 4999, 4999, [4999]),
        (3, 3, 128, []),
    ],
)
def test_chunks_are_even_and_of_whole_tiles(backend, start: int, stop: int, size: int, lengths: list[int]) -> None:
    found = backend.chunks(start, stop, size)
    assert [chunk.stop - chunk.start for chunk in found] == lengths
    assert all(a.stop == b.start for a, b in itertools.pairwise(found))
    assert not found or (found[0].start, found[-1].stop) == (start, stop)


def test_chunks_of_any_size_cover_all_rows_once(backend) -> None:
    for size in (*range(1, 140), 256, 384, 1280):
        fit = backend.whole_tiles(size, 10**6)
        for n in range(1, 1400, 7):
            lengths = [chunk.stop - chunk.start for chunk in backend.chunks(11, 11 + n, fit)]
            assert sum(lengths) == n
            assert 0 < min(lengths) <= max(lengths) <= fit
            assert fit < 128 or all(length % 128 == 0 for length in lengths[:-1])


GIB = 2**30


def gpu_memory(backend: ModuleType, monkeypatch: pytest.MonkeyPatch, *, free: int, reserved: int = 0) -> dict:
    """Pretend a GPU with so many free bytes; `state` says how many tensors hold, and counts the questions."""
    state = {"free": free, "reserved": reserved, "allocated": 0, "driver": 0, "statistics": 0}

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        state["driver"] += 1
        return state["free"], 2**60

    def statistics(device: torch.device) -> dict:
        state["statistics"] += 1
        return {f"{name}_bytes": {"all": {"current": state[name]}} for name in ("allocated", "reserved")}

    def slow(device: torch.device) -> None:
        raise AssertionError("this sorts all statistics")

    monkeypatch.setattr(backend, "room", {})
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", statistics)
    for name in ("memory_reserved", "memory_allocated", "memory_stats"):
        monkeypatch.setattr(torch.cuda, name, slow)
    return state


def test_the_driver_is_asked_only_if_memory_may_be_short(backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mem_get_info` was called for every chunk size, with two sorted lists of statistics."""
    gpu = gpu_memory(backend, monkeypatch, free=60 * GIB, reserved=4 * GIB)
    device, budget = torch.device("cuda"), 4 * GIB
    for allocated in (1, 20, 50, 3):
        gpu["allocated"] = allocated * GIB
        assert backend.free_memory(device, 2 * budget) == (64 - allocated) * GIB
    assert (gpu["driver"], gpu["statistics"]) == (1, 4)
    gpu |= {"allocated": 57 * GIB, "reserved": 60 * GIB, "free": 3 * GIB}  # another process has taken some
    assert backend.free_memory(device, 2 * budget) == 6 * GIB
    assert backend.free_memory(device, 2 * budget) == 6 * GIB
    assert gpu["driver"] == 3
    gpu |= {"allocated": 40 * GIB}
    assert backend.free_memory(device, 2 * budget) == 23 * GIB
    assert gpu["driver"] == 3
    assert backend.free_memory(torch.device("cuda", 1), 2 * budget) == 23 * GIB
    assert gpu["driver"] == 4  # another device is asked for itself


@pytest.mark.parametrize(
    ("card", "free", "n", "want"),
    [
        (79.25, 70, 16384, 13824),  # 4 GiB: a row of U and of its temporaries takes 310,016 bytes at Qwen's head
        (23.6, 20, 16384, 3456),  # 1 GiB
        (79.25, 7, 16384, 6912),  # 2 GiB, as 4 GiB are more than half of the memory that is free
        (79.25, 70, 8192, 8192),
    ],
)
def test_the_budget_is_a_share_of_the_card(
    backend, own_table, monkeypatch: pytest.MonkeyPatch, card: float, free: float, n: int, want: int
) -> None:
    from types import SimpleNamespace

    from exo_fast.kernels.tuned import Scratch

    rows = backend.Rows(torch.empty(n, 1024, dtype=BF16), backend.Head(torch.empty(151936, 1024, dtype=BF16)),
                        torch.zeros(n, dtype=torch.int64))  # fmt: skip
    rows.device = torch.device("cuda")
    total = SimpleNamespace(total_memory=int(card * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    gpu_memory(backend, monkeypatch, free=int(free * GIB))
    assert backend.chunk_rows(backend.Kept, rows, None) == want
    assert backend.chunk_rows(backend.Kept, rows, GIB) == min(n, 3456)  # a budget that is given counts
    own_table(scratch=Scratch(share=1 / 32, most=GIB))
    assert backend.chunk_rows(backend.Kept, rows, None) == min(n, 3456 if card > 32 else 1664)
