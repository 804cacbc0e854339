"""`exo-fast completion SHELL`: a script that completes stages, their options, choices and file names in a shell.

The script is made by shtab from the parsers that the stages themselves use, once, and is static: pressing Tab starts no
Python. Options of stages whose packages are missing are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exo_fast.training.cli.installed import command_for, distribution_of
from exo_fast.training.errors import InputError
from exo_fast.training.terminal import give_result, paint

SHELLS = ("bash", "zsh", "tcsh", "fish")
# Options that name files or directories, beside options that are declared as paths or called *_dir.
PATHS = ("config", "data", "eval_data", "deepspeed", "reference", "reward_model", "classifier", "model", "tokenizer")
PATHS += ("model_name_or_path", "ref_name_or_path", "tokenizer_name_or_path", "resume_from_checkpoint", "policies")

DESCRIPTION = """\
Print a script that completes exo-fast's stages, options, choices and file names. It is made from the stages that can be
used here: print it again after a new version, or after installing exo_fast[train]. Needs exo_fast[completion]."""

EXAMPLES = """\
examples:
  exo-fast completion bash                                                          # prints it
  exo-fast completion bash > ~/.local/share/bash-completion/completions/exo-fast    # from the next shell on
  source <(exo-fast completion bash)                                                # in this bash
  exo-fast completion zsh > ~/.zfunc/_exo-fast    # with `fpath+=~/.zfunc; autoload -Uz compinit; compinit` in .zshrc
  exo-fast completion fish > ~/.config/fish/completions/exo-fast.fish
  exo-fast completion tcsh > ~/.exo-fast.tcsh     # and `source ~/.exo-fast.tcsh` in .tcshrc
"""


def parser() -> argparse.ArgumentParser:
    """Return the options of `exo-fast completion`."""
    made = argparse.ArgumentParser(
        prog="exo-fast completion",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("shell", choices=SHELLS, help="Whose script.")
    return made


def main(argv: Sequence[str]) -> int:
    """Print the script; returns 0. Raises InputError if shtab is missing."""
    shell = parser().parse_args(argv).shell
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise InputError(f"the script is made by shtab, which is not installed: {command_for('shtab')}") from error
    if shell not in shtab.SUPPORTED_SHELLS:
        raise InputError(f"shtab {shtab.__version__} has no {shell}: pip install --upgrade shtab")
    script = shtab.complete(whole_parser(), shell=shell)
    print(script)
    give_result({"shell": shell, "script": script})
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """Return one parser with every stage as a subparser. It is read, and parses nothing."""
    from exo_fast.training.cli.command import FLAGS, STAGES

    whole = argparse.ArgumentParser(prog="exo-fast")
    whole.add_argument("--version", action="store_true", help="show the version")
    _add_flags(whole, FLAGS)
    stages = whole.add_subparsers(dest="stage")
    missing: dict[str, list[str]] = {}
    for name, stage in STAGES.items():
        empty = stages.add_parser(name, help=stage.summary)
        try:
            made = stage.parser(f"exo-fast {name}")
        except ModuleNotFoundError as error:
            missing.setdefault(str(error.name), []).append(name)
            made = empty
        _add_flags(made, FLAGS)
        _say_what_completes(made)
        stages.choices[name] = made
    for module, names in missing.items():
        command = command_for(distribution_of(module))
        note = f"{module} is not installed, so options are left out of {', '.join(names)} ({command})"
        print(paint(note, "yellow", sys.stderr), file=sys.stderr)
    return whole


def _add_flags(parser: argparse.ArgumentParser, flags: dict[str, str]) -> None:
    """Add the flags of every command, except one that is also a field of the stage."""
    for flag, what in flags.items():
        if flag not in parser._option_string_actions:
            parser.add_argument(flag, action="store_true", help=what)


def _say_what_completes(parser: argparse.ArgumentParser) -> None:
    """Mark file names, give choices to options that take one of a few words, and leave one spelling of each option."""
    from shtab import DIRECTORY, FILE

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _say_what_completes(inner)
            continue
        action.option_strings = [word for word in action.option_strings if "-" not in word[2:]] or action.option_strings
        marked: Any = action  # shtab reads an attribute that argparse does not have
        if action.choices is None:
            action.choices = getattr(action, "words", None)  # no choices in the parser, whose error names the nearest
        if action.choices is not None or action.nargs == 0:
            continue
        if action.dest.endswith("_dir") or action.dest == "output":
            marked.complete = DIRECTORY
        elif action.type is Path or action.dest in PATHS:
            marked.complete = FILE
