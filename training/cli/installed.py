"""The packages that exo_fast requires, read from its own installed metadata.

Packages are not imported: that takes seconds, and may fail if something is wrong.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

MODULES = {"yaml": "pyyaml", "flash_attn": "flash-attn", "cut_cross_entropy": "cut-cross-entropy"}  # other names


@dataclass(frozen=True)
class Need:
    """A requirement of a distribution that counts on this system."""

    name: str
    specifier: str  # such as ">=2.9"; empty for any version
    extra: str | None  # the extra that asks for it; None: it is always needed


def needs(distribution: str) -> list[Need]:
    """Return the requirements of a distribution, once for each extra; nothing if it is not installed."""
    try:
        about = metadata.metadata(distribution)
    except metadata.PackageNotFoundError:
        return []
    found = []
    for requirement in map(Requirement, about.get_all("Requires-Dist") or []):
        marker = requirement.marker
        extras: list[str | None] = [None]
        if marker is not None and not marker.evaluate({"extra": ""}):
            extras = [extra for extra in about.get_all("Provides-Extra") or [] if marker.evaluate({"extra": extra})]
        found += [Need(canonicalize_name(requirement.name), str(requirement.specifier), extra) for extra in extras]
    return found


def fits(version: str, specifier: str) -> bool:
    """Check whether a version is in a range; pre-releases and local builds (+cpu) count by their number."""
    return SpecifierSet(specifier).contains(version, prereleases=True)


def own_need(name: str) -> Need | None:
    """Return the version range that exo_fast requires, with the smallest extra that includes the package."""
    own = needs("exo_fast")
    sizes = collections.Counter(need.extra for need in own)
    asked = [need for need in own if need.name == canonicalize_name(name)]
    return min(asked, key=lambda need: 0 if need.extra is None else sizes[need.extra], default=None)


def command_for(name: str) -> str:
    """Return the command that installs a distribution, by the smallest extra of exo_fast that includes it."""
    need = own_need(name)
    if need is None or need.extra is None:
        return f"pip install '{canonicalize_name(name)}{need.specifier if need else ''}'"
    return f"pip install 'exo_fast[{need.extra}]'"


def distribution_of(module: str) -> str:
    """Return the distribution that brings a top-level module."""
    top = module.partition(".")[0]
    return MODULES.get(top, top)
