"""A run that was ended at any boundary and continued is, in weights and log, the one that nobody disturbed.

The runs here have dropout, so that a random number drawn at another moment shows in every weight after it.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import make_rows
from tree import ROOT

from exo_fast.layout import SharingReport
from exo_fast.training.errors import Stopped
from exo_fast.training.models import modules
from exo_fast.training.stages.align import AlignConfig, align
from exo_fast.training.stages.classifier import ClassifierConfig, classifier
from exo_fast.training.stages.reward_model import RewardModelConfig, reward_model
from exo_fast.training.stages.sft import SftConfig, sft
from exo_fast.training.trainer import checkpoints, trainer

Settings = Callable[..., dict[str, Any]]
STAGES = {
    "align": (AlignConfig, align),
    "sft": (SftConfig, sft),
    "reward-model": (RewardModelConfig, reward_model),
    "classifier": (ClassifierConfig, classifier),
}
TIMES = ("runtime", "per_second", "peak_memory_mb")


@pytest.fixture
def options(settings: Settings, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`options(stage, **overrides)`: a run of two epochs of four steps, with dropout, saved and logged every step."""

    def with_overrides(stage: str = "align", **overrides: Any) -> dict[str, Any]:
        found = settings(
            **{"engine": "torch", "lora_r": 4, "lora_dropout": 0.3, "learning_rate": 2e-2},
            **{"save_strategy": "steps", "save_steps": 1},
        )
        if stage != "align":
            folder = tmp_path / f"data-{stage}"
            if not folder.exists():
                folder.mkdir()
                for split, count, seed in (("train", 16, 0), ("test", 5, 1)):
                    (folder / f"{split}.json").write_text(json.dumps(rows_of(stage, count, seed)))
            found["data"] = str(folder)
            del found["loss_type"], found["reference_cache_dir"]
            if stage != "sft":
                del found["max_gen_len"]
        return {**found, **overrides}

    return with_overrides


def rows_of(stage: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows as the stage reads them, made of those for alignment."""
    found = []
    for index, row in enumerate(make_rows(count, candidates=2, seed=seed)):
        chosen, rejected = row["completions"]
        found.append(
            {
                "sft": {"prompt": row["prompt"], "chosen": chosen},
                "reward-model": {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected},
                "classifier": {"text": chosen, "label": ("pos", "neg")[index % 2]},
            }[stage]
        )
    return found


def run(stage: str, options: dict[str, Any]) -> dict[str, Any]:
    config, function = STAGES[stage]
    return function(config(**options))


def weights(options: dict[str, Any]) -> dict[str, torch.Tensor]:
    output = Path(options["output_dir"])
    adapter = output / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else output / "model.safetensors")


def state(options: dict[str, Any]) -> dict[str, Any]:
    return json.loads(Path(options["output_dir"], "trainer_state.json").read_text())


def log(options: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of the log but the one on the whole call, without times."""
    entries = [entry for entry in state(options)["log_history"] if "train_runtime" not in entry]
    return [{name: value for name, value in entry.items() if not name.endswith(TIMES)} for entry in entries]


def evaluated(options: dict[str, Any]) -> list[int]:
    return [entry["step"] for entry in log(options) if "eval_loss" in entry]


def assert_same_weights(found: dict[str, Any], right: dict[str, Any]) -> None:
    ours, theirs = weights(found), weights(right)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def assert_same(found: dict[str, Any], right: dict[str, Any]) -> None:
    """The same bits, the same entries in the log, the same best model, the same checkpoints."""
    assert_same_weights(found, right)
    assert log(found) == log(right)
    ours, theirs = state(found), state(right)
    for name in ("best_metric", "best_global_step", "global_step", "epoch"):
        assert ours[name] == theirs[name], name
    best = [one["best_model_checkpoint"] and Path(one["best_model_checkpoint"]).name for one in (ours, theirs)]
    assert best[0] == best[1]
    names = [[path.name for path in checkpoints.numbered(Path(one["output_dir"]))] for one in (found, right)]
    assert names[0] == names[1]


class Killed(BaseException):
    """Exception that ends a run in this process where a kill would."""


def run_until(
    monkeypatch: pytest.MonkeyPatch, stage: str, options: dict[str, Any], method: str, call: int, *, after: bool = False
) -> None:
    """Run the stage and end it at the `call`th call of a method of its trainer, or `after` that call."""
    original, calls = getattr(trainer.StageTrainer, method), []

    def deadly(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call and not after:
            raise Killed
        result = original(self, *args, **kwargs)
        if len(calls) == call:
            raise Killed
        return result

    with monkeypatch.context() as patch:
        patch.setattr(trainer.StageTrainer, method, deadly)
        with pytest.raises(Killed):
            run(stage, options)
    assert not Path(options["output_dir"], "summary.json").exists()


def run_and_ask_to_stop(monkeypatch: pytest.MonkeyPatch, stage: str, options: dict[str, Any], step: int) -> None:
    """Run the stage and send it SIGTERM while it makes this step."""
    original, calls = trainer.StageTrainer.training_step, []

    def asked(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.StageTrainer, "training_step", asked)
        with pytest.raises(Stopped):
            run(stage, options)


# What draws from the global random states


def random_states() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), (name, keys.tolist(), *rest), random.getstate()


@pytest.mark.parametrize(
    ("stage", "engine", "workers"),
    [*((stage, "torch", 0) for stage in STAGES), ("align", "torch", 1), ("align", "deepspeed", 0)],
)
def test_nothing_between_two_steps_draws_random_numbers(
    options: Settings, monkeypatch: pytest.MonkeyPatch, stage: str, engine: str, workers: int
) -> None:
    """Not evaluating, saving, logging, nor the beginning of an epoch."""
    original, left = trainer.StageTrainer.training_step, []

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if left:
            assert random_states() == left[-1], f"before call {len(left) + 1}"
        result = original(self, *args, **kwargs)
        left.append(random_states())
        return result

    monkeypatch.setattr(trainer.StageTrainer, "training_step", step)
    run(stage, options(stage, engine=engine, eval_strategy="steps", eval_steps=3, dataloader_num_workers=workers))
    assert len(left) == 8
    assert left[0] != left[1]  # dropout does


@pytest.mark.parametrize("changes", [{"engine": "torch"}, {"engine": "deepspeed", "zero_stage": 2}], ids=str)
def test_how_often_is_evaluated_changes_no_bit(options: Settings, tmp_path: Path, changes: dict[str, Any]) -> None:
    right = options(**changes, eval_strategy="no")
    run("align", right)
    for name, often in {
        "epoch": {"eval_strategy": "epoch", "eval_on_start": True},
        "steps": {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 3},
    }.items():
        found = options(**changes, **often, output_dir=str(tmp_path / name))
        run("align", found)
        assert_same_weights(found, right)


@pytest.mark.parametrize("separate", [False, True])
def test_a_cached_reference_and_a_computed_one_give_the_same_bits(
    options: Settings, tiny_llama: str, tmp_path: Path, separate: bool
) -> None:
    """The policy's own reference, and another model's."""
    changes = {}
    if separate:
        shutil.copytree(tiny_llama, tmp_path / "reference")
        changes = {"ref_name_or_path": str(tmp_path / "reference")}
    computed = options(**changes, output_dir=str(tmp_path / "computed"))
    cached = options(**changes, output_dir=str(tmp_path / "cached"))
    assert not any(run("align", computed)["reference_cache_hits"].values())
    assert all(run("align", cached)["reference_cache_hits"].values())
    assert_same(cached, computed)


def test_the_check_of_shared_prompts_changes_no_bit(
    options: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checked = options()
    assert run("align", checked)["layout"]["token_rms"] < 1e-4
    monkeypatch.setattr(modules, "check_sharing", lambda *_: SharingReport(True, "", 7.0, 7.0, 7.0))
    unchecked = options(output_dir=str(tmp_path / "unchecked"))
    assert run("align", unchecked)["layout"]["token_rms"] == 7.0
    assert_same(unchecked, checked)


# Ended at a boundary

BOUNDARIES: dict[str, tuple[dict[str, Any], str, int]] = {
    "in the evaluation at an epoch's end": ({}, "evaluation_loop", 1),
    "in the last evaluation": ({}, "evaluation_loop", 2),
    "when all is evaluated": ({}, "_finalize_training", 1),
    "in an evaluation after so many steps": ({"eval_strategy": "steps", "eval_steps": 3}, "evaluation_loop", 2),
    "in the evaluation at the end": ({"eval_strategy": "steps", "eval_steps": 3}, "evaluation_loop", 3),
    "at the first step of an epoch": ({}, "training_step", 5),
    "writing the checkpoint of an epoch": (
        {"save_strategy": "epoch", "load_best_model_at_end": True},
        "_save_rng_state",
        2,
    ),
    "at an epoch's entry in the log": ({"logging_strategy": "epoch"}, "log", 2),
    "in an epoch that is logged at its end": ({"logging_strategy": "epoch"}, "training_step", 7),
    "between two entries of the log": ({"logging_steps": 3}, "training_step", 6),
    "in an evaluation that was due late": ({"eval_delay": 2}, "evaluation_loop", 1),
    "in the evaluation at the start": ({"eval_on_start": True}, "evaluation_loop", 1),
    "after the evaluation at the start": ({"eval_on_start": True}, "evaluation_loop", 2),
    "with the best model kept": (
        {"metric_for_best_model": "loss", "greater_is_better": False, "save_total_limit": 2},
        "evaluation_loop",
        2,
    ),
    "saving only the best": (
        {
            "save_strategy": "best",
            "metric_for_best_model": "loss",
            "greater_is_better": False,
            "eval_strategy": "epoch",
        },
        "training_step",
        6,
    ),
    "when the last step is within an epoch": ({"max_steps": 6}, "evaluation_loop", 2),
    "with a schedule by evaluations": (
        {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss", "learning_rate": 0.3}
        | {"lr_scheduler_kwargs": {"patience": 0, "threshold": 10.0}, "num_train_epochs": 3},
        "evaluation_loop",
        2,
    ),
}


@pytest.mark.parametrize(("changes", "method", "call"), BOUNDARIES.values(), ids=BOUNDARIES.keys())
def test_killed_and_continued_it_ends_as_if_undisturbed(
    options: Settings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    changes: dict[str, Any],
    method: str,
    call: int,
) -> None:
    right = options(**changes, output_dir=str(tmp_path / "right"))
    run("align", right)
    found = options(**changes)
    run_until(monkeypatch, "align", found, method, call)
    run("align", found)
    assert_same(found, right)


@pytest.mark.parametrize(
    ("stage", "engine"),
    [
        *((stage, {"engine": "torch"}) for stage in STAGES),
        *((stage, {"zero_stage": 2}) for stage in ("align", "classifier")),
        ("reward-model", {"zero_stage": 3}),
    ],
    ids=str,
)
def test_every_stage_makes_its_evaluations_up(
    options: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str, engine: dict[str, Any]
) -> None:
    """Killed in both evaluations of one run, and again in the evaluation that makes up for the first."""
    changes = {"engine": "deepspeed", **engine, "logging_strategy": "epoch"}
    right = options(stage, **changes, output_dir=str(tmp_path / "right"))
    run(stage, right)
    assert len(evaluated(right)) == 2
    found = options(stage, **changes)
    run_until(monkeypatch, stage, found, "evaluation_loop", 1)
    run_until(monkeypatch, stage, found, "evaluation_loop", 1)
    run_until(monkeypatch, stage, found, "evaluation_loop", 2)
    run(stage, found)
    assert_same(found, right)


STOPS: dict[str, dict[str, Any]] = {
    "evaluated by epochs": {},
    "evaluated by steps": {"eval_strategy": "steps", "eval_steps": 2},
    "logged by epochs": {"logging_strategy": "epoch"},
    "the best loaded": {"save_strategy": "epoch", "load_best_model_at_end": True},
    "the best saved": {"save_strategy": "best", "metric_for_best_model": "loss", "load_best_model_at_end": True},
}


@pytest.mark.parametrize("step", [4, 8], ids=["an epoch's last step", "the last step"])
@pytest.mark.parametrize("changes", STOPS.values(), ids=STOPS.keys())
def test_what_sigterm_left_out_is_made_up(
    options: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any], step: int
) -> None:
    right = options(**changes, output_dir=str(tmp_path / "right"))
    run("align", right)
    found = options(**changes)
    run_and_ask_to_stop(monkeypatch, "align", found, step)
    run("align", found)
    assert_same(found, right)


BETWEEN: dict[str, dict[str, Any]] = {
    "steps": {"save_steps": 3},
    "epochs": {"save_strategy": "epoch"},
    "no": {"save_strategy": "no"},
    "best": {"save_strategy": "best", "metric_for_best_model": "loss"},
    "the newest alone": {"save_steps": 3, "save_total_limit": 1},
    "the best loaded": {
        **{"save_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True},
        **{"metric_for_best_model": "loss", "greater_is_better": True},  # so that step 2 is the best
    },
}


@pytest.mark.parametrize("changes", BETWEEN.values(), ids=BETWEEN.keys())
def test_a_checkpoint_that_sigterm_alone_has_written_does_not_stay(
    options: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Evaluations, the limit of checkpoints and the choice of the best would count it as one more model of the run."""
    right = options(**changes, output_dir=str(tmp_path / "right"))
    run("align", right)
    if "load_best_model_at_end" in changes:
        assert state(right)["best_global_step"] == 2
    found = options(**changes)
    for step, steps in ((2, 2), (5, 3)):
        run_and_ask_to_stop(monkeypatch, "align", found, steps)
        assert checkpoints.numbered(Path(found["output_dir"]))[0].name == f"checkpoint-{step}"
    run("align", found)
    assert_same(found, right)


def test_the_sums_of_the_log_go_to_other_processes_as_they_are_shared_out(
    options: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files of one process each, taken up by one process: sums of rows add up, losses are averaged."""
    found = options(logging_steps=8, logging_first_step=False)
    run_until(monkeypatch, "align", found, "training_step", 4)
    checkpoint = Path(found["output_dir"], "checkpoint-3")
    one = json.loads((checkpoint / "interval_0.json").read_text())
    assert (one["logged"], one["weight"], one["copies"]) == (0, 12.0, 1)

    facts = dataclasses.replace(checkpoints.facts(checkpoint), processes=2)
    monkeypatch.setattr(checkpoints, "facts", lambda _: facts)
    (checkpoint / "interval_1.json").write_text(json.dumps({**one, "loss": 3 * one["loss"], "seconds": 99.0}))
    taken = []
    restore = trainer.StageTrainer._restore_interval

    def look(self: Any, path: Path) -> None:
        restore(self, path)
        taken.append((self._tr_loss.item(), self._interval_weight.item(), self._interval_seconds))

    monkeypatch.setattr(trainer.StageTrainer, "_restore_interval", look)
    monkeypatch.setattr("exo_fast.training.trainer.checkpoints.newest", lambda _: checkpoint)
    run("align", found)
    assert taken == [(pytest.approx(2 * one["loss"]), 24.0, 99.0)]
    losses = [entry for entry in state(found)["log_history"] if "train_loss" in entry]
    assert losses[0]["train_loss"] > 0  # of the steps that this call made


def test_steps_left_out_are_counted_over_a_kill(options: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    found = options(non_finite="skip")

    def left_out(self: Any, *args: Any) -> None:
        self.skipped += 1

    monkeypatch.setattr(trainer.RunWatch, "_not_finite", left_out)
    monkeypatch.setattr(trainer.StageTrainer, "left_out_step", lambda self: self.state.global_step in (2, 7))
    run_until(monkeypatch, "align", found, "training_step", 5)
    assert run("align", found)["steps_left_out"] == 2


# Kills of processes


@pytest.mark.slow
def test_a_process_killed_at_an_epochs_end(options: Settings, tmp_path: Path) -> None:
    """Kill it while it writes a checkpoint, and then in the evaluation after it."""
    right, found = options(output_dir=str(tmp_path / "right")), options()
    run("align", right)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(found))
    words = ["align", "--config", tmp_path / "recipe.yaml"]
    forked.run_and_kill("_save_rng_state", 4, *words)
    forked.run_and_kill("evaluation_loop", 1, *words)
    assert f"continuing from {found['output_dir']}/checkpoint-4\n" in forked.run(*words)
    assert_same(found, right)


@pytest.mark.slow
def test_two_processes_make_an_evaluation_up_together(options: Settings, tmp_path: Path) -> None:
    """After SIGTERM at an epoch's end; with the best model loaded at the end, which both must know by one name."""
    changes = {"engine": "deepspeed", "zero_stage": 2, "per_device_train_batch_size": 2, "logging_strategy": "epoch"}
    changes |= {"save_strategy": "epoch", "load_best_model_at_end": True}
    found, right = (options(**changes, output_dir=str(tmp_path / name)) for name in ("found", "right"))

    def start(config: dict[str, Any], **deaths: Any) -> str:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
        return forked.run("align", "--config", tmp_path / "recipe.yaml", processes=2, **deaths)

    start(right)
    both = dict.fromkeys((0, 1), ("training_step", 4))
    assert "stopped by SIGTERM after step 4 of 8" in start(found, deaths=both, end=signal.SIGTERM)
    assert "checkpoint-4\n" in start(found)
    assert_same(found, right)


def test_a_run_that_an_earlier_version_began_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/data/begun` is a run of 0.2.0 (before the folders of training/) that was killed after its checkpoint at
    step 4 of 8, with its recipe, settings and manifest."""
    shutil.copytree(ROOT / "tests" / "data" / "begun", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    said = forked.run("align", "--config", "align.yaml", "--resume_from_checkpoint", "auto")
    assert "continuing from run/checkpoint-4\n" in said
    forked.run("align", "--config", "align.yaml", "--output_dir", "whole")
    continued, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    for name, tensor in whole.items():  # another processor adds in another order
        torch.testing.assert_close(continued[name], tensor, atol=1e-4, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
