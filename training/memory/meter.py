"""Count the memory of torch operations as they are run, with or without data in their tensors."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Adds up the storages that operations inside this mode make, for as long as they live.

    A storage counts under the `label` that was set when it was made. Its bytes are multiplied by the label's `share`
    (1 by default), so tensors spread over processes count by one process's part. `peak` is the composition,
    label -> bytes, at the moment of the largest sum.
    """

    def __init__(self, share: dict[str, float] | None = None) -> None:
        super().__init__()
        self.label = "other"
        self.share = share or {}
        self.now: Counter[str] = Counter()
        self.total = 0
        self.peak: dict[str, int] = {}
        self._largest = 0
        self._live: dict[int, list[Any]] = {}  # storage -> [weak reference, bytes, label]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.hold(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of these tensors that are not counted yet, under the label that is set."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._live:
                # The Python object of a storage lives as long as the storage does, so this says when it is freed.
                gone = weakref.ref(storage, lambda _, key=key: self._drop(key))
                self._live[key] = [gone, storage.nbytes(), self.label]
                self._add(self.label, storage.nbytes())

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Count the tensor's storage under `label` from now on."""
        self.hold([tensor])
        entry = self._live[tensor.untyped_storage()._cdata]
        self._add(entry[2], -entry[1])
        entry[2] = label
        self._add(label, entry[1])

    @contextlib.contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Count storages that are made in this block under `label`."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def _add(self, label: str, size: int) -> None:
        counted = int(size * self.share.get(label, 1))
        self.now[label] += counted
        self.total += counted
        if self.total > self._largest:
            self._largest, self.peak = self.total, dict(self.now)

    def _drop(self, key: int) -> None:
        _, size, label = self._live.pop(key)
        self._add(label, -size)
