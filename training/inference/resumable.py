"""Long work over a list, in several processes. A kill at any moment costs one batch.

The list alone fixes the content of a batch, never the number of processes, so every process would compute the
same. A finished batch is one JSON line, forced to disk, in `.partial/<split>-<key>-<rank>.jsonl` below the
output directory. The key is a hash of everything the results depend on: lines of another key are never read. A
line that a kill has torn is ignored. When all batches are there the main process writes the files, each in one
step, the summary last: a directory with a summary is a finished one, and names its inputs.

Any process may compute a batch, on whatever threads it has. Floating-point sums may differ in their last
bits between numbers of threads; within one setting (OMP_NUM_THREADS) everything repeats.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from exo_fast.training import processes
from exo_fast.training.data.writing import PARTIAL, SUMMARY, to_json
from exo_fast.training.errors import InputError, differences
from exo_fast.training.files import lock_directory, unlock_directory, write_file

FORMAT = 1  # raised when the same identity gives other results


class ResumableRun:
    """One run of a stage into `output_dir`; the same object is made in every process.

    `identity` holds all that the results depend on, JSON values by name: settings, and digests of data and models.
    """

    def __init__(self, output_dir: str | Path, identity: Mapping[str, Any]):
        self.directory = Path(output_dir).expanduser()
        self.identity = json.loads(json.dumps({"format": FORMAT, **identity}))  # as the summary gives it back
        self.key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    def finished(self, files: Sequence[str]) -> dict[str, Any] | None:
        """Return the summary of a finished run with this identity; None if there is work to do.

        `files` are the names that the run will write. Raises InputError if the directory holds another run,
        naming what differs, or files of those names that no run of this identity was writing, and if another process
        is writing there. This run locks the directory (`files`) until it is finished.
        """
        lock_directory(self.directory)
        path = self.directory / SUMMARY
        if path.is_file():
            summary = _read_summary(path)
            if summary.get("identity") != self.identity:
                there = summary.get("identity")
                same_stage = isinstance(there, dict) and there.get("stage") == self.identity.get("stage")
                changed = f" ({differences(there, self.identity, 3)})" if same_stage else ", or of another stage"
                raise InputError(
                    f"output_dir={str(self.directory)!r}: holds a finished run with other settings{changed}; choose "
                    "another output_dir, or delete that one to write it again."
                )
            if all((self.directory / name).is_file() for name in files):
                if processes.index() == 0:
                    shutil.rmtree(self.directory / PARTIAL, ignore_errors=True)
                    print(f"reusing {self.directory}: finished earlier with the same settings and data", flush=True)
                unlock_directory(self.directory)
                return summary
        elif not any(self._stored_files("*")):
            for name in files:
                if (self.directory / name).exists():
                    raise InputError(
                        f"output_dir={str(self.directory)!r}: holds a {name} that this run did not write; choose "
                        "another output_dir, or move that file away."
                    )
        processes.wait()  # nobody writes before all have looked
        return None

    def compute(
        self,
        split: str,
        sizes: Sequence[int],
        compute: Callable[[int], Any],
        *,
        description: str,
        unit: str,
        progress: bool,
        prepare: Callable[[], Any] = lambda: None,
    ) -> list[Any]:
        """Return the values of all batches of a split, in order, the same list in every process.

        `compute(index)` gives the JSON-able value of batch `index`, which counts `sizes[index]` in the progress
        bar; batches that an earlier run stored are not computed again. `prepare` is called before the first
        batch, by processes that have one to compute. Raises InputError if the processes do not see one
        another's files.
        """
        stored = self._read(split)
        todo = [index for index in range(len(sizes)) if index not in stored]
        processes.wait()  # so that all deal out the same batches
        rank, count = processes.index(), processes.count()
        done = sum(sizes[index] for index in stored)
        shown = progress and processes.index() == 0
        if rank < len(todo):
            prepare()
        with (
            _Lines(self._path(split, rank)) as lines,
            tqdm(total=sum(sizes), initial=done, desc=description, unit=unit, disable=not shown) as bar,
        ):
            for position in range(rank, len(todo), count):
                lines.append(json.dumps({"batch": todo[position], "value": compute(todo[position])}))
                # The others are about as far.
                bar.update(sum(sizes[index] for index in todo[position : position + count]))
        processes.wait()
        stored = self._read(split)
        missing = [index for index in range(len(sizes)) if index not in stored]
        if missing:
            raise InputError(
                f"output_dir={str(self.directory)!r}: {len(missing)} of {len(sizes)} batches are not there; all "
                "processes must write to one file system, and no other run to this directory."
            )
        return [stored[index] for index in range(len(sizes))]

    def finish(self, files: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
        """Write `files` (JSON values by file name), then the summary with the identity; returns the summary."""
        whole = json.loads(json.dumps({**summary, "identity": self.identity}))
        processes.wait()
        if processes.index() == 0:
            for name, value in files.items():
                write_file(self.directory, name, to_json(value))
            write_file(self.directory, SUMMARY, to_json(whole))
            shutil.rmtree(self.directory / PARTIAL, ignore_errors=True)
        processes.wait()
        unlock_directory(self.directory)
        return whole

    def _path(self, split: str, rank: int | str) -> Path:
        return self.directory / PARTIAL / f"{split}-{self.key}-{rank}.jsonl"

    def _stored_files(self, split: str) -> list[Path]:
        return sorted(self.directory.glob(f"{PARTIAL}/{split}-{self.key}-*.jsonl"))

    def _read(self, split: str) -> dict[int, Any]:
        """Return values by batch, from every process of every earlier run with this key."""
        found = {}
        for path in self._stored_files(split):
            for line in path.read_bytes().split(b"\n")[:-1]:  # a line without a newline is torn
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # a machine that went down may leave a hole
                found[entry["batch"]] = entry["value"]
        return found


class _Lines:
    """An append-only file of lines. A torn last line is cut off, or the next line would join it."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a+b")
        self.file.seek(0)
        self.file.truncate(self.file.read().rfind(b"\n") + 1)

    def append(self, line: str) -> None:
        self.file.write(line.encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()


def plan_batches(
    lengths: Sequence[int], sequences: Sequence[int], batch_size: int, *, of_one_length: bool = False
) -> list[list[int]]:
    """Return the indices of each batch, longest first, so that a batch pads little and the largest one comes first.

    Item i has `sequences[i]` sequences of `lengths[i]` tokens. A batch has at most `batch_size` sequences, or one item.

    `of_one_length`: only items of the same length in a batch, for a model whose rotary embedding depends on the longest
    one (`exo_fast.positions`): all its rows then have one length at every step.
    """
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if sequences[index] > room or (of_one_length and lengths[index] != lengths[batches[-1][0]]):
            batches.append([])
            room = batch_size
        batches[-1].append(index)
        room -= sequences[index]
    return batches


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not a summary of a run ({error}); choose another output_dir.") from error
    return summary if isinstance(summary, dict) else {}
