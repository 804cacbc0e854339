"""Find launches of the Triton backend that certification has not compiled: print a line for each, and a count.

Run in a process of its own, without TRITON_INTERPRET: nothing is launched, but Triton types and hints the arguments of
every launch as it would on the targets named on the command line.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from exo_fast.backends import checks, products
from exo_fast.backends import triton as backend
from exo_fast.head import Head
from exo_fast.kernels import launch as kernel_launch
from exo_fast.kernels import targets as kernel_targets
from exo_fast.kernels.certification import certify
from exo_fast.kernels.certification.ahead_of_time import source_of
from exo_fast.kernels.launch import Config
from exo_fast.kernels.targets import TARGETS, Target
from exo_fast.reference import LossOptions

Arguments = dict[str, tuple]  # name -> its type and whether it is a multiple of 16, or the value of a constexpr


@functools.cache
def binder_of(kernel: Any, target: Target) -> Callable:
    """Return the types and hints that Triton's launcher gives arguments."""
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(target.gpu))


def arguments(kernel: Any, target: Target, config: Config, given: dict) -> Arguments:
    given = given | {name: value for name, value in config.constants.items() if name in kernel.arg_names}
    bound, specialization, _ = binder_of(kernel, target)(**given)
    return {
        name: ("constexpr", bound[name]) if kind == "constexpr" else (kind, "D" in (hints or ""))
        for name, (kind, hints) in zip(kernel.arg_names, specialization, strict=True)
    } | {"num_warps": config.num_warps, "num_stages": config.num_stages}


def certified(target: Target) -> Iterator[tuple[str, Arguments]]:
    for job in certify.jobs(certify.discover(), [target.name]):
        if job.buffers and job.config == 0:  # the same again for tensors under 2 GiB
            continue
        _, variant, config = certify.described(job)
        source, _ = source_of(variant, config, target, job.buffers)
        found = {}
        for place, (name, kind) in enumerate(source.signature.items()):
            hinted = ["tt.divisibility", 16] in source.attrs.get((place,), [])
            found[name] = ("constexpr", source.constants[(place,)]) if kind == "constexpr" else (kind, hinted)
        yield variant.kernel.__name__, found | {"num_warps": config.num_warps, "num_stages": config.num_stages}


def launched(target: Target) -> Iterator[tuple[str, Arguments]]:
    """Every launch of every schedule, for heads with and without bias and softcap whose width is a multiple of 16, and
    numbers of rows and tokens that are and are not."""
    made = []
    backend.of_device = kernel_targets.of_device = lambda device: target
    backend.launch = kernel_launch.launch = lambda kernel, grid, config, **given: made.append(
        (kernel.__name__, arguments(kernel, target, config, given))
    )
    matmul, add_matmul = products.matmul, products.add_matmul

    def own_matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return (matmul if a.dtype == torch.float32 else functools.partial(products.multiply, add=False))(a, b, out=out)

    def own_add_matmul(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return add_matmul(total, a, b) if a.dtype == torch.float32 else products.multiply(a, b, total, add=True)

    backend.matmul, backend.add_matmul = own_matmul, own_add_matmul  # as on a build whose library has no such products
    loss = LossOptions("exo-rw")
    batch = {"ref_logps": torch.randn(2, 2), "rewards": torch.randn(2, 2), "loss": loss}
    dtypes, flags = (torch.bfloat16, torch.float16, torch.float32), (False, True)
    sizes = ((64, 160, 2048), (421, 131, 64), (1, 2, 64))
    for dtype, bias, softcap, (n, vocab, width) in itertools.product(dtypes, flags, flags, sizes):
        hidden, weight = torch.zeros(n, width, dtype=dtype), torch.zeros(vocab, width, dtype=dtype)
        head = Head(weight, torch.zeros(vocab, dtype=dtype) if bias else None, 1.0, 30.0 if softcap else None)
        targets, bounds = torch.zeros(n, dtype=torch.int64), torch.tensor([0, 0, n // 2, n // 2, n])
        row = 8 * vocab + 8 * width  # bytes, about
        for budget, need in itertools.product(
            (None, 200 * row, 1), ((False, False, False), (True, False, False), (True, True, False), (True, True, bias))
        ):
            backend.group_loss_forward(hidden, head, targets, bounds, need=need, memory_budget=budget, **batch)
            _, stats, _ = backend.logprobs_forward(hidden, head, targets, budget, need[0])
            backend.logprobs_backward(hidden, head, targets, stats, torch.ones(n), need, budget)
            backend.statistics_forward(hidden, head, targets, budget, outputs=(True,) * 4)
    launch_checks()
    yield from made


def launch_checks() -> None:
    """Launch the checks of arguments, of every public function and for tensors of every dtype."""
    checks._fused = lambda *_: True
    torch._assert_async = lambda *_: None

    def groups(loss_type: str, candidates: int, dtype: torch.dtype) -> checks.Groups:
        numbers = torch.zeros(2, candidates, dtype=dtype)
        return checks.Groups(numbers, numbers.clone(), LossOptions(loss_type), "error")

    loss = {2: "exo-pref", 64: "dpo-rw"}
    for dtype, candidates in ((torch.int64, 2), (torch.int32, 64)):
        targets, bounds = torch.zeros(300, dtype=dtype), torch.zeros(2 * candidates + 1, dtype=dtype)
        checks.checked_targets("triton", targets, 7, ignore_index=-100)
        found = groups(loss[candidates], candidates, torch.float32)
        checks.checked_targets("triton", targets, 7, cu_seqlens=bounds, groups=found)
    on_host = bounds.to("meta")  # on another device than targets
    checks.check_boundary_values = lambda *_: None
    found = groups("exo-pref", 3, torch.bfloat16)
    checks.checked_targets("triton", torch.zeros(300, dtype=torch.int64), 7, cu_seqlens=on_host, groups=found)


def uncovered(launch: Arguments, compiled: list[Arguments]) -> list[str]:
    """Where a launch differs from the nearest binary. An argument that is None is one the binary does not use."""
    differences = (
        [
            f"{name} is {value}, certified {other[name]}"
            for name, value in launch.items()
            if value != other[name] and value != ("constexpr", None)
        ]
        for other in compiled
    )
    return min(differences, key=len)


def compare(target: Target) -> None:
    binaries: dict[str, list[Arguments]] = {}
    for name, found in certified(target):
        binaries.setdefault(name, []).append(found)
    seen = {(name, str(launch)): launch for name, launch in launched(target)}
    for (name, _), launch in sorted(seen.items()):
        if differences := uncovered(launch, binaries[name]):
            print(f"{target.name} {name}: {'; '.join(differences)}")
    print(f"{target.name}: {len(seen)} different launches of {len({name for name, _ in seen})} kernels")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        compare(TARGETS[name])
