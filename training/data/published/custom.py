"""custom/sft, custom/pref, custom/rw, custom/class: any data in the format that stages exchange."""

from typing import Any

from exo_fast.training.data.registry import RawDataset, register


@register("custom/sft")
@register("custom/pref")
@register("custom/rw")
@register("custom/class")
class Custom(RawDataset):
    """Records as they are; the stage that reads them reports missing fields."""

    def to_record(self, row: Any) -> Any:
        """Return `row` itself."""
        return row
