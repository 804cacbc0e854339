"""The facts of launching and compiling a kernel that the backend, certification and prediction share."""

from dataclasses import dataclass
from typing import Any

TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}  # pointer types of the operand dtypes
HEADS = (  # the options of a head: the suffix of a variant's name, HAS_BIAS, HAS_SOFTCAP
    ("", False, False),
    (" bias", True, False),
    (" softcap", False, True),
    (" bias+softcap", True, True),
)


@dataclass(frozen=True)
class Config:
    """One point of a kernel's tuning space: its block sizes, and its settings of the compiler's schedule."""

    constants: dict[str, int]  # block sizes, by constexpr name
    num_warps: int
    num_stages: int = 1

    def __str__(self) -> str:
        blocks = "x".join(str(value) for value in self.constants.values())
        return f"{blocks} w{self.num_warps} s{self.num_stages}"


@dataclass(frozen=True)
class Variant:
    """One signature of a kernel's launches; certification compiles it in every configuration."""

    name: str
    kernel: Any  # a triton JITFunction
    signature: dict[str, str]  # every argument: "*bf16", "i32", "fp32", "tensordesc<bf16[128,64]>", "constexpr", …
    constants: dict[str, Any]  # the constexprs that no Config sets
    aligned: tuple[str, ...] = ()  # pointers and sizes known to be multiples of 16
    memory_bound: bool = False  # must move 128 bits an access
    products: bool = False  # must use tensor cores
    descriptors: bool = False  # must load through tensor descriptors
    flattened: bool = False  # must run its loops as one, whose pipeline is filled once
    config: Config | None = None  # launched with this one alone, outside the tuning space


def launch(kernel: Any, grid: tuple[int, ...], config: Config, **arguments: Any) -> None:
    """Launch a kernel once, with the block sizes of `config` that it takes."""
    constants = {name: value for name, value in config.constants.items() if name in kernel.arg_names}
    kernel[grid](**arguments, **constants, num_warps=config.num_warps, num_stages=config.num_stages)
