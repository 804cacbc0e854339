"""The public functions in graphs: torch.compile, make_fx and torch.export see one exo_fast operator and no break."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from exo_fast import ops
from exo_fast.logprobs import linear_logprobs
from exo_fast.loss import GroupLoss, LinearGroupLoss, group_loss, linear_group_loss

N, D, V, GROUPS, CANDIDATES = 11, 8, 19, 2, 3
LOSS = ("exo-pref", 0.3, 0.7, 0.01)  # loss_type, beta_pi, beta_r, label_smoothing
HEAD = (0.7, 3.0, None)  # scale, softcap, memory_budget


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def device_of(backend: str) -> str:
    """Triton's interpreter runs where there is no GPU."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def problem(device: str = "cpu", dtype: torch.dtype = torch.float32, grad: bool = True) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype).requires_grad_(grad)

    return {
        "hidden": leaf(N, D),
        "weight": leaf(V, D),
        "bias": leaf(V),
        "targets": torch.randint(V, (N,), generator=g).to(device),
        "cu_seqlens": torch.tensor([0, 1, 4, 5, 7, 10, N], device=device),
        "ref_logps": (torch.randn(GROUPS, CANDIDATES, generator=g) * 3 - 10).to(device),
        "rewards": torch.randn(GROUPS, CANDIDATES, generator=g).to(device),
    }


def fake_problem(device: str, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> dict[str, Tensor]:
    """The same shapes without values; inside a FakeTensorMode, where a CUDA tensor needs no GPU."""
    return {
        "hidden": torch.empty(N, D, device=device, dtype=dtype, requires_grad=grad),
        "weight": torch.empty(V, D, device=device, dtype=dtype, requires_grad=grad),
        "bias": torch.empty(V, device=device, dtype=torch.float32, requires_grad=grad),
        "targets": torch.empty(N, device=device, dtype=torch.int64),
        "cu_seqlens": torch.empty(GROUPS * CANDIDATES + 1, device=device, dtype=torch.int32),
        "ref_logps": torch.empty(GROUPS, CANDIDATES, device=device),
        "rewards": torch.empty(GROUPS, CANDIDATES, device=device),
    }


def leaves(made: dict[str, Tensor]) -> list[Tensor]:
    return [made[name] for name in ("hidden", "weight", "bias") if made[name].requires_grad]


def exo_nodes(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if str(node.target).startswith("exo_fast.")]


def backend_of(node: torch.fx.Node) -> str:
    return node.args[-1]


# The public functions and modules as a trainer calls them: tensors -> (scalar, …).


def group_loss_of(made: dict, backend: str) -> tuple[Tensor, ...]:
    return linear_group_loss(**made, loss_type="exo-pref", scale=0.7, softcap=3.0, backend=backend)


def group_loss_module(made: dict, backend: str) -> tuple[Tensor, ...]:
    module = LinearGroupLoss("dpo-rw", beta_pi=0.3, memory_budget=2**20, backend=backend)
    tensors = [made[name] for name in ("hidden", "weight", "targets", "cu_seqlens", "ref_logps", "rewards")]
    loss, policy_logps = module(*tensors)
    return 2.5 * loss, policy_logps


def tied_group_loss(made: dict, backend: str) -> tuple[Tensor, ...]:
    made = {**made, "rewards": torch.ones_like(made["rewards"]).tril(1)}  # two of three are tied, and all
    loss, policy_logps = linear_group_loss(**made, loss_type="dpo-pref", ties="share", backend=backend)
    given = policy_logps, made["ref_logps"], made["rewards"]
    return loss, group_loss(*given, loss_type="exo-pref", ties="share", reduction="none")


def logprobs_of(made: dict, backend: str) -> tuple[Tensor, ...]:
    logps = linear_logprobs(
        made["hidden"].view(1, N, D), made["weight"], made["targets"].view(1, N).int(), bias=made["bias"], scale=0.7,
        softcap=3.0, ignore_index=int(IGNORED), backend=backend,
    )  # fmt: skip
    return logps.square().sum(), logps


def logprobs_then_group_loss(made: dict, backend: str) -> tuple[Tensor, ...]:
    hidden = made["hidden"][: GROUPS * CANDIDATES]
    logps = linear_logprobs(hidden, made["weight"], made["targets"][: len(hidden)], backend=backend)
    options = {"loss_type": "exo-pref", "beta_pi": 0.5}
    loss = group_loss(logps.view(GROUPS, CANDIDATES), made["ref_logps"], made["rewards"], **options)
    module = GroupLoss("dpo-rw", reduction="none")
    each = module(logps.view(GROUPS, CANDIDATES), made["ref_logps"], made["rewards"])
    return loss + each.sum(), each


IGNORED = problem(grad=False)["targets"][2]
FUNCTIONS = (group_loss_of, group_loss_module, tied_group_loss, logprobs_of, logprobs_then_group_loss)


def assert_compiled_is_eager(
    function: Callable, frozen_head: bool, *, compiler: str, backend: str, dtype: torch.dtype = torch.float32
) -> None:
    made = problem(device_of(backend), dtype)
    if frozen_head:
        made["weight"], made["bias"] = made["weight"].detach(), made["bias"].detach()
    want = function(made, backend)
    got = torch.compile(function, fullgraph=True, backend=compiler)(made, backend)
    want_grads = torch.autograd.grad(want[0], leaves(made), allow_unused=True)
    got_grads = torch.autograd.grad(got[0], leaves(made), allow_unused=True)
    assert [o.requires_grad for o in got] == [o.requires_grad for o in want]
    assert [g is None for g in got_grads] == [g is None for g in want_grads]
    for a, b in zip([*got, *got_grads], [*want, *want_grads], strict=True):
        if b is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen_head", [False, True], ids=["all", "frozen-head"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_fullgraph_compile_gives_what_eager_gives(function: Callable, frozen_head: bool) -> None:
    assert_compiled_is_eager(function, frozen_head, compiler="aot_eager", backend="torch")


@pytest.mark.parametrize("function", [group_loss_of, logprobs_of], ids=lambda f: f.__name__)
def test_fullgraph_compile_through_the_triton_backend(function: Callable) -> None:
    assert_compiled_is_eager(function, False, compiler="aot_eager", backend="triton", dtype=torch.bfloat16)


def test_inductor() -> None:
    assert_compiled_is_eager(group_loss_module, False, compiler="inductor", backend="torch")


def test_autocast_compiles() -> None:
    def function(made: dict) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear_group_loss(**made, loss_type="exo-rw")[0]

    made = problem()
    want = torch.autograd.grad(function(made), leaves(made))
    got = torch.autograd.grad(torch.compile(function, fullgraph=True, backend="aot_eager")(made), leaves(made))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_new_number_of_tokens_needs_no_new_graph() -> None:
    graphs = []

    def keep_graph(module: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(module.graph)
        return module.forward

    made = problem(grad=False)
    compiled = torch.compile(linear_group_loss, fullgraph=True, dynamic=True, backend=keep_graph)
    for n in (N, N + 2, 2 * N):
        made["hidden"], made["targets"] = torch.randn(n, D), torch.randint(V, (n,))
        made["cu_seqlens"] = torch.tensor([0, 1, 4, 5, 7, 10, n])
        loss, _ = compiled(**made, loss_type="exo-rw", softcap=3.0)
        torch.testing.assert_close(loss, linear_group_loss(**made, loss_type="exo-rw", softcap=3.0)[0])
    assert len(graphs) == 1
    assert len(exo_nodes(graphs[0])) == 1


WRONG_VALUES = {
    "target": ({"targets": torch.full((N,), V)}, r"targets: ids must lie in \[0, V\)"),
    "end": ({"cu_seqlens": torch.tensor([0, 1, 4, 5, 7, 10, 12])}, "cu_seqlens must run from 0 to N"),
    "empty": ({"cu_seqlens": torch.tensor([0, 1, 1, 5, 7, 10, N])}, "cu_seqlens: a sequence has no token"),
    "nan": ({"rewards": torch.full((GROUPS, CANDIDATES), torch.nan)}, "rewards: every value must be finite"),
    "tie": ({"rewards": torch.ones(GROUPS, CANDIDATES)}, "rewards: a row has a tie for the highest reward"),
}


@pytest.fixture(scope="module")
def compiled_loss() -> Callable:
    return torch.compile(linear_group_loss, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_wrong_values_fail_in_a_graph_too(case: str, compiled_loss: Callable) -> None:
    """A graph cannot raise a ValueError: the check is a node, and fails when the values are there."""
    change, message = WRONG_VALUES[case]
    compiled_loss(**problem(grad=False), loss_type="exo-pref")
    with pytest.raises(RuntimeError, match=message):
        compiled_loss(**{**problem(grad=False), **change}, loss_type="exo-pref")


def test_eager_mode_does_not_import_the_compiler() -> None:
    code = (
        "import sys, torch; from exo_fast.logprobs import linear_logprobs;"
        "h, w = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True);"
        "linear_logprobs(h, w, torch.tensor([0, 1, 2])).sum().backward();"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", ["logprobs", "logprobs-frozen-head", "logprobs-backward", "loss", "loss-frozen-head"])
def test_opcheck(case: str, backend: str) -> None:
    made = problem(device_of(backend))
    made["targets"][3] = made["targets"][3] if case.startswith("loss") else -1
    hidden, weight, bias, targets, *groups = made.values()
    if case.endswith("frozen-head"):
        weight, bias = weight.detach(), None
    if case == "logprobs":
        torch.library.opcheck(ops.linear_logprobs, (hidden, weight, bias, targets, *HEAD, False, backend))
    elif case == "logprobs-frozen-head":
        torch.library.opcheck(ops.linear_logprobs, (hidden, weight, bias, targets, *HEAD, True, backend))
    elif case == "logprobs-backward":
        tensors = [t.detach() for t in (hidden, weight, bias, targets)]
        _, stats, _ = ops.linear_logprobs(*tensors, *HEAD, False, backend)
        grad = torch.linspace(-1, 2, N, device=hidden.device)
        need = (True, True, True)
        torch.library.opcheck(ops.linear_logprobs_backward, (*tensors, stats, grad, *HEAD, need, backend))
    else:
        need = (True, weight.requires_grad, bias is not None)
        args = (hidden, weight, bias, targets, *groups, *LOSS, *HEAD, need, backend)
        torch.library.opcheck(ops.linear_group_loss, args)


@pytest.mark.parametrize("boundaries_on", ["cuda", "cpu"])
def test_fake_cuda_tensors_go_to_the_triton_operators(boundaries_on: str) -> None:
    """No value is read on the way (a fake tensor has none), so nothing waits for a GPU."""
    with FakeTensorMode():
        made = fake_problem("cuda")
        made["cu_seqlens"] = torch.empty(GROUPS * CANDIDATES + 1, device=boundaries_on, dtype=torch.int32)
        graph = make_fx(lambda made: linear_group_loss(**made, loss_type="exo-pref"))(made).graph
        (node,) = exo_nodes(graph)
        assert str(node.target) == "exo_fast.linear_group_loss.default"
        assert backend_of(node) == "triton"
        asserted = [str(node.args[1]) for node in graph.nodes if "_assert_async" in str(node.target)]
        for _, message in WRONG_VALUES.values():
            assert any(m.startswith(message.replace("\\", "")) for m in asserted)

        (node,) = exo_nodes(make_fx(lambda m: linear_logprobs(m["hidden"], m["weight"], m["targets"]))(made).graph)
        assert str(node.target) == "exo_fast.linear_logprobs.default"
        assert backend_of(node) == "triton"
        loss, policy_logps = linear_group_loss(**made, loss_type="exo-rw")
        logps = linear_logprobs(made["hidden"], made["weight"], made["targets"])
    described = [(tuple(t.shape), t.dtype, t.device.type) for t in (loss, policy_logps, logps)]
    assert described == [(shape, torch.float32, "cuda") for shape in ((), (GROUPS, CANDIDATES), (N,))]


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_fake_cuda_tensors(strict: bool) -> None:
    with FakeTensorMode():
        made = fake_problem("cuda")
        made.pop("bias")
        exported = torch.export.export(LinearGroupLoss("exo-rw"), tuple(made.values()), strict=strict)
    (node,) = exo_nodes(exported.graph)
    assert backend_of(node) == "triton"
    loss, policy_logps = (output.meta["val"] for output in exported.graph.output_node().args[0])
    assert (tuple(loss.shape), loss.device.type) == ((), "cuda")
    assert (tuple(policy_logps.shape), policy_logps.device.type) == ((GROUPS, CANDIDATES), "cuda")


def loss_and_gradients(made: dict) -> list[Tensor]:
    loss, policy_logps = linear_group_loss(**made, loss_type="exo-rw", backend="triton")
    return [loss, policy_logps, *torch.autograd.grad(2.5 * loss, leaves(made))]


def logprobs_and_gradients(made: dict) -> list[Tensor]:
    logps = linear_logprobs(made["hidden"], made["weight"], made["targets"], bias=made["bias"], backend="triton")
    return [logps, *torch.autograd.grad(logps.sum(), leaves(made))]


@pytest.mark.parametrize(
    ("function", "names", "shapes"),
    [
        (loss_and_gradients, ["linear_group_loss"], [(), (GROUPS, CANDIDATES)]),
        (logprobs_and_gradients, ["linear_logprobs", "linear_logprobs_backward"], [(N,)]),
    ],
    ids=["loss", "logprobs"],
)
def test_forward_and_backward_with_fake_cuda_tensors(
    function: Callable, names: list[str], shapes: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd needs a CUDA build to run on fake CUDA tensors; so it is traced on fake CPU tensors, and what it wrote
    down, backward included, is run on fake CUDA ones."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with FakeTensorMode():
        module = make_fx(function)(fake_problem("cpu", grad=True))
        assert [str(n.target) for n in exo_nodes(module.graph)] == [f"exo_fast.{name}.default" for name in names]
        assert {backend_of(n) for n in exo_nodes(module.graph)} == {"triton"}
        got = module(fake_problem("cuda"))
    want = [(shape, torch.float32) for shape in shapes]
    want += [((N, D), torch.bfloat16), ((V, D), torch.bfloat16), ((V,), torch.float32)]
    assert [(tuple(t.shape), t.dtype) for t in got] == want
    assert {t.device.type for t in got} == {"cuda"}


def test_gradients_are_scaled_in_float32_and_rounded_once() -> None:
    """Meta tensors take the way of a GPU, where the factor is not looked at."""
    wide, factor = torch.empty(V, D, device="meta"), torch.empty((), device="meta")
    assert ops._scaled(wide, factor, torch.float32) is wide
    assert ops._scaled(wide, factor, torch.bfloat16).dtype == torch.bfloat16
    gradient = torch.linspace(-3, 2, V * D).bfloat16()
    want = (gradient.double() / 3).bfloat16()
    assert torch.equal(ops._scaled(gradient, torch.tensor(1 / 3), torch.bfloat16), want)
