"""What became slower, larger or less exact between two runs: `exo-fast bench --compare OLD`.

Rows are matched by name. Time is compared as a share of the same run's yardstick (`baseline_seconds`: the matrix
products alone, or plain full logits) where both runs have it, because the load of a machine and its model cancel in it;
else in seconds, and then only between runs of one machine. A difference counts from a ratio of

    time    the tolerance (1.1 unless told)
    memory  1.1, and more than 20 MB
    errors  1.5, each by its name

A case that ran before and fails now is a regression too.
"""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path

from exo_fast.benchmarks.suites import SUITES
from exo_fast.training.errors import InputError

TOLERANCE = 1.1
MEMORY_RATIO, MEMORY_MB = 1.1, 20
ERROR_RATIO = 1.5


@dataclass(frozen=True)
class Difference:
    """One quantity of one case in two runs."""

    name: str
    what: str
    old: float
    new: float

    @property
    def ratio(self) -> float:
        return self.new / self.old if self.old else float("inf")


@dataclass
class Comparison:
    """What `compare` found."""

    worse: list[Difference] = field(default_factory=list)
    better: list[Difference] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)  # (name, last words) of what ran before and fails now
    missing: list[tuple[str, str]] = field(default_factory=list)  # (name, why) of what was measured before and not now
    compared: int = 0  # cases

    @property
    def regressed(self) -> bool:
        return bool(self.worse or self.broken)

    def extend(self, other: Comparison) -> None:
        """Take the findings of another suite in."""
        for name in ("worse", "better", "broken", "missing"):
            getattr(self, name).extend(getattr(other, name))
        self.compared += other.compared


def compare(old: dict, new: dict, tolerance: float = TOLERANCE, only: Container[str] | None = None) -> Comparison:
    """Two result files of one suite; of the cases named in `only` where that is given."""
    found = Comparison()
    now = {row["name"]: row for row in new["rows"]}
    same_machine = old["machine"] == new["machine"]
    for row in old["rows"]:
        name = row["name"]
        if "skipped" in row or "failed" in row or (only is not None and name not in only):
            continue
        other = now.get(name)
        if other is None:
            found.missing.append((name, "not in the new results"))
        elif "failed" in other:
            found.broken.append((name, other["failed"]))
        elif "skipped" in other:
            found.missing.append((name, other["skipped"]))
        else:
            found.compared += 1
            for difference, limit in _quantities(row, other, tolerance, same_machine):
                least_mb = MEMORY_MB if difference.what == "memory, MB" else 0
                if abs(difference.new - difference.old) <= least_mb:
                    continue
                if difference.ratio > limit:
                    found.worse.append(difference)
                elif difference.ratio < 1 / limit:
                    found.better.append(difference)
    return found


def _quantities(old: dict, new: dict, tolerance: float, same_machine: bool) -> list[tuple[Difference, float]]:
    """(what can be compared of a case, from which ratio it counts)."""
    name, found = old["name"], []
    if old.get("seconds") and new.get("seconds"):
        if old.get("baseline_seconds") and new.get("baseline_seconds"):
            shares = (row["seconds"] / row["baseline_seconds"] for row in (old, new))
            found.append((Difference(name, "time / baseline", *shares), tolerance))
        elif same_machine:
            found.append((Difference(name, "seconds", old["seconds"], new["seconds"]), tolerance))
    if old.get("peak_mb") is not None and new.get("peak_mb") is not None:
        found.append((Difference(name, "memory, MB", old["peak_mb"], new["peak_mb"]), MEMORY_RATIO))
    errors = old.get("errors") or {}, new.get("errors") or {}
    for error in errors[0].keys() & errors[1].keys():
        if errors[0][error] is not None and errors[1][error] is not None:
            found.append((Difference(name, f"error, {error}", errors[0][error], errors[1][error]), ERROR_RATIO))
    return found


def read_results(path: Path) -> dict[str, dict]:
    """{suite: results} of a result file, or of the result files in a folder. Raises InputError when there are none."""
    paths = [path] if path.is_file() else [path / f"{name}.json" for name in SUITES]
    found = {}
    for file in paths:
        if not file.is_file():
            continue
        try:
            results = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise InputError(f"{file} is no result file: {error}") from error
        if "suite" in results and "rows" in results:
            found[results["suite"]] = results
    if not found:
        raise InputError(f"{path} holds no results of `exo-fast bench`; give a file that it wrote, or its --output_dir")
    return found


def table(found: Comparison) -> str:
    """The findings as aligned text."""
    lines = []
    shown = [*found.worse, *found.better]
    width = max([len(d.name) for d in shown] + [4])
    kind = max([len(d.what) for d in shown] + [4])
    for title, differences in (("WORSE", found.worse), ("better", found.better)):
        if differences:
            lines += ["", f"{title:<{width + 2}}{'':<{kind + 2}}{'old':>11}{'new':>11}{'ratio':>8}"]
            lines += [
                f"{d.name:<{width + 2}}{d.what:<{kind + 2}}{d.old:>11.4g}{d.new:>11.4g}{d.ratio:>8.2f}"
                for d in sorted(differences, key=lambda d: d.ratio, reverse=title == "WORSE")
            ]
    for title, named in (("BROKEN", found.broken), ("not measured now", found.missing)):
        if named:
            lines += ["", title, *(f"{name}  {why}" for name, why in named)]
    verdict = f"{len(found.worse) + len(found.broken)} worse" if found.regressed else "nothing worse"
    return "\n".join([*lines, "", f"{found.compared} cases compared: {verdict}, {len(found.better)} better."]).lstrip()
