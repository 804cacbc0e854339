"""Runs of suites: a process for each case, a whole file after each, the kept rows and the rows that run again."""

import importlib
import json
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from exo_fast.benchmarks import cli
from exo_fast.benchmarks.harness import contract, runner
from exo_fast.training.errors import InputError

PACKAGED = dict(contract.SUITES)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contract, "SUITES", {"tiny": "tiny_suite"})
    for module in (cli, cli.compare):
        monkeypatch.setattr(module, "SUITES", contract.SUITES)
    monkeypatch.setattr(cli, "SHARES", {"tiny": 1.0})
    import tiny_suite

    return tiny_suite


def bench(folder: Path, *words: str) -> tuple[int, dict]:
    status = cli.main([*words, "--output_dir", str(folder)])
    return status, json.loads((folder / "tiny.json").read_text())


def by_name(results: dict) -> dict[str, dict]:
    return {row["name"]: row for row in results["rows"]}


def test_rows_have_case_measurement_baseline_and_machine(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, results = bench(tmp_path, "tiny")
    assert status == 0
    rows = by_name(results)
    assert list(rows) == [f"tiny/{method}/{size}" for size in (1, 2) for method in ("plain", "ours", "noisy")]
    row = rows["tiny/ours/2"]
    assert (row["method"], row["size"], row["seconds"], row["baseline_seconds"]) == ("ours", 2, 1.0, 4.0)
    assert row["seen"] == 5  # one folder for all cases
    assert "baseline_seconds" not in rows["tiny/plain/1"]
    assert rows["tiny/noisy/2"] == {
        "name": "tiny/noisy/2",
        "method": "noisy",
        "size": 2,
        "skipped": "too noisy for two",
    }
    assert (results["suite"], results["bandwidth_gbs"], results["summary"]) == ("tiny", 20.0, {"total": 10.5})
    assert {"machine", "versions", "date", "command", "commit"} <= results.keys()
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("tiny/ours/2"))
    assert line.split()[1:] == ["1.000", "10%", "4.00", "100", "1.0e-06"]
    assert "skipped: too noisy for two" in printed


@pytest.mark.parametrize(
    ("variable", "words"), [("TINY_FAILS", "ValueError: of course it does"), ("TINY_DIES", "ended by SIGKILL")]
)
def test_a_failed_case_is_a_row_and_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, variable: str, words: str
) -> None:
    monkeypatch.setenv(variable, "tiny/plain/1")
    status, results = bench(tmp_path, "tiny", "--quick")
    assert status == 1
    rows = by_name(results)
    assert words in rows["tiny/plain/1"]["failed"]
    assert rows["tiny/ours/1"]["seconds"] == 0.5  # the others ran
    assert "baseline_seconds" not in rows["tiny/ours/1"]
    monkeypatch.delenv(variable)
    status, results = bench(tmp_path, "tiny", "--quick", "--continue")
    assert status == 0
    assert "failed" not in by_name(results)["tiny/plain/1"]
    assert by_name(results)["tiny/ours/1"]["baseline_seconds"] == 2.0  # run again with its yardstick
    capsys.readouterr()
    before = (tmp_path / "tiny.json").read_text()
    assert bench(tmp_path, "tiny", "--quick", "--continue")[0] == 0
    assert "nothing is left to run" in capsys.readouterr().out  # what was done was not run again
    assert (tmp_path / "tiny.json").read_text() == before


def test_continue_runs_what_can_run_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = bench(tmp_path, "tiny", "--only", "noisy/2", "--only", "ours/2")
    assert "skipped" in by_name(first)["tiny/noisy/2"]
    monkeypatch.setenv("TINY_QUIET", "1")
    _, second = bench(tmp_path, "tiny", "--continue", "--only", "noisy/2")
    rows = by_name(second)
    assert rows["tiny/noisy/2"]["baseline_seconds"] == 4.0
    assert "run" in rows["tiny/ours/2"]


def test_a_case_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = tmp_path / "pid"
    monkeypatch.setenv("TINY_HANGS", "tiny/plain/1")
    monkeypatch.setenv("TINY_PID", str(pid))
    monkeypatch.setattr(runner, "LIMIT_SECONDS", 3)
    status, results = bench(tmp_path, "tiny", "--only", "plain/1")
    assert (status, results["rows"][0]["failed"]) == (1, "ended after 0 minutes without a row")
    wait_for(lambda: not alive(int(pid.read_text())))


@pytest.mark.parametrize(("part", "words"), [("prepare", "nothing to fetch"), ("extras", "no bandwidth")])
def test_a_suite_that_cannot_start_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tiny, part: str, words: str
) -> None:
    other = types.ModuleType("other_suite")
    other.__dict__.update({name: value for name, value in vars(tiny).items() if name not in ("prepare", "extras")})
    other.NAME, other.__name__ = "other", "tiny_suite"
    monkeypatch.setitem(sys.modules, "other_suite", other)
    monkeypatch.setitem(contract.SUITES, "other", "other_suite")
    monkeypatch.setenv("TINY_FAILS", part)
    assert cli.main(["tiny", "other", "--only", "tiny/plain/1", "--output_dir", str(tmp_path)]) == 1
    assert words in capsys.readouterr().err
    assert json.loads((tmp_path / "other.json").read_text())["rows"][0]["seconds"] == 2.0


def test_only_keeps_other_rows_and_runs_the_baseline_too(tmp_path: Path, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = bench(tmp_path, "tiny")
    monkeypatch.setenv("TINY_FAILS", "tiny/plain/2")
    status, second = bench(tmp_path, "tiny", "--only", "tiny/ours/2")
    assert status == 1
    rows = by_name(second)
    assert "failed" in rows["tiny/plain/2"]  # the yardstick of the case that was asked for, in the same run
    assert "run" not in rows["tiny/ours/2"]
    old = {
        **by_name(first)["tiny/ours/1"],
        "run": {name: first[name] for name in ("date", "commit", "command", "versions")},
    }
    assert rows["tiny/ours/1"] == old
    monkeypatch.delenv("TINY_FAILS")
    _, third = bench(tmp_path, "tiny", "--quick")
    assert list(by_name(third)) == [str(case) for case in tiny.cases(quick=True)]  # a full run keeps nothing
    assert third["quick"] is True


def test_rows_that_the_suite_has_no_longer_are_kept(tmp_path: Path, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = bench(tmp_path, "tiny")
    fewer = [case for case in tiny.cases() if case.method != "noisy"]
    monkeypatch.setattr(tiny, "cases", lambda quick=False: fewer)
    _, second = bench(tmp_path, "tiny", "--only", "ours/1")
    assert by_name(first).keys() == by_name(second).keys()


def test_quick_and_full_rows_are_not_mixed(tmp_path: Path) -> None:
    _, before = bench(tmp_path, "tiny", "--only", "plain/1")
    for words in (["--only", "plain/1"], ["--continue"]):
        with pytest.raises(InputError, match=r"of the full cases, .* of those of --quick: give another --output_dir"):
            bench(tmp_path, "tiny", "--quick", *words)
    assert json.loads((tmp_path / "tiny.json").read_text()) == before


def test_what_was_asked_for_and_not_measured_is_worse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    bench(old, "tiny", "--quick")
    compared = ["--quick", "--compare", str(old), "--tolerance", "9"]
    assert bench(new, "tiny", *compared, "--only", "ours/1")[0] == 0  # others were not asked for
    monkeypatch.setattr("tiny_suite.impossible", lambda case: "not today" if case.method == "noisy" else None)
    assert bench(new, "tiny", *compared)[0] == 1
    assert bench(new, "tiny", *compared, "--continue")[0] == 1  # all rows of the file, though no case was run
    assert bench(new, "tiny", *compared, "--only", "ours/1")[0] == 0


def test_rows_of_another_machine_are_not_mixed_in(tmp_path: Path, tiny) -> None:
    _, results = bench(tmp_path, "tiny", "--quick")
    results["machine"]["cpu"] = "Another"
    runner.write(tmp_path / "tiny.json", results)
    with pytest.raises(InputError, match=r"another machine \(Another.*whole suite"):
        bench(tmp_path, "tiny", "--only", "tiny/ours")


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_leaves_a_whole_file_and_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: signal.Signals
) -> None:
    pid = tmp_path / "pid"
    monkeypatch.setenv("TINY_HANGS", "tiny/ours/1")
    monkeypatch.setenv("TINY_PID", str(pid))
    script = (
        "import sys; from exo_fast.benchmarks import cli; from exo_fast.benchmarks.harness import compare, contract;"
        "contract.SUITES.update(tiny='tiny_suite'); cli.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, "tiny", "--output_dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: pid.exists() and pid.read_text())
    process.send_signal(ending)
    process.wait(20)
    worker = int(pid.read_text())
    wait_for(lambda: not alive(worker))
    assert [row["name"] for row in json.loads((tmp_path / "tiny.json").read_text())["rows"]] == ["tiny/plain/1"]


def wait_for(true, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("only", ["tiny/noisy/2", "noisy/2"])
def test_list_shows_what_would_run_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture, only: str) -> None:
    assert cli.main(["all", "--list", "--only", only, "--output_dir", str(tmp_path / "none")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["tiny/plain/2", "tiny/noisy/2"]
    assert "skipped: too noisy for two" in lines[1]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [([], "name a suite: tiny or all"), (["tiny", "--only", "nothing"], "no case begins so"),
     (["tiny", "--compare", "nowhere"], "nowhere holds no results")],
)  # fmt: skip
def test_what_cannot_be_done_names_the_fix(words: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        cli.main(words)


def test_every_suite_of_the_package_is_one() -> None:
    """Names are unique, begin with the suite's, and a baseline is a case."""
    for name, module in PACKAGED.items():
        suite = importlib.import_module(module)
        assert name == suite.NAME
        for quick in (False, True):
            names = [str(case) for case in suite.cases(quick)]
            assert len(set(names)) == len(names) > 0
            assert all(text.startswith(f"{name}/") for text in names)
            if hasattr(suite, "baseline"):
                assert {suite.baseline(case) for case in suite.cases(quick)} - {None} <= set(names)


def test_no_case_begins_when_the_time_is_up(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, results = bench(tmp_path, "tiny", "--minutes", "1e-4")
    assert status == 0  # nothing failed
    rows = by_name(results)
    assert not any("seconds" in row for row in rows.values())
    assert "--continue" in rows["tiny/ours/2"]["skipped"]
    assert "--minutes was up" in capsys.readouterr().out
    status, results = bench(tmp_path, "tiny", "--continue")
    assert by_name(results)["tiny/ours/2"]["seconds"] == 1.0


def test_time_is_shared_by_what_whole_suites_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(contract.SHARES) == set(PACKAGED)
    assert sum(contract.SHARES.values()) == pytest.approx(1)
    monkeypatch.setattr(cli, "SHARES", {"a": 0.2, "b": 0.2, "c": 0.6})
    begun = time.perf_counter()
    ends = [end - begun for end in cli._ends(["a", "b"], 2.0)]
    assert ends == pytest.approx([60, 120], abs=1)
    assert cli._ends(["a", "b"], None) == [None, None]
