"""A slice of what `make faults` does, and that it would notice if something did not hold."""

import json
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from exo_fast.benchmarks.harness.tables import block
from exo_fast.benchmarks.reliability import faults
from exo_fast.training import machine

SOME = ("optimizer shard, a bit flipped", "manifest, missing", "random state, a pickle that runs a command", "filling")


@pytest.mark.slow
def test_trainings_survive(tmp_path: Path) -> None:
    with tqdm(disable=True) as bar:
        found = faults.measure(tmp_path, 4, 0, bar, kinds=[faults.PLAIN], cases=[*SOME, "occupied", "stopped"])
    rows = [row for name in ("kills", "resized", "damages") for row in found[name]]
    assert not [row for row in rows if "broken" in row], rows
    assert found["kills"][0]["kills"] == 4
    assert found["kills"][0]["evaluation"] == found["kills"][0]["boundary"] == 1
    assert len(rows) == 2 + 6
    for table in (faults.kills_table, faults.resized_table, faults.damages_table):
        assert "ZeRO 2" in table(found) or "bit flipped" in table(found)


def test_other_bits_and_other_logs_are_told() -> None:
    log = [{"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 0.5}, {"step": 4, "loss": 0.9}]
    right = faults.Result({"weight": torch.tensor([0.0, 1.0])}, log)
    faults.check_same(faults.Result({"weight": torch.tensor([0.0, 1.0])}, list(log)), right)
    for weights, entries, words in (
        ({"weight": torch.tensor([-0.0, 1.0])}, log, "weight has other bits, the largest difference is"),
        ({}, log, "other tensors were saved"),
        (right.weights, log[::2], r"evaluated at steps \[\] where \[2\] are right"),
        (right.weights, [*log, log[1]], r"evaluated at steps \[2, 2\] where \[2\] are right"),
        (right.weights, [*log[:2], {"step": 4, "loss": 0.8}], "the log of step 4 has other values: loss"),
        (right.weights, log[:2], "the log has 2 entries where 3 are right"),
    ):
        with pytest.raises(faults.Broken, match=words):
            faults.check_same(faults.Result(weights, entries), right)


def test_continuing_from_an_older_checkpoint_is_told() -> None:
    faults._check_resumed("continuing from run/checkpoint-4\n", Path("run/checkpoint-4"))
    with pytest.raises(faults.Broken, match="checkpoint-4 was there"):
        faults._check_resumed("continuing from run/checkpoint-2\n", Path("run/checkpoint-4"))


def test_the_page_shows_the_results() -> None:
    recorded = json.loads(faults.OUTPUT.read_text())
    page = (machine.REPOSITORY / "docs" / "reliability.md").read_text()
    for name, made in (
        ("kills", faults.kills_table),
        ("resized", faults.resized_table),
        ("damages", faults.damages_table),
    ):
        assert block("faults", name).search(page)[2] == f"{made(recorded)}\n", "run make faults"
