"""report.html: the report of a training, or of a whole recipe, on one page that needs no other files.

It is made from the files that a run leaves (summary.json, trainer_state.json, samples.json, an evaluation's
results.json and frontier.png), so the same run gives the same page, and a lost page can be made again:

    python -m exo_fast.training.reports.html runs/align
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError
from markupsafe import Markup

from exo_fast.data.selection import left_out_lines
from exo_fast.training.files import write_file
from exo_fast.training.reports.curves import METRICS, MOST_POINTS, History, charts, metric_rows, number, points
from exo_fast.training.reports.rendering import page, render

NAME = "report.html"
MAX_ROWS_BYTES = 4 * 2**20  # larger files of rows are not read for their first rows
ROWS_SHOWN = 3


def write(folder: Path) -> Path:
    """Make report.html of the training in `folder`; return its path. Raises OSError or ValueError if summary.json
    or trainer_state.json is missing or broken."""
    summary = _read(folder / "summary.json")
    name = summary["config"].get("run_name") or folder.absolute().name
    title = f"exo-fast {summary.get('stage', 'training')}: {name}"
    return write_file(folder, NAME, page(title, training_section(folder, folder)))


def write_recipe(output: Path) -> Path:
    """Make report.html of the recipe whose records are in `output`/.run; return its path. Raises OSError or ValueError
    if run.json is missing or broken. If a stage's files cannot be read, its section says so."""
    run = _read(output / ".run" / "run.json")
    seconds = [[row["name"], row["stage"], number(round(row["seconds"], 1))] for row in run["stages"]]
    body = render(
        "recipe.html.j2",
        version=run["version"],
        seconds=[*seconds, ["all stages", "", number(round(run["seconds_of_all_stages"], 1))]],
        variables=_settings(run.get("variables") or {}),
        stages=[{"name": row["name"], "section": _stage_section(output, row)} for row in run["stages"]],
    )
    return write_file(output, NAME, page(f"exo-fast run {Path(run['recipe']).name}", body))


# A training


def training_section(folder: Path, page_folder: Path, level: int = 2) -> str:
    """Make the section of the training in `folder`, for a page in `page_folder`, below headings of this level."""
    summary = _read(folder / "summary.json")
    history = _read(folder / "trainer_state.json")["log_history"]
    config, changed, splits = summary["config"], set(summary.get("changed", ())), summary.get("data", {})
    metrics = metric_rows(history)
    kinds = dict.fromkeys(kind for counts in splits.values() for kind in counts if not kind.startswith("left_out"))
    return render(
        "training.html.j2",
        level=level,
        sentence=_sentence(summary),
        warnings=_warnings(summary),
        tiles=_tiles(summary, history),
        charts=charts(history),
        most_points=MOST_POINTS,
        sampled=_read(folder / "samples.json") if (folder / "samples.json").is_file() else None,
        held_out=[[title, *cells] for title, where, cells in metrics if where == "held out"],
        training=[[title, first, last] for title, where, (first, _, _, last) in metrics if where == "training"],
        splits=list(splits),
        counts=[[k.replace("_", " "), *(number(counts.get(k)) for counts in splits.values())] for k in kinds],
        left_out=left_out_lines(splits),
        files=summary.get("data_files", {}),
        layout=summary.get("layout"),
        changed=_settings({name: value for name, value in config.items() if name in changed}),
        unchanged=_settings({name: value for name, value in config.items() if name not in changed}),
        command=summary.get("command"),
        surroundings=_surroundings(summary),
        links=_links(folder, page_folder),
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


def _warnings(summary: Mapping[str, Any]) -> dict[str, int]:
    """Return the messages, each with how often it was given."""
    messages = dict(summary.get("warnings") or {})
    if summary.get("steps_left_out"):
        messages[f"{summary['steps_left_out']} steps were left out: a loss or gradient was not finite."] = 1
    return messages


def _tiles(summary: Mapping[str, Any], history: History) -> list[tuple[str, str]]:
    """Return the numbers to look at first, each with its label. They are held-out numbers if there is held-out
    data."""
    held_out = any("eval_loss" in entry for entry in history)
    prefix, where = ("eval_", "held out") if held_out else ("", "training")
    tiles = []
    for name in ("loss", "group_accuracy", "accuracy", "rewards/margins", "kl"):
        if values := [value for _, value in points(history, prefix + name)]:
            label = METRICS[name].partition(":")[0].partition(",")[0]
            ends = values if len(values) == 1 else (values[0], values[-1])
            tiles.append((" → ".join(number(value, 3) for value in ends), f"{label}, {where}"))
    if summary.get("tokens_per_second"):
        tiles.append((number(round(summary["tokens_per_second"])), "tokens a second"))
    if summary.get("peak_memory_mb"):
        tiles.append((f"{number(round(summary['peak_memory_mb']))} MB", "peak memory"))
    return tiles


def _settings(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Format names and values as in a configuration."""
    return [
        (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
        for name, value in values.items()
    ]


def _surroundings(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rows = [
        ("machine", _machine(summary.get("machine") or {})),
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
    return [(name, value) for name, value in rows if value not in (None, "")]


def _machine(machine: Mapping[str, Any]) -> str:
    parts = [machine.get("cpu"), f"{machine['cores']} cores" if machine.get("cores") else None]
    parts += [f"{machine['memory_gb']} GB" if machine.get("memory_gb") else None, machine.get("system")]
    device = machine.get("device")
    return ", ".join([*([device] if device not in (None, "cpu") else []), *(part for part in parts if part)])


def _links(folder: Path, page_folder: Path) -> list[tuple[str, str]]:
    """Return (path from the page's folder, name) of the model, the files that describe it, and the checkpoints."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    checkpoints.sort(key=lambda path: (len(path.name), path.name))
    names = ("README.md", "summary.json", "trainer_state.json", "samples.json", "settings.json")
    there = [folder / name for name in names if (folder / name).is_file()]
    found = (*sorted(folder.glob("*.safetensors")), *there, *checkpoints)
    return [(os.path.relpath(path, page_folder), path.name) for path in found]


# The stages of a recipe


def _stage_section(output: Path, row: Mapping[str, Any]) -> str:
    """Make a stage's section: a training's section, an evaluation's findings or the first rows, and its options."""
    try:
        folder = Path(row["output_dir"]).expanduser()
        is_training = (folder / "trainer_state.json").is_file() and (folder / "summary.json").is_file()
        is_evaluation = (folder / "results.json").is_file()
        record = None if is_training else _read(output / ".run" / f"{row['name']}.json")
        return render(
            "stage.html.j2",
            stage=row["stage"],
            seconds=f"{row['seconds']:,.1f}",
            folder=os.path.relpath(folder, output),
            training=training_section(folder, output, level=3) if is_training else None,
            evaluation=_evaluation(folder, output) if is_evaluation else None,
            rows=_first_rows(folder),
            options=None if record is None else _settings(record["options"]),
        )
    except (OSError, ValueError, KeyError, TypeError, UndefinedError) as error:
        return Markup('<p class="soft">cannot be shown: {}: {}</p>').format(type(error).__name__, error)


def _evaluation(folder: Path, page_folder: Path) -> dict[str, Any]:
    """Return the findings of `exo-fast evaluate` in `folder`: its sentences, its picture and its tables."""
    results = _read(folder / "results.json")
    picture, report = folder / "frontier.png", folder / "report.md"
    return {
        "finding": results["finding"].split("\n"),
        "picture": base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else None,
        "ends": [
            [end["label"], end["runs"], *(_interval(end, name) for name in ("reward", "gain", "win_rate", "kl"))]
            for end in results["end_of_training"]
        ],
        "models": [
            [m["label"], m["seed"], number(m["step"]), number(m["reward"], 3), _interval(m, "gain"), number(m["kl"], 3)]
            for m in results["models"]
        ],
        "report": os.path.relpath(report, page_folder) if report.is_file() else None,
    }


def _interval(numbers: Mapping[str, Any], name: str) -> str:
    low, high = numbers[f"{name}_interval"]
    return f"{number(numbers[name], 3)} [{number(low, 3)}, {number(high, 3)}]"


def _first_rows(folder: Path) -> dict[str, Any] | None:
    """Return the first rows that a stage wrote, if they are prompts with completions and the file is small."""
    for name in ("test.json", "train.json"):
        path = folder / name
        if not path.is_file() or path.stat().st_size > MAX_ROWS_BYTES:
            continue
        rows = _read(path)
        if not isinstance(rows, list) or not rows or "completions" not in rows[0]:
            continue
        return {"file": name, "count": len(rows), "first": [_sample(row) for row in rows[:ROWS_SHOWN]]}
    return None


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    rewards = row.get("rewards") or [None] * len(row["completions"])
    texts = [
        {"text": completion, "numbers": {} if reward is None else {"reward": reward}}
        for completion, reward in zip(row["completions"][:4], rewards, strict=False)
    ]
    return {"prompt": row["prompt"], "texts": texts}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def main(folders: Sequence[str]) -> int:
    """Make the report of each folder again. A folder is the output of a training or of a recipe."""
    for folder in folders:
        make = write_recipe if Path(folder, ".run", "run.json").is_file() else write
        print(f"the report is {make(Path(folder))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
