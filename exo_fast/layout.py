"""The one data layout: candidates share their prompt, several groups to a row.

A row is `[prompt][candidate 1]…[candidate K]`, then the next group. Positions restart at len(prompt) with
every candidate, and the mask (`exo_fast.masks`) keeps candidates and groups apart, so a prompt is run once
instead of K times. The state at the last prompt token predicts the first token of all K candidates.

The losses see any layout as three index lists: `source`, the hidden states that predict, `targets`, the tokens they
predict, and `cu_seqlens`, the starts of the candidates' tokens, in the order in which groups and
candidates were given. Rows with one sequence each (for models that cannot share) and ordinary padded
batches map onto the same three lists.
"""

from __future__ import annotations

from exo_fast.masks import MaskPlan, model_inputs, plan_mask
from exo_fast.packing import Group, Packed, from_padded, pack
from exo_fast.sharing import SharingReport, check_neighbours, check_sharing, shortened

__all__ = [
    "Group",
    "MaskPlan",
    "Packed",
    "SharingReport",
    "check_neighbours",
    "check_sharing",
    "from_padded",
    "model_inputs",
    "pack",
    "plan_mask",
    "shortened",
]
