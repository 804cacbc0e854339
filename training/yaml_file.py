"""The YAML of recipes: text, numbers, true, false, null, lists and mappings, and nothing else.

A scalar has the type that it looks like. YAML 1.1 reads `1e-6` as text and `off` as a boolean; no recipe means that.
Every problem is an InputError that names the line. Aliases can make a few lines grow without end, so the size is
bounded.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml

from exo_fast.data.fields import shorten
from exo_fast.training.errors import InputError

MAX_BYTES, MAX_VALUES, MAX_DEPTH = 2**18, 100_000, 20
TAG = "tag:yaml.org,2002:"
MERGE = f"{TAG}merge"
# Each kind of scalar: its pattern, the characters it begins with, and its conversion to Python.
SCALARS: dict[str, tuple[str, list[str], Callable[[str], Any]]] = {
    "null": ("null|Null|NULL|~|", ["n", "N", "~", ""], lambda text: None),
    "bool": (
        "true|True|TRUE|false|False|FALSE",
        list("tTfF"),
        lambda text: {"true": True, "false": False}[text.lower()],
    ),
    "int": ("[-+]?[0-9]+", list("-+0123456789"), int),
    "float": (
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?",
        list("-+.0123456789"),
        float,
    ),
    "merge": ("<<", ["<"], str),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, list]] = {}


for _kind, (_pattern, _first, _) in SCALARS.items():
    _Loader.add_implicit_resolver(TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), _first)


class Entry(NamedTuple):
    """A name in a mapping and its value. `written` is a scalar's text, a list's texts (None for an item that is not a
    scalar), and None for null and for a mapping."""

    name: str
    line: int
    value: Any
    written: str | list[str | None] | None


def read(path: Path) -> bytes:
    """Return the content of a file, or its beginning if it is too large. Raises InputError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte
        raise InputError(f"cannot be read: {getattr(error, 'strerror', error)}.") from error


def load(content: str | bytes) -> Any:
    """Return the value of YAML text. Raises InputError for invalid YAML and for more than a recipe can hold."""
    root = _compose(content)
    return None if root is None else _Values().of(root)


def entries(content: str | bytes) -> Iterator[Entry]:
    """Yield the entries of YAML text that is a mapping, one by one. Raises InputError as `load` does, and if the text
    is not a mapping."""
    root = _compose(content)
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise InputError("a mapping of field names to values is needed.")
    values = _Values()
    for key, node in _pairs(root):
        value, written = values.of(node), None
        if isinstance(node, yaml.ScalarNode) and value is not None:
            written = node.value
        elif isinstance(node, yaml.SequenceNode):
            written = [item.value if isinstance(item, yaml.ScalarNode) else None for item in node.value]
        yield Entry(key.value, _line(key), value, written)


def _compose(content: str | bytes) -> yaml.Node | None:
    """Parse YAML into nodes, without constructing values."""
    content = content.encode(errors="surrogatepass") if isinstance(content, str) else content
    if len(content) > MAX_BYTES:
        raise InputError(f"more than {MAX_BYTES >> 10} KiB, which no recipe is.")
    try:
        return yaml.compose(content.decode("utf-8-sig"), _Loader)
    except RecursionError as error:
        raise InputError("not valid YAML: lists and mappings are nested too deeply.") from error
    except Exception as error:  # PyYAML's own, and errors it does not catch, such as chr's for an escape
        raise InputError(f"not valid YAML: {error}") from error


def _pairs(mapping: yaml.MappingNode) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """Yield the names and values of a mapping. Raises InputError if a name is not a scalar or is repeated."""
    seen: set[str] = set()
    for key, value in mapping.value:
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(f"line {_line(key)}: a name is needed before the colon.")
        if key.value in seen and key.tag != MERGE:
            raise InputError(f"line {_line(key)}: key {shorten(key.value)} is set twice.")
        seen.add(key.value)
        yield key, value


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


class _Values:
    """Converts nodes to values and counts them. A node counts again at each alias that names it."""

    def __init__(self) -> None:
        self.count = 0

    def of(self, node: yaml.Node, depth: int = 0) -> Any:
        """Return the value of a node. Raises InputError for a node that a recipe cannot hold."""
        self.count += 1
        where = f"line {_line(node)}"
        if self.count > MAX_VALUES or depth > MAX_DEPTH:
            raise InputError(
                f"{where}: more than {MAX_VALUES:,} values, counting those behind aliases, or lists nested deeper than "
                f"{MAX_DEPTH}."
            )
        kind = node.tag.removeprefix(TAG)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.of(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, depth)
        if isinstance(node, yaml.ScalarNode) and kind == "str":
            return node.value
        if not isinstance(node, yaml.ScalarNode) or kind not in SCALARS:
            raise InputError(f"{where}: {shorten(node.tag)} is not taken here; write a plain value.")
        try:
            return SCALARS[kind][2](node.value)
        except (ValueError, KeyError) as error:
            raise InputError(f"{where}: {shorten(node.value)} is no {kind}.") from error

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        """Return a mapping. Its own values override the values of mappings that it names after <<."""
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, value in _pairs(node):
            found = self.of(value, depth + 1)
            if key.tag != MERGE:
                own[key.value] = found
                continue
            for source in found if isinstance(found, list) else [found]:
                if not isinstance(source, dict):
                    raise InputError(f"line {_line(key)}: a mapping is needed after <<.")
                merged = source | merged
        return merged | own
