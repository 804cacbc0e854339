"""Counts of the work that a call gives a device: operators of PyTorch that launch a kernel, and Triton kernels."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

WITHOUT_A_LAUNCH = ("aten::empty", "aten::new_empty", "aten::detach", "prim::", "exo_fast::")  # beginnings of names


class Launches(TorchDispatchMode):
    """Counts, by name, the operators that launch a kernel on a GPU. Views and allocations do not; what runs inside an
    operator of this library is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if not view and not schema.name.startswith(WITHOUT_A_LAUNCH):
            self.counts[schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def launches_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count the launches of the block, in which the library takes tensors of the CPU for tensors of a GPU that cannot
    be read without waiting. Triton's interpreter runs the kernels."""
    from exo_fast import validate
    from exo_fast.backends import checks
    from exo_fast.kernels import launch as launcher

    run = launcher.launch
    mode = Launches()

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        with torch.utils._python_dispatch._disable_current_modes():  # the interpreter's own operators
            run(kernel, *args, **kwargs)
        mode.counts[kernel.__name__] += 1

    with monkeypatch.context() as patch:
        patch.setattr(launcher, "launch", launch)
        for module in (validate, checks):
            patch.setattr(module, "readable", lambda value: False)
            patch.setattr(module, "traced", lambda value: False)
        with mode:
            yield mode.counts


READS = ("item", "tolist", "cpu", "numpy", "nonzero", "unique", "__bool__", "__int__", "__float__", "__index__")


class OnDevice(torch.Tensor):
    """A tensor of the CPU that counts how often the host would wait for a GPU: reads of it, and of what is computed
    from it. A copy by `.cpu()` is on the host."""

    reads: ClassVar[Counter[str]] = Counter()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        chooses = name == "__getitem__" and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool
            for i in (args[1] if isinstance(args[1], tuple) else args[1:])
        )  # the size of the result is a value
        if name in READS or chooses:
            OnDevice.reads[name] += 1
        found = super().__torch_function__(func, types, args, kwargs or {})
        return found.as_subclass(torch.Tensor) if name == "cpu" else found


def on_device(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch whose tensors are on a GPU, as `OnDevice` sees it."""
    return {k: v.as_subclass(OnDevice) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
