"""Log-probs with token statistics: against the definitions; log-probs and gradients against linear_logprobs."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from exo_fast import ops, reference
from exo_fast.backends import interpreted
from exo_fast.backends import torch as chunked
from exo_fast.head import Head
from exo_fast.logprobs import linear_logprobs
from exo_fast.statistics import OUTPUTS, TokenStatistics, linear_logprobs_with_statistics

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": -0.4},
    "softcap": {"softcap": 4.0},
    "all": {"bias": True, "scale": 1.3, "softcap": 6.0},
}
BUDGETS = {"default": None, "rows": 3000, "blocks": 1}
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not interpreted(), reason="TRITON_INTERPRET=1"))]


@pytest.fixture
def thin_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of the vocabulary, and several chunks of rows, in small problems."""
    monkeypatch.setattr(chunked, "MIN_ROWS", 1)
    monkeypatch.setattr(chunked, "BLOCK", 32)


def problem(
    *shape: int, vocab: int = 75, width: int = 6, dtype: torch.dtype = FP64, bias: bool = False, ignored: int = 0,
    grad: bool = False, **head: Any,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of the public functions. Every second target is the argmax; every `ignored`-th row is ignored."""
    g = torch.Generator().manual_seed(vocab)
    made = {name: torch.randn(*size, width, generator=g) for name, size in (("hidden", shape), ("weight", (vocab,)))}
    if bias:
        made["bias"] = torch.randn(vocab, generator=g)
    made = {name: value.to(dtype) for name, value in made.items()}
    z = reference.logits(**{name: value.double() for name, value in made.items()}, **head)
    targets = torch.randint(vocab, shape, generator=g)
    targets.view(-1)[::2] = z.view(-1, vocab)[::2].argmax(1)
    if ignored:
        targets.view(-1)[::ignored] = -100
    return {**{name: value.requires_grad_(grad) for name, value in made.items()}, "targets": targets, **head}


def parameters(made: dict[str, Any]) -> list[Tensor]:
    return [made[name] for name in ("hidden", "weight", "bias") if name in made]


def in_float64(made: dict[str, Any]) -> dict[str, Any]:
    wide = {name: made[name].detach().double() for name in ("hidden", "weight", "bias") if name in made}
    return {**made, **wide}


def assert_statistics(got: TokenStatistics, want: dict[str, Tensor], atol: float) -> None:
    for name in OUTPUTS[:3]:
        value = getattr(got, name)
        assert not value.requires_grad
        torch.testing.assert_close(value.double(), want[name].double(), rtol=1e-6, atol=atol)
    assert got.is_top1.dtype == torch.bool
    assert torch.equal(got.is_top1, want["is_top1"])


# The definition -------------------------------------------------------------------------------------------------------


def test_the_definition_of_known_distributions() -> None:
    """A uniform one, one of two equal tokens among −inf, and the plain formulas with every number written out."""
    hidden, weight = torch.ones(3, 1, dtype=FP64), torch.zeros(8, 1, dtype=FP64)
    got = reference.token_statistics(hidden, weight, torch.tensor([0, 1, -100]))
    assert got["entropy"].tolist() == pytest.approx([math.log(8), math.log(8), 0.0])
    assert got["log_sum_sq_probs"].tolist() == pytest.approx([-math.log(8), -math.log(8), 0.0])
    assert got["is_top1"].tolist() == [True, False, False]
    bias = torch.full((8,), -torch.inf, dtype=FP64)
    bias[[2, 5]] = 3.0
    got = reference.token_statistics(hidden, weight, torch.tensor([2, 5, 0]), bias=bias)
    assert got["entropy"].tolist() == pytest.approx([math.log(2)] * 3)
    assert got["log_sum_sq_probs"].tolist() == pytest.approx([-math.log(2)] * 3)
    assert got["mean_logits"].tolist() == [-math.inf] * 3
    assert got["is_top1"].tolist() == [True, False, False]

    made = problem(4, vocab=5, bias=True, scale=1.5, softcap=3.0)
    got = reference.token_statistics(**made)
    for t in range(4):
        raw = [
            sum(h * w for h, w in zip(made["hidden"][t].tolist(), row, strict=True)) + b
            for row, b in zip(made["weight"].tolist(), made["bias"].tolist(), strict=True)
        ]
        z = [1.5 * 3.0 * math.tanh(a / 3.0) for a in raw]
        total = sum(math.exp(v) for v in z)
        p = [math.exp(v) / total for v in z]
        assert float(got["entropy"][t]) == pytest.approx(-sum(v * math.log(v) for v in p), abs=1e-12)
        assert float(got["log_sum_sq_probs"][t]) == pytest.approx(math.log(sum(v * v for v in p)), abs=1e-12)
        assert float(got["mean_logits"][t]) == pytest.approx(sum(z) / 5, abs=1e-12)
        assert bool(got["is_top1"][t]) == (z.index(max(z)) == int(made["targets"][t]))


# The torch backend in float64 -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("thin_chunks")
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("ignored", [0, 3, 1], ids=["none", "some ignored", "all ignored"])
def test_against_the_definition(head: str, ignored: int, budget: int | None) -> None:
    made = problem(5, 7, ignored=ignored, **HEADS[head])
    want = reference.token_statistics(**made)
    logps, got = linear_logprobs_with_statistics(**made, memory_budget=budget)
    torch.testing.assert_close(logps, reference.linear_logprobs(**made), rtol=1e-9, atol=1e-11)
    assert_statistics(got, want, 1e-11)
    for value in (logps, *(getattr(got, name) for name in OUTPUTS)):
        assert value.shape == (5, 7)
        assert not value[made["targets"] == -100].any()


@pytest.mark.usefixtures("thin_chunks")
@pytest.mark.parametrize("vocab", [1, 7, 32, 33, 4097])
@pytest.mark.parametrize("n", [1, 11])
def test_vocabularies_and_single_rows(n: int, vocab: int) -> None:
    made = problem(n, vocab=vocab, bias=True)
    _, got = linear_logprobs_with_statistics(**made)
    assert_statistics(got, reference.token_statistics(**made), 1e-11)
    assert bool(got.is_top1[0])
    assert (got.entropy >= 0).all()


@pytest.mark.usefixtures("thin_chunks")
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("frozen_head", [False, True], ids=["all", "frozen head"])
def test_log_probs_and_gradients_are_those_of_linear_logprobs(frozen_head: bool, budget: int | None) -> None:
    made = problem(23, ignored=4, grad=True, **HEADS["all"])
    if frozen_head:
        made["weight"], made["bias"] = made["weight"].detach(), made["bias"].detach()
    leaves = [p for p in parameters(made) if p.requires_grad]
    upstream = torch.linspace(-1, 2, 23, dtype=FP64)
    want = linear_logprobs(**made, memory_budget=budget)
    got, _ = linear_logprobs_with_statistics(**made, memory_budget=budget)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    grads = [torch.autograd.grad((logps * upstream).sum(), leaves) for logps in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("thin_chunks")
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_gradcheck(budget: int | None) -> None:
    made = problem(5, vocab=40, width=3, ignored=4, grad=True, **HEADS["all"])

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        given = {**made, "hidden": hidden, "weight": weight, "bias": bias}
        return linear_logprobs_with_statistics(**given, memory_budget=budget)[0]

    assert torch.autograd.gradcheck(function, tuple(parameters(made)))
    frozen = lambda h: function(h, made["weight"].detach(), made["bias"].detach())  # noqa: E731
    assert torch.autograd.gradcheck(frozen, (made["hidden"],))


# One walk, and no more than was asked for -----------------------------------------------------------------------------


@pytest.mark.usefixtures("thin_chunks")
def test_one_product_gives_all_and_ignored_rows_cost_nothing() -> None:
    """2·N·D·V flops, of the rows that count: what the log-probs alone take."""
    made = problem(20, dtype=FP32, ignored=4)
    head, targets = Head(made["weight"], None, 1.0, None), made["targets"].masked_fill(made["targets"] < 0, -1)

    def flops(targets: Tensor, outputs: tuple[bool, ...]) -> int:
        with FlopCounterMode(display=False) as counter:
            chunked.statistics_forward(made["hidden"], head, targets, None, outputs)
        return counter.get_total_flops()

    assert flops(targets.clamp(min=0), (True,) * 4) == 2 * 20 * 6 * 75
    assert flops(targets, (True,) * 4) == flops(targets, (False,) * 4) == 2 * 15 * 6 * 75
    assert flops(torch.full_like(targets, -1), (True,) * 4) == 0


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(
    "outputs", [(), *((name,) for name in OUTPUTS), ("is_top1", "entropy")], ids=lambda names: "+".join(names) or "none"
)
def test_what_was_not_asked_for_is_none(outputs: tuple[str, ...], backend: str) -> None:
    made = problem(9, dtype=FP32, ignored=5, bias=True)
    logps, got = linear_logprobs_with_statistics(**made, outputs=outputs, backend=backend)
    all_logps, every = linear_logprobs_with_statistics(**made, backend=backend)
    torch.testing.assert_close(logps, all_logps, rtol=0, atol=1e-6)
    for name in OUTPUTS:
        if name in outputs:
            torch.testing.assert_close(getattr(got, name), getattr(every, name), rtol=0, atol=1e-6)
        else:
            assert getattr(got, name) is None


# Rounded operands, and the kernels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 4097])
def test_rounded_operands_against_float64(vocab: int, dtype: torch.dtype, backend: str) -> None:
    """Compare for the same operands: logits leave the product in float32."""
    made = problem(5, vocab=vocab, width=24, dtype=dtype, ignored=4, **HEADS["all"])
    exact = in_float64(made)
    logps, got = linear_logprobs_with_statistics(**made, backend=backend)
    assert logps.dtype == got.entropy.dtype == got.log_sum_sq_probs.dtype == got.mean_logits.dtype == FP32
    torch.testing.assert_close(logps.double(), reference.linear_logprobs(**exact), rtol=0, atol=1e-5)
    assert_statistics(got, reference.token_statistics(**exact), 1e-5)
    torch.testing.assert_close(logps, linear_logprobs(**made, backend=backend), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("frozen_head", [False, True], ids=["all", "frozen head"])
def test_gradients_of_rounded_operands(frozen_head: bool, dtype: torch.dtype, backend: str) -> None:
    made = problem(13, vocab=131, width=16, dtype=dtype, ignored=5, grad=True, **HEADS["all"])
    if frozen_head:
        made["weight"], made["bias"] = made["weight"].detach(), made["bias"].detach()
    leaves = [p for p in parameters(made) if p.requires_grad]
    both = (linear_logprobs_with_statistics(**made, backend=backend)[0], linear_logprobs(**made, backend=backend))
    upstream = torch.linspace(-1, 2, 13)
    grads = [torch.autograd.grad((logps * upstream).sum(), leaves) for logps in both]
    tolerance = {FP32: 1e-6, BF16: 8e-3, FP16: 1e-3}[dtype]  # one rounding of the result
    torch.testing.assert_close(*grads, rtol=tolerance, atol=tolerance * 0.1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", [1, 1500, 4000])
def test_small_budgets(budget: int, backend: str) -> None:
    """Compare for one row of logits, and for several."""
    made = problem(9, vocab=131, dtype=BF16, ignored=4, **HEADS["all"])
    logps, got = linear_logprobs_with_statistics(**made, memory_budget=budget, backend=backend)
    exact = in_float64(made)
    torch.testing.assert_close(logps.double(), reference.linear_logprobs(**exact), rtol=0, atol=1e-5)
    assert_statistics(got, reference.token_statistics(**exact), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_input_gives_the_same_bits(backend: str) -> None:
    made = problem(9, vocab=5000, dtype=BF16, ignored=4, **HEADS["all"])
    runs = [linear_logprobs_with_statistics(**made, backend=backend) for _ in range(2)]
    for name in OUTPUTS:
        assert torch.equal(*(getattr(statistics, name) for _, statistics in runs))
    assert torch.equal(runs[0][0], runs[1][0])


def test_bf16_products_in_tiles_have_their_gradients_by_attention() -> None:
    """Sizes at which a CPU with AMX takes `head_attention` for the second pass; elsewhere U is kept, to one end."""
    made = problem(1100, vocab=300, width=64, dtype=BF16, grad=True)
    exact = in_float64(made)
    wide = [exact[name].requires_grad_() for name in ("hidden", "weight")]
    upstream = torch.linspace(-1, 2, 1100)
    logps, got = linear_logprobs_with_statistics(**made)
    want = torch.autograd.grad((reference.linear_logprobs(**exact) * upstream.double()).sum(), wide)
    grads = torch.autograd.grad((logps * upstream).sum(), parameters(made))
    for a, b in zip(grads, want, strict=True):
        assert float((a.double() - b).norm() / b.norm()) <= 3e-3
    assert_statistics(got, reference.token_statistics(**exact), 1e-5)


# Logits at the edges --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("thin_chunks")
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(("first", "second"), [(3, 5), (3, 40), (31, 32), (0, 74)], ids=str)
def test_of_equal_logits_the_first_is_top(first: int, second: int, backend: str) -> None:
    """Equal logits in one block of the vocabulary, and in two."""
    weight = torch.randn(75, 4, generator=torch.Generator().manual_seed(0))
    hidden = torch.ones(2, 4)
    weight[[first, second]] = 5.0
    targets = torch.tensor([first, second])
    _, got = linear_logprobs_with_statistics(hidden, weight, targets, backend=backend)
    assert got.is_top1.tolist() == [True, False]


@pytest.mark.usefixtures("thin_chunks")
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_logits_of_ten_thousand(backend: str) -> None:
    """The maximum in the first block, in a later one, and shared."""
    weight, targets = torch.full((75, 3), -1e4), torch.tensor([1, 70, 40])
    weight[[1, 70, 40], [0, 1, 2]] = 1e4
    weight[60, 2] = 1e4
    logps, got = linear_logprobs_with_statistics(torch.eye(3), weight, targets, backend=backend)
    half = math.log(0.5)
    for value, want in ((logps, half), (got.entropy, -half), (got.log_sum_sq_probs, half)):
        assert value.tolist() == pytest.approx([0.0, 0.0, want], abs=1e-6)
    assert got.mean_logits.tolist() == pytest.approx([-73e4 / 75, -73e4 / 75, -71e4 / 75])
    assert got.is_top1.all()


@pytest.mark.usefixtures("thin_chunks")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ruled_out", [slice(0, 40), slice(33, 75), slice(0, 75, 2)], ids=str)
def test_tokens_ruled_out_by_a_bias_of_minus_infinity(ruled_out: slice, backend: str) -> None:
    """Whole blocks of them too. 0·−inf is 0 in an entropy; the mean is −inf, as the logits' mean is."""
    made = problem(9, dtype=FP32, bias=True)
    made["bias"][ruled_out] = -torch.inf
    allowed = made["bias"].isfinite().nonzero().squeeze(1)
    made["targets"] = allowed[torch.arange(9) % len(allowed)]
    logps, got = linear_logprobs_with_statistics(**made, backend=backend)
    exact = in_float64(made)
    torch.testing.assert_close(logps.double(), reference.linear_logprobs(**exact), rtol=0, atol=1e-5)
    assert_statistics(got, reference.token_statistics(**exact), 1e-5)
    assert (got.mean_logits == -torch.inf).all()


# The door -------------------------------------------------------------------------------------------------------------


WRONG = {
    "outputs": ({"outputs": ("entropy", "mean")}, "outputs must be some of entropy, log_sum_sq_probs, .*'mean'"),
    "a string": ({"outputs": "entropy"}, "outputs must be some of .* in a sequence; got 'entropy'"),
    "shape": ({"weight": torch.zeros(75, 5)}, "weight must be"),
    "dtype": ({"weight": torch.zeros(75, 6, dtype=BF16)}, "hidden is torch.float32 and weight is torch.bfloat16"),
    "target": ({"targets": torch.full((4,), 75)}, r"targets\[0\] .* is 75; ids must lie in \[0, 75\)"),
    "budget": ({"memory_budget": 0}, "memory_budget must be a positive number"),
    "backend": ({"backend": "cuda"}, "backend='cuda' is not known"),
    "softcap": ({"softcap": -1.0}, "softcap must be a positive number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case: str) -> None:
    change, message = WRONG[case]
    made = problem(4, dtype=FP32)
    with pytest.raises(ValueError, match=message):
        linear_logprobs_with_statistics(**{**made, **change})
    if "outputs" not in change:  # the same door
        with pytest.raises(ValueError, match=message):
            linear_logprobs(**{**made, **change})


def test_a_slice_of_the_vocabulary_is_refused(tmp_path: Any) -> None:
    from torch import distributed as dist
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    made = problem(4, dtype=FP32)
    marked = torch.nn.Parameter(made["weight"].clone())
    marked.tensor_model_parallel = True
    with pytest.raises(ValueError, match="weight is marked tensor_model_parallel, a slice of the head"):
        linear_logprobs_with_statistics(**{**made, "weight": marked})
    with pytest.raises(ValueError, match="weight is of a process_group, a slice of the head"):
        linear_logprobs_with_statistics(**made, process_group=object())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded, whole = (distribute_tensor(made["weight"], mesh, [kind]) for kind in (Shard(0), Replicate()))
        with pytest.raises(ValueError, match=r"weight is a sharded DTensor.*weight.full_tensor\(\)"):
            linear_logprobs_with_statistics(**{**made, "weight": sharded})
        logps, _ = linear_logprobs_with_statistics(**{**made, "weight": whole})
    finally:
        dist.destroy_process_group()
    assert torch.equal(logps, linear_logprobs_with_statistics(**made)[0])


def test_autocast_casts_as_for_linear_logprobs() -> None:
    made = problem(9, dtype=FP32, bias=True)
    with torch.autocast("cpu", dtype=BF16):
        logps, got = linear_logprobs_with_statistics(**made)
        want = linear_logprobs(**made)
    rounded = {**made, "hidden": made["hidden"].bfloat16(), "weight": made["weight"].bfloat16()}
    torch.testing.assert_close(logps, want, rtol=0, atol=1e-6)
    assert_statistics(got, reference.token_statistics(**in_float64(rounded)), 1e-5)


# Graphs ---------------------------------------------------------------------------------------------------------------


def trained(made: dict[str, Any], backend: str) -> tuple[Tensor, ...]:
    """Call it like a trainer: return a loss on the log-probs, and the statistics to be logged."""
    logps, statistics = linear_logprobs_with_statistics(**made, backend=backend)
    return logps.square().sum(), logps, *(getattr(statistics, name) for name in OUTPUTS)


@pytest.mark.parametrize("frozen_head", [False, True], ids=["all", "frozen head"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_fullgraph_compile_gives_what_eager_gives(backend: str, frozen_head: bool) -> None:
    torch._dynamo.reset()
    made = problem(2, 5, vocab=19, dtype=FP32, ignored=4, grad=True, **HEADS["all"])
    if frozen_head:
        made["weight"], made["bias"] = made["weight"].detach(), made["bias"].detach()
    leaves = [p for p in parameters(made) if p.requires_grad]
    want = trained(made, backend)
    got = torch.compile(trained, fullgraph=True, backend="aot_eager")(made, backend)
    assert [value.requires_grad for value in got] == [value.requires_grad for value in want]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got[0], leaves), torch.autograd.grad(want[0], leaves))


def test_a_new_number_of_tokens_needs_no_new_graph() -> None:
    torch._dynamo.reset()
    graphs = []

    def keep_graph(module: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(module.graph)
        return module.forward

    compiled = torch.compile(linear_logprobs_with_statistics, fullgraph=True, dynamic=True, backend=keep_graph)
    for n in (5, 7, 12):
        made = problem(n, vocab=19, dtype=FP32)
        logps, got = compiled(**made, outputs=("entropy",))
        want_logps, want = linear_logprobs_with_statistics(**made, outputs=("entropy",))
        torch.testing.assert_close((logps, got.entropy), (want_logps, want.entropy))
    assert len(graphs) == 1
    assert len([node for node in graphs[0].nodes if str(node.target).startswith("exo_fast.")]) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [(True,) * 4, (False, True, False, True)], ids=str)
def test_opcheck(wanted: tuple[bool, ...], backend: str) -> None:
    made = problem(11, vocab=19, dtype=FP32, bias=True, grad=True)
    targets = made["targets"].index_fill(0, torch.tensor([3]), -1)
    arguments = (made["hidden"], made["weight"], made["bias"], targets, 0.7, 3.0, None, wanted, backend)
    torch.library.opcheck(ops.linear_logprobs_with_statistics, arguments)
