"""Check that everything CONTRIBUTING.md and CHANGELOG.md name exists: every path, make target and name of code."""

import re

import pytest
from tree import ROOT

from exo_fast.version import __version__

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
QUOTED = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.S))
MADE = ("dist/", ".venv", "build/")  # by commands that the page names

PATHS = sorted({q for q in QUOTED if re.fullmatch(r"[\w.-]*(/[\w.-]+)+/?|[\w.-]+/|[\w-]+\.(md|py|txt|toml)", q)})
CODE = "\n".join(re.findall(r"`[^`]+`|```.*?```", PAGE, flags=re.S))
TARGETS = sorted(set(re.findall(r"\bmake ([a-z][a-z-]*)", CODE)))


def test_the_page_names_paths_and_targets() -> None:
    assert len(PATHS) > 40
    assert len(TARGETS) > 12


@pytest.mark.parametrize("path", [p for p in PATHS if not p.startswith(MADE)])
def test_path_is_there(path: str) -> None:
    found = ROOT / path
    assert found.is_dir() if path.endswith("/") else found.is_file()


@pytest.mark.parametrize("target", TARGETS)
def test_target_is_there(target: str) -> None:
    assert re.search(rf"^([\w-]+ )*{target}( [\w-]+)*:", MAKEFILE, flags=re.M)


def test_all_targets_are_named_and_phony() -> None:
    rules = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, flags=re.M)) - {"help", "clean"}
    assert rules <= set(TARGETS)
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)", MAKEFILE, flags=re.M)
    assert phony is not None
    assert rules <= set(phony[1].replace("\\", " ").split())


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("LOSS_TYPES", "exo_fast/reference.py"),
        ("group_loss", "exo_fast/reference.py"),
        ("loss_type", "training/stages/align.py"),
        ("OURS", "training/data/registry.py"),
        ("RawDataset", "training/data/registry.py"),
        ("STAGES", "training/cli/command.py"),
        ("configs", "kernels/group_loss.py"),
        ("variants", "kernels/group_loss.py"),
        ("InputError", "training/errors.py"),
    ],
)
def test_name_is_where_the_page_says(name: str, file: str) -> None:
    assert re.search(rf"[`.]{name}`", PAGE)
    assert re.search(rf"^\s*((def|class) {name}\b|{name}\b.*=)", (ROOT / file).read_text(), flags=re.M)


def test_this_version_heads_the_changelog() -> None:
    versions = re.findall(r"^## \[(.+?)\] - (\d{4}-\d{2}-\d{2})$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert versions[0][0] == __version__
    numbers = [tuple(int(part) for part in version.split(".")) for version, _ in versions]
    dates = [date for _, date in versions]
    assert numbers == sorted(set(numbers), reverse=True)
    assert dates == sorted(dates, reverse=True)
