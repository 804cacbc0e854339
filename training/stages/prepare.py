"""The stage `exo-fast prepare`: turn a published data set's raw files once into the rows that stages exchange.

Any stage can read "NAME/KIND:PATH" itself. Prepare data if the rows should not depend on the stage that reads them:
prompts cut by the tokens of one tokenizer, a smaller sample, a look at the rows.
"""

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from exo_fast.training.data.places import Place
from exo_fast.training.data.registry import known_names, open_dataset
from exo_fast.training.data.sources import split_name
from exo_fast.training.data.writing import is_main_process, write_rows
from exo_fast.training.errors import InputError
from exo_fast.training.models.loading import load_tokenizer
from exo_fast.training.options import check_model_name, need_value, option


@dataclass
class PrepareConfig:
    """The fields of `exo-fast prepare`: input, cuts and output. Raises InputError for a value that cannot work."""

    data: str | None = option(
        None,
        "NAME/KIND:PATH, say hh/pref:hh-rlhf/helpful-base; PATH holds the files as published. Names: imdb, tldr, hh, "
        "custom, reviews (no PATH) and registered ones; kinds: sft, pref, rw, class.",
    )
    output_dir: str | None = option(None, "Where train.json, test.json and summary.json are written.")
    tokenizer: str | None = option(
        None,
        "imdb/sft cuts prompts by the tokens of this model: a directory or a Hub name. The original cuts by GPT-2's.",
    )
    prefix_tokens: int | None = option(None, "imdb/sft: tokens of a prompt. Default: 10.")
    prompt_words: int | None = option(None, "reviews/sft: words of a prompt. Default: 6.")
    limit: int | None = option(None, "Rows of each split, sampled at random and kept in order. Default: all.")
    seed: int = option(0, "Of that sample.")
    skip_malformed: bool = option(False, "Leave rows out that cannot be used, and count them, instead of stopping.")
    disable_tqdm: bool = option(False, "Show no progress bars.")

    field_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "data": ("data", "output_dir", "tokenizer", "prefix_tokens", "prompt_words"),
        "sampling and faults": ("limit", "seed", "skip_malformed", "disable_tqdm"),
    }
    description: ClassVar[str] = """\
Turn a published data set's raw files into training data: train.json, test.json and a summary of what was left out.

Every row is checked; faults are shown by file and line. The same command again writes the same bytes."""
    examples: ClassVar[str] = """\
examples:
  exo-fast prepare --data hh/pref:hh-rlhf/helpful-base --output_dir data/hh
  exo-fast prepare --data imdb/sft:aclImdb --tokenizer gpt2-large --output_dir data/imdb_prefix10
  exo-fast prepare --data tldr/sft:openai-tldr-filtered --limit 10000 --output_dir data/tldr_filtered
  exo-fast prepare --data reviews/sft --prompt_words 8 --output_dir data/reviews
"""

    def __post_init__(self) -> None:
        need_value(self, "data", "NAME/KIND:PATH, say hh/pref:hh-rlhf/helpful-base")
        need_value(self, "output_dir", "the directory to write to")
        if split_name(self.data) is None:
            raise InputError(
                f"data={self.data!r}: NAME/KIND:PATH is needed, with one of {', '.join(known_names())}; rows that are "
                "ready need no preparing (custom/KIND:PATH reads them)."
            )
        if self.tokenizer is not None:
            check_model_name(self, "tokenizer")
        for name, least in (("prefix_tokens", 1), ("prompt_words", 1), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name}={value}: at least {least} is needed.")


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write the rows of each split of `config.data`; return the summary: for each split its rows, and how many were
    left out for which reason. Raises InputError for raw files that are missing or malformed."""
    options = {name: getattr(config, name) for name in ("prefix_tokens", "prompt_words")}
    dataset = open_dataset(
        *split_name(config.data),
        tokenizer=load_tokenizer(config.tokenizer) if config.tokenizer else None,
        skip_malformed=config.skip_malformed,
        progress=not config.disable_tqdm and is_main_process(),
        **{name: value for name, value in options.items() if value is not None},
    )
    files, splits = {}, {}
    for split in dataset.splits():
        records = dataset.records(split)
        kept = _sample(records, config.limit, f"{config.seed} {split}")
        files[f"{split}.json"] = [record for _, record in kept]
        splits[split] = {"rows": len(kept), "of": len(records), "left_out": dict(sorted(dataset.dropped.items()))}
    if not files:
        raise InputError(f"data={config.data!r}: neither a train nor a test split is there.")
    summary = write_rows(config, files, {"stage": "prepare", "splits": splits})
    if is_main_process():
        for split, counts in splits.items():
            reasons = "; ".join(f"{count:,} {reason}" for reason, count in counts["left_out"].items())
            print(f"{split:<6}{counts['rows']:>9,} rows" + (f"  (left out: {reasons})" if reasons else ""))
        print(f"written to {config.output_dir}", flush=True)
    return summary


def _sample(records: list[tuple[Place, Any]], limit: int | None, seed: str) -> list[tuple[Place, Any]]:
    if limit is None or limit >= len(records):
        return records
    return [records[index] for index in sorted(random.Random(seed).sample(range(len(records)), limit))]
