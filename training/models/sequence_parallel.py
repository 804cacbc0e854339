"""Sequence parallelism: the tokens of each packed row live on n consecutive ranks.

Rank r has part r % n of the rows of data-parallel rank r // n, T/n tokens of each, and runs the model and its head on
them alone, so activations take an n-th. Only attention needs the whole row. There the ranks exchange tokens for heads
(DeepSpeed Ulysses, Jacobs et al., arXiv 2309.14509), (B, H, T/n, d) -> (B, H/n, T, d), attend under the row's own mask,
and exchange them back.

Of a model this asks what sharing prompts asks (`exo_fast.masks`): that it takes position_ids and a mask ready-made. The
mask is always that of the whole row, and tells the attention function by its length that queries and keys are a part
of it. So windows, several groups in a row and unshared rows need nothing of their own.

Engines do not know of it: to them every rank is a data-parallel rank, whose gradients they average. The ranks of a row
compute one loss from the log-probs of all its tokens, and each has the gradient of its own tokens: parts to be summed.
`_SumOverRanks` therefore multiplies gradients by n on the way back, and the average over ranks, of losses and of
gradients alike, is what it would be if each row had one rank.

Not taken from DeepSpeed, and why: `UlyssesSPAttentionHF` drops the mask it is given, and wants heads that n divides
(SmolLM2-135M has 9); `_SeqAllToAll` divides uneven heads too, but not fewer key-value heads than ranks, and by
DeepSpeed's own sequence groups, with which its engine would reckon. What is left is an all-to-all and its transpose.
"""

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
from exo_fast.training.errors import InputError

SEQUENCE_PARALLEL_CORES = ("sdpa", "flex_attention")


def refusal(config: Any, size: int) -> str:
    """Why rows of a model of this transformers config cannot be spread over `size` ranks; empty where they can."""
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
        """This rank's part of a batch of rows that all ranks of the group have in full.

        Returns what the model's forward takes, `rows` (n_r,) of its hidden states (B·T/n, D) that predict a completion
        token, and `tokens` (n_r,), which of the batch's N these are. `dtype` is the mask's (`model_inputs`).
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
        """What the model's forward takes to run whole rows in this rank alone."""
        # An unshared row is a shared one of a single candidate; as such it gets its mask from here and not from the
        # model, which would make one of the length of its part.
        packed = replace(packed, share_prompt=True)
        return model_inputs(packed, plan, dtype=dtype, device=device, attn_implementation=self.core)

    def gather(self, values: Tensor, tokens: Tensor, count: int) -> Tensor:
        """(count,) from each rank's `values` at its `tokens`, the same in all ranks of the group, and exact: every
        entry comes from one rank. A gradient comes back n times, for engines that average over ranks."""
        return _SumOverRanks.apply(values.new_zeros(count).index_copy(0, tokens, values), self.group, self.size)

    def _padded(self, packed: Packed) -> Packed:
        """Rows of a length that the ranks divide evenly."""
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
        """transformers' attention function: query (B, H, T/n, d), key and value (B, H_kv, T/n, d) -> (B, T/n, H, d).

        With a mask of the length of the keys these are whole rows, and nothing is exchanged.
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
        # What the core asks of the layer; each query head has a key-value head of its own by now.
        layer = SimpleNamespace(num_key_value_groups=1, is_causal=True, training=module.training)
        out, _ = core(layer, query, key, value, attention_mask, **options)
        return self._to_tokens(out, heads), None

    def _to_heads(self, tensor: Tensor, heads: Sequence[range]) -> Tensor:
        """(B, H, T/n, d) -> (B, h, T, d): of the whole row the heads that are this rank's; a head may go to several."""
        batch, _, length, size = tensor.shape
        by_head = tensor.transpose(0, 1)
        sent = torch.cat([by_head[part.start : part.stop] for part in heads])
        count = len(heads[self.rank])
        found = _AllToAll.apply(sent, [count] * self.size, [len(part) for part in heads], self.group)
        found = found.view(self.size, count, batch, length, size)
        return found.permute(2, 1, 0, 3, 4).reshape(batch, count, self.size * length, size)

    def _to_tokens(self, tensor: Tensor, heads: Sequence[range]) -> Tensor:
        """(B, T, h, d) -> (B, T/n, H, d): of all heads the tokens that are this rank's."""
        batch, length, count, size = tensor.shape
        by_rank = tensor.reshape(batch, self.size, length // self.size, count, size).permute(1, 3, 0, 2, 4)
        sent = by_rank.reshape(self.size * count, batch, length // self.size, size)
        found = _AllToAll.apply(sent, [len(part) for part in heads], [count] * self.size, self.group)
        return found.permute(1, 2, 0, 3)


def divide(count: int, parts: int) -> list[range]:
    """`count` heads in `parts` runs, as even as they go: 9 in 2 are 5 and 4."""
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
    """The sum of all ranks' tensors, in each. All ranks make the same loss of it, so the gradient of the sum of their
    losses is n times the gradient of one, and nothing has to be sent."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any, size: int) -> Tensor:
        ctx.size = size
        total = tensor.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.size, None, None
