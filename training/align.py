"""The stage `exo-fast align`, from a configuration to an aligned model: read it from top to bottom."""

import gc
import json
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.trainer_utils import IntervalStrategy, get_last_checkpoint

from exo_fast.head import read_head
from exo_fast.layout import plan_mask
from exo_fast.training.config import AlignConfig
from exo_fast.training.data.examples import Example, load_examples
from exo_fast.training.data.groups import GroupCollator, GroupDataset, tokenize
from exo_fast.training.data.records import find_source
from exo_fast.training.deepspeed import start_on_cpu
from exo_fast.training.errors import InputError
from exo_fast.training.module import AlignModule, settle_layout
from exo_fast.training.reference_logps import fill_reference_logps
from exo_fast.training.trainer import AlignTrainer

VERSIONS = ("exo_fast", "torch", "transformers", "accelerate", "deepspeed", "peft", "datasets")


def align(config: AlignConfig) -> dict[str, Any]:
    """Align `config.model_name_or_path` on `config.data` and write everything to `config.output_dir`.

    There: the model (or its LoRA adapter) as safetensors with its tokenizer, loadable by from_pretrained;
    checkpoints; trainer_state.json; TensorBoard logs; summary.json. Returns the summary. Raises InputError,
    before any training, for data, models or directories that cannot work.
    """
    started = time.time()
    set_seed(config.seed)
    checkpoint = _resume_checkpoint(config)
    examples = read_data(config)
    tokenizer = _from_pretrained(AutoTokenizer, config, config.model_name_or_path)
    datasets = tokenize_data(config, examples, tokenizer)
    _check_fits_model(config, datasets)
    if config.process_index == 0:
        print(data_table(datasets, config.max_seq_len, config.max_gen_len), flush=True)
    if "eval" not in datasets:
        config.eval_strategy, config.do_eval = IntervalStrategy.NO, False

    with _matmul_precision(config), _deepspeed_scope(config):
        cache_hits = {}
        if config.ref_name_or_path not in (None, config.model_name_or_path):
            cache_hits = _fill_from_separate_reference(config, tokenizer, datasets)
            gc.collect()  # of a model in reference cycles, which ZeRO-3 makes
        policy = _add_lora(config, load_model(config, config.model_name_or_path))
        trainer = AlignTrainer(make_module(config, policy), config, datasets, tokenizer)
        output = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        if "eval" in datasets and not _evaluated_at(trainer.state.log_history, trainer.state.global_step):
            trainer.evaluate()
        trainer.save_state()
    summary = {
        "config": config.to_dict(),
        "versions": {name: _version(name) for name in VERSIONS} | {"python": platform.python_version()},
        "device": str(config.device),
        "processes": config.world_size,
        "data": {name: asdict(dataset.counts) for name, dataset in datasets.items()},
        "layout": trainer.layout,
        "reference_cache_hits": cache_hits | trainer.reference_cache_hits,
        "resumed_from": checkpoint,
        "steps": trainer.state.global_step,
        "metrics": _first_and_last(trainer.state.log_history),
        "train_seconds": round(output.metrics["train_runtime"], 3),
        "total_seconds": round(time.time() - started, 3),
        **trainer.throughput(),
    }
    if config.process_index == 0:
        Path(config.output_dir, "summary.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")
        print(_closing_lines(summary, config), flush=True)
    return summary


# Data


def read_data(config: AlignConfig) -> dict[str, list[Example]]:
    """The checked rows to train on and, where there are any, to evaluate on: {"train": …, "eval": …}."""
    sources = {"train": find_source(config.data, "train")}
    if sources["train"] is None:
        raise InputError(f"data={config.data!r}: the directory holds no train.json, train.jsonl or train.parquet.")
    if config.eval_data is not None:
        sources["eval"] = find_source(config.eval_data, "eval") or find_source(config.eval_data, "train")
        if sources["eval"] is None:
            raise InputError(f"eval_data={config.eval_data!r}: the directory holds no test.json, .jsonl or .parquet.")
    elif Path(config.data).expanduser().is_dir() and (held_out := find_source(config.data, "eval")) is not None:
        sources["eval"] = held_out
    return {
        name: load_examples(source, loss_type=config.loss_type, num_contrastive=config.num_contrastive)
        for name, source in sources.items()
    }


def tokenize_data(
    config: AlignConfig, examples: dict[str, list[Example]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, GroupDataset]:
    """The rows of each split as tokenised groups."""
    return {
        name: tokenize(
            rows,
            tokenizer,
            num_contrastive=config.num_contrastive,
            max_seq_len=config.max_seq_len,
            max_gen_len=config.max_gen_len,
            description=f"tokenising ({name})",
            progress=config.process_index == 0 and not config.disable_tqdm,
        )
        for name, rows in examples.items()
    }


def data_table(datasets: dict[str, GroupDataset], max_seq_len: int, max_gen_len: int) -> str:
    """What will be trained on and what sharing prompts saves, as aligned lines."""
    counts = [dataset.counts for dataset in datasets.values()]
    rows = [
        ("", list(datasets)),
        ("examples", [c.examples for c in counts]),
        ("groups", [c.groups for c in counts]),
        ("candidates per group", [c.candidates for c in counts]),
        ("longest sequence", [c.longest_sequence for c in counts]),
        (f"prompts cut to fit {max_seq_len}", [c.cut_prompts for c in counts]),
        (f"completions cut to {max_gen_len}", [c.cut_completions for c in counts]),
        ("tokens, prompts shared", [c.shared_tokens for c in counts]),
        ("tokens, a prompt per candidate", [c.unshared_tokens for c in counts]),
        (f"tokens, padded to {max_seq_len}", [c.groups * c.candidates * max_seq_len for c in counts]),
    ]
    lines = [
        f"{name:<32}" + "".join(f"{cell:>14,}" if isinstance(cell, int) else f"{cell:>14}" for cell in cells)
        for name, cells in rows
    ]
    return "\n".join(lines if "eval" in datasets else [*lines, "no held-out data: nothing is evaluated"])


def _check_fits_model(config: AlignConfig, datasets: dict[str, GroupDataset]) -> None:
    model_config = _from_pretrained(AutoConfig, config, config.model_name_or_path).get_text_config()
    limit, vocabulary = getattr(model_config, "max_position_embeddings", None), model_config.vocab_size
    for dataset in datasets.values():
        longest = dataset.counts.longest_sequence
        if limit is not None and longest > limit:
            raise InputError(
                f"max_seq_len={config.max_seq_len}: the longest sequence has {longest} tokens, and the model "
                f"positions for {limit}; set max_seq_len to at most {limit}."
            )
        largest = max(int(dataset.prompt_ids.max()), int(dataset.completion_ids.max()))
        if largest >= vocabulary:
            raise InputError(
                f"model_name_or_path={config.model_name_or_path!r}: its tokenizer gives id {largest} and its "
                f"vocabulary has {vocabulary}; the tokenizer belongs to another model, or the model's "
                "embeddings were not resized."
            )


# Models


def _from_pretrained(auto_class: Any, config: AlignConfig, name_or_path: str, **options: Any) -> Any:
    if Path(name_or_path, "adapter_config.json").is_file():
        raise InputError(
            f"{name_or_path!r}: a LoRA adapter, where a whole model is needed; merge it first: "
            "AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload().save_pretrained(…)."
        )
    try:
        return auto_class.from_pretrained(name_or_path, trust_remote_code=config.trust_remote_code, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{name_or_path!r}: cannot be loaded as {auto_class.__name__}; a directory with a model and its tokenizer, "
            f"or the name of one on the Hub, is needed. {reason}"
        ) from error


def load_model(config: AlignConfig, name_or_path: str) -> nn.Module:
    """A causal LM in the dtype the engine trains: DeepSpeed keeps float32 copies of bf16 weights, autocast does not."""
    attention = {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}
    model = _from_pretrained(AutoModelForCausalLM, config, name_or_path, dtype=_weight_dtype(config), **attention)
    try:
        read_head(model)
    except ValueError as error:
        raise InputError(f"{name_or_path}: {error}") from error
    if config.disable_dropout:
        _disable_dropout(model)
    return model


def _disable_dropout(model: nn.Module) -> None:
    """Dropout layers, and the rates that attention modules hand to a function; the model's config stays as it is."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def make_module(config: AlignConfig, policy: nn.Module) -> AlignModule:
    """The module around `policy` whose forward is the configured loss."""
    return AlignModule(
        policy,
        plan_mask(policy.config),
        loss_type=config.loss_type,
        beta_pi=config.beta_pi,
        beta_r=config.beta_r,
        label_smoothing=config.label_smoothing,
        temperature=config.temperature,
        memory_budget=config.memory_budget_bytes,
        backend=config.backend,
    )


def _add_lora(config: AlignConfig, model: nn.Module) -> nn.Module:
    if config.lora_r == 0:
        return model
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise InputError(f"lora_target_modules={config.lora_target_modules!r}: {error}") from error


def _weight_dtype(config: AlignConfig) -> torch.dtype:
    return torch.bfloat16 if config.bf16 and config.engine == "deepspeed" else torch.float32


# Reference


@torch.no_grad()
def _fill_from_separate_reference(
    config: AlignConfig, tokenizer: PreTrainedTokenizerBase, datasets: dict[str, GroupDataset]
) -> dict[str, bool]:
    """Reference log-probs by another model than the policy's start; it is gone before the policy is loaded."""
    sizes = [
        _from_pretrained(AutoConfig, config, name).get_text_config().vocab_size
        for name in (config.model_name_or_path, config.ref_name_or_path)
    ]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"ref_name_or_path={config.ref_name_or_path!r}: a vocabulary of {sizes[1]} tokens where the "
            f"policy has {sizes[0]}; policy and reference must share a tokenizer."
        )
    module = make_module(config, load_model(config, config.ref_name_or_path))
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


# Surroundings


def _resume_checkpoint(config: AlignConfig) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means; None to start anew, never into an earlier run's directory."""
    wish = (config.resume_from_checkpoint or "false").lower()
    last = get_last_checkpoint(config.output_dir) if Path(config.output_dir).is_dir() else None
    if wish == "auto" or (wish == "true" and last is not None):
        return last
    if wish == "true":
        raise InputError(
            f"resume_from_checkpoint={config.resume_from_checkpoint!r}: no checkpoint in output_dir="
            f"{config.output_dir!r}; use auto to start anew where there is none."
        )
    if wish == "false":
        if last is not None or Path(config.output_dir, "summary.json").exists():
            raise InputError(
                f"output_dir={config.output_dir!r}: holds an earlier run; continue it with "
                "--resume_from_checkpoint auto, or choose another output_dir."
            )
        return None
    if not Path(config.resume_from_checkpoint, "trainer_state.json").is_file():
        raise InputError(
            f"resume_from_checkpoint={config.resume_from_checkpoint!r}: no trainer_state.json there; "
            "name a checkpoint-N directory, or use true or auto."
        )
    return config.resume_from_checkpoint


@contextmanager
def _matmul_precision(config: AlignConfig) -> Iterator[None]:
    """Products of float32 matrices in `config.matmul_precision`, for the time of the context."""
    backend = torch.backends.mkldnn.matmul if config.device.type == "cpu" else torch.backends.cuda.matmul
    before = backend.fp32_precision
    if config.matmul_precision != "ieee":  # ieee is torch's default, and setting it forbids older switches
        backend.fp32_precision = config.matmul_precision
    try:
        yield
    finally:
        backend.fp32_precision = before


@contextmanager
def _deepspeed_scope(config: AlignConfig) -> Iterator[None]:
    """transformers' global DeepSpeed configuration (ZeRO-3 loads weights in shards), for this run and no later one."""
    if config.engine == "deepspeed":
        set_hf_deepspeed_config(config.hf_deepspeed_config)
        if config.device.type == "cpu":
            start_on_cpu()
    else:
        unset_hf_deepspeed_config()
    with warnings.catch_warnings():
        # Names that torch and transformers changed and DeepSpeed and PEFT still use, in every step.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing")
        try:
            yield
        finally:
            unset_hf_deepspeed_config()


# Summary


def _evaluated_at(history: list[dict[str, Any]], step: int) -> bool:
    return any("eval_loss" in entry and entry["step"] == step for entry in history)


def _first_and_last(history: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The first and last entries of the log that hold training metrics, and evaluation metrics."""
    found = {}
    for name, key in (("train", "loss"), ("eval", "eval_loss")):
        entries = [entry for entry in history if key in entry]
        if entries:
            found[name] = {"first": entries[0], "last": entries[-1]}
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _closing_lines(summary: dict[str, Any], config: AlignConfig) -> str:
    lines = [f"{summary['steps']} steps in {summary['train_seconds']:.0f} s; the model is in {config.output_dir}"]
    for name, key in (("train", "loss"), ("eval", "eval_loss")):
        if (metrics := summary["metrics"].get(name)) is not None:
            prefix = "eval_" if name == "eval" else ""
            lines.append(
                f"{name}: loss {metrics['first'][key]:.4f} -> {metrics['last'][key]:.4f}, "
                f"group accuracy {metrics['last'][prefix + 'group_accuracy']:.2f}, "
                f"KL {metrics['last'][prefix + 'kl']:.2f} nats"
            )
    return "\n".join(lines)
