"""A step run without values takes the memory of the step with values; the command says whether it fits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3MoeConfig

from exo_fast.benchmarks.methods import step_styles
from exo_fast.benchmarks.report.page import RESULTS
from exo_fast.benchmarks.suites import memory
from exo_fast.layout import Group
from exo_fast.training.cli.command import main as cli
from exo_fast.training.errors import InputError
from exo_fast.training.memory import command
from exo_fast.training.memory.estimate import PARTS, Setting, estimate
from exo_fast.training.memory.meter import Meter

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TORCH = {"dtype": torch.float32, "engine": "torch", "optimizer": "sgd"}


def llama() -> LlamaConfig:
    return LlamaConfig(**SIZES, tie_word_embeddings=True)


def setting(method: str = "exo_fast", **changes) -> Setting:
    return Setting(method, **{"prompt": 48, "completion": 16, "candidates": 4, "groups": 2, **changes})


# Counting


def test_meter_counts_each_storage_once_for_as_long_as_it_lives() -> None:
    with FakeTensorMode(), Meter() as meter:
        with meter.labelled("a"):
            first = torch.zeros(100)
            view = first.view(10, 10)[2:]
        with meter.labelled("b"):
            torch.zeros(50)
        assert meter.now == {"a": 400, "b": 0}
        assert meter.peak == {"a": 400, "b": 200}
        del first
        assert meter.total == 400
        meter.relabel(view, "b")
        assert (meter.now["a"], meter.now["b"]) == (0, 400)
        del view
        assert meter.total == 0


def test_meter_counts_one_process_share() -> None:
    with FakeTensorMode(), Meter({"spread": 0.25}) as meter, meter.labelled("spread"):
        kept = torch.zeros(100)
        assert meter.total == 100
        del kept
        assert meter.total == 0


def test_a_step_without_values_takes_what_it_takes_with_them() -> None:
    policy, reference = (AutoModelForCausalLM.from_config(llama(), dtype=torch.float32) for _ in range(2))
    reference.requires_grad_(False)
    ids = torch.randint(3, 512, (2, 48 + 4 * 16), generator=torch.Generator().manual_seed(0)).tolist()
    groups = [Group(row[:48], [row[start : start + 16] for start in range(48, 112, 16)]) for row in ids]
    task = step_styles.Task(groups, torch.arange(8).view(2, 4).float())
    with Meter() as meter:
        meter.hold([*policy.parameters(), *reference.parameters()])
        step_styles.full_logits(policy, reference, task)().backward()
    measured = sum(meter.peak.values())
    found = estimate(llama(), setting("full-logits", **TORCH))
    assert found.total == pytest.approx(measured, rel=0.02)


# What is in an estimate


def test_weights_gradients_and_optimizer_follow_from_the_parameters() -> None:
    base = estimate(llama(), setting(prompt=2, completion=1, groups=1, **{**TORCH, "optimizer": "adamw"}))
    numbers = sum(p.numel() for p in AutoModelForCausalLM.from_config(llama()).parameters())
    assert base.parameters == numbers
    assert base.parts["weights"] == pytest.approx(4 * numbers, rel=0.01)
    assert base.parts["optimizer"] == 8 * numbers
    assert "reference" not in base.parts
    assert set(base.parts) <= set(PARTS)


def test_zero_spreads_what_it_spreads() -> None:
    one, four = (estimate(llama(), setting(processes=processes)) for processes in (1, 4))
    assert four.parts["optimizer"] * 4 == pytest.approx(one.parts["optimizer"], abs=4)
    assert four.parts["weights"] == one.parts["weights"]
    third = estimate(llama(), setting(processes=4, zero_stage=3))
    assert third.parts["weights"] * 4 == pytest.approx(one.parts["weights"], rel=0.01)


def test_lora_trains_little_and_needs_no_reference_model() -> None:
    whole, lora = (estimate(llama(), setting("full-logits", lora_r=r)) for r in (0, 4))
    assert lora.parts["optimizer"] < 0.5 * whole.parts["optimizer"]
    assert "reference" in whole.parts
    assert "reference" not in lora.parts


def test_checkpointing_keeps_less() -> None:
    plain, again = (
        estimate(llama(), setting(groups=8, gradient_checkpointing=checkpointing, **TORCH))
        for checkpointing in (False, True)
    )
    assert again.total < 0.7 * plain.total


def test_shared_prompts_and_the_fused_head_take_less_than_a_row_per_candidate() -> None:
    sizes = {name: estimate(llama(), setting(name, groups=8, **TORCH)) for name in ("full-logits", "exo_fast")}
    assert sizes["full-logits"].rows == (32, 64)
    assert sizes["exo_fast"].rows == (8, 48 + 4 * 16)
    assert sizes["exo_fast"].total < 0.6 * sizes["full-logits"].total


def test_a_dense_mask_is_counted_on_a_gpu_only() -> None:
    on = {device: estimate(llama(), setting(device=device, **TORCH)) for device in ("cpu", "cuda")}
    assert on["cuda"].parts["mask"] >= 4 * 2 * 112 * 112
    assert on["cpu"].parts.get("mask", 0) < 10_000


@pytest.mark.parametrize(
    "config",
    [
        Gemma3TextConfig(**SIZES, sliding_window=16),
        Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    ],
    ids=["windows", "experts"],
)
def test_other_architectures(config) -> None:
    # bf16: products of experts in float32 cannot be run without values
    bf16 = {**TORCH, "dtype": torch.bfloat16}
    small, large = (estimate(config, setting(completion=n, **bf16)) for n in (16, 64))
    assert small.shared
    assert large.parts["activations"] > 1.5 * small.parts["activations"]


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="candidates=1: at least 2"):
        setting(candidates=1)
    with pytest.raises(ValueError, match="method='other': one of full-logits, trl, exo_fast"):
        setting("other")


# The command


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path)
    return tmp_path / "config.json"


def test_command_prints_a_verdict_for_each_method(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["memory", "--model", str(config_file), "--tokens", "64", "--k", "2", "--device", "cpu"]
    assert cli([*words, "--memory", "80GB"]) == 0
    out = capsys.readouterr().out
    assert out.count(": fits, ") == 3
    assert cli([*words, "--memory", "1MB"]) == 0
    assert capsys.readouterr().out.count(": does not fit, needs ") == 3


def test_every_measured_step_is_within_the_margin() -> None:
    rows = json.loads((RESULTS / "memory.json").read_text())["rows"]
    for checkpointed, margin in ((False, command.MARGIN), (True, command.CHECKPOINTED_MARGIN)):
        ratios = [r["peak_mb"] / r["predicted_mb"] for r in rows if r["gradient_checkpointing"] == checkpointed]
        assert 0.95 * margin < max(ratios) < margin


def test_command_prints_json_for_a_directory(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["memory", "--model", str(config_file.parent), "--tokens", "64", "--prompt", "60", "--k", "2", "--json"]
    assert cli([*words, "--memory", "1GB", "--device", "cuda"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"] == 10**9
    assert [e["setting"]["method"] for e in found["estimates"]] == ["full-logits", "trl", "exo_fast"]
    assert all(e["total"] == sum(e["parts"].values()) for e in found["estimates"])
    assert found["estimates"][2]["rows"] == [1, 68]
    assert found["estimates"][2]["setting"]["memory_budget"] == 2**25  # a sixteenth of the card is 62.5 MB


def test_command_says_what_is_wrong(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--model", str(config_file), "--k", "2", "--tokens", "8"]
    with pytest.raises(InputError, match="--prompt 8: between 1 and --tokens - 1 = 7"):
        command.main([*words, "--prompt", "8"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="give its memory, such as --memory 80GB"):
        command.main([*words, "--device", "cuda"])


# The suite


def test_cases_have_names_of_their_own_and_settings() -> None:
    cases = memory.cases()
    assert len({str(case) for case in cases}) == len(cases)
    assert set(memory.cases(quick=True)) < set(cases)
    assert all(case.sequences % case.candidates == 0 for case in cases)
    assert memory.setting_of(replace(cases[0], precision="fp32")).dtype is torch.float32


def test_summary_is_of_the_rows_that_ran() -> None:
    rows = [{"errors": {"prediction": 0.1}}, {"errors": {"prediction": 0.02}}, {"skipped": "no"}]
    assert memory.summary(rows) == {"largest_error": 0.1, "mean_error": 0.06, "cases": 2}
