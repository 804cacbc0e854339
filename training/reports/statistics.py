"""What an alignment run gained and what it spent, as numbers, plots and a page of markdown.

Prompts are the unit of chance: several completions of one prompt are averaged first, so intervals and standard
errors are over prompts, and before and after are compared prompt by prompt (a paired bootstrap).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from exo_fast.training.reports.rendering import plain

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, SKY = "#0072B2", "#D55E00", "#009E73", "#56B4E9"
PURPLE, AMBER, GREY, BLACK = "#CC79A7", "#E69F00", "#767676", "#222222"
EXAMPLES_SHOWN = 8


@dataclass(frozen=True)
class Evaluation:
    """Completions that one model gave to the P held-out prompts, S for each."""

    label: str  # "start", "step 12", …
    step: int  # optimizer steps taken
    completions: list[list[str]]  # (P, S)
    rewards: list[list[float]]  # (P, S)
    log_ratios: list[list[float]]  # (P, S) log π(y|x) − log π_start(y|x), nats per completion

    def prompt_rewards(self) -> np.ndarray:
        """(P,) mean reward of each prompt's completions."""
        return np.mean(self.rewards, axis=1)


@dataclass(frozen=True)
class Interval:
    """An estimate with a confidence interval around it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True)
class Results:
    """All that the report is made from."""

    title: str
    prompts: list[str]  # (P,) held out
    evaluations: list[Evaluation]  # in order of training; the first is the start, the last the result
    history: list[dict[str, float]]  # what the trainer logged, each with "step"
    settings: dict[str, str]  # shown as a table
    seconds: dict[str, float]  # by stage; 0 for what was reused
    seed: int


def paired_bootstrap(
    before: np.ndarray,  # (P,) one value per prompt
    after: np.ndarray,  # (P,)
    *,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """Mean of after − before, with the bias-corrected and accelerated bootstrap interval over prompts.

    Resampling prompts resamples both of a prompt's values at once, which is the bootstrap of their differences.

    Raises ValueError when the two are not of one length, or of fewer than two prompts.
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
    """Mean of (P, S) values and its standard error, the prompts being independent and a prompt's samples not."""
    per_prompt = np.mean(values, axis=1)
    return float(per_prompt.mean()), float(stats.sem(per_prompt))


def summarize(results: Results) -> dict[str, float | int | list[float]]:
    """The numbers of the report: rewards before and after, gain with its interval, KL, and how the text changed."""
    start, end = results.evaluations[0], results.evaluations[-1]
    gain = paired_bootstrap(start.prompt_rewards(), end.prompt_rewards(), seed=results.seed)
    kl, kl_error = mean_and_error(end.log_ratios)
    summary: dict[str, float | int | list[float]] = {
        "prompts": len(results.prompts),
        "samples_per_prompt": len(start.completions[0]),
        "reward_gain": gain.value,
        "reward_gain_interval": [gain.low, gain.high],
        "kl": kl,
        "kl_standard_error": kl_error,
    }
    for when, evaluation in (("before", start), ("after", end)):
        summary[f"reward_{when}"], summary[f"reward_{when}_standard_error"] = mean_and_error(evaluation.rewards)
        rewards = np.array(evaluation.rewards)
        summary[f"positive_{when}"] = float((rewards > 0).mean())
        summary[f"negative_{when}"] = float((rewards < 0).mean())
        texts = [text for group in evaluation.completions for text in group]
        summary[f"words_{when}"] = float(np.mean([len(text.split()) for text in texts]))
        summary[f"distinct_trigrams_{when}"] = distinct_trigrams(texts)
    return summary


def distinct_trigrams(texts: list[str]) -> float:
    """Share of different ones among all sequences of three words: a policy that repeats itself has a low one."""
    seen = [trigram for text in texts for trigram in zip(*(text.split()[i:] for i in range(3)), strict=False)]
    return len(set(seen)) / max(len(seen), 1)


def write_report(results: Results, folder: Path) -> dict[str, float | int | list[float]]:
    """Write `report.md` and its PNGs into `folder`; returns `summarize(results)`."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = summarize(results)
    _plot_training(results, folder / "training.png")
    _plot_frontier(results, folder / "frontier.png")
    _plot_prompts(results, folder / "prompts.png")
    (folder / "report.md").write_text(render(results, summary), encoding="utf-8")
    return summary


def render(results: Results, summary: dict) -> str:
    """The report as markdown."""
    low, high = summary["reward_gain_interval"]
    verdict = "above zero" if low > 0 else "below zero" if high < 0 else "not clear of zero"
    rows = [
        ("mean reward", "{:+.3f} ± {:.3f}", "reward_{}", "reward_{}_standard_error"),
        ("completions with a positive reward", "{:.0%}", "positive_{}"),
        ("completions with a negative reward", "{:.0%}", "negative_{}"),
        ("words per completion", "{:.1f}", "words_{}"),
        ("distinct word trigrams", "{:.0%}", "distinct_trigrams_{}"),
    ]
    lines = [
        f"# {results.title}",
        "",
        f"On {summary['prompts']} held-out prompts, {summary['samples_per_prompt']} completions each, the mean reward "
        f"went from {summary['reward_before']:+.3f} to {summary['reward_after']:+.3f}: a gain of "
        f"**{summary['reward_gain']:+.3f}**, 95% interval **[{low:+.3f}, {high:+.3f}]** (paired bootstrap over "
        f"prompts), which is {verdict}. It cost KL(policy‖start) = **{summary['kl']:.2f} ± "
        f"{summary['kl_standard_error']:.2f} nats** per completion.",
        "",
        "| on held-out prompts | before | after |",
        "|---|---|---|",
    ]
    for title, form, *keys in rows:
        cells = [form.format(*(summary[key.format(when)] for key in keys)) for when in ("before", "after")]
        lines.append(f"| {title} | {cells[0]} | {cells[1]} |")
    lines += [
        "",
        "± is one standard error over prompts. The KL is the mean over the policy's own samples of log π(y|x) − "
        "log π_start(y|x).",
        "",
        "## Reward against KL",
        "",
        "![Mean held-out reward against KL to the start](frontier.png)",
        "",
        "| model | mean reward | KL, nats | gain over the start, 95% interval |",
        "|---|---|---|---|",
    ]
    start = results.evaluations[0]
    for evaluation in results.evaluations:
        reward, reward_error = mean_and_error(evaluation.rewards)
        kl, kl_error = mean_and_error(evaluation.log_ratios)
        gain = paired_bootstrap(start.prompt_rewards(), evaluation.prompt_rewards(), seed=results.seed)
        lines.append(
            f"| {evaluation.label} | {reward:+.3f} ± {reward_error:.3f} | {kl:.2f} ± {kl_error:.2f} | "
            f"{'–' if evaluation is start else gain} |"
        )
    lines += [
        "",
        "## Prompt by prompt",
        "",
        "![Each prompt's mean reward before and after](prompts.png)",
        "",
        "## Training",
        "",
        "![Training curves](training.png)",
        "",
        "## Completions side by side",
        "",
        f"The first {min(EXAMPLES_SHOWN, len(results.prompts))} held-out prompts, the first completion of each: not "
        "chosen by their rewards, which stand in brackets. Both models drew from the same random numbers.",
        "",
        "| prompt | before | after |",
        "|---|---|---|",
    ]
    end = results.evaluations[-1]
    for index, prompt in enumerate(results.prompts[:EXAMPLES_SHOWN]):
        cells = [f"{e.completions[index][0]} [{e.rewards[index][0]:+.2f}]" for e in (start, end)]
        lines.append(f"| {plain(prompt)} | {plain(cells[0])} | {plain(cells[1])} |")
    lines += ["", "## Settings", "", "| | |", "|---|---|"]
    lines += [f"| {plain(name)} | {plain(value)} |" for name, value in results.settings.items()]
    lines += ["", "## Time", "", "| stage | seconds |", "|---|---|"]
    lines += [f"| {name} | {f'{value:.0f}' if value else 'reused'} |" for name, value in results.seconds.items()]
    return "\n".join([*lines, ""])


def new_figure(columns: int) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side, with a light grid."""
    # Not pyplot: it keeps global state and looks for a display.
    figure = Figure(figsize=(4.6 * columns, 3.6), layout="constrained", facecolor="white")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _curve(history: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    points = [(entry["step"], entry[name]) for entry in history if name in entry]
    return [step for step, _ in points], [value for _, value in points]


def _plot_training(results: Results, path: Path) -> None:
    figure, axes = new_figure(3)
    panels = [
        ("loss", "loss"),
        ("group_accuracy", "best candidate ranked first"),
        ("rewards/margins", "implicit reward, best − worst"),
    ]
    for axis, (name, title) in zip(axes, panels, strict=True):
        axis.plot(*_curve(results.history, name), color=BLUE, marker=".", label="training")
        axis.plot(*_curve(results.history, f"eval_{name}"), color=ORANGE, marker="o", label="held out")
        axis.set(xlabel="optimizer step", title=title)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def _plot_frontier(results: Results, path: Path) -> None:
    figure, (axis,) = new_figure(1)
    points = [(*mean_and_error(e.log_ratios), *mean_and_error(e.rewards)) for e in results.evaluations]
    kl, kl_error, reward, reward_error = np.array(points).T
    axis.errorbar(kl, reward, xerr=kl_error, yerr=reward_error, color=BLUE, marker="o", capsize=2)
    for evaluation, x, y in zip(results.evaluations, kl, reward, strict=True):
        axis.annotate(evaluation.label, (x, y), textcoords="offset points", xytext=(6, -12), color=GREY)
    axis.set(xlabel="KL(policy‖start), nats per completion", ylabel="mean reward on held-out prompts")
    axis.set_title("bars: one standard error", fontsize=9, color=GREY)
    figure.savefig(path, dpi=150)


def _plot_prompts(results: Results, path: Path) -> None:
    figure, (left, right) = new_figure(2)
    before, after = (results.evaluations[i].prompt_rewards() for i in (0, -1))
    left.scatter(before, after, s=16, color=BLUE, alpha=0.6, linewidths=0)
    ends = [min(before.min(), after.min()), max(before.max(), after.max())]
    left.plot(ends, ends, color=GREY, linestyle="--", linewidth=1)
    left.set(xlabel="mean reward before", ylabel="mean reward after", title="a point per held-out prompt")
    right.hist(after - before, bins=20, color=GREEN, alpha=0.8)
    right.axvline(0, color=GREY, linestyle="--", linewidth=1)
    right.axvline(float(np.mean(after - before)), color=ORANGE, label="mean")
    right.set(xlabel="after − before", ylabel="prompts", title="gain of each prompt")
    right.legend(frameon=False)
    figure.savefig(path, dpi=150)
