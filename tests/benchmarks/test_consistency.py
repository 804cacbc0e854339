"""Training gives the same answer however it is cut over processes, and the command that shows it would notice."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from tqdm import tqdm

from exo_fast.benchmarks.harness.tables import block
from exo_fast.benchmarks.reliability import consistency, processes
from exo_fast.benchmarks.reliability.consistency import Cell
from exo_fast.training import machine
from exo_fast.training.stages.align import AlignConfig, AlignTrainer, align

REFUSED = Cell(1, 0, accumulation=13)  # a batch of 12 groups cannot be cut into so many


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Findings of the command in the cells of --quick, and in one that fails before them."""
    with tqdm(disable=True) as bar:
        found = consistency.measure([REFUSED, *consistency.cells(quick=True)], tmp_path_factory.mktemp("cells"), bar)
    return {**machine.describe(), "suite": "consistency", "quick": True, **found}


@pytest.mark.slow
def test_the_answer_does_not_depend_on_the_cut(results: dict[str, Any]) -> None:
    """1 and 2 processes, ZeRO 0 and 3, accumulation over 1 and 3: the last of five steps is divided unevenly."""
    (answer,) = results["answers"]
    assert len(answer["loss"]) == consistency.STEPS
    assert 1 <= answer["clipped_steps"] < consistency.STEPS
    assert min(answer["moved"]) > 100 * consistency.LIMITS["fp32"]
    rows = [row for row in results["rows"] if row["name"] != str(REFUSED)]
    assert len(rows) == 9
    assert all(consistency.within_limits(row) for row in rows), rows


@pytest.mark.slow
def test_a_cell_that_fails_says_why_and_stops_no_other(
    results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = (row for row in results["rows"] if row["name"] == str(REFUSED))
    assert "per_device_train_batch_size=0: at least 1 is needed" in row["failed"]
    assert consistency.report(results, None, None) == 1
    assert f"past its limit: {REFUSED}\n" in capsys.readouterr().out

    page, output = tmp_path / "page.md", tmp_path / "new" / "consistency.json"
    page.write_text("before\n<!-- consistency: table -->\nold\n<!-- end -->\nafter\n")
    rest = {**results, "rows": [row for row in results["rows"] if row["name"] != str(REFUSED)]}
    assert consistency.report(rest, output, page) == 0
    shown = consistency.text(rest)
    assert page.read_text() == f"before\n<!-- consistency: table -->\n{shown}\n<!-- end -->\nafter\n"
    assert shown.count("\n| ") == 2 + 4  # of 1 and 2 processes, ZeRO 0 and 3
    assert "**" not in shown
    assert output.exists()


def test_averages_of_averages_are_past_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training whose steps take the mean over micro-batches of their means, as whoever divides by their number."""
    consistency.write_inputs(tmp_path)
    cell = Cell(1, 0, accumulation=3)
    for settings in consistency.answer_settings(tmp_path, cell.head, cell.trained):
        align(AlignConfig(**settings))
    honest = AlignTrainer.compute_loss

    def compute_loss(trainer: AlignTrainer, model: Any, inputs: dict, *args: Any, **options: Any) -> Tensor:
        share = honest(trainer, model, inputs, *args, **options)
        mean = share * options["num_items_in_batch"] / inputs["weights"].sum()
        return mean / trainer.current_gradient_accumulation_steps

    for method, right in ((honest, True), (compute_loss, False)):
        monkeypatch.setattr(AlignTrainer, "compute_loss", method)
        folder = tmp_path / str(right)
        folder.mkdir()
        for name in ("answer", "start"):
            (folder / name).symlink_to(tmp_path / name)
        settings = {**consistency.cell_settings(tmp_path, cell), "output_dir": str(folder / str(cell))}
        align(AlignConfig(**{**settings, "engine": "torch"}))
        row = {"precision": cell.precision, **consistency.compare(folder, cell)}
        assert consistency.within_limits(row) is right, row


def test_cells_are_every_combination_once() -> None:
    cells = consistency.cells()
    assert len({str(cell) for cell in cells}) == len(cells) == 3 * (6 * 2 * 2 * 2 + 4)
    assert set(consistency.cells(quick=True)) < set(cells)
    for cell in cells:
        assert consistency.GLOBAL_BATCH % (cell.processes * cell.accumulation) == 0
    assert consistency.GROUPS % consistency.GLOBAL_BATCH % 4


@pytest.mark.parametrize(("value", "right"), [(9e-6, True), (1.1e-5, False), (math.nan, False), (math.inf, False)])
@pytest.mark.parametrize("key", ["parameters", "evaluation"])
def test_limits_hold_for_parameters_and_loss(key: str, value: float, right: bool) -> None:
    row = {"precision": "fp32", "parameters": 0.0, "evaluation": 0.0, key: value}
    assert consistency.within_limits(row) is right
    assert ("**" in consistency.worst([{**row, key: 0.0}, row], key)) is not right
    assert consistency.within_limits({**row, "precision": "bf16"}) is (value < 1)


def test_offloading_is_skipped_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert consistency.impossible(Cell(1, 2)) is None
    assert consistency.impossible(Cell(1, 2, offload=True)) == consistency.WITHOUT_COMPILER
    assert consistency.worst([{"skipped": consistency.WITHOUT_COMPILER}], "parameters") == "skipped"


def test_processes_find_each_other_and_one_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "7")
    (alone,) = processes.environments(1)
    assert not alone.keys() & set(processes.LAUNCHER)
    both = processes.environments(2)
    assert [member["RANK"] for member in both] == ["0", "1"]
    assert both[0]["MASTER_PORT"] == both[1]["MASTER_PORT"]


def test_the_page_shows_the_results() -> None:
    recorded = json.loads(consistency.OUTPUT.read_text())
    page = (machine.REPOSITORY / "docs" / "reliability.md").read_text()
    assert block(*consistency.MARK).search(page)[2] == f"{consistency.text(recorded)}\n", "run make consistency"
