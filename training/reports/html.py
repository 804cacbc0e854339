"""report.html: what a training, or a whole recipe, did, on one page that needs nothing but itself.

It is made from the files that a run leaves (summary.json, trainer_state.json, samples.json, an evaluation's
results.json), so the same run gives the same page, and a page that was lost can be made again:

    python -m exo_fast.training.reports.html runs/align
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exo_fast.data.selection import left_out_lines
from exo_fast.training.files import write_file
from exo_fast.training.reports.curves import MOST_POINTS, Curve, number, plot
from exo_fast.training.reports.page import details, link, page, table, text

NAME = "report.html"
TRAIN, HELD_OUT = 0, 1  # colours
# In the order of the page: what is logged, and what it is called there. Held-out values are called eval_….
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
MAX_ROWS_BYTES = 4 * 2**20  # of a stage's rows, that are read for their first ones
ROWS_SHOWN = 3


def write(folder: Path) -> Path:
    """Make report.html of the training in `folder`; returns its path. Raises OSError or ValueError where summary.json
    or trainer_state.json is missing or broken."""
    summary = _read(folder / "summary.json")
    title = f"exo-fast {summary.get('stage', 'training')}: {_name(summary, folder)}"
    body = f"<h1>{text(title)}</h1>" + training_section(folder, folder)
    return write_file(folder, NAME, page(title, body).encode())


def write_recipe(output: Path) -> Path:
    """Make report.html of the recipe whose records are in `output`/.run; returns its path. Raises OSError or ValueError
    where run.json is missing or broken. A stage whose files cannot be read says so in its place."""
    run = _read(output / ".run" / "run.json")
    title = f"exo-fast run {Path(run['recipe']).name}"
    stages = run["stages"]
    rows = [[row["name"], row["stage"], number(round(row["seconds"], 1))] for row in stages]
    rows.append(["all stages", "", number(round(run["seconds_of_all_stages"], 1))])
    parts = [f"<h1>{text(title)}</h1>"]
    parts.append(f'<p class="soft">{len(stages)} stages, exo_fast {text(run["version"])}</p>')
    links = "".join(f'<a href="#stage-{index}">{text(row["name"])}</a>' for index, row in enumerate(stages))
    parts.append(f"<nav>{links}</nav>")
    parts.append(table(rows, head=("stage", "kind", "seconds"), numbers=1))
    if run.get("variables"):
        values = [[name, _value(value)] for name, value in run["variables"].items()]
        parts.append(details("variables of the recipe", table(values)))
    for index, row in enumerate(stages):
        parts.append(f'<section class="stage" id="stage-{index}"><h2>{text(row["name"])}</h2>')
        try:
            parts.append(_stage_section(output, row))
        except (OSError, ValueError, KeyError, TypeError) as error:
            parts.append(f'<p class="soft">cannot be shown: {text(type(error).__name__)}: {text(error)}</p>')
        parts.append("</section>")
    return write_file(output, NAME, page(title, "".join(parts)).encode())


# A training


def training_section(folder: Path, page_folder: Path) -> str:
    """All that is known of the training in `folder`, for a page in `page_folder`."""
    summary = _read(folder / "summary.json")
    history = _read(folder / "trainer_state.json")["log_history"]
    samples = _read(folder / "samples.json") if (folder / "samples.json").is_file() else None
    return "".join(
        [
            f"<p>{text(_sentence(summary))}</p>",
            _warnings(summary),
            _tiles(summary, history),
            "<h2>Curves</h2>",
            curves(history),
            _samples(samples),
            "<h2>Metrics</h2>",
            metrics_table(history),
            "<h2>Data</h2>",
            _data(summary),
            "<h2>Configuration</h2>",
            _configuration(summary),
            "<h2>Where and with what</h2>",
            _surroundings(summary),
            "<h2>Files</h2>",
            _files(folder, page_folder),
        ]
    )


def _sentence(summary: Mapping[str, Any]) -> str:
    machine = summary.get("machine") or {}
    device = machine.get("device") if machine.get("device") not in (None, "cpu") else machine.get("cpu")
    processes = summary.get("processes", 1)
    where = f" in {processes} processes" if processes > 1 else ""
    on = f" on {device}" if device else ""
    finished = f"; finished {_date(summary['finished'])}" if "finished" in summary else ""
    return f"{summary['steps']:,} optimizer steps in {summary['train_seconds']:,.0f} s{where}{on}{finished}."


def _date(stamp: str | None) -> str | None:
    return None if stamp is None else stamp[:16].replace("T", " ") + " UTC"


def _warnings(summary: Mapping[str, Any]) -> str:
    messages = dict(summary.get("warnings") or {})
    if summary.get("steps_left_out"):
        messages[f"{summary['steps_left_out']} steps were left out: a loss or gradient was not finite."] = 1
    if not messages:
        return ""
    items = "".join(
        f"<li>{text(message)}{f' ({count} times)' if count > 1 else ''}</li>" for message, count in messages.items()
    )
    return f'<div class="warnings"><b>Warnings</b><ul>{items}</ul></div>'


def _tiles(summary: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> str:
    """The numbers to look at first: held out where there is held-out data."""
    held_out = any("eval_loss" in entry for entry in history)
    prefix, where = ("eval_", "held out") if held_out else ("", "training")
    tiles = []
    for name in ("loss", "group_accuracy", "accuracy", "rewards/margins", "kl"):
        points = _points(history, prefix + name)
        if points:
            label = METRICS[name].partition(":")[0].partition(",")[0]
            first, last = points[0][1], points[-1][1]
            shown = number(last, 3) if len(points) == 1 else f"{number(first, 3)} → {number(last, 3)}"
            tiles.append((shown, f"{label}, {where}"))
    if summary.get("tokens_per_second"):
        tiles.append((number(round(summary["tokens_per_second"])), "tokens a second"))
    if summary.get("peak_memory_mb"):
        tiles.append((f"{number(round(summary['peak_memory_mb']))} MB", "peak memory"))
    cells = "".join(f'<div class="tile"><b>{text(shown)}</b><span>{text(label)}</span></div>' for shown, label in tiles)
    return f'<div class="tiles">{cells}</div>'


def curves(history: Sequence[Mapping[str, Any]]) -> str:
    """A plot for each metric of a trainer's log, training and held-out values together."""
    figures, most, any_held_out = [], 0, False
    for name, title in _metrics_of(history).items():
        training, held_out = _points(history, name), _points(history, f"eval_{name}")
        lines = [Curve("training", training, TRAIN)] if training else []
        lines += [Curve("held out", held_out, HELD_OUT, marked=True)] if held_out else []
        most, any_held_out = max(most, len(training), len(held_out)), any_held_out or bool(held_out)
        lost = sum(not math.isfinite(value) for _, value in (*training, *held_out))
        note = f' <span class="none">{lost} values that are not finite are left out</span>' if lost else ""
        figures.append(
            f"<figure><figcaption><span>{text(title)}{note}</span><output></output></figcaption>"
            f"{plot(title, lines)}</figure>"
        )
    if not figures:
        return '<p class="soft">Nothing was logged.</p>'
    legend = '<span><i class="c0"></i>training, the mean since the last log</span>'
    if any_held_out:
        legend += '<span><i class="c1"></i>held out</span>'
    if most > MOST_POINTS:
        legend += f"<span>of {most:,} points {MOST_POINTS} are drawn, peaks included</span>"
    return f'<div class="legend">{legend}</div><div class="plots">{"".join(figures)}</div>'


def _metrics_of(history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Names and titles of what the log has: those we know in our order, others after them."""
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


def _points(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(entry["step"], float(entry[name])) for entry in history if isinstance(entry.get(name), int | float)]


def metrics_table(history: Sequence[Mapping[str, Any]]) -> str:
    """First, best and last of each metric, held out, and first and last of those of training batches."""
    rows = metric_rows(history)
    held_out = [[title, *cells] for title, where, cells in rows if where == "held out"]
    training = [[title, first, last] for title, where, (first, _, _, last) in rows if where == "training"]
    training_table = table(training, head=("training", "first", "last"), numbers=2)
    if not held_out:
        return training_table
    return table(held_out, head=("held out", "first", "best", "at step", "last"), numbers=4) + details(
        "on training batches", training_table
    )


def metric_rows(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[str]]]:
    """(title, "held out" or "training", [first, best, its step, last]); of training batches none is the best."""
    rows = []
    for prefix, where in (("eval_", "held out"), ("", "training")):
        for name, title in _metrics_of(history).items():
            if not (points := _points(history, prefix + name)):
                continue
            finite, best, step = [point for point in points if math.isfinite(point[1])], "", ""
            if prefix and finite and name in HIGHER_IS_BETTER + LOWER_IS_BETTER:
                choose = max if name in HIGHER_IS_BETTER else min
                at, value = choose(finite, key=lambda point: point[1])
                best, step = number(value), number(at)
            rows.append((title, where, [number(points[0][1]), best, step, number(points[-1][1])]))
    return rows


def _samples(samples: Mapping[str, Any] | None) -> str:
    if not samples or not samples["rows"]:
        return ""
    rows, where = samples["rows"], "held-out" if samples["split"] == "eval" else "training"
    parts = [f"<h2>Samples</h2><p>The first {len(rows)} {where} rows, not chosen by their numbers, which are those of "]
    parts.append("the trained model. A log-ratio is the log-prob under the policy minus that under the reference.</p>")
    shown = "".join(_sample(row["prompt"], row["texts"]) for row in rows)
    return f'{"".join(parts)}<div class="samples">{shown}</div>'


def _sample(prompt: str, texts: Sequence[Mapping[str, Any]]) -> str:
    quote = f"<blockquote>{text(prompt)}</blockquote>" if prompt else ""
    shown = ""
    for one in texts:
        numbers = " · ".join(f"{name} {number(value)}" for name, value in one["numbers"].items())
        shown += f'<div class="completion">{text(one["text"])}</div><div class="numbers">{text(numbers)}</div>'
    return f'<div class="sample">{quote}{shown}</div>'


def _data(summary: Mapping[str, Any]) -> str:
    splits, files = summary.get("data", {}), summary.get("data_files", {})
    names = list(splits)
    kinds = list(
        dict.fromkeys(kind for counts in splits.values() for kind in counts if not kind.startswith("left_out"))
    )
    rows = [[kind.replace("_", " "), *(number(splits[n].get(kind)) for n in names)] for kind in kinds]
    parts = [table(rows, head=("", *names), numbers=len(names))]
    for line in left_out_lines(splits):
        parts.append(f"<p>{text(line)}</p>")
    for split, known in files.items():
        size = f", {known['bytes']:,} bytes, sha256 {known['sha256']}" if "sha256" in known else ""
        parts.append(f'<p class="soft">{text(split)}: {text(known["name"])}{text(size)}</p>')
    if layout := summary.get("layout"):
        shared = "shared" if layout["share_prompt"] else f"not shared: {layout['reason']}"
        parts.append(f"<p>Prompts are {text(shared)}.</p>")
    return "".join(parts)


def _configuration(summary: Mapping[str, Any]) -> str:
    config, changed = summary["config"], set(summary.get("changed", ()))
    rows = [[name, _value(config[name])] for name in config if name in changed]
    others = [[name, _value(value)] for name, value in config.items() if name not in changed]
    parts = [f"<p>{len(rows)} of {len(config)} fields are not at their defaults (●).</p>"]
    parts.append(table(rows, changed=dict.fromkeys(changed, True)))
    return "".join([*parts, details(f"the other {len(others)} fields", table(others))])


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _surroundings(summary: Mapping[str, Any]) -> str:
    machine = summary.get("machine") or {}
    rows = [
        ("machine", _machine(machine)),
        ("device", summary.get("device")),
        ("processes", summary.get("processes")),
        (
            "wall time",
            f"{summary['train_seconds']:,.1f} s of training, {summary.get('total_seconds', 0):,.1f} s in all",
        ),
        ("resumed from", summary.get("resumed_from")),
        ("finished", _date(summary.get("finished"))),
        ("commit", summary.get("commit")),
        ("versions", ", ".join(f"{name} {found}" for name, found in summary.get("versions", {}).items() if found)),
    ]
    parts = [table([[name, value] for name, value in rows if value not in (None, "")])]
    if summary.get("command"):
        parts.insert(0, f"<pre>{text(summary['command'])}</pre>")
    return "".join(parts)


def _machine(machine: Mapping[str, Any]) -> str:
    parts = [machine.get("cpu"), f"{machine['cores']} cores" if machine.get("cores") else None]
    parts += [f"{machine['memory_gb']} GB" if machine.get("memory_gb") else None, machine.get("system")]
    device = machine.get("device")
    return ", ".join([*([device] if device not in (None, "cpu") else []), *(part for part in parts if part)])


def _files(folder: Path, page_folder: Path) -> str:
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    checkpoints.sort(key=lambda path: (len(path.name), path.name))
    names = ("README.md", "summary.json", "trainer_state.json", "samples.json", "settings.json")
    there = [folder / name for name in names if (folder / name).is_file()]
    models = sorted(path for path in folder.glob("*.safetensors"))
    found = [link(os.path.relpath(path, page_folder), path.name) for path in (*models, *there, *checkpoints)]
    return f"<nav>{''.join(found)}</nav>"


# The stages of a recipe


def _stage_section(output: Path, row: Mapping[str, Any]) -> str:
    folder = Path(row["output_dir"]).expanduser()
    parts = [f'<p class="soft">{text(row["stage"])}, {row["seconds"]:,.1f} s, in ']
    parts.append(f"{link(os.path.relpath(folder, output))}</p>")
    if (folder / "trainer_state.json").is_file() and (folder / "summary.json").is_file():
        # One heading lower, below the stage's.
        inner = training_section(folder, output).replace("<h2>", "<h3>").replace("</h2>", "</h3>")
        return "".join([*parts, inner])
    if (folder / "results.json").is_file():
        parts.append(evaluation_section(folder, output))
    elif shown := _first_rows(folder):
        parts.append(shown)
    record = _read(output / ".run" / f"{row['name']}.json")
    options = [[name, _value(value)] for name, value in record["options"].items()]
    return "".join([*parts, details("options", table(options))])


def evaluation_section(folder: Path, page_folder: Path) -> str:
    """The findings of `exo-fast evaluate` in `folder`: its plot, as SVG, and its tables."""
    results = _read(folder / "results.json")
    reference, models = results["models"][0], results["models"][1:]
    parts = [f"<p><b>{text(sentence)}</b></p>" for sentence in results["finding"].split("\n")]
    lines = []
    for label in dict.fromkeys(model["label"] for model in models):
        for seed in sorted({model["seed"] for model in models if model["label"] == label}):
            path = [reference, *(m for m in models if (m["label"], m["seed"]) == (label, seed))]
            colour = list(dict.fromkeys(model["label"] for model in models)).index(label)
            lines.append(
                Curve(
                    f"{label}, run {seed}",
                    [(model["kl"], model["reward"]) for model in path],
                    colour,
                    marked=True,
                    errors=[(model["kl_standard_error"], model["reward_standard_error"]) for model in path],
                    names=[f"step {model['step']}" if model["step"] is not None else "the end" for model in path],
                )
            )
    legend = "".join(
        f'<span><i class="c{line.colour}"></i>{text(line.label.rpartition(",")[0])}</span>'
        for line in {line.colour: line for line in lines}.values()
    )
    picture = plot("mean reward against KL", lines, x_label="KL(policy‖SFT), nats", y_label="mean reward")
    parts.append(
        f'<div class="legend">{legend}</div><div class="plots"><figure><figcaption><span>mean reward against KL to the '
        f"SFT model; bars: one standard error</span><output></output></figcaption>{picture}</figure></div>"
    )
    ends = [
        [e["label"], e["runs"], *(_interval(e, name) for name in ("reward", "gain", "win_rate", "kl"))]
        for e in results["end_of_training"]
    ]
    head = ("at the end of training", "runs", "mean reward", "gain over SFT", "win rate", "KL, nats")
    parts.append(table(ends, head=head, numbers=5))
    rows = [
        [m["label"], m["seed"], number(m["step"]), number(m["reward"], 3), _interval(m, "gain"), number(m["kl"], 3)]
        for m in results["models"]
    ]
    head = ("model", "run", "step", "mean reward", "gain over SFT", "KL, nats")
    parts.append(details("every checkpoint", table(rows, head=head, numbers=5)))
    parts.append('<p class="soft">In brackets: 95% intervals.</p>')
    if (folder / "report.md").is_file():
        place = os.path.relpath(folder / "report.md", page_folder)
        parts.append(f"<p>{link(place, 'report.md')}: how this is judged, and completions side by side.</p>")
    return "".join(parts)


def _interval(numbers: Mapping[str, Any], name: str) -> str:
    low, high = numbers[f"{name}_interval"]
    return f"{number(numbers[name], 3)} [{number(low, 3)}, {number(high, 3)}]"


def _first_rows(folder: Path) -> str:
    """The first rows that a stage wrote, where they are prompts with completions and the file is small."""
    for name in ("test.json", "train.json"):
        path = folder / name
        if not path.is_file() or path.stat().st_size > MAX_ROWS_BYTES:
            continue
        rows = _read(path)
        if not isinstance(rows, list) or not rows or "completions" not in rows[0]:
            continue
        shown = []
        for row in rows[:ROWS_SHOWN]:
            rewards = row.get("rewards") or [None] * len(row["completions"])
            texts = [
                {"text": completion, "numbers": {} if reward is None else {"reward": reward}}
                for completion, reward in zip(row["completions"][:4], rewards, strict=False)
            ]
            shown.append(_sample(str(row["prompt"]), texts))
        return f'<p>The first of {len(rows):,} rows of {text(name)}:</p><div class="samples">{"".join(shown)}</div>'
    return ""


def _name(summary: Mapping[str, Any], folder: Path) -> str:
    return summary["config"].get("run_name") or folder.absolute().name


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def main(folders: Sequence[str]) -> int:
    """Make the report of each folder, a training's or a recipe's output, anew."""
    for folder in folders:
        make = write_recipe if Path(folder, ".run", "run.json").is_file() else write
        print(f"the report is {make(Path(folder))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
