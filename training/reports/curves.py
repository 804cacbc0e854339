"""A trainer's log, prepared for pages: curves of at most 240 points, and the first, best and last values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

MOST_POINTS = 240  # in a curve; a longer curve keeps its extremes
DIGITS = 8  # of a value in a page
# The logged metrics in the order of the page, with their titles. Held-out values are called eval_….
METRICS = {
    "loss": "loss",
    "rewards/margins": "implicit reward, chosen − rejected",
    "group_accuracy": "group accuracy: best candidate ranked first",
    "accuracy": "accuracy",
    "kl": "KL(reference ‖ policy), nats a sequence",
    "entropy": "entropy of q over the candidates, nats",
    "rewards/accuracies": "accuracy: chosen above rejected",
    "rewards/chosen": "reward, chosen",
    "rewards/rejected": "reward, rejected",
    "logps/chosen": "log-prob, chosen",
    "logps/rejected": "log-prob, rejected",
    "log_odds": "log-odds",
    "margins": "log-odds of the true label",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm, before clipping",
    "tokens_per_second": "tokens a second",
    "peak_memory_mb": "peak memory, MB",
}
HIGHER_IS_BETTER = ("accuracy", "group_accuracy", "rewards/accuracies", "rewards/margins", "margins")
LOWER_IS_BETTER = ("loss",)
NO_METRIC = ("epoch", "step", "total_flos", "num_input_tokens_seen")
NO_METRIC_ENDS = ("runtime", "per_second", "train_loss")

History = Sequence[Mapping[str, Any]]
Points = Sequence[tuple[float, float]]


def number(value: float | int | None, digits: int = 4) -> str:
    """Format a number for people: `digits` digits, separated thousands, a minus sign."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        text = f"{int(value):,}"
    elif abs(value) >= 10**digits:
        text = f"{value:,.0f}"
    else:
        text = f"{value:,.{digits}g}"
    return text.replace("-", "−")


def thin(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Thin to at most `most` (4 or more) points in their order: the first, the last, and the lowest and highest of each
    stretch between, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    inner, stretches = points[1:-1], (most - 2) // 2
    kept = [points[0]]
    for index in range(stretches):
        part = inner[index * len(inner) // stretches : (index + 1) * len(inner) // stretches]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return [*kept, points[-1]]


def points(history: History, name: str) -> list[tuple[float, float]]:
    """Return (step, value) of each entry that has a value of this name."""
    return [(entry["step"], float(entry[name])) for entry in history if isinstance(entry.get(name), int | float)]


def charts(history: History) -> list[dict[str, Any]]:
    """Make a chart for each metric of the log: its title, how many values are not finite, how many points there were,
    and its curves, each {"label", "points": [steps, values]}. Values that are not finite are left out."""
    found = []
    for name, title in _metrics_of(history).items():
        both = {"training": points(history, name), "held out": points(history, f"eval_{name}")}
        finite = {label: [p for p in all_points if math.isfinite(p[1])] for label, all_points in both.items()}
        curves = [
            {
                "label": label,
                "points": [[step for step, _ in kept], [float(f"{value:.{DIGITS}g}") for _, value in kept]],
            }
            for label, kept in ((label, thin(some)) for label, some in finite.items())
            if kept
        ]
        lost = sum(len(both[label]) - len(finite[label]) for label in both)
        found.append({"title": title, "lost": lost, "most": max(map(len, finite.values())), "curves": curves})
    return found


def metric_rows(history: History) -> list[tuple[str, str, list[str]]]:
    """Return (title, "held out" or "training", [first, best, its step, last]) of each metric. Training batches have no
    best value."""
    rows = []
    for prefix, where in (("eval_", "held out"), ("", "training")):
        for name, title in _metrics_of(history).items():
            if not (values := points(history, prefix + name)):
                continue
            finite, best, step = [point for point in values if math.isfinite(point[1])], "", ""
            if prefix and finite and name in HIGHER_IS_BETTER + LOWER_IS_BETTER:
                choose = max if name in HIGHER_IS_BETTER else min
                at, value = choose(finite, key=lambda point: point[1])
                best, step = number(value), number(at)
            rows.append((title, where, [number(values[0][1]), best, step, number(values[-1][1])]))
    return rows


def _metrics_of(history: History) -> dict[str, str]:
    """Return names and titles of the metrics in the log: first the ones in METRICS, in its order, then others."""
    there = {
        name.removeprefix("eval_"): None
        for entry in history
        if "loss" in entry or "eval_loss" in entry
        for name, value in entry.items()
        if isinstance(value, int | float) and name not in NO_METRIC
    }
    known = {name: title for name, title in METRICS.items() if name in there}
    other = {n: n for n in there if n not in METRICS and not n.endswith(NO_METRIC_ENDS)}
    return known | other
