"""`exo-fast logprobs`: equal to full logits in float64, for ids that were drawn, for text, and for cut prompts."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import make_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from exo_fast.layout import Group
from exo_fast.training.errors import InputError
from exo_fast.training.inference.log_probs import sequence_log_probs
from exo_fast.training.stages.generate import GenerateConfig, generate
from exo_fast.training.stages.logprobs import LogprobsConfig, logprobs

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def settings(tiny_llama: str, tmp_path: Path) -> Settings:
    """`settings(**overrides)`: LogprobsConfig fields for test.json in the test's directory."""

    def with_overrides(**overrides: Any) -> dict[str, Any]:
        return {
            "model_name_or_path": tiny_llama,
            "data": str(tmp_path / "test.json"),
            "output_dir": str(tmp_path / "out"),
            "max_seq_len": 48,
            "max_gen_len": 16,
            "batch_size": 8,
            "use_cpu": True,
            "disable_tqdm": True,
            **overrides,
        }

    return with_overrides


def full_logits(model_path: str, prompt: list[int], completion: list[int], temperature: float = 1.0) -> float:
    """The sum of log-probs of a completion's tokens, from all logits in float64."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64).eval()
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logps = (model(ids).logits[0] / temperature).log_softmax(-1)
    places = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return logps[places, ids[0, len(prompt) :]].sum().item()


@pytest.mark.parametrize("model_fixture", ["tiny_llama", "tiny_bloom"])
def test_sequence_log_probs_equal_full_logits(
    model_fixture: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    path = request.getfixturevalue(model_fixture)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    rng = random.Random(0)
    ids = lambda high: [rng.randrange(3, 17) for _ in range(rng.randint(1, high))]  # noqa: E731
    groups = [Group(ids(5), [ids(7) for _ in range(1 + index)]) for index in range(4)]
    found = sequence_log_probs(model, groups, temperature=0.7, batch_size=3)
    for group, values in zip(groups, found, strict=True):
        expected = [full_logits(path, group.prompt, completion, 0.7) for completion in group.completions]
        np.testing.assert_allclose(values, expected, atol=1e-4)


def test_drawn_ids_under_the_distribution_they_were_drawn_from(
    settings: Settings, tiny_llama: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Prompts as `generate` cut them, ids (with EOS or without) as it drew them; more than go together in a row."""
    (tmp_path / "test.json").write_text(json.dumps(make_rows(5)))
    sampling = {"max_seq_len": 10, "temperature": 0.7, "output_dir": str(tmp_path / "samples")}
    drawn = settings(**sampling, return_num=10, max_new_tokens=5, batch_size=64)
    del drawn["max_gen_len"]
    assert generate(GenerateConfig(**drawn))["counts"]["test"]["cut_prompts"] > 0
    config = LogprobsConfig(**settings(data=sampling["output_dir"], max_seq_len=10, max_gen_len=5, temperature=0.7))
    summary = logprobs(config)
    rows = json.loads(Path(config.output_dir, "test.json").read_text())
    samples = json.loads((tmp_path / "samples" / "test.json").read_text())
    assert [{k: v for k, v in row.items() if k != "logprobs"} for row in rows] == samples
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        prompt = prompt[:1] + prompt[1:][-4:]
        expected = [full_logits(tiny_llama, prompt, ids, 0.7) for ids in row["completion_ids"]]
        np.testing.assert_allclose(row["logprobs"], expected, atol=1e-4)
    counts = summary["counts"]["test"]
    tokens = sum(len(ids) for row in rows for ids in row["completion_ids"])
    assert (counts["tokens"], counts["completions"]) == (tokens, 10 * len(rows))
    total = sum(value for row in rows for value in row["logprobs"])
    assert counts["mean"] == pytest.approx(total / counts["completions"])
    assert counts["mean_per_token"] == pytest.approx(total / tokens)


def test_text_is_scored_with_eos_and_cut_as_in_training(
    settings: Settings, tiny_llama: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "the film was", "completions": ["good", "", "bad and dull"]},
        {"prompt": "the film was very very long and", "chosen": "good", "rejected": "bad but good but bad"},
    ]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    config = LogprobsConfig(**settings(max_seq_len=12, max_gen_len=8))
    counts = logprobs(config)["counts"]["test"]
    found = json.loads(Path(config.output_dir, "test.json").read_text())
    assert [row["completions"] for row in found] == [["good", "", "bad and dull"], ["good", "bad but good but bad"]]
    eos = tokenizer.eos_token_id
    for row, length in zip(found, (6, 4), strict=True):  # 12 less the longest completion, of 6 and (cut) 8 tokens
        prompt = tokenizer(row["prompt"])["input_ids"]
        prompt = prompt[:1] + prompt[1:][1 - length :]
        completions = [[*tokenizer(text)["input_ids"][1:], eos][:8] for text in row["completions"]]
        expected = [full_logits(tiny_llama, prompt, ids) for ids in completions]
        np.testing.assert_allclose(row["logprobs"], expected, atol=1e-4)
    assert (counts["cut_completions"], counts["cut_prompts"]) == (1, 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_name_or_path": None}, "name a model"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"max_gen_len": 48}, "max_seq_len=48: must be larger than max_gen_len=48"),
        ({"max_gen_len": 0}, "max_gen_len=0"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_errors(settings: Settings, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LogprobsConfig(**settings(**changed))


def test_ids_of_another_tokenizer_are_refused(settings: Settings, tmp_path: Path) -> None:
    row = {"prompt": "the", "completions": ["good"], "completion_ids": [[900]]}
    (tmp_path / "test.json").write_text(json.dumps([row]))
    with pytest.raises(InputError, match="sampled with another model"):
        logprobs(LogprobsConfig(**settings()))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(settings: Settings, tiny_llama: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "test.json").write_text(json.dumps([{"prompt": "the", "completions": ["extra"]}]))
    with pytest.raises(InputError, match="gives id 17 and its vocabulary has 17"):
        logprobs(LogprobsConfig(**settings(model_name_or_path=str(tmp_path / "model"))))
