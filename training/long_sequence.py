"""The preset `long_sequence`, for rows whose activations fill the memory, and the tiled MLP it switches on.

What a row of T tokens leaves in memory until the backward pass is, beside attention (which is made of parts that know
the mask, or by FlexAttention) and the head (which works in a scratch of its own): the input of every layer, with
checkpointing, and within the one layer that is made again, the inner activations of its MLP, 3 to 4 times the
intermediate size a token. The latter is what tiling takes out, the former what offloading does.

DeepSpeed has a TiledMLP too. It computes each piece's gradients by a backward pass inside the backward pass and tells
its own ZeRO optimizers by a mark on the parameters to wait for the last piece, which other engines (DDP) cannot know.
A checkpoint around each piece leaves the graph an ordinary one, in which a parameter has its gradient once.
"""

import ctypes
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from exo_fast.training.errors import InputError

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
TILE_TOKENS = 1024  # of a sequence; a row of K candidates has as many pieces as one of them, each K times as long


def apply(config: Any) -> dict[str, Any]:
    """Set the fields of an AlignConfig that the preset is about and that are still None; returns which, and to what."""
    wanted: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "tiled_mlp": True,
    }
    if config.activation_checkpointing is None:  # transformers' other name for it
        wanted["gradient_checkpointing"] = True
    if torch.cuda.is_available() and not config.use_cpu:
        wanted["attn_implementation"] = "flex_attention"
        if config.gradient_checkpointing is not False and config.activation_checkpointing is not False:
            wanted["activation_checkpointing_kwargs"] = {"offload": True}
    chosen = {name: value for name, value in wanted.items() if getattr(config, name) is None}
    for name, value in chosen.items():
        setattr(config, name, value)
    return chosen


def give_back_freed_memory() -> None:
    """On a CPU with glibc: have every block of a MB and more mapped by itself, and so given back when it is freed.

    Unless told so, glibc keeps blocks of up to 32 MB in its heap, where the activations of long rows leave holes that
    later ones do not fit: the peak of two processes on one row of 16,320 tokens was 7 GB with less than half in use.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**20)


def preset_line(chosen: dict[str, Any]) -> str:
    """What the preset set, for the terminal."""
    return "long_sequence: " + ", ".join(f"{name} {value}" for name, value in chosen.items())


def tile_mlps(model: nn.Module, *, max_seq_len: int) -> int:
    """Let every MLP of `model` work on its tokens piece by piece; returns the number of pieces.

    That number is the same for every row, because under ZeRO-3, which gathers a layer's weights in each of its calls,
    all ranks must make as many. Only these modules' `forward` is replaced, so a model made later is not tiled. Raises
    InputError for a model without such MLPs.
    """
    pieces = -(-max_seq_len // TILE_TOKENS)
    found = [module for name, module in model.named_modules() if name.endswith(".mlp") and _is_mlp(module)]
    if not found:
        raise InputError(
            f"tiled_mlp=True: {type(model).__name__} has no MLPs that take one token like another (a module `mlp` that "
            "is not a mixture of experts); set --tiled_mlp false."
        )
    for module in found:
        module.forward = partial(_in_pieces, module.forward, pieces)
    return pieces


def _is_mlp(module: nn.Module) -> bool:
    return len(inspect.signature(module.forward).parameters) == 1 and not hasattr(module, "experts")


def _in_pieces(forward: Callable[[Tensor], Tensor], pieces: int, hidden: Tensor) -> Tensor:
    """(B, T, D) -> (B, T, D)."""
    parts = hidden.reshape(1, -1, hidden.shape[-1]).tensor_split(pieces, dim=1)  # each contiguous, which some ask for
    return torch.cat([checkpoint(forward, part, use_reentrant=False) for part in parts], dim=1).view(hidden.shape)
