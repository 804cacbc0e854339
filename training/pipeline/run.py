"""`exo-fast run RECIPE`: run the stages of a recipe in order, each once, in a process of its own.

`run` keeps its records in OUTPUT/.run. For each stage, NAME.yaml is the configuration it was given, NAME.log all
that it printed, and NAME.json says whether it is done, with which options and in how many seconds. A done stage is
skipped as long as its options, the version of the package and the stages it reads from are the same. If one changed,
that is an error, because only the user may ask to replace results (--redo). The same command restarts a stage that
was stopped, and the stage continues: every stage can.

`run` removes only output directories of the recipe's stages, and only if it created them.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate

from exo_fast.training import downloads, files
from exo_fast.training.errors import InputError
from exo_fast.training.pipeline.process import CLI_MODULE, _run_process, stage_command
from exo_fast.training.pipeline.recipe import SMOLLM2, PlannedStage, Recipe, fill, read_recipe, strings
from exo_fast.training.pipeline.records import Record, Records, _has_content
from exo_fast.training.reports import html
from exo_fast.training.terminal import give_result
from exo_fast.version import __version__

DESCRIPTION = """\
Run the stages of a recipe in order. Everything is checked before the first one starts; what is done is skipped; after
Ctrl-C, a kill or a failure the same command continues.

Records and logs are kept in .run below the recipe's output directory."""

EXAMPLES = """\
examples:
  exo-fast run my.yaml
  exo-fast run recipes/reviews.yaml
  exo-fast run recipes/reviews.yaml --list                  # what is done, without running anything
  exo-fast run my.yaml --set output=runs/small --set model=models/sft
  exo-fast run my.yaml --redo 'align-*'                     # remove these stages' output, and what was made from it
  exo-fast run my.yaml --only sft generate
"""


def parser() -> argparse.ArgumentParser:
    """The options of `exo-fast run`."""
    made = argparse.ArgumentParser(
        prog="exo-fast run",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("recipe", type=Path, metavar="RECIPE", help="A YAML file; `exo-fast recipes` has some.")
    made.add_argument("--only", nargs="+", default=[], metavar="NAME", help="Run these stages; NAME may hold * and ?")
    add_options(made)
    made.add_argument("--list", action="store_true", help="Check the recipe, show its stages, and run nothing.")
    return made


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --redo and --set, which `exo-fast demo` has too."""
    parser.add_argument(
        "--redo",
        nargs="+",
        default=[],
        metavar="NAME",
        help="Remove what these stages made, and what was made from it, and run them again.",
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="Values of the recipe's variables."
    )


def read_settings(words: Sequence[str]) -> dict[str, str]:
    """Return the variables and values that the words after --set give."""
    settings = {}
    for word in words:
        name, equals, settings[name] = word.partition("=")
        if not equals or not name:
            raise InputError(f"--set {word}: NAME=VALUE is needed.")
    return settings


def main(argv: Sequence[str]) -> int:
    """Run the recipe that `argv` names. Returns 0, or the exit status of the stage that failed (130 for Ctrl-C)."""
    options = parser().parse_args(argv)
    settings = read_settings(options.set)
    return run_recipe(options.recipe, only=options.only, redo=options.redo, settings=settings, show=options.list)


def run_recipe(
    path: Path,
    *,
    only: Sequence[str] = (),
    redo: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
    show: bool = False,
    cli_module: str = CLI_MODULE,
    finish: Callable[[Path], Any] | None = None,
) -> int:
    """Run the stages of the recipe at `path` that are not done; return the exit status.

    `only` and `redo` are names of stages, with * and ? as wildcards; `settings` replace values of the recipe's
    variables; `show` lists the stages and runs nothing. `finish` is called with the output directory when the stages
    are done; its return value becomes the command's result, instead of the summary. Raises InputError for a recipe
    that cannot work, before anything is run or removed.
    """
    recipe = read_recipe(path, _stage_names(cli_module), settings)
    chosen, anew = (_matching(recipe, patterns, option) for patterns, option in ((only, "--only"), (redo, "--redo")))
    fields, missing = _check_options(recipe, cli_module)
    for stage in recipe.stages:
        stage.options = {name: recipe.defaults[name] for name in fields[stage.name]} | stage.options
    records = Records(recipe)
    if show:
        _print_list(recipe, records)
        return 0
    with records.lock() as lock_fd:
        anew = _with_dependents(recipe, anew)
        records.check(recipe, anew)
        _check_only(recipe, records, chosen, anew)
        for stage in recipe.stages:
            will_run = (stage.name in anew or not records.is_done(stage)) and (not chosen or stage.name in chosen)
            if will_run and stage.name in missing:
                raise InputError(f"{path}: {missing[stage.name]}")
        redone = [stage for stage in recipe.stages if stage.name in anew]
        for act in (records.check_removal, records.remove_output):
            for stage in redone:
                act(stage)
        return _run_stages(recipe, records, chosen, cli_module, lock_fd, finish)


def _stage_names(cli_module: str) -> list[str]:
    """Return the stages that a recipe may name: all that have a configuration class."""
    import importlib

    return [name for name, stage in importlib.import_module(cli_module).STAGES.items() if stage.config]


def _matching(recipe: Recipe, patterns: Sequence[str], option: str) -> set[str]:
    names = [stage.name for stage in recipe.stages]
    found: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise InputError(f"{option} {pattern}: no such stage; the recipe has {', '.join(names)}.")
        found.update(matches)
    return found


def _with_dependents(recipe: Recipe, names: set[str]) -> set[str]:
    found = set(names)
    for stage in recipe.stages:  # in order, so that dependents of dependents are found too
        if found.intersection(stage.needs):
            found.add(stage.name)
    return found


def _check_options(recipe: Recipe, cli_module: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return, by stage, the defaults that it takes and messages about missing data. Raises InputError for options that
    a stage would refuse."""
    with tempfile.TemporaryDirectory(prefix="exo_fast_run_") as folder:
        question, answer = Path(folder, "question.json"), Path(folder, "answer.json")
        stages = [{"name": s.name, "stage": s.stage, "options": s.options} for s in recipe.stages]
        question.write_text(json.dumps({"stages": stages, "defaults": recipe.defaults}), encoding="utf-8")
        command = [sys.executable, "-m", "exo_fast.training.pipeline.check", cli_module, str(question), str(answer)]
        result = subprocess.run(command, capture_output=True, text=True)
        if not answer.exists():
            raise RuntimeError(f"the check of {recipe.path} ended with status {result.returncode}:\n{result.stderr}")
        found = json.loads(answer.read_text(encoding="utf-8"))
    if found["error"] is not None:
        raise InputError(f"{recipe.path}: {found['error']}")
    return found["fields"], found["missing"]


def _check_only(recipe: Recipe, records: Records, chosen: set[str], anew: set[str]) -> None:
    if not chosen:
        return
    for stage in recipe.stages:
        for name in stage.needs if stage.name in chosen else ():
            needed = next(other for other in recipe.stages if other.name == name)
            if name not in chosen and (name in anew or not records.is_done(needed)):
                raise InputError(f"--only {stage.name}: it reads the output of {name}, which is not done; add {name}.")


def _print_list(recipe: Recipe, records: Records) -> None:
    rows = []
    for number, stage in enumerate(recipe.stages, 1):
        record, fresh = records.find(stage.name), records.fresh[stage.name]
        if records.is_done(stage):
            state = f"done in {record.seconds:.0f} s" if record.key == fresh.key else "done with other options"
        else:
            state = "to do" if record is None else "begun"
        needs = f"  (after {', '.join(stage.needs)})" if stage.needs else ""
        print(f"{number:>3}  {stage.name:<28} {stage.stage:<14} {state}{needs}")
        rows.append(_row(stage, record or fresh, state) | {"needs": stage.needs})
    give_result({"recipe": str(recipe.path), "version": __version__, "variables": recipe.variables, "stages": rows})


# Running


def _run_stages(
    recipe: Recipe,
    records: Records,
    chosen: set[str],
    cli_module: str,
    lock_fd: int,
    finish: Callable[[Path], Any] | None,
) -> int:
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    filled: dict[str, Any] = {}
    for number, stage in enumerate(recipe.stages, 1):
        header = f"[{number}/{len(recipe.stages)}] {stage.name}"
        if records.is_done(stage):
            print(f"{header}: done before", flush=True)
            rows.append(_row(stage, records.find(stage.name), "done before"))
            continue
        if chosen and stage.name not in chosen:
            continue
        print(f"\n{header} ({stage.stage}), {time.perf_counter() - started:.0f} s so far", flush=True)
        if any("${" + SMOLLM2 + "}" in text for text in strings(stage.options)) and not filled:
            filled[SMOLLM2] = str(downloads.get_model(downloads.cache_dir()))
        options = fill(stage.options, filled, f"stage {stage.name!r}") if filled else stage.options
        log = records.folder / f"{stage.name}.log"
        config = files.write_file(
            records.folder, f"{stage.name}.yaml", yaml.safe_dump(options, sort_keys=False, allow_unicode=True).encode()
        )
        before, fresh = records.find(stage.name), records.fresh[stage.name]
        fresh.seconds = 0.0 if before is None else before.seconds
        place = Path(stage.output_dir).expanduser()
        begun_here = before is not None and before.created and before.options["output_dir"] == stage.output_dir
        fresh.created = begun_here or not _has_content(place)
        records.write(stage.name, fresh)
        begun = time.perf_counter()
        try:
            status = _run_process(stage_command(stage, config, cli_module), log, lock_fd)
        finally:
            fresh.seconds = round(fresh.seconds + time.perf_counter() - begun, 3)
            records.write(stage.name, fresh)
        if status != 0:
            print(_failure(header, stage, status, log), file=sys.stderr, flush=True)
            return status
        fresh.done = True
        records.write(stage.name, fresh)
        rows.append(_row(stage, fresh, "done now"))
    total = round(time.perf_counter() - started, 3)
    summary = {
        "recipe": str(recipe.path),
        "version": __version__,
        "variables": recipe.variables,
        "stages": rows,
        "seconds_now": total,
        "seconds_of_all_stages": round(sum(row["seconds"] for row in rows), 3),
    }
    files.write_file(records.folder, "run.json", (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())
    print(_table(rows, total), flush=True)
    _write_report(recipe.output)
    give_result(summary if finish is None else finish(recipe.output))
    return 0


def _write_report(output: Path) -> None:
    try:
        print(f"the report is {html.write_recipe(output)}", flush=True)
    except Exception as error:  # the page failed, but all the work is done
        print(f"the report was not written: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def _failure(header: str, stage: PlannedStage, status: int, log: Path) -> str:
    how = f"exit status {status}"
    if status > 128:
        how = f"ended by {_signal_name(status - 128)}"
        if status - 128 == signal.SIGKILL:
            how += ", which is also what happens when memory runs out"
    return (
        f"\n{header} failed: {how}. What it said is in {log}.\n"
        f"The same command continues with this stage. To start it anew (after a change of its options, say): "
        f"--redo {stage.name}"
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _row(stage: PlannedStage, record: Record, state: str) -> dict[str, Any]:
    return {
        "name": stage.name,
        "stage": stage.stage,
        "seconds": record.seconds,
        "state": state,
        "output_dir": stage.output_dir,
        "key": record.key,
    }


def _table(rows: Sequence[Mapping[str, Any]], total: float) -> str:
    """Format the seconds of each stage and their total as aligned lines."""
    lines = [[row["name"], row["seconds"], row["state"]] for row in rows]
    lines.append(["all stages", sum(row["seconds"] for row in rows), f"{total:.0f} s now"])
    return "\n" + tabulate(lines, ["stage", "seconds", ""], tablefmt="plain", floatfmt=".0f", disable_numparse=[0])
