"""Decide whether a model's rows may share their prompts, by its configuration and by numbers."""

from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from exo_fast.layout import Group, shortened
from exo_fast.masks import neighbours_hint
from exo_fast.sharing import CHECKED_GROUPS
from exo_fast.training.data.groups import GroupCollator, GroupDataset
from exo_fast.training.errors import InputError, not_its_own
from exo_fast.training.models.modules import AlignModule, CausalModule

logger = logging.get_logger(__name__)


@torch.no_grad()
def settle_layout(
    module: AlignModule, dataset: GroupDataset, collate: GroupCollator, *, share_prompt: bool
) -> dict[str, Any]:
    """Set `collate.share_prompt`: by the caller's wish, by the model's plan, and by numbers on the first groups.

    Warns if candidates should share their prompt and cannot. Returns the decision, its reason, and the
    measured differences (nats, `SharingReport`), for the summary. Raises InputError if sequence parallelism gives other
    log-probs than rows in one piece, and as `need_own_numbers`.
    """
    shared = share_prompt and module.plan.share
    reason = "" if shared else module.plan.reason if share_prompt else "switched off"
    measured = {}
    if shared or module.sequence is not None:
        groups = [shortened(dataset.group(index), module.plan) for index in range(min(CHECKED_GROUPS, len(dataset)))]
        (report,) = module.eval()(check=groups, check_shared=shared)
        if shared and not report.ok:
            shared, reason = False, report.reason
            if module.sequence is not None:
                (report,) = module(check=groups, check_shared=False)
        if module.sequence is not None and not report.ok:
            raise InputError(
                f"sequence_parallel={module.sequence.size}: this model cannot be run on parts of rows: {report.reason}."
            )
        measured = {"token_rms": report.token_rms, "sequence_max": report.sequence_max}
    if share_prompt and not shared:
        candidates = dataset.counts.candidates
        logger.warning(f"Candidates cannot share their prompt, which is run {candidates} times instead: {reason}")
    collate.share_prompt, collate.by_length = shared, module.plan.by_length
    need_own_numbers(module, dataset, shared=shared)
    return {"share_prompt": shared, "reason": reason, "mask": module.plan.kind, **measured}


@torch.no_grad()
def need_own_numbers(module: CausalModule, dataset: GroupDataset, *, shared: bool) -> None:
    """Raise InputError if the log-probs of the shortest sequence differ between a batch with the longest group and a
    run alone. Checks only if `neighbours_hint` says they might. `shared`: whether candidates share their prompt."""
    hint = neighbours_hint(module.config)
    if not hint:
        return
    lengths = dataset.sequence_lengths()
    index, candidate = np.unravel_index(lengths.argmin(), lengths.shape)
    group = dataset.group(int(index))
    shortest, longest = Group(group.prompt, [group.completions[candidate]]), dataset.group(int(lengths.max(1).argmax()))
    (report,) = module.eval()(neighbours=(shortest, longest), check_shared=shared)
    if not report.ok:
        raise not_its_own(module.config, hint, report.reason)
