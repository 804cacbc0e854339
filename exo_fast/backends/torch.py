"""The chunked backend in plain PyTorch: the default on CPU, and the readable version of the kernels.

One idea carries it. Let E = exp(z − shift) for a chunk of rows, s its row sums and U = E − s·1[v = y] (E with s taken
off at the target). Then ∂ℓ_t/∂z = −U_t / s_t: U needs neither the loss nor its gradient, so it can be stored once, in
the dtype of the head, and be the operand of both products:

    ∂L/∂h_t = −(c_t · scale / s_t) · (U_t W)          scaled after the product, in float32
    ∂L/∂W   = −Uᵀ ((c · scale / s) ⊙ H)               scaled before the product, on the (n, D) side

with c_t = ∂L/∂ℓ_t. Nothing of size V is touched a second time. `shift` is the row maximum over the first vocabulary
block, which keeps E in range unless a later block exceeds it by more than `log(OVERFLOW)`; then the chunk is done
again with the exact maximum.

Logits leave every product in float32, whatever the operands (rounding them to bf16 costs 0.6 nats on a sequence of
2,048 tokens). Stored in bf16, U has the 2⁻⁹ relative error of any operand of a bf16 product.

bf16 products on a CPU with AMX have a schedule of their own (`exo_fast.backends.head_attention`).

Cost for N rows: log-probs 2·N·D·V flops; with the gradients of the one-pass schedule 6·N·D·V; of the two-pass
schedule 8·N·D·V. Scratch is bounded by the memory budget (`Plan`).

A backend is four functions of plain tensors, `logprobs_forward`, `statistics_forward`, `logprobs_backward` and
`group_loss_forward`, which `exo_fast.ops` turns into differentiable operators. Their results are contiguous and
share no memory.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from exo_fast.backends import head_attention, scratch_budget
from exo_fast.backends.products import library_products
from exo_fast.backends.rows import Rows, group_units, kept_chunks, kept_rows, row_chunks
from exo_fast.closed_form import losses_and_coefficients
from exo_fast.head import Head
from exo_fast.precision import bf16_products
from exo_fast.reference import LossOptions

BLOCK = 4096  # columns of the vocabulary at a time: a block of logits stays in cache between product and exponential
MIN_ROWS = 192  # fewer whole rows than this in the budget make the products too thin: work by blocks instead
MAX_ROWS = 1024  # more rows than this make no product faster, and fresh pages cost time
THIN = 256  # oneDNN's bf16 (n, V) x (V, D) runs half again as fast on up to about 400 rows
OVERFLOW = 1e26  # a row sum beyond this means that the shift was too small
FAR = -1000.0  # its exponential is 0, in float64 too, and 0 · FAR is a number, while 0 · −inf is nan


@dataclass(frozen=True)
class Plan:
    """The split of the budget: `rows` whole rows of V are kept at once, or, if 0, blocks of (block_rows, block)."""

    rows: int
    block_rows: int
    block: int
    bytes: int  # taken by whole rows, all scratch counted

    @classmethod
    def of(
        cls, n: int, hidden: Tensor, head: Head, memory_budget: int | None, together: int = 0, planes: int = 1
    ) -> "Plan":
        """Plan for n rows of hidden. Keeping `together` rows, the rows of the largest group, at once saves work.
        `planes`: blocks of logits that are held at once."""
        budget = scratch_budget(memory_budget, hidden.device)
        vocab, width = head.weight.shape
        acc = accumulator(hidden).itemsize
        block = min(BLOCK, vocab)
        block_copy = 0 if hidden.dtype in (torch.float32, torch.float64) else block * width * acc
        planes = max(planes, 2 if head.softcap is not None else 1)
        per_row = vocab * storage(hidden).itemsize + planes * block * acc + 4 * width * acc
        rows = min(n, max(MAX_ROWS, together), max(0, budget - block_copy) // per_row)
        if rows < min(MIN_ROWS, n):
            rows = 0
        block_rows = max(1, min(n, 2 * MAX_ROWS, budget // (planes * block * acc)))
        return cls(rows=rows, block_rows=rows or block_rows, block=block, bytes=rows * per_row + block_copy)


def accumulator(hidden: Tensor) -> torch.dtype:
    """The dtype of logits, sums and dW: float64 for float64 operands, else float32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def storage(hidden: Tensor) -> torch.dtype:
    """The dtype U is kept in. float16 has no range for unnormalised exponentials: its rows are kept in float32."""
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


class LogitBlocks:
    """Logits of some rows, one vocabulary block at a time, in scratch that is reused from block to block."""

    def __init__(self, head: Head, plan: Plan, like: Tensor):
        self.head, self.plan = head, plan
        self.acc = accumulator(like)
        self.scratch = torch.empty(plan.block_rows * plan.block, dtype=self.acc, device=like.device)
        narrow = like.dtype != self.acc
        self.out_dtype = narrow and "mm" in library_products(like.device, like.dtype)
        self.cast = narrow and not self.out_dtype
        self.wide_weight = (
            head.weight.new_empty(plan.block, head.weight.shape[1], dtype=self.acc) if self.cast else None
        )

    def __call__(self, hidden: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (first column, last column + 1, z): z (n, columns) is scratch the caller may overwrite."""
        head, vocab = self.head, len(self.head.weight)
        hidden = hidden.to(self.acc) if self.cast else hidden
        for start in range(0, vocab, self.plan.block):
            stop = min(start + self.plan.block, vocab)
            z = self.scratch[: len(hidden) * (stop - start)].view(len(hidden), stop - start)
            self._product(hidden, head.weight[start:stop], z)
            if head.bias is not None:
                z += head.bias[start:stop]
            if head.softcap is not None:
                z.div_(head.softcap).tanh_().mul_(head.softcap)
            if head.scale != 1.0:
                z *= head.scale
            yield start, stop, z

    def _product(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        if self.out_dtype:
            torch.mm(hidden, weight.T, out_dtype=self.acc, out=out)
        else:
            with bf16_products(self.head.weight.dtype):
                torch.mm(hidden, self.widened(weight).T, out=out)

    def widened(self, weight: Tensor) -> Tensor:
        """A block of the head's rows in the accumulator dtype, in a buffer that is reused."""
        return weight if self.wide_weight is None else self.wide_weight[: len(weight)].copy_(weight)


@dataclass
class Statistics:
    """The numbers of a softmax row from which E and U can be recomputed. All (n,), accumulator dtype."""

    shift: Tensor
    sum: Tensor  # Σ_v exp(z_v − shift)
    target: Tensor  # z[y]

    @property
    def logps(self) -> Tensor:
        return self.target - self.shift - self.sum.log()


def places(z: Tensor, targets: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Return the targets' columns in this block, clamped to it, and whether they lie in it; both (n, 1)."""
    column = (targets - start).unsqueeze(1)
    return column.clamp(0, z.shape[1] - 1), (column >= 0) & (column < z.shape[1])


def pick(z: Tensor, targets: Tensor, start: int, into: Tensor) -> None:
    """Set into[i] = z[i, targets[i] − start] for the rows whose target lies in this block."""
    column, inside = places(z, targets, start)
    torch.where(inside.squeeze(1), z.gather(1, column).squeeze(1), into, out=into)


def put(z: Tensor, targets: Tensor, start: int, values: Tensor) -> None:
    """Set z[i, targets[i] − start] = values[i] for the rows whose target lies in this block."""
    column, inside = places(z, targets, start)
    z.scatter_(1, column, torch.where(inside, values.unsqueeze(1).to(z.dtype), z.gather(1, column)))


def softcap_slope(z: Tensor, head: Head) -> Tensor:
    """Return ∂softcap(a)/∂a = 1 − tanh²(a / c), from the finished logits z = c·tanh(a / c)·scale."""
    assert head.softcap is not None  # for the type checker: called only for a head that has one
    return 1 - (z / (head.softcap * head.scale)).square()


def exponentials(
    blocks: LogitBlocks,
    hidden: Tensor,  # (n, D)
    targets: Tensor,  # (n,)
    keep: Tensor | None = None,  # (n, V), receives U
    known: Statistics | None = None,  # of an earlier pass, over all slices of the vocabulary
) -> Statistics:
    """Return row statistics, and write U into `keep` (times the softcap's slope) if given."""
    stats = walk(blocks, hidden, targets, keep, None if known is None else known.shift)
    if known is None and not bool((stats.sum < OVERFLOW).all()):
        exact = torch.stack([z.amax(dim=1) for _, _, z in blocks(hidden)]).amax(dim=0)
        # Finite even if a bias rules out all tokens (of a slice of the vocabulary): −inf − (−inf) would be nan.
        stats = walk(blocks, hidden, targets, keep, exact.clamp_(min=torch.finfo(exact.dtype).min))
    stats = stats if known is None else known
    if keep is not None:
        put(keep, targets, 0, target_entry(stats, blocks.head))
    return stats


def walk(blocks: LogitBlocks, hidden: Tensor, targets: Tensor, keep: Tensor | None, shift: Tensor | None) -> Statistics:
    """Walk the vocabulary once: return row statistics, write E into `keep` (times the softcap's slope) if given."""
    head = blocks.head
    total = torch.zeros(len(hidden), dtype=blocks.acc, device=hidden.device)
    target = torch.zeros_like(total)
    for start, stop, z in blocks(hidden):
        pick(z, targets, start, into=target)
        if shift is None:
            shift = z.amax(dim=1)
        slope = softcap_slope(z, head) if keep is not None and head.softcap is not None else None
        z.sub_(shift.unsqueeze(1))
        if keep is not None and slope is None and keep.dtype == z.dtype:
            z = torch.exp(z, out=keep[:, start:stop])
            total += z.sum(dim=1)
            continue
        total += z.exp_().sum(dim=1)
        if keep is not None:
            keep[:, start:stop] = z if slope is None else z.mul_(slope)
    assert shift is not None  # for the type checker: a vocabulary has at least one block
    return Statistics(shift, total, target)


def target_entry(stats: Statistics, head: Head) -> Tensor:
    """Return U at the target, (e_y − s)·slope, formed in the accumulator dtype."""
    entry = (stats.target - stats.shift).exp() - stats.sum
    return entry if head.softcap is None else entry * softcap_slope(stats.target, head)


def widened_blocks(keep: Tensor, scratch: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (columns, U over those columns in scratch's dtype), block by block."""
    for start in range(0, keep.shape[1], BLOCK):
        columns = slice(start, min(start + BLOCK, keep.shape[1]))
        part = keep[:, columns]
        yield columns, scratch[: part.numel()].view(part.shape).copy_(part)


class Gradients:
    """dH, dW and db of a run over N rows; unneeded ones stay None and cost nothing. If the head is a slice of the
    vocabulary, dH is a share of a sum, and stays in the accumulator dtype."""

    def __init__(self, hidden: Tensor, head: Head, need: tuple[bool, bool, bool], sliced: bool = False):
        acc = accumulator(hidden)
        self.head, self.dtype = head, acc if sliced else hidden.dtype
        self.hidden = hidden.new_zeros(hidden.shape, dtype=self.dtype) if need[0] else None
        self.weight = head.weight.new_zeros(head.weight.shape, dtype=acc) if need[1] else None
        self.bias = head.bias.new_zeros(head.bias.shape, dtype=acc) if need[2] and head.bias is not None else None
        self.head_needed = self.weight is not None or self.bias is not None

    def unit_hidden(self, keep: Tensor, stats: Statistics, blocks: LogitBlocks) -> Tensor:
        """Return each kept row's ∂ℓ_t/∂h_t, (n, D) in the accumulator dtype; `blocks` has scratch to widen a block."""
        weight, acc = self.head.weight, stats.sum.dtype
        if weight.dtype == keep.dtype == self.dtype:
            size = THIN if keep.dtype == torch.bfloat16 and keep.device.type == "cpu" else len(keep)
            product = torch.cat([part @ weight for part in keep.split(size)]).to(acc)
        else:  # a float16 head, or a slice's share: a block at a time, as a float32 copy of all would pass the budget
            product = keep.new_zeros(len(keep), weight.shape[1], dtype=acc)
            with bf16_products(weight.dtype):
                for columns, u in widened_blocks(keep, blocks.scratch):
                    product.addmm_(u, blocks.widened(weight[columns]).to(acc))
        return product.mul_((-self.head.scale / stats.sum).unsqueeze(1))

    def add_head(self, keep: Tensor, hidden: Tensor, stats: Statistics, coefficients: Tensor, scratch: Tensor) -> None:
        """Add the kept rows' share of dW and db; `scratch` (of LogitBlocks) holds a widened block of U."""
        factor = coefficients * (-self.head.scale / stats.sum)
        if self.weight is not None:
            scaled = hidden * factor.unsqueeze(1)
            if keep.dtype == self.weight.dtype:
                self.weight.addmm_(keep.T, scaled)
            else:
                with bf16_products(keep.dtype):
                    for columns, u in widened_blocks(keep, scratch):
                        self.weight[columns].addmm_(u.T, scaled)
        if self.bias is not None:
            for columns, u in widened_blocks(keep, scratch):
                self.bias[columns].addmv_(u.T, factor)

    def join_head(self, other: "Gradients", factor: float) -> None:
        """Add another run's dW and db times a factor, and clear them; for the same run, multiply them."""
        for mine, added in ((self.weight, other.weight), (self.bias, other.bias)):
            if mine is None or added is None:
                continue
            if other is self:
                mine.mul_(factor)
            else:
                mine.add_(added, alpha=factor)
                added.zero_()

    def add_by_blocks(
        self, blocks: LogitBlocks, rows: Rows, hidden: Tensor, targets: Tensor, stats: Statistics, c: Tensor
    ) -> None:
        """Add all gradients of some rows (of N) if no chunk of whole rows fits: U lives a block at a time."""
        head = self.head
        factor = (c * (-head.scale / stats.sum)).unsqueeze(1)
        entry = target_entry(stats, head)
        wide = hidden.to(blocks.acc)
        grad_hidden = torch.zeros_like(wide)
        for start, stop, z in blocks(hidden):
            slope = softcap_slope(z, head) if head.softcap is not None else None
            z.sub_(stats.shift.unsqueeze(1)).exp_()
            if slope is not None:
                z *= slope
            put(z, targets, start, entry)
            z *= factor  # ∂L/∂(logits before scale and softcap): either product rounds it once
            with bf16_products(head.weight.dtype):
                if self.hidden is not None:
                    grad_hidden.addmm_(z, blocks.widened(head.weight[start:stop]))
                if self.weight is not None:
                    self.weight[start:stop].addmm_(z.T, wide)
            if self.bias is not None:
                self.bias[start:stop] += z.sum(dim=0)
        if self.hidden is not None:
            self.hidden[rows] = grad_hidden.to(self.hidden.dtype)

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden, self.weight, self.bias


def logprobs_forward(
    hidden: Tensor,  # (N, D)
    head: Head,
    targets: Tensor,  # (N,) int64, −1 where ignored, `rows.ELSEWHERE` if the target is not in this head
    memory_budget: int | None,
    unit_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return per-token log-probs (N,), the row statistics (3, N) from which the backward pass makes the logits again
    (shift, Σ exp(z − shift), target logit) and, if `unit_hidden`, ∂ℓ_t/∂h_t (N, D).

    2·N·D·V flops, and as much again for the last. Ignored rows get 0 and no work.
    """
    if unit_hidden and head_attention.applies(len(hidden), hidden, head):
        return head_attention.logprobs_forward(hidden, head, targets, memory_budget)
    kept = kept_rows(targets)
    n = len(hidden) if kept is None else len(kept)
    plan = Plan.of(n, hidden, head, memory_budget)
    blocks = LogitBlocks(head, plan, hidden)
    grads = Gradients(hidden, head, (unit_hidden, False, False))
    keep = keep_buffer(hidden, head, plan) if unit_hidden else None
    stats = torch.empty(3, len(hidden), dtype=blocks.acc, device=hidden.device)
    if kept is not None:
        stats.copy_(stats.new_tensor([[0], [1], [0]]))  # log-prob 0
    for rows in kept_chunks(kept, n, plan.block_rows):
        h, y = hidden[rows], targets[rows]
        u = None if keep is None else keep[: len(h)]
        part = exponentials(blocks, h, y, u)
        stats[0, rows], stats[1, rows], stats[2, rows] = part.shift, part.sum, part.target
        if grads.hidden is not None and u is not None:
            grads.hidden[rows] = grads.unit_hidden(u, part, blocks).to(hidden.dtype)
        elif unit_hidden:
            grads.add_by_blocks(blocks, rows, h, y, part, torch.ones_like(part.sum))
    return Statistics(*stats.unbind()).logps, stats, grads.hidden


class Moments:
    """Sums over the vocabulary of some rows, built up block by block: for the log-prob, and for each of `outputs`
    (entropy, log Σ p², mean logit, is_top1; None if not wanted). (n,) each, accumulator dtype.

    Exponentials are of z − shift with the running maximum as shift; a new maximum scales the sums so far down to it.
    log Σ p² overflows where Σ p does not, and is_top1 needs the maximum itself.
    """

    def __init__(self, n: int, outputs: tuple[bool, ...], like: Tensor):
        def sums(wanted: bool) -> Tensor | None:
            return like.new_zeros(n) if wanted else None

        entropy, squares, logits, top = outputs
        self.shift = like.new_full((n,), torch.finfo(like.dtype).min)  # not −inf: −inf − (−inf) would be nan
        self.sum, self.target = like.new_zeros(n), like.new_zeros(n)
        self.weighted = sums(entropy)  # Σ e·(z − shift)
        self.squares = sums(squares)  # Σ e²
        self.logits = sums(logits)  # Σ z
        self.top = torch.full_like(self.sum, -1, dtype=torch.int64) if top else None  # the first column of the maximum

    def add(self, start: int, z: Tensor, targets: Tensor, plane: Tensor | None) -> None:
        """Add a block of logits (n, columns) from column `start`, and write over it; `plane` is a second such block,
        for the entropy."""
        pick(z, targets, start, into=self.target)
        if self.logits is not None:
            self.logits += z.sum(dim=1)
        if self.top is not None:
            highest, column = z.max(dim=1)  # the first of equal ones
            torch.where(highest > self.shift, column + start, self.top, out=self.top)
        else:
            highest = z.amax(dim=1)
        shift = torch.maximum(self.shift, highest)
        drop = (self.shift - shift).clamp_(min=FAR)
        factor = drop.exp()
        z.sub_(shift.unsqueeze(1))
        e = z.exp_() if self.weighted is None else torch.exp(z, out=plane)
        if self.weighted is not None:
            self.weighted.addcmul_(drop, self.sum).mul_(factor).add_(z.clamp_(min=FAR).mul_(e).sum(dim=1))
        self.sum.mul_(factor).add_(e.sum(dim=1))
        if self.squares is not None:
            self.squares.mul_(factor.square()).add_(e.square_().sum(dim=1))
        self.shift = shift

    def outputs(self, targets: Tensor, vocab: int) -> list[Tensor | None]:
        """Return the requested statistics, computed from the sums of the whole vocabulary."""
        log_sum = self.sum.log()
        return [
            None if self.weighted is None else log_sum - self.weighted / self.sum,
            None if self.squares is None else self.squares.log() - 2 * log_sum,
            None if self.logits is None else self.logits / vocab,
            None if self.top is None else self.top == targets,
        ]


def statistics_forward(
    hidden: Tensor,  # (N, D)
    head: Head,
    targets: Tensor,  # (N,) int64, −1 where ignored
    memory_budget: int | None,
    outputs: tuple[bool, ...],  # which of entropy, log Σ p², mean logit and is_top1 are wanted
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Return log-probs (N,), row statistics (3, N) as in `logprobs_forward`, and (N,) for each of `outputs`, or None.

    2·N·D·V flops: one walk over the vocabulary. Ignored rows get 0 and no work.
    """
    kept = kept_rows(targets)
    n = len(hidden) if kept is None else len(kept)
    plan = Plan.of(n, hidden, head, memory_budget, planes=2 if outputs[0] else 1)
    blocks = LogitBlocks(head, plan, hidden)
    second = torch.empty_like(blocks.scratch) if outputs[0] else None
    stats = torch.empty(3, len(hidden), dtype=blocks.acc, device=hidden.device)
    dtypes = (blocks.acc, blocks.acc, blocks.acc, torch.bool)
    found = [
        hidden.new_zeros(len(hidden), dtype=dtype) if wanted else None
        for wanted, dtype in zip(outputs, dtypes, strict=True)
    ]
    if kept is not None:
        stats.copy_(stats.new_tensor([[0], [1], [0]]))  # log-prob 0
    for rows in kept_chunks(kept, n, plan.block_rows):
        h, y = hidden[rows], targets[rows]
        moments = Moments(len(h), outputs, blocks.scratch)
        for start, _, z in blocks(h):
            moments.add(start, z, y, None if second is None else second[: z.numel()].view(z.shape))
        stats[0, rows], stats[1, rows], stats[2, rows] = moments.shift, moments.sum, moments.target
        for whole, part in zip(found, moments.outputs(y, len(head.weight)), strict=True):
            if whole is not None and part is not None:
                whole[rows] = part
    return Statistics(*stats.unbind()).logps, stats, found


def logprobs_backward(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    stats: Tensor,  # (3, N) of the forward pass
    grad: Tensor,  # (N,) upstream gradient of the log-probs
    need: tuple[bool, bool, bool],
    memory_budget: int | None,
    own: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dH, dW, db from recomputed logits. 2·N·D·V flops, and as much again for each of dH and dW.

    `own`: the head is a slice of the vocabulary, and these are the statistics (3, N) of it alone; `stats` cover all of
    it, a target may be `rows.ELSEWHERE`, and dH is this slice's share, in the accumulator dtype
    (`exo_fast.vocab_parallel`).
    """
    sliced = own is not None
    if not sliced and head_attention.applies(len(hidden), hidden, head):
        return head_attention.logprobs_backward(hidden, head, targets, stats, grad, need, memory_budget)
    kept = kept_rows(targets)
    n = len(hidden) if kept is None else len(kept)
    plan = Plan.of(n, hidden, head, memory_budget)
    blocks, grads = LogitBlocks(head, plan, hidden), Gradients(hidden, head, need, sliced)
    keep = keep_buffer(hidden, head, plan)
    for rows in kept_chunks(kept, n, plan.block_rows):
        h, y, part, c = hidden[rows], targets[rows], Statistics(*stats[:, rows].unbind()), grad[rows]
        if keep is None:
            grads.add_by_blocks(blocks, rows, h, y, part, c)
            continue
        u = keep[: len(h)]
        exponentials(blocks, h, y, u, part)
        if grads.hidden is not None:
            unit = grads.unit_hidden(u, part, blocks)
            grads.hidden[rows] = unit.mul_(c.unsqueeze(1)).to(grads.hidden.dtype)
        if grads.head_needed:
            grads.add_head(u, h, part, c, blocks.scratch)
    return grads.result()


def keep_buffer(hidden: Tensor, head: Head, plan: Plan) -> Tensor | None:
    if not plan.rows:
        return None
    return torch.empty(plan.rows, len(head.weight), dtype=storage(hidden), device=hidden.device)


def pair_gradients(
    hidden: Tensor, head: Head, need: tuple[bool, bool, bool], memory_budget: int | None, plan: Plan
) -> Gradients | None:
    """Return a second dW and db for pairs longer than the plan's rows; None if the budget does not hold them."""
    spare = scratch_budget(memory_budget, hidden.device) - plan.bytes
    if head.weight.numel() * accumulator(hidden).itemsize > spare:
        return None
    return Gradients(hidden, head, (False, *need[1:]))


def group_loss_forward(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    cu_seqlens: Tensor,  # (G·K + 1,), on the host or on hidden's device
    ref_logps: Tensor,
    rewards: Tensor,
    loss: LossOptions,
    need: tuple[bool, bool, bool],
    memory_budget: int | None,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Return losses (G,), policy log-probs (G, K), gradients of the *mean* loss: in one pass if the budget allows.

    A group's loss depends on that group alone: when its last row is done its coefficients are known, and the kept rows
    become dW at once. A pair's coefficients are c and −c, so a pair beyond the budget becomes dW without its c, which
    is multiplied in at its end. Other groups' rows beyond the budget are made again: 2·D·V flops more for each.
    """
    if need[0] and head_attention.applies(len(hidden), hidden, head):
        return head_attention.group_loss_forward(
            hidden, head, targets, cu_seqlens, ref_logps, rewards, loss, need, memory_budget
        )
    groups, candidates = ref_logps.shape
    bounds = cu_seqlens[::candidates].tolist()
    together = max(b - a for a, b in itertools.pairwise(bounds))
    plan = Plan.of(len(hidden), hidden, head, memory_budget, together)
    grads, pair_grads = Gradients(hidden, head, need), None
    if candidates == 2 and grads.head_needed and 0 < plan.rows < together:
        pair_plan = Plan.of(len(hidden), hidden, head, memory_budget)
        pair_grads = grads if groups == 1 else pair_gradients(hidden, head, need, memory_budget, pair_plan)
        plan = plan if pair_grads is None else pair_plan
    blocks = LogitBlocks(head, plan, hidden)
    keep = keep_buffer(hidden, head, plan) if any(need) else None
    lengths = cu_seqlens.diff()
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths).to(hidden.device)
    policy_logps = torch.zeros(groups * candidates, dtype=blocks.acc, device=hidden.device)
    losses = torch.empty(groups, dtype=blocks.acc, device=hidden.device)

    for first, last in group_units(bounds, plan.block_rows):
        pieces = row_chunks(bounds[first], bounds[last], plan.block_rows)
        stats, unit = [], None
        without_c = pair_grads if len(pieces) > 1 else None
        for rows in pieces:
            u = None if keep is None else keep[: rows.stop - rows.start]
            part = exponentials(blocks, hidden[rows], targets[rows], u)
            stats.append(part)
            policy_logps.index_add_(0, owner[rows], part.logps)
            if grads.hidden is not None and u is not None:
                unit = grads.unit_hidden(u, part, blocks)
                if len(pieces) > 1:
                    grads.hidden[rows] = unit.to(hidden.dtype)
            if without_c is not None and u is not None:
                sign = 1 - 2 * (owner[rows] % 2).to(blocks.acc)
                without_c.add_head(u, hidden[rows], part, sign, blocks.scratch)
        sequences = slice(first * candidates, last * candidates)
        losses[first:last], coefficients = losses_and_coefficients(
            policy_logps[sequences].view(last - first, candidates),
            ref_logps[first:last],
            rewards[first:last],
            loss,
        )
        if not any(need):
            continue
        c = (coefficients.flatten() / groups).to(blocks.acc)
        if without_c is not None:
            grads.join_head(without_c, float(c[0] - c[1]) / 2)
        # The last piece is still kept; the ones before it, if any, are made again.
        for rows, part in zip(reversed(pieces), reversed(stats), strict=True):
            c_rows = c[owner[rows] - sequences.start]
            if keep is None:
                grads.add_by_blocks(blocks, rows, hidden[rows], targets[rows], part, c_rows)
                continue
            if grads.hidden is not None:
                whole = unit if unit is not None and len(pieces) == 1 else grads.hidden[rows].to(blocks.acc)
                grads.hidden[rows] = whole.mul_(c_rows.unsqueeze(1)).to(hidden.dtype)
            if grads.head_needed and without_c is None:
                u = keep[: rows.stop - rows.start]
                if rows != pieces[-1]:
                    exponentials(blocks, hidden[rows], targets[rows], u, part)
                grads.add_head(u, hidden[rows], part, c_rows, blocks.scratch)
    return losses, policy_logps.view(groups, candidates), grads.result()
