"""Continue on another number of processes than wrote the checkpoint.

ZeRO 1 to 3 write the optimizer in as many shards as there are processes. DeepSpeed's universal checkpoint joins them
by parameter, and any number of processes can take its shares of it. It is made once, in a temporary place, when a run
continues this way. ZeRO 0 and plain PyTorch have the whole state in one file and do not need it.
"""

import shutil
from argparse import Namespace
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.utils import logging

from exo_fast.training import processes
from exo_fast.training.errors import RunError
from exo_fast.training.trainer import checkpoints

logger = logging.get_logger(__name__)


def load(engine: Any, checkpoint: Path, *, strict: bool) -> None:
    """Load a DeepSpeed checkpoint, written by any number of processes, into `engine`. All processes must call it.

    `strict`: whether the checkpoint must have every weight of the model. A checkpoint of adapters alone does not.
    """
    saved_by = checkpoints.facts(checkpoint).processes
    if saved_by == processes.count() or not engine.zero_optimization():
        deepspeed_load_checkpoint(engine, str(checkpoint), load_module_strict=strict)
        return
    with checkpoints.unfinished(checkpoint.parent, "universal") as folder:
        universal = folder / "universal"
        problem = _convert(checkpoint, universal) if processes.index() == 0 else None
        if (problem := processes.from_first(problem)) is not None:
            raise RunError(
                f"{checkpoint} was written by {saved_by} processes and cannot be converted for {processes.count()} "
                f"({problem}); continue with {saved_by}."
            )
        before, optimizer = engine._config.load_universal_checkpoint, engine.optimizer.optimizer
        options = [_options(group) for group in optimizer.param_groups]
        engine._config.load_universal_checkpoint = True
        try:
            engine.load_checkpoint(str(universal), load_module_strict=strict)
        finally:
            engine._config.load_universal_checkpoint = before
        _repair(optimizer, options)
        processes.wait()  # before it is removed


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter group's options from the run's settings: all but the parameters and the scheduled learning
    rate."""
    return {name: value for name, value in group.items() if name not in ("params", "lr")}


def _repair(optimizer: torch.optim.Optimizer, options: list[dict[str, Any]]) -> None:
    """Undo two loading errors of ZeRO 3: every group gets the first group's weight decay, and all share one counter of
    steps, which each group would then count up."""
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _convert(checkpoint: Path, universal: Path) -> str | None:
    """Write the universal checkpoint to `universal`; return an error's text, if there was one."""
    from deepspeed.checkpoint import ds_to_universal

    tag = (checkpoint / "latest").read_text().strip()
    shutil.rmtree(universal, ignore_errors=True)
    options = Namespace(
        input_folder=str(checkpoint / tag),
        output_folder=str(universal / tag),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # fill in the pipeline state of Megatron's checkpoints, which ours lack
    )
    said = StringIO()
    try:
        universal.mkdir(parents=True)
        with redirect_stdout(said):
            ds_to_universal.main(options)
    except Exception as error:
        logger.warning(said.getvalue())
        return f"{type(error).__name__}: {error}"
    return None
