"""Classifiers: binary cross-entropy of transformers' own logit, which is the log-odds of label pos."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked import run, run_and_kill
from safetensors.torch import load_file
from tiny_models import WORDS
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline, set_seed

from exo_fast.training.data.texts import RowCollator, pad_with_eos, tokenize_rows
from exo_fast.training.errors import InputError
from exo_fast.training.models.scorer import load_scalar_model
from exo_fast.training.models.scorer_modules import ClassifierModule
from exo_fast.training.stages.classifier import ClassifierConfig, classifier

Settings = Callable[..., dict[str, Any]]
PRAISE = ("good", "fine", "great")
BLAME = ("bad", "long", "dull")


def make_texts(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts that hold a word of praise or of blame at a random place, and their label; a third is positive."""
    rng = random.Random(seed)
    neutral = [word for word in WORDS if word not in (*PRAISE, *BLAME)]
    rows = []
    for index in range(count):
        positive = index % 3 == 0
        words = rng.choices(neutral, k=rng.randint(2, 7))
        words.insert(rng.randint(0, len(words)), rng.choice(PRAISE if positive else BLAME))
        rows.append({"text": " ".join(words), "label": "pos" if positive else "neg"})
    return rows


@pytest.fixture
def settings(tiny_llama: str, tmp_path: Path) -> Settings:
    """`settings(**overrides)`: ClassifierConfig fields of a run of 40 steps."""
    for name, count, seed in (("train", 120, 0), ("test", 45, 1)):
        (tmp_path / f"{name}.json").write_text(json.dumps(make_texts(count, seed)))

    def with_overrides(**overrides: Any) -> dict[str, Any]:
        return {
            "model_name_or_path": tiny_llama,
            "data": str(tmp_path),
            "max_seq_len": 64,
            "learning_rate": 1e-2,
            "num_train_epochs": 5,
            "per_device_train_batch_size": 16,
            "logging_steps": 10,
            "eval_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "output_dir": str(tmp_path / "run"),
            **overrides,
        }

    return with_overrides


def test_loss_and_gradients_equal_plain_float64(tiny_llama: str) -> None:
    rows = make_texts(9, seed=0)
    labels = torch.tensor([float(row["label"] == "pos") for row in rows], dtype=torch.float64)
    tokenizer = pad_with_eos(AutoTokenizer.from_pretrained(tiny_llama))
    data = tokenize_rows([(row["text"],) for row in rows], labels.tolist(), tokenizer, max_seq_len=64, progress=False)
    set_seed(0)
    module = ClassifierModule(load_scalar_model(tiny_llama, dtype=torch.float32, new_head=True))
    batch = RowCollator(tokenizer.pad_token_id)([data[i] for i in range(9)])
    loss, metrics = module.train()(**batch)
    loss.backward()

    set_seed(0)
    other = load_scalar_model(tiny_llama, dtype=torch.float32, new_head=True).double().eval()
    plain = AutoTokenizer.from_pretrained(tiny_llama)
    logits = torch.stack([other(**plain(row["text"], return_tensors="pt")).logits[0, 0] for row in rows])
    chance = logits.sigmoid()
    losses = -(labels * chance.log() + (1 - labels) * (1 - chance).log())
    losses.mean().backward()
    torch.testing.assert_close(loss.double(), losses.mean(), atol=1e-6, rtol=1e-6)
    for found, right in zip(module.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found.grad.double(), right.grad, atol=1e-6, rtol=1e-4)

    rows_of_loss, _ = module.eval()(**batch)
    torch.testing.assert_close(rows_of_loss.double(), losses, atol=1e-5, rtol=1e-5)
    accuracy = ((logits > 0) == (labels > 0.5)).double()
    assert 0 < accuracy.mean() < 1
    margins = torch.where(labels > 0.5, logits, -logits)
    right = torch.stack([accuracy, logits, margins], dim=-1)
    torch.testing.assert_close(metrics.double(), right, atol=1e-5, rtol=1e-5)


def test_it_learns_and_what_it_saves_gives_what_it_measured(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    held_out = classifier(ClassifierConfig(**settings()))["held_out"]
    assert held_out["accuracy"] > 0.9
    low, high = held_out["accuracy_95"]
    assert f"held out: accuracy {held_out['accuracy']:.3f} [{low:.3f}, {high:.3f}] (95%) on 45 texts" in (
        capsys.readouterr().out
    )
    saved = tmp_path / "run"
    model = AutoModelForSequenceClassification.from_pretrained(saved)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    rows = make_texts(45, seed=1)
    with torch.no_grad():
        inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        logits = model(**inputs).logits[:, 0]
        labels = torch.tensor([[float(row["label"] == "pos")] for row in rows])
        loss = model(**inputs, labels=labels).loss  # transformers' own loss of this problem_type
    positive = labels[:, 0] == 1
    assert held_out["accuracy"] == pytest.approx(((logits > 0) == positive).float().mean().item())
    assert held_out["log_odds/pos"] == pytest.approx(logits[positive].mean().item(), abs=1e-4)
    assert held_out["log_odds/neg"] == pytest.approx(logits[~positive].mean().item(), abs=1e-4)
    assert held_out["loss"] == pytest.approx(loss.item(), abs=1e-5)
    (found,) = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")(rows[0]["text"])
    assert found["label"] == "pos"
    assert found["score"] == pytest.approx(logits[0].sigmoid().item(), abs=1e-5)


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_weights(settings: Settings, tmp_path: Path) -> None:
    """A classifier with adapters: the new head is drawn again at the start, and then read from the checkpoint."""
    options = settings(save_strategy="steps", save_steps=8, num_train_epochs=2, lora_r=4, engine="torch")
    classifier(ClassifierConfig(**{**options, "output_dir": str(tmp_path / "whole")}))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(options))
    words = ["classifier", "--config", tmp_path / "recipe.yaml"]
    run_and_kill("training_step", 12, *words)
    assert f"continuing from {options['output_dir']}/checkpoint-8" in run(*words)
    whole, continued = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert whole.keys() == continued.keys()
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


def test_errors(settings: Settings, tmp_path: Path) -> None:
    def train_on(rows: list[dict[str, Any]]) -> None:
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        classifier(ClassifierConfig(**settings(data=str(tmp_path / "rows.json"))))

    with pytest.raises(InputError, match=r"field `label`, value '?fresh'?.*\"pos\" or \"neg\" is needed"):
        train_on([{"text": "the film", "label": "fresh"}])
    with pytest.raises(InputError, match="field `label`, value missing"):
        train_on([{"text": "the film"}])
    with pytest.raises(InputError, match="field `text`, value missing"):
        train_on([{"prompt": "the", "chosen": "film", "rejected": "plot"}])
    with pytest.raises(InputError, match="all 2 rows have label pos; both are needed"):
        train_on([{"text": "good", "label": 1}, {"text": "great", "label": True}])
