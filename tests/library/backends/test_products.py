"""Products with float32 results: the questions to a build's library, and the kernel that multiplies if it fails."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from exo_fast import reference
from exo_fast.backends import interpreted, products
from exo_fast.backends import torch as chunked
from exo_fast.backends import triton as backend
from exo_fast.head import Head
from exo_fast.logprobs import linear_logprobs

BF16, FP16 = torch.bfloat16, torch.float16
CPU = torch.device("cpu")
interpreter = pytest.mark.skipif(not interpreted(), reason="runs in Triton's interpreter: set TRITON_INTERPRET=1")


def widening_mm(a: Tensor, b: Tensor, out_dtype: torch.dtype, out: Tensor) -> Tensor:
    return out.copy_(a.double() @ b.double())


def narrow_mm(a: Tensor, b: Tensor, out_dtype: torch.dtype, out: Tensor) -> Tensor:
    """A build that multiplies, but into the operands' dtype."""
    return out.copy_((a.double() @ b.double()).to(a.dtype))


def other_type_mm(a: Tensor, b: Tensor, out_dtype: torch.dtype, out: Tensor) -> Tensor:
    """A build that leaves `out` alone and returns another tensor."""
    return (a.double() @ b.double()).to(a.dtype)


def refusing_mm(a: Tensor, b: Tensor, out_dtype: torch.dtype, out: Tensor) -> Tensor:
    raise RuntimeError("not implemented for 'Half'")


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("mm", "right"), [(widening_mm, True), (narrow_mm, False), (other_type_mm, False), (refusing_mm, False)]
)
def test_the_library_is_asked_by_numbers(
    monkeypatch: pytest.MonkeyPatch, mm: Callable[..., Tensor], right: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(products, "_mm", lambda a, b, out: mm(a, b, torch.float32, out))
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            found = products._ask(CPU, dtype)
        finally:
            torch.set_default_dtype(torch.float32)
        assert ("mm" in found) is right


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_sums_are_asked_too(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """addmm of torch 2.9 refuses float32 sums; another build might lose the values they held."""
    monkeypatch.setattr(products, "_mm", lambda a, b, out: widening_mm(a, b, torch.float32, out))
    for addmm, right in (
        (lambda total, a, b: total.add_(a.double() @ b.double()), True),
        (lambda total, a, b: total.copy_(a.double() @ b.double()), False),
        (lambda total, a, b: total.copy_((total + a.double() @ b.double()).to(dtype)), False),
        (lambda total, a, b: refusing_mm(a, b, dtype, total), False),
    ):
        monkeypatch.setattr(products, "_addmm", addmm)
        assert ("addmm" in products._ask(CPU, dtype)) is right


def test_nothing_is_asked_twice_or_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(products, "_answers", {})
    monkeypatch.setattr(products, "_ask", lambda *key: asked.append(key) or frozenset({"mm"}))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    device = torch.device("cuda", 0)
    assert products.library_products(device, BF16) == products.NONE
    assert not asked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(2):
        assert products.library_products(device, BF16) == {"mm"}
    assert products.library_products(device, FP16) == {"mm"}
    assert asked == [(device, BF16), (device, FP16)]


@pytest.mark.parametrize("answer", [products.NONE, frozenset({"mm"})], ids=["no", "yes"])
def test_the_torch_backend_asks_too(monkeypatch: pytest.MonkeyPatch, answer: frozenset[str]) -> None:
    """The backend widens a block of the head if the library has no such product, as on a CPU."""
    monkeypatch.setattr(chunked, "library_products", lambda device, dtype: answer)
    hidden, weight = (torch.empty(rows, 8, dtype=BF16, device="meta") for rows in (4, 64))
    blocks = chunked.LogitBlocks(Head(weight), chunked.Plan.of(4, hidden, Head(weight), None), hidden)
    assert blocks.out_dtype == bool(answer)
    assert (blocks.wide_weight is None) == bool(answer)


def operands(form: str, n: int, m: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """a (n, k) and b (k, m), stored as in a step."""
    g = torch.Generator().manual_seed(n * m + k)

    def stored(rows: int, columns: int, pad: int) -> Tensor:
        """Rows inside wider ones, whose padding would spoil every result that it got into."""
        wide = torch.full((rows, columns + pad), torch.nan)
        wide[:, :columns] = torch.randn(rows, columns, generator=g)
        return wide.to(dtype)[:, :columns]

    pad = -max(n, m, k) % 16  # strides of the aligned form
    if form == "logits":
        return stored(n, k, -k % 16), stored(m, k, -k % 16).T
    if form == "hidden":
        return stored(n, k, -k % 16), stored(k, m, -m % 16)
    if form == "weight":
        return stored(k, n, -n % 16).T, stored(k, m, -m % 16)
    return stored(n, k, pad + 3), stored(m, k, 5).T  # any strides


@interpreter
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("form", ["logits", "hidden", "weight", "any"])
@pytest.mark.parametrize(("n", "m", "k"), [(1, 1, 1), (1, 131, 19), (7, 2, 64), (129, 80, 131), (200, 300, 65)])
def test_the_kernel_against_float64(form: str, n: int, m: int, k: int, dtype: torch.dtype) -> None:
    a, b = operands(form, n, m, k, dtype)
    want = a.double() @ b.double()
    limit = 1e-6 * (a.double().abs() @ b.double().abs())
    out = torch.full((n, m + 5), torch.nan)
    products.multiply(a, b, out[:, :m], add=False)
    assert ((out[:, :m] - want).abs() <= limit).all()
    products.multiply(a, b, out[:, :m], add=True)
    assert ((out[:, :m] - 2 * want).abs() <= 4 * limit).all()
    assert out[:, m:].isnan().all()


@interpreter
def test_offsets_past_two_billion() -> None:
    """Rows 2³¹ elements apart, in memory of which only the touched pages exist."""
    far, k = 2**31 + 64, 16
    a, b = (torch.randn(2, k, generator=torch.Generator().manual_seed(i)).to(BF16) for i in range(2))
    spread = torch.empty(far + k, dtype=BF16).as_strided((2, k), (far, 1)).copy_(a)
    want = a.double() @ b.T.double()
    for left, right in ((spread, b.T), (a, torch.empty(far + k, dtype=BF16).as_strided((2, k), (far, 1)).copy_(b).T)):
        out = torch.empty(2, 2)
        torch.testing.assert_close(products.multiply(left, right, out, add=False).double(), want, rtol=1e-5, atol=1e-5)


@interpreter
def test_a_step_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """All products of a step by the kernel, in every schedule that has some, and nothing widened beside them."""
    monkeypatch.setattr(backend, "MIN_ROWS", 1)
    monkeypatch.setattr(backend, "matmul", lambda a, b, out: products.multiply(a, b, out, add=False))
    monkeypatch.setattr(backend, "add_matmul", lambda total, a, b: products.multiply(a, b, total, add=True))
    g = torch.Generator().manual_seed(0)
    for dtype in (BF16, FP16):
        hidden, weight, bias = (torch.randn(*size, generator=g).to(dtype) for size in ((19, 40), (131, 40), (131,)))
        made = [t.requires_grad_() for t in (hidden, weight, bias)]
        exact = [t.detach().double().requires_grad_() for t in made]
        targets = torch.randint(131, (19,), generator=g)
        for budget in (None, 8000):
            got = linear_logprobs(*made[:2], targets, bias=made[2], memory_budget=budget, backend="triton")
            want = reference.linear_logprobs(*exact[:2], targets, bias=exact[2])
            upstream = torch.randn(19, generator=g)
            found = torch.autograd.grad(got, made, upstream)
            for a, b in zip(found, torch.autograd.grad(want, exact, upstream.double()), strict=True):
                assert (a.double() - b).norm() <= 3e-3 * b.norm()
