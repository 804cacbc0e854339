"""Keep losses and gradients that are not finite from the weights, and trace them to their rows.

DeepSpeed's ZeRO optimizers skip a step whose gradient norm is not finite and report it (`overflow`; in bf16 with
check_grad_overflow, which exo_fast.training.trainer.deepspeed sets). `GradientGuard` does the same for a plain torch
optimizer (ZeRO 0 in float32, and engine=torch).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

FOLDER = "non-finite"
SHOWN = 8  # rows that a message names
MOST_SKIPPED = 10  # consecutive skipped steps: after more, the weights themselves must be the cause


class GradientGuard:
    """A check before each step of an optimizer. If the gradients' norm is not finite, they are dropped, which skips the
    step. The norm and the step's losses are read from the device at once: the host waits for it one time in a step."""

    def __init__(self) -> None:
        self.overflow = self.lost = False  # the norm, or a loss, was not finite
        self.batches: list[MicroBatch] | None = None  # whose losses were read

    def watch(self, optimizer: torch.optim.Optimizer, step_batches: Callable[[], list["MicroBatch"]]) -> None:
        """Check the gradients before every step of `optimizer` from now on, and the losses of `step_batches()`."""
        optimizer.register_step_pre_hook(lambda *_: self._before(optimizer, step_batches()))

    def _before(self, optimizer: torch.optim.Optimizer, batches: list["MicroBatch"]) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        numbers = torch.stack([norm.float(), *(batch.loss.to(norm.device, torch.float32) for batch in batches)])
        finite, *finite_losses = torch.isfinite(numbers).tolist()
        self.overflow, self.lost, self.batches = not finite, not all(finite_losses), batches
        if self.overflow:
            for parameter in parameters:
                parameter.grad = None


@dataclass
class MicroBatch:
    """The inputs and outputs of one forward of this step."""

    inputs: dict[str, Any]
    loss: Tensor  # ()
    metrics: Tensor  # (R, M)

    def bad_rows(self) -> list[int]:
        """Return the `index` of rows with a metric that is not finite; of all rows if only the loss is not finite."""
        bad = ~torch.isfinite(self.metrics).all(dim=1)
        if not bad.any() and not torch.isfinite(self.loss):
            bad = torch.ones_like(bad)
        return self.inputs["index"][bad].tolist()

    @property
    def rows(self) -> list[int]:
        return self.inputs["index"].tolist()


def save(step_batches: list[MicroBatch], folder: Path, process: int) -> None:
    """Write this process's micro-batches of a step as `process-P-micro-M.safetensors`, and their losses and rows as
    JSON beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, batch in enumerate(step_batches):
        place = folder / f"process-{process}-micro-{number}"
        tensors = {name: torch.as_tensor(value) for name, value in batch.inputs.items() if _is_array(value)}
        tensors |= {"metrics": batch.metrics}
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            place.with_suffix(".safetensors"),
        )
        about = {"loss": str(float(batch.loss)), "rows": batch.rows, "rows that are not finite": batch.bad_rows()}
        place.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def format_rows(rows: list[int]) -> str:
    """Return the numbers of the first rows as text for a message."""
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return ", ".join(map(str, rows[:SHOWN])) + more
