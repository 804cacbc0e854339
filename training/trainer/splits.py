"""Find the splits of a training's data, tokenise them, and check that the model can take them."""

from pathlib import Path
from typing import Any

from tabulate import tabulate
from transformers import (
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import IntervalStrategy

from exo_fast.data.examples import Example
from exo_fast.data.selection import LeftOut
from exo_fast.training.data.groups import GroupDataset, tokenize
from exo_fast.training.data.places import Source
from exo_fast.training.data.sources import find_source
from exo_fast.training.errors import InputError
from exo_fast.training.models.loading import check_fits_model
from exo_fast.training.trainer.config import CausalConfig, TrainConfig


def find_training_splits(config: TrainConfig) -> dict[str, Source]:
    """Return the data to train on and, if there is any, to evaluate on: {"train": …, "eval": …}.

    Without evaluation data, `config` is set to evaluate nothing. Raises InputError if there is nothing to train on.
    """
    sources = {"train": find_source(config.data, "train")}
    if sources["train"] is None:
        raise InputError(f"data={config.data!r}: the directory holds no train.json, train.jsonl or train.parquet.")
    if config.eval_data is not None:
        held_out = find_source(config.eval_data, "eval") or find_source(config.eval_data, "train")
        if held_out is None:
            raise InputError(f"eval_data={config.eval_data!r}: the directory holds no test.json, .jsonl or .parquet.")
        sources["eval"] = held_out
    elif not Path(config.data).expanduser().is_file():
        held_out = find_source(config.data, "eval")
        if held_out is not None:
            sources["eval"] = held_out
    if "eval" not in sources:
        for name, value in (("load_best_model_at_end", True), ("save_strategy", "best")):
            if getattr(config, name) == value:
                raise InputError(f"{name}={value!r}: needs held-out data; set eval_data, or put test.json beside.")
        config.eval_strategy, config.do_eval, config.eval_on_start = IntervalStrategy.NO, False, False
    return sources


def table(rows: list[tuple[str, list[Any]]]) -> str:
    """Return aligned lines: a name, and a cell for each split. The first row names the splits."""
    (head, splits), *others = rows
    return tabulate([[name, *cells] for name, cells in others], [head, *splits], tablefmt="plain", intfmt=",")


def tokenize_splits(
    config: CausalConfig,
    examples: dict[str, list[Example]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_contrastive: int | None,
    left_out: dict[str, LeftOut] | None = None,
    **judged: Any,
) -> dict[str, GroupDataset]:
    """Return the rows of each split as tokenised groups (`data.groups.tokenize`, which takes `judged`). Raises
    InputError if the model cannot take them."""
    datasets = {
        name: tokenize(
            rows,
            tokenizer,
            num_contrastive=num_contrastive,
            max_seq_len=config.max_seq_len,
            max_gen_len=config.max_gen_len,
            left_out=left_out[name] if left_out else None,
            **judged,
            description=f"tokenising ({name})",
            progress=config.process_index == 0 and not config.disable_tqdm,
        )
        for name, rows in examples.items()
    }
    check_batches(config, len(datasets["train"]))
    check_fits_model(
        config,
        config.model_name_or_path,
        longest=max(data.counts.longest_sequence for data in datasets.values()),
        largest_id=max(int(max(data.prompt_ids.max(), data.completion_ids.max())) for data in datasets.values()),
    )
    return datasets


def check_batches(config: TrainConfig, rows: int) -> None:
    """Raises InputError if dataloader_drop_last would drop all rows of the training data."""
    if config.dataloader_drop_last and rows < config.global_batch:
        parts = (
            (config.per_device_train_batch_size, "per_device_train_batch_size"),
            (config.gradient_accumulation_steps, "gradient_accumulation_steps"),
            (config.data_parallel_size, "processes"),
        )
        product = " x ".join(f"{number} {name}" for number, name in parts if number > 1)
        raise InputError(
            f"dataloader_drop_last=True: {rows} rows make no whole batch of {config.global_batch} ({product}), so "
            "nothing would be trained on; leave dataloader_drop_last out, or make the batch smaller."
        )
