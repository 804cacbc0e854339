"""Reward against KL: each policy's gain against its distance from the SFT model, and which loss gained more.

Two losses trained alike end at different KLs, and a larger KL buys more reward with either. So they are compared at
equal KL. Each run's checkpoints, sorted by KL, are joined by straight lines that begin at the SFT model (KL 0). The
curves of one label are averaged over its seeds, and the difference of two labels is averaged over the KLs that the
checkpoints of all their runs enclose. The lines are straight, not a monotone fit, so a policy that loses reward as it
goes on shows it.

Two things vary by chance: the prompts, which all policies share, and the seeds. Prompts are resampled (a bootstrap).
Three seeds are too few to resample. Their spread enters as a variance, and the interval is Student's with the degrees
of freedom that these few leave (Welch and Satterthwaite). The bootstrap over prompts includes the noise of the sampled
completions, which is also part of the spread between seeds; it is counted once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from exo_fast.training.reports.statistics import (
    AMBER,
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    Interval,
    mean_and_error,
    new_figure,
    paired_bootstrap,
)

STYLES = [(BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"), (AMBER, "v"), (SKY, "P")]
RESAMPLES = 2000
GRID = 201  # points at which curves are compared; they are straight between checkpoints


@dataclass(frozen=True)
class Measurement:
    """Completions of one model on the P held-out prompts, S for each, in numbers."""

    label: str
    seed: int  # which of the label's runs
    step: int | None  # of its optimizer; None if unknown
    rewards: np.ndarray  # (P, S)
    log_ratios: np.ndarray  # (P, S) log π(y|x) − log π_SFT(y|x) at the sampling temperature, nats per completion
    path: str = ""

    @property
    def kl(self) -> float:
        """Return the mean log-ratio on the policy's own samples: an unbiased estimate of KL(π‖π_SFT)."""
        return float(self.log_ratios.mean())


def win_rates(rewards: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return (P,): the share of the pairs of a prompt's completions, from two (P, S), that the first wins. Ties count
    half.

    All models draw the completions with one number from the same random numbers, so these are alike if the models
    are. With several completions, pairs with one number are left out.
    """
    first, second = rewards[:, :, None], reference[:, None, :]
    wins = (first > second) + 0.5 * (first == second)
    samples = wins.shape[1]
    return wins.mean(axis=(1, 2)) if samples == 1 else wins[:, ~np.eye(samples, dtype=bool)].mean(axis=1)


def describe(measurement: Measurement, reference: Measurement, *, seed: int = 0) -> dict:
    """Return the numbers of one model: reward, its gain over the SFT model, KL and win rate, with intervals over
    prompts."""
    reward, reward_error = mean_and_error(measurement.rewards)
    kl, kl_error = mean_and_error(measurement.log_ratios)
    before = reference.rewards.mean(axis=1)
    gain = paired_bootstrap(before, measurement.rewards.mean(axis=1), seed=seed)
    wins = win_rates(measurement.rewards, reference.rewards)
    win = paired_bootstrap(np.zeros_like(wins), wins, seed=seed)
    return {
        "label": measurement.label,
        "seed": measurement.seed,
        "step": measurement.step,
        "path": measurement.path,
        "reward": reward,
        "reward_standard_error": reward_error,
        "gain": gain.value,
        "gain_interval": [gain.low, gain.high],
        "kl": kl,
        "kl_standard_error": kl_error,
        "win_rate": win.value,
        "win_rate_interval": [win.low, win.high],
    }


# Comparison at equal KL


@dataclass(frozen=True)
class Comparison:
    """The comparison of two labels at equal KL."""

    first: str
    second: str
    seeds: tuple[int, int]  # runs of each
    kl_range: tuple[float, float] | None  # nats; None if the two do not overlap
    difference: Interval | None  # of mean reward, first − second
    from_sft: bool  # whether the checkpoints do not overlap, so that lines from the SFT model are compared

    @property
    def verdict(self) -> str:
        """Describe the result in a sentence."""
        if self.difference is None:
            return f"{self.first} and {self.second} cannot be compared at equal KL here: they share no range of KL."
        low, high = self.difference.low, self.difference.high
        relation = "lies above" if low > 0 else "lies below" if high < 0 else "cannot be told apart from"
        count = min(self.seeds)
        seeds = f"{count} seed{'s' if count > 1 else ''}"
        if self.seeds[0] != self.seeds[1]:
            seeds = f"{self.seeds[0]} and {self.seeds[1]} seeds"
        sentence = (
            f"{self.first} {relation} {self.second} at equal KL here: {self.difference} mean reward between "
            f"{self.kl_range[0]:.2g} and {self.kl_range[1]:.2g} nats, {seeds}."
        )
        if self.from_sft:
            sentence += (
                " Their checkpoints do not overlap in KL: one of them is judged by the straight line from the SFT "
                "model to its first checkpoint, which likely puts it too low."
            )
        if count == 1:
            sentence += " With one seed the interval holds for these runs, not for the losses."
        return sentence


def find_pairs(labels: Sequence[str]) -> list[tuple[str, str]]:
    """Pair the labels to compare: each that begins with exo, and the same label with dpo instead."""
    return [
        (label, other)
        for label in labels
        if label.startswith("exo") and (other := label.replace("exo", "dpo", 1)) in labels
    ]


def compare(
    measurements: Sequence[Measurement],
    reference: Measurement,
    first: str,
    second: str,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Return the mean difference of reward, `first` − `second`, over the KLs that all runs of both reached.

    The range begins at the largest of the runs' smallest KLs and ends at the smallest of their largest. If that range
    is empty, it begins at 0, the SFT model.
    """
    runs = [_runs(measurements, label) for label in (first, second)]
    every = [run for label_runs in runs for run in label_runs]
    kls = [[measurement.kl for measurement in run] for run in every]
    low, high = max(min(kl) for kl in kls), min(max(kl) for kl in kls)
    from_sft = low >= high
    low = 0.0 if from_sft or low < 0 else low
    seeds = (len(runs[0]), len(runs[1]))
    if high <= low:
        return Comparison(first, second, seeds, None, None, from_sft)

    grid = np.linspace(low, high, GRID)
    weights = _resamples(len(reference.rewards), resamples, seed)
    level = functools.partial(_mean_level, reference=weights @ reference.rewards.mean(axis=1), grid=grid)
    levels = [np.stack([level(run, weights) for run in label_runs]) for label_runs in runs]  # (runs, 1 + B)
    difference = _interval(levels, [1, -1], weights.shape[1], confidence)
    return Comparison(first, second, seeds, (float(low), float(high)), difference, from_sft)


def _runs(measurements: Sequence[Measurement], label: str) -> list[list[Measurement]]:
    found: dict[int, list[Measurement]] = {}
    for measurement in measurements:
        if measurement.label == label:
            found.setdefault(measurement.seed, []).append(measurement)
    return list(found.values())


def _mean_level(
    run: Sequence[Measurement], weights: np.ndarray, *, reference: np.ndarray, grid: np.ndarray
) -> np.ndarray:
    """Return (B,): a run's mean reward over the grid of KLs, for each resample. `weights` (B, P), `reference` (B,)."""
    kls = np.stack([np.zeros(len(weights)), *(weights @ m.log_ratios.mean(axis=1) for m in run)], axis=1)  # (B, C)
    rewards = np.stack([reference, *(weights @ m.rewards.mean(axis=1) for m in run)], axis=1)
    order = np.argsort(kls, axis=1, kind="stable")
    kls, rewards = np.take_along_axis(kls, order, axis=1), np.take_along_axis(rewards, order, axis=1)
    curves = np.stack([np.interp(grid, x, y) for x, y in zip(kls, rewards, strict=True)])
    return (curves.sum(axis=1) - (curves[:, 0] + curves[:, -1]) / 2) / (len(grid) - 1)  # the trapezoidal rule


def _resamples(prompts: int, resamples: int, seed: int) -> np.ndarray:
    """Return (1 + B, P) weights of the prompts: 1/P each as measured, then B resamples by how often each was drawn."""
    even = np.full(prompts, 1 / prompts)
    return np.vstack([even, np.random.default_rng(seed).multinomial(prompts, even, size=resamples) / prompts])


def _interval(levels: Sequence[np.ndarray], signs: Sequence[int], prompts: int, confidence: float) -> Interval:
    """Return the sum of signs[i] · mean over the runs of levels[i], each (runs, 1 + B), with its interval over prompts
    and seeds."""
    sums = sum(sign * found.mean(axis=0) for sign, found in zip(signs, levels, strict=True))
    variance, freedom = _with_seeds(levels, float(sums[1:].var(ddof=1)), prompts)
    half = float(stats.t.ppf(0.5 + confidence / 2, freedom) * np.sqrt(variance))
    value = float(sums[0])
    return Interval(value, value - half, value + half)


def _with_seeds(levels: Sequence[np.ndarray], prompt_variance: float, prompts: int) -> tuple[float, float]:
    """Return the variance of a sum of means over prompts and seeds, and its degrees of freedom.

    `levels` are (runs, 1 + B) for each label. For a label with n runs, s²/n includes the seeds and the completions'
    noise. The variance over prompts includes that noise too, so it is subtracted there. A label with one run has no s².
    """
    shared, parts = prompt_variance, []
    for found in levels:
        count = len(found)
        if count > 1:
            noise = (found[:, 1:] - found[:, :1]).var(axis=0, ddof=1).mean() / count
            spread = float(found[:, 0].var(ddof=1)) / count
            shared -= noise
            parts.append((spread, count - 1))
    shared = max(shared, 0.0)
    total = shared + sum(spread for spread, _ in parts)
    if total <= 0:
        return prompt_variance, prompts - 1
    freedom = total**2 / (shared**2 / (prompts - 1) + sum(spread**2 / n for spread, n in parts))
    return max(total, prompt_variance), freedom  # seeds that agree by chance must not narrow the prompts' interval


# The end of training


def summarize_label(measurements: Sequence[Measurement], reference: Measurement, label: str, *, seed: int = 0) -> dict:
    """Summarise the last checkpoints of a label's runs: means over the runs, with intervals over prompts and seeds."""
    last = [run[-1] for run in _runs(measurements, label)]
    weights = _resamples(len(reference.rewards), RESAMPLES, seed)
    before = reference.rewards.mean(axis=1)
    found = {"label": label, "runs": len(last)}
    for name, values, bounds in (
        ("reward", [m.rewards.mean(axis=1) for m in last], (-np.inf, np.inf)),
        ("gain", [m.rewards.mean(axis=1) - before for m in last], (-np.inf, np.inf)),
        ("win_rate", [win_rates(m.rewards, reference.rewards) for m in last], (0, 1)),
        ("kl", [m.log_ratios.mean(axis=1) for m in last], (0, np.inf)),
    ):
        interval = _interval([np.stack(values) @ weights.T], [1], len(before), 0.95)
        limits = np.clip([interval.low, interval.high], *bounds)  # Student's interval ignores them
        found[name], found[f"{name}_interval"] = interval.value, limits.tolist()
    return found


# Plot


def plot_frontier(measurements: Sequence[Measurement], reference: Measurement, path: Path) -> None:
    """Write the PNG: reward against KL, a line for each run; losses that are compared share a panel."""
    labels = list(dict.fromkeys(measurement.label for measurement in measurements))
    panels = [list(pair) for pair in find_pairs(labels)]
    rest = [label for label in labels if not any(label in panel for panel in panels)]
    panels += [rest] if rest else []
    figure, axes = new_figure(len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        if axis is not axes[0]:
            axis.sharex(axes[0])
            axis.sharey(axes[0])
            axis.tick_params(labelleft=False)
        _plot_panel(axis, panel, measurements, reference)
        axis.set_xlabel("KL(policy‖SFT), nats per completion")
    axes[0].set_ylabel("mean reward on held-out prompts")
    figure.suptitle("a line per seed; bars: one standard error over prompts", fontsize=9, color=GREY)
    figure.savefig(path, dpi=150)


def _plot_panel(axis: Axes, labels: Sequence[str], measurements: Sequence[Measurement], reference: Measurement) -> None:
    start, start_error = mean_and_error(reference.rewards)
    axis.axhspan(start - start_error, start + start_error, color=GREY, alpha=0.12, linewidth=0)
    axis.axhline(start, color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="SFT")
    for number, label in enumerate(labels):
        color, marker = STYLES[number % len(STYLES)]
        for run_number, run in enumerate(_runs(measurements, label)):
            run = sorted(run, key=lambda measurement: measurement.kl)
            points = [(*mean_and_error(m.log_ratios), *mean_and_error(m.rewards)) for m in run]
            kl, kl_error, reward, reward_error = np.array(points).T
            axis.plot([0, *kl], [start, *reward], color=color, linewidth=1.2, alpha=0.75, zorder=2)
            axis.errorbar(
                kl,
                reward,
                xerr=kl_error,
                yerr=reward_error,
                fmt=marker,
                markersize=5,
                color=color,
                markeredgecolor="white",
                markeredgewidth=0.6,
                elinewidth=0.8,
                capsize=0,
                alpha=0.9,
                zorder=3,
                label=label if run_number == 0 else None,
            )
    axis.plot([0], [start], marker="*", color=BLACK, markersize=9, linestyle="none", zorder=4)
    axis.legend(frameon=False, loc="best")
