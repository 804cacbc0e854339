"""The stage `exo-fast align`, from a configuration to an aligned model: read it from top to bottom."""

import gc
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from exo_fast.data.examples import Example
from exo_fast.data.selection import DUPLICATES, TIES, LeftOut, left_out_lines
from exo_fast.layout import plan_mask
from exo_fast.metrics import GROUP_METRICS
from exo_fast.reference import default_label_smoothing
from exo_fast.training.data.examples import load_examples
from exo_fast.training.data.groups import GroupCollator, GroupDataset
from exo_fast.training.data.places import Source
from exo_fast.training.errors import InputError
from exo_fast.training.machine import give_back_freed_memory
from exo_fast.training.models.causal import add_lora, check_lora, load_causal_lm
from exo_fast.training.models.loading import from_pretrained, load_tokenizer, refuse_adapter
from exo_fast.training.models.modules import AlignModule
from exo_fast.training.models.sequence_parallel import SEQUENCE_PARALLEL_CORES, SequenceParallel, refusal
from exo_fast.training.models.sharing import settle_layout
from exo_fast.training.models.tiled_mlp import tile_mlps
from exo_fast.training.options import option, temperature_problem
from exo_fast.training.trainer import compat, non_finite
from exo_fast.training.trainer.config import AFTER_PRESETS, TRAINING_GROUPS, CausalConfig
from exo_fast.training.trainer.continuing import resume_or_start
from exo_fast.training.trainer.finishing import losses_line
from exo_fast.training.trainer.reference_logps import fill_reference_logps
from exo_fast.training.trainer.run import train, training_scope
from exo_fast.training.trainer.splits import find_training_splits, table, tokenize_splits
from exo_fast.training.trainer.trainer import StageTrainer
from exo_fast.validate import LARGEST, LEAST, LEAST_SMOOTHING


@dataclass
class AlignConfig(CausalConfig):
    """The fields of `exo-fast align`. Raises InputError for a value that cannot work, naming it and the fix."""

    # Model
    ref_name_or_path: str | None = option(
        None,
        "The reference model. Default: the policy as it is before training (with LoRA, its adapters off).",
    )
    disable_dropout: bool = option(
        True, "Train without dropout, which would put noise between the policy and its reference."
    )

    # Data
    data: str | None = option(
        None,
        "Training data: a .json, .jsonl or .parquet file, a directory with train.* (and test.*), a dataset saved by "
        "save_to_disk, or a name of the registry (hh/pref:PATH). Rows: prompt, completions, rewards; or prompt, "
        "chosen, rejected.",
    )

    # Loss
    loss_type: Literal["exo-pref", "exo-rw", "dpo-pref", "dpo-rw"] = option(
        "exo-pref", "EXO (reverse KL) or DPO (forward KL); the best candidate or the rewards as target."
    )
    num_contrastive: int | None = option(
        None,
        "Candidates per group. A prompt with more gives several groups, drawn from its candidates where these do not "
        "come out even; one with fewer is left out. Default: all, the same number for every prompt.",
    )
    duplicates: Literal["drop", "error", "keep"] = option(
        "drop",
        "Groups whose candidates are all the same tokens, or that hold the same tokens with different rewards: leave "
        "them out, with a count; end before training; or learn from them.",
    )
    ties: Literal["error", "drop", "share"] = option(
        "error",
        "Groups in which several candidates have the highest reward, in exo-pref and dpo-pref: end before training; "
        "leave them out, with a count; or give the best ones equal shares of the target.",
    )
    beta_pi: float = option(0.1, "Weight of the log-ratio: the policy's implicit reward is beta_pi * log-ratio.")
    beta_r: float = option(0.1, "Temperature of the given rewards in exo-rw and dpo-rw.")
    label_smoothing: float | None = option(
        None,
        "Target mass on the candidates that are not the best, in exo-pref and dpo-pref. Default: 1e-3 and 0.",
    )
    temperature: float = option(1.0, "Sampling temperature of the candidates; both models' logits are divided by it.")

    # Speed and memory
    share_prompt: Literal["auto", "off"] = option(
        "auto", "Run each prompt once for all its candidates where the model can; off: one row per candidate."
    )
    long_sequence: bool = option(
        False,
        "For rows that fill the memory: sets what is not named itself to gradient_checkpointing true, "
        "per_device_train_batch_size 1, per_device_eval_batch_size 1 (also of the reference pass) and tiled_mlp true; "
        "on CUDA also attn_implementation flex_attention, which skips what a mask excludes, and "
        'activation_checkpointing_kwargs {"offload": true}, what is kept for the backward pass in CPU memory. '
        "(flash_attention_2 reads no mask: name it with share_prompt off.)",
    )
    tiled_mlp: bool | None = option(
        None,
        "Run each MLP on a piece of the tokens after another and again in backward: its inner activations are those of "
        "one piece. Default: false; true with long_sequence.",
    )
    sequence_parallel: int = option(
        1,
        "Processes, one after another, that share each row: a part of its tokens in each, and in attention some of the "
        "heads (Ulysses). Must divide the number of processes.",
    )
    reference_cache_dir: str = option(
        "~/.cache/exo_fast/reference",
        "Where reference log-probs are kept, under a hash of what they depend on.",
    )

    # Other defaults
    output_dir: str | None = option("runs/align", "Where the model, checkpoints, logs and summary.json are written.")
    learning_rate: float = option(1e-6, "The initial learning rate.")
    per_device_train_batch_size: int | None = option(
        None, "Groups (a prompt and its candidates) per device and micro-batch. Default: 8; 1 with long_sequence."
    )
    per_device_eval_batch_size: int | None = option(
        None, "Groups per device in evaluation and the reference pass. Default: 8; 1 with long_sequence."
    )

    field_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "model": (
            "model_name_or_path",
            "ref_name_or_path",
            "attn_implementation",
            "disable_dropout",
            "trust_remote_code",
        ),
        "data": CausalConfig.field_groups["data"],
        "loss": (
            "loss_type",
            "num_contrastive",
            "duplicates",
            "ties",
            "beta_pi",
            "beta_r",
            "label_smoothing",
            "temperature",
        ),
        **TRAINING_GROUPS,
        "speed and memory": (
            "share_prompt",
            "long_sequence",
            "tiled_mlp",
            "sequence_parallel",
            *CausalConfig.field_groups["speed and memory"],
            "reference_cache_dir",
        ),
    }
    model_fields: ClassVar[tuple[str, ...]] = ("model_name_or_path", "ref_name_or_path")
    best_metrics: ClassVar[tuple[str, ...]] = ("loss", *GROUP_METRICS)
    description: ClassVar[str] = """\
Align a language model by EXO or DPO on K candidate completions per prompt.

Every field may stand in a YAML recipe (--config) and on the command line, which wins. The same command continues a
run that was interrupted."""
    examples: ClassVar[str] = """\
examples:
  exo-fast align --model_name_or_path models/sft --data data/rw --loss_type exo-rw --output_dir runs/exo-rw
  exo-fast align --config recipes/align.yaml
  exo-fast align --config recipes/align.yaml --loss_type dpo-rw --num_contrastive 4 --output_dir runs/dpo-rw
  exo-fast align --model_name_or_path models/sft --data data/rw --lora_r 16 --learning_rate 1e-4
  torchrun --nproc-per-node 2 -m exo_fast.training.cli align --config recipes/align.yaml --zero_stage 3
  torchrun --nproc-per-node 8 -m exo_fast.training.cli align --config recipes/align.yaml --long_sequence \\
    --sequence_parallel 4
  deepspeed --module exo_fast.training.cli align --config recipes/align.yaml
  tensorboard --logdir runs/align
"""

    def __post_init__(self) -> None:
        self.preset = apply(self) if self.long_sequence else {}
        for name, default in AFTER_PRESETS.items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        super().__post_init__()
        if self.label_smoothing is None:
            self.label_smoothing = default_label_smoothing(self.loss_type)
        self._need(
            self.world_size % self.sequence_parallel == 0,
            "sequence_parallel",
            f"the number of processes, {self.world_size}, must be a multiple of it (torchrun --nproc-per-node).",
        )

    def _check_fields(self) -> None:
        super()._check_fields()
        need = self._need
        need(
            self.num_contrastive is None or self.num_contrastive >= 2,
            "num_contrastive",
            "at least 2 candidates are compared.",
        )
        need(self.duplicates in DUPLICATES, "duplicates", f"one of {', '.join(DUPLICATES)} is needed.")
        need(self.ties in TIES, "ties", f"one of {', '.join(TIES)} is needed.")
        need(self.sequence_parallel >= 1, "sequence_parallel", "at least 1 process is needed.")
        need(
            self.sequence_parallel == 1 or self.attn_implementation in (None, *SEQUENCE_PARALLEL_CORES),
            "attn_implementation",
            f"sequence_parallel exchanges heads around one of {', '.join(SEQUENCE_PARALLEL_CORES)}; name one of them.",
        )
        for name in ("beta_pi", "beta_r"):
            need(LEAST <= getattr(self, name) <= LARGEST, name, "a positive number is needed, that float32 has.")
        problem = temperature_problem(self.temperature)
        need(problem is None, "temperature", f"{problem}.")
        if self.label_smoothing is not None:
            need(
                self.loss_type.endswith("-pref"),
                "label_smoothing",
                f"{self.loss_type} takes its targets from rewards.",
            )
            need(0 <= self.label_smoothing < 1, "label_smoothing", "a number in [0, 1) is needed.")
            need(
                self.label_smoothing >= LEAST_SMOOTHING or self.loss_type == "dpo-pref",
                "label_smoothing",
                f"exo-pref needs at least {LEAST_SMOOTHING}, because it takes the logarithm of every target (default "
                "1e-3).",
            )


def align(config: AlignConfig) -> dict[str, Any]:
    """Align `config.model_name_or_path` on `config.data` and write everything to `config.output_dir`.

    It writes the model (or its LoRA adapter) as safetensors with its tokenizer, loadable by from_pretrained;
    checkpoints; trainer_state.json; TensorBoard logs; summary.json; report.html and README.md, the model card. Returns
    the summary. Raises InputError, before any training, for data, models or directories that cannot work.
    """
    checkpoint, finished = resume_or_start(config)
    if finished is not None:
        return finished
    if config.long_sequence and config.device.type == "cpu":
        give_back_freed_memory()
    sources = find_training_splits(config)
    refuse_adapter(config.model_name_or_path)
    tokenizer = load_tokenizer(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    check_models(config)
    check_lora(config, "CAUSAL_LM")
    left_out = {name: LeftOut() for name in sources}
    datasets = tokenize_splits(
        config,
        read_data(config, sources, tokenizer, left_out),
        tokenizer,
        num_contrastive=config.num_contrastive,
        loss_type=config.loss_type,
        duplicates=config.duplicates,
        ties=config.ties,
        left_out=left_out,
    )
    check_rewards(config, datasets)
    if config.process_index == 0:
        print(data_table(datasets, config.max_seq_len, config.max_gen_len), flush=True)
        if config.preset:
            print(preset_line(config.preset), flush=True)

    with training_scope(config):
        cache_hits = {}
        if config.ref_name_or_path not in (None, config.model_name_or_path):
            cache_hits = _fill_from_separate_reference(config, tokenizer, datasets)
            gc.collect()  # ZeRO-3 keeps the model in reference cycles
        policy = add_lora(config, load_causal_lm(config, config.model_name_or_path), "CAUSAL_LM")
        trainer = AlignTrainer(make_module(config, policy), config, datasets, tokenizer)
        return train(
            trainer,
            config,
            checkpoint,
            about=lambda: {
                "data": {name: asdict(dataset.counts) for name, dataset in datasets.items()},
                "layout": trainer.layout,
                "reference_cache_hits": cache_hits | trainer.reference_cache_hits,
            },
            closing=_closing_lines,
        )


# Data


def read_data(
    config: AlignConfig,
    sources: dict[str, Source],
    tokenizer: PreTrainedTokenizerBase,
    left_out: dict[str, LeftOut] | None = None,
) -> dict[str, list[Example]]:
    """Read and check the rows of each split. Conversations become text through the tokenizer's chat template. Rows with
    too few candidates are noted in `left_out`."""
    options = {"loss_type": config.loss_type, "num_contrastive": config.num_contrastive, "tokenizer": tokenizer}
    left_out = left_out or {}
    return {name: load_examples(source, left_out=left_out.get(name), **options) for name, source in sources.items()}


def check_rewards(config: AlignConfig, datasets: dict[str, GroupDataset]) -> None:
    """Raises InputError if rewards are too large to be divided by beta_r."""
    if config.loss_type.endswith("-rw"):
        largest = max(float(dataset.rewards.abs().max()) for dataset in datasets.values())
        if largest / config.beta_r > LARGEST:
            raise InputError(
                f"beta_r={config.beta_r!r}: rewards of up to {largest:.3g} divided by it are infinite in float32; give "
                "beta_r the size of the differences between rewards."
            )


def data_table(datasets: dict[str, GroupDataset], max_seq_len: int, max_gen_len: int) -> str:
    """Describe the training data and the savings of prompt sharing, as aligned lines."""
    counts = [dataset.counts for dataset in datasets.values()]
    lines = table(
        [
            ("", list(datasets)),
            ("examples", [c.examples for c in counts]),
            ("groups", [c.groups for c in counts]),
            ("groups left out", [sum(c.left_out.values()) for c in counts]),
            ("candidates per group", [c.candidates for c in counts]),
            ("longest sequence", [c.longest_sequence for c in counts]),
            (f"prompts cut to fit {max_seq_len}", [c.cut_prompts for c in counts]),
            (f"completions cut to {max_gen_len}", [c.cut_completions for c in counts]),
            ("tokens, prompts shared", [c.shared_tokens for c in counts]),
            ("tokens, a prompt per candidate", [c.unshared_tokens for c in counts]),
            (f"tokens, padded to {max_seq_len}", [c.groups * c.candidates * max_seq_len for c in counts]),
        ]
    )
    found = left_out_lines({name: asdict(dataset.counts) for name, dataset in datasets.items()})
    lines = "\n".join([lines, *found])
    return lines if "eval" in datasets else f"{lines}\nno held-out data: nothing is evaluated"


# Models


def make_module(config: AlignConfig, policy: nn.Module) -> AlignModule:
    """Make the module around `policy` whose forward is the configured loss. With sequence_parallel, all processes must
    call it."""
    plan = plan_mask(policy.config)
    if config.tiled_mlp:
        tile_mlps(policy, max_seq_len=config.max_seq_len)
    return AlignModule(
        policy,
        plan,
        loss_type=config.loss_type,
        beta_pi=config.beta_pi,
        beta_r=config.beta_r,
        label_smoothing=config.label_smoothing,
        ties="share",  # the data was already checked for ties that are not allowed
        temperature=config.temperature,
        memory_budget=config.memory_budget_bytes,
        backend=config.backend,
        sequence=SequenceParallel(policy, config.sequence_parallel) if config.sequence_parallel > 1 else None,
    )


@torch.no_grad()
def _fill_from_separate_reference(
    config: AlignConfig, tokenizer: PreTrainedTokenizerBase, datasets: dict[str, GroupDataset]
) -> dict[str, bool]:
    """Compute reference log-probs with another model than the policy's start. It is freed before the policy is
    loaded."""
    refuse_adapter(config.ref_name_or_path)
    sizes = [
        from_pretrained(AutoConfig, name, trust_remote_code=config.trust_remote_code).get_text_config().vocab_size
        for name in (config.model_name_or_path, config.ref_name_or_path)
    ]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"ref_name_or_path={config.ref_name_or_path!r}: a vocabulary of {sizes[1]} tokens where the "
            f"policy has {sizes[0]}; policy and reference must share a tokenizer."
        )
    module = make_module(config, load_causal_lm(config, config.ref_name_or_path))
    if config.engine == "deepspeed" and config.hf_deepspeed_config.is_zero3():
        import deepspeed

        engine_config = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": config.bf16},
            "zero_optimization": {"stage": 3},
        }
        module = deepspeed.initialize(model=module, config=engine_config)[0].module
        module.register_head()
    else:
        module.to(config.device)
    collate = GroupCollator(tokenizer.eos_token_id)
    autocast = config.bf16 and config.engine == "torch"
    with torch.autocast(config.device.type, torch.bfloat16, enabled=autocast):
        settle_layout(module, datasets["train"], collate, share_prompt=config.share_prompt == "auto")
        return fill_reference_logps(config, module, config.ref_name_or_path, datasets, collate)


def _closing_lines(summary: dict[str, Any]) -> str:
    lines = []
    for name, metrics in summary["metrics"].items():
        prefix, last = "eval_" if name == "eval" else "", metrics["last"]
        accuracy, kl = last[prefix + "group_accuracy"], last[prefix + "kl"]
        lines.append(f"{losses_line(summary, name)}, group accuracy {accuracy:.2f}, KL {kl:.2f} nats")
    return "\n".join(lines)


def apply(config: Any) -> dict[str, Any]:
    """Set the fields of an AlignConfig that the preset covers and that are still None; return their names and
    values."""
    wanted: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "tiled_mlp": True,
    }
    activation_checkpointing = getattr(config, "activation_checkpointing", None)  # transformers' newer name for it
    if activation_checkpointing is None:
        wanted["gradient_checkpointing"] = True
    if torch.cuda.is_available() and not config.use_cpu:
        wanted["attn_implementation"] = "flex_attention"
        checkpointing = config.gradient_checkpointing is not False and activation_checkpointing is not False
        if compat.ACTIVATION_CHECKPOINTING and checkpointing:
            wanted["activation_checkpointing_kwargs"] = {"offload": True}
    chosen = {name: value for name, value in wanted.items() if getattr(config, name) is None}
    for name, value in chosen.items():
        setattr(config, name, value)
    return chosen


def preset_line(chosen: dict[str, Any]) -> str:
    """Describe for the terminal which fields the preset set."""
    return "long_sequence: " + ", ".join(f"{name} {value}" for name, value in chosen.items())


def check_models(config: AlignConfig) -> None:
    """Raises InputError if rows of the policy or the reference cannot be spread over `config.sequence_parallel`
    ranks. Reads the models' configurations, not their weights."""
    if config.sequence_parallel == 1:
        return
    for name in dict.fromkeys((config.model_name_or_path, config.ref_name_or_path or config.model_name_or_path)):
        model = from_pretrained(AutoConfig, name, trust_remote_code=config.trust_remote_code)
        reason = refusal(model, config.sequence_parallel)
        if reason:
            raise InputError(f"sequence_parallel={config.sequence_parallel}: {name!r} ({model.model_type}): {reason}.")


class AlignTrainer(StageTrainer):
    """Trains an AlignModule on a GroupDataset and reports the loss and metrics of exo_fast.metrics.

    Data sets without reference log-probs get them from the policy before its first step.
    """

    def __init__(
        self,
        module: AlignModule,
        config: AlignConfig,
        datasets: dict[str, GroupDataset],
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.reference_cache_hits: dict[str, bool] = {}
        self.layout: dict[str, Any] = {}
        super().__init__(module, config, datasets, tokenizer, GroupCollator(tokenizer.eos_token_id))

    def describe_rows(self, indices: list[int]) -> str:
        """Describe rows by the examples they come from, each of which may give several groups."""
        counts = self.train_dataset.counts
        each = max(1, counts.groups // counts.examples)
        examples = sorted({index // each for index in indices})
        return f"examples {non_finite.format_rows(examples)} of the training data (counted from 0)"

    def _before_start(self) -> None:
        self.layout = settle_layout(
            self.model, self.train_dataset, self.data_collator, share_prompt=self.args.share_prompt == "auto"
        )
        datasets = {"train": self.train_dataset, "eval": self.eval_dataset}
        missing = {name: data for name, data in datasets.items() if data is not None and data.ref_logps is None}
        self.reference_cache_hits |= fill_reference_logps(
            self.args, self.model, self.args.model_name_or_path, missing, self.data_collator
        )
