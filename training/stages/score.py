"""`exo-fast score`: rewards for completions, by a reward model, a classifier or a Python function.

The original has two inference scripts for this. Here there is one scorer (`load_scorer`), a function from prompts and
completions to numbers, and three uses of the numbers: label rows with them, make preferences of the best and the
worst, or report their mean and spread. `exo-fast evaluate` uses the same scorers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from exo_fast.data.examples import Example
from exo_fast.training import processes
from exo_fast.training.data.examples import load_samples
from exo_fast.training.data.places import Source
from exo_fast.training.data.sources import find_splits, read_records
from exo_fast.training.errors import InputError
from exo_fast.training.inference.config import InferenceConfig
from exo_fast.training.inference.resumable import ResumableRun, plan_batches
from exo_fast.training.inference.scorers import SCORERS, Scorer, ScorerConfig, load_scorer
from exo_fast.training.models.digests import json_digest
from exo_fast.training.options import option

logger = logging.get_logger(__name__)
EXTRAS = ("completion_ids", "completion_spans")  # kept for each completion, beside its text


def statistics(rewards: Sequence[Sequence[float]]) -> dict[str, float | int | None]:
    """Return statistics of the rewards of each prompt's completions: how many there are, and

    `mean`, over prompts of the mean over completions; its `standard_error` over prompts (None for one prompt);
    `within_prompt_std`, the mean over prompts of the standard deviation over completions (divided by their number).
    """
    means = np.array([np.mean(row) for row in rewards])
    return {
        "prompts": len(rewards),
        "completions": sum(map(len, rewards)),
        "mean": float(means.mean()),
        "standard_error": float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None,
        "within_prompt_std": float(np.mean([np.std(row) for row in rewards])),
    }


# The stage


@dataclass
class ScoreConfig(ScorerConfig):
    """The fields of `exo-fast score`: a scorer, and how to use its rewards."""

    mode: Literal["label", "label-pref", "eval"] = option(
        "label", "label: write rewards; label-pref: write the best and the worst; eval: rewards, mean and spread."
    )

    field_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "scorer": (*ScorerConfig.scorer_fields, "mode", *InferenceConfig.model_fields),
        "data": (*InferenceConfig.data_fields, "max_seq_len"),
        "speed and memory": InferenceConfig.speed_fields,
    }
    description: ClassVar[str] = """\
Score completions by a reward model, a classifier or a Python function.

Reads rows of prompt and completions (as `exo-fast generate` writes them), or of prompt, chosen and rejected, and writes
by mode: prompt, completions, rewards (label, eval); or prompt, chosen, rejected (label-pref) of the completions that
are not empty, without the prompts where all have one reward. The summary tells mean and spread of the rewards and, for
chosen and rejected, how often the scorer agrees. An interrupted run continues when the same command is given again."""
    examples: ClassVar[str] = """\
examples:
  exo-fast score --reward_model models/rm --data data/samples --output_dir data/rw
  exo-fast score --classifier models/oracle --mode label-pref --data data/samples --output_dir data/pref
  exo-fast score --function rewards:brevity --mode eval --data data/samples --output_dir runs/eval
  torchrun --nproc-per-node 2 -m exo_fast.training.cli score --config score.yaml
"""


def score(config: ScoreConfig) -> dict[str, Any]:
    """Score the completions of `config.data` and write rows by `config.mode`, in their order, to `config.output_dir`.

    Returns the summary, which is written there too. Raises InputError for settings, data or scorers that cannot work.
    """
    processes.start(on_cpu=config.use_cpu)
    scorer = load_scorer(config)
    sources = find_splits(config.data, config.split)
    examples = {
        split: config.first(load_samples(source, tokenizer=scorer.tokenizer)) for split, source in sources.items()
    }
    if config.mode == "label-pref":
        _need_two_each(examples)
    rows = {split: [_row(example) for example in found] for split, found in examples.items()}
    identity = {
        "stage": "score",
        "mode": config.mode,
        **scorer.identity,
        "rows": {split: json_digest(found) for split, found in rows.items()},
    }
    run = ResumableRun(config.output_dir, identity)
    if (summary := run.finished([f"{split}.json" for split in rows])) is not None:
        return summary

    files, counts = {}, {}
    for split, found in rows.items():
        rewards = _score_split(config, scorer, run, split, found)
        counts[split] = statistics(rewards)
        if _holds_pairs(sources[split], scorer.tokenizer) and all(len(values) == 2 for values in rewards):
            counts[split] |= _agreement(rewards)
        labelled = [{**row, "rewards": values} for row, values in zip(found, rewards, strict=True)]
        if config.mode == "label-pref":
            labelled = _preferences(labelled, split)
            counts[split] |= {"preferences": len(labelled), "dropped": len(found) - len(labelled)}
        files[f"{split}.json"] = labelled
    names = {name: getattr(config, name) for name in SCORERS if getattr(config, name)}
    summary = run.finish(files, {**names, "mode": config.mode, "data": config.data, "counts": counts})
    if processes.index() == 0:
        for split, count in counts.items():
            print(f"{split}: " + _in_words(count))
        print(f"the rows are in {config.output_dir}", flush=True)
    return summary


def _row(example: Example) -> dict[str, Any]:
    return {"prompt": example.prompt, "completions": example.completions, **example.extras()}


def _score_split(
    config: ScoreConfig, scorer: Scorer, run: ResumableRun, split: str, rows: list[dict[str, Any]]
) -> list[list[float]]:
    """Return the rewards of each row's completions."""
    prompts = [row["prompt"] for row in rows for _ in row["completions"]]
    completions = [text for row in rows for text in row["completions"]]
    batches = plan_batches(scorer.lengths(prompts, completions), [1] * len(prompts), config.batch_size)
    values = run.compute(
        split,
        [len(batch) for batch in batches],
        lambda index: scorer([prompts[i] for i in batches[index]], [completions[i] for i in batches[index]]),
        description=f"scoring ({split})",
        unit="seq",
        progress=not config.disable_tqdm,
        prepare=scorer.prepare,
    )
    found = [0.0] * len(prompts)
    for batch, rewards in zip(batches, values, strict=True):
        for index, reward in zip(batch, rewards, strict=True):
            found[index] = reward
    flat = iter(found)
    return [[next(flat) for _ in row["completions"]] for row in rows]


def _need_two_each(examples: dict[str, list[Example]]) -> None:
    for found in examples.values():
        for example in found:
            if len(example.completions) < 2:
                raise InputError(
                    f"{example.place}, field `completions`: mode=label-pref needs at least 2 completions of each "
                    "prompt; sample more (return_num), or use mode=label."
                )


def _preferences(rows: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """Pair the first best and the first worst completion of each row, if their rewards differ; keep the drawn ids.

    Empty completions are skipped: a reward model has nothing to read in them, and training refuses them.
    """
    found = []
    for row in rows:
        places = [place for place, text in enumerate(row["completions"]) if text]
        rewards = [row["rewards"][place] for place in places]
        if len(set(rewards)) > 1:
            pair = places[int(np.argmax(rewards))], places[int(np.argmin(rewards))]
            chosen, rejected = (row["completions"][place] for place in pair)
            extras = {name: [row[name][p] for p in pair] for name in EXTRAS if name in row}
            found.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected, **extras})
    if not found:
        raise InputError(
            f"mode=label-pref: no prompt of the {split} split has completions with different rewards, so there is no "
            "preference to write; use another scorer."
        )
    return found


def _holds_pairs(source: Source, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    _, first = next(iter(read_records(source, tokenizer)))
    return isinstance(first, dict) and "chosen" in first and "rejected" in first and "completions" not in first


def _agreement(rewards: list[list[float]]) -> dict[str, float]:
    """Return how often the scorer ranks chosen above rejected, and how often it gives both the same reward."""
    chosen, rejected = np.array(rewards).T
    return {"accuracy": float((chosen > rejected).mean()), "ties": float((chosen == rejected).mean())}


def _in_words(count: dict[str, Any]) -> str:
    error = "" if count["standard_error"] is None else f" ± {count['standard_error']:.4f}"
    words = (
        f"mean reward {count['mean']:.4f}{error} over {count['prompts']:,} prompts, "
        f"standard deviation within prompts {count['within_prompt_std']:.4f}"
    )
    if "accuracy" in count:
        words += f", accuracy {count['accuracy']:.4f} ({count['ties']:.4f} ties)"
    if "preferences" in count:
        words += f", {count['preferences']:,} preferences ({count['dropped']:,} prompts without a better one dropped)"
    return words
