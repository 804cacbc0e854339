"""The pytest plugin with which `trl_suite` runs TRL's tests: another trainer, local stand-ins, and a record.

It is loaded before a test module is imported, so that `from trl import DPOTrainer` and `from datasets import
load_dataset` in it give the plugin's replacements; the tests are not changed. `trl` is the installed one: it is
imported here, before pytest puts the checkout, which has a `trl` too, at the head of the path.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trl

from exo_fast.benchmarks.trl.standins import INDEX, ORGANIZATION, datasets_folder

TRAINERS = ("trl", "patched", "class", "ours")
LONGEST_REASON = 300


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("exo_fast")
    group.addoption("--trl_trainer", choices=TRAINERS, required=True)
    group.addoption("--trl_home", type=Path, required=True)
    group.addoption("--trl_record", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    put_trainer(config.option.trl_trainer)
    bridge_versions(config.rootpath / "tests" / "testing_utils.py")
    serve_datasets(config.option.trl_home)
    config.pluginmanager.register(Record(config.option.trl_record, config.option.trl_home))


def put_trainer(name: str) -> None:
    """Replace `trl.DPOTrainer` and `trl.DPOConfig` by the classes of the trainer `name`."""
    importlib.import_module("trl.trainer.dpo_trainer")  # else trl's lazy import would undo the replacement
    if name != "trl":
        from exo_fast.integrations import trl as integration
    if name == "patched":
        integration.patch_trl()
    if name in ("class", "ours"):
        trl.DPOTrainer = integration.ExoDPOTrainer
    if name == "ours":
        trl.DPOConfig = integration.ExoDPOConfig


def bridge_versions(utilities: Path) -> None:
    """Give `trl.import_utils` the checks for optional packages that the tests of an older TRL import from it."""
    asked = ast.walk(ast.parse(utilities.read_text()))
    imports = [node for node in asked if isinstance(node, ast.ImportFrom) and node.module == "trl.import_utils"]
    module = importlib.import_module("trl.import_utils")
    for name in (alias.name for node in imports for alias in node.names):
        package = name.removeprefix("is_").removesuffix("_available")
        if not hasattr(module, name):
            setattr(module, name, lambda package=package: importlib.util.find_spec(package) is not None)


def serve_datasets(home: Path) -> None:
    """Make `datasets.load_dataset` read the stand-ins under the names of the data sets on the hub."""
    import datasets

    load: Callable[..., Any] = datasets.load_dataset

    def load_standin(name: str, config: str | None = None, **options: Any) -> Any:
        if not name.startswith(f"{ORGANIZATION}/"):
            return load(name, config, **options)
        folder = datasets_folder(home, name.split("/")[1], config or "default")
        files = {path.stem: str(path) for path in sorted(folder.glob("*.parquet"))}
        return load("parquet", data_files=files, **options)

    datasets.load_dataset = load_standin


class Record:
    """A line of JSON for each test: its name, outcome, why it did not pass, and the loss and gradient norm in the first
    step of each training."""

    def __init__(self, path: Path, home: Path) -> None:
        self.path = path
        self.missing: dict[str, str] = json.loads((home / INDEX).read_text())["missing"]
        self.first_steps: list[list[float]] = []
        self.start = 0.0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Skip tests that load a model without a stand-in. Run Liger's tests last, because Liger patches transformers
        for the rest of the process, with kernels that do not run everywhere."""
        items.sort(key=lambda item: "liger" in item.name)
        for item in items:
            used = [name for name in self.missing if names(item, f"{ORGANIZATION}/{name}")]
            if used:
                item.add_marker(pytest.mark.skip(reason=f"no stand-in for its model: {self.missing[used[0]]}"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        from transformers import Trainer

        step = Trainer.training_step

        def noted(trainer: Trainer, *args: Any, **options: Any) -> Any:
            loss = step(trainer, *args, **options)
            if not trainer.state.global_step:  # in later steps, rates of 0.1 and bf16 amplify rounding too much
                gradients = [p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]
                self.first_steps.append([loss.item(), torch.stack(gradients).norm().item()])
            return loss

        Trainer.training_step, self.first_steps, self.start = noted, [], time.perf_counter()
        try:
            return (yield)
        finally:
            Trainer.training_step = step

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        outcome = "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
        row = {
            "test": report.nodeid.split("::", 1)[1],
            "outcome": outcome,
            "why": reason(report),
            "first_steps": self.first_steps,
            "seconds": time.perf_counter() - self.start,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def names(item: pytest.Item, hub_name: str) -> bool:
    """Check whether a test has the name in its code or its parameters."""
    assert isinstance(item, pytest.Function)
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return hub_name in (*item.function.__code__.co_consts, *parameters)


def reason(report: pytest.TestReport) -> str:
    """Return in one line the exception of a failure, or why a test was skipped."""
    if report.outcome == "passed":
        return ""
    if isinstance(report.longrepr, tuple):
        text = report.longrepr[2].removeprefix("Skipped: ")
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = crash.message if crash else str(report.longrepr)
    return text.strip().splitlines()[0][:LONGEST_REASON]
