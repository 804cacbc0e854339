"""Supervised fine-tuning: the loss is full logits' loss on completions, whatever the batches; and it can be killed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked import run, run_and_kill
from safetensors.torch import load_file
from tiny_models import make_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from exo_fast.layout import plan_mask
from exo_fast.training.data.examples import load_sft
from exo_fast.training.data.groups import GroupDataset, SftCollator, tokenize
from exo_fast.training.data.sources import find_source
from exo_fast.training.errors import InputError
from exo_fast.training.models.modules import SftModule
from exo_fast.training.stages.sft import SftConfig, sft

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def settings(tiny_llama: str, tmp_path: Path) -> Settings:
    """`settings(**overrides)`: SftConfig fields of a run of 6 steps."""
    rows = [{"prompt": row["prompt"], "chosen": row["completions"][0]} for row in make_rows(24)]
    for name, part in (("train", rows[:17]), ("test", rows[17:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))

    def with_overrides(**overrides: Any) -> dict[str, Any]:
        return {
            "model_name_or_path": tiny_llama,
            "data": str(tmp_path),
            "max_seq_len": 64,
            "max_gen_len": 16,
            "learning_rate": 3e-3,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 6,
            "per_device_eval_batch_size": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "output_dir": str(tmp_path / "run"),
            **overrides,
        }

    return with_overrides


def read_dataset(settings: dict[str, Any], split: str) -> GroupDataset:
    tokenizer = AutoTokenizer.from_pretrained(settings["model_name_or_path"])
    rows = load_sft(find_source(settings["data"], split))
    return tokenize(rows, tokenizer, num_contrastive=1, max_seq_len=64, max_gen_len=16, progress=False)


def full_losses(model: torch.nn.Module, data: GroupDataset) -> list[Tensor]:
    """Per sequence, the negative log-probs of its completion's tokens, by full logits in float64."""
    losses = []
    for group in map(data.group, range(len(data))):
        prompt, (completion,) = group.prompt, group.completions
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="none"))
    return losses


def test_a_step_equals_full_logits(settings: Settings) -> None:
    options = settings()
    data = read_dataset(options, "train")
    model = AutoModelForCausalLM.from_pretrained(options["model_name_or_path"])
    module = SftModule(model, plan_mask(model.config), memory_budget=None, backend="auto")
    batch = SftCollator(pad_token_id=2)([data[i] for i in range(len(data))])
    loss, metrics = module.train()(**batch)
    loss.backward()

    other = AutoModelForCausalLM.from_pretrained(options["model_name_or_path"])
    expected = torch.cat(full_losses(other, data)).mean()
    expected.backward()
    assert metrics.shape == (len(data), 0)
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    for found, right in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found.grad, right.grad, atol=1e-6, rtol=1e-4)
    rows, _ = module.eval()(**batch)
    expected_rows = torch.stack([row.mean() for row in full_losses(other, data)])
    torch.testing.assert_close(rows.double(), expected_rows, atol=1e-5, rtol=1e-5)


def test_it_learns_and_evaluates_the_mean_over_tokens(settings: Settings) -> None:
    """The held-out loss weighs each token alike, although batches are of two sequences of unequal length."""
    options = settings(num_train_epochs=4)
    summary = sft(SftConfig(**options))
    train = summary["metrics"]["train"]
    assert train["last"]["loss"] < train["first"]["loss"] - 0.3
    model = AutoModelForCausalLM.from_pretrained(options["output_dir"])
    expected = torch.cat(full_losses(model, read_dataset(options, "eval"))).mean().item()
    assert summary["metrics"]["eval"]["last"]["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert AutoTokenizer.from_pretrained(options["output_dir"]).eos_token == "</s>"


@pytest.mark.parametrize("options", [{"zero_stage": 3}, {"engine": "torch"}], ids=["zero3", "torch"])
def test_engines_and_micro_batches_give_the_same_model(
    settings: Settings, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Micro-batches of 2 of 17 rows: each counts by its tokens, the last one of an epoch holds one row."""
    sft(SftConfig(**settings(engine="torch", train_sampling_strategy="sequential")))
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "output_dir": str(tmp_path / "cut")}
    sft(SftConfig(**settings(**options, **cut, train_sampling_strategy="sequential")))
    whole, cut_weights = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "cut"))
    for name, tensor in whole.items():
        torch.testing.assert_close(
            cut_weights[name], tensor, atol=2e-4, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize(("method", "call"), [("training_step", 5), ("_save_rng_state", 2)])
def test_killed_and_started_again_it_ends_with_the_same_weights(
    settings: Settings, tmp_path: Path, method: str, call: int
) -> None:
    """After step 4 of 6, and in the middle of writing checkpoint-4: then it continues from checkpoint-2."""
    options = settings(save_strategy="steps", save_steps=2, train_sampling_strategy="group_by_length")
    sft(SftConfig(**{**options, "output_dir": str(tmp_path / "whole")}))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(options))
    words = ["sft", "--config", str(tmp_path / "recipe.yaml")]
    run_and_kill(method, call, *words)
    assert not Path(options["output_dir"], "summary.json").exists()
    assert f"continuing from {options['output_dir']}/checkpoint-{4 if method == 'training_step' else 2}" in run(*words)
    whole, continued = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert whole.keys() == continued.keys()
    assert all(torch.equal(whole[name], continued[name]) for name in whole)
    assert "this run is finished" in run(*words)


def test_errors(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.json").write_text(json.dumps([{"prompt": "the", "completions": ["film"]}]))
    with pytest.raises(InputError, match=r"field `completions`.*give it as `chosen`"):
        sft(SftConfig(**settings(data=str(tmp_path / "other"))))
    with pytest.raises(InputError, match="output_dir=None"):
        SftConfig(**settings(output_dir=None))
