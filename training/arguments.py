"""From a YAML recipe and a command line to a configuration object, for every stage.

A recipe's values are turned into command-line words and parsed by the same transformers.HfArgumentParser,
before the words of the command line itself, so that there is one set of types and checks and the command line
wins. Scalars are taken as they are written: to YAML 1.1 `1e-6` is a string and `off` a boolean, and neither
is meant.
"""

import argparse
import dataclasses
import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from exo_fast.training.errors import InputError

Config = TypeVar("Config")
OTHER_FIELDS = "everything else of transformers.TrainingArguments"


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
        hints = get_type_hints(config_class)
        fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
        shown = {name for names in config_class.field_groups.values() for name in names}
        for title, names in (*config_class.field_groups.items(), (OTHER_FIELDS, fields.keys() - shown)):
            group = self.add_argument_group(title)
            for name in sorted(names) if title == OTHER_FIELDS else names:
                fields[name].type = hints[name]
                self._parse_dataclass_field(group, fields[name])
            for action in group._group_actions:
                if action.type is string_to_bool:  # a switch needs no value, also where its default is None
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
    """The configuration that `argv` (with an optional `--config FILE`) describes.

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
        try:
            recipe_words = _recipe_words(parser, Path(recipe.config).expanduser())
            parser.parse_args(recipe_words)
        except InputError as error:
            raise InputError(f"{recipe.config}: {error}") from error
    namespace, unknown = parser.parse_known_args([*recipe_words, *words])
    if unknown:
        option = unknown[0].split("=")[0]
        raise InputError(f"unknown option {option!r}{_nearest(option, parser._option_string_actions)}.")
    names = {field.name for field in dataclasses.fields(config_class) if field.init}
    return config_class(**{name: value for name, value in vars(namespace).items() if name in names})


def _recipe_words(parser: StageParser, path: Path) -> list[str]:
    """The recipe as command-line words. What has no words (null, a list for a field of one value) becomes a default."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"not valid YAML: {error}") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise InputError("a mapping of field names to values is needed.")
    constructor = yaml.SafeLoader("")
    actions = {action.dest: action for action in parser._actions}
    words: list[str] = []
    seen: set[str] = set()
    for key_node, value_node in root.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if key not in actions or key in ("help", "help_all", "config"):
            raise InputError(f"line {line}: unknown key {key!r}{_nearest(key, actions)}.")
        if key in seen:
            raise InputError(f"line {line}: key {key!r} is set twice.")
        seen.add(key)
        value = constructor.construct_object(value_node, deep=True)
        if isinstance(value_node, yaml.ScalarNode) and value is not None:
            words.append(f"--{key}={value_node.value}")
        elif isinstance(value, list) and actions[key].nargs == "+":
            words += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict):
            words.append(f"--{key}={json.dumps(value)}")
        else:
            parser.set_defaults(**{key: value})
    return words


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
