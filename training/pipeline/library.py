"""`exo-fast recipes`: the recipes that come with exo_fast, to look at and to copy.

They are files beside the code; nothing reads them by name. Users run their own copy, which they can see and change.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from exo_fast.training.errors import InputError, nearest
from exo_fast.training.files import write_file
from exo_fast.training.terminal import give_result

FOLDER = Path(__file__).resolve().parents[2] / "recipes"  # in a checkout and in an installed package

DESCRIPTION = "List, show or copy the recipes that come with exo_fast."
EXAMPLES = """\
examples:
  exo-fast recipes list
  exo-fast recipes show imdb
  exo-fast recipes copy imdb                 # to imdb.yaml in this directory
  exo-fast recipes copy imdb experiments/    # or to a directory or file of another name
"""


def find_recipes() -> dict[str, str]:
    """Return the first line of each recipe's file, by the recipe's name."""
    return {path.stem: _summary(path) for path in sorted(FOLDER.glob("*.yaml"))}


def _summary(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()


def read(name: str) -> str:
    """Return the text of the recipe `name`. Raises InputError for an unknown name, naming the nearest."""
    known = find_recipes()
    name = name.removesuffix(".yaml")
    if name not in known:
        raise InputError(f"recipe {name!r}: there is none of this name{nearest(name, known)}")
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def copy(name: str, destination: Path) -> Path:
    """Write the recipe `name` to `destination`, a file or an existing directory; return the file's path.

    Raises InputError if the file exists already.
    """
    text = read(name)
    path = destination / f"{name.removesuffix('.yaml')}.yaml" if destination.is_dir() else destination
    if path.exists():
        raise InputError(f"{path} is there already; name another file, or remove that one.")
    return write_file(path.parent, path.name, text.encode())


def parser() -> argparse.ArgumentParser:
    """The options of `exo-fast recipes`."""
    made = argparse.ArgumentParser(
        prog="exo-fast recipes",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = made.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="Names, with a line about each.")
    showing = actions.add_parser("show", help="Print one.")
    copying = actions.add_parser("copy", help="Write one to a file of yours.")
    for one in (showing, copying):
        one.add_argument("name").words = list(find_recipes())  # for shell completion
    copying.add_argument("destination", nargs="?", type=Path, default=Path("."), help="A file or a directory. [.]")
    return made


def main(argv: Sequence[str]) -> int:
    """Run `list`, `show NAME` or `copy NAME [DESTINATION]`; return 0."""
    options = parser().parse_args(argv)
    if options.action == "list":
        found = find_recipes()
        for name, summary in found.items():
            print(f"{name:<10}{summary}")
        give_result({"recipes": [{"name": name, "summary": summary} for name, summary in found.items()]})
    elif options.action == "show":
        text = read(options.name)
        print(text, end="")
        give_result({"name": options.name.removesuffix(".yaml"), "text": text})
    else:
        path = copy(options.name, options.destination.expanduser())
        print(f"written to {path}")
        give_result({"path": str(path)})
    return 0
