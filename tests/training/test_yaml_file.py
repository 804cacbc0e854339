"""The reader of recipes: the values of scalars, and the errors for text that is no recipe."""

import json
from typing import Any

import pytest

from exo_fast.training import yaml_file
from exo_fast.training.errors import InputError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("5.0e-5", 5e-5),
        (".5", 0.5),
        ("-3", -3),
        ("off", "off"),
        ("no", "no"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("1:30", "1:30"),
        ("2001-01-01", "2001-01-01"),
        ("0x10", "0x10"),
        ("!!str 3", "3"),
        ("!!int '3'", 3),
        ("- {a: [1, x]}", [{"a": [1, "x"]}]),
        ("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}),
        ("a: &a {x: 1}\nb: {<<: [{x: 2}, *a]}", {"a": {"x": 1}, "b": {"x": 2}}),
    ],
)
def test_values_are_what_they_look_like(text: str, value: Any) -> None:
    found = yaml_file.load(text)
    assert json.dumps(found) == json.dumps(value)


def test_entries_keep_lines_and_texts_as_written() -> None:
    found = list(yaml_file.entries(b"\xef\xbb\xbfa: 1.10\n\nb: [007, [x]]\nc: null\nd: {e: off}\n"))
    assert [tuple(entry) for entry in found] == [
        ("a", 1, 1.1, "1.10"),
        ("b", 3, [7, ["x"]], ["007", None]),
        ("c", 4, None, None),
        ("d", 5, {"e": "off"}, None),
    ]
    assert list(yaml_file.entries("# nothing")) == []


MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ('"\\UFFFFFFFF"', "not valid YAML"),
        ("[" * 10_000, "nested too deeply"),
        ("x" * 2**19, "more than 256 KiB"),
        ("a: 1\nb: {c: 1, c: 2}", "line 2: key 'c' is set twice"),
        ("? [a]\n: b", "line 1: a name is needed before the colon"),
        ("\na: !!python/name:os.system x", "line 2: 'tag:yaml.org,2002:python/name:os.system' is not taken here"),
        ("a: !!int abc", "line 1: 'abc' is no int"),
        ("a: !!bool maybe", "line 1: 'maybe' is no bool"),
        ("a: &a [*a]", "line 1: more than 100,000 values, .* nested deeper than 20"),
        ("b: {<<: 3}", "line 1: a mapping is needed after <<"),
        (MERGES, "more than 100,000 values"),
    ],
    ids=range(13),
)
def test_what_no_recipe_is(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        yaml_file.load(text)
