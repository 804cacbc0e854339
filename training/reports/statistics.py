"""The numbers and plots that reports share.

Prompts are the unit of resampling: several completions of one prompt are averaged first, so intervals and standard
errors are over prompts, and before and after are compared prompt by prompt (a paired bootstrap).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, SKY = "#0072B2", "#D55E00", "#009E73", "#56B4E9"
PURPLE, AMBER, GREY, BLACK = "#CC79A7", "#E69F00", "#767676", "#222222"


@dataclass(frozen=True)
class Interval:
    """An estimate with a confidence interval around it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired_bootstrap(
    before: np.ndarray,  # (P,) one value per prompt
    after: np.ndarray,  # (P,)
    *,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """Return the mean of after − before, with the bias-corrected and accelerated bootstrap interval over prompts.

    Resampling prompts resamples both of a prompt's values at once, which is the bootstrap of their differences.

    Raises ValueError if the two differ in length, or have fewer than two prompts.
    """
    before, after = np.asarray(before, float), np.asarray(after, float)
    if before.shape != after.shape or before.ndim != 1 or len(before) < 2:
        raise ValueError(
            f"before has shape {before.shape} and after {after.shape}; one value per prompt in each, for the same two "
            "or more prompts, is needed"
        )
    differences = after - before
    mean = float(differences.mean())
    if np.allclose(differences, mean, rtol=0, atol=1e-12):  # no resample varies: the correction would divide by 0
        return Interval(mean, mean, mean)
    found = stats.bootstrap(
        (differences,),
        np.mean,
        confidence_level=confidence,
        n_resamples=resamples,
        method="BCa",
        random_state=np.random.default_rng(seed),
    )
    low, high = found.confidence_interval
    return Interval(mean, float(low), float(high))


def mean_and_error(values: list[list[float]]) -> tuple[float, float]:
    """Return the mean of (P, S) values and its standard error. Prompts are independent; a prompt's samples are not."""
    per_prompt = np.mean(values, axis=1)
    return float(per_prompt.mean()), float(stats.sem(per_prompt))


def new_figure(columns: int) -> tuple[Figure, list[Axes]]:
    """Make a figure of panels side by side, with a light grid."""
    # Not pyplot: it keeps global state and looks for a display.
    figure = Figure(figsize=(4.6 * columns, 3.6), layout="constrained", facecolor="white")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_training(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Plot a trainer's log (`log_history` of its trainer_state.json) into a PNG."""
    figure, axes = new_figure(3)
    panels = [
        ("loss", "loss"),
        ("group_accuracy", "best candidate ranked first"),
        ("rewards/margins", "implicit reward, best − worst"),
    ]
    for axis, (name, title) in zip(axes, panels, strict=True):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        axis.plot(*zip(*points, strict=True), color=BLUE, marker=".")
        axis.set(xlabel="optimizer step", title=title)
    figure.savefig(path, dpi=150)
