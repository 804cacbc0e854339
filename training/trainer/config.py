"""The configurations of the training stages: transformers.TrainingArguments and more fields.

Defaults come from the original EXO repository if it has one (cosine schedule without warm-up, Adam betas
(0.9, 0.95), one epoch, gradient clipping 1.0, ZeRO stage 2; a learning rate of 1e-5, and of 1e-6 in alignment), else
from transformers. Everything is checked when the object is made, so a wrong value costs no model load.
"""

import copy
import math
import multiprocessing
import os
import re
import time
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from transformers import TrainingArguments

from exo_fast.backends import choose
from exo_fast.training.errors import InputError
from exo_fast.training.files import user_path
from exo_fast.training.options import PRECISION_HELP, option, parse_size, resolve
from exo_fast.training.processes import announce_cpu, ensure_launcher_environment
from exo_fast.training.reports import hub
from exo_fast.training.trainer import compat
from exo_fast.training.trainer.deepspeed import deepspeed_config, default_zero_stage
from exo_fast.validate import LARGEST, LEAST

MOST_EPOCHS = 10**6
# Fields of alignment whose default a preset may replace: None until the presets are applied.
AFTER_PRESETS = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "tiled_mlp": False}

# Fields of transformers.TrainingArguments that have no meaning or a wrong one here, and what to use instead.
REFUSED = {
    "label_smoothing_factor": "that is transformers' smoothing over the vocabulary; label_smoothing of `exo-fast "
    "align` smooths targets.",
    "fp16": "gradients are formed before the loss is scaled; use bf16.",
    "fp16_full_eval": "evaluation runs in the precision of training, or its numbers could not be compared.",
    "bf16_full_eval": "evaluation runs in the precision of training, or its numbers could not be compared; use bf16.",
    "tf32": "matmul_precision says in which precision products are formed; use matmul_precision tf32.",
    "use_liger_kernel": "the head is fused by exo_fast, and Liger's would be in its way.",
    "liger_kernel_config": "the head is fused by exo_fast, and Liger's would be in its way.",
    "neftune_noise_alpha": "noise on the embeddings would stand between the policy and its reference, and its size "
    "follows from the length of a row, which here holds several sequences.",
    "use_cache": "training keeps no key-value cache.",
    "auto_find_batch_size": "another batch size is another training; `exo-fast memory` says which one fits.",
    "average_tokens_across_devices": "the loss is always the mean over the global batch.",
    "include_num_input_tokens_seen": "tokens_per_second is logged.",
    "prediction_loss_only": "evaluation always gives the loss and the metrics of the stage.",
    "batch_eval_metrics": "evaluation keeps a few numbers a row, however many rows there are.",
    "eval_do_concat_batches": "evaluation averages over all rows.",
    "eval_use_gather_object": "evaluation gathers tensors of numbers.",
    "include_for_metrics": "the metrics of a stage are its own.",
    "label_names": "batches are made by exo_fast.",
    "remove_unused_columns": "batches are made by exo_fast.",
    "length_column_name": "lengths are those of the tokenised rows.",
    "dataloader_in_order": "the order of the batches is that of the seed, so that a run can be repeated and continued.",
    "accelerator_config": "batches are divided over the processes by exo_fast; see gradient_accumulation_steps, seed.",
    "parallelism_config": "rows are divided by sequence_parallel (`exo-fast align`), weights by zero_stage.",
    "fsdp": "weights are divided by zero_stage 3.",
    "fsdp_config": "weights are divided by zero_stage 3.",
    "ignore_data_skip": "a run is continued with the rows that it has not seen, or it would be another one.",
    "restore_callback_states_from_checkpoint": "a run that is continued has the callbacks of its own command.",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint as it is.",
    "save_on_each_node": "all processes see one output_dir, and the first writes to it.",
    "hub_always_push": "an upload is waited for.",
    "do_predict": "`exo-fast generate`, `logprobs` and `score` run a trained model.",
}
# Optimizers of transformers that do not work by a step on gradients.
REFUSED_OPTIMIZERS = {
    "lomo": "changes weights in the backward pass, before it is known whether gradients are finite",
    "adalomo": "changes weights in the backward pass, before it is known whether gradients are finite",
    "schedule_free": "evaluates and saves other weights than it trains, which has to be said to it each time",
    "layerwise": "changes weights in the backward pass, before it is known whether gradients are finite",
}
CHECKPOINTING_KEYS = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop")
CHECKPOINTING_KEYS += ("every_n_layers", "offload")  # transformers' own

TRAINING_GROUPS: dict[str, tuple[str, ...]] = {
    "training": (
        "output_dir",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "max_grad_norm",
        "non_finite",
        "train_sampling_strategy",
        "gradient_checkpointing",
        "bf16",
        "seed",
    ),
    "evaluation, logging, checkpoints": (
        "eval_strategy",
        "eval_steps",
        "logging_steps",
        "report_to",
        "run_name",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "resume_from_checkpoint",
    ),
    "LoRA": ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
    "publishing": ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy", "hub_token"),
}


@dataclass
class TrainConfig(TrainingArguments):
    """The fields of transformers.TrainingArguments, some with other defaults, and the fields of all training stages.

    Raises InputError for a value that cannot work, naming it and the fix.
    """

    # Model
    model_name_or_path: str | None = option(None, "The model to start from: a directory or a Hub name.")
    attn_implementation: str | None = option(
        None, "sdpa, eager, or flex_attention (on CUDA, for long rows). Default: transformers' choice for the model."
    )
    disable_dropout: bool = option(False, "Train without dropout.")
    trust_remote_code: bool = option(False, "Run model code that comes with the model. Only for models you trust.")

    # Data
    data: str | None = option(
        None,
        "Training data: a .json, .jsonl or .parquet file, a directory with train.* (and test.*), a dataset saved by "
        "save_to_disk, or a name of the registry (imdb/sft:PATH).",
    )
    eval_data: str | None = option(None, "Held-out data in the same forms. Default: test.* beside the training data.")
    max_seq_len: int = option(512, "Longest sequence, in tokens; what is too long is cut on the left.")

    # LoRA
    lora_r: int = option(0, "Rank of LoRA adapters; 0 trains the whole model.")
    lora_alpha: float = option(16.0, "LoRA scaling numerator.")
    lora_dropout: float = option(0.0, "Dropout on the input of LoRA adapters.")
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the modules that get adapters. Default: every linear layer but the head."},
    )

    # Speed and memory
    matmul_precision: Literal["ieee", "tf32", "bf16", "fast"] = option("ieee", PRECISION_HELP)
    engine: Literal["deepspeed", "torch"] = option("deepspeed", "torch: plain PyTorch (DDP) without DeepSpeed.")
    zero_stage: int | None = option(
        None,
        "DeepSpeed ZeRO stage, 0 to 3; --deepspeed FILE.json replaces it. Default: 2, and 0 for one process on CPU in "
        "float32, which has nobody to share with.",
    )
    offload: bool = option(False, "Keep the optimizer's state (at stage 3 also parameters) in CPU memory.")

    # Other defaults for fields of TrainingArguments
    output_dir: str | None = option(None, "Where the model, checkpoints, logs and summary.json are written.")
    learning_rate: float = option(1e-5, "The initial learning rate.")
    lr_scheduler_type: str = option("cosine", "The learning rate schedule: cosine, linear, constant, …")
    adam_beta2: float = option(0.95, "Adam's beta2.")
    num_train_epochs: float = option(1.0, "Epochs to train.")
    per_device_train_batch_size: int = option(8, "Examples per device and micro-batch.")
    per_device_eval_batch_size: int = option(8, "Examples per device in evaluation.")
    logging_steps: float = option(10, "Log every so many optimizer steps (a fraction: of the whole training).")
    logging_first_step: bool = option(True, "Log the first step too.")
    eval_strategy: str = option("epoch", "Evaluate every epoch, every eval_steps (steps), or no; needs held-out data.")
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"],
        metadata={"help": "Where logs go beside the terminal: tensorboard, wandb, …, several of them, or none."},
    )
    push_to_hub: bool = option(False, "Upload the model, its tokenizer and its card to the Hugging Face Hub.")
    hub_strategy: Literal["every_save", "end"] = option(
        "every_save", "When to upload: after each checkpoint and at the end, or only then."
    )
    run_name: str | None = option(None, "What wandb and its like call this run. Default: they choose.")
    resume_from_checkpoint: str | None = option(
        None,
        "Default: an unfinished run in output_dir with the same settings is continued. true or auto: continue from "
        "the last checkpoint whatever the settings (auto: where there is one); false: never; or a checkpoint's path.",
    )
    gradient_checkpointing: bool | None = option(None, "Recompute activations in backward: less memory, more time.")
    train_sampling_strategy: str = option(
        "random",
        "Order of the rows: random; group_by_length (random batches of similar length: less padding); sequential.",
    )
    remove_unused_columns: bool = option(False, "Not used: batches are made by exo_fast.")
    logging_nan_inf_filter: bool = option(False, "Leave losses that are not finite out of the log.")
    non_finite: Literal["stop", "skip"] = option(
        "stop",
        "A loss or gradient that is not finite ends the run before the weights see it, or has its step left out; its "
        "batch is saved either way.",
    )

    # The order of --help; fields that are not named here follow at the end.
    field_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "model": ("model_name_or_path", "attn_implementation", "disable_dropout", "trust_remote_code"),
        "data": ("data", "eval_data", "max_seq_len"),
        **TRAINING_GROUPS,
        "speed and memory": ("matmul_precision", "engine", "zero_stage", "offload", "deepspeed", "use_cpu"),
    }
    description: ClassVar[str]
    examples: ClassVar[str]

    def __post_init__(self) -> None:
        self.started = time.time()
        self.changed = sorted(
            field.name for field in fields(self) if field.init and not _is_default(getattr(self, field.name), field)
        )
        for name in self.changed:
            if name in REFUSED:
                raise InputError(f"{name}={getattr(self, name)!r}: {REFUSED[name]}")
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.zero_stage is None:
            self.zero_stage = default_zero_stage(on_cpu=self.use_cpu, bf16=self.bf16, offload=self.offload)
        self._check_fields()
        for name in self.model_fields:
            path = getattr(self, name)
            if path is not None and user_path(path, name).exists():
                # A saved adapter names its base model: a relative path would hold only where training was started.
                setattr(self, name, str(user_path(path).resolve()))
            elif path is not None and path.startswith(("/", "./", "../", "~")):
                raise InputError(f"{name}={path!r}: no such directory.")
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            given = getattr(self, name, None)
            unknown = [key for key in given if key not in CHECKPOINTING_KEYS] if isinstance(given, dict) else []
            self._need(
                not unknown, name, f"there is no {', '.join(map(str, unknown))}; {', '.join(CHECKPOINTING_KEYS)}."
            )
        if (
            compat.ACTIVATION_CHECKPOINTING
            and self.gradient_checkpointing is not None
            and self.activation_checkpointing is None
        ):
            # transformers' new name, so that the usual one brings no deprecation warning
            self.activation_checkpointing, self.gradient_checkpointing = self.gradient_checkpointing, None
        if self.ddp_find_unused_parameters is None:
            # transformers assumes the worst of a module that is not a model of its own class, at a cost per step.
            self.ddp_find_unused_parameters = False
        if self.use_cpu:
            announce_cpu()
        if self.engine == "deepspeed":
            ensure_launcher_environment()
            if self.deepspeed is None:
                self.deepspeed = deepspeed_config(
                    self.zero_stage, offload=self.offload, on_accelerator=not self.use_cpu
                )
        else:
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # left behind by an earlier run in this process
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.init}
        try:
            super().__post_init__()
        except Exception as error:  # transformers, accelerate and DeepSpeed raise many types, and few name the field
            text = str(error) or type(error).__name__
            raise InputError(text + self._suspects(given, text)) from error
        self._check_optimizer()

    model_fields: ClassVar[tuple[str, ...]] = ("model_name_or_path",)
    best_metrics: ClassVar[tuple[str, ...]] = ("loss",)  # metrics of a stage's evaluation

    @property
    def stage(self) -> str:
        """Return the stage's name on the command line."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(self).__name__.removesuffix("Config")).lower()

    @property
    def data_parallel_size(self) -> int:
        """Return the number of processes that get batches of their own."""
        return self.world_size // getattr(self, "sequence_parallel", 1)

    @property
    def global_batch(self) -> int:
        """Return the number of rows of an optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.data_parallel_size

    @property
    def data_parallel_rank(self) -> int:
        """Return this process's data-parallel rank. The processes of one sequence-parallel group share it."""
        return self.process_index // getattr(self, "sequence_parallel", 1)

    def _suspects(self, given: dict[str, Any], text: str) -> str:
        """Return text that names the fields an error may be about; empty if the error names one."""
        changed = {name: given[name] for name in self.changed}
        if any(name in text for name in changed):
            return ""
        quoted = {name: value for name, value in changed.items() if str(value) in text}
        return f" ({', '.join(f'{name}={value!r}' for name, value in (quoted or changed).items())})"

    def _need(self, ok: bool, name: str, fix: str) -> None:
        if not ok:
            raise InputError(f"{name}={getattr(self, name)!r}: {fix}")

    def _check_optimizer(self) -> None:
        """Make the optimizer and the schedule for one number. Raises InputError if that fails."""
        from transformers import Trainer, get_scheduler

        self.optim = optim = getattr(self.optim, "value", self.optim)
        for part, reason in REFUSED_OPTIMIZERS.items():
            self._need(part not in optim, "optim", f"it {reason}; use adamw_torch or another.")
        takes_modules = optim.startswith(("galore", "apollo"))
        self._need(takes_modules or not self.optim_target_modules, "optim_target_modules", f"optim {optim} takes none.")
        try:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(self, torch.nn.Module())
            plain = copy.copy(self)
            plain.optim_args = None
            same = not self.optim_args or options == Trainer.get_optimizer_cls_and_kwargs(plain, torch.nn.Module())[1]
            made = None if takes_modules else kind([torch.nn.Parameter(torch.zeros(1))], **options)
        except Exception as error:  # optimizers and missing packages raise many types
            given = "" if self.optim_args is None else f", optim_args={self.optim_args!r}"
            raise InputError(f"optim={optim!r}{given}: {str(error) or type(error).__name__}") from error
        self._need(not self.optim_args or not same, "optim_args", f"optim {optim} takes none of them.")
        if made is None:
            return
        try:
            get_scheduler(self.lr_scheduler_type, made, 0, 10, scheduler_specific_kwargs=self.lr_scheduler_kwargs)
        except Exception as error:
            name = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
            raise InputError(
                f"lr_scheduler_type={name!r}, lr_scheduler_kwargs={self.lr_scheduler_kwargs!r}: {error}"
            ) from error

    def _check_fields(self) -> None:
        """Raises InputError for the first field that cannot work."""
        need = self._need
        need(
            bool(self.model_name_or_path), "model_name_or_path", "name the model to train (a directory or a Hub name)."
        )
        need(bool(self.data), "data", "name the training data (a file or a directory).")
        need(bool(self.output_dir), "output_dir", "name the directory that everything is written to.")
        trackers = [self.report_to] if isinstance(self.report_to, str) else self.report_to or ["none"]
        self.report_to = [part.strip() for name in trackers for part in name.split(",")]
        hub.check_trackers(self.report_to)
        hub.check_hub(self)
        need(self.max_seq_len >= 2, "max_seq_len", "at least 2 tokens are needed.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            need(getattr(self, name) >= 1, name, "at least 1 is needed.")
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            need(0 <= getattr(self, name) <= LARGEST, name, "a number of at least 0 is needed, that float32 has.")
        need(LEAST <= self.adam_epsilon <= LARGEST, "adam_epsilon", "a positive number is needed, that float32 has.")
        need(
            self.max_steps > 0 or 0 < self.num_train_epochs <= MOST_EPOCHS,
            "num_train_epochs",
            f"a positive number is needed, of at most {MOST_EPOCHS:,}.",
        )
        need(
            self.max_steps > 0 or self.max_steps == -1, "max_steps", "at least 1 is needed, or -1 for num_train_epochs."
        )
        need(0 <= self.seed < 2**32, "seed", "a number from 0 to 4294967295 is needed.")
        need(
            self.data_seed is None or 0 <= self.data_seed < 2**32,
            "data_seed",
            "a number from 0 to 4294967295 is needed.",
        )
        for name in ("eval_accumulation_steps", "torch_empty_cache_steps"):
            need(getattr(self, name) is None or getattr(self, name) >= 1, name, "at least 1 is needed.")
        for name in ("eval_delay", "dataloader_num_workers"):
            need(getattr(self, name) >= 0, name, "a number of at least 0 is needed.")
        need(
            not self.dataloader_persistent_workers or self.dataloader_num_workers > 0,
            "dataloader_persistent_workers",
            "needs dataloader_num_workers above 0.",
        )
        contexts = multiprocessing.get_all_start_methods()
        context = compat.multiprocessing_context(self)
        need(
            context in (None, *contexts),
            "dataloader_multiprocessing_context",
            f"one of {', '.join(contexts)} is needed.",
        )
        need(
            context is None or self.dataloader_num_workers > 0,
            "dataloader_multiprocessing_context",
            "needs dataloader_num_workers above 0.",
        )
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        need(not (self.ddp_backend and alone), "ddp_backend", "needs several processes (torchrun --nproc-per-node).")
        need(self.ddp_timeout >= 1, "ddp_timeout", "at least 1 second is needed.")
        need((self.save_total_limit or 0) >= 0, "save_total_limit", "at least 1 is needed, or 0 to keep all.")
        for strategy, name in (("eval_strategy", "eval_steps"), ("save_strategy", "save_steps")):
            steps = getattr(self, name)
            is_used = getattr(self, strategy) == "steps" and steps is not None
            need(not is_used or steps > 0, name, f"a positive number is needed for {strategy} steps.")
        need(
            self.logging_strategy != "steps" or self.logging_steps > 0, "logging_steps", "a positive number is needed."
        )
        metric = (self.metric_for_best_model or "loss").removeprefix("eval_")
        need(
            metric in self.best_metrics,
            "metric_for_best_model",
            f"one of {', '.join(self.best_metrics)} is needed.",
        )
        keeps_best = self.load_best_model_at_end or self.save_strategy == "best"
        if keeps_best:
            self.metric_for_best_model = metric
            need(
                self.eval_strategy != "no" and self.save_strategy in (self.eval_strategy, "best"),
                "save_strategy",
                "the best model is known by a checkpoint at each evaluation: give save_strategy the value of "
                f"eval_strategy ({self.eval_strategy!r}), or best.",
            )
        self.matmul_precision = resolve(self.matmul_precision, on_cpu=self.use_cpu)
        need(self.lora_r >= 0, "lora_r", "a rank of at least 1 is needed, or 0 for no LoRA.")
        need(LEAST <= self.lora_alpha <= LARGEST, "lora_alpha", "a positive number is needed, that float32 has.")
        need(0 <= self.lora_dropout < 1, "lora_dropout", "a number in [0, 1) is needed.")
        need(
            self.zero_stage in (0, 1, 2, 3),
            "zero_stage",
            "0, 1, 2 or 3 is needed (engine=torch runs without DeepSpeed).",
        )
        need(not (self.offload and self.zero_stage == 0), "offload", "needs zero_stage 1, 2 or 3.")
        if self.engine == "torch":
            need(not self.offload, "offload", "needs engine=deepspeed.")
            need(self.deepspeed is None, "deepspeed", "needs engine=deepspeed.")
        need(
            self.train_sampling_strategy in ("random", "sequential", "group_by_length"),
            "train_sampling_strategy",
            "random, sequential or group_by_length is needed.",
        )
        for name in (one.name for one in fields(self)):
            value = getattr(self, name, None)
            need(not isinstance(value, float) or math.isfinite(value), name, "a finite number is needed.")


@dataclass
class CausalConfig(TrainConfig):
    """The fields of all stages that train a causal LM on completions through the fused head."""

    max_seq_len: int = option(512, "Longest prompt plus completion, in tokens; prompts are cut on the left to fit.")
    max_gen_len: int = option(256, "Longest completion, in tokens with EOS; cut on the right.")
    memory_budget: str | None = option(None, "Scratch for vocabulary-sized values, e.g. 512MB. Default: 640MiB.")
    backend: Literal["auto", "torch", "triton", "reference"] = option("auto", "Implementation of the fused loss.")

    field_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        **TrainConfig.field_groups,
        "data": ("data", "eval_data", "max_seq_len", "max_gen_len"),
        "speed and memory": ("memory_budget", "backend", *TrainConfig.field_groups["speed and memory"]),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            choose(self.backend, torch.empty(0, device=self.device))
        except ValueError as error:
            raise InputError(str(error)) from error

    @property
    def memory_budget_bytes(self) -> int | None:
        """Return `memory_budget` in bytes; None if it is unset."""
        return None if self.memory_budget is None else parse_size(self.memory_budget)

    def _check_fields(self) -> None:
        super()._check_fields()
        self._need(self.max_gen_len >= 1, "max_gen_len", "at least 1 token is needed.")
        self._need(
            self.max_seq_len > self.max_gen_len,
            "max_seq_len",
            f"must be larger than max_gen_len={self.max_gen_len}, so that some of the prompt fits.",
        )
        if self.memory_budget is not None:
            parse_size(self.memory_budget)


def default_of(field: Field) -> Any:
    """Return the default of a field, ignoring presets."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return AFTER_PRESETS.get(field.name) if field.default is None else field.default


def _is_default(value: Any, field: Field) -> bool:
    """Check whether a field has its default; transformers has several words for off."""
    default = default_of(field)
    return value == default or all(one is None or one is False or one in ("", "no", []) for one in (value, default))
