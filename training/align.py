"""The stage `exo-fast align`, from a configuration to an aligned model: read it from top to bottom."""

import gc
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from exo_fast.data.examples import Example
from exo_fast.data.selection import LeftOut, left_out_lines
from exo_fast.layout import plan_mask
from exo_fast.training.config import AlignConfig
from exo_fast.training.data.examples import load_examples
from exo_fast.training.data.groups import GroupCollator, GroupDataset
from exo_fast.training.data.records import Source
from exo_fast.training.errors import InputError
from exo_fast.training.loading import from_pretrained, refuse_adapter
from exo_fast.training.long_sequence import give_back_freed_memory, preset_line, tile_mlps
from exo_fast.training.module import AlignModule, settle_layout
from exo_fast.training.reference_logps import fill_reference_logps
from exo_fast.training.sequence_parallel import SequenceParallel, check_models
from exo_fast.training.trainer import AlignTrainer
from exo_fast.training.training_stage import (
    add_lora,
    begin,
    check_lora,
    find_splits,
    load_causal_lm,
    load_tokenizer,
    losses_line,
    table,
    tokenize_splits,
    train,
    training_scope,
)
from exo_fast.validate import LARGEST


def align(config: AlignConfig) -> dict[str, Any]:
    """Align `config.model_name_or_path` on `config.data` and write everything to `config.output_dir`.

    There: the model (or its LoRA adapter) as safetensors with its tokenizer, loadable by from_pretrained;
    checkpoints; trainer_state.json; TensorBoard logs; summary.json; report.html and README.md, the model card. Returns
    the summary. Raises InputError, before any training, for data, models or directories that cannot work.
    """
    checkpoint, finished = begin(config)
    if finished is not None:
        return finished
    if config.long_sequence and config.device.type == "cpu":
        give_back_freed_memory()
    sources = find_splits(config)
    tokenizer = load_tokenizer(config)
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
            gc.collect()  # of a model in reference cycles, which ZeRO-3 makes
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
    """The checked rows of each split; conversations become text through the tokenizer's chat template. Rows of too few
    candidates are noted in `left_out`."""
    options = {"loss_type": config.loss_type, "num_contrastive": config.num_contrastive, "tokenizer": tokenizer}
    left_out = left_out or {}
    return {name: load_examples(source, left_out=left_out.get(name), **options) for name, source in sources.items()}


def check_rewards(config: AlignConfig, datasets: dict[str, GroupDataset]) -> None:
    """Raises InputError where rewards are too large to be divided by beta_r."""
    if config.loss_type.endswith("-rw"):
        largest = max(float(dataset.rewards.abs().max()) for dataset in datasets.values())
        if largest / config.beta_r > LARGEST:
            raise InputError(
                f"beta_r={config.beta_r!r}: rewards of up to {largest:.3g} divided by it are infinite in float32; give "
                "beta_r the size of the differences between rewards."
            )


def data_table(datasets: dict[str, GroupDataset], max_seq_len: int, max_gen_len: int) -> str:
    """What will be trained on and what sharing prompts saves, as aligned lines."""
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
    """The module around `policy` whose forward is the configured loss; with sequence_parallel, a collective call."""
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
        ties="share",  # which ones may, the data was asked
        temperature=config.temperature,
        memory_budget=config.memory_budget_bytes,
        backend=config.backend,
        sequence=SequenceParallel(policy, config.sequence_parallel) if config.sequence_parallel > 1 else None,
    )


@torch.no_grad()
def _fill_from_separate_reference(
    config: AlignConfig, tokenizer: PreTrainedTokenizerBase, datasets: dict[str, GroupDataset]
) -> dict[str, bool]:
    """Reference log-probs by another model than the policy's start; it is gone before the policy is loaded."""
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
