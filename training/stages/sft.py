"""The stage `exo-fast sft`: supervised fine-tuning on the completions of `prompt, chosen`.

The loss is the mean negative log-prob of the completion's tokens (with EOS) over the global batch, through the same
fused head as alignment: no (tokens, vocabulary) logits, however long the sequences are.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from exo_fast.layout import plan_mask
from exo_fast.training.data.examples import load_sft
from exo_fast.training.data.groups import GroupDataset, SftCollator
from exo_fast.training.models.causal import add_lora, check_lora, load_causal_lm
from exo_fast.training.models.loading import load_tokenizer, refuse_adapter
from exo_fast.training.models.modules import SftModule
from exo_fast.training.models.sharing import need_own_numbers
from exo_fast.training.options import option
from exo_fast.training.trainer.config import CausalConfig
from exo_fast.training.trainer.continuing import resume_or_start
from exo_fast.training.trainer.finishing import losses_line, perplexity
from exo_fast.training.trainer.run import train, training_scope
from exo_fast.training.trainer.splits import find_training_splits, table, tokenize_splits
from exo_fast.training.trainer.trainer import StageTrainer


@dataclass
class SftConfig(CausalConfig):
    """The fields of `exo-fast sft`. Raises InputError for a value that cannot work, naming it and the fix."""

    data: str | None = option(
        None,
        "Training data: a .json, .jsonl or .parquet file, a directory with train.* (and test.*), a dataset saved by "
        "save_to_disk, or a name of the registry (imdb/sft:PATH). Rows: prompt, chosen; or conversations.",
    )
    learn: Literal["last", "all"] = option(
        "last",
        "Of a conversation (messages): the assistant's last words, or all of them. What others say is only read.",
    )
    output_dir: str | None = option("runs/sft", "Where the model, checkpoints, logs and summary.json are written.")

    field_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        **CausalConfig.field_groups,
        "data": (*CausalConfig.field_groups["data"], "learn"),
    }
    description: ClassVar[str] = """\
Fine-tune a language model on prompts and their chosen completions; the loss is on the completions only.

Every field may stand in a YAML recipe (--config) and on the command line, which wins. The same command continues a
run that was interrupted."""
    examples: ClassVar[str] = """\
examples:
  exo-fast sft --model_name_or_path models/base --data data/sft --output_dir models/sft
  exo-fast sft --model_name_or_path models/base --data imdb/sft:aclImdb --num_train_epochs 5 --bf16
  exo-fast sft --model_name_or_path models/base --data chats.jsonl --lora_r 16 --learning_rate 1e-4
  torchrun --nproc-per-node 2 -m exo_fast.training.cli sft --config sft.yaml --zero_stage 3
"""


class SftTrainer(StageTrainer):
    """Trains an SftModule on a GroupDataset of one completion each."""

    def _before_start(self) -> None:
        need_own_numbers(self.model, self.train_dataset, shared=False)


def sft(config: SftConfig) -> dict[str, Any]:
    """Fine-tune `config.model_name_or_path` on `config.data`. Writes and returns the same as `align`. Raises
    InputError, before any training, for data, models or directories that cannot work."""
    checkpoint, finished = resume_or_start(config)
    if finished is not None:
        return finished
    sources = find_training_splits(config)
    refuse_adapter(config.model_name_or_path)
    tokenizer = load_tokenizer(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    check_lora(config, "CAUSAL_LM")
    examples = {name: load_sft(source, tokenizer=tokenizer, learn=config.learn) for name, source in sources.items()}
    datasets = tokenize_splits(config, examples, tokenizer, num_contrastive=1)
    if config.process_index == 0:
        print(data_table(datasets, config), flush=True)
    with training_scope(config):
        model = add_lora(config, load_causal_lm(config, config.model_name_or_path), "CAUSAL_LM")
        options = {"memory_budget": config.memory_budget_bytes, "backend": config.backend}
        module = SftModule(model, plan_mask(model.config), **options)
        trainer = SftTrainer(module, config, datasets, tokenizer, SftCollator(tokenizer.eos_token_id))
        return train(
            trainer,
            config,
            checkpoint,
            about=lambda: {"data": {name: asdict(dataset.counts) for name, dataset in datasets.items()}},
            closing=_closing_lines,
        )


def data_table(datasets: dict[str, GroupDataset], config: SftConfig) -> str:
    """Describe the training data as aligned lines."""
    counts = [dataset.counts for dataset in datasets.values()]
    lines = table(
        [
            ("", list(datasets)),
            ("examples", [c.examples for c in counts]),
            ("prompt tokens", [c.prompt_tokens for c in counts]),
            ("completion tokens", [c.completion_tokens for c in counts]),
            ("longest sequence", [c.longest_sequence for c in counts]),
            (f"prompts cut to fit {config.max_seq_len}", [c.cut_prompts for c in counts]),
            (f"completions cut to {config.max_gen_len}", [c.cut_completions for c in counts]),
        ]
    )
    return lines if "eval" in datasets else f"{lines}\nno held-out data: nothing is evaluated"


def _closing_lines(summary: dict[str, Any]) -> str:
    keys = {"train": "loss", "eval": "eval_loss"}
    return "\n".join(
        f"{losses_line(summary, name)} nats a token, perplexity {perplexity(metrics['last'][keys[name]]):.2f}"
        for name, metrics in summary["metrics"].items()
    )
