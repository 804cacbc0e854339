"""A run that is killed and continued, by one process or two, ends with the bytes of one that was left alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from forked import kill_halfway, run

from exo_fast.training.data.writing import to_json
from exo_fast.training.errors import InputError
from exo_fast.training.inference.resumable import ResumableRun

SCRIPT = """
import sys, time
from exo_fast.training import processes
from exo_fast.training.inference.resumable import ResumableRun

processes.start(on_cpu=True)
for output_dir in {directories!r}:
    run = ResumableRun(output_dir, {{"seed": 1}})
    computed = []
    def compute(index):
        computed.append(index)
        time.sleep({seconds})
        return [index * index, "é"]
    files = {{}}
    for split, count in (("train", 9), ("test", 4)):
        files[split + ".json"] = run.compute(
            split, [1] * count, compute, description=split, unit="batch", progress=False
        )
    run.finish(files, {{"count": 13}})
    print("computed", len(computed), "in process", processes.index(), flush=True)
"""


def write_script(path: Path, *directories: Path, seconds: float = 0.0) -> Path:
    path.write_text(SCRIPT.format(directories=[str(directory) for directory in directories], seconds=seconds))
    return path


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_killed_twice_and_continued_equals_undisturbed(tmp_path: Path) -> None:
    whole, killed, again, fresh = (tmp_path / name for name in ("whole", "killed", "again", "fresh"))
    slow = write_script(tmp_path / "slow.py", killed, seconds=0.3)
    kill_halfway(slow, killed, processes=2)
    kill_halfway(slow, killed)
    shutil.copytree(killed, again)
    stored = sum(len(path.read_bytes().split(b"\n")) - 1 for path in killed.glob(".partial/*"))

    printed = run(write_script(tmp_path / "one.py", whole, killed))
    assert f"computed {13 - stored} in process 0" in printed
    run(write_script(tmp_path / "two.py", again, fresh), processes=2)
    expected = contents(whole)
    assert set(expected) == {"train.json", "test.json", "summary.json"}
    assert json.loads(expected["train.json"])[3] == [9, "é"]
    for directory in (killed, again, fresh):
        assert contents(directory) == expected, directory


def test_token_ids_stand_on_one_line_and_text_stays() -> None:
    value = {"a": ["[\n 1,\n 2\n]", "é"], "ids": [[1, -2, 3], [4], []], "x": [0.5, 1]}
    written = to_json(value).decode()
    assert json.loads(written) == value
    assert "[1, -2, 3]" in written
    assert written.endswith("}\n")


def squares(run: ResumableRun, count: int = 5, calls: list[int] | None = None) -> list[Any]:
    def compute(index: int) -> int:
        if calls is not None:
            calls.append(index)
        return index * index

    return run.compute("train", [1] * count, compute, description="", unit="", progress=False)


def test_a_torn_last_line_is_computed_again(tmp_path: Path) -> None:
    squares(ResumableRun(tmp_path, {}))
    (stored,) = tmp_path.glob(".partial/*.jsonl")
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-7])
    calls: list[int] = []
    assert squares(ResumableRun(tmp_path, {}), calls=calls) == [0, 1, 4, 9, 16]
    assert calls == [4]
    assert stored.read_bytes() == whole
    stored.write_bytes(whole[:-1])  # all of it but the newline: not known to be all
    assert squares(ResumableRun(tmp_path, {}), calls=calls) == [0, 1, 4, 9, 16]
    assert calls == [4, 4]


def test_batches_of_other_settings_are_not_used(tmp_path: Path) -> None:
    squares(ResumableRun(tmp_path, {"temperature": 1.0}))
    calls: list[int] = []
    squares(ResumableRun(tmp_path, {"temperature": 0.5}), calls=calls)
    assert calls == [0, 1, 2, 3, 4]


def test_a_finished_run_is_reused_and_other_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    identity = {"temperature": 1.0, "sizes": (1, 2)}
    first = ResumableRun(tmp_path, identity)
    assert first.finished(["train.json"]) is None
    summary = first.finish({"train.json": squares(first)}, {"count": 5})
    assert not (tmp_path / ".partial").exists()
    assert ResumableRun(tmp_path, identity).finished(["train.json"]) == summary
    assert "reusing" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"temperature was 1.0 and is now 0.7\); choose another output_dir"):
        ResumableRun(tmp_path, {**identity, "temperature": 0.7}).finished(["train.json"])
    (tmp_path / "train.json").unlink()
    assert ResumableRun(tmp_path, identity).finished(["train.json"]) is None


def test_killed_between_the_files_and_the_summary(tmp_path: Path) -> None:
    run = ResumableRun(tmp_path, {})
    squares(run)
    (tmp_path / "train.json").write_text("[]")
    assert ResumableRun(tmp_path, {}).finished(["train.json"]) is None
    calls: list[int] = []
    again = ResumableRun(tmp_path, {})
    values = squares(again, calls=calls)
    again.finish({"train.json": values}, {})
    assert (calls, json.loads((tmp_path / "train.json").read_text())) == ([], values)


def test_killed_between_the_summary_and_the_removal_of_what_it_was_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ResumableRun(tmp_path, {})
    values = squares(run)
    with monkeypatch.context() as patch:
        patch.setattr("exo_fast.training.inference.resumable.shutil.rmtree", lambda *_, **__: None)
        summary = run.finish({"train.json": values}, {"count": 5})
    assert (tmp_path / ".partial").exists()
    assert ResumableRun(tmp_path, {}).finished(["train.json"]) == summary
    assert not (tmp_path / ".partial").exists()


def test_files_of_others_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(InputError, match=r"holds a train.json that this run did not write"):
        ResumableRun(tmp_path, {}).finished(["train.json", "test.json"])
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(InputError, match="or of another stage"):
        ResumableRun(tmp_path, {}).finished(["train.json"])
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(InputError, match="not a summary"):
        ResumableRun(tmp_path, {}).finished(["train.json"])
