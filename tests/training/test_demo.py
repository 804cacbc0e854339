"""The demo's statistics on known data, its report, and the whole of it on a tiny random model."""

import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from exo_fast.training import demo
from exo_fast.training.downloads import Snippet
from exo_fast.training.errors import InputError
from exo_fast.training.reports.statistics import (
    Evaluation,
    Results,
    distinct_trigrams,
    mean_and_error,
    paired_bootstrap,
    render,
    summarize,
    write_report,
)

WORDS = ("the", "film", "was", "good", "bad", "long", "plot", "and", "but", "very", "fine", "dull", "great")


def test_paired_bootstrap_agrees_with_the_normal_interval_of_many_differences() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=400)
    after = before + rng.normal(0.2, 0.5, size=400)
    found = paired_bootstrap(before, after)
    error = (after - before).std(ddof=1) / 20
    assert found.value == pytest.approx((after - before).mean())
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.1 * error)


def test_paired_bootstrap_uses_the_pairing() -> None:
    before = np.random.default_rng(1).normal(size=64) * 100
    found = paired_bootstrap(before, before + np.linspace(0.9, 1.1, 64))
    assert 0.95 < found.low < 1.0 < found.high < 1.05


def test_paired_bootstrap_of_equal_gains_is_a_point_and_repeats_itself() -> None:
    values = np.arange(5.0)
    assert paired_bootstrap(values, values + 0.5) == paired_bootstrap(values, values + 0.5)
    assert dataclasses.astuple(paired_bootstrap(values, values + 0.5)) == (0.5, 0.5, 0.5)
    noisy = np.random.default_rng(2).normal(size=5)
    assert paired_bootstrap(values, noisy, seed=3) == paired_bootstrap(values, noisy, seed=3)


def test_paired_bootstrap_refuses_what_is_not_paired() -> None:
    with pytest.raises(ValueError, match=r"before has shape \(3,\) and after \(4,\)"):
        paired_bootstrap(np.zeros(3), np.zeros(4))


def test_standard_error_counts_prompts_not_samples() -> None:
    assert mean_and_error([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]]) == (2.0, pytest.approx(1.0))


def test_distinct_trigrams() -> None:
    assert distinct_trigrams(["a b c d", "a b c"]) == pytest.approx(2 / 3)
    assert distinct_trigrams(["too short"]) == 0


def make_results(gain: float = 0.5) -> Results:
    rng = np.random.default_rng(0)
    start = rng.normal(size=(12, 2))
    texts = [["a good | film", "*bad*\nfilm here"]] * 12
    middle = Evaluation("step 4", 4, texts, (start + gain / 2).tolist(), (start * 0 + 1).tolist())
    end = Evaluation("end", 8, texts, (start + gain + rng.normal(0, 0.1, (12, 2))).tolist(), (start * 0 + 2).tolist())
    history = [
        {"step": step, "loss": 1 / step, "group_accuracy": 0.5, "rewards/margins": 0.1 * step} for step in range(1, 9)
    ]
    return Results(
        title="A test",
        prompts=[f"prompt {i}" for i in range(12)],
        evaluations=[Evaluation("start", 0, texts, start.tolist(), (start * 0).tolist()), middle, end],
        history=[*history, {"step": 8, "eval_loss": 0.2}],
        settings={"seed": "0"},
        seconds={"sampling": 12.3, "alignment": 0.0},
        seed=0,
    )


def test_report_states_gain_interval_and_kl(tmp_path: Path) -> None:
    summary = write_report(make_results(), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert summary["reward_gain"] == pytest.approx(0.5, abs=0.1)
    low, high = summary["reward_gain_interval"]
    assert f"[{low:+.3f}, {high:+.3f}]" in text
    assert "which is above zero" in text
    assert "**2.00 ± 0.00 nats**" in text
    assert "| alignment | reused |" in text
    for name in re.findall(r"\]\((\w+\.png)\)", text):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_report_does_not_claim_a_gain_that_is_not_there() -> None:
    results = make_results(gain=0.0)
    assert "not clear of zero" in render(results, summarize(results))


def test_completions_cannot_break_the_reports_tables() -> None:
    results = make_results()
    rows = [line for line in render(results, summarize(results)).splitlines() if line.startswith("| prompt 3")]
    assert rows == [rows[0]]
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 4
    assert r"a good \| film" in rows[0]


SNIPPETS = [
    Snippet("An honest film that never tires of people and what they do.", 1.0),
    Snippet("an HONEST film that never bores anyone in the whole audience.", 1.0),  # opens like the one before
    Snippet("Too short.", 1.0),
    Snippet('The "best" film of the year so far and by far.', 1.0),  # a quotation
    Snippet("It ends. Then it goes on for an hour or so more.", 1.0),  # a sentence ends in the opening
    Snippet("One of those films which nobody will ever see twice.", 1.0),
]


def test_openings_are_natural_and_different() -> None:
    found = demo.opening_words(SNIPPETS, 4, 2, seed=0)
    assert sorted(found) == ["An honest film that", "One of those films"]
    with pytest.raises(InputError, match="3 prompts of 4 words are asked for, and the reviews give 2"):
        demo.opening_words(SNIPPETS, 4, 3, seed=0)


def test_recipe_of_the_repository_is_valid() -> None:
    config = demo.load_config(demo.RECIPE)
    assert config.held_out_prompts >= 64
    assert config.candidates == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train_promts: 3", "unknown key 'train_promts'; did you mean 'train_prompts'"),
        ("samples: 1", "samples=1: a whole number of at least 2"),
        ("align: 3", "align=3: a mapping"),
        ("[1, 2]", "a mapping of names to values"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_bad_recipes_are_explained(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        demo.load_config(tmp_path / "bad.yaml")


def test_prompts_with_an_empty_completion_are_not_trained_on(capsys: pytest.CaptureFixture[str]) -> None:
    data = {"prompts": ["a", "b"], "texts": [["x", ""], ["y", "z"]], "rewards": [[1.0, 0.0], [0.5, 0.25]]}
    assert demo.training_rows(data) == [{"prompt": "b", "completions": ["y", "z"], "rewards": [0.5, 0.25]}]
    assert "1 of 2 prompts got an empty completion" in capsys.readouterr().out


def praise(text: str) -> float:
    """A reward: the share of good words."""
    words = text.split()
    return sum(word in ("good", "great", "fine") for word in words) / max(len(words), 1)


@pytest.fixture
def tiny_demo(tiny_llama: str, tmp_path: Path) -> dict[str, Any]:
    """Arguments of `run_demo` for a tiny model and texts in its language."""
    rng = random.Random(0)
    return {
        "config": demo.DemoConfig(
            train_prompts=64,
            held_out_prompts=32,
            prompt_words=4,
            candidates=4,
            samples=4,
            max_new_tokens=8,
            align={
                "loss_type": "exo-rw",
                "beta_pi": 0.5,
                "learning_rate": 0.01,
                "num_train_epochs": 3,
                "max_seq_len": 64,
                "per_device_train_batch_size": 8,
                "save_strategy": "steps",
                "save_steps": 12,
                "save_only_model": True,
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
            },
        ),
        "output": tmp_path / "run",
        "cache": tmp_path / "cache",
        "model_path": Path(tiny_llama),
        "snippets": [Snippet(" ".join(rng.choices(WORDS, k=12)), 0.0) for _ in range(200)],
        "oracle": praise,
    }


def test_demo_end_to_end(
    tiny_demo: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = demo.run_demo(**tiny_demo)
    output = tiny_demo["output"]
    low, _ = summary["reward_gain_interval"]
    assert low > 0
    assert summary["kl"] > 3 * summary["kl_standard_error"] > 0
    report = (output / "report.md").read_text()
    assert "| step 12 |" in report
    assert "| end |" in report
    stored = json.loads((output / "results.json").read_text())
    assert stored["summary"] == summary
    train, test = (json.loads((output / "data" / name).read_text()) for name in ("train.json", "test.json"))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    policy = AutoModelForCausalLM.from_pretrained(output / "policy")
    AutoTokenizer.from_pretrained(output / "policy")
    assert policy.dtype == torch.float32
    assert str(output / "report.md") in capsys.readouterr().out

    # The same again: nothing is computed, and the report says so.
    def unexpected(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(demo, "load_model", unexpected)
        patch.setattr("exo_fast.training.stages.align.align", unexpected)
        assert demo.run_demo(**tiny_demo) == summary
    assert "| alignment | reused |" in (output / "report.md").read_text()

    # A changed setting redoes what depends on it, and only that.
    calls: list[str] = []
    sample = demo.sample_and_score
    monkeypatch.setattr(demo, "sample_and_score", lambda *args: calls.append("sample") or sample(*args))
    changed = dataclasses.replace(tiny_demo["config"], align={**tiny_demo["config"].align, "num_train_epochs": 1})
    demo.run_demo(**{**tiny_demo, "config": changed})
    assert calls == ["sample"]  # of the one model there now is, saved after 8 steps
    assert "| step 12 |" not in (output / "report.md").read_text()


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        demo.main(["--help"])
    assert "exo-fast demo --seed 1" in capsys.readouterr().out
