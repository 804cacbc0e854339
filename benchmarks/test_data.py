"""`pytest benchmarks --benchmark-only -k data`: rows read, tokenised and packed, and an epoch of a tiny model.

Out of made-up words, so nothing is downloaded. Before they are timed, packed rows are shown to hold the very tokens
that the texts have, and the epoch's stages to add up to the whole.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from exo_fast.benchmarks.methods import epoch_profile
from exo_fast.benchmarks.suites import data
from exo_fast.training import machine

WORDS = [f"word{i * 7919 % 1009}" for i in range(20_000)]
ROUNDS = 3


@pytest.mark.parametrize("part", ["read", "tokenise", "pack"])
def test_data(part: str, benchmark, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data.save_tiny_model(WORDS, tmp_path / "model"))
    made = data.Rows(tokenizer, WORDS, tmp_path)
    assert len(made.read()) == data.ROWS
    batch = made.pack()[0]
    expected = [ids for i in range(data.BATCH) for candidate in made.dataset.group(i).completions for ids in candidate]
    assert batch["targets"].tolist() == expected
    assert tokenizer.decode(expected[:3]).split() == made.examples[0].completions[0].split()[:3]
    benchmark.group = f"data/{part}"
    work, least = made.work(part)
    benchmark.extra_info.update(baseline_seconds=min(data.timed(least)), examples=data.ROWS)
    benchmark.pedantic(work, rounds=ROUNDS)


def test_data_epoch(benchmark, tmp_path: Path) -> None:
    if machine.version("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install deepspeed")
    rows = []
    benchmark.group = "data/epoch/tiny"
    benchmark.pedantic(lambda: rows.append(data.measure_epoch("tiny", tmp_path, WORDS, tmp_path)), rounds=1)
    stages = {stage["stage"]: stage for stage in rows[0]["stages"]}
    assert list(stages) == list(epoch_profile.WHEN)
    assert sum(stage["share_of_run"] for stage in stages.values()) == pytest.approx(1, abs=0.01)
    benchmark.extra_info["ms_per_step"] = {name: s["ms_per_step"] for name, s in stages.items() if s["ms_per_step"]}
