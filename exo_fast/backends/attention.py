"""Attention over packed rows block by block, on CPU: only the products that the mask lets through.

In a row of `[prompt][candidate 1]…[candidate K]` (see `exo_fast.layout`) most pairs of tokens are masked. With a dense
(B, 1, T, T) mask every pair is still multiplied, and every layer reads the mask.
Here a group is computed in parts without any mask, each by PyTorch's own flash kernel:

    prompt and candidate 1     causal: together they are one text
    candidates 2…K             each causal with itself, candidates of equal length in one call
    candidates 2…K × prompt    every pair

The last two see different keys for the same queries, and are merged by their log-sum-exps: the softmax over both
key sets is a weighted mean of the softmax over each. In backward each part gets the merged output and log-sum-exp.
From these the kernel recomputes its share of the merged probabilities, so the parts' gradients add up to the
gradients of the whole (ring attention rests on the same identity).

The model needs no change: `SharedPromptMask` is a tensor of the mask's shape without its values.
`scaled_dot_product_attention`, called with it, runs the parts; any other operation on it, and any
attention that the parts do not cover, gets the dense mask, made when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# The kernel works on 32 or 64 queries at a time below this many and on 256 from there on. Setting up a bf16 product
# of so few costs more than computing it, and most of backward's time: with 51 tokens, 6 times float32's time.
WIDE_STEPS = 768
# A share of the dense mask's pairs. At 0.8 (two candidates of 64 tokens, a prompt of 192) the parts took as long.
WORTHWHILE_SHARE = 0.7


@dataclass(frozen=True)
class Span:
    """A group's place in a row, in tokens."""

    row: int
    start: int
    prompt: int
    candidates: tuple[int, ...]  # lengths

    @property
    def text(self) -> slice:
        """The prompt and the first candidate, which follows it as in a text of its own."""
        return slice(self.start, self.start + self.prompt + sum(self.candidates[:1]))

    @property
    def others(self) -> slice:
        """All other candidates."""
        return slice(self.text.stop, self.text.stop + sum(self.candidates[1:]))

    def runs(self) -> list[tuple[slice, int]]:
        """The other candidates as runs of equal length: (place of the run, number of candidates)."""
        found, begin = [], self.others.start
        for length, same in groupby(self.candidates[1:]):
            count = len(list(same))
            found.append((slice(begin, begin + count * length), count))
            begin += count * length
        return found


def spans(group_ids: Tensor, candidate_ids: Tensor) -> tuple[Span, ...] | None:
    """Return the groups in rows of (B, T) ids (see `exo_fast.packing.Packed`), or None if the rows are not
    `[prompt][candidate]…` with every group in one piece."""
    length = group_ids.shape[1]
    pairs = torch.stack([group_ids, candidate_ids], -1).flatten(0, 1)
    begins = (pairs != pairs.roll(1, 0)).any(-1)
    begins[::length] = True
    starts = begins.nonzero().squeeze(1)
    sizes = torch.diff(starts, append=starts.new_tensor([len(pairs)])).tolist()
    segments = zip(starts.tolist(), sizes, pairs[starts].tolist(), strict=True)
    found, seen = [], set()
    for (row, group), parts in groupby(segments, key=lambda segment: (segment[0] // length, segment[2][0])):
        if group < 0:
            continue
        at, counts, ids = zip(*parts, strict=True)
        candidates = [candidate for _, candidate in ids]
        if candidates[0] != 0 or len(set(candidates)) != len(candidates) or (row, group) in seen:
            return None
        seen.add((row, group))
        found.append(Span(row, at[0] % length, counts[0], counts[1:]))
    return tuple(found)


def worthwhile(rows: tuple[Span, ...], shape: torch.Size) -> bool:
    """Return whether the parts have few enough pairs of tokens, compared with (B, T, T), for more products to pay."""
    pairs = 0
    for span in rows:
        text, others = span.prompt + sum(span.candidates[:1]), span.candidates[1:]
        pairs += text**2 + span.prompt * sum(others) + sum(length**2 for length in others)
    return pairs < WORTHWHILE_SHARE * shape[0] * shape[1] ** 2


def packed_attention(query: Tensor, key: Tensor, value: Tensor, rows: tuple[Span, ...], scale: float | None) -> Tensor:
    """Return (B, H, T, D): each token's attention to its group's prompt and its own candidate, up to itself.

    `query`, `key`, `value` (B, H, T, D) of one dtype, on CPU; `scale` defaults to D^-½. Padding is 0.
    """
    return _PackedAttention.apply(query, key, value, rows, scale)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: tuple[Span, ...], scale: float | None
    ) -> Tensor:
        query, key, value = (_rows_contiguous(t) for t in (query, key, value))
        batch, heads, length, size = query.shape
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        # The memory order that models convert it to next. Padding stays 0.
        out = query.new_zeros(batch, length, heads, size).transpose(1, 2)
        lse = query.new_zeros(batch, length, heads, dtype=wide).transpose(1, 2)
        for span in rows:
            q, k, v, o, s = (_of(t, span.row) for t in (query, key, value, out, lse))
            o[:, :, span.text], s[:, :, span.text] = _forward(
                *(t[:, :, span.text] for t in (q, k, v)), 0.0, True, scale=scale
            )
            if span.others.start == span.others.stop:
                continue
            o, s = o[:, :, span.others], s[:, :, span.others]
            prompt = slice(span.start, span.start + span.prompt)
            o_prompt, s_prompt = _forward(
                q[:, :, span.others], k[:, :, prompt], v[:, :, prompt], 0.0, False, scale=scale
            )
            for run, count in span.runs():
                o_own, s_own = _forward(*(_stacked(t, run, count) for t in (q, k, v)), 0.0, True, scale=scale)
                at = slice(run.start - span.others.start, run.stop - span.others.start)
                _stacked(o, at, count).copy_(o_own)
                _stacked(s, at, count).copy_(s_own)
            prompt_share = torch.sigmoid(s_prompt - s).unsqueeze(-1)
            o.copy_(o.to(wide).lerp_(o_prompt.to(wide), prompt_share))
            s.copy_(torch.logaddexp(s, s_prompt))
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.rows, ctx.scale = rows, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grad = _rows_contiguous(grad)
        grads = [torch.zeros_like(t) for t in (query, key, value)]
        for span in ctx.rows:
            g, q, k, v, o, s = (_of(t, span.row) for t in (grad, query, key, value, out, lse))
            dq, dk, dv = (_of(t, span.row) for t in grads)

            own = tuple(t[:, :, span.text] for t in (g, q, k, v, o, s))
            parts = _gradients(own, True, ctx.scale)
            for total, part in zip((dq, dk, dv), parts, strict=True):
                total[:, :, span.text] = part
            if span.others.start == span.others.stop:
                continue
            prompt = slice(span.start, span.start + span.prompt)
            dq[:, :, span.others], dk_prompt, dv_prompt = _gradients(
                (
                    g[:, :, span.others],
                    q[:, :, span.others],
                    k[:, :, prompt],
                    v[:, :, prompt],
                    o[:, :, span.others],
                    s[:, :, span.others],
                ),
                False,
                ctx.scale,
            )
            dk[:, :, prompt] += dk_prompt
            dv[:, :, prompt] += dv_prompt
            for run, count in span.runs():
                own = tuple(_stacked(t, run, count) for t in (g, q, k, v, o, s))
                dq_own, dk_own, dv_own = _gradients(own, True, ctx.scale)
                _stacked(dq, run, count).add_(dq_own)
                _stacked(dk, run, count).copy_(dk_own)
                _stacked(dv, run, count).copy_(dv_own)
        return *grads, None, None


def _gradients(part: tuple[Tensor, ...], causal: bool, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv of one part (upstream gradient, q, k, v, output and its log-sum-exp). Half precision is
    computed on float32 copies if the kernel would take few queries at a time."""
    grad, q, k, v, out, lse = part
    if q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] < WIDE_STEPS:
        grad, q, k, v, out = (t.float() for t in (grad, q, k, v, out))
    return _backward(grad, q, k, v, out, lse, 0.0, causal, scale=scale)


def _rows_contiguous(tensor: Tensor) -> Tensor:
    """Return `tensor` with contiguous rows: the kernel takes any strides except in the last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _of(tensor: Tensor, row: int) -> Tensor:
    return tensor[row : row + 1]


def _stacked(tensor: Tensor, run: slice, count: int) -> Tensor:
    """Return a run of candidates of one length as a batch, a view: (1, H, T, …) -> (count, H, length, …)."""
    return tensor[0, :, run].unflatten(1, (count, -1)).transpose(0, 1)


class SharedPromptMask(Tensor):
    """The (B, 1, T, T) additive mask of packed rows, kept as its parts (see the module's docstring).

    `dense()` makes the mask itself: 0 where a token is seen, the lowest finite value of `dtype` elsewhere.
    """

    rows: tuple[Span, ...]
    _make_dense: Callable[[], Tensor]
    _dense: Tensor | None

    @staticmethod
    def __new__(
        cls, rows: tuple[Span, ...], shape: torch.Size, dtype: torch.dtype, dense: Callable[[], Tensor]
    ) -> SharedPromptMask:
        """Make a mask of rows of `shape` (B, T); `dense` makes the (B, 1, T, T) mask of `dtype`."""
        mask = torch.Tensor._make_wrapper_subclass(
            cls, (shape[0], 1, shape[1], shape[1]), dtype=dtype, device=torch.device("cpu")
        )
        mask.rows, mask._make_dense, mask._dense = rows, dense, None
        return mask

    def dense(self) -> Tensor:
        if self._dense is None:
            self._dense = self._make_dense()
        return self._dense

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _sdpa(*args, **kwargs)
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.Tensor.detach:  # reentrant checkpointing detaches a layer's positional arguments
            return args[0]
        return func(*_without_shortcuts(args), **_without_shortcuts(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # Tensor's own is the C function that switches it off
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # Reached only if __torch_function__ is switched off. The operation still gets the values.
        return func(*_without_shortcuts(args), **_without_shortcuts(kwargs or {}))


_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad_fn", "is_leaf", "grad")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__, torch.Tensor.is_floating_point}


def _without_shortcuts(arguments: Any) -> Any:
    return tree_map_only(SharedPromptMask, SharedPromptMask.dense, arguments)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute `scaled_dot_product_attention` with a SharedPromptMask: in parts, or densely if these do not cover it."""
    q, k, v = query, key, value
    if torch.is_autocast_enabled("cpu"):
        # Autocast would cast further down, which the parts bypass.
        q, k, v = (t.to(torch.get_autocast_dtype("cpu")) for t in (q, k, v))
    if enable_gqa and k.ndim == 4:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    mask = attn_mask if isinstance(attn_mask, SharedPromptMask) else None
    if (
        mask is not None
        and dropout_p == 0
        and not is_causal
        and not torch.compiler.is_compiling()
        and torch.backends.cuda.flash_sdp_enabled()  # the switch of torch.nn.attention.sdpa_kernel, on CPU too
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in (q, k, v))
        and q.dtype == k.dtype == v.dtype == mask.dtype
        and q.shape == k.shape == v.shape
        and q.ndim == 4
        and (q.shape[0], q.shape[2]) == (mask.shape[0], mask.shape[3])
    ):
        return packed_attention(q, k, v, mask.rows, scale)
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=_without_shortcuts(attn_mask),
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
