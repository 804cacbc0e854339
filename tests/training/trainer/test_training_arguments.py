"""Every field of transformers.TrainingArguments, judged: its effect here, or its refusal and the fix.

A field that transformers adds is in no table, and fails the first test until somebody has judged it.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainingArguments

from exo_fast.training.errors import InputError
from exo_fast.training.models.causal import check_lora
from exo_fast.training.stages.align import AlignConfig, align
from exo_fast.training.stages.reward_model import RewardModelConfig
from exo_fast.training.stages.sft import SftConfig
from exo_fast.training.trainer import compat
from exo_fast.training.trainer.config import REFUSED

# Fields that change the result: with this value the weights are different.
LEARNS_OTHERWISE: dict[str, dict[str, Any]] = {
    "per_device_train_batch_size": {"per_device_train_batch_size": 2},
    "num_train_epochs": {"num_train_epochs": 1},
    "max_steps": {"max_steps": 3},
    "learning_rate": {"learning_rate": 1e-3},
    "lr_scheduler_type": {"lr_scheduler_type": "constant"},
    "lr_scheduler_kwargs": {"lr_scheduler_kwargs": {"num_cycles": 2}},
    "warmup_steps": {"warmup_steps": 2},
    "optim": {"optim": "sgd"},
    "optim_args": {"optim": "rmsprop", "optim_args": "momentum=0.5"},
    "weight_decay": {"weight_decay": 0.5},
    "adam_beta1": {"adam_beta1": 0.5},
    "adam_beta2": {"adam_beta2": 0.5},
    "adam_epsilon": {"adam_epsilon": 0.01},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "max_grad_norm": {"max_grad_norm": 0.0},
    "bf16": {"bf16": True},
    "seed": {"seed": 7},
    "data_seed": {"data_seed": 7},
    "train_sampling_strategy": {"train_sampling_strategy": "sequential"},
    "dataloader_drop_last": {"dataloader_drop_last": True, "per_device_train_batch_size": 5},
    "load_best_model_at_end": {"load_best_model_at_end": True, "save_strategy": "epoch", "greater_is_better": True},
    "metric_for_best_model": {
        "load_best_model_at_end": True,
        "save_strategy": "epoch",
        "metric_for_best_model": "loss",
        "greater_is_better": True,
    },
    "greater_is_better": {
        "load_best_model_at_end": True,
        "save_strategy": "epoch",
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    },
}
WORKER = {"dataloader_num_workers": 1, "max_steps": 1}
# Fields that change the course or the logs of a run and not its result: the weights are the same bits.
LEARNS_THE_SAME: dict[str, dict[str, Any]] = {
    "per_device_eval_batch_size": {"per_device_eval_batch_size": 3},
    "activation_checkpointing": {"activation_checkpointing": True},
    "activation_checkpointing_kwargs": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "gradient_checkpointing_kwargs": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"preserve_rng_state": False},
    },
    "torch_empty_cache_steps": {"torch_empty_cache_steps": 2},
    "logging_strategy": {"logging_strategy": "epoch"},
    "logging_steps": {"logging_steps": 0.5},
    "logging_first_step": {"logging_first_step": False},
    "log_on_each_node": {"log_on_each_node": False},
    "logging_nan_inf_filter": {"logging_nan_inf_filter": True},
    "log_level": {"log_level": "error"},
    "log_level_replica": {"log_level_replica": "error"},
    "report_to": {"report_to": "tensorboard"},
    "run_name": {"run_name": "x"},
    "project": {"project": "x"},
    "trackio_space_id": {"trackio_space_id": "a/b"},
    "trackio_bucket_id": {"trackio_bucket_id": "a/b"},
    "trackio_static_space_id": {"trackio_static_space_id": "a/b"},
    "eval_strategy": {"eval_strategy": "no"},
    "eval_steps": {"eval_strategy": "steps", "eval_steps": 3},
    "eval_delay": {"eval_delay": 1},
    "eval_on_start": {"eval_on_start": True},
    "eval_accumulation_steps": {"eval_accumulation_steps": 1},
    "save_only_model": {"save_strategy": "epoch", "save_only_model": True},
    "save_strategy": {"save_strategy": "best", "metric_for_best_model": "kl"},
    "save_steps": {"save_strategy": "steps", "save_steps": 3},
    "save_total_limit": {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1},
    "full_determinism": {"full_determinism": True},
    "dataloader_pin_memory": {"dataloader_pin_memory": False},
    "dataloader_num_workers": WORKER,
    "dataloader_persistent_workers": {**WORKER, "dataloader_persistent_workers": True},
    "dataloader_prefetch_factor": {**WORKER, "dataloader_prefetch_factor": 3},
    "dataloader_multiprocessing_context": {**WORKER, "dataloader_multiprocessing_context": "fork"},
    "ddp_find_unused_parameters": {"ddp_find_unused_parameters": True},
    "ddp_bucket_cap_mb": {"ddp_bucket_cap_mb": 1},
    "ddp_broadcast_buffers": {"ddp_broadcast_buffers": True},
    "ddp_static_graph": {"ddp_static_graph": True},
    "ddp_timeout": {"ddp_timeout": 10},
    "debug": {"debug": "underflow_overflow"},
    "skip_memory_metrics": {"skip_memory_metrics": False},
    "do_train": {"do_train": True},
    "do_eval": {"do_eval": True},
    "local_rank": {"local_rank": 0},
}
# Other tests run these.
ELSEWHERE = {
    "output_dir": "everywhere",
    "disable_tqdm": "everywhere",
    "use_cpu": "everywhere",
    "resume_from_checkpoint": "test_align.py",
    "deepspeed": "test_arguments.py",
    "ddp_backend": "below: it needs several processes, which test_distributed.py has",
    "optim_target_modules": "below: it needs packages that the tests do not",
    "torch_compile": "below: in eager mode, because compiling takes a minute",
    "torch_compile_backend": "as above",
    "torch_compile_mode": "as above",
    **dict.fromkeys(
        ("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_revision"),
        "test_tracking.py",
    ),
}
# Refused, with a value that is not the default.
REFUSED_VALUES: dict[str, Any] = {
    "label_smoothing_factor": 0.1,
    "fp16": True,
    "fp16_full_eval": True,
    "bf16_full_eval": True,
    "tf32": True,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "neftune_noise_alpha": 5.0,
    "use_cache": True,
    "auto_find_batch_size": True,
    "average_tokens_across_devices": False,
    "include_num_input_tokens_seen": "all",
    "prediction_loss_only": True,
    "batch_eval_metrics": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "include_for_metrics": ["inputs"],
    "label_names": ["rewards"],
    "remove_unused_columns": True,
    "length_column_name": "x",
    "dataloader_in_order": False,
    "accelerator_config": {"split_batches": True},
    "parallelism_config": object(),
    "fsdp": "full_shard",
    "fsdp_config": {"min_num_params": 1},
    "ignore_data_skip": True,
    "restore_callback_states_from_checkpoint": True,
    "enable_jit_checkpoint": True,
    "save_on_each_node": True,
    "hub_always_push": True,
    "do_predict": True,
}


LATER = {  # fields that the oldest transformers lack
    "activation_checkpointing", "activation_checkpointing_kwargs", "dataloader_in_order",
    "dataloader_multiprocessing_context",
} - compat.FIELDS  # fmt: skip
GONE = {"logging_dir", "warmup_ratio"}  # fields that later ones lack


def weights(options: dict[str, Any]) -> dict[str, Tensor]:
    return load_file(Path(options["output_dir"], "model.safetensors"))


@pytest.fixture(scope="module")
def untouched() -> dict[int, dict[str, Tensor]]:
    """Weights of the runs in which no field is touched, by their max_steps."""
    return {}


def test_every_field_is_judged_once() -> None:
    names = [*LEARNS_OTHERWISE, *LEARNS_THE_SAME, *ELSEWHERE, *REFUSED_VALUES]
    assert len(names) == len(set(names))
    assert set(names) - LATER == {field.name for field in fields(TrainingArguments) if field.init} - GONE
    assert REFUSED_VALUES.keys() == REFUSED.keys()


@pytest.mark.parametrize("name", [name for name in (*LEARNS_OTHERWISE, *LEARNS_THE_SAME) if name not in LATER])
def test_a_field_does_what_it_says(
    settings: Any, tmp_path: Path, untouched: dict[int, dict[str, Tensor]], name: str
) -> None:
    # (A fraction of the steps that are enough to see it.)
    options = (LEARNS_OTHERWISE | LEARNS_THE_SAME)[name]
    steps = options.get("max_steps", -1) if name in LEARNS_THE_SAME else -1
    if steps not in untouched:
        plain = settings(engine="torch", max_steps=steps, output_dir=str(tmp_path / "untouched"))
        align(AlignConfig(**plain))
        untouched[steps] = weights(plain)
    values = settings(**{"engine": "torch", **options})
    try:
        align(AlignConfig(**values))
    finally:
        torch.use_deterministic_algorithms(False)
    found, expected = weights(values), untouched[steps]
    same = all(torch.equal(found[key], expected[key]) for key in expected)
    assert same == (name in LEARNS_THE_SAME)


@pytest.mark.parametrize("config", [AlignConfig, SftConfig, RewardModelConfig])
@pytest.mark.parametrize("name", sorted(REFUSED.keys() - LATER))
def test_what_means_nothing_here_is_refused(tmp_path: Path, config: type, name: str) -> None:
    options = {"model_name_or_path": "m", "data": "d", "output_dir": str(tmp_path), "use_cpu": True}
    with pytest.raises(InputError) as refused:
        config(**options, **{name: REFUSED_VALUES[name]})
    assert str(refused.value) == f"{name}={REFUSED_VALUES[name]!r}: {REFUSED[name]}"


BAD_VALUES = {
    "package": (
        {"optim": "galore_adamw", "optim_target_modules": "all-linear"},
        "optim='galore_adamw': .*galore_torch",
    ),
    "in backward": ({"optim": "lomo"}, "optim='lomo': it changes weights in the backward pass"),
    "other weights": ({"optim": "schedule_free_adamw"}, "optim='schedule_free_adamw': it evaluates and saves other"),
    "layerwise": ({"optim": "galore_adamw_layerwise"}, "optim='galore_adamw_layerwise': it changes weights"),
    "modules": ({"optim_target_modules": "q_proj"}, "optim_target_modules='q_proj': optim adamw_torch.* takes none"),
    "arguments": ({"optim_args": "nonsense=1"}, "optim_args='nonsense=1': optim adamw_torch.* takes none of them"),
    "no arguments": ({"optim_args": "x"}, r"optim='adamw_torch.*', optim_args='x': not enough values"),
    "beta": ({"adam_beta1": 1.0}, r"optim='adamw_torch.*': Invalid beta parameter at index 0: 1.0"),
    "epsilon": ({"adam_epsilon": 0.0}, "adam_epsilon=0.0: a positive number"),
    "schedule": ({"lr_scheduler_kwargs": {"nonsense": 2}}, "lr_scheduler_kwargs=.*nonsense"),
    "unfinished schedule": ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type='warmup_stable_decay'"),
    "learning rate": ({"learning_rate": 1e40}, r"learning_rate=1e\+40: a number of at least 0 is needed, that float32"),
    "weight decay": ({"weight_decay": -1.0}, "weight_decay=-1.0: a number of at least 0"),
    "norm": ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0: a number of at least 0"),
    "not finite": ({"warmup_steps": float("inf")}, "warmup_steps=inf: a finite number is needed"),
    "best of what": ({"metric_for_best_model": "nonsense"}, "metric_for_best_model='nonsense': one of loss, rewards/"),
    "best of no checkpoints": (
        {"load_best_model_at_end": True, "save_strategy": "no"},
        "save_strategy='no': the best model is known by a checkpoint at each evaluation",
    ),
    "accumulation": ({"eval_accumulation_steps": 0}, "eval_accumulation_steps=0: at least 1"),
    "empty cache": ({"torch_empty_cache_steps": 0}, "torch_empty_cache_steps=0: at least 1"),
    "delay": ({"eval_delay": -1}, "eval_delay=-1: a number of at least 0"),
    "workers": ({"dataloader_num_workers": -1}, "dataloader_num_workers=-1: a number of at least 0"),
    "persistent": ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers=True: needs dataloader_num"),
    "context": (
        {"dataloader_multiprocessing_context": "nonsense", "dataloader_num_workers": 1},
        "dataloader_multiprocessing_context='nonsense': one of .*spawn",
    ),
    "backend": ({"ddp_backend": "gloo"}, "ddp_backend='gloo': needs several processes"),
    "timeout": ({"ddp_timeout": -1}, "ddp_timeout=-1: at least 1 second"),
    "limit": ({"save_total_limit": -1}, "save_total_limit=-1: at least 1 is needed, or 0 to keep all"),
    "save steps": ({"save_strategy": "steps", "save_steps": 0}, "save_steps=0: a positive number is needed"),
    "eval steps": ({"eval_strategy": "steps", "eval_steps": -1}, "eval_steps=-1: a positive number is needed"),
    "logging steps": ({"logging_steps": -1}, "logging_steps=-1: a positive number is needed"),
    "steps": ({"max_steps": -5}, "max_steps=-5: at least 1 is needed, or -1"),
    "epochs": ({"num_train_epochs": 1e40}, r"num_train_epochs=1e\+40: a positive number is needed, of at most"),
    "data seed": ({"data_seed": -1}, "data_seed=-1: a number from 0"),
    "checkpointing": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"nonsense": 1}},
        "gradient_checkpointing_kwargs=.*: there is no nonsense; use_reentrant",
    ),
    "beta_pi": ({"beta_pi": 1e-40}, "beta_pi=1e-40: a positive number is needed, that float32 has"),
    "beta_r": ({"beta_r": 1e40}, r"beta_r=1e\+40: a positive number is needed, that float32 has"),
    "cold": ({"temperature": 1e-40}, r"temperature=1e-40: a number from 1e-06 to 1e\+06 is needed"),
    "hot": ({"temperature": 1e40}, r"temperature=1e\+40: a number from 1e-06 to 1e\+06 is needed"),
    "smoothing": (
        {"loss_type": "exo-pref", "label_smoothing": 1e-40},
        "label_smoothing=1e-40: exo-pref needs at least",
    ),
    "alpha": ({"lora_r": 1, "lora_alpha": 0.0}, "lora_alpha=0.0: a positive number is needed"),
}


@pytest.mark.parametrize("case", [name for name, (values, _) in BAD_VALUES.items() if not LATER & values.keys()])
def test_values_that_could_not_work_are_refused(tmp_path: Path, case: str) -> None:
    values, message = BAD_VALUES[case]
    options = {"model_name_or_path": "m", "data": "d", "output_dir": str(tmp_path), "use_cpu": True}
    with pytest.raises(InputError, match=message):
        AlignConfig(**options, **values)


def test_a_compiled_step_is_the_same_step(settings: Any, tmp_path: Path) -> None:
    plain = settings(engine="torch", max_steps=2, output_dir=str(tmp_path / "plain"))
    align(AlignConfig(**plain))
    options = settings(engine="torch", max_steps=2, torch_compile=True, torch_compile_backend="eager")
    align(AlignConfig(**options))
    for name, expected in weights(plain).items():
        torch.testing.assert_close(weights(options)[name], expected, atol=1e-5, rtol=1e-5)


def test_no_whole_batch(settings: Any) -> None:
    def refused(message: str, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            align(AlignConfig(**settings(dataloader_drop_last=True, **options)))

    refused(r"16 rows make no whole batch of 17 \(17 per_device_train_batch_size\)", per_device_train_batch_size=17)
    steps = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 4, "max_steps": 3}
    refused(r"of 20 \(5 per_device_train_batch_size x 4 gradient_accumulation_steps\)", **steps)
    options = settings(dataloader_drop_last=True, per_device_train_batch_size=16, per_device_eval_batch_size=64)
    assert align(AlignConfig(**options))["steps"] == 2


def test_rewards_that_beta_r_makes_infinite_are_said_before_work(settings: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "the film", "completions": ["was good", "was bad"], "rewards": [1e6, -2e6]}] * 8
    (tmp_path / "train.json").write_text(json.dumps(rows))
    message = r"beta_r=1e-33: rewards of up to 2e\+06 divided by it are infinite in float32"
    with pytest.raises(InputError, match=message):
        align(AlignConfig(**settings(data=str(tmp_path / "train.json"), beta_r=1e-33)))


def test_lora_targets_are_looked_at_before_the_model_is_loaded(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exo_fast.training.models.causal.load_causal_lm", None)

    def refused(message: str, *targets: str) -> None:
        with pytest.raises(InputError, match=message) as error:
            align(AlignConfig(**settings(lora_r=2, lora_target_modules=list(targets))))
        assert "modules_to_save" not in str(error.value)

    refused(r"lora_target_modules=\['q_proj', 'lm_head'\]: one of them is the head", "q_proj", "lm_head")
    refused(r"no module of '.*' is called 'q_prj' .*; did you mean 'q_proj'\?", "v_proj", "q_prj")
    refused(r"no module of '.*' is called '\.\*q_proj' \(names are taken as they are, not as patterns\)", ".*q_proj")
    refused("is not supported", "input_layernorm")


def test_all_linear_is_the_default(settings: Any, tmp_path: Path) -> None:
    options = settings(engine="torch", lora_r=2, max_steps=1)
    align(AlignConfig(**options))
    named = settings(engine="torch", lora_r=2, max_steps=1, lora_target_modules=["all-linear"])
    named["output_dir"] = str(tmp_path / "named")
    align(AlignConfig(**named))
    one, other = (load_file(Path(o["output_dir"], "adapter_model.safetensors")) for o in (options, named))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_looking_at_lora_targets_changes_no_random_state(settings: Any) -> None:
    config = AlignConfig(**settings(lora_r=2))
    before = torch.random.get_rng_state()
    check_lora(config, "CAUSAL_LM")
    assert torch.equal(torch.random.get_rng_state(), before)
