"""The precision of float32 products: torch's two interfaces to it, of which each must stay readable."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from exo_fast.precision import bf16_products, fp32_precision, matmul_precision, true_float32

CPU, CUDA = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul


def state() -> tuple[Any, ...]:
    """Every getter of both interfaces; None where one raises."""

    def read(getter: Callable[[], Any]) -> Any:
        try:
            return getter()
        except RuntimeError:
            return None

    getters = (torch.get_float32_matmul_precision, lambda: CUDA.allow_tf32)
    return *map(read, getters), CUDA.fp32_precision, CPU.fp32_precision, torch.backends.fp32_precision


def by_word(word: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(word)


def by_library(cpu: str, cuda: str) -> Callable[[], None]:
    def install() -> None:
        CPU.fp32_precision, CUDA.fp32_precision = cpu, cuda

    return install


@pytest.fixture(autouse=True)
def as_at_the_start() -> Iterator[None]:
    def clear() -> None:
        torch.set_float32_matmul_precision("highest")
        CPU.fp32_precision = CUDA.fp32_precision = "none"

    clear()
    yield
    clear()


USERS = {
    "default": lambda: None,
    "highest": by_word("highest"),
    "high": by_word("high"),
    "medium": by_word("medium"),
    "old switch": lambda: setattr(CUDA, "allow_tf32", True),
    "libraries": by_library("ieee", "ieee"),
}
MIXED = {"tf32 by library": by_library("none", "tf32"), "bf16 by library": by_library("bf16", "none")}
BLOCKS = {
    "ieee": (true_float32, "highest", "ieee", "ieee"),
    "tf32": (lambda: matmul_precision("tf32", "cuda"), "high", "tf32", None),
    "bf16": (lambda: matmul_precision("bf16", "cpu"), "medium", None, "bf16"),
}


@pytest.mark.parametrize("user", [*USERS, *MIXED])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_sets_both_interfaces_and_puts_them_back(block: str, user: str) -> None:
    (USERS | MIXED)[user]()
    before = state()
    context, word, cuda, cpu = BLOCKS[block]
    with context():
        now = state()
        # torch.compile and FlexAttention read the first, other people's code the second.
        assert now[0] == word
        assert now[1] is not None
        assert cuda in (None, now[2])
        assert cpu in (None, now[3])
    if user in USERS:
        assert state() == before
    else:  # what only one interface knew; the other may have learned it
        assert state()[2:] == before[2:]


def test_ieee_leaves_the_users_setting() -> None:
    torch.set_float32_matmul_precision("high")
    before = state()
    with matmul_precision("ieee", "cuda"):
        assert state() == before


def test_bf16_products_inside_a_block() -> None:
    with true_float32():
        with bf16_products(torch.bfloat16):
            assert CPU.fp32_precision == "bf16"
            assert fp32_precision() == "ieee"
        assert state()[:2] == ("highest", False)


def test_a_model_is_compiled_inside_a_block() -> None:
    """torch.compile reads the precision for its cache, FlexAttention for its kernels."""
    for context in (true_float32, lambda: matmul_precision("bf16", "cpu")):
        with context():
            got = torch.compile(lambda a, b: (a @ b).relu(), backend="inductor")(torch.eye(8), torch.ones(8, 8))
        assert torch.equal(got, torch.ones(8, 8))
