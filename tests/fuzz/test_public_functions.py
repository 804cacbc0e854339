"""Arguments of every kind for what other trainers import: the numbers of the reference, or a ValueError that names one.

A call begins as a good one, and then some of its arguments are replaced. An accepted call is held against
`exo_fast.reference` in float64 with autograd, gradients too; an untouched call must be accepted.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzzing import REFUSED, fuzzed, judge
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from exo_fast import reference
from exo_fast.head import read_head
from exo_fast.layout import Group, from_padded, pack
from exo_fast.logprobs import linear_logprobs
from exo_fast.loss import GroupLoss, LinearGroupLoss, group_loss, linear_group_loss

LOSS_TYPES = st.sampled_from(reference.LOSS_TYPES)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OTHER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.bool, torch.complex64,
                torch.float8_e4m3fn, torch.float8_e5m2)  # fmt: skip
# Rounding of the inputs' products aside, sums are float32: what is left is the rounding of gradients to the dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}

NUMBERS = st.sampled_from(
    [0, 1, -1, 0.5, 2.0, 1e-3, math.nan, math.inf, -math.inf, 5e-324, 1e300, 1e-300, 10**400, 10**5000, 2**63, True]
)
NO_NUMBERS = st.sampled_from([None, "0.1", "", [0.1], (), {}, 1j, object(), b"1", torch.tensor([1.0, 2.0])])
CHOICES = [
    *reference.LOSS_TYPES,
    "auto",
    "torch",
    "reference",
    "sum",
    "none",
    "share",
    "error",
    "",
    "cuda",
    None,
    3,
    [],
    {},
    b"torch",
]
JUNK = st.sampled_from([None, "x", 3, 0.5, [1.0], [[1, 2], [3, 4]], {}, object(), math.nan, ()])


def other_dtype(tensor: Tensor) -> st.SearchStrategy[Tensor]:
    """The same values in a dtype that may or may not be taken."""
    return st.sampled_from([*DTYPES, *OTHER_DTYPES]).map(tensor.detach().to)


def other_layout(tensor: Tensor) -> st.SearchStrategy[Tensor]:
    """The same values, or as many, lying in memory in another way or not at all."""
    tensor = tensor.detach()
    ways: dict[str, Callable[[], Any]] = {
        "transposed": lambda: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor,
        "strided": lambda: torch.stack([tensor, tensor + 1], -1)[..., 0],
        "offset": lambda: torch.cat([tensor, tensor])[len(tensor) :] if tensor.dim() else tensor,
        "expanded": lambda: tensor[:1].expand(tensor.shape) if tensor.dim() else tensor,
        "sparse": lambda: tensor.to_sparse(),
        "meta": lambda: tensor.to("meta"),
        "nested": lambda: torch.nested.nested_tensor([tensor, tensor]),
        "quantised": lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8),
        "parameter": lambda: nn.Parameter(tensor.clone(), requires_grad=tensor.is_floating_point()),
    }
    return st.sampled_from(sorted(ways)).map(lambda way: ways[way]())


def other_shape(tensor: Tensor) -> st.SearchStrategy[Tensor]:
    tensor = tensor.detach()
    ways: dict[str, Callable[[], Any]] = {
        "scalar": lambda: tensor.flatten()[0] if tensor.numel() else tensor,
        "flat": lambda: tensor.flatten(),
        "row more": lambda: torch.cat([tensor, tensor[:1]]),
        "row less": lambda: tensor[:-1],
        "none": lambda: tensor[:0],
        "no column": lambda: tensor[..., :0],
        "column less": lambda: tensor[..., :-1],
        "deeper": lambda: tensor.unsqueeze(0),
        "deeper still": lambda: tensor[None, None],
    }
    return st.sampled_from(sorted(ways)).map(lambda way: ways[way]())


@st.composite
def other_values(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """One value replaced by another, or all by one."""
    changed = tensor.detach().clone().flatten()
    odd = [0, -1, 1, 2, -100, 7, 127] if not tensor.is_floating_point() else [0, 1, 50, math.nan, math.inf, -math.inf]
    if tensor.dtype in (torch.int32, torch.int64):
        odd += [torch.iinfo(tensor.dtype).max, torch.iinfo(tensor.dtype).min, 2**31 - 1]
    value = draw(st.sampled_from(odd))
    if len(changed):
        changed[slice(None) if draw(st.integers(0, 3)) == 0 else draw(st.integers(0, len(changed) - 1))] = value
    return changed.view(tensor.shape)


@st.composite
def changed(draw: st.DrawFn, arguments: dict[str, Any], fixed: tuple[str, ...] = ()) -> tuple[dict[str, Any], set[str]]:
    """Return `arguments` with zero to two of them replaced, and the names of the replaced ones."""
    arguments = dict(arguments)
    names = draw(st.sets(st.sampled_from(sorted(arguments.keys() - set(fixed))), max_size=2))
    for name in sorted(names):
        value = arguments[name]
        if isinstance(value, Tensor):
            make = draw(st.sampled_from([other_dtype, other_layout, other_shape, other_values, other_values, None]))
            arguments[name] = draw(JUNK if make is None else make(value))
        elif name in ("loss_type", "backend", "reduction", "ties"):
            arguments[name] = draw(st.sampled_from(CHOICES))
        else:
            arguments[name] = draw(NUMBERS | NO_NUMBERS)
    return arguments, names


def is_fine(value: Tensor) -> bool:
    return bool(value.isfinite().all())


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Check equality within `tolerance` of the largest value; if `expected` is NaN, `found` must not be finite."""
    found, expected = found.detach().double(), expected.detach().double()
    assert found.shape == expected.shape
    fits = expected.isfinite() & (expected.abs() < 1e30)
    assert not found[expected.isnan()].isfinite().any(), (found, expected)
    scale = expected[fits].abs().max().item() if fits.any() else 0.0
    torch.testing.assert_close(found[fits], expected[fits], rtol=tolerance, atol=tolerance * max(scale, 1.0))


def as_double(arguments: dict[str, Any], leaves: tuple[str, ...]) -> dict[str, Any]:
    """Float tensors in float64, of which `leaves` are ready for autograd."""
    doubles = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            doubles[name] = value.detach().double().requires_grad_(name in leaves)
    return doubles


@st.composite
def projections(draw: st.DrawFn) -> dict[str, Any]:
    """Good arguments of linear_group_loss."""
    groups, candidates = draw(st.integers(1, 3)), draw(st.integers(2, 3))
    lengths = draw(st.lists(st.integers(1, 4), min_size=groups * candidates, max_size=groups * candidates))
    n, d, v = sum(lengths), draw(st.integers(1, 9)), draw(st.integers(2, 12))
    dtype = draw(st.sampled_from(DTYPES))
    make = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make).to(dtype)

    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return {
        "hidden": random(n, d).requires_grad_(draw(st.booleans())),
        "weight": random(v, d).requires_grad_(draw(st.booleans())),
        "targets": torch.randint(v, (n,), generator=make, dtype=draw(st.sampled_from([torch.int32, torch.int64]))),
        "cu_seqlens": bounds.to(draw(st.sampled_from([torch.int32, torch.int64]))),
        "ref_logps": torch.randn(groups, candidates, generator=make) - 5,
        "rewards": torch.rand(groups, candidates, generator=make),
        "loss_type": draw(LOSS_TYPES),
        "beta_pi": draw(st.sampled_from([0.1, 1, 0.5])),
        "beta_r": draw(st.sampled_from([0.1, 1, 0.5])),
        "label_smoothing": draw(st.sampled_from([None, 0.1, 1e-3])),
        "bias": random(v).requires_grad_(draw(st.booleans())) if draw(st.booleans()) else None,
        "scale": draw(st.sampled_from([1.0, 0.5, -2])),
        "softcap": draw(st.sampled_from([None, 5.0, 30])),
        "memory_budget": draw(st.sampled_from([None, 1, 1000, 10**9])),
        "backend": draw(st.sampled_from(["auto", "torch", "reference"])),
    }


def gradients(output: Tensor, leaves: dict[str, Any]) -> dict[str, Tensor]:
    wanted = {n: t for n, t in leaves.items() if isinstance(t, Tensor) and t.requires_grad}
    if not output.requires_grad or not wanted:
        return {}
    found = torch.autograd.grad(output, list(wanted.values()), allow_unused=True)
    return {name: g for name, g in zip(wanted, found, strict=True) if g is not None}


LEAVES = ("hidden", "weight", "bias")


@fuzzed(300)
@given(data=st.data(), good=projections(), as_module=st.booleans())
def test_linear_group_loss(data: st.DataObject, good: dict[str, Any], as_module: bool) -> None:
    arguments, names = data.draw(changed({**good, "ties": data.draw(st.sampled_from(["error", "share"]))}))

    def call() -> tuple[Tensor, Tensor]:
        if not as_module:
            return linear_group_loss(**arguments)
        tensors = ("hidden", "weight", "targets", "cu_seqlens", "ref_logps", "rewards", "bias")
        module = LinearGroupLoss(**{name: value for name, value in arguments.items() if name not in tensors})
        return module(**{name: arguments[name] for name in tensors})

    found = judge(call, ValueError, names)
    if found is REFUSED:
        return
    doubles = as_double(arguments, LEAVES)
    for name in ("memory_budget", "backend", "ties"):
        doubles.pop(name)
    if doubles["label_smoothing"] is None:
        doubles["label_smoothing"] = reference.default_label_smoothing(doubles["loss_type"])
    expected = reference.linear_group_loss(**doubles)
    tolerance = TOLERANCE[arguments["hidden"].dtype]
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs, tolerance)
    if all(is_fine(value) for value in expected):
        right = gradients(expected[0], {name: doubles[name] for name in LEAVES})
        for name, gradient in gradients(found[0], {name: arguments[name] for name in LEAVES}).items():
            close(gradient, right[name], 2 * tolerance)


@fuzzed(300)
@given(data=st.data(), good=projections(), batched=st.booleans(), ignore_index=st.sampled_from([-100, 0, 1]))
def test_linear_logprobs(data: st.DataObject, good: dict[str, Any], batched: bool, ignore_index: int) -> None:
    kept = ("hidden", "weight", "targets", "bias", "scale", "softcap", "memory_budget", "backend")
    good = {**{name: good[name] for name in kept}, "ignore_index": ignore_index}
    if batched:
        good |= {name: good[name].detach().unsqueeze(0) for name in ("hidden", "targets")}
    if data.draw(st.integers(0, 9)) == 0:
        good |= {name: good[name].detach()[:0] for name in ("hidden", "targets")}
    arguments, names = data.draw(changed(good))
    found = judge(lambda: linear_logprobs(**arguments), ValueError, names)
    if found is REFUSED:
        return
    doubles = as_double(arguments, LEAVES)
    for name in ("memory_budget", "backend"):
        doubles.pop(name)
    expected = reference.linear_logprobs(**doubles)
    tolerance = TOLERANCE[arguments["hidden"].dtype]
    close(found, expected, tolerance)
    if is_fine(expected):
        right = gradients(expected.sum(), {name: doubles[name] for name in LEAVES})
        for name, gradient in gradients(found.sum(), {name: arguments[name] for name in LEAVES}).items():
            close(gradient, right[name], 2 * tolerance)


@fuzzed(300)
@given(data=st.data(), good=projections(), as_module=st.booleans(), dtype=st.sampled_from(DTYPES))
def test_group_loss(data: st.DataObject, good: dict[str, Any], as_module: bool, dtype: torch.dtype) -> None:
    kept = ("ref_logps", "rewards", "loss_type", "beta_pi", "beta_r", "label_smoothing")
    good = {name: good[name] for name in kept}
    good["policy_logps"] = (good["ref_logps"] + good["rewards"]).to(dtype)
    good["reduction"] = data.draw(st.sampled_from(["mean", "sum", "none"]))
    good["ties"] = data.draw(st.sampled_from(["error", "share"]))
    arguments, names = data.draw(changed(good))

    def call() -> Tensor:
        if not as_module:
            return group_loss(**arguments)
        tensors = ("policy_logps", "ref_logps", "rewards")
        module = GroupLoss(**{name: value for name, value in arguments.items() if name not in tensors})
        return module(*(arguments[name] for name in tensors))

    found = judge(call, ValueError, names)
    if found is REFUSED:
        return
    doubles = as_double(arguments, ("policy_logps",))
    reduction, _ = doubles.pop("reduction"), doubles.pop("ties")
    if doubles["label_smoothing"] is None:
        doubles["label_smoothing"] = reference.default_label_smoothing(doubles["loss_type"])
    losses = reference.group_loss(**doubles)
    close(found, losses if reduction == "none" else getattr(losses, reduction)(), 1e-4)


IDS = st.integers(0, 9)
BAD_IDS = st.sampled_from([None, 3, "ab", b"ab", [0.5], [None], ["a"], [2**70], [-1], [True], [[1], [2]], [math.nan]])


@fuzzed(200)
@given(data=st.data(), share=st.booleans(), length=st.none() | st.integers(1, 40))
def test_pack(data: st.DataObject, share: bool, length: int | None) -> None:
    lists = st.lists(IDS, min_size=1, max_size=4)
    groups = data.draw(st.lists(st.tuples(lists, st.lists(lists, min_size=1, max_size=3)), max_size=4))
    options = {"share_prompt": share, "row_length": length, "pad_token_id": 0}
    names = {"groups", "Group", "row_length"}
    for _ in range(data.draw(st.integers(0, 1))):
        what = data.draw(st.sampled_from(["prompt", "completion", "completions", "group", "groups", "option"]))
        if what == "option":
            name = data.draw(st.sampled_from(["row_length", "pad_token_id"]))
            options[name] = data.draw(NUMBERS | NO_NUMBERS)
            names.add(name)
        elif what == "groups":
            groups = data.draw(JUNK)
        elif groups:
            bad = data.draw(BAD_IDS)
            prompt, completions = groups[0]
            groups[0] = {
                "prompt": (bad, completions),
                "completion": (prompt, [*completions, bad]),
                "completions": (prompt, bad),
                "group": bad,
            }[what]

    def call() -> Any:
        if not isinstance(groups, list):
            return pack(groups, **options)
        return pack([Group(*group) if isinstance(group, tuple) else group for group in groups], **options)

    packed = judge(call, ValueError, names)
    if packed is REFUSED:
        return
    flat, sequences = packed.input_ids.flatten(), [(p, c) for p, cs in groups for c in cs]
    for (prompt, completion), start, end in zip(sequences, packed.cu_seqlens, packed.cu_seqlens[1:], strict=False):
        assert packed.targets[start:end].tolist() == [int(i) for i in completion]
        at = packed.source[start:end]
        assert flat[at].tolist() == [prompt[-1], *completion[:-1]]
        expected = [len(prompt) - 1 + i for i in range(len(completion))]
        assert packed.position_ids.flatten()[at].tolist() == expected
    assert len(packed.cu_seqlens) == len(sequences) + 1
    assert not share or packed.input_ids.shape[1] <= (options["row_length"] or 1000)


@fuzzed(200)
@given(data=st.data(), rows=st.integers(1, 3), width=st.integers(2, 6))
def test_from_padded(data: st.DataObject, rows: int, width: int) -> None:
    mask = torch.zeros(rows, width, dtype=data.draw(st.sampled_from([torch.int64, torch.bool, torch.float32])))
    prompt_lens = torch.ones(rows, dtype=torch.int64)
    for row in range(rows):
        start = data.draw(st.integers(0, width - 2))
        end = data.draw(st.integers(start + 2, width))
        mask[row, start:end] = 1
        prompt_lens[row] = data.draw(st.integers(1, end - start - 1))
    ids = torch.arange(rows * width).view(rows, width)
    good = {"input_ids": ids, "attention_mask": mask, "prompt_lens": prompt_lens}
    arguments, names = data.draw(changed(good))
    found = judge(lambda: from_padded(**arguments), ValueError, names)
    if found is REFUSED:
        return
    ids, mask, lens = (value.tolist() for value in arguments.values())
    source, targets, bounds = [], [], [0]
    for row, (tokens, real, prompt) in enumerate(zip(ids, mask, lens, strict=True)):
        places = [i for i, one in enumerate(real) if one][int(prompt) :]
        source += [row * len(tokens) + i - 1 for i in places]
        targets += [tokens[i] for i in places]
        bounds.append(len(targets))
    assert [value.tolist() for value in found] == [source, targets, bounds]


class Fake:
    """Something that is no model, with some of a model's attributes."""

    def __init__(self, **attributes: Any):
        vars(self).update(attributes)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    config = LlamaConfig(vocab_size=5, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2)
    return AutoModelForCausalLM.from_config(config)


MODEL_TYPES = st.sampled_from(["llama", "cohere", "granite", "gemma2", "gemma3_text", "bert", "", None, 3, []])


@fuzzed(100)
@given(data=st.data(), model_type=MODEL_TYPES, value=NUMBERS | NO_NUMBERS)
def test_read_head(llama: nn.Module, data: st.DataObject, model_type: Any, value: Any) -> None:
    numbers = dict.fromkeys(("logit_scale", "logits_scaling", "final_logit_softcapping"), value)
    config = Fake(model_type=model_type, **data.draw(st.sampled_from([numbers, {}])))
    layer = data.draw(st.sampled_from([llama.lm_head, nn.Embedding(2, 2), nn.Linear(2, 2).half(), None, 3]))
    embedding = llama.model.embed_tokens
    model = Fake(config=config, get_output_embeddings=lambda: layer, get_input_embeddings=lambda: embedding)
    odd = [model, model, model, Fake(config=config), Fake(config=None), llama, nn.Linear(2, 2), None, 3, "x"]
    tried = data.draw(st.sampled_from(odd))
    names = ["model type", "causal LM", "lm_head", *numbers]
    head = judge(lambda: read_head(tried), ValueError, names)
    if head is not REFUSED:
        assert 0 < abs(head.scale) < math.inf
        assert head.softcap is None or 0 < head.softcap < math.inf
        assert head.weight.dim() == 2
