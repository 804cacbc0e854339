"""Attention in parts against the dense mask: outputs, gradients, what is not covered, and whole models."""

import random

import families
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from exo_fast.backends import attention
from exo_fast.backends.attention import SharedPromptMask, Span, packed_attention, spans, worthwhile
from exo_fast.head import final_hidden
from exo_fast.layout import Group, MaskPlan, Packed, check_sharing, model_inputs, pack, plan_mask
from exo_fast.masks import additive_mask, sees

PLAIN = MaskPlan("llama", share=True)
sdpa = nn.functional.scaled_dot_product_attention


def make_groups(*shapes: tuple[int, list[int]]) -> list[Group]:
    rng = random.Random(0)
    tokens = lambda count: [rng.randrange(3, 61) for _ in range(count)]  # noqa: E731
    return [Group(tokens(prompt), [tokens(length) for length in lengths]) for prompt, lengths in shapes]


LAYOUTS = {
    "one candidate": ([(7, [5])], None),
    "K=2": ([(9, [7, 3])], None),
    "one-token completions": ([(6, [1, 1, 1]), (1, [1, 4, 1])], None),
    "equal lengths": ([(33, [17, 17, 17, 17])], None),
    "runs of equal lengths": ([(5, [3, 8, 8, 2, 2, 2, 8])], None),
    "K=16": ([(19, [*range(1, 17)])], None),
    "groups in a row, padding": ([(9, [7, 3]), (1, [12, 1, 5]), (6, [2, 9, 4, 11]), (4, [1, 1]), (2, [3, 3])], 48),
    "rows": ([(40, [33, 31, 31]), (64, [65, 1]), (37, [70])], 140),
}


@pytest.fixture(params=LAYOUTS)
def packed(request: pytest.FixtureRequest) -> Packed:
    shapes, row_length = LAYOUTS[request.param]
    return pack(make_groups(*shapes), row_length=row_length)


def dense_mask(packed: Packed, dtype: torch.dtype) -> Tensor:
    segments = (packed.group_ids, packed.candidate_ids, packed.position_ids)
    return additive_mask(sees(*segments), packed.input_ids.shape, dtype, "cpu")


def mask_of(packed: Packed, dtype: torch.dtype) -> SharedPromptMask:
    rows = spans(packed.group_ids, packed.candidate_ids)
    return SharedPromptMask(rows, packed.input_ids.shape, dtype, lambda: dense_mask(packed, dtype))


def random_qkv(packed: Packed, dtype: torch.dtype, heads: int = 3, size: int = 8) -> list[Tensor]:
    """Queries, keys, values, and a gradient of the output that is 0 on padding, as a model's is."""
    generator = torch.Generator().manual_seed(0)
    shape = (*packed.input_ids.shape, heads, size)
    q, k, v, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).transpose(1, 2) for _ in range(4))
    grad = grad * (packed.group_ids >= 0)[:, None, :, None]
    return [t.to(dtype) for t in (q * 2, k, v, grad)]


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores + mask).softmax(-1) @ v


def with_gradients(function, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = function(*leaves)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def on_tokens(packed: Packed, tensors: list[Tensor]) -> list[Tensor]:
    """The rows' tokens without padding, where the dense mask gives something and the parts give 0."""
    keep = packed.group_ids >= 0
    return [t.transpose(1, 2)[keep] for t in tensors]


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_output_and_gradients_are_those_of_the_dense_mask(
    packed: Packed, dtype: torch.dtype, tolerance: float, scale: float | None
):
    q, k, v, grad = random_qkv(packed, dtype)
    rows = spans(packed.group_ids, packed.candidate_ids)
    found = with_gradients(lambda q, k, v: packed_attention(q, k, v, rows, scale), q, k, v, grad)
    mask = dense_mask(packed, torch.float64)
    wide = [t.double() for t in (q, k, v, grad)]
    expected = with_gradients(lambda q, k, v: eager(q, k, v, mask, scale), *wide)
    for f, e in zip(on_tokens(packed, found), on_tokens(packed, expected), strict=True):
        assert error(f, e) < tolerance
    padding = packed.group_ids < 0
    assert all((t.transpose(1, 2)[padding] == 0).all() for t in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_with_the_dense_mask(packed: Packed, dtype: torch.dtype):
    q, k, v, grad = random_qkv(packed, dtype)
    expected = with_gradients(
        lambda q, k, v: eager(q, k, v, dense_mask(packed, torch.float64), None), *(t.double() for t in (q, k, v, grad))
    )
    mask = mask_of(packed, dtype)
    found = with_gradients(lambda q, k, v: sdpa(q, k, v, attn_mask=mask), q, k, v, grad)
    dense = with_gradients(lambda q, k, v: sdpa(q, k, v, attn_mask=mask.dense()), q, k, v, grad)
    ulp = torch.finfo(dtype).eps
    for f, d, e in zip(*(on_tokens(packed, tensors) for tensors in (found, dense, expected)), strict=True):
        assert f.dtype == dtype
        assert error(f, e) < 1.5 * error(d, e) + ulp


def test_long_rows_in_half_precision():
    """Enough queries for the kernel to be given them in bf16 in backward."""
    packed = pack(make_groups((attention.WIDE_STEPS - 20, [30, 30, 790])))
    q, k, v, grad = random_qkv(packed, torch.bfloat16, heads=1)
    mask = mask_of(packed, torch.bfloat16)
    found = with_gradients(lambda q, k, v: sdpa(q, k, v, attn_mask=mask), q, k, v, grad)
    expected = with_gradients(
        lambda q, k, v: eager(q, k, v, dense_mask(packed, torch.float64), None), *(t.double() for t in (q, k, v, grad))
    )
    assert all(error(f, e) < 1e-2 for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_twice(dtype: torch.dtype):
    packed = pack(make_groups(*LAYOUTS["rows"][0]), row_length=LAYOUTS["rows"][1])
    q, k, v, grad = random_qkv(packed, dtype)
    first, second = (
        with_gradients(lambda q, k, v: sdpa(q, k, v, attn_mask=mask_of(packed, dtype)), q, k, v, grad) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_any_strides():
    """Layers give views with heads and tokens in either order, and a sum gives an expanded gradient."""
    packed = pack(make_groups((9, [7, 3, 3])))
    q, k, v, _ = random_qkv(packed, torch.float64)
    rows = spans(packed.group_ids, packed.candidate_ids)
    expected = with_gradients(lambda *t: packed_attention(*t, rows, None), q, k, v, torch.ones_like(q))
    strided = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    leaves = [t.requires_grad_() for t in strided]
    out = packed_attention(*leaves, rows, None)
    out.sum().backward()
    found = [out.detach(), *(leaf.grad for leaf in leaves)]
    assert all(error(f, e) < 1e-13 for f, e in zip(found, expected, strict=True))


# --- which rows, and what is not covered ------------------------------------------------------------------------------


def test_spans():
    packed = pack(make_groups((3, [2, 1]), (2, [4])), row_length=8)
    assert spans(packed.group_ids, packed.candidate_ids) == (Span(0, 0, 3, (2, 1)), Span(1, 0, 2, (4,)))
    groups = torch.tensor([[-1, 5, 5, 5, -1, 7, 7, -1]])
    candidates = torch.tensor([[-1, 0, 1, 2, -1, 0, 0, -1]])
    assert spans(groups, candidates) == (Span(0, 1, 1, (1, 1)), Span(0, 5, 2, ()))


@pytest.mark.parametrize(
    ("groups", "candidates"),
    [
        ([0, 0, 0], [1, 1, 2]),  # no prompt
        ([0, 0, 0], [0, 1, 0]),  # a prompt in two pieces
        ([0, 0, 0, 0], [0, 1, 2, 1]),  # a candidate in two pieces
        ([0, 0, 1, 1, 0, 0], [0, 1, 0, 1, 0, 1]),  # a group in two pieces
    ],
)
def test_rows_in_another_order_have_no_spans(groups: list[int], candidates: list[int]):
    assert spans(torch.tensor([groups]), torch.tensor([candidates])) is None
    count = len(groups)
    ids = torch.tensor([groups]), torch.tensor([candidates])
    packed = Packed(torch.zeros(1, count).long(), torch.arange(count)[None], *ids, *[torch.zeros(0)] * 3, True)
    mask = model_inputs(packed, PLAIN, dtype=torch.float32, device="cpu", attn_implementation="sdpa")["attention_mask"]
    assert type(mask) is Tensor


def inputs(packed: Packed, plan: MaskPlan, implementation: str = "sdpa") -> dict:
    return model_inputs(packed, plan, dtype=torch.float32, device="cpu", attn_implementation=implementation)


def test_parts_only_where_they_save_enough():
    few, many = pack(make_groups((48, [16, 16]))), pack(make_groups((48, [16] * 4)))
    assert type(inputs(few, PLAIN)["attention_mask"]) is Tensor
    assert type(inputs(many, PLAIN)["attention_mask"]) is SharedPromptMask
    assert type(inputs(many, PLAIN, "eager")["attention_mask"]) is Tensor
    assert not worthwhile((Span(0, 0, 64, (64,)),), torch.Size([1, 128]))
    assert worthwhile((Span(0, 0, 64, (64,)), Span(0, 128, 64, (64,))), torch.Size([1, 256]))


def test_a_window_keeps_the_dense_mask_unless_it_covers_every_text():
    packed = pack(make_groups((20, [10, 12, 12, 12])))
    for window, parts in ((31, False), (32, True), (33, True)):
        plan = MaskPlan("x", True, kind="by_layer", window=window, layer_types=("full_attention", "sliding_attention"))
        masks = inputs(packed, plan)["attention_mask"]
        assert type(masks["full_attention"]) is SharedPromptMask
        assert (type(masks["sliding_attention"]) is SharedPromptMask) == parts
        narrow = sees(packed.group_ids, packed.candidate_ids, packed.position_ids, window)
        expected = additive_mask(narrow, packed.input_ids.shape, torch.float32, "cpu")
        assert torch.equal(masks["sliding_attention"], expected)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count calls of packed_attention."""
    calls = []
    monkeypatch.setattr(attention, "packed_attention", lambda *args: calls.append(1) or packed_attention(*args))
    return calls


def test_anything_but_attention_gets_the_values(runs: list[int]):
    packed = pack(make_groups((9, [7, 3]), (6, [2, 9, 4])), row_length=30)
    mask, dense = mask_of(packed, torch.float32), dense_mask(packed, torch.float32)
    assert (mask.shape, mask.dtype, mask.device, mask.ndim) == (dense.shape, dense.dtype, dense.device, 4)
    for operation in (
        lambda m: m + 1,
        lambda m: 1 + m,
        lambda m: m[:, :, :, :10],
        lambda m: m.to(torch.float64),
        lambda m: m == 0,
        lambda m: m.clone(),
        lambda m: torch.cat([m, m]),
        lambda m: torch.zeros_like(dense).add_(m),
        lambda m: m.numpy(),
    ):
        found, expected = operation(mask), operation(dense)
        assert type(found) is type(expected)
        assert (found == expected).all()
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.equal(mask + 0, dense)
    q, k, v, _ = random_qkv(packed, torch.float32)
    assert error(eager(q, k, v, mask, None), eager(q, k, v, dense, None)) == 0
    assert runs == []


def test_attention_that_the_parts_do_not_cover(runs: list[int]):
    packed = pack(make_groups((9, [7, 3]), (6, [2, 9, 4])), row_length=30)
    mask, dense = mask_of(packed, torch.float32), dense_mask(packed, torch.float32)
    q, k, v, _ = random_qkv(packed, torch.float32)

    def same(q: Tensor, k: Tensor, v: Tensor, **options) -> None:
        torch.manual_seed(0)
        found = sdpa(q, k, v, attn_mask=mask, **options)
        torch.manual_seed(0)
        assert torch.equal(found, sdpa(q, k, v, attn_mask=dense, **options))

    same(q, k, v, dropout_p=0.5)
    same(q, k, v[..., :4])
    same(q[:, :1], k[:, :1], v[:, :1].expand(-1, 1, -1, -1).to(torch.float32)[..., :2])
    with sdpa_kernel(SDPBackend.MATH):
        same(q, k, v)
    assert runs == []
    sdpa(q, k, v, mask)  # and by position, which they do
    assert runs == [1]


def test_fewer_key_heads_and_autocast(runs: list[int]):
    packed = pack(make_groups((9, [7, 3]), (6, [2, 9, 4])), row_length=30)
    q, k, v, _ = random_qkv(packed, torch.float32, heads=6)
    k, v = k[:, :2], v[:, :2]
    keep = packed.group_ids >= 0
    mask, dense = mask_of(packed, torch.float32), dense_mask(packed, torch.float32)
    found, expected = (sdpa(q, k, v, attn_mask=m, enable_gqa=True).transpose(1, 2)[keep] for m in (mask, dense))
    assert error(found, expected) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        found = sdpa(q, k, v, attn_mask=mask_of(packed, torch.bfloat16), enable_gqa=True).transpose(1, 2)[keep]
    assert found.dtype == torch.bfloat16
    assert error(found, expected) < 2e-2
    assert len(runs) == 2


# --- whole models -----------------------------------------------------------------------------------------------------

GROUPS = make_groups((9, [7, 3]), (1, [12, 1, 5]), (6, [2, 9, 4, 11]), (4, [1, 1]), (2, [3, 3, 3]))


def hidden_and_gradients(model: nn.Module, packed: Packed, implementation: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states that predict, and gradients of a weighted sum of them."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    found = final_hidden(model, **inputs(packed, plan_mask(model.config), implementation)).flatten(0, 1)[packed.source]
    (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum().backward()
    return found.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "checkpointed", "reentrant"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3-window", "gpt2", "gemma3", "falcon", "opt"])
def test_models(name: str, checkpointing: bool | None, runs: list[int]):
    model = families.tiny_model(name)
    for module in model.modules():
        for rate in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    packed = pack(GROUPS, row_length=48)
    expected, expected_gradients = hidden_and_gradients(model, packed, "eager")
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
        model.train()
    found, gradients = hidden_and_gradients(model, packed, "sdpa")
    covered_layers = {"qwen3-window": 1, "gemma3": 1, "falcon": 0}.get(name, 2)  # falcon broadcasts its only key head
    assert len(runs) == covered_layers * (1 if checkpointing is None else 2)
    assert error(found, expected) < 1e-5
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    for parameter, gradient in expected_gradients.items():
        assert (gradients[parameter] - gradient).abs().max() < 1e-5 * largest, parameter


def test_check_sharing_sees_the_parts(runs: list[int], monkeypatch: pytest.MonkeyPatch):
    model = families.tiny_model("llama")
    assert check_sharing(model, GROUPS, PLAIN).ok
    assert runs
    wrong = lambda q, k, v, rows, scale: packed_attention(q, k, v, rows, scale).roll(1, 2)  # noqa: E731
    monkeypatch.setattr(attention, "packed_attention", wrong)
    assert not check_sharing(model, GROUPS, PLAIN).ok
