"""A run that is asked to stop saves and ends well; one whose numbers are not finite does not touch the weights."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device_work import OnDevice, on_device
from safetensors.torch import load_file

from exo_fast.training import files
from exo_fast.training.cli import command
from exo_fast.training.errors import InputError, RunError, Stopped
from exo_fast.training.models import modules
from exo_fast.training.stages import align as align_stage
from exo_fast.training.stages.align import AlignConfig, align
from exo_fast.training.trainer import trainer

Settings = Callable[..., dict[str, Any]]
ENGINES = {
    "torch": {"engine": "torch"},
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "zero2 bf16": {"zero_stage": 2, "bf16": True},
    "zero2 accumulating": {"zero_stage": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
}


def run(options: dict[str, Any]) -> dict[str, Any]:
    return align(AlignConfig(**options))


def weights(options: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(options["output_dir"], "model.safetensors"))


# SIGTERM


def sigterm_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Send this process SIGTERM while it makes the `call`th training step."""
    original, calls = trainer.StageTrainer.training_step, []

    def step(self, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer.StageTrainer, "training_step", step)


@pytest.mark.parametrize("call", [3, 4, 8], ids=["in an epoch", "at its end", "at the end"])
def test_sigterm_saves_and_the_same_command_continues(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: int
) -> None:
    whole = settings(engine="torch", output_dir=str(tmp_path / "whole"))
    run(whole)
    options = settings(engine="torch")
    with monkeypatch.context() as patch:
        sigterm_at(patch, call)
        with pytest.raises(Stopped, match=rf"stopped by SIGTERM after step {call} of 8; .*checkpoint-{call} is saved"):
            run(options)
    assert not Path(options["output_dir"], "summary.json").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert run(options)["resumed_from"].endswith(f"checkpoint-{call}")
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(options)[name], tensor), name


def test_the_command_line_ends_well_after_sigterm(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = [f"--{name}={value}" for name, value in settings(engine="torch").items()]
    sigterm_at(monkeypatch, 2)
    assert command.main(["align", *words]) == 0
    assert "exo-fast align: stopped by SIGTERM after step 2 of 8" in capsys.readouterr().out


def test_sigterm_before_the_first_step_ends_at_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = align_stage.fill_reference_logps

    def interrupted(*args: Any) -> dict[str, bool]:
        os.kill(os.getpid(), signal.SIGTERM)
        return fill(*args)

    monkeypatch.setattr(align_stage, "fill_reference_logps", interrupted)
    with pytest.raises(Stopped, match="before the first step: nothing to save"):
        run(settings(engine="torch"))


# Numbers that are not finite


def spoil(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], example: int) -> None:
    """Make the loss NaN, and so its gradient, of batches with this example of the training data."""
    rows = json.loads(Path(settings["data"], "train.json").read_text())
    mark, original = torch.tensor(rows[example]["rewards"]), modules.linear_group_loss

    def spoiled(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        (loss, logps), rewards = original(*args, **kwargs), args[5]
        bad = (rewards == mark).all(1)
        factor = torch.where(bad, torch.nan, 1.0)
        return loss * factor.sum() / len(bad), logps * factor.unsqueeze(1)

    monkeypatch.setattr(modules, "linear_group_loss", spoiled)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())
def test_the_run_ends_before_the_weights_see_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, engine: dict[str, Any]
) -> None:
    options = settings(**{**engine, "train_sampling_strategy": "sequential", "save_strategy": "steps", "save_steps": 1})
    spoil(monkeypatch, options, 3)
    with pytest.raises(
        RunError, match=r"step 1: the loss is not finite, in examples 3 of the training data .*non_finite skip leaves"
    ):
        run(options)
    folder = Path(options["output_dir"], "non-finite", "step-1")
    about = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    assert [row for found in about for row in found["rows that are not finite"]] == [3]
    assert sorted(row for found in about for row in found["rows"]) == [0, 1, 2, 3]
    batch = load_file(next(folder.glob("*.safetensors")))
    assert {"input_ids", "targets", "rewards", "ref_logps", "metrics"} <= batch.keys()
    assert not Path(options["output_dir"], "checkpoint-1").exists()


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())
def test_or_its_step_is_left_out(settings: Settings, monkeypatch: pytest.MonkeyPatch, engine: dict[str, Any]) -> None:
    """A training of one step an epoch, of which that is left out, leaves the weights as they were."""
    size = 16 // engine.get("gradient_accumulation_steps", 1)
    options = settings(**{**engine, "per_device_train_batch_size": size, "non_finite": "skip"})
    spoil(monkeypatch, options, 3)
    summary = run(options)
    assert (summary["steps"], summary["steps_left_out"]) == (2, 2)
    start = load_file(Path(options["model_name_or_path"], "model.safetensors"))
    for name, tensor in weights(options).items():
        torch.testing.assert_close(tensor.float(), start[name], rtol=1e-2, atol=1e-3)
        assert torch.isfinite(tensor).all()


def test_other_steps_are_made(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    options = settings(engine="torch", non_finite="skip", train_sampling_strategy="sequential")
    spoil(monkeypatch, options, 3)
    assert run(options)["steps_left_out"] == 2  # the first of each epoch
    start = load_file(Path(options["model_name_or_path"], "model.safetensors"))
    assert not any(torch.equal(tensor, start[name]) for name, tensor in weights(options).items())


def test_weights_that_have_gone_wrong_end_a_run_that_skips(settings: Settings, tmp_path: Path) -> None:
    options = settings(engine="torch", non_finite="skip", learning_rate=1e30, num_train_epochs=4)
    with pytest.raises(RunError, match="11 steps one after another: the weights themselves may be the cause"):
        run(options)


# One run to a directory


def test_a_directory_that_another_process_writes_to_is_refused(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    output = tmp_path / "run"
    code = "import sys; from pathlib import Path; from exo_fast.training import files"
    code += f"; files.lock_directory(Path({str(output)!r}))"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{code}; print('held', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"process {holder.pid} on .* writes there; wait for it or end it"):
            run(settings(engine="torch"))
    finally:
        holder.kill()
        holder.wait()
    assert run(settings(engine="torch"))["steps"] == 8  # a lock is gone with its process


def test_a_directory_that_cannot_be_made_is_refused(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"output_dir=.*cannot be written \(Not a directory\)"):
        run(settings(engine="torch", output_dir=str(tmp_path / "file" / "run")))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_reads_the_device_once(settings: Settings, monkeypatch: pytest.MonkeyPatch, accumulation: int) -> None:
    """The norm of the gradients and the losses are read together, before the optimizer's step; it was two reads."""
    collate = trainer.CountedCollator.__call__
    monkeypatch.setattr(trainer.CountedCollator, "__call__", lambda self, items: on_device(collate(self, items)))
    norm = torch.nn.utils.get_total_norm
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda grads: norm(grads).as_subclass(OnDevice))
    quiet = {"engine": "torch", "logging_steps": 1000, "eval_strategy": "no", "save_strategy": "no"}

    def reads(steps: int) -> int:
        OnDevice.reads.clear()
        run(settings(**quiet, max_steps=steps, gradient_accumulation_steps=accumulation, output_dir=f"{steps}"))
        return sum(OnDevice.reads.values())

    monkeypatch.chdir(Path(settings()["output_dir"]).parent)
    assert reads(4) - reads(2) == 2


@pytest.mark.parametrize("pinned", [True, False])
def test_pinned_batches_are_copied_without_waiting(monkeypatch: pytest.MonkeyPatch, pinned: bool) -> None:
    copies = []
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: pinned)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **how: copies.append((device, how)))
    stub = SimpleNamespace(args=SimpleNamespace(device="cuda:1"))
    trainer.StageTrainer._prepare_input(stub, torch.ones(2))
    assert copies == [("cuda:1", {"non_blocking": pinned})]
