"""The layers of pyproject.toml, which `make lint` checks: an import that goes up is found."""

import subprocess
import sys
from pathlib import Path

import pytest
from tree import ROOT


@pytest.mark.parametrize("planted", [False, True])
def test_an_import_that_goes_up_is_found(tmp_path: Path, planted: bool) -> None:
    pytest.importorskip("importlinter", reason="import-linter is not installed: pip install 'exo_fast[dev]'")
    build = [sys.executable, "setup.py", "-q", "build_py", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (tmp_path / "exo_fast" / "kernels" / "__init__.py").touch()
    if planted:
        with (tmp_path / "exo_fast" / "training" / "data" / "places.py").open("a") as file:
            file.write("\nfrom exo_fast.training.stages import align\n")
    lint = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    options = [str(ROOT / "pyproject.toml"), "--no-cache", "--no-logo"]
    done = subprocess.run([*lint, *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == (1 if planted else 0), done.stdout + done.stderr
    assert ("exo_fast.training.data.places -> exo_fast.training.stages.align" in done.stdout) == planted
