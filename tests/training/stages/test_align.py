"""Whole runs of `exo-fast align` on a tiny model, in one process; each takes well under a second."""

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from exo_fast import reference
from exo_fast.data.selection import TIE
from exo_fast.layout import SharingReport
from exo_fast.metrics import GROUP_METRICS
from exo_fast.training.data.groups import GroupCollator, GroupDataset
from exo_fast.training.errors import InputError
from exo_fast.training.models.causal import load_causal_lm
from exo_fast.training.models.modules import AlignModule
from exo_fast.training.stages.align import AlignConfig, align, make_module, read_data
from exo_fast.training.trainer.deepspeed import deepspeed_config
from exo_fast.training.trainer.splits import find_training_splits, tokenize_splits

Settings = Callable[..., dict[str, Any]]
LOSS_TYPES = ("exo-pref", "exo-rw", "dpo-pref", "dpo-rw")


def run(settings: dict[str, Any]) -> dict[str, Any]:
    return align(AlignConfig(**settings))


def weights(directory: str | Path, name: str = "model.safetensors") -> dict[str, Tensor]:
    return load_file(Path(directory) / name)


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], atol=atol, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


def module_and_data(settings: dict[str, Any], split: str = "train") -> tuple[AlignModule, GroupDataset]:
    config = AlignConfig(**settings)
    tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path)
    examples = read_data(config, find_training_splits(config), tokenizer)
    dataset = tokenize_splits(config, examples, tokenizer, num_contrastive=config.num_contrastive)[split]
    return make_module(config, load_causal_lm(config, config.model_name_or_path)), dataset


def log_history(settings: dict[str, Any]) -> list[dict[str, Any]]:
    return json.loads(Path(settings["output_dir"], "trainer_state.json").read_text())["log_history"]


# The step


def test_a_log_of_several_steps_is_the_mean_over_their_groups(settings: Settings, tmp_path: Path) -> None:
    """The last two of three steps, of six and four groups; as steps they would weigh the same."""
    options = {"per_device_train_batch_size": 6, "num_train_epochs": 1}
    logs = {}
    for every in (1, 3):
        made = settings(**options, logging_steps=every, output_dir=str(tmp_path / str(every)))
        run(made)
        logs[every] = [entry for entry in log_history(made) if "loss" in entry]
    (_, second, third), (_, found) = logs[1], logs[3]  # the first step is logged in any case
    for name in ("loss", *GROUP_METRICS):
        assert found[name] == pytest.approx((6 * second[name] + 4 * third[name]) / 10, rel=1e-5, abs=1e-7), name
    assert abs(found["loss"] - (second["loss"] + third["loss"]) / 2) > 1e-3


@pytest.mark.parametrize("share_prompt", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_step_equals_full_logits_on_padded_rows(settings: Settings, loss_type: str, share_prompt: bool) -> None:
    """Loss, metrics and every gradient against the definitions on ordinary rows through the model's own forward."""
    options = settings(loss_type=loss_type, temperature=0.8, beta_pi=0.3, beta_r=0.5, engine="torch")
    module, data = module_and_data(options)
    data.ref_logps = torch.linspace(-40, -20, len(data) * 4).view(len(data), 4)
    batch = GroupCollator(pad_token_id=2, share_prompt=share_prompt)([data[i] for i in range(5)])
    loss, metrics = module.train()(**batch)
    loss.backward()

    model = AutoModelForCausalLM.from_pretrained(options["model_name_or_path"])
    policy_logps = torch.stack([torch.stack([full_logps(model, group.prompt, completion, 0.8)
                                             for completion in group.completions])
                                for group in map(data.group, range(5))])  # fmt: skip
    smoothing = reference.default_label_smoothing(loss_type)
    expected = reference.group_loss(
        policy_logps, data.ref_logps[:5], data.rewards[:5],
        loss_type=loss_type, beta_pi=0.3, beta_r=0.5, label_smoothing=smoothing,
    ).mean()  # fmt: skip
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    kl = metrics.mean(0)[GROUP_METRICS.index("kl")]
    torch.testing.assert_close(kl, (data.ref_logps[:5] - policy_logps).mean(), atol=1e-4, rtol=0)
    for (name, found), right in zip(module.policy.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(
            found.grad, right.grad, atol=1e-5, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}"
        )


def full_logps(model: torch.nn.Module, prompt: list[int], completion: list[int], temperature: float) -> Tensor:
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion)[:, None]).sum()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_training_lowers_each_loss(settings: Settings, data_directory: str, loss_type: str) -> None:
    options = settings(loss_type=loss_type, eval_data=f"{data_directory}/train.json", eval_on_start=True)
    summary = run({**options, "report_to": "tensorboard", "num_contrastive": 2})
    evaluations = summary["metrics"]["eval"]
    assert evaluations["last"]["eval_loss"] < evaluations["first"]["eval_loss"] - 0.01
    assert evaluations["first"]["eval_kl"] == pytest.approx(0, abs=1e-5)
    assert summary["data"]["train"]["groups"] == 32
    assert summary["metrics"]["train"]["last"].keys() >= {*GROUP_METRICS, "tokens_per_second", "peak_memory_mb"}
    assert summary["tokens_per_second"] > 0
    assert summary["peak_memory_mb"] >= summary["metrics"]["train"]["last"]["peak_memory_mb"]
    assert summary["layout"]["share_prompt"]
    assert summary["layout"]["token_rms"] < 1e-5
    # What a user finds: a model that loads, its tokenizer, logs and the summary.
    output = Path(options["output_dir"])
    AutoModelForCausalLM.from_pretrained(output)
    AutoTokenizer.from_pretrained(output)
    assert json.loads((output / "summary.json").read_text())["steps"] == summary["steps"] == 16
    assert list(output.rglob("events.out.tfevents*"))
    assert not list(output.rglob("*.bin"))
    assert AutoModelForCausalLM.from_pretrained(output).config.use_cache


ENGINES = {
    "zero0": {"zero_stage": 0},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "unshared": {"share_prompt": "off"},
    "json file": {"deepspeed": "ZERO1"},
    "small budget": {"memory_budget": "8KiB"},
    "reference backend": {"backend": "reference"},
}


@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES.keys())
def test_engines_and_layouts_give_the_same_model(settings: Settings, tmp_path: Path, options: dict[str, Any]) -> None:
    if options.get("deepspeed") == "ZERO1":
        path = tmp_path / "zero1.json"
        path.write_text(json.dumps(deepspeed_config(1, offload=False, on_accelerator=False)))
        options = {"deepspeed": str(path)}
    plain = settings(engine="torch", output_dir=str(tmp_path / "plain"))
    other = settings(**options, reference_cache_dir=str(tmp_path / "other_cache"))
    expected, found = run(plain), run(other)
    assert found["metrics"]["eval"]["last"]["eval_loss"] == pytest.approx(
        expected["metrics"]["eval"]["last"]["eval_loss"], abs=1e-4
    )
    # Adam turns rounding into steps of the learning rate where a gradient is nearly 0.
    assert_same_weights(weights(other["output_dir"]), weights(plain["output_dir"]), atol=2e-4)


def test_micro_batches_of_unequal_size_weigh_by_their_groups(settings: Settings, tmp_path: Path) -> None:
    """15 groups as 8 + 7 at once, and as (4 + 4) + (4 + 3): the same two steps."""
    rows = json.loads(Path(settings()["data"], "train.json").read_text())[:15]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    common = {"data": str(tmp_path / "train.json"), "train_sampling_strategy": "sequential", "num_train_epochs": 1}
    whole = settings(**common, per_device_train_batch_size=8, output_dir=str(tmp_path / "whole"))
    parts = settings(**common, gradient_accumulation_steps=2, output_dir=str(tmp_path / "parts"))
    run(whole)
    run(parts)
    assert_same_weights(weights(parts["output_dir"]), weights(whole["output_dir"]), atol=1e-5)
    names = ("loss", "kl", "rewards/margins", "entropy")
    for found, expected in zip(log_history(parts)[:2], log_history(whole)[:2], strict=True):
        assert [found[name] for name in names] == pytest.approx([expected[name] for name in names], abs=1e-4)


def test_reference_logps_stay_float32_when_training_in_bf16(settings: Settings) -> None:
    """Rounded to bf16, a log-prob of -40 is off by up to 0.125, and the first step's log-ratios would not be 0."""
    summary = run(settings(bf16=True))
    first = summary["metrics"]["train"]["first"]
    assert first["kl"] == pytest.approx(0, abs=1e-2)
    assert abs(first["rewards/chosen"]) + abs(first["rewards/rejected"]) < 1e-3
    assert weights(settings()["output_dir"])["model.norm.weight"].dtype == torch.bfloat16


# Reference


def test_reference_logps_are_reused_until_what_they_depend_on_changes(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def hits(name: str, **overrides: Any) -> dict[str, bool]:
        return run(settings(output_dir=str(tmp_path / name), max_steps=1, **overrides))["reference_cache_hits"]

    assert hits("first") == {"train": False, "eval": False}
    assert "reused" not in capsys.readouterr().out
    # Another loss and other rewards need the same reference.
    assert hits("second", loss_type="dpo-pref", beta_pi=0.5) == {"train": True, "eval": True}
    assert "reference log-probs (train): reused" in capsys.readouterr().out
    assert hits("temperature", temperature=0.7) == {"train": False, "eval": False}
    assert hits("length", max_gen_len=3) == {"train": False, "eval": False}
    changed = tmp_path / "changed"
    shutil.copytree(settings()["model_name_or_path"], changed)
    tensors = load_file(changed / "model.safetensors")
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    assert hits("weights", model_name_or_path=str(changed)) == {"train": False, "eval": False}
    # A damaged file is computed again, not trusted and not fatal.
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert hits("damaged") == {"train": False, "eval": False}


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_separate_reference(settings: Settings, tmp_path: Path, zero_stage: int) -> None:
    """The policy of an earlier run against the model it came from."""
    first = settings(output_dir=str(tmp_path / "first"))
    start = first["model_name_or_path"]
    run(first)
    second = settings(model_name_or_path=first["output_dir"], ref_name_or_path=start, zero_stage=zero_stage)
    summary = run(second)
    before = log_history(first)
    assert summary["metrics"]["train"]["first"]["entropy"] < before[0]["entropy"] - 1e-3
    assert summary["reference_cache_hits"] == {"train": True, "eval": True}


def test_lora_reference_is_the_model_with_adapters_off(settings: Settings, tmp_path: Path) -> None:
    options = settings(lora_r=4, learning_rate=3e-2)
    summary = run(options)
    first = summary["metrics"]["train"]["first"]
    assert [first[name] for name in ("kl", "rewards/chosen", "rewards/margins")] == pytest.approx([0] * 3, abs=1e-5)
    assert not Path(options["output_dir"], "model.safetensors").exists()
    adapter = weights(options["output_dir"], "adapter_model.safetensors")
    assert all("lora_" in name for name in adapter)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in adapter.items() if "lora_B" in name)
    # Trained, the same module still gives the base model's log-probs with its adapters off.
    module, data = module_and_data(settings())
    batch = GroupCollator(pad_token_id=2)([data[i] for i in range(4)])
    with torch.no_grad():
        base = module.eval()(reference=True, **batch)[0]
        module.model = PeftModel.from_pretrained(module.policy, options["output_dir"])
        module.eval()
        torch.testing.assert_close(module(reference=True, **batch)[0], base, atol=0, rtol=0)
        batch["ref_logps"] = base
        assert module(**batch)[1][:, GROUP_METRICS.index("kl")].abs().min() > 1e-2
    assert "lora_A" in str(AutoModelForCausalLM.from_pretrained(options["output_dir"]))
    with pytest.raises(InputError, match="a LoRA adapter, where a whole model is needed; merge it first"):
        run(settings(model_name_or_path=options["output_dir"], output_dir=str(tmp_path / "next")))


# Evaluation


def test_evaluation_averages_over_groups_whatever_the_batches(settings: Settings) -> None:
    """5 held-out groups in batches of 2, 2 and 1."""
    options = settings(per_device_eval_batch_size=2)
    found = run(options)["metrics"]["eval"]["last"]
    module, data = module_and_data({**options, "output_dir": "unused"}, "eval")
    with torch.no_grad():
        module.eval()
        batch = GroupCollator(pad_token_id=2)([data[i] for i in range(5)])
        batch["ref_logps"] = module(reference=True, **batch)[0]
        module.model = AutoModelForCausalLM.from_pretrained(options["output_dir"])
        losses, metrics = module.eval()(**batch)
    assert found["eval_loss"] == pytest.approx(losses.mean().item(), abs=1e-4)
    for name, value in zip(GROUP_METRICS, metrics.mean(0).tolist(), strict=True):
        assert found[f"eval_{name}"] == pytest.approx(value, abs=1e-3), name


# Layout


def test_a_model_that_cannot_share_is_trained_unshared_and_says_why(
    settings: Settings, tiny_bloom: str, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("transformers").propagate = True
    summary = run(settings(model_name_or_path=tiny_bloom, max_steps=2))
    assert not summary["layout"]["share_prompt"]
    assert "ALiBi" in summary["layout"]["reason"]
    assert "Candidates cannot share their prompt, which is run 4 times instead: " in caplog.text


def test_a_difference_on_the_first_groups_unshares(
    settings: Settings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = SharingReport(ok=False, reason="a token's log-prob is off by 0.5", token_rms=0.5, sequence_max=4.0)
    monkeypatch.setattr("exo_fast.training.models.modules.check_sharing", lambda *_: report)
    logging.getLogger("transformers").propagate = True
    summary = run(settings(max_steps=2))
    assert (summary["layout"]["share_prompt"], summary["layout"]["token_rms"]) == (False, 0.5)
    assert "which is run 4 times instead: a token's log-prob is off by 0.5" in caplog.text


def test_dropout_is_off_unless_asked_for(settings: Settings, tmp_path: Path) -> None:
    model = tmp_path / "dropout"
    shutil.copytree(settings()["model_name_or_path"], model)
    facts = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**facts, "attention_dropout": 0.5}))
    options = settings(model_name_or_path=str(model), max_steps=1)
    assert run(options)["metrics"]["train"]["first"]["kl"] == pytest.approx(0, abs=1e-5)
    assert json.loads(Path(options["output_dir"], "config.json").read_text())["attention_dropout"] == 0.5
    noisy = run({**options, "disable_dropout": False, "output_dir": str(tmp_path / "noisy")})
    assert abs(noisy["metrics"]["train"]["first"]["kl"]) > 1e-2


# Resuming


RESUMED = {
    "zero2": {},
    "zero3": {"zero_stage": 3},
    "torch": {"engine": "torch"},
    "lora": {"lora_r": 4},
    "zero3 lora": {"zero_stage": 3, "lora_r": 4},
    "torch lora": {"engine": "torch", "lora_r": 4},
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED.keys())
def test_a_resumed_run_ends_as_if_never_interrupted(
    settings: Settings, tmp_path: Path, options: dict[str, Any]
) -> None:
    """A restart in the middle of the first epoch, in another directory and without the cached reference."""
    whole = settings(**options, save_strategy="steps", save_steps=3, output_dir=str(tmp_path / "whole"))
    assert run(whole)["steps"] == 8
    resumed = settings(
        **options,
        resume_from_checkpoint=f"{whole['output_dir']}/checkpoint-3",
        reference_cache_dir=str(tmp_path / "other_cache"),
    )
    summary = run(resumed)
    assert summary["resumed_from"].endswith("checkpoint-3")
    name = "adapter_model.safetensors" if "lora_r" in options else "model.safetensors"
    assert_same_weights(weights(resumed["output_dir"], name), weights(whole["output_dir"], name))


def test_what_resuming_may_mean(settings: Settings) -> None:
    options = settings(save_strategy="steps", save_steps=4, num_train_epochs=1)
    with pytest.raises(InputError, match="no checkpoint in output_dir"):
        run({**options, "resume_from_checkpoint": "true"})
    assert run({**options, "resume_from_checkpoint": "auto"})["resumed_from"] is None
    assert run(options)["steps"] == 4  # the same settings, finished: its summary
    with pytest.raises(InputError, match=r"an earlier run with other settings \(beta_pi was 0.1 and is now 0.2\)"):
        run({**options, "beta_pi": 0.2})
    with pytest.raises(InputError, match="holds an earlier run; choose another output_dir"):
        run({**options, "resume_from_checkpoint": "false"})
    longer = run({**options, "resume_from_checkpoint": "true", "num_train_epochs": 2})
    assert longer["resumed_from"].endswith("checkpoint-4")
    assert longer["steps"] == 8
    with pytest.raises(InputError, match=r"it has no manifest\.json: it was not written to its end"):
        run({**options, "resume_from_checkpoint": options["data"]})


def test_checkpoints_that_cannot_be_continued_are_not_mixed_with_new_ones(settings: Settings) -> None:
    options = settings(engine="torch", save_strategy="steps", save_steps=4, save_only_model=True, num_train_epochs=1)
    run(options)
    Path(options["output_dir"], "summary.json").unlink()  # as if it had been killed before the end
    with pytest.raises(
        InputError, match=r"\(beta_pi was 0.1 and is now 0.2\); choose another output_dir, or remove this one"
    ):
        run({**options, "beta_pi": 0.2})
    assert run(options)["resumed_from"] is None


def test_one_data_set_by_two_paths_is_one(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    options = settings(engine="torch", max_steps=1)
    run(options)
    monkeypatch.chdir(Path(options["data"]).parent)
    assert run({**options, "data": Path(options["data"]).name})["steps"] == 1


@pytest.mark.parametrize("options", [{}, {"engine": "torch"}, {"lora_r": 4}], ids=["zero2", "torch", "lora"])
def test_the_best_model_is_loaded_at_the_end(settings: Settings, options: dict[str, Any]) -> None:
    every = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    options = settings(**options, **every, **best, num_train_epochs=1)
    summary = run(options)
    second, fourth, loaded = (entry["eval_loss"] for entry in log_history(options) if "eval_loss" in entry)
    assert second > fourth  # so the "best" is not the last
    assert loaded == pytest.approx(second, abs=1e-5)
    assert summary["metrics"]["eval"]["last"]["eval_loss"] == loaded  # of the model that was saved
    name = "adapter_model.safetensors" if "lora_r" in options else "model.safetensors"
    checkpoint = Path(options["output_dir"], "checkpoint-2")
    assert_same_weights(weights(options["output_dir"], name), weights(checkpoint, name))


# Refusals


def test_data_that_does_not_fit_the_model(settings: Settings, tmp_path: Path) -> None:
    rows = [{"prompt": " ".join(["good"] * 100), "completions": ["bad", "good"], "rewards": [0, 1]}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    with pytest.raises(
        InputError, match=r"max_seq_len=256: the longest sequence has .* set max_seq_len to at most 128"
    ):
        run(settings(data=str(tmp_path / "train.json"), max_seq_len=256))
    with pytest.raises(InputError, match=r"the directory holds no train\.json"):
        run(settings(data=str(tmp_path / "cache")) | {"data": settings()["model_name_or_path"]})
    with pytest.raises(InputError, match=r"eval_data=.*: the directory holds no test"):
        run(settings(eval_data=settings()["model_name_or_path"]))


def test_models_that_cannot_be_loaded(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be loaded as AutoTokenizer; a directory with a model"):
        run(settings(model_name_or_path=str(tmp_path)))
    with pytest.raises(InputError, match=r"cannot be loaded as AutoModelForCausalLM.*no_such_attention"):
        run(settings(attn_implementation="no_such_attention"))


def test_lora_on_modules_that_are_not_there(settings: Settings) -> None:
    with pytest.raises(InputError, match=r"lora_target_modules=\['none'\]"):
        run(settings(lora_r=4, lora_target_modules=["none"]))


def test_the_best_candidate_sampled_twice_and_tied_ones(settings: Settings, tmp_path: Path) -> None:
    """A text that was drawn twice counts twice; `ties` decides about different texts with the highest reward."""
    rows = [{"prompt": "the film", "completions": ["was good", "was good", "was bad"], "rewards": [1, 1, 0]}] * 4
    tied = [{"prompt": "the plot", "completions": ["was fine", "was good", "was bad"], "rewards": [8, 8, 6]}] * 4
    options = {"loss_type": "dpo-pref", "num_train_epochs": 1, "engine": "torch"}

    def run(name: str, data: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        place = tmp_path / f"{name}.json"
        place.write_text(json.dumps(data))
        return align(AlignConfig(**settings(**options, data=str(place), output_dir=str(tmp_path / name), **more)))

    assert run("twice", rows)["metrics"]["train"]["first"]["loss"] == pytest.approx(math.log(3), rel=1e-4)
    with pytest.raises(
        InputError, match=r"tied\.json, line 1 \(row 0\), candidates 0, 1, 2: different candidates share"
    ):
        run("tied", tied)
    found = run("dropped", rows + tied, ties="drop")["data"]["train"]
    assert (found["groups"], list(found["left_out"].values())) == (4, [4])
    assert found["left_out_rows"][TIE][0].endswith("dropped.json, line 1 (row 4)")
    shared = run("shared", tied, ties="share", beta_pi=1.0, learning_rate=3e-3)
    assert shared["metrics"]["train"]["first"]["loss"] == pytest.approx(math.log(3), rel=1e-4)
    assert "4 groups left out" in (tmp_path / "dropped" / "README.md").read_text()
    assert "4 groups left out" in (tmp_path / "dropped" / "report.html").read_text()
