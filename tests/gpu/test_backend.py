"""The public functions on a GPU: numbers against float64, bits, memory, graphs, streams, and every configuration.

Everything goes through `exo_fast.logprobs` and `exo_fast.loss`, as a trainer would. Run with `pytest tests/gpu`.
"""

import importlib
import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import likely_tokens
import pytest
import torch
from tensor_cores import drift, logprob_limit
from torch import Tensor

from exo_fast import reference
from exo_fast.backends import products
from exo_fast.closed_form import losses_and_coefficients
from exo_fast.kernels import tuned
from exo_fast.kernels.launch import Config
from exo_fast.kernels.targets import TARGETS, of_device
from exo_fast.logprobs import linear_logprobs
from exo_fast.loss import linear_group_loss
from exo_fast.reference import LossOptions

GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no CUDA or ROCm device is available")]

DEVICE = torch.device("cuda")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GRADIENT = {"bf16": 3e-3, "fp16": 3e-3, "fp32": 1e-5}  # relative error in the Frobenius norm
MIB = 2**20
KERNELS = ("linear_logsumexp", "logsumexp_gather", "logits_to_grad", "linear_logprobs_backward")


class Shape(NamedTuple):
    lengths: tuple[int, ...]  # of the candidates, group by group
    candidates: int
    width: int
    vocab: int


SHAPES = {
    "one-token": Shape((1,) * 16, 2, 64, 131),
    "odd": Shape((3, 9, 1, 1, 70, 45), 3, 80, 1000),
    "no-tma": Shape((5, 9, 33, 21), 2, 85, 517),  # rows of 170 bytes
    "whole-tiles": Shape((64, 64, 64, 64), 2, 256, 1024),
    "unaligned-vocabulary": Shape((70, 29), 2, 576, 50257),
    "llama": Shape((60, 31, 1, 37), 2, 4096, 128256),
    "k64": Shape(tuple(range(1, 65)), 64, 64, 1000),
}
# Its rows under each budget: all at once; some in every dtype, in float16 fewer than the third group has; no row.
BUDGETED = Shape((90, 41, 1, 200, 233, 107, 12, 16), 2, 128, 10_000)
BUDGETS = {"default": None, "12MiB": 12 * MIB, "1B": 1}
HEADS = {
    "plain": {},
    "scale": {"scale": 0.7},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0, "scale": 1.3},
    "all": {"bias": True, "softcap": 30.0, "scale": 0.5},
}


class Problem(NamedTuple):
    """The arguments of the public functions."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    cu_seqlens: Tensor
    ref_logps: Tensor
    rewards: Tensor
    head: dict  # scale, softcap

    @property
    def parameters(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def exact(self) -> "Problem":
        """The same values in float64."""
        wide = [None if t is None else t.detach().double().requires_grad_() for t in self[:3]]
        return Problem(*wide, self.targets, self.cu_seqlens, *(t.double() for t in self[5:7]), self.head)

    def logprobs(self, **options) -> Tensor:
        options = {"targets": self.targets, "bias": self.bias, "backend": "triton", **self.head, **options}
        return linear_logprobs(self.hidden, self.weight, **options)

    def loss(self, **options) -> tuple[Tensor, Tensor]:
        options = {
            "targets": self.targets, "cu_seqlens": self.cu_seqlens, "ref_logps": self.ref_logps,
            "rewards": self.rewards, "bias": self.bias, "loss_type": "exo-rw", "beta_r": 1.0, "backend": "triton",
            **self.head, **options,
        }  # fmt: skip
        return linear_group_loss(self.hidden, self.weight, **options)

    def step(self, **options) -> tuple[Tensor, ...]:
        """Loss, sequence log-probs, dH, dW and db."""
        loss, logps = self.loss(**options)
        return loss.detach(), logps, *torch.autograd.grad(loss, self.parameters)

    def on_host(self) -> "Problem":
        """Return the problem with boundaries on the host, pinned: a captured copy reads them again in every replay."""
        cu_seqlens = self.cu_seqlens.cpu()
        return self._replace(cu_seqlens=cu_seqlens.pin_memory() if GPU else cu_seqlens)


def problem(
    shape: Shape,
    precision: str = "bf16",
    *,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    seed: int = 0,
) -> Problem:
    """Logits of a standard deviation of 2 and log-ratios of 4 nats."""
    lengths, candidates, width, vocab = shape
    dtype, n, groups = DTYPES[precision], sum(lengths), len(lengths) // candidates
    g = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=DEVICE)

    made = Problem(
        normal(n, width).to(dtype).requires_grad_(),
        (normal(vocab, width) * (2 / math.sqrt(width))).to(dtype).requires_grad_(),
        normal(vocab).to(dtype).requires_grad_() if bias else None,
        torch.randint(vocab, (n,), generator=g, device=DEVICE),
        torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE),
        torch.zeros(groups, candidates, device=DEVICE),
        normal(groups, candidates),
        {"scale": scale, "softcap": softcap},
    )
    with torch.no_grad():
        sums = reference.sequence_logps(made.exact().logprobs(backend="reference"), made.cu_seqlens)
    return made._replace(ref_logps=(sums.view(groups, candidates) + 4 * normal(groups, candidates)).float())


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def rms(got: Tensor, want: Tensor) -> float:
    return (got.double() - want).square().mean().sqrt().item()


def assert_gradients(got: tuple[Tensor, ...], want: tuple[Tensor, ...], precision: str) -> None:
    """Within the promised error; of a few numbers, rounding the exact gradient to its dtype alone may cost more."""
    for name, a, b in zip(("dH", "dW", "db"), got, want, strict=False):
        stored = relative(b.to(DTYPES[precision]), b)
        assert relative(a, b) <= max(GRADIENT[precision], 1.5 * stored), name


def assert_step(got: tuple[Tensor, ...], want: tuple[Tensor, ...], precision: str, tokens: int = 0) -> None:
    """A step against the same in float64. The drift of a log-prob adds up over the `tokens` of the longest sequence."""
    drifted = 0.0 if precision == "fp32" else tokens * drift(got[2].shape[1])
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-4, atol=1e-4 + drifted)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-6, atol=1e-4 + drifted)
    assert_gradients(got[2:], want[2:], precision)


def assert_logprobs(made: Problem, precision: str, **options) -> None:
    """Log-probs and their gradients for a random upstream against float64."""
    exact = made.exact()
    want, got = exact.logprobs(backend="reference"), made.logprobs(**options)
    assert rms(got, want.detach()) <= logprob_limit(made.hidden.shape[1], precision)
    upstream = torch.randn_like(want)
    gradients = torch.autograd.grad(got, made.parameters, upstream.float())
    assert_gradients(gradients, torch.autograd.grad(want, exact.parameters, upstream), precision)


def assert_bits(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def backend() -> ModuleType:
    """The Triton backend, for the two things that no argument of the public functions decides."""
    return importlib.import_module("exo_fast.backends.triton")


# Numbers.


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", SHAPES)
def test_logprobs_against_float64(shape: str, head: str, precision: str) -> None:
    made = problem(SHAPES[shape], precision, **HEADS[head])
    assert_logprobs(made, precision)
    with torch.no_grad():
        assert rms(made.logprobs(), made.exact().logprobs(backend="reference")) <= logprob_limit(
            SHAPES[shape].width, precision
        )


@pytest.mark.parametrize("precision", DTYPES)
def test_ignored_rows_have_no_log_prob_and_no_gradient(precision: str) -> None:
    made = problem(SHAPES["odd"], precision, bias=True)
    targets = made.targets.clone()
    targets[1::7] = -100
    made = made._replace(targets=targets)
    assert_logprobs(made, precision)
    got = made.logprobs()
    (dh, *_) = torch.autograd.grad(got.sum(), made.parameters)
    assert got[1::7].eq(0).all()
    assert dh[1::7].eq(0).all()


@pytest.mark.parametrize("boundaries", ["host", "device"])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", SHAPES)
def test_group_loss_against_float64(shape: str, head: str, precision: str, boundaries: str) -> None:
    made = problem(SHAPES[shape], precision, **HEADS[head])
    want = made.exact().step(backend="reference")
    got = (made.on_host() if boundaries == "host" else made).step()
    assert_step(got, want, precision, max(SHAPES[shape].lengths))


@pytest.mark.parametrize("loss_type", reference.LOSS_TYPES)
def test_every_loss(loss_type: str) -> None:
    made = problem(SHAPES["odd"], "fp32", bias=True)
    options = {"loss_type": loss_type, "beta_pi": 0.3}
    assert_step(made.step(**options), made.exact().step(backend="reference", **options), "fp32")


@pytest.mark.parametrize("boundaries", ["host", "device"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("precision", [*DTYPES, "bf16-chunked"])
def test_every_budget_and_schedule(
    precision: str, budget: str, boundaries: str, backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "bf16-chunked":
        monkeypatch.setattr(backend, "SCHEDULE", "chunked")
    precision = precision.removesuffix("-chunked")
    made = problem(BUDGETED, precision, bias=True, softcap=20.0)
    want = made.exact().step(backend="reference")
    now = made.on_host() if boundaries == "host" else made
    assert_step(now.step(memory_budget=BUDGETS[budget]), want, precision)
    assert_logprobs(made, precision, memory_budget=BUDGETS[budget])


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (True, False, True)], ids=str)
def test_frozen_parts(trained: tuple[bool, ...], precision: str) -> None:
    made = problem(SHAPES["odd"], precision, bias=True)
    exact = made.exact()
    for some in (made, exact):
        for parameter, train in zip(some.parameters, trained, strict=True):
            parameter.requires_grad_(train)
    for call in ("loss", "logprobs"):
        got, want = getattr(made, call)(), getattr(exact, call)(backend="reference")
        got, want = (x[0] if call == "loss" else x.sum() for x in (got, want))
        leaves, exact_leaves = ([p for p in some.parameters if p.requires_grad] for some in (made, exact))
        assert_gradients(torch.autograd.grad(got, leaves), torch.autograd.grad(want, exact_leaves), precision)


def test_strided_operands() -> None:
    """Rows that start anywhere, and a head stored the other way round: neither is what TMA can read."""
    made = problem(SHAPES["odd"])
    hidden, weight = made.hidden.detach(), made.weight.detach()
    wide = hidden.new_zeros(len(hidden), 83)
    wide[:, 3:] = hidden
    strided = made._replace(hidden=wide[:, 3:].requires_grad_(), weight=weight.T.contiguous().T.requires_grad_())
    assert_step(strided.step(), made.exact().step(backend="reference"), "bf16")
    assert_logprobs(strided, "bf16")


@pytest.mark.parametrize("precision", DTYPES)
def test_logits_of_ten_thousand(precision: str) -> None:
    """Whole numbers, so that every logit is exact in float32; among them a row whose target has probability 1."""
    g = torch.Generator(DEVICE).manual_seed(0)
    made = problem(Shape((40, 60), 2, 64, 1000), precision)
    with torch.no_grad():
        made.hidden.copy_(torch.randint(-64, 65, made.hidden.shape, generator=g, device=DEVICE))
        made.weight.copy_(torch.randint(-32, 33, made.weight.shape, generator=g, device=DEVICE))
        made.hidden[0] = 100 * made.weight[made.targets[0]].sign()
    exact = made.exact()
    want = exact.logprobs(backend="reference")
    assert want.min() < -1e4
    assert want[0] > -1e-9
    got = made.logprobs()
    torch.testing.assert_close(got.double(), want.detach(), rtol=1e-6, atol=1e-5)
    upstream = torch.randn_like(want)
    gradients = torch.autograd.grad(got, made.parameters, upstream.float())
    assert_gradients(gradients, torch.autograd.grad(want, exact.parameters, upstream), precision)
    assert all(bool(t.isfinite().all()) for t in made.step())


@pytest.mark.parametrize("largest", likely_tokens.LOGITS)
@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("precision", [*DTYPES, "bf16-chunked"])
def test_likely_tokens(
    precision: str, budget: int | None, largest: float, backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes, of which the second may take its logits from another product than the first took its sums."""
    if precision == "bf16-chunked":
        monkeypatch.setattr(backend, "SCHEDULE", "chunked")
    dtype = DTYPES[precision.removesuffix("-chunked")]
    hidden, weight, targets = (t.to(DEVICE) for t in likely_tokens.problem(dtype, largest))
    targets = torch.where(likely_tokens.likely_rows(targets, hidden, weight), targets, -100)
    upstream = torch.linspace(0.5, 2, len(targets), device=DEVICE) * (targets >= 0)
    made = [t.requires_grad_() for t in (hidden, weight)]
    logps = linear_logprobs(*made, targets, memory_budget=budget, backend="triton")
    want = likely_tokens.exact(hidden.detach(), weight.detach(), targets.clamp(min=0), upstream)
    for got, exact in zip(torch.autograd.grad(logps, made, upstream), want, strict=True):
        assert relative(got, exact) <= likely_tokens.limit(dtype, largest)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_without_the_librarys_products(precision: str, budget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build whose library does not multiply half precision into float32 stays inside the same budget."""
    monkeypatch.setattr(products, "library_products", lambda device, dtype: products.NONE)
    made = problem(BUDGETED, precision, bias=True, softcap=20.0)
    assert_step(made.on_host().step(memory_budget=BUDGETS[budget]), made.exact().step(backend="reference"), precision)
    assert_logprobs(made, precision, memory_budget=BUDGETS[budget])


def test_auto_is_triton_but_for_float64() -> None:
    made = problem(SHAPES["odd"])
    assert_bits(made.step(backend="auto"), made.step())
    exact = made.exact()
    assert relative(exact.logprobs(backend="auto"), exact.logprobs(backend="reference")) < 1e-12


def test_autocast() -> None:
    made = problem(SHAPES["odd"], "fp32")
    rounded = made._replace(hidden=made.hidden.bfloat16(), weight=made.weight.bfloat16())
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        got = made.step()
    assert got[2].dtype == got[3].dtype == torch.float32
    assert_step(got, rounded.exact().step(backend="reference"), "bf16")


# Every configuration that tuning may choose.


def configurations() -> list:
    """Return (kernel, dtype, configuration) for the device that is here, or for an H100 without a GPU."""
    target = of_device(DEVICE) if GPU else TARGETS["sm_90"]
    found = []
    for kernel, precision in itertools.product(KERNELS, DTYPES):
        for config in importlib.import_module(f"exo_fast.kernels.{kernel}").configs(target, precision):
            found.append(pytest.param(kernel, precision, config, id=f"{kernel}-{precision}-{config}".replace(" ", "-")))
    return found


@pytest.mark.parametrize(("kernel", "precision", "config"), configurations())
def test_every_configuration(
    kernel: str, precision: str, config: Config, backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tuning space of `group_loss`, which nothing tunes, is in tests/kernels/test_group_loss.py."""
    shape = SHAPES["no-tma"] if kernel == "linear_logprobs_backward" else SHAPES["odd"]
    made = problem(shape, precision, bias=True, softcap=20.0)
    monkeypatch.setitem(backend.configured, (kernel, of_device(DEVICE).name, precision, shape.width), config)
    launched = []

    def launch(launched_kernel, grid, launched_config, **arguments) -> None:
        launched.append((launched_kernel.__name__, launched_config))
        original(launched_kernel, grid, launched_config, **arguments)

    original = backend.launch
    monkeypatch.setattr(backend, "launch", launch)
    exact = made.exact()
    want = exact.step(backend="reference")
    for schedule in ("kept", "chunked", "fused"):
        monkeypatch.setattr(backend, "SCHEDULE", schedule)
        assert_step(made.step(), want, precision)
        assert_logprobs(made, precision)
        frozen = made._replace(weight=made.weight.detach(), bias=made.bias.detach())
        (dh,) = torch.autograd.grad(frozen.logprobs().sum(), frozen.hidden)
        (want_dh,) = torch.autograd.grad(exact.logprobs(backend="reference").sum(), exact.hidden)
        assert_gradients((dh,), (want_dh,), precision)
    assert (kernel, config) in launched


# The same bits, whatever happens around a call.


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("precision", DTYPES)
def test_the_same_bits_every_time(precision: str, budget: str) -> None:
    made = problem(BUDGETED, precision, bias=True)
    options = {"memory_budget": BUDGETS[budget]}
    first = made.step(**options)
    logps = made.logprobs(**options)
    gradients = torch.autograd.grad(logps.sum(), made.parameters)
    for _ in range(3):
        assert_bits(made.step(**options), first)
        again = made.logprobs(**options)
        assert_bits((again, *torch.autograd.grad(again.sum(), made.parameters)), (logps, *gradients))


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("waiting_is_an_error")
@pytest.mark.parametrize("boundaries", ["host", "device"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("precision", DTYPES)
def test_nothing_waits_for_the_device(precision: str, budget: str, boundaries: str) -> None:
    made = problem(BUDGETED, precision, bias=True)
    made = made._replace(cu_seqlens=made.cu_seqlens.cpu()) if boundaries == "host" else made
    options = {"memory_budget": BUDGETS[budget]}

    def work() -> tuple[Tensor, ...]:
        logps = made.logprobs(**options)
        gradients = torch.autograd.grad(logps.sum(), made.parameters)
        with torch.no_grad():
            alone = made.logprobs(**options)
        return logps, *gradients, alone, *made.step(**options)

    want = work()  # compiles, and asks what the libraries can do
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    got = work()
    torch.cuda.set_sync_debug_mode("default")
    assert_bits(got, want)


@pytest.mark.parametrize("boundaries", ["host", "device"])
@pytest.mark.parametrize("precision", DTYPES)
def test_cuda_graph_replays_with_other_inputs(precision: str, boundaries: str) -> None:
    made, other = problem(BUDGETED, precision, seed=0), problem(BUDGETED, precision, seed=1)
    if boundaries == "host":
        made, other = made.on_host(), other.on_host()
    want = other.step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            made.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = made.step()
    with torch.no_grad():
        for name in ("hidden", "weight", "targets", "ref_logps", "rewards"):
            getattr(made, name).copy_(getattr(other, name))
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert_bits(captured, want)


def test_work_is_queued_on_the_current_stream() -> None:
    """The inputs are made on another stream, behind work that takes long: a launch elsewhere would read them early."""
    made = problem(SHAPES["unaligned-vocabulary"])
    want = made.step()
    late = [torch.zeros_like(t) for t in made.parameters]
    busy = torch.randn(8192, 8192, device=DEVICE)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(20):
            busy = busy @ busy.clamp(-1e-3, 1e-3)
        with torch.no_grad():
            for a, b in zip(late, made.parameters, strict=True):
                a.copy_(b)
        got = made._replace(hidden=late[0].requires_grad_(), weight=late[1].requires_grad_()).step()
    stream.synchronize()
    assert_bits(got, want)


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    first = problem(SHAPES["odd"], bias=True)
    moved = [t.detach().to("cuda:1").requires_grad_() for t in first.parameters]
    got = Problem(*moved, *(t.to("cuda:1") for t in first[3:7]), first.head).step()
    assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in got)
    assert_bits(tuple(t.to(DEVICE) for t in got), first.step())


def test_compiled_without_a_graph_break() -> None:
    made = problem(SHAPES["odd"], bias=True)

    def both(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        loss, _ = linear_group_loss(
            hidden, weight, made.targets, made.cu_seqlens, made.ref_logps, made.rewards, bias=bias,
            loss_type="exo-rw", backend="triton",
        )  # fmt: skip
        return loss + linear_logprobs(hidden, weight, made.targets, bias=bias, backend="triton").mean()

    got, want = torch.compile(both, fullgraph=True)(*made.parameters), both(*made.parameters)
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(x, made.parameters) for x in (got, want)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wrong", ["targets[3] = 1000", "cu_seqlens[1] = 200", "rewards[0, 1] = float('nan')"])
def test_wrong_values_fail_where_they_are(wrong: str) -> None:
    """Run in a process of its own: a failed assertion on the device leaves nothing usable behind."""
    code = f"""
import torch
from exo_fast.loss import linear_group_loss
hidden, weight = torch.randn(100, 64, device="cuda"), torch.randn(1000, 64, device="cuda")
targets, cu_seqlens = torch.zeros(100, dtype=torch.long, device="cuda"), torch.tensor([0, 50, 100], device="cuda")
ref_logps, rewards = torch.zeros(1, 2, device="cuda"), torch.zeros(1, 2, device="cuda")
{wrong}
linear_group_loss(hidden, weight, targets, cu_seqlens, ref_logps, rewards, loss_type="exo-rw")
torch.cuda.synchronize()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "Assertion" in result.stderr
    assert wrong.split("[")[0] in result.stderr


# Memory.


def added_by(work) -> int:
    """Bytes that a second call adds to what is allocated before it; the first compiles, and makes the workspaces of
    the library products."""
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("boundaries", ["host", "device"])
@pytest.mark.parametrize("budget", [None, 128 * MIB], ids=["default", "128MiB"])
@pytest.mark.parametrize("precision", [*DTYPES, "bf16-own-products", "fp16-own-products"])
def test_peak_memory_is_the_budget_and_the_gradients(
    precision: str, budget: int | None, boundaries: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision.endswith("-own-products"):
        monkeypatch.setattr(products, "library_products", lambda device, dtype: products.NONE)
    precision = precision.removesuffix("-own-products")
    made = problem(Shape((1500, 700, 1000, 896), 2, 512, 65536), precision)
    made = made.on_host() if boundaries == "host" else made
    size, rows, head = made.hidden.element_size(), made.hidden.numel(), made.weight.numel()
    # dW in float32 and, while it is rounded, in the head's dtype; dH, and products of (N, D) in float32 on the way
    gradients = (4 + size) * head + (size + 3 * 4) * rows
    default = tuned.SCRATCH.budget(torch.cuda.get_device_properties(DEVICE).total_memory)
    allowed = (budget or default) + gradients + 16 * MIB
    assert added_by(lambda: made.step(memory_budget=budget)) <= allowed
    two_pass = added_by(lambda: torch.autograd.grad(made.logprobs(memory_budget=budget).sum(), made.parameters))
    assert two_pass <= allowed
    with torch.no_grad():
        assert added_by(lambda: made.logprobs(memory_budget=budget)) <= 16 * MIB, "log-probs alone hold no logits"


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_offsets_past_two_billion(precision: str) -> None:
    """A chunk of more than 2³¹ elements: what its last rows hold is compared."""
    n, width, vocab, budget = 16_896, 64, 131_072, 12 * 2**30
    if torch.cuda.mem_get_info()[0] < 2 * budget:
        pytest.skip(f"needs {2 * budget / 2**30:.0f} GiB of free device memory")
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden, weight = (
        (torch.randn(size, width, generator=g, device=DEVICE) * spread).to(DTYPES[precision]).requires_grad_()
        for size, spread in ((n, 1), (vocab, 0.25))
    )
    targets = torch.randint(vocab, (n,), generator=g, device=DEVICE)
    last = slice(n - 64, n)
    exact = hidden[last].detach().double().requires_grad_()
    want = reference.linear_logprobs(exact, weight.detach().double(), targets[last])
    (want_gradient,) = torch.autograd.grad(want.sum(), exact)

    logps = linear_logprobs(hidden, weight, targets, backend="triton", memory_budget=budget)
    assert rms(logps[last], want.detach()) <= logprob_limit(width, precision)
    dh, _ = torch.autograd.grad(logps.sum(), (hidden, weight))
    assert_gradients((dh[last],), (want_gradient,), precision)

    cu_seqlens, rewards = torch.tensor([0, n - 512, n]), torch.tensor([[0.0, 1.0]], device=DEVICE)
    sums = reference.sequence_logps(logps.detach(), cu_seqlens.to(DEVICE)).view(1, 2)
    ref_logps = sums + torch.tensor([[3.0, -3.0]], device=DEVICE)
    made = Problem(hidden, weight, None, targets, cu_seqlens, ref_logps, rewards, {})
    _, policy_logps, dh, _ = made.step(memory_budget=budget)
    _, coefficients = losses_and_coefficients(
        policy_logps.double(), ref_logps.double(), rewards.double(), LossOptions("exo-rw", beta_r=1.0),
    )  # fmt: skip
    assert_gradients((dh[last],), (coefficients[0, 1] * want_gradient,), precision)
