"""A recipe for `exo-fast run`: from YAML to a list of stages with every value filled in.

A recipe names variables, defaults for every stage that has such a field, and stages in the order in which they run.
`${name}` is replaced by a variable anywhere in a string; a string that is nothing else becomes the variable's value
with its type. `for` makes one stage for every combination of some values.

Dependencies are read from the paths: a stage needs every earlier stage whose output_dir occurs in its options.
Nothing has to be declared twice, and nothing can be forgotten.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exo_fast.training import yaml_file
from exo_fast.training.errors import InputError, nearest
from exo_fast.training.files import user_path

RECIPE_KEYS = ("variables", "defaults", "stages")
STAGE_KEYS = ("name", "stage", "processes", "launcher", "for", "options")
SMOLLM2 = "smollm2"  # the predefined variable: it stays as it is here, and becomes a path when a stage starts
SMOLLM2_TEXT = "${smollm2}"
REFERENCE = re.compile(r"\$\{([^{}]*)\}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
# Variables and loops can make a few lines grow without end; no real recipe is as large as this.
MAX_CHARACTERS, MAX_STAGES = 1_000_000, 10_000
TRAINING = ("align", "classifier", "reward-model", "sft")


@dataclass
class PlannedStage:
    """One stage that will run: a recipe's entry for one combination of its `for` values."""

    name: str
    stage: str  # its name on the command line: "sft", "align", …
    options: dict[str, Any]
    processes: int = 1
    launcher: list[str] | None = None
    needs: list[str] = field(default_factory=list)  # names of earlier stages whose output it reads

    @property
    def output_dir(self) -> str:
        return self.options["output_dir"]


@dataclass
class Recipe:
    """A recipe with its variables filled in and its loops unrolled."""

    path: Path
    output: Path
    variables: dict[str, Any]
    defaults: dict[str, Any]
    stages: list[PlannedStage]


def read_recipe(path: Path, known_stages: Iterable[str], settings: Mapping[str, str] | None = None) -> Recipe:
    """Read the recipe at `path`. `settings` replace values of its variables.

    Raises InputError, with the recipe's path and the stage's name, for a file that cannot be read, unknown keys, stages
    and variables (naming the nearest), names that are used twice, and outputs that are shared or nested.
    """
    try:
        return _recipe(path, yaml_file.load(yaml_file.read(path)), list(known_stages), settings or {})
    except InputError as error:
        hint = " `exo-fast recipes list` shows recipes to copy." if isinstance(error.__cause__, OSError) else ""
        raise InputError(f"{path}: {error}{hint}") from error


def _bounded(value: Any, where: str) -> Any:
    """Return `value`. Raises InputError if it holds more than yaml_file.MAX_VALUES values, each counted as often as it
    is named."""
    waiting, count = [value], 0
    while waiting:
        count += 1
        if count > yaml_file.MAX_VALUES:
            raise InputError(f"{where}: more than {yaml_file.MAX_VALUES:,} values, counting those behind ${{…}}.")
        item = waiting.pop()
        if isinstance(item, dict | list):
            waiting += item.values() if isinstance(item, dict) else item
    return value


def _recipe(path: Path, raw: Any, known_stages: list[str], settings: Mapping[str, str]) -> Recipe:
    _mapping(raw, "a recipe", RECIPE_KEYS)
    variables = _variables(raw.get("variables") or {}, settings)
    defaults = fill(_mapping(raw.get("defaults") or {}, "defaults"), variables, "defaults")
    entries = raw.get("stages")
    if not isinstance(entries, list) or not entries:
        raise InputError("stages: a list of stages is needed.")
    stages = [
        stage for number, entry in enumerate(entries, 1) for stage in _stages(entry, number, variables, known_stages)
    ]
    output = user_path(variables["output"], "output")
    _check_outputs(stages, output)
    for number, stage in enumerate(stages):
        stage.needs = [earlier.name for earlier in stages[:number] if _mentions(_inputs(stage), earlier.output_dir)]
        for later in stages[number + 1 :]:
            if _mentions(_inputs(stage), later.output_dir):
                raise InputError(
                    f"stage {stage.name!r} reads {later.output_dir}, which the later stage {later.name!r} makes; "
                    "put that one first."
                )
    return Recipe(path, output, variables, defaults, stages)


def _variables(raw: Any, settings: Mapping[str, str]) -> dict[str, Any]:
    _mapping(raw, "variables")
    for name in settings:
        if name not in raw:
            raise InputError(f"--set {name}: no such variable{nearest(name, raw)}")
    found: dict[str, Any] = {SMOLLM2: SMOLLM2_TEXT}
    for name, value in raw.items():  # each may use the variables above it
        where = f"variable {name!r}"
        try:
            value = yaml_file.load(settings[name]) if name in settings else value
        except InputError as error:
            raise InputError(f"--set {name}: {error}") from error
        found[name] = _bounded(fill(value, found, where), where)
    if not isinstance(found.get("output"), str) or not found["output"]:
        raise InputError("variables: output is needed, the directory in which `run` keeps its records.")
    return found


def _stages(entry: Any, number: int, variables: dict[str, Any], known_stages: list[str]) -> list[PlannedStage]:
    where = f"stage {number}"
    _mapping(entry, where, STAGE_KEYS)
    where = f"stage {entry['name']!r}" if isinstance(entry.get("name"), str) else where
    for key in ("stage", "options"):
        if key not in entry:
            raise InputError(f"{where}: {key} is missing.")
    loops = fill(_mapping(entry.get("for") or {}, f"{where}: for"), variables, where)
    for name, values in loops.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{where}: for: {name} needs a list of values, not {values!r}.")
    if math.prod(map(len, loops.values())) > MAX_STAGES:
        raise InputError(f"{where}: for: more than {MAX_STAGES:,} combinations.")
    planned = []
    for combination in itertools.product(*loops.values()):
        scope = {**variables, **dict(zip(loops, combination, strict=True))}
        filled = fill({key: value for key, value in entry.items() if key != "for"}, scope, where)
        planned.append(_stage(filled, where, known_stages))
    return planned


def _stage(entry: dict[str, Any], where: str, known_stages: list[str]) -> PlannedStage:
    stage = entry["stage"]
    if stage not in known_stages:
        raise InputError(f"{where}: unknown stage {stage!r}{nearest(str(stage), known_stages)}")
    name = str(entry.get("name", stage))
    if NAME.fullmatch(name) is None:
        raise InputError(f"stage {name!r}: a name of letters, digits and . _ + - is needed: it names files.")
    options = _mapping(entry["options"] or {}, f"stage {name!r}: options")
    output_dir = options.get("output_dir")
    if not isinstance(output_dir, str) or not output_dir:
        raise InputError(f"stage {name!r}: options need an output_dir.")
    processes, launcher = entry.get("processes", 1), entry.get("launcher")
    if not isinstance(processes, int) or isinstance(processes, bool) or processes < 1:
        raise InputError(f"stage {name!r}: processes={processes!r}: a whole number of at least 1 is needed.")
    if launcher is not None and (not isinstance(launcher, list) or not launcher):
        raise InputError(
            f"stage {name!r}: launcher={launcher!r}: a list of words is needed, such as "
            "[deepspeed, --hostfile, hosts, --module]."
        )
    if launcher is not None and "processes" in entry:
        raise InputError(f"stage {name!r}: processes and launcher exclude each other; the launcher starts processes.")
    return PlannedStage(name, stage, options, processes, launcher and [str(word) for word in launcher])


def _check_outputs(stages: Sequence[PlannedStage], output: Path) -> None:
    """Check that no stage writes where another does, or around the place where `run` keeps its records."""
    seen: dict[Path, str] = {}
    names: set[str] = set()
    for stage in stages:
        if stage.name in names:
            raise InputError(
                f"stage {stage.name!r}: two stages have this name; give each its own (in a `for`, use the loop's "
                "variables in it)."
            )
        names.add(stage.name)
        place = user_path(stage.output_dir, f"stage {stage.name!r}: output_dir").resolve()
        if output.resolve().is_relative_to(place):
            raise InputError(
                f"stage {stage.name!r}: output_dir={stage.output_dir!r} holds output={str(output)!r}, where `run` "
                "keeps its records; give the stage a directory inside it."
            )
        for other, name in seen.items():
            if place.is_relative_to(other) or other.is_relative_to(place):
                raise InputError(
                    f"stage {stage.name!r}: output_dir={stage.output_dir!r} is the same as that of {name!r}, or one "
                    "lies in the other; each stage needs a directory of its own."
                )
        seen[place] = stage.name


def _mapping(value: Any, what: str, known: Sequence[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{what}: a mapping of names to values is needed.")
    for key in value:
        if known is not None and key not in known:
            raise InputError(f"{what}: unknown key {key!r}{nearest(key, known)}")
    return value


def fill(value: Any, variables: Mapping[str, Any], where: str) -> Any:
    """Return `value` with every ${name} in its strings replaced, at any depth. Raises InputError for an unknown
    name."""
    if isinstance(value, dict):
        return {key: fill(item, variables, where) for key, item in value.items()}
    if isinstance(value, list):
        return [fill(item, variables, where) for item in value]
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> Any:
        name = match[1].strip()
        if name not in variables:
            raise InputError(f"{where}: ${{{name}}} is not defined{nearest(name, variables)}")
        return variables[name]

    if (whole := REFERENCE.fullmatch(value)) is not None:
        return copy.deepcopy(lookup(whole))
    filled = REFERENCE.sub(lambda match: str(lookup(match)), value)
    if len(filled) > MAX_CHARACTERS:
        raise InputError(f"{where}: a text of more than {MAX_CHARACTERS:,} characters.")
    return filled


def path_pattern(path: str) -> re.Pattern[str]:
    """Return a pattern that finds `path`, relative or absolute, or a path below it in a string: after the start, = : or
    , and before the end or a separator."""
    plain = os.path.normpath(os.path.expanduser(path))
    spellings = "|".join(re.escape(spelling) for spelling in {plain, os.path.abspath(plain), path.rstrip("/")})
    return re.compile(rf"(?:(?<=[=:,\s])|^)(?:\./)?(?:{spellings})(?=[/,:\s]|$)")


def strings(value: Any) -> Iterable[str]:
    """Find all strings in a value of mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def _inputs(stage: PlannedStage) -> dict[str, Any]:
    return {name: value for name, value in stage.options.items() if name != "output_dir"}


def _mentions(value: Any, path: str) -> bool:
    pattern = path_pattern(path)
    return any(pattern.search(text) for text in strings(value))
