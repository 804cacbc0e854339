"""Settings of all tests: one thread, since small tensors gain nothing from two, and a parameter for each family.

Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before they are imported.
"""

import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch
from tree import HELPERS

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or no test could interrupt a process of its own
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# processes that tests start import the helpers too, as pytest does (pyproject.toml)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HELPERS), os.environ.get("PYTHONPATH")]))


def pytest_collection_finish() -> None:
    """Let later garbage collections pass over the modules that are imported now: every training asks for one."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Take them back, as libraries count the objects that are left when Python ends."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def keep_environment() -> Iterator[None]:
    """A run without a launcher sets RANK and the like, which a later test's child process must not inherit."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests with an argument of these names run once for each family of the table."""
    tables = {"family": "FAMILIES", "sharing_family": "SHARING", "refusing_family": "REFUSING"}
    for argument, table in tables.items():
        if argument in metafunc.fixturenames:
            import families  # not before Triton's interpreter is chosen

            metafunc.parametrize(argument, list(getattr(families, table)))
