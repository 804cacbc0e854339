"""setup.py beside the tree: every folder with modules is a package, every file that these need goes along, every
dependency has a pin. smoke.py checks the built archives."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from tree import ROOT


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    """The arguments that setup.py gives to setuptools."""
    setuptools = pytest.importorskip("setuptools", reason="setuptools is not installed: pip install setuptools")
    given: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", given.update)
        runpy.run_path(str(ROOT / "setup.py"))
    return given


def folder_of(package: str, package_dir: dict[str, str]) -> Path:
    """Return the folder in which setuptools looks for a package: below the folder of its nearest parent with one."""
    head, rest = package, ""
    while head not in package_dir:
        head, _, last = head.rpartition(".")
        rest = f"{last}/{rest}"
    return ROOT / package_dir[head] / rest


def test_every_folder_with_modules_is_a_package(options: dict[str, Any]) -> None:
    packaged = {folder_of(package, options["package_dir"]).resolve() for package in options["packages"]}
    roots = {(ROOT / folder).resolve() for folder in options["package_dir"].values()}
    there = {path.parent.resolve() for root in roots for path in root.rglob("*.py")}
    assert there <= packaged
    assert packaged - there == {ROOT / "recipes"}  # which holds recipes alone


def test_files_that_are_no_modules_go_along(options: dict[str, Any]) -> None:
    data = {
        path.resolve()
        for package, patterns in options["package_data"].items()
        for pattern in patterns
        for path in folder_of(package, options["package_dir"]).glob(pattern)
    }
    reports = ROOT / "training" / "reports"
    needed = {*(ROOT / "recipes").glob("*.yaml"), ROOT / "exo_fast" / "py.typed"}
    needed |= {*(ROOT / "kernels" / "tuned").glob("*.json")}
    needed |= {*(reports / "templates").iterdir(), *(reports / "uplot").iterdir()}
    others = {
        path.resolve()
        for folder in ("exo_fast", "training", "recipes", "kernels/tuned")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and "exo_fast/kernels" not in path.as_posix()
    }
    assert data == needed == others


def test_an_index_gets_no_links_to_files(options: dict[str, Any]) -> None:
    text = options["long_description"]
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links
    assert all(link.startswith(("https://", "http://")) for link in links)
    assert "docs/performance.md" in text  # the text of a link stays


def test_every_dependency_is_pinned_within_its_range(options: dict[str, Any]) -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    extras = options["extras_require"]
    built_by_hand = {"flash-attn"}  # needs a GPU's compiler; not in CI
    for line in [*options["install_requires"], *(line for extra in extras.values() for line in extra)]:
        wanted = Requirement(line)
        name = canonicalize_name(wanted.name)
        if name not in built_by_hand:
            assert name in pinned, f"{line}: no pin in constraints.txt"
            assert wanted.specifier.contains(pinned[name]), f"{line}: pinned {pinned[name]}"


def test_extras_that_pages_name_are_there(options: dict[str, Any]) -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*")]
    code = [path for folder in ("exo_fast", "training", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    named = {
        extra
        for path in (*pages, *code)
        if path.is_file() and path.suffix in (".md", ".py")
        for group in re.findall(r"exo_fast\[([\w,-]+)\]", path.read_text())
        for extra in group.split(",")
    }
    assert "train" in named
    assert named <= set(options["extras_require"])
