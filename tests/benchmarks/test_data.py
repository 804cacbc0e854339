"""The suite `data`: its stopwatch counts every second once, and an epoch of a tiny model has all its stages."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from exo_fast.benchmarks.methods import epoch_profile
from exo_fast.benchmarks.methods.epoch_profile import ATTENTION, MODEL, ONCE, STEP, Stopwatch
from exo_fast.benchmarks.suites import data
from exo_fast.training import machine

WORDS = [f"w{i % 97}x{i % 13}" for i in range(3000)]


@pytest.fixture
def tick(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets the stopwatch's clock go on by so many seconds."""
    clock = [0.0]
    monkeypatch.setattr(epoch_profile.time, "perf_counter", lambda: clock[0])

    def go_on(seconds: float) -> None:
        clock[0] += seconds

    return go_on


def test_stopwatch_counts_every_second_once(tick: Callable[[float], None]) -> None:
    watch = Stopwatch("rest")
    inner = watch.watch(lambda: tick(2), "inner")

    def work() -> None:
        tick(1)
        inner()
        tick(4)

    outer, closed = watch.watch(work, "outer"), watch.watch(work, "closed", whole=True)
    tick(8)
    outer()
    closed()
    tick(16)
    watch.enter("end")
    assert watch.seconds == {"rest": 24, "outer": 5, "inner": 2, "closed": 7}
    assert watch.calls == {"outer": 1, "inner": 1, "closed": 1}


def test_a_stage_that_fails_is_left(tick: Callable[[float], None]) -> None:
    watch = Stopwatch("rest")

    def fail() -> None:
        tick(1)
        raise KeyError("a field")

    with pytest.raises(KeyError, match="a field"):
        watch.watch(fail, "stage", whole=True)()
    tick(2)
    watch.watch(lambda: tick(4), "other")()
    assert watch.seconds == {"stage": 1, "rest": 2, "other": 4}


class Wait(torch.autograd.Function):
    """Identity that takes `forward` seconds, and in backward `backward`."""

    @staticmethod
    def forward(ctx, x, tick, forward, backward):
        tick(forward)
        ctx.wait = lambda: tick(backward)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.wait()
        return gradient, None, None, None


def test_backward_of_attention_is_told_from_the_models(tick: Callable[[float], None]) -> None:
    watch = Stopwatch("model")

    def attention(module, query, key, value, mask):
        tick(1)
        return Wait.apply(query, tick, 2, 4) + key * value, None

    watched = watch.watch_attention(attention)
    x = torch.ones(3, requires_grad=True)
    hidden = Wait.apply(x, tick, 8, 16)
    output, weights = watched(None, hidden, hidden * 2, hidden * 3, None)
    assert weights is None
    Wait.apply(output, tick, 32, 64).sum().backward()
    watch.enter("end")
    assert x.grad.tolist() == [13, 13, 13]  # 1 + d(6 x²)/dx
    assert watch.seconds == {"model": 8 + 16 + 32 + 64, ATTENTION: 1 + 2 + 4}
    with torch.no_grad():
        assert watched(None, x, x, x, None)[0].tolist() == [2, 2, 2]


def test_an_epoch_has_every_stage_and_its_shares_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setitem(data.EPOCHS, "tiny", data.Epoch("tiny", 2, 6, 5))
    row = json.loads(json.dumps(data.measure_epoch("tiny", tmp_path, WORDS, tmp_path)))
    stages = {stage["stage"]: stage for stage in row["stages"]}
    assert list(stages) == list(epoch_profile.WHEN)
    for name, stage in stages.items():
        assert stage["seconds"] > 0, name
        assert (stage["share_of_steps"] is None) == (stage["when"] == ONCE)
    assert sum(stage["share_of_run"] for stage in stages.values()) == pytest.approx(1, abs=0.01)
    assert sum(stage["share_of_steps"] or 0 for stage in stages.values()) == pytest.approx(1, abs=0.01)
    assert row["seconds"] == pytest.approx(sum(s["seconds"] for s in stages.values() if s["when"] == STEP), abs=0.01)
    assert row["baseline_seconds"] == pytest.approx(sum(stages[name]["seconds"] for name in MODEL), abs=0.01)
    assert stages[ATTENTION]["calls"] == 2 * 2  # steps, layers
    assert stages["head and loss"]["calls"] == stages["optimizer"]["calls"] == row["steps"] == 2
    assert (tmp_path / "run-tiny" / "summary.json").exists()
    from exo_fast.training.models import modules

    assert modules.final_hidden.__module__ == "exo_fast.head"  # the stopwatch is off again


@pytest.mark.parametrize("part", ["read", "tokenise", "pack"])
def test_rows_are_measured_against_the_least_they_need(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "ROWS", 16)
    tokenizer = AutoTokenizer.from_pretrained(data.save_tiny_model(WORDS, tmp_path / "tiny"))
    row = data.measure_rows(part, tokenizer, WORDS, tmp_path)
    assert row["examples_per_second"] == pytest.approx(16 / row["seconds"], abs=1)
    assert 0 < row["baseline_seconds"] < row["seconds"] * 2
    assert row["tokens_per_second"] == pytest.approx(16 * (12 + 4 * 21) / row["seconds"], abs=1)
    monkeypatch.setattr(data, "_demo", lambda: (tmp_path / "tiny", tokenizer, WORDS))
    call, found = data.trial(data.Case(part), tmp_path)
    assert len(call()) == {"read": 16, "tokenise": 16, "pack": 2}[part]
    assert found["examples"] == 16
    monkeypatch.setattr(data.Rows, "pack", lambda self: [{"targets": torch.zeros(3)}])
    with pytest.raises(AssertionError):
        data.trial(data.Case(part), tmp_path)


def test_rows_hold_the_words_they_promise(tmp_path: Path) -> None:
    data.write_rows(tmp_path / "rows.jsonl", WORDS, 3, 6, 5)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert rows[0]["prompt"].split() == WORDS[:6]
    assert [text.split() for text in rows[0]["completions"]] == [WORDS[6 + 5 * k : 11 + 5 * k] for k in range(4)]
    assert {len(set(row["rewards"])) for row in rows} == {4}


def test_what_takes_more_than_5_percent_of_the_steps_is_named() -> None:
    shares = {"optimizer": 0.2, "collate": 0.01, ATTENTION: 0.5, "checkpoint and model": None}
    stages = [{"stage": name, "share_of_steps": share} for name, share in shares.items()]
    rows = [{"part": f"epoch/{name}", "stages": stages} for name in ("demo", "tiny")]
    assert data.summary([*rows, {"part": "read"}]) == {"over_5_percent": {"epoch/demo": {"optimizer": 0.2}}}


def test_epochs_need_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version", lambda package: None)
    reasons = {case.part: data.impossible(case) for case in data.cases()}
    assert {part for part, reason in reasons.items() if reason} == {f"epoch/{name}" for name in data.EPOCHS}
    assert "pip install deepspeed" in reasons["epoch/demo"]
    assert set(data.cases(quick=True)) < set(data.cases())
