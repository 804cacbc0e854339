"""The report says what its results say, and the docs show the report of the results in the repository."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from exo_fast.benchmarks import cli
from exo_fast.benchmarks.harness import compare, runner
from exo_fast.benchmarks.harness.tables import block
from exo_fast.benchmarks.report import page as report
from exo_fast.benchmarks.suites import data, memory, op, scaling, step
from exo_fast.training import machine

SPEED = {"exo_fast": 1.0, "cce": 1.25, "full-logits": 2.0, "original": 9.0}


def results(suite, measured, quick: bool = False) -> dict:
    """The result file of a run of all cases of a suite, with made-up measurements."""
    rows = [{"name": str(case), **asdict(case), **measured(case)} for case in suite.cases(quick)]
    return {**machine.describe(), "suite": suite.NAME, "quick": quick, "rows": rows, "summary": suite.summary(rows)}


def op_row(case: op.Case) -> dict:
    if case.method == "liger":
        return {"skipped": "liger_kernel is not installed"}
    floor = case.tokens * case.width * case.vocab / 2e10
    seconds = floor * SPEED.get(case.method, 3.0) * (1.1 if case.precision == "fp32" else 1.3)
    return {
        "seconds": seconds,
        "all_seconds": [seconds] * 3,
        "peak_mb": 900.0,
        "scratch_mb": 250.0,
        "errors": {"loss": 1e-6, "logps": 2e-6, "dH": 3e-6, "dW": 4e-6},
        "baseline_seconds": floor,
        "share": floor / seconds,
        "gflops": {"logits": 310.0, "dH": 330.0, "dW": 324.0},
        "float32_logits": case.precision == "fp32" or case.method == "exo_fast",
    }


def step_row(case: step.Case) -> dict:
    seconds = SPEED.get(case.style, 1.5) * case.prompt / 100
    return {
        "seconds": seconds,
        "all_seconds": [seconds] * 3,
        "tokens_per_second": 8 * case.completion / seconds,
        "peak_mb": 1000 * SPEED.get(case.style, 1.5),
        "errors": {"loss": 1e-3, "gradient": 2e-3},
    }


def scaling_row(case: scaling.Case) -> dict:
    return op_row(case.op) | {"scratch_mb": 250.0 + case.tokens / 1e4}


def data_row(case: data.Case) -> dict:
    if not case.part.startswith("epoch"):
        return {"seconds": 0.4, "baseline_seconds": 0.2, "examples_per_second": 5000, "tokens_per_second": 90000}
    stages = [
        {"stage": name, "when": when, "seconds": 1.0, "calls": 3, "share_of_steps": share, "share_of_run": 0.05}
        for name, when, share in (("model: matrix products", "every step", 0.9), ("collate", "every step", 0.1),
                                  ("tokenise", "once a run", None))
    ]  # fmt: skip
    return {"seconds": 2.0, "baseline_seconds": 1.8, "run_seconds": 9.0, "steps": 16, "stages": stages}


def memory_row(case: memory.Case) -> dict:
    parts = {"weights": 270.0, "activations": 900.0, "head": 350.0, "mask": 2.0}
    measured = {"peak_mb": 1500.0, "predicted_mb": 1522.0, "parts_mb": parts, "errors": {"prediction": 0.0147}}
    return {"seconds": 2.0, "all_seconds": [2.1, 2.0], **measured}


SUITES = ((op, op_row), (scaling, scaling_row), (step, step_row), (data, data_row), (memory, memory_row))


@pytest.fixture(scope="module")
def made() -> dict[str, dict]:
    found = {suite.NAME: results(suite, row) for suite, row in SUITES}
    found["op"]["copy_gbps"] = 25.8
    return found


@pytest.fixture
def folder(tmp_path: Path, made: dict[str, dict]) -> Path:
    for name, found in made.items():
        runner.write(tmp_path / f"{name}.json", found)
    return tmp_path


def test_every_measured_row_is_in_a_table_and_the_others_are_named(made: dict[str, dict]) -> None:
    text = report.sections(made, "")["op"]
    tables = [
        line for line in text.splitlines() if line.startswith("| ") and "seconds" not in line and "---" not in line
    ]
    assert len(tables) == sum("seconds" in row for row in made["op"]["rows"])
    skipped = [row["name"] for row in made["op"]["rows"] if "skipped" in row]
    assert f"Not measured: {', '.join(skipped)} (liger_kernel is not installed)." in text
    assert all(f"{row['seconds']:.2f}" in text for row in made["op"]["rows"] if "seconds" in row)


def test_ratios_are_time_over_the_peers(made: dict[str, dict]) -> None:
    line = next(
        line
        for line in report.sections(made, "")["op"].splitlines()
        if "K = 2, N = 8,192, dH + dW | **exo_fast**" in line
    )
    assert [cell.strip() for cell in line.split("|")[4:7]] == ["0.91", "0.80", "250"]  # 1 / 1.1 of the floor, 1 / 1.25
    claims = report.sections(made, "")["op-claims"]
    assert "| 576 × 49,152 | fp32 | K = 2, N = 8,192, dH + dW | 0.91 | cce | 0.80 | cce | 0.80 |" in claims
    steps = report.sections(made, "")["step"]
    assert re.search(
        r"\| K = 8, 205 \+ 51 \| original \| 18.45 \| 22 \| 9,000 \| 9.00 \| 9.00 \| 1e-03 \| 2e-03 \|", steps
    )
    assert "| + shared prompt | 1.28 | 1.50 | 9.00 | 1,000 |" in report.sections(made, "")["ablation"]


def test_the_ends_of_the_grid_come_first(made: dict[str, dict]) -> None:
    table = report.sections(made, "")["step"].split("\n\n")[2].splitlines()
    assert "| K = 8, 205 + 51 | bf16 | original | **exo_fast** | 9.00 | 9.00 |" in table
    assert "| K = 2, 51 + 205 | bf16 | full-logits | **exo_fast** | 2.00 | 2.00 |" in table
    assert {line.split("|")[1].strip() for line in table[2:]} == {"K = 8, 205 + 51", "K = 2, 51 + 205"}


def test_growth_epochs_and_memory_are_in_tables(made: dict[str, dict]) -> None:
    found = report.sections(made, "")
    assert "| N | **exo_fast** | 576 × 49,152, bf16 | 2,048 – 131,072 | 1.000 | +0.000 | +0.0" in found["scaling"]
    assert "| tokenise | 5,000 | 90,000 | 0.400 | 2.00 |" in found["data"]
    assert "| collate | 1.000 | 10.0% | 1.000 | 10.0% | 1.000 | 10.0% |" in found["epoch"]
    assert "| once a run | demo, s | of the run |" in found["epoch"]
    assert "head and loss: demo: collate 10.0%; long: collate 10.0%." in found["epoch"]
    assert "A large copy moves 25.8 GB/s here." in found["op"]
    assert "GB/s" not in found["scaling"]
    assert "| 1,500 | 1,522 | 1.01 | activations 900, head 350, weights 270 | 2.00 |" in found["memory"]
    assert "Largest error of a prediction 1%, mean 1%." in found["memory"]


def test_sections_say_what_they_are_from(made: dict[str, dict]) -> None:
    old = json.loads(json.dumps(made["step"]))
    old["rows"][0]["run"] = {"date": "2025-01-02T03:04:05+00:00", "commit": "abc", "command": "x"}
    old["rows"][0]["run"]["versions"] = {**old["versions"], "torch": "2.0"}
    for text in report.sections({"step": old}, "").values():
        last = text.splitlines()[-1]
        assert f"`{old['command']}` · {old['date'][:10]} · commit {old['commit']} · " in last
        assert f"torch {old['versions']['torch']}, transformers" in last
        assert last.endswith("1 row of earlier runs (2025-01-02, commit abc, torch 2.0)")


def test_report_is_a_page_with_plots(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "report.md").write_text("an older one")
    assert cli.main(["--report", "--output_dir", str(folder)]) == 0
    page = (folder / "report.md").read_text()
    found = compare.read_results(folder)
    for name, text in report.sections(found, "").items():
        assert block("bench", name).search(page)[2] == f"{text}\n"
    pictures = re.findall(r"!\[.*\]\((.*)\)", page)
    assert len(pictures) == sum(bool(section.plot) for section in report.SECTIONS.values())
    for picture in pictures:
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_a_quick_run_and_one_that_failed_are_reported_too(tmp_path: Path) -> None:
    for suite, row in SUITES:
        found = results(suite, row, quick=True)
        del found["rows"][1:]
        runner.write(tmp_path / f"{suite.NAME}.json", {**found, "summary": suite.summary(found["rows"])})
    page = tmp_path / "report.md"
    report.write(tmp_path, page, tmp_path)
    steps = block("bench", "step").search(page.read_text())[2]
    assert "full-logits" in steps
    assert not [line for line in steps.splitlines() if line.startswith("|") and "original" in line]
    for suite, _ in SUITES:
        found = results(suite, lambda case: {"failed": "KeyError: 'x'"})
        runner.write(tmp_path / f"{suite.NAME}.json", found)
    page.unlink()
    report.write(tmp_path, page, tmp_path)
    assert "KeyError: 'x'" in page.read_text()


def test_what_was_not_measured_keeps_nothing_of_another_run(tmp_path: Path) -> None:
    """The operation's forward alone, as `--only` leaves it in an empty folder: no plot has data, and no plot fails."""
    page = tmp_path / "page.md"
    marks = ("op-claims", "op", "step")
    page.write_text("".join(f"<!-- bench: {name} -->\nold\n<!-- end -->\n" for name in marks))
    (tmp_path / "bench-op-claims.png").write_text("old")
    found = results(op, op_row)
    found["rows"] = [row for row in found["rows"] if row["work"] == "forward"]
    runner.write(tmp_path / "op.json", {**found, "summary": op.summary(found["rows"])})
    assert report.write(tmp_path, page, tmp_path) == [page]
    shown = {name: block("bench", name).search(page.read_text())[2] for name in marks}
    assert shown["step"] == "Not measured yet.\n"
    assert "forward" in shown["op-claims"]
    assert "png" not in page.read_text()
    assert not list(tmp_path.glob("*.png"))


def test_command_rewrites_what_lies_between_the_marks(folder: Path) -> None:
    page = folder / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- bench: step -->\nold\n<!-- end -->\nafter\n")
    images = folder / "docs" / "images"
    assert report.main(["--results", str(folder), "--page", str(page), "--images", str(images)]) == 0
    text = report.sections(compare.read_results(folder), "images/")["step"]
    assert page.read_text() == f"before\n<!-- bench: step -->\n{text}\n<!-- end -->\nafter\n"
    assert (images / "bench-step.png").is_file()


def test_docs_show_the_results_in_the_repository() -> None:
    recorded = compare.read_results(report.RESULTS)
    page = report.PAGE.read_text()
    shown = report.sections(recorded, "images/")
    assert set(re.findall(r"<!-- bench: (\S+) -->", page)) == set(report.SECTIONS)
    for name, text in shown.items():
        assert block("bench", name).search(page)[2] == f"{text}\n", (
            f"run python -m exo_fast.benchmarks.report.page: {name}"
        )
        if report.SECTIONS[name].plot:
            assert (report.IMAGES / f"bench-{name}.png").is_file()
