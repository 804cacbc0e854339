"""Save a trained model, whatever is beside its weights; refuse before training a model that cannot be saved."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from transformers.integrations import TensorBoardCallback

from exo_fast.integrations import generation_config
from exo_fast.training.arguments import parse_config
from exo_fast.training.errors import InputError, RunError
from exo_fast.training.models import saving
from exo_fast.training.reports.hub import keep_trackers_harmless
from exo_fast.training.stages.align import AlignConfig, align
from exo_fast.training.stages.reward_model import RewardModelConfig, reward_model
from exo_fast.training.stages.sft import SftConfig, sft

Settings = Callable[..., dict[str, Any]]
ALIGN_ONLY = ("loss_type", "reference_cache_dir")


def base_with(tiny_llama: str, folder: Path, **values: Any) -> str:
    """The tiny Llama with a generation_config.json of these values."""
    shutil.copytree(tiny_llama, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **values}))
    return str(folder)


def run(stage: str, options: dict[str, Any]) -> dict[str, Any]:
    if stage == "align":
        return align(AlignConfig(**options))
    left = {name: value for name, value in options.items() if name not in ALIGN_ONLY}
    if stage == "sft":
        return sft(SftConfig(**left))
    return reward_model(RewardModelConfig(**{name: value for name, value in left.items() if name != "max_gen_len"}))


def sft_rows(folder: Path) -> str:
    rows = [{"prompt": "the film was", "chosen": " very good", "rejected": " bad"}] * 4
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps(rows))
    return str(folder)


# Generation configurations

GENERATION_CONFIGS = {
    "as the first Llama 2": ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9, "top_p": 0.6}),
    "greedy by word": ({"do_sample": False, "temperature": 0.9}, {"do_sample": False, "temperature": None}),
    "beams of nothing": ({"early_stopping": True, "temperature": 0.9}, {"early_stopping": None, "temperature": None}),
    "outputs": ({"output_scores": True}, {"output_scores": None}),
    "valid": ({"do_sample": True, "temperature": 0.7}, {"do_sample": True, "temperature": 0.7}),
}


@pytest.mark.parametrize(("given", "saved"), GENERATION_CONFIGS.values(), ids=GENERATION_CONFIGS.keys())
def test_a_generation_config_is_settled_before_training(
    tiny_llama: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, given: dict[str, Any], saved: dict[str, Any]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_with(tiny_llama, tmp_path / "base", **given))
    generation_config.settle_generation_config(model)
    model.generation_config.pad_token_id = 2  # changed since it was loaded, as the Trainer changes it
    model.save_pretrained(tmp_path / "saved")
    found = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert {name: getattr(found, name) for name in saved} == saved
    assert found.eos_token_id == 2
    assert ("cannot be saved as it is" in caplog.text) == (given != saved)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("align", {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}),
        ("align", {"engine": "deepspeed", "zero_stage": 3}),
        ("align", {"lora_r": 2}),
        ("sft", {}),
        ("reward-model", {"lora_r": 2}),
    ],
    ids=["align with checkpoints", "ZeRO-3", "LoRA", "sft", "reward model"],
)
def test_a_base_that_transformers_would_not_save_is_trained_and_saved(
    settings: Settings, tiny_llama: str, tmp_path: Path, stage: str, options: dict[str, Any]
) -> None:
    base = base_with(tiny_llama, tmp_path / "base", temperature=0.9, top_p=0.6)
    values = settings(**{"model_name_or_path": base, "num_train_epochs": 1, "engine": "torch", **options})
    if stage != "align":
        values["data"] = sft_rows(tmp_path / "rows")
    run(stage, values)
    output = Path(values["output_dir"])
    if stage == "align" and "lora_r" in options:
        assert (output / "adapter_model.safetensors").is_file()
        return
    for folder in (output, *output.glob("checkpoint-*")):
        assert (folder / "model.safetensors").is_file()
        if stage != "reward-model":
            config = GenerationConfig.from_pretrained(folder)
            assert (config.do_sample, config.temperature, config.top_p) == (True, 0.9, 0.6)
    assert stage != "align" or "save_steps" not in options or list(output.glob("checkpoint-*"))


# Weights, whatever else cannot be written


@pytest.mark.parametrize("lora_r", [0, 2])
def test_a_tokenizer_that_cannot_be_saved_is_a_warning(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lora_r: int
) -> None:
    def half(self: Any, folder: str) -> None:
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "tokenizer.json").write_text("{")
        raise TypeError("not serialisable")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", half)
    options = settings(engine="torch", max_steps=1, save_strategy="steps", save_steps=1, lora_r=lora_r)
    assert align(AlignConfig(**options))["steps"] == 1
    weights = "adapter_model.safetensors" if lora_r else "model.safetensors"
    for folder in (Path(options["output_dir"]), Path(options["output_dir"], "checkpoint-1")):
        assert (folder / weights).is_file()
        assert not (folder / "tokenizer.json").exists()  # no half of one
    assert "the tokenizer was not saved: TypeError: not serialisable" in caplog.text


def test_a_config_that_cannot_be_saved_is_said_before_training(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("rope_theta: 7 is no dict")

    monkeypatch.setattr(PreTrainedConfig, "save_pretrained", refuse)
    with pytest.raises(InputError, match=r"config\.json could not be saved .*: rope_theta: 7 is no dict"):
        align(AlignConfig(**settings(engine="torch")))


@pytest.mark.parametrize("zero_stage", [None, 3])
def test_what_breaks_during_training_does_not_cost_the_weights(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero_stage: int | None
) -> None:
    engine = {"engine": "torch"} if zero_stage is None else {"zero_stage": zero_stage}
    undisturbed = settings(**engine, max_steps=2, output_dir=str(tmp_path / "undisturbed"))
    align(AlignConfig(**undisturbed))
    check = saving.check_can_be_saved

    def then_break(model: nn.Module, tokenizer: Any) -> None:
        check(model, tokenizer)
        model.generation_config.temperature = 0.5  # without do_sample

    monkeypatch.setattr(saving, "check_can_be_saved", then_break)
    options = settings(**engine, max_steps=2)
    align(AlignConfig(**options))
    expected = load_file(tmp_path / "undisturbed" / "model.safetensors")
    found = load_file(Path(options["output_dir"], "model.safetensors"))
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, found[name])
    loaded = AutoModelForCausalLM.from_pretrained(options["output_dir"])  # ties the head again
    assert torch.equal(loaded.lm_head.weight, expected["model.embed_tokens.weight"])
    assert AutoTokenizer.from_pretrained(options["output_dir"]).eos_token_id == 2


@pytest.mark.parametrize("event", ["on_train_begin", "on_log", "on_train_end"])
def test_a_tracker_that_fails_is_a_warning(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, event: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("the tracker's server is gone")

    monkeypatch.setattr(TensorBoardCallback, event, fail)
    options = settings(engine="torch", max_steps=2, report_to="tensorboard")
    summary = align(AlignConfig(**options))
    assert Path(options["output_dir"], "model.safetensors").is_file()
    said = {text: count for text, count in summary["warnings"].items() if "the tracker's server is gone" in text}
    assert list(said.values()) == [1]
    assert next(iter(said)).startswith("TensorBoardCallback: ConnectionError")


def test_a_callback_of_ours_may_still_end_a_run() -> None:
    class Ours(TrainerCallback):
        def on_log(self, *_: Any, **__: Any) -> None:
            raise RunError("not finite")

    callback = Ours()
    keep_trackers_harmless([callback])
    with pytest.raises(RunError, match="not finite"):
        callback.on_log(None, None, None)


def test_data_that_is_gone_at_the_end_loses_no_training(
    settings: Settings, data_directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    shutil.copytree(data_directory, data)
    save = saving.save_model

    def save_then_remove(*args: Any) -> None:
        save(*args)
        shutil.rmtree(data)

    monkeypatch.setattr(saving, "save_model", save_then_remove)
    summary = align(AlignConfig(**settings(engine="torch", max_steps=1, data=str(data))))
    assert summary["data_files"] == {}
    assert any("data_files" in text for text in summary["warnings"])


def test_files_are_replaced_weights_first_and_folders_file_by_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder, text in ((source, "new"), (target, "old")):
        (folder / "additional_chat_templates").mkdir(parents=True)
        (folder / "additional_chat_templates" / "tool.jinja").write_text(text)
    (source / "config.json").write_text("new")
    (source / "model.safetensors").write_text("new")
    (target / "config.json").mkdir()  # in its way
    (target / "config.json" / "x").touch()
    saving.replace_files(source, target)
    assert (target / "additional_chat_templates" / "tool.jinja").read_text() == "new"
    assert (target / "model.safetensors").read_text() == "new"
    assert "config.json was not written" in caplog.text


# Room, and places outside output_dir


def test_no_room_for_the_model_is_said_before_training(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000))
    message = r"output_dir='.*': the trained model needs about 0\.1 MB, and 0\.1 MB are free; make room"
    with pytest.raises(RunError, match=message):
        align(AlignConfig(**settings(engine="torch")))
    align(AlignConfig(**settings(engine="torch", max_steps=1, lora_r=1)))  # an adapter is small


@pytest.mark.parametrize("place", ["a file", "no such mount", "no home"])
def test_a_reference_cache_that_cannot_be_written_loses_nothing(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").touch()
    folder = {"a file": str(tmp_path / "file"), "no such mount": "/proc/none/cache", "no home": "~nobody-here/cache"}
    expected = align(AlignConfig(**settings(engine="torch", output_dir=str(tmp_path / "expected"))))
    summary = align(AlignConfig(**settings(engine="torch", reference_cache_dir=folder[place])))
    assert summary["metrics"]["train"]["last"]["loss"] == expected["metrics"]["train"]["last"]["loss"]
    assert any(text.startswith("reference_cache_dir=") and "cannot be written" in text for text in summary["warnings"])


def test_a_disk_that_fills_up_under_the_reference_cache_loses_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("exo_fast.training.trainer.reference_logps.save_file", full)
    options = settings(engine="torch", max_steps=1)
    summary = align(AlignConfig(**options))
    assert any("No space left on device" in text for text in summary["warnings"])
    assert list(Path(options["reference_cache_dir"]).iterdir()) == []


def test_a_logging_dir_that_cannot_be_written_loses_nothing(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file"))
    options = settings(engine="torch", max_steps=1, report_to="tensorboard")
    assert align(AlignConfig(**options))["steps"] == 1
    assert "TENSORBOARD_LOGGING_DIR=" in caplog.text


def test_a_machine_without_a_home_is_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    expand = Path.expanduser

    def nowhere(self: Path) -> Path:
        if str(self).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return expand(self)

    monkeypatch.setattr(Path, "expanduser", nowhere)
    words = ["--model_name_or_path", "m", "--data", "d"]
    assert parse_config(AlignConfig, words).reference_cache_dir.startswith("~")
    with pytest.raises(InputError, match="reference_cache_dir='~/other': cannot be a path"):
        parse_config(AlignConfig, [*words, "--reference_cache_dir", "~/other"])
