"""The fields of a stage's configuration: help texts, and checks that several stages share."""

import re
from dataclasses import field
from typing import Any

from exo_fast.training.errors import InputError
from exo_fast.training.files import user_path

SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
TEMPERATURES = 1e-6, 1e6  # the smallest and the largest
PRECISION_HELP = (
    "How float32 matrices are multiplied: ieee, or with rounded operands and float32 sums: tf32 on CUDA, bf16 on CPU "
    "(about twice as fast there); fast takes the one of these two that the device has."
)


def temperature_problem(temperature: float) -> str | None:
    """Return what a sampling temperature must be, or None if this one is valid.

    Logits are divided by it in float32: a smaller one makes them infinite, a larger one makes them all equal.
    """
    least, largest = TEMPERATURES
    return None if least <= temperature <= largest else f"a number from {least} to {largest:.0e} is needed"


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "268435456", "512MB" or "1.5 GiB". Raises InputError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    size = float(match[1]) * SIZE_UNITS.get(match[2].upper(), 0) if match else 0
    if not 1 <= size < 2**63:
        raise InputError(f"memory_budget={text!r}: a size is needed, such as 512MB or 1.5GiB.")
    return int(size)


def option(default: Any, help: str) -> Any:
    """Return a field of a configuration with its text in --help."""
    return field(default=default, metadata={"help": help})


def need_value(config: Any, name: str, what: str) -> None:
    """Raise InputError if a field without a default is not set."""
    if not getattr(config, name):
        raise InputError(f"{name}={getattr(config, name)!r}: name {what}.")


def resolve(precision: str, *, on_cpu: bool) -> str:
    """Return "ieee", or the precision that "fast" means on the device. Raises InputError if the device lacks it."""
    rounded = "bf16" if on_cpu else "tf32"
    if precision == "fast":
        return rounded
    if precision not in ("ieee", rounded):
        raise InputError(
            f"matmul_precision={precision!r}: ieee or bf16 is needed on CPU, ieee or tf32 on CUDA; this run is on "
            f"{'CPU' if on_cpu else 'CUDA'} (fast fits both)."
        )
    return precision


def check_model_name(config: Any, name: str = "model_name_or_path") -> None:
    """Raise InputError unless the config's field `name` is set, and is a directory if it looks like a path."""
    value = getattr(config, name)
    if not value:
        raise InputError(f"{name}={value!r}: name a model (a directory or a Hub name).")
    path = user_path(value, name)
    if path.is_dir():
        setattr(config, name, str(path))
    elif value.startswith(("/", "./", "../", "~")):
        raise InputError(f"{name}={value!r}: no such directory.")
