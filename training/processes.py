"""The processes of a run speaking with one another, and nothing where there is only one."""

from typing import TypeVar

import torch

Value = TypeVar("Value")


def count() -> int:
    """How many processes run together."""
    return torch.distributed.get_world_size() if _together() else 1


def index() -> int:
    """Which of them this is; 0 writes what is written once."""
    return torch.distributed.get_rank() if _together() else 0


def gather(value: Value) -> list[Value]:
    """The values of all processes, in their order; a collective call, for small values."""
    if count() == 1:
        return [value]
    values: list[Value] = [value] * count()
    torch.distributed.all_gather_object(values, value)
    return values


def from_first(value: Value) -> Value:
    """The first process's value; a collective call."""
    return gather(value if index() == 0 else None)[0]


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        torch.distributed.barrier()


def _together() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
