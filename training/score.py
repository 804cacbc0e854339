"""`exo-fast score`: rewards for completions, by a reward model, a classifier or a Python function.

What the original spreads over two inference scripts is one scorer here (`load_scorer`), a function from prompts and
completions to numbers, and three things to do with the numbers: label rows with them, make preferences of the best and
the worst, or report their mean and spread. `exo-fast evaluate` uses the same scorers.
"""

import functools
import hashlib
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from accelerate import PartialState
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from exo_fast.data.examples import Example
from exo_fast.training.config import _field
from exo_fast.training.data.examples import load_samples
from exo_fast.training.data.records import Source, read_records
from exo_fast.training.errors import InputError
from exo_fast.training.inference import (
    InferenceConfig,
    check_model_name,
    digest,
    find_splits,
    from_main,
    json_digest,
    load_tokenizer,
    start_processes,
)
from exo_fast.training.loading import check_fits_model, from_pretrained
from exo_fast.training.precision import matmul_precision
from exo_fast.training.resumable import ResumableRun
from exo_fast.training.scalar_model import (
    ROUNDED_TOLERANCE,
    TOLERANCE,
    encode,
    load_scalar_model,
    need_own_numbers,
    pad,
    reads_at_end,
    scalars,
)

logger = logging.get_logger(__name__)
EXTRAS = ("completion_ids", "completion_spans")  # of each completion, beside its text
SCORERS = ("reward_model", "classifier", "function")


@dataclass
class ScorerConfig(InferenceConfig):
    """Fields of every stage that scores completions; exactly one of the first three is set."""

    reward_model: str | None = _field(None, "A reward model: a directory or a Hub name.")
    classifier: str | None = _field(None, "A classifier, whose log-odds of the positive class are the reward.")
    function: str | None = _field(
        None,
        "module:function, called as function(prompts, completions) with two lists of strings; it returns a list of "
        "numbers. The current directory is searched first.",
    )
    tokenizer: str | None = _field(
        None, "For conversations with --function: a model whose tokenizer has a chat template. Others have their own."
    )
    reward_at: Literal["auto", "before_end", "end"] = _field(
        "auto",
        "Where a reward model or classifier is read: at the last token before EOS or the end of the turn, as exo-fast "
        "trains it, or at the end itself, as TRL does. auto: at the end where its padding is not EOS.",
    )
    max_seq_len: int = _field(512, "Longest prompt plus completion, in tokens; what is too long is cut on the left.")

    scorer_fields: ClassVar[tuple[str, ...]] = (*SCORERS, "tokenizer", "reward_at")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in SCORERS if getattr(self, name)]
        if len(given) != 1:
            raise InputError(
                f"{', '.join(f'{name}={getattr(self, name)!r}' for name in SCORERS)}: exactly one of them is needed."
            )
        if given[0] != "function":
            check_model_name(self, given[0])
            self._need(self.tokenizer is None, "tokenizer", f"{given[0]} has its own; leave it out.")
        elif self.tokenizer is not None:
            check_model_name(self, "tokenizer")
        self._need(self.max_seq_len >= 2, "max_seq_len", "at least 2 tokens are needed.")


class Scorer:
    """Rewards of completions. `identity` holds what they depend on; `tokenizer` is None for functions."""

    identity: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase | None = None
    at_end = False  # whether the end of a text is read too

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """One finite number per completion, `completions[i]` being one of `prompts[i]`."""
        raise NotImplementedError

    def prepare(self) -> None:
        """What the first call would do for all."""

    def lengths(self, prompts: Sequence[str], completions: Sequence[str]) -> list[int]:
        """What batches are sorted by."""
        return [0] * len(prompts)


class ModelScorer(Scorer):
    """A reward model or a classifier. The weights are loaded when they are needed."""

    def __init__(self, config: ScorerConfig, kind: str):
        self.config, self.name = config, getattr(config, kind)
        self.checked: list[list[int]] = []  # the shortest and the longest text that there is
        self.tokenizer = load_tokenizer(config, self.name)
        self.at_end = config.reward_at == "end"
        if config.reward_at == "auto":
            options = {"trust_remote_code": config.trust_remote_code}
            self.at_end = reads_at_end(from_pretrained(AutoConfig, self.name, **options), self.tokenizer)
            if self.at_end:
                logger.warning(
                    f"{kind}={self.name!r}: its padding is not EOS, so it is read at the end of each text, EOS "
                    "included, as TRL trains such models. --reward_at before_end reads it before EOS."
                )
        state = PartialState()
        self.identity = {
            "scorer": kind,
            "reward_at": "end" if self.at_end else "before_end",
            "model": from_main(digest(self.name) if state.is_main_process else None, state),
            "max_seq_len": config.max_seq_len,
            **config.numerics(),
        }

    @functools.cached_property
    def model(self) -> torch.nn.Module:
        config = self.config
        model = load_scalar_model(
            self.name,
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            new_head=False,
        )
        model = model.to(PartialState().device).eval()
        if self.checked:
            rounded = config.dtype != torch.float32 or config.matmul_precision != "ieee"
            with matmul_precision(config.matmul_precision, model.device.type):
                need_own_numbers(model, self.checked, allowed=ROUNDED_TOLERANCE if rounded else TOLERANCE)
        return model

    def prepare(self) -> None:
        _ = self.model

    def lengths(self, prompts: Sequence[str], completions: Sequence[str]) -> list[int]:
        ids = self._encode(prompts, completions)
        check_fits_model(self.config, self.name, longest=max(map(len, ids)), largest_id=max(map(max, ids)))
        self.checked = [min(ids, key=len), max(ids, key=len)]
        return [len(row) for row in ids]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        batch = pad(self._encode(prompts, completions), self.model.config.get_text_config().pad_token_id)
        with matmul_precision(self.config.matmul_precision, self.model.device.type):
            values = scalars(self.model, {name: tensor.to(self.model.device) for name, tensor in batch.items()})
        # The shortest decimal that is this float32, not this float32 as a double.
        return _check_finite([float(str(value)) for value in values.cpu().numpy()], repr(self.name))

    def _encode(self, prompts: Sequence[str], completions: Sequence[str]) -> list[list[int]]:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        return encode(self.tokenizer, texts, self.config.max_seq_len, at_end=self.at_end)


class FunctionScorer(Scorer):
    """A Python function of the user's. Another version of its module, or of the file that it stands in, counts as
    another scorer; so does another batch size: batches are stored as they are, and it may look at all of one."""

    def __init__(self, config: ScorerConfig):
        name = config.function
        self.label = f"function={name!r}"
        self.tokenizer = None if config.tokenizer is None else load_tokenizer(config, config.tokenizer)
        self.function = _import_function(name)
        source = hashlib.sha256()
        # The module too: what a decorator returns stands in the decorator's file, and an object in none.
        for part in (sys.modules[name.partition(":")[0]], inspect.unwrap(self.function)):
            try:
                source.update(Path(inspect.getsourcefile(part)).read_bytes())
            except (TypeError, OSError):  # written in C, say
                continue
        self.identity = {
            "scorer": "function",
            "function": name,
            "source": source.hexdigest(),
            "batch_size": config.batch_size,
        }

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        try:
            answer = self.function(list(prompts), list(completions))
        except Exception as error:
            raise InputError(f"{self.label}: it raised {type(error).__name__}: {error}") from error
        try:
            values = list(answer)
        except TypeError as error:
            raise InputError(f"{self.label}: it returned {answer!r}; a list of numbers is needed.") from error
        if len(values) != len(completions):
            raise InputError(
                f"{self.label}: it returned {len(values)} numbers for {len(completions)} completions; one for each is "
                "needed, in their order."
            )
        try:
            values = [float(value) for value in values]
        except (TypeError, ValueError) as error:
            raise InputError(f"{self.label}: it returned something that is not a number: {error}.") from error
        return _check_finite(values, self.label)


def load_scorer(config: ScorerConfig) -> Scorer:
    """The scorer that a configuration names. Raises InputError where there is none, or none that works."""
    kind = next(name for name in SCORERS if getattr(config, name))
    return FunctionScorer(config) if kind == "function" else ModelScorer(config, kind)


def plan_batches(
    scorer: Scorer, prompts: Sequence[str], completions: Sequence[str], batch_size: int
) -> list[list[int]]:
    """Indices of the completions of each batch, longest first."""
    lengths = scorer.lengths(prompts, completions)
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def statistics(rewards: Sequence[Sequence[float]]) -> dict[str, float | int | None]:
    """Of the rewards of each prompt's completions: how many there are, and

    `mean`, over prompts of the mean over completions; `standard_error` of that, over prompts (None for one prompt);
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


def _import_function(name: str) -> Callable[..., Any]:
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise InputError(f"function={name!r}: module:function is needed, such as rewards:length.")
    directory = str(Path.cwd())
    if sys.path[:1] != [directory]:
        sys.path.insert(0, directory)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's file raises
        raise InputError(
            f"function={name!r}: the module {module_name!r} cannot be imported ({type(error).__name__}: {error}); it "
            f"is looked for in {directory} and among the installed packages."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        held = "no function" if function is None else f"{function!r}, not a function,"
        raise InputError(f"function={name!r}: the module {module_name!r} holds {held} named {function_name!r}.")
    return function


def _check_finite(values: list[float], what: str) -> list[float]:
    for value in values:
        if not math.isfinite(value):
            raise InputError(f"{what}: it gave {value} as a reward; finite numbers are needed.")
    return values


# The stage


@dataclass
class ScoreConfig(ScorerConfig):
    """`exo-fast score`: a scorer, and what to do with its rewards."""

    mode: Literal["label", "label-pref", "eval"] = _field(
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
    state = start_processes(config)
    scorer = load_scorer(config)
    sources = find_splits(config)
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
    run = ResumableRun(config.output_dir, identity, state)
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
    if state.is_main_process:
        for split, count in counts.items():
            print(f"{split}: " + _in_words(count))
        print(f"the rows are in {config.output_dir}", flush=True)
    return summary


def _row(example: Example) -> dict[str, Any]:
    return {"prompt": example.prompt, "completions": example.completions, **example.extras()}


def _score_split(
    config: ScoreConfig, scorer: Scorer, run: ResumableRun, split: str, rows: list[dict[str, Any]]
) -> list[list[float]]:
    """The rewards of each row's completions."""
    prompts = [row["prompt"] for row in rows for _ in row["completions"]]
    completions = [text for row in rows for text in row["completions"]]
    batches = plan_batches(scorer, prompts, completions, config.batch_size)
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
    """The first of the best and the first of the worst, of each row where they differ, with the ids that were drawn.

    Empty completions are passed over: a reward model has nothing to read in them, and training refuses them.
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
            f"mode=label-pref: the completions of each prompt of the {split} split have one reward, so there is no "
            "preference to write; use another scorer."
        )
    return found


def _holds_pairs(source: Source, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    _, first = next(iter(read_records(source, tokenizer)))
    return isinstance(first, dict) and "chosen" in first and "rejected" in first and "completions" not in first


def _agreement(rewards: list[list[float]]) -> dict[str, float]:
    """How often the scorer ranks chosen above rejected, and how often it gives both one reward."""
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
