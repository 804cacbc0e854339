"""Argument checks of the public functions. Each error names the argument, its value and the requirement.

Wrong shapes, dtypes, devices and numbers always raise ValueError, before any work. Tensor values are checked only
if that needs no waiting: on the CPU a wrong one raises ValueError too; on a GPU, and in a graph that is being traced,
an assertion runs with the work on the device and fails there (`require`), so no call ever synchronises. Functions that
check values have `values` in their names: `exo_fast.backends.checks` calls them, or one kernel in their place.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from exo_fast.reference import LOSS_TYPES, LossOptions, compute_dtype, default_label_smoothing

INTEGERS = (torch.int32, torch.int64)
TIES = ("error", "share")
NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
# Numbers are compared as float32, the dtype of tensors in the computation.
LEAST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
LEAST_SMOOTHING = 1e-30  # shared by K − 1 candidates, its logarithm must still be finite


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def traced(value: Tensor) -> bool:
    """Return whether this is a value of a graph that is being traced, not a number."""
    return torch.compiler.is_compiling() or type(value) is not Tensor or is_in_torch_dispatch_mode()


def readable(value: Tensor) -> bool:
    """Return whether the values can be read without waiting: on the CPU and not in a graph."""
    return value.device.type == "cpu" and not traced(value)


def require(condition: Tensor, message: str, error: Callable[[], str]) -> None:
    """Raise ValueError(error()) if `condition` (one bool) is readable and false; if unreadable, assert on its device.

    `message` is the assertion's text. It quotes no number: a graph of dynamic shapes would be bound to it.
    """
    if not readable(condition):
        torch._assert_async(condition, message)
    elif not bool(condition):
        raise ValueError(error())


def check_tensor(name: str, value: object) -> None:
    """Check for a dense tensor that holds values."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.is_nested or value.is_quantized or value.layout != torch.strided:
        kind = "a nested" if value.is_nested else "a quantised" if value.is_quantized else value.layout
        raise ValueError(f"{name} must be a dense tensor, got {kind} one")
    if value.device.type == "meta":
        raise ValueError(f"{name} is on the meta device, which holds no values: make it on another")


def check_floating(name: str, value: Tensor) -> None:
    """Check for a dtype that can be computed with; dtypes of 8 bits and fewer cannot."""
    if not value.dtype.is_floating_point or value.dtype.itemsize < 2:
        fix = "" if value.dtype.is_floating_point or value.dtype.is_complex else f": pass {name}.float()"
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {value.dtype}{fix}")


def check_devices(where: str, device: torch.device, **tensors: Tensor | None) -> None:
    """Check that all `tensors` are on the device of the argument `where`."""
    for name, value in tensors.items():
        if value is not None and value.device != device:
            raise ValueError(f"{name} is on {value.device} and {where} on {device}: move one of them")


def check_ignore_index(ignore_index: int) -> None:
    if not isinstance(ignore_index, int) or not -(2**31) <= ignore_index < 2**31:
        raise ValueError(f"ignore_index must be a whole number of 32 bits, got {_shown(ignore_index)}")


def _is_number(value: object) -> bool:
    """Return whether this is a number other than 0 that float32 can hold."""
    # A SymInt or SymFloat has an absolute value, though its stubs lack it.
    return isinstance(value, NUMBERS) and LEAST <= abs(value) <= LARGEST  # type: ignore[arg-type]


def _shown(value: object) -> str:
    """Return a value for an error's text: a number or a word as written, anything else by its type."""
    is_short = isinstance(value, (float, str)) or (isinstance(value, int) and abs(value) < 2**64)
    return repr(value) if is_short or value is None else f"a {type(value).__name__}"


def check_projection(
    hidden: Tensor, weight: Tensor, weight_dtype: torch.dtype, targets: Tensor, bias: Tensor | None, scale: float,
    softcap: float | None, fewest_rows: int = 1,
) -> None:  # fmt: skip
    """Check hidden (..., D), weight (V, D), targets (...), bias (V,): shapes, dtypes, devices, scale and softcap.
    `weight_dtype`: the dtype in which weight is multiplied."""
    for name, value in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        check_tensor(name, value)
    if hidden.dim() not in (2, 3) or hidden.shape[-1] == 0:
        raise ValueError(f"hidden must be (N, D) or (B, T, D), with D at least 1, got shape {_shape(hidden)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < fewest_rows:
        raise ValueError(
            f"weight must be (V, D) with D = {hidden.shape[-1]} as in hidden {_shape(hidden)}, "
            f"got {_shape(weight)}; an lm_head's weight is (vocabulary, hidden size)"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must have shape {_shape(hidden)[:-1]}, one id for each row of hidden, got {_shape(targets)}"
        )
    if targets.dtype not in INTEGERS:
        raise ValueError(f"targets must be int64 or int32 token ids, got {targets.dtype}")
    check_floating("hidden", hidden)
    if hidden.dtype != weight_dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight is {weight_dtype}: cast one of them, or call under torch.autocast"
        )
    if bias is not None:
        check_tensor("bias", bias)
        if _shape(bias) != (weight.shape[0],):
            raise ValueError(f"bias must be (V,) = ({weight.shape[0]},) as weight, got {_shape(bias)}")
        check_floating("bias", bias)
    check_devices("hidden", hidden.device, weight=weight, targets=targets, bias=bias)
    if not _is_number(scale):
        raise ValueError(f"scale must be a finite number other than 0, got {_shown(scale)}")
    if softcap is not None and not (_is_number(softcap) and softcap > 0):
        raise ValueError(f"softcap must be a positive number or None, got {_shown(softcap)}")


def check_target_values(targets: Tensor, vocab: int | Tensor, ignore_index: int | None) -> None:
    """Check that every target is in [0, V) or `ignore_index`; for a vocabulary in slices V is a tensor ()."""
    inside = (targets >= 0) & (targets < vocab)
    if ignore_index is not None:
        inside |= targets == ignore_index

    def error() -> str:
        where = int((~inside).flatten().nonzero()[0])
        allowed = "" if ignore_index is None else f", or {ignore_index} to be ignored"
        return (
            f"targets[{where}] (flattened) is {int(targets.flatten()[where])}; "
            f"ids must lie in [0, {int(vocab)}), the rows of weight{allowed}"
        )

    message = "targets: ids must lie in [0, V), the rows of weight"
    require(inside.all(), message if ignore_index is None else f"{message}, or be ignore_index", error)


def check_budget(memory_budget: int | None) -> None:
    if memory_budget is not None and (not isinstance(memory_budget, int) or not 0 < memory_budget < 2**63):
        raise ValueError(f"memory_budget must be a positive number of bytes or None, got {_shown(memory_budget)}")


def check_groups(
    policy_shape: tuple[int, ...] | None, ref_logps: Tensor, rewards: Tensor, loss_type: str, beta_pi: float,
    beta_r: float, label_smoothing: float | None, ties: str,
) -> LossOptions:  # fmt: skip
    """Check the K-way loss's arguments, but for values in tensors; return its options, with the default label smoothing
    if None is given."""
    if not isinstance(loss_type, str) or loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={_shown(loss_type)} is not known; choose one of {', '.join(LOSS_TYPES)}")
    if not isinstance(ties, str) or ties not in TIES:
        raise ValueError(f"ties={_shown(ties)} is not known; choose one of {', '.join(TIES)}")
    check_tensor("ref_logps", ref_logps)
    check_tensor("rewards", rewards)
    if ref_logps.dim() != 2 or ref_logps.shape[1] < 2 or ref_logps.shape[0] < 1:
        raise ValueError(
            f"ref_logps must be (G, K), at least one group of at least 2 candidates, got {_shape(ref_logps)}"
        )
    if rewards.shape != ref_logps.shape:
        raise ValueError(f"rewards must be (G, K) = {_shape(ref_logps)} as ref_logps, got {_shape(rewards)}")
    if policy_shape is not None and policy_shape != _shape(ref_logps):
        raise ValueError(f"policy_logps must be (G, K) = {_shape(ref_logps)} as ref_logps, got {policy_shape}")
    for name, value in (("ref_logps", ref_logps), ("rewards", rewards)):
        check_floating(name, value)
    check_devices("ref_logps", ref_logps.device, rewards=rewards)
    for name, number in (("beta_pi", beta_pi), ("beta_r", beta_r)):
        if not (_is_number(number) and number > 0):
            raise ValueError(f"{name} must be a positive number, got {_shown(number)}")
    if label_smoothing is not None and not isinstance(label_smoothing, NUMBERS):
        raise ValueError(f"label_smoothing must be a number or None, got {_shown(label_smoothing)}")
    smoothing = default_label_smoothing(loss_type) if label_smoothing is None else label_smoothing
    lowest = 0.0 if loss_type.startswith("dpo") else LEAST_SMOOTHING
    if not loss_type.endswith("-rw") and not lowest <= smoothing < 1:
        need = "0 <= label_smoothing < 1" if lowest == 0 else "0 < label_smoothing < 1, for log p to be finite"
        raise ValueError(f"label_smoothing={_shown(smoothing)}: {loss_type} needs {need}")
    return LossOptions(loss_type, beta_pi, beta_r, smoothing)


def check_group_values(ref_logps: Tensor, rewards: Tensor, options: LossOptions, ties: str) -> None:
    """Check that log-probs and rewards (G, K) are finite, and that rewards suit the loss."""
    _check_finite("ref_logps", ref_logps)
    _check_finite("rewards", rewards)
    if options.loss_type.endswith("-rw"):
        scaled = rewards.to(compute_dtype(ref_logps, rewards)) / options.beta_r
        _check_finite("rewards / beta_r", scaled, "beta_r is too small for rewards of this size")
    elif ties == "error":
        _check_ties(rewards, options.loss_type)


def _check_finite(name: str, value: Tensor, problem: str = "every value must be finite") -> None:
    """Check that every value of a (G, K) tensor is finite."""
    finite = torch.isfinite(value)

    def error() -> str:
        row, column = (int(i) for i in (~finite).nonzero()[0])
        return f"{name}[{row}, {column}] is {float(value[row, column])}; {problem}"

    require(finite.all(), f"{name}: {problem}", error)


def _check_ties(rewards: Tensor, loss_type: str) -> None:
    """Check that every row of (G, K) rewards has one highest."""
    single = (rewards == rewards.amax(dim=1, keepdim=True)).sum(dim=1) <= 1
    problem = (
        f"a tie for the highest reward, so {loss_type} has no preferred candidate; "
        "drop the row or break the tie, let the tied ones share the target (ties='share'), or use a *-rw loss"
    )

    def error() -> str:
        row = int((~single).nonzero()[0])
        return f"rewards[{row}] = {rewards[row].tolist()} has {problem}"

    require(single.all(), f"rewards: a row has {problem}", error)


def check_boundaries(cu_seqlens: Tensor, groups: int, candidates: int, device: torch.device) -> None:
    """Check cu_seqlens (G*K + 1,), on the CPU or on `device`, but for its values."""
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in INTEGERS or _shape(cu_seqlens) != (groups * candidates + 1,):
        raise ValueError(
            f"cu_seqlens must be int32 or int64 of shape (G*K + 1,) = ({groups * candidates + 1},) for ref_logps "
            f"({groups}, {candidates}), got {cu_seqlens.dtype} {_shape(cu_seqlens)}"
        )
    if cu_seqlens.device.type != "cpu" and cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} and hidden on {device}: move it there or to the CPU")


def check_boundary_values(cu_seqlens: Tensor, tokens: int) -> None:
    """Check that boundaries run from 0 to N and that every sequence has at least one token."""
    first, last = cu_seqlens.select(0, 0), cu_seqlens.select(0, -1)
    starts, ends = (cu_seqlens.narrow(0, begin, cu_seqlens.shape[0] - 1) for begin in (0, 1))
    require(
        (first == 0) & (last == tokens),
        "cu_seqlens must run from 0 to N, the rows of hidden",
        lambda: f"cu_seqlens must run from 0 to N = {tokens}, got {int(first)} to {int(last)}",
    )

    def error() -> str:
        i = int((starts >= ends).nonzero()[0])
        pair = cu_seqlens[i : i + 2].tolist()
        return f"cu_seqlens[{i}:{i + 2}] = {pair}: sequence {i} has {pair[1] - pair[0]} tokens; at least 1 is needed"

    # Compared directly, because a difference can wrap around.
    require((starts < ends).all(), "cu_seqlens: a sequence has no token; at least 1 is needed", error)
