"""The stage `exo-fast reward-model`: train a model that scores completions on pairs of which one was preferred.

The reward of a text is one logit at its last token before EOS, and the loss is Bradley and Terry's, as in the original.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from exo_fast.data.examples import Example
from exo_fast.training.data.examples import load_pairs
from exo_fast.training.data.texts import PairCollator, RowDataset
from exo_fast.training.models.scorer_modules import RewardModule
from exo_fast.training.options import option
from exo_fast.training.stages.scorer_training import Kind, ScalarConfig, accuracy_with_interval, train_scalar

REWARD = Kind(module=RewardModule, collator=PairCollator, row="pairs", label="reward", problem_type="regression")


@dataclass
class RewardModelConfig(ScalarConfig):
    """The fields of `exo-fast reward-model`. Raises InputError for a value that cannot work, naming it and the fix."""

    data: str | None = option(
        None,
        "Training data: a .json, .jsonl or .parquet file, a directory with train.* (and test.*), a dataset saved by "
        "save_to_disk, or a name of the registry (hh/pref:PATH). Rows: prompt, chosen, rejected; or "
        "prompt, completions, rewards, of which the best and the worst are taken.",
    )
    share_prompt: Literal["auto", "off"] = option(
        "auto", "Run what two texts begin with once for both, where the model can and it saves work; off: never."
    )
    output_dir: str | None = option(
        "runs/reward-model", "Where the model, checkpoints, logs and summary.json are written."
    )
    per_device_train_batch_size: int = option(8, "Pairs per device and micro-batch.")
    per_device_eval_batch_size: int = option(8, "Pairs per device in evaluation.")

    field_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        **ScalarConfig.field_groups,
        "speed and memory": ("share_prompt", *ScalarConfig.field_groups["speed and memory"]),
    }
    description: ClassVar[str] = """\
Train a reward model on pairs of completions: prompt, chosen, rejected. What is saved is loaded by transformers'
AutoModelForSequenceClassification; its one logit is the reward.

Every field may stand in a YAML recipe (--config) and on the command line, which wins. The same command continues a
run that was interrupted."""
    examples: ClassVar[str] = """\
examples:
  exo-fast reward-model --model_name_or_path models/sft --data data/pref --output_dir models/rm
  exo-fast reward-model --model_name_or_path models/sft --data hh/pref:hh-rlhf --bf16 --gradient_checkpointing
  exo-fast reward-model --model_name_or_path models/sft --data data/pref --num_train_epochs 3 \\
      --load_best_model_at_end --save_strategy epoch --save_total_limit 1
  exo-fast reward-model --model_name_or_path models/sft --data data/pref --lora_r 16 --learning_rate 1e-4
  torchrun --nproc-per-node 2 -m exo_fast.training.cli reward-model --config reward-model.yaml --zero_stage 3
"""


def reward_model(config: RewardModelConfig) -> dict[str, Any]:
    """Train a reward model and write everything to `config.output_dir`; return the summary.

    It writes the model as safetensors (with LoRA, merged) and its tokenizer, loadable by
    AutoModelForSequenceClassification; checkpoints; trainer_state.json; TensorBoard logs; summary.json, whose
    `held_out` has the accuracy with its 95% interval. Raises InputError, before any training, for data, models or
    directories that cannot work.
    """
    return train_scalar(config, REWARD, load=load_pairs, to_row=_row, held_out=_held_out, closing=_closing)


def _row(example: Example) -> tuple[tuple[str, ...], float]:
    chosen, rejected = example.completions
    return (example.prompt + chosen, example.prompt + rejected), 1.0


def _held_out(metrics: dict[str, float], data: RowDataset) -> dict[str, Any]:
    rewards = {name: metrics[name] for name in ("rewards/chosen", "rewards/rejected", "rewards/margins")}
    return accuracy_with_interval(metrics, data) | rewards


def _closing(summary: dict[str, Any]) -> str:
    if (found := summary.get("held_out")) is None:
        return "no held-out data: the accuracy is not known"
    low, high = found["accuracy_95"]
    return (
        f"held out: accuracy {found['accuracy']:.3f} [{low:.3f}, {high:.3f}] (95%) on {found['n']:,} pairs; mean "
        f"reward {found['rewards/chosen']:.2f} chosen, {found['rewards/rejected']:.2f} rejected"
    )
