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
from exo_fast.training.reports.rendering import render

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
    """Write report.md, frontier.png and results.json into `folder`; return the content of results.json.

    `completions` holds (P, S) strings of the reference, then of each measurement.
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
    functions = {"with_interval": _with_interval, "plus_minus": _plus_minus}
    write_file(folder, "report.md", render("evaluation.md.j2", **results, examples=examples, **functions).encode())
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


def _plus_minus(numbers: Mapping[str, Any], name: str, form: str) -> str:
    return f"{numbers[name]:{form}} ± {numbers[f'{name}_standard_error']:{form.lstrip('+')}}"


def _examples(
    measurements: Sequence[Measurement],
    reference: Measurement,
    prompts: Sequence[str],
    completions: Sequence[Sequence[Sequence[str]]],
) -> list[tuple[str, list[tuple[str, str, float]]]]:
    """Return the first prompts, each with (label, first completion, its reward) of the SFT model and of the last
    checkpoint of each label's first run."""
    shown = {reference.label: (reference, completions[0])}
    for measurement, texts in zip(measurements, completions[1:], strict=True):
        if measurement.seed == 0:
            shown[measurement.label] = (measurement, texts)
    return [
        (prompt, [(label, texts[i][0], float(found.rewards[i, 0])) for label, (found, texts) in shown.items()])
        for i, prompt in enumerate(prompts[:PROMPTS_SHOWN])
    ]
