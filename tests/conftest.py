"""Shared fixtures: the tiny random models of `families.py`, the chat templates of `chat_forms.py`, and one thread for
tensors too small to gain from two.

Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before they are imported.
"""

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or no test could interrupt a process of its own
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def _load(name: str) -> ModuleType:
    # By path: the tests folder stays off sys.path, where its subfolders would shadow packages of the same name.
    spec = importlib.util.spec_from_file_location(f"exo_fast_test_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_families, _chats, _chat_forms = _load("families"), _load("chats"), _load("chat_forms")


@pytest.fixture
def families() -> ModuleType:
    """`tests/families.py`: tiny_model(name), random_model(model_type), the tables SHARING, REFUSING, FAMILIES, and the
    log-probs of a packed row by the definition."""
    return _families


@pytest.fixture(scope="session")
def chat_forms() -> ModuleType:
    """`tests/chat_forms.py`: chat_tokenizer(name) of each of FORMS, with a real chat template."""
    return _chat_forms


@pytest.fixture(scope="session")
def chats() -> ModuleType:
    """`tests/chats.py`: small tokenizers byte_level(template), metaspace(template), and templates."""
    return _chats


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
            metafunc.parametrize(argument, list(getattr(_families, table)))
