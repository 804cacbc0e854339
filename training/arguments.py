"""Build a stage's configuration object from a YAML recipe and a command line.

A recipe's values become command-line words. One transformers.HfArgumentParser parses them, and then the words of
the command line itself. So there is one set of types and checks, and the command line wins. Scalars are taken as
they are written (exo_fast.training.yaml_file).
"""

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from exo_fast.data.fields import shorten
from exo_fast.training import yaml_file
from exo_fast.training.errors import InputError, nearest
from exo_fast.training.files import user_path

Config = TypeVar("Config")
OTHER_FIELDS = "everything else of transformers.TrainingArguments"
NOT_FIELDS = ("help", "help_all", "config", "json")
NOT_A_VALUE = re.compile(r"-(?!\.?\d)")  # argparse would take it for an option


class _OneSpelling(argparse.RawDescriptionHelpFormatter):
    """Shows an option once: transformers adds `--a-b` to every `--a_b`."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {value}"


class StageParser(HfArgumentParser):
    """HfArgumentParser that shows the fields in the config's `field_groups` first, and the others when asked for."""

    def __init__(self, config_class: type, *, show_all: bool, **kwargs: Any):
        self.show_all = show_all
        super().__init__(config_class, formatter_class=_OneSpelling, allow_abbrev=False, add_help=False, **kwargs)

    def _add_dataclass_arguments(self, config_class: type) -> None:
        general = self.add_argument_group("general")
        general.add_argument("--config", metavar="FILE", help="A YAML recipe; options on the command line override it.")
        general.add_argument("-h", "--help", action="help", help="Show the options that matter most.")
        general.add_argument("--help-all", action="help", help="Show every option.")
        general.add_argument(
            "--json", action="store_true", help="Print the result as one JSON object on stdout, and all else to stderr."
        )
        hints = get_type_hints(config_class)
        fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
        shown = {name for names in config_class.field_groups.values() for name in names}
        for title, names in (*config_class.field_groups.items(), (OTHER_FIELDS, fields.keys() - shown)):
            group = self.add_argument_group(title)
            for name in sorted(names) if title == OTHER_FIELDS else names:
                fields[name].type = hints[name]
                self._parse_dataclass_field(group, fields[name])
            for action in group._group_actions:
                if action.type is string_to_bool:  # a switch needs no value, even if its default is None
                    action.nargs, action.const = "?", True
                if action.nargs == 0 or (title == OTHER_FIELDS and not self.show_all):
                    action.help = argparse.SUPPRESS
                elif action.default is not None and "Default:" not in action.help:
                    action.help += f" [{action.default}]".replace("%", "%%")
                if action.choices is None:
                    action.metavar = getattr(action.type, "__name__", "value").replace("string_to_bool", "bool").upper()

    def format_usage(self) -> str:
        return f"{self.prog} [--config RECIPE.yaml] [--FIELD VALUE ...]\n"

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse_config(config_class: type[Config], argv: Sequence[str], **parser_options: Any) -> Config:
    """Return the configuration that `argv` (with an optional `--config FILE`) describes.

    `config_class` is a dataclass with `field_groups`; `parser_options` (prog, description, epilog) go to
    argparse. Raises InputError for an unknown key or option (naming the nearest), a bad value, or an
    unreadable recipe.
    """
    parser = StageParser(config_class, show_all="--help-all" in argv, **parser_options)
    parser.usage = parser.format_usage()
    recipe_option = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipe_option.add_argument("--config")
    recipe_option.error = parser.error
    recipe, words = recipe_option.parse_known_args(argv)
    recipe_words: list[str] = []
    if recipe.config is not None:
        path = user_path(recipe.config, "config")
        try:
            recipe_words = _recipe_words(parser, get_type_hints(config_class), path)
            parser.parse_args(recipe_words)
        except InputError as error:
            raise InputError(f"{recipe.config}: {error}") from error
    namespace, unknown = parser.parse_known_args([*recipe_words, *words])
    if unknown:
        option = unknown[0].split("=")[0]
        raise InputError(f"unknown option {option!r}{nearest(option, parser._option_string_actions, otherwise='.')}")
    defaults = {field.name: field.default for field in dataclasses.fields(config_class) if field.init}
    values = {name: value for name, value in vars(namespace).items() if name in defaults}
    for name, value in values.items():
        if value == defaults[name]:
            continue  # a default below ~ needs no check: ~ may not exist if nobody asks for it
        for one in value if isinstance(value, list) else [value]:
            _check_value(name, one)
    return config_class(**values)


def _check_value(name: str, value: Any) -> None:
    """Raise InputError for a value that no field can have."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{name}={value}: a finite number is needed.")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise InputError(f"{name}: a number of {value.bit_length()} bits; 63 are enough for any count.")
    if isinstance(value, str):
        if "\0" in value or value != value.encode(errors="replace").decode():
            raise InputError(f"{name}={value!r}: holds a NUL byte, or bytes that are not UTF-8 text.")
        if value.startswith("~"):
            user_path(value, name)


def _recipe_words(parser: StageParser, hints: dict[str, Any], path: Path) -> list[str]:
    """Return the recipe as command-line words. Values without words (null, a list for a field that takes one in
    Python) become defaults of the parser."""
    actions = {action.dest: action for action in parser._actions if action.dest not in NOT_FIELDS}
    words: list[str] = []
    for key, line, value, written in yaml_file.entries(yaml_file.read(path)):
        if key not in actions:
            raise InputError(f"line {line}: unknown key {shorten(key)}{nearest(key, actions, otherwise='.')}")
        if isinstance(written, str):
            words.append(f"--{key}={written}")
        elif isinstance(value, dict):
            words.append(f"--{key}={json.dumps(value)}")
        elif value is None and _takes(hints[key], type(None)):
            parser.set_defaults(**{key: None})
        elif isinstance(value, list) and _takes(hints[key], list):
            if any(text is None or NOT_A_VALUE.match(text) for text in written):
                raise InputError(f"line {line}: {key}: a list of plain values is needed, of which none is an option.")
            if actions[key].nargs == "+":
                words += [f"--{key}", *written]
            else:
                parser.set_defaults(**{key: written})
        else:
            problem = "a list" if isinstance(value, list) else "null (leave the line out for the default)"
            raise InputError(f"line {line}: {key} is {problem}; one value is needed.")
    return words


def _takes(hint: Any, kind: type) -> bool:
    """Check whether a field of this type may hold a value of `kind`."""
    return any((get_origin(option) or option) is kind for option in (hint, *get_args(hint)))
