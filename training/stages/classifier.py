"""The stage `exo-fast classifier`: train a model of the log-odds that a text is positive on texts with labels.

In the original this is the oracle of the IMDB experiments: its log-odds are the reward that models are judged by.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from exo_fast.data.examples import Text
from exo_fast.data.selection import LeftOut
from exo_fast.training.data.examples import load_texts
from exo_fast.training.data.places import Source
from exo_fast.training.data.texts import RowCollator, RowDataset
from exo_fast.training.errors import InputError
from exo_fast.training.models.scorer_modules import ClassifierModule
from exo_fast.training.options import option
from exo_fast.training.stages.scorer_training import Kind, ScalarConfig, accuracy_with_interval, train_scalar

# multi_label_classification is transformers' name for a binary cross-entropy of each logit; here there is one logit.
CLASSIFIER = Kind(
    module=ClassifierModule,
    collator=RowCollator,
    row="texts",
    label="pos",
    problem_type="multi_label_classification",
)
LABELS = ("neg", "pos")


@dataclass
class ClassifierConfig(ScalarConfig):
    """The fields of `exo-fast classifier`. Raises InputError for a value that cannot work, naming it and the fix."""

    data: str | None = option(
        None,
        "Training data: a .json, .jsonl or .parquet file, a directory with train.* (and test.*), a dataset saved by "
        "save_to_disk, or a name of the registry (imdb/class:PATH). Rows: text, label (pos or neg; 1 or 0).",
    )
    output_dir: str | None = option(
        "runs/classifier", "Where the model, checkpoints, logs and summary.json are written."
    )
    num_train_epochs: float = option(5.0, "Epochs to train.")
    per_device_train_batch_size: int = option(32, "Texts per device and micro-batch.")
    per_device_eval_batch_size: int = option(32, "Texts per device in evaluation.")

    description: ClassVar[str] = """\
Train a binary text classifier on text and label. What is saved is loaded by transformers'
AutoModelForSequenceClassification; its one logit is the log-odds of label pos.

Every field may stand in a YAML recipe (--config) and on the command line, which wins. The same command continues a
run that was interrupted."""
    examples: ClassVar[str] = """\
examples:
  exo-fast classifier --model_name_or_path models/base --data data/class --output_dir models/classifier
  exo-fast classifier --model_name_or_path models/base --data imdb/class:aclImdb --bf16 --gradient_checkpointing
  exo-fast classifier --model_name_or_path models/base --data data/class \\
      --load_best_model_at_end --save_strategy epoch --save_total_limit 1
  torchrun --nproc-per-node 2 -m exo_fast.training.cli classifier --config classifier.yaml --zero_stage 3
"""


def classifier(config: ClassifierConfig) -> dict[str, Any]:
    """Train a classifier and write everything to `config.output_dir`; return the summary.

    It writes the same files as `exo-fast reward-model`; `held_out` of summary.json has the accuracy with its 95%
    interval and the mean log-odds of each class. Raises InputError, before any training, for data, models or
    directories that cannot work.
    """
    return train_scalar(config, CLASSIFIER, load=_load, to_row=_row, held_out=_held_out, closing=_closing)


def _load(source: Source, *, tokenizer: PreTrainedTokenizerBase, left_out: LeftOut) -> list[Text]:
    texts = load_texts(source, tokenizer=tokenizer)  # all rows are kept
    if len({text.label for text in texts}) == 1:
        raise InputError(f"{source}: all {len(texts)} rows have label {LABELS[texts[0].label]}; both are needed.")
    return texts


def _row(text: Text) -> tuple[tuple[str, ...], float]:
    return (text.text,), float(text.label)


def _held_out(metrics: dict[str, float], data: RowDataset) -> dict[str, Any]:
    # Over all n texts, the mean log-odds is (sum of pos + sum of neg) / n and the mean margin (pos - neg) / n.
    mean, margin, share = metrics["log_odds"], metrics["margins"], data.labels.mean().item()
    by_class = {"log_odds/pos": (mean + margin) / (2 * share), "log_odds/neg": (mean - margin) / (2 * (1 - share))}
    return accuracy_with_interval(metrics, data) | by_class


def _closing(summary: dict[str, Any]) -> str:
    if (found := summary.get("held_out")) is None:
        return "no held-out data: the accuracy is not known"
    low, high = found["accuracy_95"]
    return (
        f"held out: accuracy {found['accuracy']:.3f} [{low:.3f}, {high:.3f}] (95%) on {found['n']:,} texts; mean "
        f"log-odds {found['log_odds/pos']:.2f} of pos, {found['log_odds/neg']:.2f} of neg"
    )
