"""benchmarks/gpu: the dry run of every step in a copied tree, the results that a crash, a hang and a fault of a step
leave, and the page that is made of results."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tree import ROOT

from exo_fast.benchmarks.gpu import command, page, plan
from exo_fast.benchmarks.harness.tables import block
from exo_fast.kernels.tuned import Schedule, read_table, write_table
from exo_fast.training.errors import InputError
from exo_fast.training.machine import describe

FOLDERS = ("exo_fast", "kernels", "training", "benchmarks", "tests/gpu", "tests/helpers")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the checkout's code, as a machine without a network gets it."""
    for folder in FOLDERS:
        skipped = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=skipped)
    for file in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


def python(tree: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, *words], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("linked", [True, False])
def test_a_copied_tree_works_by_pythonpath_alone(tree: Path, linked: bool) -> None:
    """The same for a copy that lost the link from exo_fast/kernels to kernels/."""
    if not linked:
        (tree / "exo_fast" / "kernels").unlink()
    code = "import exo_fast.benchmarks.cli as a, exo_fast.kernels.launch as b, exo_fast.training.cli as c\n"
    code += "for module in (a, b, c): print(module.__file__)"
    assert all(line.startswith(str(tree)) for line in python(tree, "-c", code).splitlines())


def test_a_dry_run_goes_through_every_step_in_a_copied_tree(tree: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: exo-fast gpu itself is the test")
    out = tree / "out"
    said = python(tree, "-m", "exo_fast.training.cli", "gpu", "--dry-run", "--output_dir", str(out))
    results = json.loads((out / "results.json").read_text())
    assert {name: step["state"] for name, step in results["steps"].items()} == dict.fromkeys(plan.STEPS, "done"), said
    assert page.wrong(results) == []
    rows = [row for step in results["steps"].values() for row in step["rows"].values()]
    assert not [row for row in rows if page.lost(row)]
    assert results["steps"]["tests"]["rows"]["compile"]["compiled"] == 1
    files = {path.name for path in out.iterdir()}
    assert files == {"results.json", "log.txt", "report.md", "sm_90.json", "tests-together.xml", "tests-alone.xml"}
    assert said.count("done before") == 0
    assert "A dry run" in said
    made = read_table(out / "sm_90.json")
    assert {(row.dtype, row.store) for row in made.rows} == {("bf16", False), ("bf16", True), ("fp16", False)}
    assert page.NOT_YET not in (out / "report.md").read_text()


# Limits, crashes and faults of a step.


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(command, "worker", SimpleNamespace(__name__="gpu_steps", DEVICE_LOST=3))
    return tmp_path


def run(out: Path, *steps: str, minutes: float = 2.0) -> dict[str, Any]:
    words = ["--dry-run", "--output_dir", str(out), "--minutes", str(minutes)]
    status = command.main([*words, *(word for step in steps for word in ("--only", step))])
    return {"status": status, **json.loads((out / "results.json").read_text())["steps"]}


def test_a_crash_and_a_fault_cost_one_row(fakes: Path, capsys: pytest.CaptureFixture) -> None:
    found = run(fakes, "machine", "slope")
    for name, words in (("machine", "ended by SIGSEGV"), ("slope", "ValueError: first line … last line")):
        rows = found[name]["rows"]
        assert list(rows) == ["before", "middle", "after"]
        assert rows["middle"]["failed"].startswith(words)
        assert rows["after"]["seconds"] == 0.5
    assert found["status"] == 1
    assert "WRONG: machine, middle: ended by SIGSEGV" in capsys.readouterr().out


def test_a_hanging_step_is_ended_and_the_others_go_on(fakes: Path, capsys: pytest.CaptureFixture) -> None:
    shares = sum(plan.STEPS[name].share for name in ("tests", "times"))
    seconds = 4.0  # of the step that hangs
    found = run(fakes, "tests", "times", minutes=seconds * shares / plan.STEPS["tests"].share / 60)
    assert found["tests"]["state"] == "the time was up"
    assert list(found["tests"]["rows"]) == ["before", "middle"]
    assert "stopped" in found["tests"]["rows"]["middle"]
    assert found["tests"]["seconds"] < 2 * seconds
    assert found["times"]["state"] == "done"
    assert found["status"] == 0
    assert "NOT KNOWN, whether tests/gpu passes: tests the time was up" in capsys.readouterr().out


def test_the_same_command_runs_what_is_missing(fakes: Path, capsys: pytest.CaptureFixture) -> None:
    run(fakes, "slope", "times")
    found = run(fakes, "slope", "times")
    assert "times: done before" in capsys.readouterr().out
    trace = (fakes / "trace.txt").read_text().split()
    assert sorted(trace) == ["after", "after", "before", "before", "middle"]  # of slope only the failed case again
    assert found["slope"]["rows"]["before"]["seconds"] == 0.5


def test_a_step_that_cannot_run_here_says_why(fakes: Path, capsys: pytest.CaptureFixture) -> None:
    found = run(fakes, "host")
    assert (found["status"], found["host"]["state"], found["host"]["why"]) == (0, "unavailable", "there is no tool")
    assert "unavailable: there is no tool" in capsys.readouterr().out


def test_arguments_that_cannot_work_name_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="exo-fast gpu --dry-run runs the same steps"):
        command.main(["--output_dir", str(tmp_path)])
    with pytest.raises(InputError, match="leave out one of"):
        command.main(["--dry-run", "--markdown", "page.md", "--output_dir", str(tmp_path)])
    (tmp_path / "results.json").write_text(json.dumps({**describe(), "dry_run": False, "steps": {}}))
    with pytest.raises(InputError, match="another sort of run"):
        command.main(["--dry-run", "--output_dir", str(tmp_path)])
    (tmp_path / "results.json").write_text("nothing")
    with pytest.raises(InputError, match="no file of exo-fast gpu"):
        command.main(["--dry-run", "--output_dir", str(tmp_path)])


# What the page says.


def timed(name: str, seconds: float, **more: Any) -> dict:
    method = name.split("/step/")[-1].split(",")[0]
    errors = {"loss": 1e-7, "logps": 1e-6, "dH": 2e-3, "dW": 2e-3}
    row = {"name": name, "method": method, "seconds": seconds, "errors": errors, "peak_mb": 2000.0, "tflops": 500.0}
    return {**row, "float32_logits": method.startswith("exo_fast"), "wrong": False, **more}


def configured(config: str, seconds: float, store: bool) -> dict:
    name = f"D4096/linear_logsumexp/{store}/{config}"
    row = {"name": name, "store": store, "D": 4096, "dtype": "bf16", "rows": 8192, "config": config, "tflops": 400.0}
    constants = {"BLOCK_N": 128, "BLOCK_V": 256, "BLOCK_D": 64, "PIECE": 64 if config == "a" else 32}
    return {**row, "seconds": seconds, "constants": constants, "num_warps": 8, "num_stages": 3}


@pytest.fixture
def results() -> dict[str, Any]:
    """A run on a card of 1,000 TFLOP/s: a step at D = 4,096 has a floor of 25.8 ms."""
    rows = {
        "machine": [
            {"name": "versions", "target": "sm_90", "card": {"name": "a card"}},
            {"name": "product/bf16/8192", "seconds": 1e-3, "tflops": 1000.0},
        ],
        "tests": [{"name": "together", "tests_passed": 9, "tests_failed": 0, "tests_skipped": 1, "failures": [],
                   "time_was_up": False}],
        "times": [
            timed("D4096/step/exo_fast", 0.040, schedule="default", budget=None),
            timed("D4096/step/exo_fast, kept, 4 GiB", 0.032, schedule="kept", budget=4 * plan.GIB),
            timed("D4096/step/full-logits-fp32", 0.096, float32_logits=True),
            timed("D4096/step/liger-cute", 0.024),
            {"name": "D4096/step/quack", "failed": "RuntimeError: of a peer"},
            configured("a", 2.0, True), configured("b", 1.0, True), configured("a", 1.0, False),
        ],
        "align": [
            timed("exo_fast, sdpa", 0.2, losses=[1.0, 0.5], tokens_per_second=9.0, compiled=[0, 0]),
            timed("exo_fast, flex_attention", 0.1, losses=[1.0, 0.5], tokens_per_second=9.0, compiled=[2, 0]),
        ],
    }  # fmt: skip
    steps = {name: {"state": "done", "rows": {row["name"]: row for row in found}} for name, found in rows.items()}
    head = {
        "date": "2026-12-01T08:00",
        "commit": "abc",
        "command": "exo-fast gpu",
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
    }
    return {**head, "dry_run": False, "steps": steps}


def test_the_verdict_in_plain_words(results: dict[str, Any]) -> None:
    said = page.verdict(results)
    assert said[0].startswith("RIGHT: 9 tests passed")
    (fast,) = [line for line in said if line.startswith("FAST")]
    assert "32.00 ms (exo_fast, kept, 4 GiB), 81% of the rate" in fast
    assert "3.00 times as fast as the fastest peer with float32 logits, full-logits-fp32" in fast
    assert "0.75 times as fast as the fastest of all peers, liger-cute" in fast
    assert (
        "SET, at D4096: --memory_budget 4GiB (a number of bytes in Python), 1.25 times as fast as the default." in said
    )
    assert "SET: attn_implementation=flex_attention, 2.00 times as fast here." in said
    assert any(line.startswith("NOT KNOWN, whether a kernel reads or writes") for line in said)


def test_a_fault_of_ours_is_named_first_and_a_fault_of_a_peer_is_not_ours(results: dict[str, Any]) -> None:
    assert page.wrong(results) == []
    results["steps"]["tests"]["rows"]["together"] |= {
        "tests_failed": 1, "wrong": True, "failures": [{"test": "tests/gpu/test_backend.py::test_x", "words": "E"}],
    }  # fmt: skip
    results["steps"]["times"]["rows"]["D4096/step/exo_fast"]["wrong"] = True
    found = page.wrong(results)
    assert len(found) == 2
    assert "test_x" in found[0]
    assert page.verdict(results)[0].startswith("WRONG")


def test_the_tuned_table_takes_the_fastest(results: dict[str, Any], tmp_path: Path) -> None:
    results["steps"]["times"]["rows"]["D4096/step/exo_fast, chunked, 4 GiB"] = timed(
        "D4096/step/exo_fast, chunked, 4 GiB", 0.03, schedule="chunked", budget=4 * plan.GIB
    )
    made = page.tuned(results)
    assert made is not None
    write_table(tmp_path / "sm_90.json", made)
    read = read_table(tmp_path / "sm_90.json")
    pieces = {(row.dtype, row.store): (row.up_to, row.config.constants["PIECE"]) for row in read.rows}
    assert pieces == {("bf16", True): (None, 32), ("bf16", False): (None, 64), ("fp16", False): (None, 64)}
    assert read.schedules == (Schedule("bf16", None, "chunked"),)
    assert (read.source["kind"], read.source["card"]) == ("measurement", "a card")
    assert page.tuned({**results, "steps": {}}) is None


def test_the_tables_of_the_docs_are_marked(results: dict[str, Any], tmp_path: Path) -> None:
    """Nothing was measured yet; a run fills the same marks."""
    docs = (ROOT / "docs" / "gpu.md").read_text()
    for name, table in page.tables(None).items():
        match = block(page.LABEL, name).search(docs)
        assert match is not None, name
        assert match[2] == f"{table}\n", name
    copy = tmp_path / "gpu.md"
    copy.write_text(docs)
    page.rewrite_page(copy, results)
    for name in ("card", "tests", "steps", "kernels", "training"):
        assert page.tables(results)[name] in copy.read_text()
    assert "| D4096: 8,192 × 4,096 × 128,256 | liger-cute | 24.00 | 1.08 | 0.75 |" in copy.read_text()
