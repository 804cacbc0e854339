"""A launch without a GPU: the source that Triton's launcher would compile for a variant's arguments.

Types, hints (multiples of 16) and constants come from the functions the launcher itself calls, so the binary made ahead
of time equals the binary of a launch. These functions are not public: `constraints.txt` pins their version of Triton.
"""

import re
from typing import Any

import torch
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from exo_fast.kernels.launch import Config, Variant
from exo_fast.kernels.targets import Target

ELEMENTS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "i8": torch.int8,
    "i32": torch.int32,
    "i64": torch.int64,
}


class Example:
    """A tensor as Triton sees it when it types and hints the arguments of a launch."""

    def __init__(self, dtype: torch.dtype, aligned: bool, small: bool):
        self.dtype, self._aligned, self._small = dtype, aligned, small

    def data_ptr(self) -> int:
        return 16 if self._aligned else 8

    def ptr_range(self) -> int:
        return 2**20 if self._small else 2**40


def example(kind: str, aligned: bool, small: bool) -> Any:
    """Return an argument of a launch for a type of a signature. Integers are small, whatever their declared width."""
    if kind.startswith("*"):
        return Example(ELEMENTS[kind[1:]], aligned, small)
    if kind.startswith("tensordesc"):
        element, shape = re.match(r"tensordesc<(\w+)\[(.*)\]>", kind).groups()
        block = [int(size) for size in shape.split(",")]
        strides = [1024] * (len(block) - 1) + [1]
        return TensorDescriptor(Example(ELEMENTS[element], True, small), [1024] * len(block), strides, block)
    if kind.startswith("i"):
        return 16 if aligned else 17
    return 0.5


def source_of(variant: Variant, config: Config, target: Target, buffers: bool) -> tuple[ASTSource, list[str]]:
    """Return the source of a variant as Triton's own launcher specialises it for example arguments, and the places at
    which the variant declares something else.

    Names of a Config's constants may be in the shape of a descriptor: tensordesc<bf16[BLOCK_N,BLOCK_D]>.
    """
    kernel, backend = variant.kernel, make_backend(target.gpu)
    constants = {**config.constants, **variant.constants}
    if unknown := set(kernel.arg_names) - {*variant.signature, *constants}:
        raise ValueError(f"variant {variant.name!r} gives no type for {sorted(unknown)}: add them to its signature")
    declared, arguments = {}, {}
    for name in kernel.arg_names:
        aligned = name in variant.aligned
        if name in constants:
            arguments[name] = constants[name]
            continue
        shaped = re.sub(r"(?<=[\[,])\s*([A-Z_]\w*)", lambda m: str(constants[m[1]]), variant.signature[name])
        arguments[name] = example(shaped, aligned, buffers)
        declared[name] = (shaped.replace(" ", ""), aligned and not shaped.startswith("tensordesc"))
    bound, specialization, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(**arguments)
    _, signature, constexprs, hints = kernel._pack_args(backend, {}, bound, specialization, {})
    differing = []
    for place, (name, kind) in enumerate(signature.items()):
        given = (kind.replace(" ", ""), ["tt.divisibility", 16] in hints.get((place,), []))
        if name in declared and declared[name] != given:
            words = [f"{kind}{', a multiple of 16' * multiple}" for kind, multiple in (declared[name], given)]
            differing.append(f"{name} is declared {words[0]} and launched as {words[1]}")
    return ASTSource(kernel, signature, constexprs, hints), differing
