"""`exo-fast doctor`: on this machine, and where packages are missing or do not fit, and where numbers are wrong."""

import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from subprocesses import environment

from exo_fast.backends import torch as torch_backend
from exo_fast.training.cli import doctor, installed
from exo_fast.training.cli.command import main
from exo_fast.training.machine import version as installed_version
from exo_fast.version import __version__

HEAVY = ("transformers", "deepspeed", "accelerate", "datasets", "peft", "tensorboard", "yaml", "tqdm", "pandas", "trl")
BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
from exo_fast.training.cli import main
sys.exit(main())
"""


def run_without(blocked: tuple[str, ...], env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run `exo-fast doctor --json` in a Python without these packages."""
    command = [sys.executable, "-c", BLOCKED.format(blocked=blocked), "doctor", "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**environment(), **(env or {})})


@pytest.fixture(scope="module")
def found() -> dict:
    return doctor.examine()


def test_this_machine_is_described_and_right(found: dict) -> None:
    assert found["ok"]
    assert json.loads(json.dumps(found)) == found
    assert found["exo_fast"] == __version__
    assert found["python"] == platform.python_version()
    packages = {row["name"]: row for row in found["packages"]}
    assert packages["torch"]["for"] == "core"
    assert packages["transformers"]["version"] == installed_version("transformers")
    assert packages["trl"]["for"] != "train"
    assert set(found["backends"]) == set(doctor.LIMITS)
    assert found["machine"]["memory_gb"] > 0


def test_the_check_compares_two_computations(found: dict) -> None:
    rows = {row["dtype"]: row for row in found["checks"] if row["device"] == "cpu" and row["backend"] == "torch"}
    assert set(rows) == set(doctor.LIMITS)
    for dtype, row in rows.items():
        assert all(0 < row["errors"][name] <= row["limit"] for name in ("dH", "dW")), dtype  # of itself it would be 0
    assert rows["float64"]["errors"]["dW"] < 1e-9 < rows["float32"]["errors"]["dW"] < rows["bfloat16"]["errors"]["dW"]


def test_text_says_what_is_found(found: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"name": "trl", "version": None, "needed": ">=1", "for": "trl", "state": "missing"}
    broken = {"what": "torch is odd", "fix": "pip install 'torch>=2'"}
    changed = {**found, "packages": [{**missing, "command": "pip install 'exo_fast[trl]'"}], "problems": [broken]}
    text = doctor.text(changed)
    assert "\n  ! torch is odd\n      pip install 'torch>=2'\n" in text
    assert "\n  pip install 'exo_fast[trl]'  # trl\n" in text
    assert text.endswith("\nthe core works here")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[33mmissing\x1b[0m" in doctor.text(changed)
    assert doctor.text(changed).endswith("\x1b[32mthe core works here\x1b[0m")


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_wrong_numbers_and_exceptions_are_status_1(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right: Callable = torch_backend.group_loss_forward

    def wrong(*arguments: object) -> tuple:
        if fault == "raises":
            raise RuntimeError("an odd library")
        loss, logps, (grad_hidden, *others) = right(*arguments)
        grad_hidden.mul_(1.1)
        return (loss, logps, (grad_hidden, *others))

    monkeypatch.setattr(torch_backend, "group_loss_forward", wrong)
    assert main(["doctor", "--json"]) == 1
    said = capsys.readouterr()
    rows = [row for row in json.loads(said.out)["checks"] if (row["backend"], row["device"]) == ("torch", "cpu")]
    assert len(rows) == len(doctor.LIMITS)
    assert not any(row["ok"] for row in rows)
    assert said.err.endswith("the core does not work here\n")
    if fault == "raises":
        assert rows[0]["failed"] == "RuntimeError: an odd library"
    else:
        assert rows[0]["errors"]["dH"] == pytest.approx(0.1, rel=1e-3)
        assert rows[0]["errors"]["dW"] < 1e-5


def test_torch_numpy_and_triton_are_enough_and_the_kernels_are_checked_in_the_interpreter() -> None:
    done = run_without(HEAVY, {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if importlib.util.find_spec("triton"):
        kernels = [row for row in found["checks"] if row["backend"] == "triton"]
        assert {row["dtype"] for row in kernels} == {"float32", "bfloat16", "float16"}
        assert all(row["ok"] for row in kernels)


def test_without_torch_the_rest_is_said() -> None:
    done = run_without(("torch",))
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["checks"] == []
    assert any("No module named 'torch'" in problem["what"] for problem in found["problems"])
    assert "Traceback" not in done.stderr


# Requirements, from metadata that is made for the test


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make a distribution that importlib.metadata finds before any other: name, version, lines of METADATA."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name: str, version: str, *lines: str) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        head = ("Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}")
        (folder / "METADATA").write_text("\n".join([*head, *lines]) + "\n")

    return make


EXO_FAST = (
    "Requires-Python: >=3.11",
    "Requires-Dist: alpha-lib>=2.9",
    'Requires-Dist: beta-lib>=3.4; platform_system == "Linux"',
    'Requires-Dist: gamma-lib>=1; platform_system == "Plan 9"',
    'Requires-Dist: delta_lib[fast]<6,>=5; extra == "train"',
    'Requires-Dist: delta-lib<6,>=5; extra == "bench"',
    'Requires-Dist: trl>=1; extra == "bench"',
    "Provides-Extra: bench",
    "Provides-Extra: train",
)


def test_needs_are_those_of_this_system(install: Callable[..., None]) -> None:
    install("exo_fast", "9.0", *EXO_FAST)
    needs = {(need.name, need.specifier, need.extra) for need in installed.needs("exo_fast")}
    expected = {("alpha-lib", ">=2.9", None), ("beta-lib", ">=3.4", None), ("trl", ">=1", "bench")}
    expected |= {("delta-lib", "<6,>=5", "train"), ("delta-lib", "<6,>=5", "bench")}
    assert needs == expected
    assert installed.command_for("Delta_lib") == "pip install 'exo_fast[train]'"  # which brings least else
    assert installed.command_for("trl") == "pip install 'exo_fast[bench]'"
    assert installed.command_for("alpha-lib") == "pip install 'alpha-lib>=2.9'"
    assert installed.command_for("unknown") == "pip install 'unknown'"
    assert installed.needs("not-there-at-all") == []


@pytest.mark.parametrize(
    ("version", "specifier", "right"),
    [
        ("2.13.0+cpu", ">=2.9", True),
        ("2.9.0", ">=2.10", False),
        ("3.5.0.dev20261101", ">=3.4", True),
        ("1.17.0", "<1.17,>=1.15", False),
        ("0.1", "", True),
    ],
)
def test_ranges(version: str, specifier: str, right: bool) -> None:
    assert installed.fits(version, specifier) is right


def test_packages_that_do_not_go_together_are_problems_with_a_command(install: Callable[..., None]) -> None:
    install("exo_fast", __version__, *EXO_FAST)
    install("alpha-lib", "2.10", "Requires-Dist: beta-lib==3.5.0", 'Requires-Dist: nowhere; extra == "test"')
    install("beta-lib", "3.3")
    install("delta-lib", "5.5", "Requires-Dist: epsilon-lib>=1")
    rows = doctor.packages()
    states = {row["name"]: (row["for"], row["state"]) for row in rows}
    assert states["alpha-lib"] == ("core", "ok")
    assert states["beta-lib"] == ("core", "out of range")
    assert states["delta-lib"] == ("train", "ok")
    problems = {problem["what"]: problem["fix"] for problem in doctor.package_problems(rows)}
    assert problems["beta-lib 3.3 is installed, and >=3.4 is needed"] == "pip install 'beta-lib>=3.4'"
    assert problems["alpha-lib 2.10 needs beta-lib==3.5.0, and 3.3 is installed"] == "pip install 'beta-lib==3.5.0'"
    assert problems["delta-lib 5.5 needs epsilon-lib>=1, and it is not installed"] == "pip install 'epsilon-lib>=1'"
    assert not any("nowhere" in what for what in problems)


def test_old_metadata_is_a_problem(install: Callable[..., None]) -> None:
    install("exo_fast", "0.0.1", "Requires-Python: >=3.11")
    assert any("installed says 0.0.1" in problem["what"] for problem in doctor.package_problems([]))


def test_a_python_that_is_too_old_is_a_problem(install: Callable[..., None]) -> None:
    install("exo_fast", __version__, "Requires-Python: >=99")
    (problem,) = doctor.package_problems([])
    assert problem["what"] == f"Python {platform.python_version()} is not one exo_fast is made for"


def test_gpus_that_torch_cannot_use_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpu = {"name": "Tesla V100", "memory_gb": 16.0, "capability": "7.0"}
    (problem,) = doctor.hardware_problems({"torch_built_for": "CUDA 12.8", "gpus": [gpu]})
    assert "compute capability 7.0" in problem["what"]
    assert doctor.hardware_problems({"torch_built_for": "CUDA 12.8", "gpus": [{**gpu, "capability": "9.0"}]}) == []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (problem,) = doctor.hardware_problems({"torch_built_for": "ROCm 7.0", "gpus": [{**gpu, "capability": "gfx942"}]})
    assert problem["fix"] == "unset TRITON_INTERPRET"
