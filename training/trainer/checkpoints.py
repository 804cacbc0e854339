"""Checkpoints that are either whole or not there.

A checkpoint is written to `.unfinished/` below the output directory. Every file is forced to disk and hashed (each
process takes a share of them), `manifest.json` with sizes and sha256 comes last, and then the folder is renamed to
`checkpoint-N` in one step. So a kill at any moment leaves earlier checkpoints untouched. Later damage, by a disk or a
person, is found before anything is loaded: `newest` goes back to the last checkpoint that is whole.

DeepSpeed writes and reads pickles. A pickle can run code, and whoever can change it can change the manifest. So the
pickles of a checkpoint may import only the names that training states consist of (`PICKLED`).
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import torch
from transformers.utils import logging

from exo_fast.training import processes
from exo_fast.training.files import file_sha256
from exo_fast.training.models.saving import force_to_disk

logger = logging.get_logger(__name__)

FORMAT = 1
UNFINISHED, MANIFEST = ".unfinished", "manifest.json"
NAME = re.compile(r"checkpoint-(\d+)")
MANIFEST_LIMIT = 64 * 2**20  # bytes: enough for a million files, more than any checkpoint has
PICKLES = (".pt", ".pth", ".bin")
# Training states of DeepSpeed and transformers hold these beside tensors and plain values; all are inert.
PICKLED = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray._reconstruct",
        "numpy.ndarray",
        "numpy.dtype",
    }
)


@dataclass(frozen=True)
class Facts:
    """The facts that a run needs to continue from a checkpoint."""

    step: int
    processes: int
    engine: str  # "deepspeed" or "torch"
    zero_stage: int | None
    resumable: bool  # optimizer and random state are there, not the model alone
    scheduled: bool = True  # False: written only because the run was asked to stop


class Damaged(ValueError):
    """A checkpoint was changed after it was written. The message says which file and how."""


class Unwritable(OSError):
    """A checkpoint could not be forced to disk. The message says which file and why."""


# Writing


@contextmanager
def unfinished(output_dir: Path, name: str) -> Iterator[Path]:
    """Give a folder below `output_dir` to write `name` in. If it is still there when the block ends, it is removed."""
    folder = output_dir / UNFINISHED
    if processes.index() == 0:
        shutil.rmtree(folder / name, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    processes.wait()
    try:
        yield folder
    finally:
        if processes.index() == 0:
            shutil.rmtree(folder / name, ignore_errors=True)


def publish(written: Path, target: Path, facts: Facts) -> None:
    """Force `written` to disk, add its manifest, and rename it to `target`. All processes must call it. Raises
    Unwritable, in every process."""
    processes.wait()  # until all have written
    entries = _shared(_files(written), lambda name: _entry(written / name))
    problem = None
    if processes.index() == 0:
        try:
            _finish(written, target, {"format": FORMAT, **asdict(facts), "files": entries})
        except OSError as error:
            problem = str(error)
    if (problem := processes.from_first(problem)) is not None:
        raise Unwritable(problem)


def _finish(written: Path, target: Path, manifest: dict) -> None:
    path = written / MANIFEST
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    force_to_disk(path)
    for folder in {written, *((written / name).parent for name in manifest["files"])}:
        force_to_disk(folder)
    if target.exists():  # damaged: the run continued from an earlier one
        _discard(target)
    written.rename(target)
    force_to_disk(target.parent)


def rotate(output_dir: Path, keep: int | None, spare: str | None) -> None:
    """Remove all but the `keep` newest checkpoints and the one at `spare`. Removes nothing if `keep` is None or 0."""
    if not keep:
        return
    for path in numbered(output_dir)[keep:]:
        if spare is None or path.resolve() != Path(spare).resolve():
            _discard(path)


def remove_unscheduled(output_dir: Path, but: Path | None = None) -> None:
    """Remove the checkpoints that were written only because of a stop, except `but`: an undisturbed run has no such
    checkpoints."""
    for path in numbered(output_dir):
        if path != but and not is_scheduled(path):
            _discard(path)


def _discard(path: Path) -> None:
    """Remove a checkpoint. It is first moved away in one step, so that a kill leaves no half of it."""
    out_of_sight = path.parent / UNFINISHED / f"removed-{path.name}"
    shutil.rmtree(out_of_sight, ignore_errors=True)
    out_of_sight.parent.mkdir(exist_ok=True)
    path.rename(out_of_sight)
    shutil.rmtree(out_of_sight, ignore_errors=True)


# Finding and checking


def numbered(output_dir: Path) -> list[Path]:
    """Find the folders called checkpoint-N, highest N first."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def size(path: Path) -> int:
    """Return the bytes of a checkpoint's files."""
    return sum((path / name).stat().st_size for name in _files(path))


def newest(output_dir: Path) -> Path | None:
    """Return the newest checkpoint that is whole and can be continued from, and warn of each that is passed over. All
    processes must call it."""
    for path in numbered(output_dir):
        try:
            if read(path).resumable:
                return path
            problem = "it holds a model alone, without what training needs (save_only_model)"
        except Damaged as error:
            problem = str(error)
        if processes.index() == 0:
            logger.warning(f"{path} cannot be continued from: {problem}")
    return None


def read(path: Path) -> Facts:
    """Check a checkpoint's files and return its facts. All processes must call it. Raises Damaged, in every process."""
    manifest = _manifest(path)
    entries = manifest["files"]
    found = _files(path)
    problems = [f"{name} is missing" for name in entries if name not in found]
    problems += [f"{name} does not belong to it" for name in found if name not in entries]
    if not problems:
        faults = _shared(found, lambda name: _fault(path / name, entries[name]))
        problems = [f"{name} {fault}" for name, fault in faults.items() if fault is not None]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise Damaged(f"it is damaged ({problems[0]}{more})")
    return _facts(manifest)


def facts(path: Path) -> Facts:
    """Return the facts in a checkpoint's manifest, without checking its files. Raises Damaged."""
    return _facts(_manifest(path))


def is_scheduled(path: Path) -> bool:
    """Check whether an undisturbed run writes this checkpoint too. It does, unless the manifest says otherwise."""
    try:
        return facts(path).scheduled
    except Damaged:
        return True


def _facts(manifest: dict) -> Facts:
    manifest = {"scheduled": True, **manifest}  # exo_fast 0.2 and older do not say
    try:
        return Facts(**{name: manifest[name] for name in Facts.__dataclass_fields__})
    except KeyError as error:
        raise Damaged(f"{MANIFEST} lacks {error}") from error


def _manifest(path: Path) -> dict:
    file = path / MANIFEST
    try:
        if file.stat().st_size > MANIFEST_LIMIT:
            raise Damaged(f"{MANIFEST} is larger than {MANIFEST_LIMIT >> 20} MiB")
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"it has no {MANIFEST}: it was not written to its end, or by another program") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise Damaged(f"{MANIFEST} is not of format {FORMAT}")
    entries = manifest.get("files")
    if not isinstance(entries, dict) or not all(_is_entry(entry) for entry in entries.values()):
        raise Damaged(f"{MANIFEST} names no files with size and sha256")
    outside = [name for name in entries if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if outside:
        raise Damaged(f"{MANIFEST} names {outside[0]!r}, which lies outside")
    return manifest


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)


def _files(folder: Path) -> list[str]:
    """Return the relative names of all files below `folder` except the manifest."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(name for path in found if (name := path.relative_to(folder).as_posix()) != MANIFEST)


def _shared(names: list[str], work: Callable[[str], object]) -> dict:
    """Return `work` of each name. Each process does a share, and all get every result. All processes must call it.
    Raises Unwritable, in every process, if `work` raises OSError in one."""
    done, problem = {}, None
    try:
        for name in names[processes.index() :: processes.count()]:
            done[name] = work(name)
    except OSError as error:
        problem = f"{name}: {error}"
    parts = processes.gather((done, problem))
    if problems := [problem for _, problem in parts if problem is not None]:
        raise Unwritable(problems[0])
    together = {name: value for part, _ in parts for name, value in part.items()}
    return {name: together[name] for name in names}


def _entry(path: Path) -> dict:
    """Force a file to disk; return its size and hash."""
    force_to_disk(path)
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


def _fault(path: Path, entry: dict) -> str | None:
    """Describe the fault of a file (the text follows its name in messages)."""
    try:
        if path.is_symlink() or not path.is_file():
            return "is not a plain file"
        if (size := path.stat().st_size) != entry["size"]:
            return f"has {size:,} bytes where {entry['size']:,} were written"
        if file_sha256(path) != entry["sha256"]:
            return "has another content than was written"
        if path.suffix in PICKLES and (names := foreign_names(path)):
            return f"is a pickle that would import {', '.join(sorted(names)[:3])}"
    except (OSError, RuntimeError, ValueError) as error:
        return f"cannot be read ({error})"
    return None


def foreign_names(path: Path) -> set[str]:
    """Return the names that loading a file of torch.save would import, except PICKLED and the names that torch takes
    for safe. Loads nothing."""
    return set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path))) - PICKLED
