"""The kernels of `kernels/` put together: the default on CUDA and ROCm.

    forward only   `linear_logsumexp`: the product, its exponentials and sums in one kernel; logits never reach memory.
    kept           bf16 training. The same kernel also writes U = E − s·1[v = y] (`backends/torch.py`) as it leaves the
                   registers, 2 bytes a logit; dH = −(c·scale/s)(U W) and dW = −Uᵀ((c·scale/s) H) are the library's
                   (`products.py`).
    chunked        float32 and float16, and bf16 at the D for which the target's table (`kernels/tuned/`) has it. The
                   library makes float32 logits of a chunk of rows; `logsumexp_gather` reads them once,
                   `logits_to_grad` turns them into ∂L/∂z in place.
    fused          when the memory budget holds no chunk: `linear_logprobs_backward`, nothing of the size of V.
    statistics     the library's float32 logits of a chunk, which `token_statistics` reads once. Gradients, if
                   needed, are a second pass by any of the ways above.

`docs/performance.md` explains the choice. The one-pass schedule (gradients in forward, 6·N·D·V flops)
needs to know where groups end before the first product: from a cu_seqlens on the CPU, or because all rows fit the
budget. Otherwise, and for float16, whose coefficients need one scaling, log-probs come first (8·N·D·V). Nothing
waits for the device, so a step can be captured in a CUDA graph, once a first step has compiled the
kernels. Launches go to the current stream of hidden's device.

The table also has the configurations of kernels and the default memory budget. All are static functions of target,
dtype and D, so that the same input gives the same bits on the same kind of GPU. EXO_FAST_AUTOTUNE=1 times the tuning
space at the first launch instead, on that process's GPU.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

# The default of launches today; Triton warns that it will change and asks for an explicit value.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from exo_fast.backends import interpreted, scratch_budget
from exo_fast.backends.products import add_matmul, matmul
from exo_fast.backends.rows import TILE, group_units, row_chunks, whole_tiles
from exo_fast.head import Head
from exo_fast.kernels import finish_gradients as finish_kernel
from exo_fast.kernels import group_loss as group_loss_kernel
from exo_fast.kernels import linear_logprobs_backward as fused_kernel
from exo_fast.kernels import linear_logsumexp as linear_kernel
from exo_fast.kernels import logits_to_grad as grad_kernel
from exo_fast.kernels import logsumexp_gather as gather_kernel
from exo_fast.kernels import token_statistics as statistics_kernel
from exo_fast.kernels import tuned
from exo_fast.kernels.launch import Config, launch
from exo_fast.kernels.targets import Target, of_device
from exo_fast.reference import LossOptions

if interpreted():
    from exo_fast.backends.interpreter import repair

    repair()

MIN_ROWS = 64  # with fewer rows than this in the budget the fused kernels are predicted to be faster
SCHEDULE: str | None = None  # set by a test or a benchmark, in place of the table's: "kept", "chunked" or "fused"
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
Gradients3 = tuple[Tensor | None, Tensor | None, Tensor | None]  # dH, dW, db

configured: dict[tuple, Config] = {}  # (kernel, target, dtype, D) -> set by EXO_FAST_AUTOTUNE or by a test
room: dict[torch.device, int] = {}  # bytes that this process could hold on a GPU when the driver was last asked


def autotuning() -> bool:
    return os.environ.get("EXO_FAST_AUTOTUNE", "") == "1"


class Rows:
    """Rows of hidden states, their targets and statistics, with the head: the operands of every launch."""

    def __init__(self, hidden: Tensor, head: Head, targets: Tensor, stats: Tensor | None = None):
        self.hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()  # (n, D)
        self.weight = head.weight if head.weight.stride(-1) == 1 else head.weight.contiguous()  # (V, D)
        bias = None if head.bias is None else head.bias.contiguous()
        self.head = Head(self.weight, bias, head.scale, head.softcap)
        self.targets = targets.contiguous()  # (n,) int64
        self.n, self.width = hidden.shape
        self.vocab = len(head.weight)
        self.device, self.dtype = hidden.device, DTYPES[hidden.dtype]
        self.target: Target = of_device(hidden.device)
        self.stats = self.floats(3, self.n) if stats is None else stats  # shift, sum, target logit
        self.softcap = 0.0 if head.softcap is None else head.softcap
        self.flags = {"HAS_BIAS": head.bias is not None, "HAS_SOFTCAP": head.softcap is not None}

    def __getitem__(self, rows: slice) -> "Rows":
        return Rows(self.hidden[rows], self.head, self.targets[rows], self.stats[:, rows])

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=self.device)

    def config(self, kernel: ModuleType, static: Config, launch: Callable[[Config], object] | None = None) -> Config:
        """Return the static configuration, or the fastest one if tuning is on and `launch` can be timed."""
        key = (kernel.__name__.rpartition(".")[2], self.target.name, self.dtype, self.width)
        if key not in configured and launch is not None and autotuning() and self.device.type == "cuda":
            from triton.testing import do_bench

            space = kernel.configs(self.target, self.dtype)
            configured[key] = min(space, key=lambda config: do_bench(lambda: launch(config), return_mode="median"))
        return configured.get(key, static)


class TargetOrder:
    """The rows of a step in the order of their targets, by which `add_targets` finds the rows of one target."""

    def __init__(self, targets: Tensor):
        self.sorted, self.order = torch.sort(targets, stable=True)
        rows = torch.arange(len(targets), device=targets.device)
        self.place = torch.empty_like(rows).scatter_(0, self.order, rows)


def on(device: torch.device) -> AbstractContextManager:
    """Make `device` current, because Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def padded(columns: int) -> int:
    """Return the row stride of a chunk: a multiple of 16 elements, so that every access is 128 bits wide."""
    return triton.cdiv(columns, 16) * 16


def describable(*matrices: Tensor) -> bool:
    """Return whether TMA can read these: bases and rows at multiples of 16 bytes."""
    return all(
        m.data_ptr() % 16 == 0 and m.stride(0) * m.itemsize % 16 == 0 and m.stride(0) >= m.shape[1] for m in matrices
    )


# Log-probs ------------------------------------------------------------------------------------------------------------


def product_statistics(
    rows: Rows,
    logps: Tensor,
    kept: Tensor | None = None,
    flags: Tensor | None = None,
    residual: Tensor | None = None,
    again: bool = False,
) -> None:
    """Run `linear_logsumexp` and its merge. Without `kept`: maxima and sums. With it: U from the shifts in rows.stats,
    the residuals of its rounding, and `flags` for rows that need another shift. With `again`, further launches find
    that shift and make these rows again; they return at once if no row is flagged."""
    head, store = rows.head, kept is not None
    written = [] if kept is None else [kept]
    stride_kept = 0 if kept is None else kept.stride(0)
    descriptors = rows.target.descriptors and describable(rows.hidden, rows.weight, *written)

    def run(config: Config, again: bool = False) -> None:
        sizes = config.constants
        row_blocks = triton.cdiv(rows.n, sizes["BLOCK_N"])
        splits = linear_kernel.splits(rows.target, rows.n, rows.vocab, config)
        partial = rows.floats(3, splits, rows.n)
        hidden, weight, out = rows.hidden, rows.weight, kept
        if descriptors:
            hidden = TensorDescriptor.from_tensor(hidden, [sizes["BLOCK_N"], sizes["BLOCK_D"]])
            weight = TensorDescriptor.from_tensor(weight, [sizes["BLOCK_V"], sizes["BLOCK_D"]])
            out = TensorDescriptor.from_tensor(kept, [sizes["BLOCK_N"], sizes["PIECE"]]) if store else None

        def walk(store: bool, flagged: bool) -> None:
            launch(
                linear_kernel.linear_logsumexp, (row_blocks * splits,), config,
                hidden=hidden, weight=weight, bias=head.bias, targets=rows.targets, shift=rows.stats, flags=flags,
                partial=partial, kept=out if store else None, n=rows.n, vocab=rows.vocab, width=rows.width,
                stride_hidden=rows.hidden.stride(0), stride_weight=rows.weight.stride(0),
                stride_kept=stride_kept, splits=splits, scale=head.scale, softcap=rows.softcap,
                GROUP=linear_kernel.GROUP, STORE=store, FLAGGED=flagged,
                PRECISION=linear_kernel.precision(rows.target, rows.dtype), DESCRIPTORS=descriptors,
                FLATTEN=linear_kernel.flatten(rows.target), **rows.flags,
            )  # fmt: skip

        def merge(flagged: bool) -> None:
            launch(
                linear_kernel.merge, (triton.cdiv(rows.n, linear_kernel.MERGE_ROWS),), linear_kernel.MERGE,
                partial=partial, targets=rows.targets, stats=rows.stats, logps=logps, flags=flags, kept=kept,
                residual=residual, n=rows.n, splits=splits, stride_stats=rows.stats.stride(0),
                stride_kept=stride_kept, scale=head.scale, softcap=rows.softcap, STORE=store,
                FLAGGED=flagged, HAS_SOFTCAP=rows.flags["HAS_SOFTCAP"], OVERFLOW=linear_kernel.OVERFLOW,
            )  # fmt: skip

        walk(store, False)
        merge(False)
        if again:
            walk(False, True)
            walk(True, True)
            merge(True)

    if rows.target.descriptors and not descriptors:
        return run(linear_kernel.POINTERS, again)
    static = linear_kernel.config(rows.target, rows.dtype, rows.width, store)
    return run(rows.config(linear_kernel, static, run), again)


class Kept:
    """A chunk that holds U."""

    def __init__(self, like: Rows, rows: int):
        self.buffer = torch.empty(rows, padded(like.vocab), dtype=like.hidden.dtype, device=like.device)
        self.flags = torch.empty(rows, dtype=torch.int32, device=like.device)
        self.residual = like.floats(rows)

    @staticmethod
    def row_bytes(like: Rows) -> int:
        return padded(like.vocab) * like.hidden.itemsize + like.width * 6  # with the product and scaled rows

    def fill(self, rows: Rows, logps: Tensor) -> None:
        """Compute log-probs, statistics and U in one pass: 2·n·D·V flops."""
        head, kept, flags, residual = rows.head, *self._parts(rows.n)
        launch(
            linear_kernel.target_shift, (rows.n,), linear_kernel.TARGET_SHIFT,
            hidden=rows.hidden, weight=rows.weight, bias=head.bias, targets=rows.targets, stats=rows.stats, n=rows.n,
            width=rows.width, stride_hidden=rows.hidden.stride(0), stride_weight=rows.weight.stride(0),
            scale=head.scale, softcap=rows.softcap, **rows.flags,
        )  # fmt: skip
        # `again`: rows whose target's logit lies too far below others.
        product_statistics(rows, logps, kept, flags, residual, again=True)

    def refill(self, rows: Rows) -> Rows:
        """Make U again, from a known shift. Returns the rows with the statistics of this product."""
        again = Rows(rows.hidden, rows.head, rows.targets, rows.stats.clone())
        product_statistics(again, rows.floats(rows.n), *self._parts(rows.n))
        return again

    def _parts(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.buffer[:n], self.flags[:n], self.residual[:n]

    def gradients(self, rows: Rows, coefficients: Tensor, into: "Gradients", place: slice) -> None:
        """Add these rows to the gradients `into`."""
        u, residual = self.buffer[: rows.n, : rows.vocab], self.residual[: rows.n]
        if into.hidden is not None:
            product = matmul(u, rows.weight, out=into.scratch[: rows.n])
            finish_hidden(rows, coefficients, product, into, place, residual)
        if into.weight is not None or into.bias is not None:
            scaled = torch.empty(rows.hidden.shape, dtype=u.dtype, device=rows.device)
            factors = None if into.bias is None else scaled.new_empty(1, rows.n)
            launch(
                finish_kernel.scale_hidden, finish_kernel.grid(rows.n, rows.width, finish_kernel.ROWS),
                finish_kernel.ROWS, hidden=rows.hidden, stats=rows.stats, coefficients=coefficients, scaled=scaled,
                factors=factors, width=rows.width, stride_hidden=rows.hidden.stride(0),
                stride_stats=rows.stats.stride(0), scale=rows.head.scale, BIAS=factors is not None,
            )  # fmt: skip
            if factors is not None and into.bias is not None:
                into.bias += matmul(factors, u, out=rows.floats(1, rows.vocab)).squeeze(0)
            if into.weight is not None:
                into.add_weight(u.T, scaled)
            add_targets(rows, coefficients, into, place, u, residual)


class Logits:
    """A chunk that holds float32 logits."""

    def __init__(self, like: Rows, rows: int):
        self.logits = like.floats(rows, padded(like.vocab))

    @staticmethod
    def row_bytes(like: Rows) -> int:
        return padded(like.vocab) * 4

    def multiply(self, rows: Rows) -> None:
        """Compute the raw products H Wᵀ; the kernels apply bias, softcap and scale."""
        matmul(rows.hidden, rows.weight.T, out=self.logits[: rows.n, : rows.vocab])

    def statistics(self, rows: Rows, values: Tensor, top: Tensor) -> None:
        """Write row statistics, `values` (4, n) and `top` (n,) of `token_statistics`."""
        self.multiply(rows)
        arguments = {
            "logits": self.logits, "targets": rows.targets, "bias": rows.head.bias, "stats": rows.stats,
            "values": values, "top": top, "columns": rows.vocab, "width": self.logits.shape[1],
            "stride": self.logits.stride(0), "stride_stats": rows.stats.stride(0), "stride_values": values.stride(0),
            "scale": rows.head.scale, "softcap": rows.softcap,
        }  # fmt: skip

        def run(config: Config) -> None:
            grid = statistics_kernel.grid(rows.n)
            launch(statistics_kernel.token_statistics, grid, config, **arguments, **rows.flags)

        run(rows.config(statistics_kernel, statistics_kernel.configs(rows.target, rows.dtype)[0], run))


class Chunked(Logits):
    """A chunk that holds float32 logits, and then their gradient."""

    def __init__(self, like: Rows, rows: int):
        super().__init__(like, rows)
        narrow = like.hidden.dtype != torch.float32
        self.grad = torch.empty_like(self.logits, dtype=like.hidden.dtype) if narrow else self.logits

    @staticmethod
    def row_bytes(like: Rows) -> int:
        narrow = 0 if like.hidden.dtype == torch.float32 else like.hidden.itemsize
        return padded(like.vocab) * (4 + narrow) + like.width * (4 if narrow else 0)

    def fill(self, rows: Rows, logps: Tensor) -> None:
        self.read(rows)
        shift, total, target = rows.stats
        torch.sub(target - shift, total.log(), out=logps)

    def refill(self, rows: Rows) -> Rows:
        """Make the logits again. Returns the rows with the statistics of this product: the library's logits are not
        the kernel's to the last bit, and the probability of a likely token would be off by as much as its logit."""
        again = Rows(rows.hidden, rows.head, rows.targets)
        self.read(again)
        return again

    def read(self, rows: Rows) -> None:
        """Make the logits of a chunk and their statistics."""
        self.multiply(rows)
        arguments = {
            "logits": self.logits, "targets": rows.targets, "bias": rows.head.bias, "stats": rows.stats,
            "columns": rows.vocab, "width": self.logits.shape[1], "start": 0, "stride": self.logits.stride(0),
            "stride_stats": rows.stats.stride(0), "scale": rows.head.scale, "softcap": rows.softcap, "FIRST": True,
        }  # fmt: skip

        def run(config: Config) -> None:
            launch(gather_kernel.logsumexp_gather, gather_kernel.grid(rows.n), config, **arguments, **rows.flags)

        run(rows.config(gather_kernel, gather_kernel.configs(rows.target, rows.dtype)[0], run))

    def gradients(self, rows: Rows, coefficients: Tensor, into: "Gradients", place: slice) -> None:
        stride = self.logits.shape[1]
        # No timing here: a second launch would read gradients as logits.
        config = rows.config(grad_kernel, grad_kernel.configs(rows.target, rows.dtype)[0])
        partial = None
        if into.bias is not None:
            partial = rows.floats(grad_kernel.row_blocks(rows.n, config), stride)
        launch(
            grad_kernel.logits_to_grad, grad_kernel.grid(rows.n, stride, config), config,
            logits=self.logits, out=self.grad, targets=rows.targets, coefficients=coefficients.contiguous(),
            bias=rows.head.bias, stats=rows.stats, partial=partial, n=rows.n, columns=rows.vocab, width=stride, start=0,
            stride=stride, stride_out=self.grad.stride(0), stride_stats=rows.stats.stride(0),
            stride_partial=stride, scale=rows.head.scale, softcap=rows.softcap,
            HAS_BIAS_GRAD=partial is not None, **rows.flags,
        )  # fmt: skip
        g = self.grad[: rows.n, : rows.vocab]
        if into.hidden is not None:
            exact = rows.dtype == "fp32"  # nothing was rounded
            product = matmul(g, rows.weight, out=into.hidden[place] if exact else into.scratch[: rows.n])
            if not exact:
                finish_hidden(rows, coefficients, product, into, place)
        if into.weight is not None:
            into.add_weight(g.T, rows.hidden)
            add_targets(rows, coefficients, into, place)
        if into.bias is not None and partial is not None:
            into.bias += partial[:, : rows.vocab].sum(0)


class Gradients:
    """dH, dW and db of a run; unneeded ones stay None and cost nothing. dW and db are float32, and so is dH if the
    head is a slice of the vocabulary: a share of a sum."""

    def __init__(self, rows: Rows, need: tuple[bool, bool, bool], chunk_rows: int, sliced: bool = False):
        like = rows.stats if sliced else rows.hidden
        self.hidden = like.new_empty(rows.hidden.shape) if need[0] else None
        self.weight = rows.floats(*rows.weight.shape) if need[1] else None
        self.bias = rows.floats(rows.vocab).zero_() if need[2] and rows.head.bias is not None else None
        self.scratch = rows.floats(chunk_rows if need[0] and rows.dtype != "fp32" else 0, rows.width)
        # float32 entries are not rounded, so that nothing is added at the targets.
        summed = self.weight is not None or self.bias is not None
        self.order = TargetOrder(rows.targets) if summed and rows.dtype != "fp32" else None
        self.weight_started = False
        self.undo: Tensor | float = 1.0  # the inverse of the coefficients' factor

    def add_weight(self, left: Tensor, right: Tensor) -> None:
        """Add left right to dW; the first chunk writes, so the buffer is never cleared."""
        assert self.weight is not None  # for the type checker: called only if dW is needed
        if self.weight_started:
            add_matmul(self.weight, left, right)
        else:
            matmul(left, right, out=self.weight)
        self.weight_started = True

    def boost(self, coefficients: Tensor, scale: float) -> Tensor:
        """Multiply the coefficients by a power of two that brings the largest to between 2⁹ and 2¹⁰: gradients of
        single logits are too small for float16. The float32 results undo it, and the host never reads the number."""
        largest = (coefficients.abs().amax() * abs(scale)).clamp(1e-30, 1e30)
        factor = torch.exp2(10 - largest.log2().ceil())
        self.undo = 1 / factor
        return coefficients * factor

    def result(self) -> Gradients3:
        if isinstance(self.undo, Tensor):
            for sums in (self.weight, self.bias):
                if sums is not None:
                    sums *= self.undo
        return self.hidden, self.weight, self.bias


def finish_hidden(
    rows: Rows, coefficients: Tensor, product: Tensor, into: Gradients, place: slice, residual: Tensor | None = None
) -> None:
    """Write dH of these rows from the float32 product; with `residual`, from the product of U."""
    assert into.hidden is not None
    out, undo = into.hidden[place], into.undo
    launch(
        finish_kernel.finish_hidden, finish_kernel.grid(rows.n, rows.width, finish_kernel.ROWS), finish_kernel.ROWS,
        product=product, weight=rows.weight, targets=rows.targets, stats=rows.stats, coefficients=coefficients,
        residual=residual, undo=undo if isinstance(undo, Tensor) else None, out=out, vocab=rows.vocab,
        width=rows.width, stride_weight=rows.weight.stride(0), stride_stats=rows.stats.stride(0),
        stride_out=out.stride(0), scale=rows.head.scale, softcap=rows.softcap, KEPT=residual is not None,
        UNDO=isinstance(undo, Tensor), HAS_SOFTCAP=rows.flags["HAS_SOFTCAP"] and residual is None,
    )  # fmt: skip


def add_targets(
    rows: Rows, coefficients: Tensor, into: Gradients, place: slice, u: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:  # fmt: skip
    """Add to dW what rounding took off the entries at the targets of these rows; with `u`, to db too."""
    if into.order is None:
        return
    config, bias = finish_kernel.TARGETS, into.bias if u is not None else None
    launch(
        finish_kernel.add_targets, finish_kernel.grid(rows.n, 1 if into.weight is None else rows.width, config), config,
        hidden=rows.hidden, targets=rows.targets, stats=rows.stats, coefficients=coefficients, residual=residual,
        kept=u, place=into.order.place, sorted=into.order.sorted, order=into.order.order, grad=into.weight,
        grad_bias=bias, n=len(into.order.sorted), first=place.start, last=place.stop, vocab=rows.vocab,
        width=rows.width, stride_hidden=rows.hidden.stride(0), stride_stats=rows.stats.stride(0),
        stride_kept=0 if u is None else u.stride(0), scale=rows.head.scale, softcap=rows.softcap, KEPT=u is not None,
        WEIGHT=into.weight is not None, BIAS=bias is not None, HAS_SOFTCAP=rows.flags["HAS_SOFTCAP"] and u is None,
    )  # fmt: skip


def chunk_rows(
    kind: type[Kept] | type[Logits], rows: Rows, memory_budget: int | None, fewest: int | None = None
) -> int:
    """Return the rows of a chunk in the memory budget, 0 if they are fewer than `fewest`: too few to pay."""
    if kind is not Logits and schedule(rows) == "fused":
        return 0
    budget = scratch_budget(memory_budget, rows.device)
    if memory_budget is None and rows.device.type == "cuda":
        table = tuned.table(rows.target.name)
        scratch = tuned.SCRATCH if table is None else table.scratch
        budget = scratch.budget(torch.cuda.get_device_properties(rows.device).total_memory)
    if memory_budget is None and rows.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        # By halves: a number of rows that followed every byte of free memory would change the bits from run to run.
        free = free_memory(rows.device, 2 * budget)
        while budget > free // 2 and budget > 2**20:
            budget //= 2
    fit = whole_tiles(budget // kind.row_bytes(rows), rows.n)
    return fit if fit >= min(MIN_ROWS if fewest is None else fewest, rows.n) else 0


def free_memory(device: torch.device, enough: int) -> int:
    """Return the bytes of a GPU that this process can still allocate. The driver is asked only if its last answer, less
    the memory that tensors have taken since, is not `enough`."""
    # As a nested dict: `torch.cuda.memory_allocated` flattens and sorts all statistics for one number.
    statistics = torch.cuda.memory_stats_as_nested_dict(device)
    allocated, reserved = (statistics[name]["all"]["current"] for name in ("allocated_bytes", "reserved_bytes"))
    if room.get(device, 0) - allocated < enough:
        free, _ = torch.cuda.mem_get_info(device)
        room[device] = free + reserved
    return room[device] - allocated


def chunks(start: int, stop: int, size: int) -> list[slice]:
    """Split [start, stop) into chunks of at most `size` rows, nearly equal, all but the last in whole tiles."""
    return row_chunks(start, stop, size, TILE if size >= TILE else 1)


def fused_gradients(
    rows: Rows, coefficients: Tensor, need: tuple[bool, bool, bool], sliced: bool = False
) -> Gradients3:
    """Compute dH, dW and db by `linear_logprobs_backward`, with no chunk at all."""
    into = Gradients(rows, need, 0, sliced)
    if not rows.n:
        for gradient in (into.hidden, into.weight, into.bias):
            if gradient is not None:
                gradient.zero_()
        return into.hidden, into.weight, into.bias
    if rows.dtype == "fp16":
        coefficients = into.boost(coefficients, rows.head.scale)
    shared = {
        "bias": rows.head.bias, "targets": rows.targets, "stats": rows.stats,
        "coefficients": coefficients.contiguous(), "width": rows.width, "stride_stats": rows.stats.stride(0),
        "scale": rows.head.scale, "softcap": rows.softcap,
        "PRECISION": linear_kernel.precision(rows.target, rows.dtype), **rows.flags,
    }  # fmt: skip
    config = rows.config(fused_kernel, fused_kernel.config(rows.target, rows.dtype, rows.width))
    block, place = config.constants["BLOCK_OWN"], slice(0, rows.n)
    if into.hidden is not None:
        exact = rows.dtype == "fp32"  # nothing is rounded
        total = (into.hidden if exact else rows.floats(rows.n, rows.width)).zero_()
        launch(
            fused_kernel.linear_logprobs_backward, (triton.cdiv(rows.n, block),), config,
            own=rows.hidden, other=rows.weight, grad=total, grad_bias=None, n_own=rows.n, n_other=rows.vocab,
            stride_own=rows.hidden.stride(0), stride_other=rows.weight.stride(0), OWNS_ROWS=True, BIAS_GRAD=False,
            **shared,
        )  # fmt: skip
        if not exact:
            finish_hidden(rows, coefficients, total, into, place)
    if into.weight is not None or into.bias is not None:
        total = rows.floats(*rows.weight.shape) if into.weight is None else into.weight
        launch(
            fused_kernel.linear_logprobs_backward, (triton.cdiv(rows.vocab, block),), config,
            own=rows.weight, other=rows.hidden, grad=total.zero_(), grad_bias=into.bias, n_own=rows.vocab,
            n_other=rows.n, stride_own=rows.weight.stride(0), stride_other=rows.hidden.stride(0), OWNS_ROWS=False,
            BIAS_GRAD=into.bias is not None, **shared,
        )  # fmt: skip
        if into.weight is not None:
            add_targets(rows, coefficients, into, place)
    return into.result()


def schedule(rows: Rows) -> str:
    """Return "kept" (bf16 alone), "chunked" or "fused": what the target's table has for this dtype and D."""
    table = tuned.table(rows.target.name)
    chosen = SCHEDULE or (None if table is None else table.schedule(rows.dtype, rows.width)) or "kept"
    return "chunked" if chosen == "kept" and rows.dtype != "bf16" else chosen


def chunk_kind(rows: Rows) -> type[Kept] | type[Chunked]:
    return Kept if schedule(rows) == "kept" else Chunked


def logprobs_forward(
    hidden: Tensor, head: Head, targets: Tensor, memory_budget: int | None, unit_hidden: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return log-probs (N,), statistics (3, N), with `unit_hidden` ∂ℓ_t/∂h_t (N, D): 2·N·D·V flops, 4 with the last."""
    with on(hidden.device):
        rows = Rows(hidden, head, targets)
        logps = rows.floats(rows.n)
        kind = chunk_kind(rows)
        size = chunk_rows(kind, rows, memory_budget) if unit_hidden else 0
        if rows.n and not size:
            product_statistics(rows, logps)
        if not unit_hidden:
            return logps, rows.stats, None
        need = (True, False, False)
        ones = (rows.targets >= 0).float()
        if not size:
            return logps, rows.stats, fused_gradients(rows, ones, need)[0]
        chunk, into = kind(rows, size), Gradients(rows, need, size)
        for place in chunks(0, rows.n, size):
            chunk.fill(rows[place], logps[place])
            chunk.gradients(rows[place], ones[place], into, place)
        return logps, rows.stats, into.hidden


def statistics_forward(
    hidden: Tensor, head: Head, targets: Tensor, memory_budget: int | None, outputs: tuple[bool, ...]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Return log-probs (N,), statistics (3, N), and (N,) for each wanted one of `outputs` (entropy, log Σ p², mean
    logit, is_top1): 2·N·D·V flops. No other kernel gives entropies, so a row of logits is held whatever the budget."""
    with on(hidden.device):
        rows = Rows(hidden, head, targets)
        values, top = rows.floats(4, rows.n), torch.empty(rows.n, dtype=torch.int8, device=rows.device)
        if rows.n:
            size = max(1, chunk_rows(Logits, rows, memory_budget, fewest=1))
            chunk = Logits(rows, size)
            for place in chunks(0, rows.n, size):
                chunk.statistics(rows[place], values[:, place], top[place])
        # Copies, because an operator's results may share no memory.
        logps, entropy, squares, mean = (value.clone() for value in values)
        found = (entropy, squares, mean, top.bool())
        return logps, rows.stats, [value if wanted else None for value, wanted in zip(found, outputs, strict=True)]


def logprobs_backward(
    hidden: Tensor, head: Head, targets: Tensor, stats: Tensor, grad: Tensor, need: tuple[bool, bool, bool],
    memory_budget: int | None, own: Tensor | None = None,
) -> Gradients3:  # fmt: skip
    """Return dH, dW, db from logits made again: 2·N·D·V flops, and as much again for each of dH and dW. `own`: see
    `exo_fast.backends.torch.logprobs_backward`."""
    with on(hidden.device):
        rows = Rows(hidden, head, targets, stats)
        return second_pass(rows, torch.where(rows.targets >= 0, grad, 0.0), need, memory_budget, own)


def second_pass(
    rows: Rows,
    coefficients: Tensor,
    need: tuple[bool, bool, bool],
    memory_budget: int | None,
    own: Tensor | None = None,
) -> Gradients3:
    """Return the gradients, once the coefficients of all rows are known."""
    sliced = own is not None
    # U is finished with its own head's sums. A slice's sums are not the whole vocabulary's.
    kind = Chunked if sliced else chunk_kind(rows)
    size = chunk_rows(kind, rows, memory_budget)
    if not size:
        return fused_gradients(rows, coefficients, need, sliced)
    chunk, into = kind(rows, size), Gradients(rows, need, size, sliced)
    if rows.dtype == "fp16":
        coefficients = into.boost(coefficients, rows.head.scale)
    for place in chunks(0, rows.n, size):
        again = chunk.refill(rows[place])
        if own is not None:
            again.stats[1] /= share(own[:, place], rows.stats[:, place])
        chunk.gradients(again, coefficients[place], into, place)
    return into.result()


def share(own: Tensor, whole: Tensor) -> Tensor:
    """Return the probability (n,) of a slice of the vocabulary, from its statistics and the whole vocabulary's, which
    one product made. A sum divided by it gives probabilities in the whole vocabulary."""
    part = (own[0] - whole[0]).exp() * own[1] / whole[1]
    return torch.where(part == 0, torch.finfo(part.dtype).tiny, part)  # probabilities of 0, and not of 0 / 0


def group_bounds(cu_seqlens: Tensor, candidates: int) -> list[int] | None:
    """Return the boundaries of the groups, or None if reading them would wait for a device."""
    return cu_seqlens[::candidates].tolist() if cu_seqlens.device.type == "cpu" else None


def group_loss_forward(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    loss: LossOptions,
    need: tuple[bool, bool, bool],
    memory_budget: int | None,
) -> tuple[Tensor, Tensor, Gradients3]:
    """Return losses (G,), policy log-probs (G, K) and the gradients of the mean loss."""
    groups, candidates = ref_logps.shape
    bounds = group_bounds(cu_seqlens, candidates)
    if rewards.dtype == torch.float64:  # different ones may be equal in float32; only differences count
        rewards = rewards - rewards.amax(dim=1, keepdim=True)
    with on(hidden.device):
        rows = Rows(hidden, head, targets)
        logps, coefficients, losses = rows.floats(rows.n), rows.floats(rows.n), rows.floats(groups)
        policy_logps, per_sequence = rows.floats(groups, candidates), rows.floats(groups, candidates)
        arguments = {
            "logps": logps, "cu_seqlens": cu_seqlens.to(rows.device, non_blocking=True).contiguous(),
            "ref_logps": ref_logps.float().contiguous(), "rewards": rewards.float().contiguous(), "losses": losses,
            "policy_logps": policy_logps, "coefficients": per_sequence, "token_coefficients": coefficients,
            "beta_pi": loss.beta_pi, "beta_r": loss.beta_r, "label_smoothing": loss.label_smoothing,
            "upstream": 1 / groups, "CANDIDATES": candidates, "BLOCK_K": triton.next_power_of_2(candidates),
            "EXO": loss.loss_type.startswith("exo"), "PREF": loss.loss_type.endswith("-pref"),
            "WRITE_TOKENS": any(need),
        }  # fmt: skip
        config = group_loss_kernel.configs(rows.target, "fp32")[0]

        def finish(first: int, last: int) -> None:
            launch(group_loss_kernel.group_loss, (last - first,), config, first_group=first, **arguments)

        kind = chunk_kind(rows)
        size = chunk_rows(kind, rows, memory_budget) if any(need) else 0
        if rows.n <= size:
            bounds, ends = [0, rows.n], [0, groups]
        elif bounds is not None:
            ends = list(range(groups + 1))
        if not size or bounds is None or rows.dtype == "fp16":
            product_statistics(rows, logps)
            finish(0, groups)
            gradients = second_pass(rows, coefficients, need, memory_budget) if any(need) else (None, None, None)
            return losses, policy_logps, gradients

        chunk, into = kind(rows, size), Gradients(rows, need, size)
        for first, last in group_units(bounds, size):
            *early, final = chunks(bounds[first], bounds[last], size)
            for place in early:  # for a group larger than a chunk
                product_statistics(rows[place], logps[place])
            chunk.fill(rows[final], logps[final])
            finish(ends[first], ends[last])
            chunk.gradients(rows[final], coefficients[final], into, final)
            for place in early:
                chunk.gradients(chunk.refill(rows[place]), coefficients[place], into, place)
        return losses, policy_logps, into.result()
