"""Policies against the model they started from: what is evaluated, what comes out, and that nothing is done twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from exo_fast.training.cli.command import main
from exo_fast.training.errors import InputError
from exo_fast.training.stages.evaluate import EvaluateConfig, evaluate, find_models

REWARDS = """
def praise(prompts, completions):
    return [sum(word in ("good", "great", "fine") for word in text.split()) for text in completions]
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Runs as training leaves them, of models that stray further from the start with every checkpoint: exo-0 and exo-1
    with two checkpoints, whose second is the final model, and dpo with a checkpoint and another final model."""
    folder = tmp_path_factory.mktemp("runs")

    def save(place: Path, strength: float, seed: int) -> None:
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += strength * torch.randn(parameter.shape, generator=noise)
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)

    for seed, (run, final) in enumerate((("exo-0", 4), ("exo-1", 4), ("dpo", 5))):
        for step in sorted({2, 4, final} if run != "dpo" else {2}):
            save(folder / run / f"checkpoint-{step}", 0.01 * step, seed)
        save(folder / run, 0.01 * final, seed)
        (folder / run / "summary.json").write_text(json.dumps({"steps": final}))
    return folder


@pytest.fixture
def settings(
    runs: Path, tiny_llama: str, data_directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """`settings(**overrides)`: fields of an evaluation with a reward in Python."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "praise_words.py").write_text(REWARDS)

    def with_overrides(**overrides: Any) -> dict[str, Any]:
        return {
            "policies": [f"exo-rw={runs}/exo-0", f"exo-rw={runs}/exo-1", f"dpo-rw={runs}/dpo"],
            "reference": tiny_llama,
            "data": data_directory,
            "output_dir": str(tmp_path / "evaluation"),
            "function": "praise_words:praise",
            "return_num": 3,
            "max_new_tokens": 8,
            "max_seq_len": 32,
            "temperature": 0.7,
            "use_cpu": True,
            "disable_tqdm": True,
            **overrides,
        }

    return with_overrides


def test_a_run_is_its_checkpoints_and_a_final_model_that_is_none_of_them(settings: Callable[..., dict]) -> None:
    def found(**overrides: Any) -> list[tuple[str, int, int | None]]:
        return [(m.label, m.seed, m.step) for m in find_models(EvaluateConfig(**settings(**overrides)))]

    start, exo = ("SFT", 0, 0), [("exo-rw", seed, step) for seed in (0, 1) for step in (2, 4)]
    assert found() == [start, *exo, ("dpo-rw", 0, 2), ("dpo-rw", 0, 5)]
    assert found(checkpoints=1) == [start, exo[1], exo[3], ("dpo-rw", 0, 5)]
    assert found(checkpoints=7) == found()
    one_checkpoint = settings()["policies"][0] + "/checkpoint-2"
    assert found(policies=[one_checkpoint]) == [start, ("exo-rw", 0, None)]


def test_bad_settings(settings: Callable[..., dict], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    bad = [
        ({"policies": None}, "policies=None: name the runs"),
        ({"policies": ["runs/exo"]}, "'runs/exo': LABEL=DIRECTORY is needed"),
        ({"policies": ["SFT=."]}, "'SFT=.': LABEL=DIRECTORY is needed, .* not SFT"),
        ({"policies": ["a=/no/such"]}, "'a=/no/such': no such directory"),
        ({"policies": ["a=empty"]}, "neither the directory nor checkpoint-N in it holds a model"),
        ({"policies": ["a=empty", "b=./empty"]}, "neither|named twice"),
        ({"policies": settings()["policies"][:1] * 2}, "this directory is named twice"),
        ({"reference": None}, "reference=None: name a model"),
        ({"temperature": 0}, "temperature=0: a number from 1e-06 to"),
        ({"max_new_tokens": 32}, "max_seq_len=32: must be larger than max_new_tokens=32"),
        ({"classifier": "c"}, "exactly one of them is needed"),
        ({"checkpoints": 0}, "checkpoints=0: -1"),
    ]
    for overrides, message in bad:
        with pytest.raises(InputError, match=message):
            find_models(EvaluateConfig(**settings(**overrides)))


def plain_log_ratio(
    policy: str, reference: str, prompt: str, ids: list[int], temperature: float, tokenizer: Any
) -> float:
    """log π(y|x) − log π_ref(y|x) of drawn ids, by transformers alone."""
    sums = []
    start = tokenizer(prompt)["input_ids"]
    for path in (policy, reference):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(path)(torch.tensor([start + ids])).logits[0]
        logps = torch.log_softmax(logits[len(start) - 1 : -1] / temperature, dim=-1)
        sums.append(logps.gather(1, torch.tensor(ids)[:, None]).sum().item())
    return sums[0] - sums[1]


def test_an_evaluation_from_samples_to_report(
    settings: Callable[..., dict], tmp_path: Path, runs: Path, tiny_llama: str, tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "evaluation"
    results = evaluate(EvaluateConfig(**settings()))
    assert results == json.loads((folder / "results.json").read_text())
    assert [(m["label"], m["seed"], m["step"]) for m in results["models"]] == [
        ("SFT", 0, 0), ("exo-rw", 0, 2), ("exo-rw", 0, 4), ("exo-rw", 1, 2), ("exo-rw", 1, 4), ("dpo-rw", 0, 2),
        ("dpo-rw", 0, 5),
    ]  # fmt: skip
    assert (results["prompts"], results["completions_per_prompt"]) == (5, 3)

    # The numbers of one checkpoint, by other means.
    place = next((folder / "models" / "exo-rw").glob("exo-0-*")) / "checkpoint-2"
    rows = json.loads((place / "logprobs" / "test.json").read_text())
    policy = str(runs / "exo-0" / "checkpoint-2")
    ratios = [
        plain_log_ratio(policy, tiny_llama, row["prompt"], ids, 0.7, tokenizer)
        for row in rows
        for ids in row["completion_ids"]
    ]
    words = [text.split() for row in rows for text in row["completions"]]
    reward = np.mean([sum(word in ("good", "great", "fine") for word in text) for text in words])
    found = results["models"][1]
    assert found["kl"] == pytest.approx(np.mean(ratios), abs=1e-5)
    assert found["reward"] == pytest.approx(reward)
    assert results["models"][0]["kl"] == 0
    assert results["models"][2]["kl"] > found["kl"] > 0

    assert [c["first"] + " " + c["second"] for c in results["comparisons"]] == ["exo-rw dpo-rw"]
    assert results["finding"] == results["comparisons"][0]["verdict"]
    report = (folder / "report.md").read_text()
    for part in (results["finding"], "frontier.png", "| dpo-rw | 0 | 5 |", "## Completions", "| temperature | 0.7 |"):
        assert part in report
    assert (folder / "frontier.png").stat().st_size > 10_000

    # Again, with a policy less: nothing is sampled, and what is there stays.
    capsys.readouterr()
    fewer = evaluate(EvaluateConfig(**settings(policies=settings()["policies"][:1])))
    said = capsys.readouterr().out
    assert said.count("reusing") == 5  # samples of three models, log-probs of two
    for one, other in zip(fewer["models"], results["models"][:3], strict=True):
        assert one["kl"] == pytest.approx(other["kl"], abs=1e-5)  # batches hold other rows
        assert one["reward"] == other["reward"]
    assert fewer["finding"].startswith("exo-rw ")

    # And interrupted after some of the sampling: the rest is done, with the same result.
    (place / "logprobs" / "summary.json").unlink()
    (place / "logprobs" / "test.json").unlink()
    again = evaluate(EvaluateConfig(**settings()))
    assert {**again, "seconds": None} == {**results, "seconds": None}


def test_one_prompt_has_no_interval(settings: Callable[..., dict]) -> None:
    with pytest.raises(InputError, match="1 prompt; intervals are over prompts"):
        evaluate(EvaluateConfig(**settings(prompt_num=1)))


def test_the_command_line_says_what_is_wrong(settings: Callable[..., dict], capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--{name}={value}" for name, value in settings().items() if name != "policies"]
    assert main(["evaluate", *words, "--policies", "a=/no/such"]) == 2
    assert "policies: 'a=/no/such': no such directory" in capsys.readouterr().err
