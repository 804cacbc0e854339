"""Check the options of all stages of a recipe: `python -m exo_fast.training.pipeline.check CLI_MODULE IN OUT`.

It runs in its own process, because making a configuration loads the training libraries and changes the environment
that the stages would inherit (a process group, the launcher's variables).

Directories that earlier stages will make do not exist yet. While a stage is checked, an empty stand-in replaces such
a path, so a path that no stage will make is still found.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from exo_fast.training.arguments import parse_config
from exo_fast.training.data.sources import find_source
from exo_fast.training.errors import InputError, nearest
from exo_fast.training.pipeline.recipe import SMOLLM2_TEXT, path_pattern


def check(cli_module: str, stages: list[dict[str, Any]], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Check `stages` (each with name, stage, options) against the stages that `cli_module` has.

    Returns {"error": None or a message; "fields": the names of `defaults` that each stage has, by stage name;
    "missing": messages about missing data, by stage name}.
    """
    table = importlib.import_module(cli_module).STAGES
    fields: dict[str, list[str]] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="exo_fast_check_") as folder:
        stand_ins = {SMOLLM2_TEXT: str(Path(folder, "smollm2"))}
        Path(folder, "smollm2").mkdir()
        for number, stage in enumerate(stages):
            try:
                config_class = table[stage["stage"]].config_class()
                names = [field.name for field in dataclasses.fields(config_class) if field.init]
                for name in stage["options"]:
                    if name not in names:
                        hint = nearest(name, names, otherwise=".")  # a training stage has too many fields to list
                        raise InputError(f"unknown field {name!r} of {stage['stage']}{hint}")
                fields[stage["name"]] = [name for name in defaults if name in names]
                options = {name: defaults[name] for name in fields[stage["name"]]} | stage["options"]
                recipe = Path(folder, "options.yaml")
                recipe.write_text(yaml.safe_dump(_with_stand_ins(options, stand_ins)), encoding="utf-8")
                try:
                    config = parse_config(config_class, ["--config", str(recipe)])
                except InputError as error:
                    message = str(error).removeprefix(f"{recipe}: ")
                    for path, stand_in in stand_ins.items():
                        message = message.replace(stand_in, path)
                    raise InputError(message) from error
            except InputError as error:
                return {"error": f"stage {stage['name']!r}: {error}", "fields": fields, "missing": missing}
            if (message := _missing_data(config)) is not None:
                missing[stage["name"]] = f"stage {stage['name']!r}: {message}"
            stand_in = Path(folder, f"stage{number}")
            stand_in.mkdir()
            stand_ins[stage["options"]["output_dir"]] = str(stand_in)
    for name in defaults:
        if not any(name in taken for taken in fields.values()):
            message = f"defaults: no stage of this recipe has a field {name!r}."
            return {"error": message, "fields": fields, "missing": missing}
    return {"error": None, "fields": fields, "missing": missing}


def _missing_data(config: Any) -> str | None:
    """Return the error that the stage would raise hours later for missing data; None if the data (or its stand-in)
    is there."""
    for name in ("data", "eval_data"):
        value = getattr(config, name, None)
        try:
            if isinstance(value, str):
                find_source(value, "train")
        except InputError as error:
            return f"{name}: {error}"
    return None


def _with_stand_ins(value: Any, stand_ins: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: item if key == "output_dir" else _with_stand_ins(item, stand_ins) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_stand_ins(item, stand_ins) for item in value]
    if isinstance(value, str):
        for path, stand_in in stand_ins.items():
            replaced = path_pattern(path).sub(lambda _, to=stand_in: to, value)
            if replaced != value:
                value = replaced
                _make(re.search(re.escape(stand_in) + r"[^,:\s]*", value)[0])
    return value


def _make(path: str) -> None:
    """Make a path below a stand-in: a file if its name has a suffix of data, else a directory."""
    place = Path(path)
    if place.suffix in (".json", ".jsonl", ".parquet"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    else:
        place.mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    cli, question, answer = sys.argv[1:]
    asked = json.loads(Path(question).read_text(encoding="utf-8"))
    result = check(cli, asked["stages"], asked["defaults"])
    Path(answer).write_text(json.dumps(result), encoding="utf-8")
