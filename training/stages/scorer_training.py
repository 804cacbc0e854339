"""The common part of `exo-fast reward-model` and `exo-fast classifier`, from the data to the saved model."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.utils import logging

from exo_fast.data.selection import LeftOut
from exo_fast.training.data.texts import RowCollator, RowDataset, pad_with_eos, tokenize_rows
from exo_fast.training.models import saving
from exo_fast.training.models.causal import add_lora, check_lora, model_options, switch_off_dropout
from exo_fast.training.models.loading import SCALAR_TASK, check_fits_model, load_tokenizer, refuse_adapter
from exo_fast.training.models.merging import merge_adapter
from exo_fast.training.models.modules import TrainedModule
from exo_fast.training.models.saving import save_model
from exo_fast.training.models.scorer import ROUNDED_TOLERANCE, TOLERANCE, load_scalar_model, need_own_numbers
from exo_fast.training.models.scorer_modules import RewardModule, settle_layout
from exo_fast.training.options import option
from exo_fast.training.trainer.config import TrainConfig
from exo_fast.training.trainer.continuing import resume_or_start
from exo_fast.training.trainer.run import train, training_scope
from exo_fast.training.trainer.splits import check_batches, find_training_splits, table
from exo_fast.training.trainer.trainer import StageTrainer

logger = logging.get_logger(__name__)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


@dataclass
class ScalarConfig(TrainConfig):
    """The fields of both stages. Raises InputError for a value that cannot work, naming it and the fix."""

    max_seq_len: int = option(512, "Longest text (prompt and completion), in tokens; longer ones are cut on the left.")
    load_best_model_at_end: bool = option(
        False,
        "Keep the checkpoint of the highest held-out accuracy, not the last, as the original does; needs checkpoints "
        "where it evaluates: --save_strategy epoch (and --save_total_limit 1 to keep the best and the last only).",
    )
    metric_for_best_model: str | None = option("accuracy", "What load_best_model_at_end compares: accuracy or loss.")

    best_metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss")
    field_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        **TrainConfig.field_groups,
        "evaluation, logging, checkpoints": (
            *TrainConfig.field_groups["evaluation, logging, checkpoints"],
            "load_best_model_at_end",
            "metric_for_best_model",
        ),
    }


@dataclass(frozen=True)
class Kind:
    """The differences between the two stages."""

    module: type[TrainedModule]
    collator: type[RowCollator]
    row: str  # the name of a row of data
    label: str  # the logit's name in the model's config
    problem_type: str  # transformers' name for how the logit is trained; its pipelines follow it


class ScalarTrainer(StageTrainer):
    """Saves a whole model at the end, even if adapters were trained, because a scalar model is made to be loaded."""

    saves_whole_model = True

    def __init__(self, *args: Any, load: Callable[[], nn.Module], **kwargs: Any):
        self._load = load  # loads the model as it was before it got adapters
        self.layout: dict[str, Any] = {}
        super().__init__(*args, **kwargs)

    def _before_start(self) -> None:
        rounded = self.args.bf16 or self.args.matmul_precision != "ieee"
        if isinstance(self.model, RewardModule):
            self.layout = settle_layout(
                self.model,
                self.train_dataset,
                self.data_collator,
                share_prompt=self.args.share_prompt == "auto",
                rounded=rounded,
            )
        texts = (ids for row in self.train_dataset.ids for ids in row)
        allowed = ROUNDED_TOLERANCE if rounded else TOLERANCE
        need_own_numbers(self.model.eval().model, texts, allowed=allowed)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.model.is_peft and not _internal_call and self.args.should_save:
            self._merge_adapter(Path(output_dir or self.args.output_dir))

    def _merge_adapter(self, directory: Path) -> None:
        unset_hf_deepspeed_config()  # else, with ZeRO-3, all processes would have to load together, into shards
        try:
            merged = merge_adapter(self._load(), str(directory))
            with tempfile.TemporaryDirectory(dir=directory, prefix=".merged-") as folder:
                save_model(merged, None, Path(folder))
                saving.replace_files(Path(folder), directory)
        except Exception as error:
            logger.warning(
                f"{directory}: holds the trained adapter, which could not be merged into its base: "
                f"{type(error).__name__}: {error}"
            )
            return
        finally:
            if self.is_deepspeed_enabled:
                set_hf_deepspeed_config(self.args.hf_deepspeed_config)
        for name in ADAPTER_FILES:
            (directory / name).unlink(missing_ok=True)


def train_scalar(
    config: ScalarConfig,
    kind: Kind,
    *,
    load: Callable[..., list[Any]],
    to_row: Callable[[Any], tuple[tuple[str, ...], float]],
    held_out: Callable[[dict[str, float], RowDataset], dict[str, Any]],
    closing: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """Train `config.model_name_or_path` on the examples that `load(source, tokenizer=…)` returns; return the summary.

    `to_row` returns an example's texts and label. `held_out` turns the metrics of the saved model (without "eval_")
    into `summary["held_out"]`, and `closing` turns that into the last line.
    """
    checkpoint, finished = resume_or_start(config)
    if finished is not None:
        return finished
    refuse_adapter(config.model_name_or_path)
    tokenizer = load_tokenizer(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    tokenizer = pad_with_eos(tokenizer)
    check_lora(config, SCALAR_TASK)
    datasets = {}
    for name, source in find_training_splits(config).items():
        left_out = LeftOut()
        rows, labels = zip(*map(to_row, load(source, tokenizer=tokenizer, left_out=left_out)), strict=True)
        datasets[name] = tokenize_rows(
            list(rows),
            list(labels),
            tokenizer,
            max_seq_len=config.max_seq_len,
            left_out=left_out,
            description=f"tokenising ({name})",
            progress=config.process_index == 0 and not config.disable_tqdm,
        )
    check_batches(config, len(datasets["train"]))
    counts = [data.counts for data in datasets.values()]
    check_fits_model(
        config,
        config.model_name_or_path,
        longest=max(c.longest_sequence for c in counts),
        largest_id=max(c.largest_id for c in counts),
    )
    if config.process_index == 0:
        print(_data_table(datasets, kind, config.max_seq_len), flush=True)

    def load_model() -> nn.Module:
        model = load_scalar_model(
            config.model_name_or_path,
            new_head=True,
            **model_options(config),
        )
        model.config.problem_type = kind.problem_type
        model.config.id2label, model.config.label2id = {0: kind.label}, {kind.label: 0}
        return model

    with training_scope(config):
        model = load_model()
        if config.disable_dropout:
            switch_off_dropout(model)
        module = kind.module(add_lora(config, model, SCALAR_TASK))
        collate = kind.collator(tokenizer.pad_token_id)
        trainer = ScalarTrainer(module, config, datasets, tokenizer, collate, load=load_model)

        def about() -> dict[str, Any]:
            entries = {"data": {name: asdict(data.counts) for name, data in datasets.items()}}
            if trainer.layout:
                entries["layout"] = trainer.layout
            if "eval" in datasets:
                metrics = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
                metrics = {key.removeprefix("eval_"): value for key, value in metrics.items()}
                entries["held_out"] = {"loss": metrics["loss"], **held_out(metrics, datasets["eval"])}
            return entries

        return train(trainer, config, checkpoint, about=about, closing=closing)


def accuracy_with_interval(metrics: dict[str, float], data: RowDataset) -> dict[str, Any]:
    """Return `accuracy`, its 95% interval and the number of rows it is over, as entries of a summary."""
    accuracy, n = metrics["accuracy"], len(data)
    return {"accuracy": accuracy, "accuracy_95": wilson_interval(accuracy * n, n), "n": n}


def wilson_interval(successes: float, trials: int) -> list[float]:
    """Return [low, high] of the 95% Wilson score interval of a proportion; ties may count as half a success."""
    z = 1.959963984540054
    p = successes / trials
    centre = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return [max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0)]


def _data_table(datasets: dict[str, RowDataset], kind: Kind, max_seq_len: int) -> str:
    counts = [data.counts for data in datasets.values()]
    lines = table(
        [
            ("", list(datasets)),
            (kind.row, [c.rows for c in counts]),
            ("tokens", [c.tokens for c in counts]),
            ("longest sequence", [c.longest_sequence for c in counts]),
            (f"texts cut to {max_seq_len}", [c.cut_texts for c in counts]),
        ]
    )
    return lines if "eval" in datasets else f"{lines}\nno held-out data: nothing is evaluated"
