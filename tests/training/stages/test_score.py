"""`exo-fast score`: numbers that can be checked by hand, scorers that do not work, and preferences."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from exo_fast.training.errors import InputError
from exo_fast.training.stages.score import ScoreConfig, score

Settings = Callable[..., dict[str, Any]]

REWARDS = """
import functools

import torch

def words(prompts, completions):
    assert len(prompts) == len(completions) <= 3
    return [len(text.split()) for text in completions]

def short(prompts, completions):
    return [1.0]

def text(prompts, completions):
    return ["many"] * len(prompts)

def none(prompts, completions):
    pass

def infinite(prompts, completions):
    return [float("nan")] * len(prompts)

def broken(prompts, completions):
    raise KeyError("oracle")

@torch.no_grad()
def decorated(prompts, completions):
    return words(prompts, completions)

partial = functools.partial(words)

constant = 3
"""
SAMPLES = [
    {"prompt": "a", "completions": ["x", "", "x y", "x y"], "completion_ids": [[4, 2], [2], [4, 5], [4, 5]]},
    {"prompt": "b", "completions": ["x y", "z w"]},
    {"prompt": "c", "completions": ["x", "x y z"]},
]
PAIRS = [
    {"prompt": "a", "chosen": "x y", "rejected": "x"},
    {"prompt": "b", "chosen": "x", "rejected": "x y"},
    {"prompt": "c", "chosen": "x y z", "rejected": ""},
    {"prompt": "d", "chosen": "x", "rejected": "y"},
]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """`settings(**overrides)`: ScoreConfig fields; the current directory holds rewards.py and SAMPLES."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "rewards", raising=False)
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "test.json").write_text(json.dumps(SAMPLES))

    def with_overrides(**overrides: Any) -> dict[str, Any]:
        return {
            "function": "rewards:words",
            "data": str(tmp_path / "test.json"),
            "output_dir": str(tmp_path / "out"),
            "batch_size": 3,
            "use_cpu": True,
            "disable_tqdm": True,
            **overrides,
        }

    return with_overrides


def read(config: ScoreConfig, split: str = "test") -> list[dict[str, Any]]:
    return json.loads(Path(config.output_dir, f"{split}.json").read_text())


def test_label_adds_rewards_and_keeps_ids(settings: Settings) -> None:
    config = ScoreConfig(**settings())
    score(config)
    rewards = [[1.0, 0.0, 2.0, 2.0], [2.0, 2.0], [1.0, 3.0]]
    assert read(config) == [{**row, "rewards": values} for row, values in zip(SAMPLES, rewards, strict=True)]


def test_label_pref_takes_the_first_best_and_the_first_worst_text_and_drops_ties(settings: Settings) -> None:
    config = ScoreConfig(**settings(mode="label-pref"))
    counts = score(config)["counts"]["test"]
    assert read(config) == [
        # And not "", the worst; with the ids that were drawn for each, of which the first has no EOS.
        {"prompt": "a", "chosen": "x y", "rejected": "x", "completion_ids": [[4, 5], [4, 2]]},
        {"prompt": "c", "chosen": "x y z", "rejected": "x"},
    ]
    assert (counts["preferences"], counts["dropped"]) == (2, 1)


def test_eval_reports_mean_and_spread(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    config = ScoreConfig(**settings(mode="eval"))
    summary = score(config)
    counts = summary["counts"]["test"]
    # Means by prompt 1.25, 2, 2; standard deviations within 0.829…, 0, 1.
    assert counts["mean"] == pytest.approx(1.75)
    assert counts["standard_error"] == pytest.approx(0.25)
    assert counts["within_prompt_std"] == pytest.approx((0.6875**0.5 + 1) / 3)
    assert (counts["prompts"], counts["completions"]) == (3, 8)
    assert read(config)[2]["rewards"] == [1.0, 3.0]
    assert json.loads(Path(config.output_dir, "summary.json").read_text()) == summary
    assert "mean reward 1.7500 ± 0.2500 over 3 prompts" in capsys.readouterr().out


def test_pairs_are_two_candidates_and_tell_the_accuracy(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text(json.dumps(PAIRS))
    config = ScoreConfig(**settings(mode="eval"))
    counts = score(config)["counts"]["test"]
    assert (counts["accuracy"], counts["ties"]) == (0.5, 0.25)
    assert read(config)[0] == {"prompt": "a", "completions": ["x y", "x"], "rewards": [2.0, 1.0]}
    relabelled = ScoreConfig(**settings(mode="label-pref", output_dir=str(tmp_path / "pref")))
    score(relabelled)
    assert read(relabelled)[1] == {"prompt": "b", "chosen": "x y", "rejected": "x"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"function": None}, "function=None: exactly one of them is needed"),
        ({"classifier": "models/oracle"}, "exactly one of them is needed"),
        ({"function": "rewards"}, "module:function is needed"),
        ({"function": "no_such_module:words"}, r"'no_such_module' cannot be imported \(ModuleNotFoundError"),
        ({"function": "rewards:wrds"}, "holds no function named 'wrds'"),
        ({"function": "rewards:constant"}, "holds 3, not a function, named 'constant'"),
        ({"function": "rewards:short"}, "returned 1 numbers for 3 completions"),
        ({"function": "rewards:text"}, "not a number: could not convert string to float: 'many'"),
        ({"function": "rewards:none"}, "it returned None; a list of numbers"),
        ({"function": "rewards:infinite"}, "gave nan as a reward"),
        ({"function": "rewards:broken"}, "it raised KeyError: 'oracle'"),
        ({"function": None, "reward_model": "./nowhere"}, "reward_model='./nowhere': no such directory"),
        ({"mode": "label-pref", "prompt_num": 1, "data": "one.json"}, "needs at least 2 completions"),
        ({"mode": "label-pref", "data": "tie.json"}, "no preference to write"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_errors(settings: Settings, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    (tmp_path / "one.json").write_text(json.dumps([{"prompt": "a", "completions": ["x"]}]))
    (tmp_path / "tie.json").write_text(json.dumps(SAMPLES[1:2]))
    with pytest.raises(InputError, match=message):
        score(ScoreConfig(**settings(**changed)))


@pytest.mark.parametrize("name", ["words", "decorated", "partial"])
def test_a_changed_function_is_another_scorer(settings: Settings, tmp_path: Path, name: str) -> None:
    config = settings(function=f"rewards:{name}")
    score(ScoreConfig(**config))
    (tmp_path / "rewards.py").write_text(REWARDS + "\n# better\n")
    with pytest.raises(InputError, match="another source"):
        score(ScoreConfig(**config))


def test_batches_of_another_size_are_not_reused(settings: Settings) -> None:
    score(ScoreConfig(**settings()))
    with pytest.raises(InputError, match="batch_size was 3 and is now 2"):
        score(ScoreConfig(**settings(batch_size=2)))


@pytest.mark.parametrize("kind", ["reward_model", "classifier"])
def test_models_give_what_plain_transformers_gives(settings: Settings, reward_model: str, kind: str) -> None:
    rows = make_rows(7)
    Path("test.json").write_text(json.dumps(rows))
    config = ScoreConfig(**settings(function=None, **{kind: reward_model}, batch_size=5))
    score(config)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    for row, found in zip(rows, read(config), strict=True):
        for text, value in zip(row["completions"], found["rewards"], strict=True):
            expected = model(**tokenizer(row["prompt"] + text, return_tensors="pt")).logits.item()
            assert value == pytest.approx(expected, abs=1e-5)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(
    settings: Settings, reward_model: str, tmp_path: Path
) -> None:
    model = str(shutil.copytree(reward_model, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(model)
    Path("test.json").write_text(json.dumps([{"prompt": "the", "completions": ["extra"]}]))
    with pytest.raises(InputError, match="gives id 17 and its vocabulary has 17"):
        score(ScoreConfig(**settings(function=None, reward_model=model)))


def test_a_language_model_is_not_a_reward_model(settings: Settings, tiny_llama: str) -> None:
    with pytest.raises(InputError, match="LlamaForCausalLM"):
        score(ScoreConfig(**settings(function=None, reward_model=tiny_llama)))


def others_reward_model(causal_lm: str, directory: Path) -> str:
    """One whose padding is a token of its own, as TRL's RewardTrainer leaves it."""
    tokenizer = AutoTokenizer.from_pretrained(causal_lm, pad_token="<unk>")
    model = AutoModelForSequenceClassification.from_pretrained(causal_lm, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_a_reward_model_is_read_where_it_was_trained_to_be_read(
    tiny_llama: str, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = others_reward_model(tiny_llama, tmp_path / "theirs")
    texts = {"prompt": "the film", "completions": [" was good", " was very bad"]}
    (tmp_path / "test.json").write_text(json.dumps([texts]))
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(theirs), AutoTokenizer.from_pretrained(theirs)

    def plain(end: str) -> list[float]:
        batch = tokenizer(
            [texts["prompt"] + text + end for text in texts["completions"]], padding=True, return_tensors="pt"
        )
        return model(**batch).logits[:, 0].tolist()

    def rewards(**options: Any) -> list[float]:
        place = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        score(ScoreConfig(**settings(function=None, reward_model=theirs, output_dir=str(place), **options)))
        return json.loads((place / "test.json").read_text())[0]["rewards"]

    transformers_logging.enable_propagation()
    assert rewards() == pytest.approx(plain("</s>"), abs=1e-5)
    assert "its padding is not EOS, so it is read at the end of each text" in caplog.text
    caplog.clear()
    assert rewards(reward_at="end") == pytest.approx(plain("</s>"), abs=1e-5)
    assert rewards(reward_at="before_end") == pytest.approx(plain(""), abs=1e-5)
    assert not caplog.text
    assert plain("") != pytest.approx(plain("</s>"), abs=1e-2)
