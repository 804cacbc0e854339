"""The package as installed: light to import, and without a top-level `kernels` that would shadow Hugging Face's."""

import subprocess
import sys
from pathlib import Path

from tree import ROOT


def python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_loss_pulls_in_no_training_dependency(tmp_path: Path) -> None:
    code = (
        "import sys, exo_fast.loss, exo_fast.logprobs, exo_fast.statistics, exo_fast.layout, exo_fast.head;"
        "import exo_fast.integrations;"
        "heavy = 'transformers', 'accelerate', 'deepspeed', 'datasets', 'peft', 'trl', 'matplotlib', 'torch._dynamo';"
        "print([m for m in heavy if m in sys.modules])"
    )
    assert python(code, tmp_path) == "[]"


def test_kernels_and_training_are_parts_of_exo_fast(tmp_path: Path) -> None:
    assert python("import exo_fast.kernels, exo_fast.training; print('ok')", tmp_path) == "ok"


def test_folder_kernels_shadows_nothing(tmp_path: Path) -> None:
    """A namespace folder on sys.path gives way to any real package named `kernels` further down the path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("who = 'Hugging Face'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.who)"
    assert python(code, ROOT) == "Hugging Face"
