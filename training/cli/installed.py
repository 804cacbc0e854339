"""What exo_fast needs of other packages, as its own installed metadata says it: never a list that could grow stale.

Read without importing the packages, which would take seconds and may fail, the more so where something is wrong.
"""

from __future__ import annotations

import collections
import functools
import importlib
import re
from dataclasses import dataclass
from importlib import metadata
from typing import Any

MODULES = {"yaml": "pyyaml", "flash_attn": "flash-attn", "cut_cross_entropy": "cut-cross-entropy"}  # of other names
PACKAGING = ("packaging", "pip._vendor.packaging", "setuptools._vendor.packaging")  # torch alone brings no packaging
REQUIREMENT = re.compile(r"([\w.-]+) *(?:\[[^]]*\])? *(.*)")  # name, extras, range


@dataclass(frozen=True)
class Need:
    """A requirement of a distribution that counts on this system."""

    name: str
    specifier: str  # such as ">=2.9"; empty for any version
    extra: str | None  # the extra that asks for it; None: it is always needed


@functools.cache
def _packaging(module: str) -> Any:
    """A module of `packaging`, on its own or as pip or setuptools carry it; None where there is none."""
    for place in PACKAGING:
        try:
            return importlib.import_module(f"{place}.{module}")
        except ImportError:
            continue
    return None


def can_judge() -> bool:
    """Whether ranges of versions can be judged here, for which `packaging` is needed."""
    return _packaging("specifiers") is not None


def version(name: str) -> str | None:
    """The installed version of a distribution, None when it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def needs(distribution: str) -> list[Need]:
    """The requirements of an installed distribution, once for each extra; of one that is not installed, none."""
    try:
        about = metadata.metadata(distribution)
    except metadata.PackageNotFoundError:
        return []
    extras = about.get_all("Provides-Extra") or []
    found = []
    for line in about.get_all("Requires-Dist") or []:
        requirement, _, marker = line.partition(";")
        name, specifier = REQUIREMENT.findall(requirement.strip())[0]
        asking = [None] if _holds(marker, "") else [extra for extra in extras if _holds(marker, extra)]
        found += [Need(_normal(name), specifier.strip("() "), extra) for extra in asking]
    return found


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")


def _holds(marker: str, extra: str) -> bool:
    """Whether a marker such as `platform_system == 'Linux' and extra == 'train'` is true here for an extra."""
    if not marker.strip():
        return True
    module = _packaging("markers")
    if module is None:  # the extra alone; what is for some versions of Python only is left out
        if "python_" in marker:
            return False
        named = re.search(r"extra *== *['\"]([^'\"]+)", marker)
        return (named[1] if named else "") == extra
    return bool(module.Marker(marker.strip()).evaluate({"extra": extra}))


def fits(installed: str, specifier: str) -> bool:
    """Whether an installed version is in the range of a specifier; pre-releases and local builds (+cpu) are judged by
    their number. True where nothing can be judged."""
    module = _packaging("specifiers")
    return module is None or module.SpecifierSet(specifier).contains(installed, prereleases=True)


def python_fits(python: str) -> bool:
    """Whether exo_fast is made for this version of Python."""
    return fits(python, (metadata.metadata("exo_fast").get_all("Requires-Python") or [""])[0])


def command_for(name: str) -> str:
    """The command that installs a distribution: with the extra of exo_fast that asks for it and for least else."""
    need = own_need(name)
    if need is None or need.extra is None:
        return f"pip install '{_normal(name)}{need.specifier if need else ''}'"
    return f"pip install 'exo_fast[{need.extra}]'"


def own_need(name: str) -> Need | None:
    """What exo_fast itself asks of a distribution, by the extra that asks for least else; None: nothing."""
    own = needs("exo_fast")
    sizes = collections.Counter(need.extra for need in own)
    asked = [need for need in own if need.name == _normal(name)]
    return min(asked, key=lambda need: 0 if need.extra is None else sizes[need.extra], default=None)


def distribution_of(module: str) -> str:
    """The distribution that brings a top-level module."""
    top = module.partition(".")[0]
    return MODULES.get(top, top)
