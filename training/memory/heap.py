"""What the C library's heap makes of a sequence of allocations: on a CPU, memory that no tensor holds any more.

PyTorch takes CPU tensors from malloc. glibc's serves requests below a threshold from one growing heap, by best fit,
and a freed block inside it stays resident. The threshold starts at 128 KiB and rises, to 32 MiB at most, to the size
of any larger block that is freed, so within a step of training nearly all activations share that heap: temporary
values leave holes between those that are kept, a tenth to a third of what is in use. `Heap` follows the same rules.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Any

PAGE, ALIGN, HEADER = 4096, 64, 16
THRESHOLD, LARGEST_THRESHOLD = 128 * 2**10, 32 * 2**20  # M_MMAP_THRESHOLD and its dynamic limit
PAD = 128 * 2**10  # M_TOP_PAD
# PyTorch asks for aligned blocks, for which glibc looks for a hole this much larger: one that a block of the same size
# has just left does not do, unless a neighbour is free too.
SLACK = 96


class Heap:
    """glibc's main arena, for blocks that are large enough to matter (smaller ones are rounded up to 64 bytes)."""

    def __init__(self) -> None:
        self.threshold = THRESHOLD
        self.mapped = 0  # bytes in blocks of their own
        self.top = 0  # end of the last block in use
        self.end = 0  # end of what is resident
        self.peak = 0
        self._blocks: dict[Any, tuple[int | None, int]] = {}  # name -> (start, or None where mapped; size)
        self._free: list[tuple[int, int]] = []  # (size, start), sorted
        self._starts: dict[int, int] = {}  # of free blocks: start -> size
        self._ends: dict[int, int] = {}  # end -> start

    @property
    def resident(self) -> int:
        """Bytes."""
        return self.end + self.mapped

    def allocate(self, name: Any, size: int) -> None:
        if size >= self.threshold:
            size = -(-(size + HEADER) // PAGE) * PAGE
            self.mapped += size
            self._blocks[name] = (None, size)
        else:
            size = -(-(size + HEADER) // ALIGN) * ALIGN
            self._blocks[name] = (self._place(size), size)
        self.peak = max(self.peak, self.resident)

    def free(self, name: Any) -> None:
        start, size = self._blocks.pop(name)
        if start is None:
            self.mapped -= size
            if self.threshold < size <= LARGEST_THRESHOLD:
                self.threshold = size
            return
        stop = start + size
        if start in self._ends:
            start = self._take(self._ends[start])
        if stop in self._starts:
            size = self._starts[stop]
            self._take(stop)
            stop += size
        if stop == self.top:
            self.top = start
            if self.end - self.top > 2 * self.threshold:
                self.end = self.top + PAD
        else:
            self._put(start, stop - start)

    def _place(self, size: int) -> int:
        """The start of a block of `size` bytes: in the smallest hole that has room, else at the end."""
        at = bisect_left(self._free, (size + SLACK, -1))
        if at == len(self._free):
            start, self.top = self.top, self.top + size
            self.end = max(self.end, self.top)
            return start
        room, start = self._free[at]
        self._take(start)
        if room > size:
            self._put(start + size, room - size)
        return start

    def _put(self, start: int, size: int) -> None:
        insort(self._free, (size, start))
        self._starts[start] = size
        self._ends[start + size] = start

    def _take(self, start: int) -> int:
        size = self._starts.pop(start)
        del self._ends[start + size]
        del self._free[bisect_left(self._free, (size, start))]
        return start
