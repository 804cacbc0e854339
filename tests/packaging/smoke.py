"""Check the package that a user installs: the built wheel in an empty environment, without the repository.

    python tests/packaging/smoke.py DIST    # DIST holds one wheel and one source archive, as `make dist` leaves them

It looks into both archives, installs the wheel with its requirements and no extra, and runs everything that works
without an extra: the losses against their definitions, and the commands that need no training stack or say which
package to install. Then it installs the source archive in the wheel's place and compares the files. Packages come from
the index, most of them from pip's cache if that is warm. Exit status 0 if every check passes; the first one that fails
ends the run and prints its findings.
"""

from __future__ import annotations

import argparse
import email
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Where the modules of the installed package lie in the repository.
FOLDERS = {
    "exo_fast/kernels": "kernels",
    "exo_fast/training": "training",
    "exo_fast/benchmarks": "benchmarks",
    "exo_fast/recipes": "recipes",
    "exo_fast": "exo_fast",
}
BESIDE = ("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "constraints.txt", "setup.py")
IMPORT_SECONDS = 3.0  # `import exo_fast.loss`, of which torch's own import is nearly all

LIGHT = """
import sys, time
import exo_fast.loss
seconds = time.process_time()  # of this process alone, whatever else the machine does
heavy = ("transformers", "deepspeed", "datasets", "accelerate", "peft", "trl", "matplotlib", "torch._dynamo")
print(seconds, *[name for name in heavy if name in sys.modules])
"""

EXACT = """
import torch
from exo_fast import reference
from exo_fast.loss import linear_group_loss

torch.manual_seed(0)
groups, candidates, length, width, vocab = 2, 3, 5, 16, 301
rows = groups * candidates * length
hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
batch = (
    torch.randint(vocab, (rows,)),
    torch.arange(0, rows + 1, length),
    torch.randn(groups, candidates) - 30,
    torch.rand(groups, candidates),
)
for loss_type in reference.LOSS_TYPES:
    options = {"loss_type": loss_type, "beta_pi": 0.1, "beta_r": 0.1}
    options["label_smoothing"] = reference.default_label_smoothing(loss_type)
    found, found_logps = linear_group_loss(hidden, weight, *batch, **options)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    targets, boundaries, ref_logps, rewards = batch
    meant, meant_logps = reference.linear_group_loss(
        *exact, targets, boundaries, ref_logps.double(), rewards.double(), **options
    )
    of_ours, of_theirs = torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(meant, exact)
    for a, b in zip((found, found_logps, *of_ours), (meant, meant_logps, *of_theirs)):
        error = float((a.double() - b).norm() / b.norm())
        assert error < 1e-5, (loss_type, error)
print("ok")
"""


class Failed(Exception):
    """A check that does not hold, and what was found instead."""


@contextmanager
def check(what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    print(f"ok  {what} ({time.perf_counter() - started:.1f} s)", flush=True)


def need(holds: bool, found: object) -> None:
    if not holds:
        raise Failed(str(found))


def only(directory: Path, pattern: str) -> Path:
    """The one file that matches, so that no other version's is taken."""
    files = sorted(directory.glob(pattern))
    need(len(files) == 1, f"one {pattern} is needed in {directory}, found {[f.name for f in files]}: run make dist")
    return files[0]


def source_of(name: str) -> Path:
    """The file of the repository that `name` in the wheel was made of."""
    folder = next(f for f in FOLDERS if name.startswith(f"{f}/"))
    return ROOT / FOLDERS[folder] / name[len(folder) + 1 :]


def module_files() -> set[str]:
    """Return the names of the wheel's files: every module, recipe, marker and template of the repository."""
    found = set()
    for installed, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            below = path.relative_to(ROOT / folder)
            is_part = (
                path.suffix == ".py"
                or path.name == "py.typed"
                or (folder == "recipes" and path.suffix == ".yaml")
                or (folder == "kernels" and path.suffix == ".json")
                or (folder == "training" and path.is_file() and path.parent.name in ("templates", "uplot"))
            )
            linked = folder == "exo_fast" and below.parts[0] == "kernels"  # the link by which the checkout finds them
            if is_part and not linked and "__pycache__" not in below.parts:
                found.add(f"{installed}/{below.as_posix()}")
    return found


def check_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if ".dist-info/" not in n]
        need(set(names) == module_files(), f"not as the repository: {sorted(set(names) ^ module_files())}")
        stale = [n for n in names if archive.read(n) != source_of(n).read_bytes()]
        need(not stale, f"older or newer than the repository: {stale}; run make dist again")
        tops = {n.split("/")[0] for n in archive.namelist()}
        info = next(t for t in tops if t.endswith(".dist-info"))
        need(tops == {"exo_fast", info}, f"more than exo_fast would land in site-packages: {tops}")
        check_metadata(archive.read(f"{info}/METADATA").decode())
        for licence in ("LICENSE", "training/reports/uplot/LICENSE"):
            need(f"{info}/licenses/{licence}" in archive.namelist(), f"the licence is missing: {licence}")


def check_metadata(text: str) -> None:
    """Check the page of a package index, which has no files beside it: a link to one would be dead."""
    about = email.message_from_string(text)
    need(about["License-Expression"] == "Apache-2.0", about["License-Expression"])
    need(about["Description-Content-Type"] == "text/markdown", about["Description-Content-Type"])
    body = str(about.get_payload())
    dead = re.findall(r"\]\((?!https?://)[^)]*\)", body)
    need("# exo_fast" in body and not dead, f"links that lead nowhere on an index: {dead}")
    extras = set(about.get_all("Provides-Extra", []))
    named = set(re.findall(r"exo_fast\[(\w+)\]", (ROOT / "README.md").read_text()))
    need(named <= extras, f"the README names extras that are none: {named - extras}")


def check_archive(archive: Path) -> None:
    with tarfile.open(archive) as files:
        names = {n.partition("/")[2] for n in files.getnames()}
    sources = {str(source_of(n).relative_to(ROOT)) for n in module_files()}
    missing = sorted((sources | set(BESIDE)) - names)
    need(not missing, f"missing in {archive.name}: {missing}")
    doubled = [n for n in names if n.startswith("exo_fast/kernels")]
    need(not doubled, f"kernels/ is there twice: {doubled}")


class Environment:
    """An empty virtual environment, and a folder beside nothing to run it in."""

    def __init__(self, directory: Path):
        venv.create(directory / "venv", with_pip=True)
        self.bin, self.cwd = directory / "venv" / "bin", directory / "elsewhere"
        self.cwd.mkdir()
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "TRITON_"))}
        self.env["PATH"] = f"{self.bin}:{os.environ['PATH']}"

    def run(self, *command: str, status: int = 0) -> str:
        """stdout and stderr of a command that must end with `status`."""
        done = subprocess.run(
            command,
            cwd=self.cwd,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        need(done.returncode == status, f"{' '.join(command)[:200]}\nexit status {done.returncode}:\n{done.stdout}")
        return done.stdout

    def pip_install(self, *what: str) -> None:
        self.run(
            str(self.bin / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--progress-bar",
            "off", "--no-compile", *what,
        )  # fmt: skip

    def python(self, code: str) -> str:
        return self.run(str(self.bin / "python"), "-c", code)

    def installed(self) -> set[str]:
        """The files of exo_fast that pip put there, byte code aside."""
        listed = self.python("from importlib.metadata import files; print(*files('exo_fast'), sep='\\n')").split()
        return {name for name in listed if name.startswith("exo_fast/") and not name.endswith(".pyc")}


def check_commands(there: Environment, version: str) -> None:
    command = str(there.bin / "exo-fast")
    with check("exo-fast --version, --help"):
        need(there.run(command, "--version").split() == ["exo-fast", version], there.run(command, "--version"))
        need("align" in there.run(command, "--help"), "no stage in the help")
    with check("exo-fast doctor: the core works, and what is missing is named"):
        told = there.run(command, "doctor")
        need("exo_fast[train]" in told and version in told, told)
    with check("exo-fast recipes list: needs no extra"):
        need("hh" in there.run(command, "recipes", "list"), "no recipe")
    with check("exo-fast align and run: name the extra that they need"):
        for words in (("align", "--help"), ("run", "mine.yaml")):
            told = there.run(command, *words, status=2)
            need("exo_fast[train]" in told and "Traceback" not in told, told)


def smoke(dist: Path) -> None:
    wheel, archive = only(dist, "*.whl"), only(dist, "*.tar.gz")
    version = wheel.name.split("-")[1]
    with check(f"{wheel.name} holds every module and nothing beside exo_fast"):
        check_wheel(wheel)
    with check(f"{archive.name} holds what the wheel is made of"):
        check_archive(archive)
    with tempfile.TemporaryDirectory() as directory:
        with check("an empty environment"):
            there = Environment(Path(directory))
        with check("pip install of the wheel"):
            there.pip_install("-c", str(ROOT / "constraints.txt"), str(wheel))
        with check("pip check"):
            there.run(str(there.bin / "python"), "-m", "pip", "check")
        with check("nothing but exo_fast of ours in site-packages"):
            for name in ("kernels", "training", "benchmarks", "recipes", "tests", "examples"):
                there.python(f"import importlib.util as u; assert u.find_spec({name!r}) is None, {name!r}")
        with check(f"import exo_fast.loss within {IMPORT_SECONDS:.0f} s, without a training library"):
            there.python(LIGHT)  # the first import reads torch from disk
            seconds, *heavy = there.python(LIGHT).split()
            need(float(seconds) < IMPORT_SECONDS and not heavy, f"{seconds} s, imports {heavy}")
        with check("every loss and its gradients are their definitions"):
            need(there.python(EXACT).strip().endswith("ok"), "no result")
        check_commands(there, version)
        with check("the source archive installs as the same files"):
            before = there.installed()
            there.pip_install("--no-deps", "--force-reinstall", str(archive))
            need(there.installed() == before, sorted(there.installed() ^ before))
            need(there.python("import exo_fast; print(exo_fast.__version__)").strip() == version, "another version")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("dist", type=Path, help="the folder that make dist filled")
    dist = parser.parse_args().dist.resolve()
    started = time.perf_counter()
    try:
        smoke(dist)
    except Failed as failure:
        print(f"smoke test failed: {failure}", file=sys.stderr)
        return 1
    print(f"the built package works ({time.perf_counter() - started:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
