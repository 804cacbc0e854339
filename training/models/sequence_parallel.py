"""Sequence parallelism: the tokens of each packed row live on n consecutive ranks.

Rank r has part r % n of the rows of data-parallel rank r // n, T/n tokens of each. It runs the model and its head on
these tokens alone, so activations take an n-th. Only attention needs the whole row. There the ranks exchange tokens
for heads (DeepSpeed Ulysses, Jacobs et al., arXiv 2309.14509), (B, H, T/n, d) -> (B, H/n, T, d), attend under the row's
own mask, and exchange them back.

A model must take position_ids and a ready-made mask, as for sharing prompts (`exo_fast.masks`). The mask always covers
the whole row; from its length the attention function knows that queries and keys are a part of the row. So windows,
several groups in a row and unshared rows need no code of their own.

Engines do not know of it: to them every rank is a data-parallel rank, whose gradients they average. The ranks of a row
compute one loss from the log-probs of all its tokens, and each has the gradient of its own tokens: parts to be summed.
`_SumOverRanks` therefore multiplies gradients by n on the way back, and the average over ranks, of losses and of
gradients alike, is the same as if each row had one rank.

Not taken from DeepSpeed, and why: `UlyssesSPAttentionHF` drops the mask it is given, and wants heads that n divides
(SmolLM2-135M has 9). `_SeqAllToAll` divides uneven heads too, but not fewer key-value heads than ranks, and it uses
DeepSpeed's own sequence groups, which its engine would count. So we need only an all-to-all and its transpose.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from exo_fast.head import unwrap
from exo_fast.layout import MaskPlan, Packed, model_inputs, plan_mask
from exo_fast.masks import FLEX_BLOCK
from exo_fast.packing import in_one_row
from exo_fast.training.errors import InputError

SEQUENCE_PARALLEL_CORES = ("sdpa", "flex_attention")


def refusal(config: Any, size: int) -> str:
    """Return why rows of a model of this config cannot be spread over `size` ranks; empty if they can."""
    plan = plan_mask(config)
    if not plan.share:
        return plan.reason
    if not plan.known:
        return "not among the model types whose masks are tested"
    if not getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_supports_attention_backend", False):
        return "its attention is not the standard one of transformers, which can be replaced"
    if config.model_type == "gpt_oss":
        return "its attention sinks belong to heads, which are spread"
    if size > config.num_attention_heads:
        return f"it has {config.num_attention_heads} attention heads, and each rank needs one"
    return ""


class SequenceParallel:
    """This rank's part of every row, and the exchanges with the `size` - 1 ranks that have the others.

    Making one puts its attention into `model` (a transformers causal LM or a PeftModel around one, loaded with sdpa or
    flex_attention); from then on each forward of the model needs a (B, 1, T, T) mask (`exo_fast.masks.model_inputs`).
    A collective call of all ranks. Raises InputError for another attention implementation.
    """

    def __init__(self, model: nn.Module, size: int):
        config = unwrap(model).config
        if config._attn_implementation not in SEQUENCE_PARALLEL_CORES:
            raise InputError(
                f"attn_implementation={config._attn_implementation!r}: sequence_parallel={size} exchanges heads around "
                f"one of {', '.join(SEQUENCE_PARALLEL_CORES)}; name one of them."
            )
        self.size, self.core = size, config._attn_implementation
        self.group, _ = torch.distributed.new_subgroups(group_size=size)
        self.rank = torch.distributed.get_rank(self.group)
        name = f"ulysses_{size}_{self.core}"
        AttentionInterface.register(name, self.attention)
        config._attn_implementation = name  # of this object; it is not saved with the model

    # Rows and log-probs

    def part(
        self, packed: Packed, plan: MaskPlan, *, dtype: torch.dtype, device: torch.device
    ) -> tuple[dict[str, Any], Tensor, Tensor]:
        """Cut this rank's part from a batch of rows that all ranks of the group have in full.

        Returns the arguments of the model's forward, `rows` (n_r,) of its hidden states (B·T/n, D) that predict a
        completion token, and `tokens` (n_r,), their indices in the batch's N. `dtype` is the mask's (`model_inputs`).
        """
        packed = self._padded(packed)
        inputs = self.whole(packed, plan, dtype=dtype, device=device)
        length = packed.input_ids.shape[1]
        size = length // self.size
        begin = self.rank * size
        for name in {"input_ids", "position_ids", "text_lengths"} & set(inputs):
            inputs[name] = inputs[name][:, begin : begin + size]
        source = packed.source.to(device)
        row, column = source // length, source % length
        tokens = (column // size == self.rank).nonzero().squeeze(1)
        return inputs, (row * size + column - begin)[tokens], tokens

    def whole(self, packed: Packed, plan: MaskPlan, *, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """Return the arguments of the model's forward to run whole rows in this rank alone."""
        # An unshared row is a shared one of a single candidate. As such it gets its mask from here; the model would
        # make one of the length of its part.
        packed = replace(packed, share_prompt=True)
        return model_inputs(packed, plan, dtype=dtype, device=device, attn_implementation=self.core)

    def gather(self, values: Tensor, tokens: Tensor, count: int) -> Tensor:
        """Return (count,): each rank's `values` at its `tokens`, the same in all ranks of the group, and exact: every
        entry comes from one rank. A gradient comes back n times, for engines that average over ranks."""
        return _SumOverRanks.apply(values.new_zeros(count).index_copy(0, tokens, values), self.group, self.size)

    def _padded(self, packed: Packed) -> Packed:
        """Return the rows padded to a length that the ranks divide evenly; for FlexAttention as the one row that
        `model_inputs` makes of them."""
        if self.core == "flex_attention":
            return in_one_row(packed, math.lcm(FLEX_BLOCK, self.size))
        length = packed.input_ids.shape[1]
        more = -length % self.size
        if more == 0:
            return packed
        fill = {"input_ids": 0, "position_ids": 0, "group_ids": -1, "candidate_ids": -1}
        rows = {name: nn.functional.pad(getattr(packed, name), (0, more), value=value) for name, value in fill.items()}
        return replace(packed, **rows, source=packed.source + packed.source // length * more)

    # Attention

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """Attend as transformers does: query (B, H, T/n, d), key and value (B, H_kv, T/n, d) -> (B, T/n, H, d).

        If the mask has the length of the keys, these are whole rows, and nothing is exchanged.
        """
        core = ALL_ATTENTION_FUNCTIONS[self.core]
        if attention_mask.shape[-1] == key.shape[2]:
            return core(module, query, key, value, attention_mask, **options)
        heads = divide(query.shape[1], self.size)
        to_one = query.shape[1] // key.shape[1]  # query heads to a key-value head
        needed = [range(part.start // to_one, (part.stop - 1) // to_one + 1) for part in heads]
        query, key, value = (
            self._to_heads(tensor, parts) for tensor, parts in ((query, heads), (key, needed), (value, needed))
        )
        if to_one > 1:
            first = needed[self.rank].start
            key, value = (
                torch.stack([tensor[:, head // to_one - first] for head in heads[self.rank]], 1)
                for tensor in (key, value)
            )
        # The attributes of the layer that the core reads. Each query head has a key-value head of its own by now.
        layer = SimpleNamespace(num_key_value_groups=1, is_causal=True, training=module.training)
        out, _ = core(layer, query, key, value, attention_mask, **options)
        return self._to_tokens(out, heads), None

    def _to_heads(self, tensor: Tensor, heads: Sequence[range]) -> Tensor:
        """Exchange (B, H, T/n, d) -> (B, h, T, d): this rank's heads of the whole row. Several ranks may get a head."""
        batch, _, length, size = tensor.shape
        by_head = tensor.transpose(0, 1)
        sent = torch.cat([by_head[part.start : part.stop] for part in heads])
        count = len(heads[self.rank])
        found = _AllToAll.apply(sent, [count] * self.size, [len(part) for part in heads], self.group)
        found = found.view(self.size, count, batch, length, size)
        return found.permute(2, 1, 0, 3, 4).reshape(batch, count, self.size * length, size)

    def _to_tokens(self, tensor: Tensor, heads: Sequence[range]) -> Tensor:
        """Exchange (B, T, h, d) -> (B, T/n, H, d): this rank's tokens of all heads."""
        batch, length, count, size = tensor.shape
        by_rank = tensor.reshape(batch, self.size, length // self.size, count, size).permute(1, 3, 0, 2, 4)
        sent = by_rank.reshape(self.size * count, batch, length // self.size, size)
        found = _AllToAll.apply(sent, [len(part) for part in heads], [count] * self.size, self.group)
        return found.permute(1, 2, 0, 3)


def divide(count: int, parts: int) -> list[range]:
    """Divide `count` heads into `parts` runs, as evenly as possible: 9 in 2 are 5 and 4."""
    bounds = [-(-count * part // parts) for part in range(parts + 1)]
    return [range(begin, end) for begin, end in pairwise(bounds)]


class _AllToAll(torch.autograd.Function):
    """`sent[r]` rows of the tensor go to rank r and `received[r]` come from it; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
        ctx.back = (sent, received, group)
        out = tensor.new_empty(sum(received), *tensor.shape[1:])
        torch.distributed.all_to_all_single(out, tensor.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _AllToAll.apply(grad, *ctx.back), None, None, None


class _SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' tensors, in each rank. All ranks compute the same loss from it, so the gradient of the sum
    of their losses is n times the gradient of one, and nothing has to be sent."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any, size: int) -> Tensor:
        ctx.size = size
        total = tensor.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.size, None, None
