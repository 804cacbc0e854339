"""The records that a recipe's run keeps of each stage, so that a stage runs once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exo_fast.training import files
from exo_fast.training.errors import InputError, differences
from exo_fast.training.pipeline.recipe import TRAINING, PlannedStage, Recipe
from exo_fast.version import __version__


@dataclass
class Record:
    """The record of a stage that was started."""

    stage: str
    options: dict[str, Any]
    version: str
    needs: dict[str, str]  # the keys of the stages it reads from
    key: str  # hash of all fields above
    done: bool
    seconds: float  # all attempts together
    created: bool  # the output directory was not there, or empty, when the stage was first started


class Records:
    """The files of OUTPUT/.run."""

    def __init__(self, recipe: Recipe):
        self.folder = recipe.output / ".run"
        self.fresh: dict[str, Record] = {}  # each stage's record if it were started now
        for stage in recipe.stages:
            needs = {name: self.fresh[name].key for name in stage.needs}
            identity = {"stage": stage.stage, "options": stage.options, "version": __version__, "needs": needs}
            if stage.stage in TRAINING and stage.processes > 1:
                identity["options"] = {**stage.options, "processes": stage.processes}  # they decide the global batch
            key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
            self.fresh[stage.name] = Record(**identity, key=key, done=False, seconds=0.0, created=False)

    def find(self, name: str) -> Record | None:
        """Return the stage's record; None if the stage was never started."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            return None
        try:
            return Record(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{path}: not a record of `exo-fast run` ({error}); remove it if it is not yours."
            ) from error

    def is_done(self, stage: PlannedStage) -> bool:
        """Check whether the stage is done and its output is still there."""
        record = self.find(stage.name)
        return record is not None and record.done and Path(stage.output_dir).expanduser().is_dir()

    def write(self, name: str, record: Record) -> None:
        """Write `record` in one step."""
        content = json.dumps(dataclasses.asdict(record), indent=1, ensure_ascii=False) + "\n"
        files.write_file(self.folder, f"{name}.json", content.encode())

    def check(self, recipe: Recipe, anew: set[str]) -> None:
        """Raises InputError if a done stage would give another result now, unless it is in `anew`."""
        for stage in recipe.stages:
            record, fresh = self.find(stage.name), self.fresh[stage.name]
            if stage.name in anew or record is None or not record.done or record.key == fresh.key:
                continue
            raise InputError(
                f"stage {stage.name!r} is done, but {_difference(record, fresh)}. To remove what it made, with what "
                f"was made from it, and run it again: --redo {stage.name}. To keep it: another output."
            )

    def remove_output(self, stage: PlannedStage) -> None:
        """Delete the stage's output and its record."""
        record, place = self.find(stage.name), Path(stage.output_dir).expanduser()
        if _has_content(place):
            print(f"removing {place}", flush=True)
            shutil.rmtree(place)
        if record is not None:
            (self.folder / f"{stage.name}.json").unlink()

    def check_removal(self, stage: PlannedStage) -> None:
        """Raises InputError if this recipe did not create the output directory."""
        record, place = self.find(stage.name), Path(stage.output_dir).expanduser()
        if place.is_symlink():
            raise InputError(f"--redo {stage.name}: {place} is a link; remove it yourself.")
        ours = record is not None and record.created and record.options["output_dir"] == stage.output_dir
        if _has_content(place) and not ours:
            raise InputError(
                f"--redo {stage.name}: {place} was not made by this recipe, so it is left alone; remove it yourself, "
                "or choose another output_dir."
            )

    @contextmanager
    def lock(self) -> Iterator[int]:
        """Hold a lock that only one run can hold. Processes that inherit its descriptor, as stages do, hold it too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = files.acquire(self.folder / "lock")
        if file is None:
            raise InputError(
                f"{self.folder.parent}: a run of this recipe, or a stage of one that was stopped, is still under way; "
                "wait for it or end it."
            )
        with file:
            yield file.fileno()


def _has_content(place: Path) -> bool:
    return place.is_dir() and any(place.iterdir())


def _difference(record: Record, fresh: Record) -> str:
    """Describe the differences between two records of one stage."""
    if record.version != fresh.version:
        return f"by exo_fast {record.version}, and this is {fresh.version}"
    if record.stage != fresh.stage:
        return f"as the stage {record.stage}, and the recipe now says {fresh.stage}"
    return differences(record.options, fresh.options) or (
        "it was made from the output of other stages than now, or with other settings of them"
    )
