"""The stage `exo-fast pref-to-rw`: turn preferences into candidates with rewards. The rewards are the preferences'
scores if they have scores, else 1 for the chosen and 0 for the rejected.

With it, losses on rewards (exo-rw, dpo-rw) can be trained on preferences, as in the original. `exo-fast align` also
reads preferences itself, with the same rewards; this stage writes them to files.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from exo_fast.data.selection import LeftOut
from exo_fast.training.data.examples import load_pairs
from exo_fast.training.data.sources import find_splits
from exo_fast.training.data.writing import is_main_process, write_rows
from exo_fast.training.models.loading import load_tokenizer
from exo_fast.training.options import check_model_name, need_value, option


@dataclass
class PrefToRwConfig:
    """The fields of `exo-fast pref-to-rw`: input and output. Raises InputError for a value that cannot work."""

    data: str | None = option(
        None,
        "Rows with prompt, chosen, rejected: a file, a directory with train.* and test.*, or NAME/pref:PATH.",
    )
    split: Literal["train", "test", "all"] = option("all", "The split to convert; all: those that are there.")
    output_dir: str | None = option(None, "Where train.json, test.json and summary.json are written.")
    tokenizer: str | None = option(None, "For conversations: a model whose tokenizer has a chat template.")

    field_groups: ClassVar[dict[str, tuple[str, ...]]] = {"data": ("data", "split", "output_dir", "tokenizer")}
    description: ClassVar[str] = """\
Write preferences (prompt, chosen, rejected) as candidates with rewards (prompt, completions, rewards 1 and 0, or the
pairs' own score_chosen and score_rejected)."""
    examples: ClassVar[str] = """\
examples:
  exo-fast pref-to-rw --data data/hh --output_dir data/hh_p2r
  exo-fast pref-to-rw --data hh/pref:hh-rlhf/helpful-base --output_dir data/hh_p2r
"""

    def __post_init__(self) -> None:
        need_value(self, "data", "preferences (a file or a directory)")
        need_value(self, "output_dir", "the directory to write to")
        if self.tokenizer is not None:
            check_model_name(self, "tokenizer")


def pref_to_rw(config: PrefToRwConfig) -> dict[str, Any]:
    """Write each split's preferences as candidates with rewards; return the summary, which counts them."""
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    files, splits = {}, {}
    for split, source in find_splits(config.data, config.split).items():
        left_out = LeftOut()
        pairs = load_pairs(source, tokenizer=tokenizer, left_out=left_out, scored_pairs=True)
        files[f"{split}.json"] = [_to_row(pair) for pair in pairs]
        splits[split] = {"rows": len(pairs), "left_out": left_out.counts, "left_out_rows": left_out.places}
    summary = write_rows(config, files, {"stage": "pref-to-rw", "splits": splits})
    if is_main_process():
        for split, counts in splits.items():
            print(f"{split:<6}{counts['rows']:>9,} rows")
        print(f"written to {config.output_dir}", flush=True)
    return summary


def _to_row(pair: Any) -> dict[str, Any]:
    rewards = [int(reward) if reward.is_integer() else reward for reward in pair.rewards]
    return {"prompt": pair.prompt, "completions": pair.completions, "rewards": rewards, **pair.extras()}
