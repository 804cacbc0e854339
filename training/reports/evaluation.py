"""The page that `exo-fast evaluate` writes: findings first, then plot, tables, some completions and the settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exo_fast.training.data.writing import to_json
from exo_fast.training.files import write_file
from exo_fast.training.reports.frontier import (
    Comparison,
    Measurement,
    compare,
    describe,
    find_pairs,
    plot_frontier,
    summarize_label,
)
from exo_fast.training.reports.statistics import table_cell

PROMPTS_SHOWN = 4


def write_report(
    measurements: Sequence[Measurement],
    reference: Measurement,
    folder: Path,
    *,
    prompts: Sequence[str],
    completions: Sequence[Sequence[Sequence[str]]],
    settings: Mapping[str, Any],
    versions: Mapping[str, str | None],
    seconds: Mapping[str, float],
    seed: int = 0,
) -> dict[str, Any]:
    """Write report.md, frontier.png and results.json into `folder`; returns what is in the last.

    `completions` are those of the reference, then of each measurement: (P, S) strings.
    """
    labels = list(dict.fromkeys(measurement.label for measurement in measurements))
    models = [describe(measurement, reference, seed=seed) for measurement in (reference, *measurements)]
    ends = [summarize_label(measurements, reference, label, seed=seed) for label in labels]
    comparisons = [compare(measurements, reference, *pair, seed=seed) for pair in find_pairs(labels)]
    finding = "\n".join(comparison.verdict for comparison in comparisons) or "\n".join(map(_gain_sentence, ends))
    results = {
        "finding": finding,
        "comparisons": [_comparison_json(comparison) for comparison in comparisons],
        "end_of_training": ends,
        "models": models,
        "prompts": len(prompts),
        "completions_per_prompt": reference.rewards.shape[1],
        "settings": dict(settings),
        "versions": dict(versions),
        "seconds": dict(seconds),
    }
    folder.mkdir(parents=True, exist_ok=True)
    plot_frontier(measurements, reference, folder / "frontier.png")
    examples = _examples(measurements, reference, prompts, completions)
    write_file(folder, "report.md", "\n".join([*_lines(results), *examples, *_tail(results), ""]).encode())
    write_file(folder, "results.json", to_json(results))
    return results


def _gain_sentence(end: Mapping[str, Any]) -> str:
    low, high = end["gain_interval"]
    relation = "gains" if low > 0 else "loses" if high < 0 else "is not clear of the SFT model in"
    runs = f", {end['runs']} seeds" if end["runs"] > 1 else ""
    return (
        f"{end['label']} {relation} reward: {_with_interval(end, 'gain')} over the SFT model, at {end['kl']:.2f} nats "
        f"from it{runs}."
    )


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    found = comparison.difference
    return {
        "first": comparison.first,
        "second": comparison.second,
        "verdict": comparison.verdict,
        "difference": None if found is None else found.value,
        "interval": None if found is None else [found.low, found.high],
        "kl_range": None if comparison.kl_range is None else list(comparison.kl_range),
        "seeds": list(comparison.seeds),
    }


def _with_interval(numbers: Mapping[str, Any], name: str, form: str = "+.3f") -> str:
    value, low, high = (round(number, 6) + 0.0 for number in (numbers[name], *numbers[f"{name}_interval"]))  # no -0.000
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _lines(results: Mapping[str, Any]) -> list[str]:
    """The report down to the table of all models."""
    lines = ["# Reward against KL", ""]
    for sentence in results["finding"].split("\n"):
        lines += [f"**{sentence}**", ""]
    if results["comparisons"]:
        lines += [
            "How this is judged: the checkpoints of each run, sorted by KL, are joined by straight lines from the SFT "
            "model on; the curves of one label are averaged over its seeds; the difference of two labels is averaged "
            "over the range of KL that the checkpoints of all their runs enclose. The 95% interval is over prompts "
            "(resampled, the same for all) and seeds (their spread, with Student's t).",
            "",
        ]
    lines += [
        f"On {results['prompts']} held-out prompts, {results['completions_per_prompt']} completions each, drawn from "
        "the same random numbers for all models.",
        "",
        "![Mean reward against KL to the SFT model](frontier.png)",
        "",
        "## At the end of training",
        "",
        "| policy | runs | mean reward | gain over SFT | win rate against SFT | KL(policy‖SFT), nats |",
        "|---|---|---|---|---|---|",
    ]
    reference = results["models"][0]
    lines.append(f"| {reference['label']} | | {_plus_minus(reference, 'reward', '+.3f')} | | 50% | 0 |")
    for end in results["end_of_training"]:
        lines.append(
            f"| {end['label']} | {end['runs']} | {_with_interval(end, 'reward')} | {_with_interval(end, 'gain')} | "
            f"{_with_interval(end, 'win_rate', '.0%')} | {_with_interval(end, 'kl', '.2f')} |"
        )
    lines += [
        "",
        "In brackets: 95% intervals, over prompts and, where there are several runs, over seeds. A completion wins "
        "against one of the SFT model for the same prompt by a higher reward; "
        "of several completions, those drawn from the same random numbers are not paired; ties count half.",
        "",
        "## Every checkpoint",
        "",
        "| policy | run | step | mean reward | gain over SFT | win rate against SFT | KL(policy‖SFT), nats |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in results["models"][1:]:
        lines.append(
            f"| {model['label']} | {model['seed']} | {'–' if model['step'] is None else model['step']} | "
            f"{_plus_minus(model, 'reward', '+.3f')} | {_with_interval(model, 'gain')} | "
            f"{_with_interval(model, 'win_rate', '.0%')} | {_plus_minus(model, 'kl', '.2f')} |"
        )
    lines += ["", "± is one standard error over prompts; brackets: 95% intervals over prompts (paired bootstrap)."]
    return lines


def _plus_minus(numbers: Mapping[str, Any], name: str, form: str) -> str:
    return f"{numbers[name]:{form}} ± {numbers[f'{name}_standard_error']:{form.lstrip('+')}}"


def _examples(
    measurements: Sequence[Measurement],
    reference: Measurement,
    prompts: Sequence[str],
    completions: Sequence[Sequence[Sequence[str]]],
) -> list[str]:
    """First completions of the first prompts, by the SFT model and the last checkpoint of each label's first run."""
    shown = {reference.label: (reference, completions[0])}
    for measurement, texts in zip(measurements, completions[1:], strict=True):
        if measurement.seed == 0:
            shown[measurement.label] = (measurement, texts)
    lines = [
        "",
        "## Completions",
        "",
        f"The first {min(PROMPTS_SHOWN, len(prompts))} prompts and the first completion of each, not chosen by their "
        "rewards, which stand in brackets; of each policy the last checkpoint of its first run.",
    ]
    for index, prompt in enumerate(prompts[:PROMPTS_SHOWN]):
        lines += ["", f"**{table_cell(prompt)}**", "", "| | |", "|---|---|"]
        for label, (measurement, texts) in shown.items():
            reward = f"{measurement.rewards[index, 0]:+.2f}"
            lines.append(f"| {label} | {table_cell(texts[index][0])} [{reward}] |")
    return lines


def _tail(results: Mapping[str, Any]) -> list[str]:
    lines = ["", "## Settings", "", "| | |", "|---|---|"]
    for name, value in {**results["settings"], **results["versions"]}.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        lines.append(f"| {name} | {table_cell(text)} |")
    lines += ["", "## Time", "", "What was done before, and reused, takes none.", "", "| | seconds |", "|---|---|"]
    return [*lines, *(f"| {name} | {value:.0f} |" for name, value in results["seconds"].items())]
