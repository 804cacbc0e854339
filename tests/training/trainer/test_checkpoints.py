"""Checkpoints are whole or not there, and one that was changed is not read."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from exo_fast.training.models import saving
from exo_fast.training.trainer import checkpoints
from exo_fast.training.trainer.checkpoints import Damaged, Facts

FACTS = Facts(step=2, processes=1, engine="torch", zero_stage=None, resumable=True)


def write(output: Path, step: int, facts: Facts = FACTS) -> Path:
    """A checkpoint with a file in a folder of its own, as DeepSpeed's are."""
    name = f"checkpoint-{step}"
    with checkpoints.unfinished(output, name) as folder:
        (folder / name / "global_step").mkdir(parents=True)
        (folder / name / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        torch.save({"weights": torch.arange(step)}, folder / name / "global_step" / "states.pt")
        checkpoints.publish(folder / name, output / name, facts)
    return output / name


def change_manifest(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, 2)
    assert checkpoints.read(path) == checkpoints.facts(path) == FACTS
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert sorted(files) == ["global_step/states.pt", "trainer_state.json"]
    assert checkpoints.size(path) == sum(entry["size"] for entry in files.values())
    assert not list((tmp_path / checkpoints.UNFINISHED).iterdir())


def test_a_write_that_fails_leaves_the_one_before_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 2)

    def fail() -> None:
        with checkpoints.unfinished(tmp_path, "checkpoint-4") as folder:
            (folder / "checkpoint-4").mkdir()
            (folder / "checkpoint-4" / "half").write_bytes(b"half")
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        fail()
    assert [path.name for path in checkpoints.numbered(tmp_path)] == ["checkpoint-2"]
    assert not list((tmp_path / checkpoints.UNFINISHED).iterdir())


def test_publishing_over_a_damaged_one_replaces_it(tmp_path: Path) -> None:
    path = write(tmp_path, 2)
    (path / "trainer_state.json").unlink()
    assert checkpoints.read(write(tmp_path, 2)) == FACTS


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


class Payload:
    def __reduce__(self) -> tuple:
        return os.system, ("true",)


def poison(path: Path) -> None:
    """A pickle that runs a command, in a checkpoint whose manifest says that it is right."""
    file = path / "global_step" / "states.pt"
    torch.save(Payload(), file, pickle_module=pickle)
    files = json.loads((path / "manifest.json").read_text())["files"]
    change_manifest(path, files={**files, "global_step/states.pt": checkpoints._entry(file)})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda path: flip(path / "global_step" / "states.pt"), "states.pt has another content"),
    "truncated": (lambda path: os.truncate(path / "trainer_state.json", 3), "trainer_state.json has 3 bytes where 18"),
    "missing": (lambda path: (path / "trainer_state.json").unlink(), r"trainer_state.json is missing"),
    "added": (lambda path: (path / "more.pt").touch(), r"more.pt does not belong to it"),
    "linked": (lambda path: replace_by_link(path / "trainer_state.json"), "trainer_state.json is not a plain file"),
    "poisoned": (poison, "states.pt is a pickle that would import posix.system"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "it has no manifest.json: it was not written"),
    "half a manifest": (lambda path: os.truncate(path / "manifest.json", 40), "manifest.json cannot be read"),
    "another format": (lambda path: change_manifest(path, format=99), "manifest.json is not of format 1"),
    "no sizes": (lambda path: change_manifest(path, files={"a": 1}), "names no files with size and sha256"),
    "a way out": (
        lambda path: change_manifest(path, files={"../../etc": {"size": 1, "sha256": ""}}),
        r"names '\.\./\.\./etc', which lies outside",
    ),
    "absolute": (
        lambda path: change_manifest(path, files={"/etc/passwd": {"size": 1, "sha256": ""}}),
        "names '/etc/passwd', which lies outside",
    ),
    "huge manifest": (lambda path: os.truncate(path / "manifest.json", 2**40), "manifest.json is larger than 64 MiB"),
    "no facts": (
        lambda path: (path / "manifest.json").write_text('{"format": 1, "files": {}}'),
        r"(does not belong|lacks)",
    ),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_one_is_named_and_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object], words: str
) -> None:
    write(tmp_path, 2)
    path = write(tmp_path, 4)
    damage(path)
    with pytest.raises(Damaged, match=words):
        checkpoints.read(path)
    with caplog.at_level("WARNING"):
        checkpoints.logger.addHandler(caplog.handler)
        try:
            assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-2"
        finally:
            checkpoints.logger.removeHandler(caplog.handler)
    assert "checkpoint-4 cannot be continued from" in caplog.text


def test_models_alone_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 2, Facts(2, 1, "torch", None, resumable=False))
    assert checkpoints.newest(tmp_path) is None


def test_the_newest_are_kept_and_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 10, 12):
        write(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()  # not ours
    checkpoints.rotate(tmp_path, None, None)
    assert len(checkpoints.numbered(tmp_path)) == 4
    checkpoints.rotate(tmp_path, 2, str(tmp_path / "checkpoint-2"))
    assert [path.name for path in checkpoints.numbered(tmp_path)] == ["checkpoint-12", "checkpoint-10", "checkpoint-2"]
    assert (tmp_path / "checkpoint-best").exists()


def test_files_are_replaced_by_whole_ones(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "model").write_text("new")
    (target / "model").write_text("old")
    (target / "other").write_text("kept")
    saving.replace_files(source, target)
    assert {path.name: path.read_text() for path in target.iterdir()} == {"model": "new", "other": "kept"}
