"""Find what became slower, larger or less exact between two runs: `exo-fast bench --compare OLD`.

Rows are matched by name. If both runs have a yardstick (`baseline_seconds`: the matrix products alone, or plain full
logits), time is compared as a share of it, because the machine's load and model cancel. Otherwise seconds are
compared, and only between runs of one machine. A difference counts from a ratio of

    time    the tolerance (1.1 by default), if one of the two took 0.05 s or more (on a GPU 20 µs, which its timer
            resolves); a shorter yardstick is not used
    memory  1.1, and more than 20 MB
    errors  1.5, each by its name, if one of the two is above 1e-5: below it, rounding decides which is larger.
            A prediction's relative error is not an error of a computation: it counts from a change of 0.05

If a number became NaN or infinite, that is worse. If a case of the new run was measured before, and now fails, is
skipped or is absent, that is a regression too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path

from exo_fast.benchmarks.harness import provenance, runner
from exo_fast.benchmarks.harness.contract import SUITES
from exo_fast.training.errors import InputError

TOLERANCE = 1.1
MEMORY_RATIO, MEMORY_MB = 1.1, 20
ERROR_RATIO, ERROR_FLOOR = 1.5, 1e-5
PREDICTION, PREDICTION_CHANGE = "error, prediction", 0.05
LEAST_SECONDS, LEAST_GPU_SECONDS = 0.05, 2e-5


@dataclass(frozen=True)
class Difference:
    """One quantity of one case in two runs."""

    name: str
    what: str
    old: float
    new: float

    @property
    def ratio(self) -> float:
        return self.new / self.old if self.old and math.isfinite(self.new) else math.inf


@dataclass
class Comparison:
    """The findings of `compare`."""

    worse: list[Difference] = field(default_factory=list)
    better: list[Difference] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)  # (name, last words) of newly failing cases
    missing: list[tuple[str, str]] = field(default_factory=list)  # (name, why) of cases measured before and not now
    absent: list[str] = field(default_factory=list)  # the ones that the new results do not name at all
    compared: int = 0  # cases

    @property
    def regressed(self) -> bool:
        return bool(self.worse or self.broken or self.missing)

    @property
    def nothing_in_common(self) -> bool:
        """Check whether no measured case is in the new results, not even as failed: they are from something else."""
        return not self.compared and not self.broken and len(self.missing) == len(self.absent)

    def extend(self, other: Comparison) -> None:
        """Add the findings of another suite."""
        for name in ("worse", "better", "broken", "missing", "absent"):
            getattr(self, name).extend(getattr(other, name))
        self.compared += other.compared


def compare(old: dict, new: dict, tolerance: float = TOLERANCE, only: Container[str] | None = None) -> Comparison:
    """Compare two result files of one suite; only the cases named in `only`, if it is given."""
    found = Comparison()
    now = {row["name"]: row for row in new["rows"]}
    same_machine = old["machine"] == new["machine"]
    on_cpu = "cpu" in (old["machine"]["device"], new["machine"]["device"]) or new["suite"] not in ("op", "scaling")
    least = LEAST_SECONDS if on_cpu else LEAST_GPU_SECONDS
    for row in old["rows"]:
        name = row["name"]
        if "skipped" in row or "failed" in row or (only is not None and name not in only):
            continue
        other = now.get(name)
        if other is None:
            found.missing.append((name, "not in the new results"))
            found.absent.append(name)
        elif "failed" in other:
            found.broken.append((name, other["failed"]))
        elif "skipped" in other:
            found.missing.append((name, other["skipped"]))
        else:
            found.compared += 1
            for difference, limit in _quantities(row, other, tolerance, least, same_machine):
                if math.isfinite(difference.old) and not math.isfinite(difference.new):
                    found.worse.append(difference)
                elif not _counts(difference):
                    continue
                elif difference.ratio > limit:
                    found.worse.append(difference)
                elif difference.ratio < 1 / limit:
                    found.better.append(difference)
    return found


def _counts(difference: Difference) -> bool:
    """Check whether two finite values differ by more than noise, whatever their ratio."""
    if difference.what == PREDICTION:
        return abs(difference.new - difference.old) > PREDICTION_CHANGE
    if difference.what == "memory, MB":
        return abs(difference.new - difference.old) > MEMORY_MB
    if difference.what.startswith("error, "):
        return max(difference.old, difference.new) > ERROR_FLOOR
    return True


def _quantities(
    old: dict, new: dict, tolerance: float, least: float, same_machine: bool
) -> list[tuple[Difference, float]]:
    """Return (a quantity of a case that can be compared, the ratio from which it counts)."""
    name, found = old["name"], []
    short = all((row.get("seconds") or 0) < least for row in (old, new))  # NaN is not short
    if old.get("seconds") and new.get("seconds") and not short:
        if all((row.get("baseline_seconds") or 0) >= least for row in (old, new)):
            shares = (row["seconds"] / row["baseline_seconds"] for row in (old, new))
            found.append((Difference(name, "time / baseline", *shares), tolerance))
        elif same_machine:
            found.append((Difference(name, "seconds", old["seconds"], new["seconds"]), tolerance))
    if old.get("peak_mb") is not None and new.get("peak_mb") is not None:
        found.append((Difference(name, "memory, MB", old["peak_mb"], new["peak_mb"]), MEMORY_RATIO))
    errors = old.get("errors") or {}, new.get("errors") or {}
    for error in errors[0].keys() & errors[1].keys():
        if errors[0][error] is not None and errors[1][error] is not None:
            difference = Difference(name, f"error, {error}", errors[0][error], errors[1][error])
            found.append((difference, 1.0 if difference.what == PREDICTION else ERROR_RATIO))
    return found


def read_results(path: Path) -> dict[str, dict]:
    """Return {suite: results} of a result file, or of the result files in a folder. Raises InputError if there is no
    such file."""
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


def heads(old: dict, new: dict) -> str:
    """Describe the origin of two result files of a suite and their differences, to be read before their table."""
    lines = [f"{kind}  {_head(results)}" for kind, results in (("old", old), ("new", new))]
    versions = [
        f"{name} {old['versions'].get(name)} → {new['versions'].get(name)}"
        for name in dict.fromkeys([*old["versions"], *new["versions"]])
        if old["versions"].get(name) != new["versions"].get(name)
    ]
    if versions:
        lines.append("versions that differ: " + ", ".join(versions))
    if old["machine"] != new["machine"]:
        lines.append(
            "WARNING: the machines differ. Seconds are compared only as multiples of a yardstick of the same run, "
            "memory and errors as they are: repeat on one machine what matters."
        )
    return "\n".join([f"{new['suite']}:", *lines])


def _head(results: dict) -> str:
    commit = f"commit {results['commit']}" if results["commit"] else "no commit"
    parts = [results["date"][:16].replace("T", " "), commit, runner.machine_line(results)]
    return " · ".join([*parts, *provenance.earlier(results)])


def table(found: Comparison) -> str:
    """Format the findings as aligned text."""
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
    counts = ((len(found.worse) + len(found.broken), "worse"), (len(found.missing), "not measured now"))
    verdict = ", ".join(f"{count} {what}" for count, what in counts if count) or "nothing worse"
    return "\n".join([*lines, "", f"{found.compared} cases compared: {verdict}, {len(found.better)} better."]).lstrip()
