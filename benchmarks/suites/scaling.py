"""Growth of time and memory: the operation against the number of tokens N, the vocabulary V and the candidates K.

    exo-fast bench scaling
    exo-fast bench scaling --only scaling/N/exo_fast

One size grows and the others stay. Peers show the growth of their memory, up to the machine's limit. The summary fits
time = a·x^b and scratch = c·x^d by least squares of the logarithms. For N, b should be 1 and d 0 (memory does not grow
with the tokens). For K both should be 0. For V b is 1 and the memory grows only to its budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from exo_fast.benchmarks.methods import problems
from exo_fast.benchmarks.suites import op

NAME = "scaling"
REAL, SMALL = (576, 49152), (256, 32768)  # D, V: SmolLM2-135M's head, and one that leaves time for 131,072 tokens
TOKENS = tuple(2**i for i in range(11, 18))  # 2,048 to 131,072
VOCABS = tuple(2**i for i in range(15, 19))  # 32,768 to 262,144
CANDIDATES = (2, 4, 8, 16)
PEER_TOKENS = {"full-logits": 8192, "cce": 32768}
MIN_SCRATCH = 1.0  # MB: smaller values are noise of counting pages


@dataclass(frozen=True)
class Case:
    """One point of a curve: `axis` (N, V or K) is the size that its curve follows."""

    axis: str
    method: str
    width: int
    vocab: int
    precision: str
    candidates: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"scaling/{self.axis}/{self.method}/{self.width}x{self.vocab}/{self.precision}/K{self.candidates}"
            f"/N{self.tokens}"
        )

    @property
    def size(self) -> int:
        return {"N": self.tokens, "V": self.vocab, "K": self.candidates}[self.axis]

    @property
    def op(self) -> op.Case:
        """Return this case as a case of the suite `op`."""
        return op.Case(
            self.method, "group_loss", self.width, self.vocab, self.precision, self.candidates, op.COMPLETION,
            self.tokens, "both",
        )  # fmt: skip


def cases(quick: bool = False) -> list[Case]:
    """Return the cases, curve by curve."""
    if quick:
        return [Case("N", op.OURS, *SMALL, "fp32", 2, n) for n in TOKENS[:4]]
    found = []
    for shape, precision in ((REAL, "bf16"), (SMALL, "fp32")):
        found += [Case("N", op.OURS, *shape, precision, 2, n) for n in TOKENS]
    for method, longest in PEER_TOKENS.items():
        found += [Case("N", method, *REAL, "bf16", 2, n) for n in TOKENS[::2] if n <= longest]
    for precision in ("fp32", "bf16"):
        found += [Case("V", op.OURS, SMALL[0], v, precision, 2, 4096) for v in VOCABS]
    found += [Case("K", op.OURS, *SMALL, "fp32", k, 8192) for k in CANDIDATES]
    return found


def impossible(case: Case) -> str | None:
    """Return why a case cannot run on this machine; None if it can."""
    return op.impossible(case.op)


def measure(case: Case, workdir: Path) -> dict:
    """Measure the case like `op`."""
    return op.measure(case.op, workdir)


def trial(case: Case, workdir: Path) -> tuple[Callable[[], object], dict]:
    """Make the trial like `op`."""
    return op.trial(case.op, workdir)


def extras(workdir: Path) -> dict:
    return {"copy_gbps": problems.copy_gbps()}


def exponent(sizes: list[float], values: list[float]) -> float:
    """Return b of value = a·size^b, by least squares of the logarithms."""
    xs, ys = [math.log(size) for size in sizes], [math.log(value) for value in values]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def summary(rows: list[dict]) -> dict:
    """Return the exponents of each curve of two points or more.

    `time` is the exponent of the seconds, `memory` of the scratch. `time_over_floor` is the exponent of the seconds
    over the seconds of the products alone (0 if the time grows like the products). Both are measured in the same
    process, so a drift of the machine's speed cancels.
    """
    curves: dict[tuple, list[dict]] = {}
    for row in rows:
        if "seconds" not in row:
            continue
        constant = ("tokens" if row["axis"] != "N" else "", "vocab" if row["axis"] != "V" else "")
        key = (row["axis"], row["method"], row["width"], row["precision"], *(row.get(name) for name in constant))
        curves.setdefault(key, []).append(row)
    fits = []
    for (axis, method, width, precision, *_), points in curves.items():
        sizes = [{"N": row["tokens"], "V": row["vocab"], "K": row["candidates"]}[axis] for row in points]
        if len(set(sizes)) < 2:
            continue
        fits.append(
            {
                "axis": axis,
                "method": method,
                "width": width,
                "vocab": None if axis == "V" else points[0]["vocab"],
                "precision": precision,
                "from": min(sizes),
                "to": max(sizes),
                "time": round(exponent(sizes, [row["seconds"] for row in points]), 4),
                "time_over_floor": round(
                    exponent(sizes, [row["seconds"] / row["baseline_seconds"] for row in points]), 4
                ),
                "memory": round(exponent(sizes, [max(MIN_SCRATCH, row["scratch_mb"]) for row in points]), 4),
            }
        )
    return {"fits": fits}
