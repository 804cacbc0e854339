"""Check that training survives faults: processes killed at any moment, checkpoints damaged, disks full.

    python -m exo_fast.benchmarks.reliability.faults [--kills 60] [--markdown docs/reliability.md]

The trainings are tiny Llamas on the data of `consistency`, in two processes: four epochs of four steps, saved every
second step, evaluated after every epoch, most with dropout, so that random states count (`KINDS`). A killed training is
started again by the same command until it ends, and must then have the bits and the log (every loss, every evaluation)
of an undisturbed one. The kills come in turn in an evaluation, which at an epoch's end comes after the
checkpoint, between two epochs, while a checkpoint is being written, and at a random moment (`PLACES`); some end one
process only, as a crash would. Each damage (`DAMAGES`) is done to the newest checkpoint of a training that was stopped
half-way: it must be noticed, and the training go on from the checkpoint before and end with the same bits, or refuse
with an error that says why.

The exit status is 1 when something did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from tqdm import tqdm

from exo_fast.benchmarks.harness import runner
from exo_fast.benchmarks.harness.tables import markdown, rewrite
from exo_fast.benchmarks.reliability import consistency
from exo_fast.benchmarks.reliability.processes import Team
from exo_fast.training import machine
from exo_fast.training.trainer import checkpoints

OUTPUT = machine.REPOSITORY / "benchmarks" / "results" / "faults.json"
EXAMPLES = """examples:
  python -m exo_fast.benchmarks.reliability.faults                                   60 kills, all damages
  python -m exo_fast.benchmarks.reliability.faults --kills 200 --seed 7
  python -m exo_fast.benchmarks.reliability.faults --markdown docs/reliability.md    also rewrite its tables
"""
PROCESSES, GLOBAL_BATCH, EPOCHS, SAVE_STEPS = 2, 16, 4, 2  # an epoch is four steps, the last of 5 of the 53 groups
DROPOUT, LORA_DROPOUT = {"disable_dropout": False}, {"lora_r": 4, "lora_dropout": 0.2}
KINDS: dict[str, dict[str, Any]] = {
    "ZeRO 2 with dropout": {"zero_stage": 2, **DROPOUT},
    "ZeRO 3": {"zero_stage": 3, "logging_strategy": "epoch"},
    "ZeRO 1, LoRA with dropout": {"zero_stage": 1, **LORA_DROPOUT},
    "ZeRO 2, LoRA with dropout": {"zero_stage": 2, **LORA_DROPOUT, "eval_strategy": "steps", "eval_steps": 2},
    "ZeRO 2, bf16, accumulation": {"zero_stage": 2, "bf16": True, "gradient_accumulation_steps": 4},
    "no DeepSpeed, with dropout": {"engine": "torch", **DROPOUT},
}
PLAIN = "ZeRO 2 with dropout"  # the kind of the trainings that are damaged, or whose disk fails
# The places of kills. For the first two: calls of StageTrainer's methods that a process does not survive.
PLACES: dict[str, tuple[tuple[str, int], ...]] = {
    "evaluation": tuple(("prediction_step", call) for call in range(1, 5)),  # two to an evaluation
    "boundary": (("evaluate", 1), ("evaluate", 2), ("_run_epoch", 2), ("_finalize_training", 1)),
    "writing": (),
    "any": (),
}
TIMES = ("runtime", "per_second", "peak_memory_mb")  # endings of names in the log whose values differ in every run
WATCH_SECONDS = 60
PAGE = 4096  # bytes; files take whole pages


class Broken(AssertionError):
    """A check failed. The message says which."""


@dataclass(frozen=True)
class Result:
    """The result of a training: its weights, and the entries of its log without times."""

    weights: dict[str, torch.Tensor]
    log: list[dict[str, Any]]

    def evaluated(self) -> list[int]:
        """Return the steps at which it was evaluated."""
        return [entry["step"] for entry in self.log if "eval_loss" in entry]


def write_inputs(folder: Path) -> None:
    """Write the models of `consistency`, with dropout on their attention probabilities (off by default)."""
    folder.mkdir()
    consistency.write_inputs(folder)
    for head in consistency.HEADS:
        path = folder / head / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.2}))


class Training:
    """One training below `folder`, which can be started several times."""

    def __init__(self, folder: Path, inputs: Path, kind: str, **changes: Any):
        self.folder, self.output = folder, folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        accumulation = KINDS[kind].get("gradient_accumulation_steps", 1)
        options = {
            **consistency.settings(inputs, "tied", "full", "unused", engine="deepspeed"),
            "output_dir": str(self.output),
            "reference_cache_dir": str(folder / "reference"),
            "per_device_train_batch_size": GLOBAL_BATCH // PROCESSES // accumulation,
            "num_train_epochs": EPOCHS,
            "save_strategy": "steps",
            "save_steps": SAVE_STEPS,
            "logging_steps": 3,  # so that log entries cover steps before and after a kill
            **KINDS[kind],
            **changes,
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(options))

    def start(self, processes: int = PROCESSES, deaths: dict[int, tuple[str, int]] | None = None) -> Team:
        """Start the training. `deaths` are the calls that processes do not survive (see `Team`)."""
        return Team(["align", "--config", str(self.folder / "recipe.yaml")], self.folder / "log", processes, deaths)

    def finish(self, processes: int = PROCESSES) -> Team:
        """Start the training and wait for its end, which must be a success."""
        team = self.start(processes)
        statuses = team.wait()
        if any(statuses):
            raise Broken(f"ended with {statuses}: {last_words(team.said())}")
        return team

    def copy_to(self, other: Training) -> None:
        """Copy this stopped training to `other`, which continues it with its own recipe."""
        shutil.copytree(self.output, other.output, symlinks=True)
        settings = other.output / "settings.json"  # it names directories of this training
        settings.write_text(settings.read_text().replace(str(self.folder), str(other.folder)))

    def result(self) -> Result:
        """Return the weights and the log that it saved at its end."""
        adapter = self.output / "adapter_model.safetensors"
        weights = load_file(adapter if adapter.exists() else self.output / "model.safetensors")
        entries = json.loads((self.output / "trainer_state.json").read_text())["log_history"]
        log = [
            {name: value for name, value in entry.items() if not name.endswith(TIMES)}
            for entry in entries
            if "train_runtime" not in entry  # without the last entry, which covers only the last start
        ]
        return Result(weights, log)

    def newest(self) -> Path | None:
        return next(iter(checkpoints.numbered(self.output)), None)

    def is_writing(self) -> bool:
        return any((self.output / checkpoints.UNFINISHED).glob("checkpoint-*"))


def last_words(said: str, lines: int = 3) -> str:
    return " / ".join(said.strip().splitlines()[-lines:])[-600:]


def check_same(found: Result, right: Result) -> None:
    """Raises Broken unless both have the same bits and the same log."""
    if found.weights.keys() != right.weights.keys():
        raise Broken("other tensors were saved")
    for name, tensor in right.weights.items():
        other = found.weights[name]
        if not torch.equal(other.view(torch.uint8), tensor.view(torch.uint8)):
            raise Broken(f"{name} has other bits, the largest difference is {(other - tensor).abs().max():.1e}")
    check_evaluated(found, right)
    for ours, theirs in zip(found.log, right.log, strict=False):
        if ours != theirs:
            names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
            raise Broken(f"the log of step {theirs['step']} has other values: {', '.join(names[:3])}")
    if len(found.log) != len(right.log):
        raise Broken(f"the log has {len(found.log)} entries where {len(right.log)} are right")


def check_evaluated(found: Result, right: Result) -> None:
    """Raises Broken unless both were evaluated at the same steps."""
    if found.evaluated() != right.evaluated():
        raise Broken(f"it was evaluated at steps {found.evaluated()} where {right.evaluated()} are right")


# Kills


@dataclass(frozen=True)
class Kill:
    """One kill: its place, and whether it hit all processes."""

    place: str
    all_processes: bool


def undisturbed(folder: Path, inputs: Path, kind: str) -> tuple[Result, float]:
    """Run an undisturbed training; return its result and its seconds."""
    training, begun = Training(folder, inputs, kind), time.monotonic()
    training.finish()
    return training.result(), time.monotonic() - begun


def kills(folder: Path, inputs: Path, kind: str, count: int, rng: random.Random, bar: Any) -> dict[str, Any]:
    """Kill trainings of one kind `count` times in all; return the row of the table."""
    right, seconds = undisturbed(folder / "undisturbed", inputs, kind)
    done: list[Kill] = []
    trainings = 0
    while len(done) < count:
        trainings += 1
        training = Training(folder / f"training-{trainings}", inputs, kind)
        while True:
            before = training.newest()
            if len(done) == count:
                team, kill = training.start(), None
            else:
                team, kill = _start_and_kill(training, list(PLACES)[len(done) % len(PLACES)], seconds, rng)
            statuses = team.wait()
            _check_resumed(team.said(), before)
            if kill is None:
                if any(statuses):
                    raise Broken(f"the start after kill {len(done)} ended with {statuses}: {last_words(team.said())}")
                break
            done.append(kill)
            bar.update()
        check_same(training.result(), right)
        shutil.rmtree(training.folder)
    return {
        "kind": kind,
        "kills": len(done),
        **{place: sum(kill.place == place for kill in done) for place in PLACES},
        "one_process": sum(not kill.all_processes for kill in done),
        "trainings": trainings,
        "seconds_undisturbed": round(seconds, 1),
    }


def _start_and_kill(training: Training, place: str, seconds: float, rng: random.Random) -> tuple[Team, Kill | None]:
    """Start a training and kill it at `place`; return None if it ended before."""
    ranks = range(PROCESSES) if rng.random() < 0.7 else [rng.randrange(PROCESSES)]
    kill = Kill(place, len(ranks) == PROCESSES)
    if PLACES[place]:
        call = rng.choice(PLACES[place])
        team = training.start(deaths=dict.fromkeys(ranks, call))
        team.wait()
        return team, kill if team.died() else None
    team = training.start()
    if place == "any":
        _wait_for(team, lambda: False, rng.uniform(0, 1.2 * seconds))
    else:
        for _ in range(rng.randint(1, 4)):
            if not _wait_for(team, lambda: not training.is_writing()) or not _wait_for(team, training.is_writing):
                return team, None
        time.sleep(rng.uniform(0, 0.05))
    if not team.alive():
        return team, None
    writing = training.is_writing()
    team.kill(ranks)
    return team, replace(kill, place="writing" if writing else "any")


def _wait_for(team: Team, happened: Callable[[], bool], seconds: float = WATCH_SECONDS) -> bool:
    """Wait; return whether it happened before the time was up or the processes had ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and team.alive():
        if happened():
            return True
        time.sleep(0.001)
    return False


def _check_resumed(said: str, before: Path | None) -> None:
    """Raises Broken if a start did not continue from the newest checkpoint."""
    if before is not None and "continuing from" in said and f"continuing from {before}\n" not in said:
        raise Broken(f"{before.name} was there, and it said: {said.split('continuing from', 1)[1].splitlines()[0]}")


# Another number of processes


def resized(folder: Path, inputs: Path, kind: str) -> dict[str, Any]:
    """Stop trainings half-way in two processes and continue them in one and in four; return the row of the table."""
    same = {"lora_dropout": 0.0, "disable_dropout": True}  # another number of processes would draw other random numbers
    training = Training(folder / "undisturbed", inputs, kind, **same)
    training.finish()
    right, row = training.result(), {"kind": kind.removesuffix(" with dropout").rstrip(",")}
    template = stopped_halfway(folder / "template", inputs, kind, **same)
    for processes in (1, 4):
        place = folder / f"by-{processes}"
        cut = {"per_device_train_batch_size": GLOBAL_BATCH // processes, "gradient_accumulation_steps": 1}
        training = Training(place, inputs, kind, **same, **cut)
        template.copy_to(training)
        newest = training.newest()
        said = training.finish(processes).said()
        if f"continuing from {newest}" not in said:
            raise Broken(f"{processes} processes did not continue from {newest.name}: {last_words(said)}")
        found = training.result()
        check_evaluated(found, right)
        row[f"by {processes}"] = max(
            ((found.weights[name].double() - tensor.double()).norm() / tensor.double().norm()).item()
            for name, tensor in right.weights.items()
        )
        if not row[f"by {processes}"] <= consistency.LIMITS["bf16" if KINDS[kind].get("bf16") else "fp32"]:
            raise Broken(f"continued by {processes} processes, weights differ by {row[f'by {processes}']:.1e}")
    return row


# Damages


def flip(path: Path, rng: random.Random) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    """Cut a file to its first part."""
    with path.open("r+b") as file:
        file.truncate(rng.randrange(path.stat().st_size))


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def link(path: Path, rng: random.Random) -> None:
    """Move the file elsewhere and put a symbolic link in its place."""
    elsewhere = path.parent.parent.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


class Payload:
    """An object whose pickle runs a command when it is loaded."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch payload-has-run",)


def poison(path: Path, rng: random.Random) -> None:
    """Replace the file by a pickle that runs a command, and update the manifest to match."""
    torch.save({"payload": Payload()}, path, pickle_module=pickle)
    folder = next(parent for parent in path.parents if (parent / checkpoints.MANIFEST).exists())
    manifest = json.loads((folder / checkpoints.MANIFEST).read_text())
    manifest["files"][path.relative_to(folder).as_posix()] = checkpoints._entry(path)
    (folder / checkpoints.MANIFEST).write_text(json.dumps(manifest))


def lead_outside(path: Path, rng: random.Random) -> None:
    """Make the manifest name a file outside the checkpoint."""
    manifest = json.loads(path.read_text())
    manifest["files"]["../../log"] = {"size": 0, "sha256": ""}
    path.write_text(json.dumps(manifest))


def add(path: Path, rng: random.Random) -> None:
    """Add a file that was not written with the others."""
    path.with_name("more.pt").write_bytes(b"more")


OPTIMIZER, MODEL_STATES = "**/*optim_states.pt", "**/*model_states.pt"
DAMAGES: dict[str, tuple[str, Callable[[Path, random.Random], None]]] = {
    "optimizer shard, a bit flipped": (OPTIMIZER, flip),
    "model states, a bit flipped": (MODEL_STATES, flip),
    "model.safetensors, a bit flipped": ("model.safetensors", flip),
    "random state, a bit flipped": ("rng_state_1.pth", flip),
    "trainer_state.json, a bit flipped": ("trainer_state.json", flip),
    "scheduler.pt, a bit flipped": ("scheduler.pt", flip),
    "manifest, a bit flipped": (checkpoints.MANIFEST, flip),
    "optimizer shard, truncated": (OPTIMIZER, cut),
    "model states, truncated": (MODEL_STATES, cut),
    "model.safetensors, truncated": ("model.safetensors", cut),
    "trainer_state.json, truncated": ("trainer_state.json", cut),
    "manifest, truncated": (checkpoints.MANIFEST, cut),
    "optimizer shard, missing": (OPTIMIZER, remove),
    "model states, missing": (MODEL_STATES, remove),
    "random state, missing": ("rng_state_0.pth", remove),
    "latest, missing": ("latest", remove),
    "manifest, missing": (checkpoints.MANIFEST, remove),
    "optimizer shard, a symbolic link": (OPTIMIZER, link),
    "optimizer shard, a pickle that runs a command": (OPTIMIZER, poison),
    "random state, a pickle that runs a command": ("rng_state_1.pth", poison),
    "manifest, naming a file outside": (checkpoints.MANIFEST, lead_outside),
    "a file more": ("latest", add),
}


def stopped_halfway(folder: Path, inputs: Path, kind: str, **changes: Any) -> Training:
    """Return a training that was killed when it had three checkpoints."""
    training = Training(folder, inputs, kind, **changes)
    team = training.start()
    if not _wait_for(team, lambda: len(checkpoints.numbered(training.output)) >= 3):
        raise Broken(f"no three checkpoints: {last_words(team.said())}")
    team.kill()
    team.wait()
    return training


def damage(template: Training, inputs: Path, name: str, right: Result, rng: random.Random) -> dict[str, Any]:
    """Do one damage to a copy of a stopped training, start it, and check the outcome; return the row of the table."""
    folder = template.folder.with_name("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    training = Training(folder, inputs, PLAIN)
    template.copy_to(training)
    newest, before = checkpoints.numbered(training.output)[:2]
    pattern, act = DAMAGES[name]
    victim = rng.choice(sorted(newest.glob(pattern)))
    act(victim, rng)
    team = training.finish()
    said = team.said()
    passed_over = next((line for line in said.splitlines() if "cannot be continued from" in line), None)
    if passed_over is None:
        raise Broken("it was not noticed")
    if f"continuing from {before}" not in said:
        raise Broken(f"it did not continue from {before.name}: {last_words(said)}")
    if list(folder.rglob("payload-has-run")) or Path("payload-has-run").exists():
        raise Broken("the payload has run")
    check_same(training.result(), right)
    return {"damage": name, "noticed": passed_over.split("cannot be continued from: ", 1)[1], "then": "the one before"}


# Disks


@contextmanager
def small_disk(folder: Path, megabytes: float) -> Iterator[Path]:
    """Mount a file system of so many MB at `folder`. Raises OSError if this user may not mount one."""
    folder.mkdir()
    options = f"size={int(megabytes * 1e6)}"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"mounting a file system is not allowed here ({done.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(folder: Path, inputs: Path, right: Result, size_mb: float, *, while_writing: bool) -> dict[str, Any]:
    """Run a training on a disk that has room for two and a half checkpoints, or fills up while the third is
    written."""
    name = "disk fills up while a checkpoint is written" if while_writing else "disk full before a checkpoint"
    room = 50 * size_mb if while_writing else 2.5 * size_mb
    with small_disk(folder, room) as disk:
        training = Training(disk, inputs, PLAIN)
        team = training.start()
        if while_writing:
            there = lambda: len(checkpoints.numbered(training.output)) >= 2 and training.is_writing()  # noqa: E731
            if not _wait_for(team, there):
                raise Broken(f"no third checkpoint was begun: {last_words(team.said())}")
            _fill(disk / "filler")
        statuses = team.wait()
        said = team.said() if (disk / "log").exists() else ""
        if not any(statuses):
            raise Broken("it went on as if there were room")
        error = next((line for line in said.splitlines() if "could not be written" in line), None)
        if error is None:
            raise Broken(f"no error that says so: {last_words(said)}")
        (disk / "filler").unlink(missing_ok=True)
        whole = checkpoints.numbered(training.output)
        checkpoints.read(whole[0])  # raises Damaged
        if not while_writing:
            subprocess.run(["mount", "-o", f"remount,size={int(50e6 * size_mb)}", str(disk)], check=True)
        again = training.finish()
        if f"continuing from {whole[0]}" not in again.said():
            raise Broken(f"with room again it did not continue from {whole[0].name}")
        check_same(training.result(), right)
        noticed = error.split(" (", 1)[1].split("); ", 1)[0]
        return {"damage": name, "noticed": noticed, "then": f"an error; with room, {whole[0].name}"}


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:  # else the rest of a buffer would be written, and fail, on close
        try:
            while True:
                file.write(bytes(2**16))
        except OSError:
            return


def unwritable(folder: Path, inputs: Path) -> dict[str, Any]:
    """Run a training whose output directory is on a file system mounted read-only."""
    with small_disk(folder, 1) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        training = Training(folder.with_name("unwritable-training"), inputs, PLAIN, output_dir=str(disk / "run"))
        team = training.start()
        if not any(team.wait()) or "cannot be written" not in team.said():
            raise Broken(f"no error that says so: {last_words(team.said())}")
        error = next(line for line in team.said().splitlines() if "cannot be written" in line)
        return {"damage": "output_dir read-only", "noticed": error.split(": ")[-1], "then": "an error before any work"}


def occupied(folder: Path, inputs: Path) -> dict[str, Any]:
    """Start a second run into a directory that another run is writing to."""
    training = Training(folder, inputs, PLAIN, num_train_epochs=1000)
    first = training.start()
    _wait_for(first, lambda: training.newest() is not None)
    second = training.start()
    statuses = second.wait()
    first.kill()
    first.wait()
    if not all(statuses) or "writes there" not in second.said():
        raise Broken(f"no error that says so: {last_words(second.said())}")
    return {"damage": "a second run to the same output_dir", "noticed": "the first one's lock", "then": "an error"}


def asked_to_stop(folder: Path, inputs: Path, right: Result) -> dict[str, Any]:
    """Send SIGTERM in the middle of a training."""
    training = Training(folder, inputs, PLAIN)
    team = training.start()
    _wait_for(team, lambda: training.newest() is not None)
    team.terminate()
    statuses = team.wait()
    if any(statuses) or "stopped by SIGTERM after step" not in team.said():
        raise Broken(f"ended with {statuses}: {last_words(team.said())}")
    saved = training.newest()
    if f"continuing from {saved}" not in training.finish().said():
        raise Broken(f"it did not continue from {saved.name}")
    check_same(training.result(), right)
    return {"damage": "SIGTERM", "noticed": f"{saved.name} was saved, exit status 0", "then": saved.name}


# All of it


def measure(
    folder: Path,
    count: int,
    seed: int,
    bar: Any,
    kinds: Sequence[str] = tuple(KINDS),
    cases: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return the rows of kills, continuations in another number of processes, and damages (by default all). A row that
    failed has the reason in `broken`."""
    inputs = folder / "inputs"
    write_inputs(inputs)
    rng = random.Random(seed)
    killed, resizes, damages = [], [], []
    right, _ = undisturbed(folder / "undisturbed", inputs, PLAIN)  # this first run also takes the seconds of imports
    for index, kind in enumerate(kinds):
        share = count // len(kinds) + (index < count % len(kinds))
        place = folder / f"kills-{index}"
        killed.append(_held({"kind": kind}, lambda p=place, k=kind, s=share: kills(p, inputs, k, s, rng, bar)))
    for index, kind in enumerate(kinds):
        place = folder / f"resized-{index}"
        resizes.append(_held({"kind": kind}, lambda p=place, k=kind: resized(p, inputs, k)))
        bar.update()
    template = stopped_halfway(folder / "template", inputs, PLAIN)
    sizes = [path.stat().st_size for path in template.newest().rglob("*") if path.is_file()]
    size_mb = sum(-(-size // PAGE) * PAGE for size in sizes) / 1e6
    found: dict[str, Callable[[], dict]] = {
        name: lambda n=name: damage(template, inputs, n, right, rng) for name in DAMAGES
    } | {
        "full": lambda: full_disk(folder / "full", inputs, right, size_mb, while_writing=False),
        "filling": lambda: full_disk(folder / "filling", inputs, right, size_mb, while_writing=True),
        "unwritable": lambda: unwritable(folder / "unwritable", inputs),
        "occupied": lambda: occupied(folder / "occupied", inputs),
        "stopped": lambda: asked_to_stop(folder / "stopped", inputs, right),
    }
    for name in found if cases is None else cases:
        damages.append(_held({"damage": name}, found[name]))
        bar.update()
    return {**machine.describe(), "seed": seed, "kills": killed, "resized": resizes, "damages": damages}


def _held(about: dict, case: Callable[[], dict]) -> dict:
    try:
        return case()
    except OSError as error:
        return {**about, "skipped": str(error)}
    except (Broken, checkpoints.Damaged) as error:
        return {**about, "broken": str(error)}


def kills_table(results: dict) -> str:
    columns = {
        "kills": "kills",
        "evaluation": "in an evaluation",
        "boundary": "between two epochs",
        "writing": "while a checkpoint was written",
        "one_process": "of one process",
        "trainings": "trainings",
    }
    lines = []
    for row in results["kills"]:
        why = row.get("broken")
        cells = ["" if why else str(row[name]) for name in columns]
        lines.append([row["kind"], *cells, f"**{why}**" if why else "same bits, same log"])
    return f"{markdown(['training', *columns.values(), 'at the end'], lines)}\n\n{_from(results)}"


def resized_table(results: dict) -> str:
    lines = []
    for row in results["resized"]:
        why = row.get("broken")
        cells = [f"**{why}**", ""] if why else [f"{row[name]:.0e}" for name in ("by 1", "by 4")]
        lines.append([row["kind"], *cells])
    return f"{markdown(['training', 'continued by 1 process', 'by 4 processes'], lines)}\n\n{_from(results)}"


def damages_table(results: dict) -> str:
    lines = []
    for row in results["damages"]:
        why = row.get("broken") or (f"skipped: {row['skipped']}" if "skipped" in row else None)
        lines.append([row["damage"], f"**{why}**" if why else row["noticed"], row.get("then", "")])
    return f"{markdown(['damage', 'what was said of it', 'continued from'], lines, left=3)}\n\n{_from(results)}"


def _from(results: dict) -> str:
    return (
        f"`python -m exo_fast.benchmarks.reliability.faults` · {results['date']} · commit {results['commit']} · "
        f"{runner.machine_line(results)}"
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m exo_fast.benchmarks.reliability.faults",
        description=__doc__.splitlines()[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--kills", type=int, default=60, metavar="N", help="how many, over all kinds [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the damages [%(default)s]")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help="results as JSON [%(default)s]")
    parser.add_argument("--markdown", type=Path, metavar="PAGE", help="rewrite the tables of this page")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="exo-fast-faults-") as folder, tqdm(unit="fault") as bar:
        bar.total = options.kills + len(KINDS) + len(DAMAGES) + 5
        results = measure(Path(folder), options.kills, options.seed, bar)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    runner.write(options.output, results)
    tables = {
        "kills": kills_table(results),
        "resized": resized_table(results),
        "damages": damages_table(results),
    }
    print("\n\n".join(tables.values()))
    if options.markdown:
        rewrite(options.markdown, "faults", tables)
    return int(any("broken" in row for name in ("kills", "resized", "damages") for row in results[name]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
