"""Score completions: by a reward model, a classifier or a function."""

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

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from exo_fast.precision import matmul_precision
from exo_fast.training import processes
from exo_fast.training.data.texts import encode, pad
from exo_fast.training.errors import InputError
from exo_fast.training.inference.config import InferenceConfig
from exo_fast.training.models.digests import digest
from exo_fast.training.models.loading import check_fits_model, from_pretrained, load_tokenizer
from exo_fast.training.models.scorer import (
    ROUNDED_TOLERANCE,
    TOLERANCE,
    load_scalar_model,
    need_own_numbers,
    reads_at_end,
    scalars,
)
from exo_fast.training.options import check_model_name, option

logger = logging.get_logger(__name__)

SCORERS = ("reward_model", "classifier", "function")


@dataclass
class ScorerConfig(InferenceConfig):
    """Fields of every stage that scores completions; exactly one of the first three is set."""

    reward_model: str | None = option(None, "A reward model: a directory or a Hub name.")
    classifier: str | None = option(None, "A classifier, whose log-odds of the positive class are the reward.")
    function: str | None = option(
        None,
        "module:function, called as function(prompts, completions) with two lists of strings; it returns a list of "
        "numbers. The current directory is searched first.",
    )
    tokenizer: str | None = option(
        None, "For conversations with --function: a model whose tokenizer has a chat template. Others have their own."
    )
    reward_at: Literal["auto", "before_end", "end"] = option(
        "auto",
        "Where a reward model or classifier is read: at the last token before EOS or the end of the turn, as exo-fast "
        "trains it, or at the end itself, as TRL does. auto: at the end where its padding is not EOS.",
    )
    max_seq_len: int = option(512, "Longest prompt plus completion, in tokens; what is too long is cut on the left.")

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
        """Return one finite number per completion; `completions[i]` belongs to `prompts[i]`."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Do in advance the work that the first call would do for all calls."""

    def lengths(self, prompts: Sequence[str], completions: Sequence[str]) -> list[int]:
        """Return the lengths by which batches are sorted."""
        return [0] * len(prompts)


class ModelScorer(Scorer):
    """A reward model or a classifier. The weights are loaded when they are needed."""

    def __init__(self, config: ScorerConfig, kind: str):
        self.config, self.name = config, getattr(config, kind)
        self.checked: list[list[int]] = []  # the shortest and the longest text that there is
        self.tokenizer = load_tokenizer(self.name, trust_remote_code=config.trust_remote_code)
        self.at_end = config.reward_at == "end"
        if config.reward_at == "auto":
            options = {"trust_remote_code": config.trust_remote_code}
            self.at_end = reads_at_end(from_pretrained(AutoConfig, self.name, **options), self.tokenizer)
            if self.at_end:
                logger.warning(
                    f"{kind}={self.name!r}: its padding is not EOS, so it is read at the end of each text, EOS "
                    "included, as TRL trains such models. --reward_at before_end reads it before EOS."
                )
        self.identity = {
            "scorer": kind,
            "reward_at": "end" if self.at_end else "before_end",
            "model": processes.from_first(digest(self.name) if processes.index() == 0 else None),
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
        model = model.to(processes.start(on_cpu=config.use_cpu)).eval()
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
    """A Python function of the user. Another version of its module, or of its own file, counts as another scorer. So
    does another batch size: batches are stored as they are, and the function may look at a whole batch."""

    def __init__(self, config: ScorerConfig):
        name = config.function
        self.label = f"function={name!r}"
        self.tokenizer = None
        if config.tokenizer is not None:
            self.tokenizer = load_tokenizer(config.tokenizer, trust_remote_code=config.trust_remote_code)
        self.function = _import_function(name)
        source = hashlib.sha256()
        # The module too: the source of a decorator's result is the decorator's file, and an object has no file.
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
    """Load the scorer that a configuration names. Raises InputError if it names no scorer, or one that fails."""
    kind = next(name for name in SCORERS if getattr(config, name))
    return FunctionScorer(config) if kind == "function" else ModelScorer(config, kind)


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
