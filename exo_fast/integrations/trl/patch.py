"""`patch_trl`: TRL's own trainers on the fused path. Importing this module checks TRL's version (TESTED)."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from exo_fast.backends import BACKENDS
from exo_fast.integrations.trl.forward import FusedForward, fuse, fusible
from exo_fast.layout import plan_mask
from exo_fast.validate import check_budget

try:
    import trl
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("exo_fast.integrations.trl needs TRL: pip install 'exo_fast[trl]'", name="trl") from error

logger = logging.get_logger(__name__)
TESTED = ("1.15", "1.16")  # minor versions whose interface this module knows: tested on 1.15.0 and 1.16.0
HEAD = "add_fused_lm_head"
HEAD_PARAMETERS = ("model", "temperature", "cast_lm_head_to_fp32", "outputs")
TRAINERS = ("dpo", "kto", "grpo", "rloo", "sft")


def check_version() -> None:
    """Raise ImportError if this TRL is not one of the tested versions."""
    found = trl.__version__
    parameters: tuple[str, ...] = ()
    if ".".join(found.split(".")[:2]) in TESTED:
        utils = importlib.import_module("trl.trainer.utils")
        parameters = tuple(inspect.signature(_original(utils)).parameters)
    if parameters != HEAD_PARAMETERS:
        raise ImportError(
            f"trl {found}: exo_fast.integrations.trl is tested with {', '.join(f'{v}.x' for v in TESTED)}, and other "
            f"versions compute log-probs in other ways. pip install 'trl>={TESTED[0]},<{_next(TESTED[-1])}'"
        )


def _next(version: str) -> str:
    major, minor = version.split(".")
    return f"{major}.{int(minor) + 1}"


def _original(module: ModuleType) -> Any:
    current = getattr(module, HEAD)
    return getattr(current, "exo_fast_original", current)


check_version()


def patch_trl(
    *,
    trainers: Sequence[str] = TRAINERS,
    share_prompts: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> None:
    """Let every TRL trainer created after this call use the fused path. A second call replaces the settings.

    Args:
        trainers: which: dpo, kto, grpo, rloo, sft.
        share_prompts: run a prompt once for the rows of a batch that have it, if the model allows it; the first such
            batch is computed both ways and compared. False leaves rows as they are.
        memory_budget: bytes of vocabulary-sized scratch; see `exo_fast.logprobs.linear_logprobs`.
        backend: auto, triton, torch or reference.

    Models that `exo_fast.head.read_head` does not know and multimodal ones keep TRL's own head, with a warning. GRPO's
    entropy bonus needs a gradient of the entropy, which is missing here: asking for it is an error in backward.

    Raises ValueError for an unknown trainer.
    """
    unknown = sorted(set(trainers) - set(TRAINERS))
    if unknown:
        raise ValueError(f"trainers={list(trainers)}: {unknown[0]!r} is not one of {', '.join(TRAINERS)}.")
    check_options(memory_budget, backend)
    unpatch_trl()
    for name in trainers:
        module = importlib.import_module(f"trl.trainer.{name}_trainer")
        original = getattr(module, HEAD)
        options = {"memory_budget": memory_budget, "backend": backend}
        setattr(module, HEAD, fused_lm_head(original, share_prompts, options))


def check_options(memory_budget: int | None, backend: str) -> None:
    check_budget(memory_budget)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known; choose one of {', '.join(BACKENDS)}.")


def unpatch_trl() -> None:
    """Let trainers created after this use TRL's own head again. Earlier ones keep the head they have."""
    for name in TRAINERS:
        module = importlib.import_module(f"trl.trainer.{name}_trainer")
        setattr(module, HEAD, _original(module))


@contextmanager
def fused_heads(**options: Any) -> Iterator[None]:
    module = importlib.import_module("trl.trainer.dpo_trainer")
    before = getattr(module, HEAD)
    setattr(module, HEAD, fused_lm_head(_original(module), **options))
    try:
        yield
    finally:
        setattr(module, HEAD, before)


def fused_lm_head(original: Any, share_prompts: bool, options: dict[str, Any]) -> Any:
    """Return a replacement of TRL's `add_fused_lm_head`."""
    from trl.trainer.utils import FusedCausalLMOutput

    def add_fused_lm_head(
        model: PreTrainedModel,
        temperature: float = 1.0,
        cast_lm_head_to_fp32: bool = False,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> None:
        original(model, temperature=temperature, cast_lm_head_to_fp32=cast_lm_head_to_fp32, outputs=outputs)
        why_not = fusible(model)
        if why_not:
            logger.warning(f"exo_fast: {type(model).__name__} keeps TRL's head: {why_not}")
            return
        fused = FusedForward(
            fallback=model.forward,
            output_class=FusedCausalLMOutput,
            plan=plan_mask(model.config),
            temperature=temperature,
            cast_lm_head_to_fp32=cast_lm_head_to_fp32,
            outputs=tuple(outputs),
            share_prompts=share_prompts,
            options=dict(options),
        )
        if share_prompts and not fused.plan.share:
            logger.warning(f"exo_fast: rows of one prompt do not share it: {fused.plan.reason}")
        fuse(model, fused)

    add_fused_lm_head.exo_fast_original = original  # type: ignore[attr-defined]
    return add_fused_lm_head
