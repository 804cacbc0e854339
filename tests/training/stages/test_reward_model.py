"""Reward models: Bradley and Terry's loss on transformers' own logits, whatever the batches; and it can be killed."""

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
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from exo_fast.training.data.texts import PairCollator, RowDataset, pad_with_eos, tokenize_rows
from exo_fast.training.errors import InputError
from exo_fast.training.models.scorer import load_scalar_model
from exo_fast.training.models.scorer_modules import RewardModule, settle_layout
from exo_fast.training.stages.reward_model import RewardModelConfig, reward_model
from exo_fast.training.stages.scorer_training import wilson_interval

Settings = Callable[..., dict[str, Any]]
EOS = 2


def make_pairs(count: int, seed: int, better: str = "great", worse: str = "dull") -> list[dict[str, str]]:
    """Pairs whose chosen completion ends with the one word and the rejected with the other."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return "".join(f"{word} " for word in rng.choices(WORDS, k=rng.randint(low, high)))

    return [
        {"prompt": words(1, 6), "chosen": words(1, 5) + better, "rejected": words(1, 5) + worse} for _ in range(count)
    ]


@pytest.fixture
def settings(tiny_llama: str, tmp_path: Path) -> Settings:
    """`settings(**overrides)`: RewardModelConfig fields of a run of 12 steps."""
    for name, count, seed in (("train", 33, 0), ("test", 21, 1)):
        (tmp_path / f"{name}.json").write_text(json.dumps(make_pairs(count, seed)))

    def with_overrides(**overrides: Any) -> dict[str, Any]:
        return {
            "model_name_or_path": tiny_llama,
            "data": str(tmp_path),
            "max_seq_len": 64,
            "learning_rate": 1e-2,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 6,
            "per_device_eval_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "output_dir": str(tmp_path / "run"),
            **overrides,
        }

    return with_overrides


def rewards(model: nn.Module, directory: str, pairs: list[dict[str, str]]) -> tuple[Tensor, Tensor]:
    """Rewards of the chosen and the rejected text, each alone through the plain tokenizer and the plain forward."""
    tokenizer = AutoTokenizer.from_pretrained(directory)

    def reward(text: str) -> Tensor:
        return model(**tokenizer(text, return_tensors="pt")).logits[0, 0]

    chosen, rejected = ([reward(pair["prompt"] + pair[key]) for pair in pairs] for key in ("chosen", "rejected"))
    return torch.stack(chosen), torch.stack(rejected)


def tokenized(directory: str, pairs: list[dict[str, str]], max_seq_len: int = 64) -> RowDataset:
    tokenizer = pad_with_eos(AutoTokenizer.from_pretrained(directory))
    texts = [(pair["prompt"] + pair["chosen"], pair["prompt"] + pair["rejected"]) for pair in pairs]
    return tokenize_rows(texts, [1.0] * len(texts), tokenizer, max_seq_len=max_seq_len, progress=False)


def new_model(directory: str) -> nn.Module:
    set_seed(0)
    return load_scalar_model(directory, dtype=torch.float32, new_head=True)


@pytest.mark.parametrize("share_prompt", [False, True])
def test_loss_and_gradients_equal_plain_float64(tiny_llama: str, share_prompt: bool) -> None:
    pairs = make_pairs(7, seed=0)
    pairs[3]["rejected"] = pairs[3]["chosen"]  # a tie
    pairs[4]["rejected"] = pairs[4]["chosen"] + " good good"  # which begins with all of the other
    data = tokenized(tiny_llama, pairs)
    module = RewardModule(new_model(tiny_llama))
    items = [data[i] for i in range(7)]
    batch = PairCollator(EOS, share_prompt)(items)
    assert ("source" in batch) == share_prompt
    assert share_prompt or batch["num_tokens"] == data.counts.tokens
    batch["weights"] = torch.tensor([1.0, 2, 1, 3, 1, 1, 0.5])
    loss, metrics = module.train()(**batch)
    loss.backward()

    other = new_model(tiny_llama).double().eval()
    chosen, rejected = rewards(other, tiny_llama, pairs)
    margins = chosen - rejected
    losses = torch.log1p(torch.exp(-margins))
    expected = (losses * batch["weights"]).sum() / batch["weights"].sum()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    for found, right in zip(module.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found.grad.double(), right.grad, atol=1e-6, rtol=1e-4)

    rows, eval_metrics = module.eval()(**batch)
    torch.testing.assert_close(rows.double(), losses, atol=1e-5, rtol=1e-5)
    assert torch.equal(metrics, eval_metrics)
    assert not metrics.requires_grad
    accuracy = torch.where(margins > 0, 1.0, 0.0)
    accuracy[3] = metrics[3, 0]
    assert share_prompt or accuracy[3] == 0.5
    assert 0 < accuracy.mean() < 1
    right = torch.stack([accuracy, chosen, rejected, margins], dim=-1)
    torch.testing.assert_close(metrics.double(), right, atol=1e-5, rtol=1e-5, check_dtype=False)


def test_prompts_are_shared_where_that_is_right_and_less_work(
    tiny_llama: str, tiny_bloom: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = "good "
    long = tokenized(tiny_llama, [{"prompt": word * 20, "chosen": "fine", "rejected": "dull"}] * 2)
    short = tokenized(tiny_llama, [{"prompt": "", "chosen": f"fine {word * 20}", "rejected": f"dull {word * 20}"}] * 2)
    module = RewardModule(new_model(tiny_llama))
    collate = PairCollator(EOS)
    report = settle_layout(module, long, collate, share_prompt=True, rounded=False)
    assert report["share_prompt"]
    assert report["reward_difference"] < 1e-5
    assert "source" in collate([long[0], long[1]])
    assert "source" not in collate([short[0], short[1]])  # one row of both texts is longer than two of one

    assert settle_layout(module, long, collate, share_prompt=False, rounded=False)["reason"] == "switched off"
    assert "source" not in collate([long[0], long[1]])
    bloom = RewardModule(new_model(tiny_bloom))
    assert "bloom" in settle_layout(bloom, long, collate, share_prompt=True, rounded=False)["reason"]

    def causal(packed: Any, *args: Any, **options: Any) -> dict[str, Tensor]:
        return {"input_ids": packed.input_ids}

    monkeypatch.setattr("exo_fast.training.models.modules.model_inputs", causal)
    report = settle_layout(module, long, collate, share_prompt=True, rounded=False)
    assert "differ by" in report["reason"]
    assert not collate.share_prompt


@pytest.mark.parametrize("options", [{}, {"lora_r": 4, "zero_stage": 3}], ids=["whole", "lora-zero3"])
def test_it_learns_and_what_it_saves_gives_what_it_measured(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture, options: dict[str, Any]
) -> None:
    found = reward_model(RewardModelConfig(**settings(**options)))
    held_out = found["held_out"]
    assert held_out["accuracy"] > 0.9
    low, high = held_out["accuracy_95"]
    assert low < held_out["accuracy"] <= high
    assert f"held out: accuracy {held_out['accuracy']:.3f} [{low:.3f}, {high:.3f}] (95%) on 21 pairs" in (
        capsys.readouterr().out
    )
    saved = tmp_path / "run"
    assert not list(saved.glob("*adapter*"))
    model = AutoModelForSequenceClassification.from_pretrained(saved)
    assert (model.config.problem_type, model.config.id2label) == ("regression", {0: "reward"})
    chosen, rejected = rewards(model, str(saved), make_pairs(21, seed=1))
    assert held_out["rewards/chosen"] == pytest.approx(chosen.mean().item(), abs=1e-4)
    assert held_out["rewards/rejected"] == pytest.approx(rejected.mean().item(), abs=1e-4)
    assert held_out["accuracy"] == (chosen > rejected).float().mean().item()
    assert json.loads((saved / "summary.json").read_text())["held_out"] == held_out


def test_another_librarys_reward_model_is_read_before_eos_from_then_on(
    settings: Settings, tmp_path: Path, tiny_llama: str
) -> None:
    """Its padding is a token of its own; rows are padded with EOS, at which the reward would otherwise be read."""
    theirs = tmp_path / "theirs"
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama, pad_token="<unk>")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(theirs)
    tokenizer.save_pretrained(theirs)
    found = reward_model(RewardModelConfig(**settings(model_name_or_path=str(theirs), share_prompt="off")))
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert trained.config.pad_token_id == tokenizer.eos_token_id
    chosen, _ = rewards(trained, str(tmp_path / "run"), make_pairs(21, seed=1))
    assert found["held_out"]["rewards/chosen"] == pytest.approx(chosen.mean().item(), abs=1e-4)
    assert found["held_out"]["accuracy"] > 0.9


@pytest.mark.parametrize("options", [{"zero_stage": 3}, {"engine": "torch"}], ids=["zero3", "torch"])
def test_engines_and_micro_batches_give_the_same_model(
    settings: Settings, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Micro-batches of 2 of 33 pairs: the last one of an epoch holds one. And prompts run once or twice."""
    common = {"train_sampling_strategy": "sequential", "learning_rate": 1e-3}
    reward_model(RewardModelConfig(**settings(engine="torch", share_prompt="off", **common)))
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "output_dir": str(tmp_path / "cut")}
    assert reward_model(RewardModelConfig(**settings(**options, **cut, **common)))["layout"]["share_prompt"]
    whole, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "cut"))
    for name, tensor in whole.items():
        torch.testing.assert_close(other[name], tensor, atol=2e-4, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def test_the_best_checkpoint_is_kept(settings: Settings, tmp_path: Path) -> None:
    """The words are learned in the first epoch and unlearned after: the held-out pairs are of the first alone."""
    learned, unlearned = make_pairs(6, seed=0), make_pairs(12, seed=0, better="dull", worse="great")
    (tmp_path / "train.json").write_text(json.dumps(learned + unlearned))
    options = settings(
        train_sampling_strategy="sequential",
        num_train_epochs=1,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        lr_scheduler_type="constant",
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    found = reward_model(RewardModelConfig(**options))
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    accuracies = [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry]
    assert accuracies[0] > accuracies[2] + 0.1
    assert found["held_out"]["accuracy"] == accuracies[0]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    chosen, rejected = rewards(model, str(tmp_path / "run"), make_pairs(21, seed=1))
    assert (chosen > rejected).float().mean().item() == pytest.approx(accuracies[0])


@pytest.mark.slow
def test_two_processes_equal_one(settings: Settings, tmp_path: Path) -> None:
    """ZeRO-3, and a held-out split of 21 pairs that does not divide into the batches.

    The training pairs do divide: the Trainer gives processes equally many rows, some twice if they do not.
    """
    (tmp_path / "train.json").write_text(json.dumps(make_pairs(36, seed=0)))
    expected = reward_model(RewardModelConfig(**settings(engine="torch", learning_rate=1e-3)))
    double = settings(zero_stage=3, per_device_train_batch_size=3, learning_rate=1e-3, output_dir=str(tmp_path / "two"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(double))
    run("reward-model", "--config", tmp_path / "recipe.yaml", processes=2)
    found = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert (found["processes"], found["steps"]) == (2, expected["steps"])
    for name in ("loss", "accuracy", "rewards/chosen", "rewards/rejected"):
        assert found["held_out"][name] == pytest.approx(expected["held_out"][name], abs=1e-3), name
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_weights(settings: Settings, tmp_path: Path) -> None:
    options = settings(save_strategy="steps", save_steps=4, eval_strategy="no")
    reward_model(RewardModelConfig(**{**options, "output_dir": str(tmp_path / "whole")}))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(options))
    words = ["reward-model", "--config", tmp_path / "recipe.yaml"]
    run_and_kill("training_step", 7, *words)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert f"continuing from {options['output_dir']}/checkpoint-4" in run(*words)
    whole, continued = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert whole.keys() == continued.keys()
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


def test_errors(settings: Settings, tmp_path: Path, tiny_llama: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.json").write_text(json.dumps([{"text": "the film", "label": "pos"}]))
    with pytest.raises(InputError, match=r"line 1.*the row has text, label; add `prompt`"):
        reward_model(RewardModelConfig(**settings(data=str(tmp_path / "other"))))
    with pytest.raises(InputError, match="save_strategy='no': the best model is known by a checkpoint"):
        RewardModelConfig(**settings(load_best_model_at_end=True))
    with pytest.raises(InputError, match="metric_for_best_model='f1': one of accuracy, loss is needed"):
        RewardModelConfig(**settings(metric_for_best_model="f1"))
    alone = settings(data=str(tmp_path / "train.json"), load_best_model_at_end=True, save_strategy="epoch")
    with pytest.raises(InputError, match="load_best_model_at_end=True: needs held-out data"):
        reward_model(RewardModelConfig(**alone))
    three = tmp_path / "three"
    AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=3).save_pretrained(three)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(three)
    with pytest.raises(InputError, match="a classifier with 3 logits"):
        reward_model(RewardModelConfig(**settings(model_name_or_path=str(three), output_dir=str(tmp_path / "run3"))))


def test_without_held_out_data_it_trains_and_says_so(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = reward_model(RewardModelConfig(**settings(data=str(tmp_path / "train.json"), max_seq_len=8)))
    assert "held_out" not in found
    assert found["data"]["train"]["longest_sequence"] == 8
    assert found["data"]["train"]["cut_texts"] > 0
    assert "the accuracy is not known" in capsys.readouterr().out


def test_wilson_interval() -> None:
    """Equality with scipy's interval, also where a normal approximation would leave [0, 1]."""
    from scipy.stats import binomtest

    for successes, trials in ((0, 10), (7, 10), (10, 10), (512, 1000)):
        right = binomtest(successes, trials).proportion_ci(method="wilson")
        assert wilson_interval(successes, trials) == pytest.approx([right.low, right.high], abs=1e-9)


def test_batches_of_similar_length_train_too(settings: Settings) -> None:
    options = settings(train_sampling_strategy="group_by_length", max_steps=2)
    assert reward_model(RewardModelConfig(**options))["steps"] == 2
    data = tokenized(options["model_name_or_path"], make_pairs(3, seed=0))
    assert data.lengths().tolist() == [max(map(len, data[i]["ids"])) for i in range(3)]


def test_an_adapter_that_cannot_be_merged_at_the_end_is_kept(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise InputError("the logits of 16 tokens differ")

    monkeypatch.setattr("exo_fast.training.stages.scorer_training.merge_adapter", refuse)
    options = settings(lora_r=2, engine="torch", max_steps=1)
    summary = reward_model(RewardModelConfig(**options))
    assert summary["steps"] == 1
    assert Path(options["output_dir"], "adapter_model.safetensors").is_file()
    assert any("could not be merged into its base" in text for text in summary["warnings"])
