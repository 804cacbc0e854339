"""The preset `long_sequence`, for rows whose activations fill the memory, and the tiled MLP it switches on.

Beside attention (made of parts that know the mask, or by FlexAttention) and the head (in a scratch of its own), a row
of T tokens leaves two things in memory until the backward pass. With checkpointing they are the input of every layer,
and in the one layer that is recomputed, the inner activations of its MLP, 3 to 4 times the intermediate size a token.
Offloading removes the former, tiling the latter.

DeepSpeed has a TiledMLP too. It computes each piece's gradients by a backward pass inside the backward pass. A mark on
the parameters makes its own ZeRO optimizers wait for the last piece; other engines (DDP) do not know the mark. A
checkpoint around each piece leaves the graph an ordinary one, in which a parameter has its gradient once.
"""

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from exo_fast.training.errors import InputError

TILE_TOKENS = 1024  # of a sequence; a row of K candidates has as many pieces as one candidate, each K times as long


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
    """Apply `forward` to (B, T, D) in pieces; returns (B, T, D)."""
    parts = hidden.reshape(1, -1, hidden.shape[-1]).tensor_split(pieces, dim=1)  # each contiguous, which some ask for
    return torch.cat([checkpoint(forward, part, use_reentrant=False) for part in parts], dim=1).view(hidden.shape)
