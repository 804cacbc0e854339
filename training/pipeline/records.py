"""What a recipe's run remembers of each stage, so that a stage runs once."""

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
    """What is known of a stage that was started once."""

    stage: str
    options: dict[str, Any]
    version: str
    needs: dict[str, str]  # the keys of the stages it reads from
    key: str  # hash of all the above
    done: bool
    seconds: float  # of all attempts together
    created: bool  # the output directory was not there, or empty, when the stage was first started


class Records:
    """The files of OUTPUT/.run."""

    def __init__(self, recipe: Recipe):
        self.folder = recipe.output / ".run"
        self.fresh: dict[str, Record] = {}  # as each stage's record would be if it were started now
        for stage in recipe.stages:
            needs = {name: self.fresh[name].key for name in stage.needs}
            identity = {"stage": stage.stage, "options": stage.options, "version": __version__, "needs": needs}
            if stage.stage in TRAINING and stage.processes > 1:
                identity["options"] = {**stage.options, "processes": stage.processes}  # they make the global batch
            key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
            self.fresh[stage.name] = Record(**identity, key=key, done=False, seconds=0.0, created=False)

    def find(self, name: str) -> Record | None:
        """The record of a stage that was started before; None where there is none."""
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
        """Whether the stage's output is there; a done stage whose output was deleted is not done."""
        record = self.find(stage.name)
        return record is not None and record.done and Path(stage.output_dir).expanduser().is_dir()

    def write(self, name: str, record: Record) -> None:
        """Keep `record`, in one step."""
        content = json.dumps(dataclasses.asdict(record), indent=1, ensure_ascii=False) + "\n"
        files.write_file(self.folder, f"{name}.json", content.encode())

    def check(self, recipe: Recipe, anew: set[str]) -> None:
        """Raises InputError for a done stage that would come out differently now, unless it is to be redone."""
        for stage in recipe.stages:
            record, fresh = self.find(stage.name), self.fresh[stage.name]
            if stage.name in anew or record is None or not record.done or record.key == fresh.key:
                continue
            raise InputError(
                f"stage {stage.name!r} is done, but {_difference(record, fresh)}. To remove what it made, with what "
                f"was made from it, and run it again: --redo {stage.name}. To keep it: another output."
            )

    def remove_output(self, stage: PlannedStage) -> None:
        """Delete what an earlier run of the stage made, and the record of it."""
        record, place = self.find(stage.name), Path(stage.output_dir).expanduser()
        if _has_content(place):
            print(f"removing {place}", flush=True)
            shutil.rmtree(place)
        if record is not None:
            (self.folder / f"{stage.name}.json").unlink()

    def check_removal(self, stage: PlannedStage) -> None:
        """Raises InputError for an output directory that did not come into being under this recipe."""
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
        """A lock that no two runs hold at once. Who inherits the descriptor it gives, as stages do, holds it too."""
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
    """Say in words what makes two records of one stage differ."""
    if record.version != fresh.version:
        return f"by exo_fast {record.version}, and this is {fresh.version}"
    if record.stage != fresh.stage:
        return f"as the stage {record.stage}, and the recipe now says {fresh.stage}"
    return differences(record.options, fresh.options) or (
        "it was made from the output of other stages than now, or with other settings of them"
    )
