"""Recipes and command lines for every stage: a configuration, or an InputError that names the field, option or line.

Making a configuration writes nothing.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzzing import REFUSED, damaged, fuzzed, judge
from hypothesis import given
from hypothesis import strategies as st

from exo_fast.training.arguments import parse_config
from exo_fast.training.cli.command import STAGES
from exo_fast.training.errors import InputError
from exo_fast.training.options import parse_size

CONFIGURED = [name for name, stage in STAGES.items() if stage.config is not None]
# What a configuration of each stage cannot be without.
REQUIRED = {
    "prepare": {"data": "custom/rw:here", "output_dir": "out"},
    "pref-to-rw": {"data": "here", "output_dir": "out"},
    "generate": {"model_name_or_path": "m", "data": "here", "output_dir": "out"},
    "logprobs": {"model_name_or_path": "m", "data": "here", "output_dir": "out"},
    "score": {"reward_model": "m", "data": "here", "output_dir": "out"},
    "evaluate": {"policies": "a=here", "reference": "m", "reward_model": "m", "data": "here", "output_dir": "out"},
}
TRAINING = {"model_name_or_path": "m", "data": "here", "output_dir": "out"}
# Fields that reach for the network, the GPU or another program when a configuration is made, or that say so much.
LEFT_OUT = {"push_to_hub", "tpu_num_cores", "fsdp", "fsdp_config", "parallelism_config", "torch_compile"}

# fmt: off
NUMBERS = ["0", "1", "-1", "2", "7", "0.5", "1e400", "-1e400", "nan", "inf", "-inf", "1_000", "١٢", "1e-6", "512MB"]
NAMES = ["true", "off", "null", "none", "exo-rw", "dpo-pref", "cosine", "steps", "epoch", "bf16", "fast", "cpu", "here",
         "a=here", "a=b", "here:x", "hh/pref:here"]
ODD = ["", " ", "a b", "~", "~nosuchuser/x", "../x", "a\0b", "\ud800", "{", "{}", '{"a": 1}', "[1, 2]", "--help", "-x"]
LONG = ["9" * 30, "9" * 5000, "x" * 5000, "/" + "a/" * 3000, "1" + "0" * 400 + "GB"]
# fmt: on
WORDS = st.sampled_from([*NUMBERS, *NAMES, *ODD, *LONG])
TEXTS = WORDS | st.text(max_size=6)
# fmt: off
YAML = [
    "!!python/object/apply:os.system [touch x]", "!!python/name:os.system", "!!binary aGk=", "!!int abc", "!!float x",
    "!!timestamp x", "!!set {a, b}", "2001-99-99", "2001-01-01", "0o9", "0b2", "1:99:99", ".inf", ".nan", "~", "*a",
    "&a [*a]", "&a {b: *a}", "{<<: *a}", '"\\UFFFFFFFF"', "'a", "[a, b]", "[--bf16]", "[-h]", "[1, [2]]", "{a: {b: c}}",
    "{? [a] : b}", "{1: 2, null: 3}", "|\n  a\n  b", "[" * 3000, "!<x> a", "? a", "%", "@", "`", "- a", "a: b", "# a",
]
# fmt: on
SCALARS = WORDS.filter(lambda word: word.isprintable() and len(word) < 100) | st.sampled_from(YAML)
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


def config_class(stage: str) -> type:
    return STAGES[stage].config_class()


def field_names(stage: str) -> list[str]:
    return sorted(field.name for field in dataclasses.fields(config_class(stage)) if field.init)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with a folder of the name that paths have; the environment is put back."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    before = dict(os.environ)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


def parse(stage: str, words: list[str], names: list[str]) -> Any:
    """The configuration, or REFUSED; nothing has been written but recipe.yaml."""
    environment = dict(os.environ)
    try:
        result = judge(lambda: parse_config(config_class(stage), words, prog="x"), InputError, names)
    finally:
        os.environ.clear()
        os.environ.update(environment)
    assert sorted(path.name for path in Path.cwd().iterdir() if path.name != "recipe.yaml") == ["here"]
    if result is not REFUSED:
        budget = getattr(result, "memory_budget_bytes", None)
        assert budget is None or 0 < budget < 2**63
    return result


@pytest.mark.parametrize("stage", CONFIGURED)
def test_what_is_required_is_enough(stage: str) -> None:
    required = REQUIRED.get(stage, TRAINING)
    words = [word for name, value in required.items() for word in (f"--{name}", value)]
    assert parse(stage, words, []) is not REFUSED


@fuzzed(60)
@given(data=st.data(), stage=st.sampled_from(CONFIGURED))
def test_command_lines(data: st.DataObject, stage: str) -> None:
    fields = [name for name in field_names(stage) if name not in LEFT_OUT]
    required = REQUIRED.get(stage, TRAINING)
    given_fields = data.draw(st.lists(st.sampled_from(fields), max_size=3))
    words = [f"--{name}={value}" for name, value in required.items() if name not in given_fields]
    for name in given_fields:
        value = data.draw(TEXTS)
        words += [f"--{name}={value}"] if data.draw(st.booleans()) else [f"--{name}", value]
    if data.draw(st.integers(0, 4)) == 0:
        words.insert(data.draw(st.integers(0, len(words))), data.draw(TEXTS))
    words = [word for word in words if word not in ("-h", "--help", "--help-all")]
    parse(stage, words, [*fields, "option"])


@fuzzed(60)
@given(data=st.data(), stage=st.sampled_from(CONFIGURED))
def test_recipes(data: st.DataObject, stage: str) -> None:
    fields = [name for name in field_names(stage) if name not in LEFT_OUT]
    names = data.draw(st.lists(st.sampled_from(fields) | TEXTS.filter(str.isprintable), max_size=3))
    lines = [f"{name}: {value}" for name, value in REQUIRED.get(stage, TRAINING).items() if name not in names]
    lines += [f"{name}: {data.draw(SCALARS)}" for name in names]
    text = "\n".join(data.draw(st.permutations(lines)))
    content = text.encode("utf-8", "surrogatepass")
    if data.draw(st.integers(0, 3)) == 0:
        content = data.draw(damaged(content))
    Path("recipe.yaml").write_bytes(content)
    parse(stage, ["--config", "recipe.yaml"], ["recipe.yaml", *fields])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB.encode(), "unknown key 'a0'"),
        (BOMB.replace("a11:", "lr_scheduler_kwargs: {x: &a11").encode() + b"}", "recipe.yaml: "),
        (b"lora_target_modules: " + b"[" * 10_000, "nested too deeply"),
        (b"x" * 2**20, "more than 256 KiB"),
        (b"data: " + b"\xff\xfe", "not valid YAML"),
        (b"data: !!python/object/apply:os.system [touch x]", "line 1: '!!python|line 1: 'tag:yaml.org"),
        (b"beta_pi: [1, 2]", "line 1: beta_pi is a list; one value"),
        (b"beta_pi: null", "line 1: beta_pi is null"),
        (b"lora_target_modules: [--bf16]", "line 1: lora_target_modules: a list of plain values"),
        (b"? [data]\n: x", "line 1: a name is needed before the colon"),
    ],
    ids=["bomb", "bomb in a field", "deep", "large", "binary", "python", "list", "null", "option", "key"],
)
def test_recipes_of_another_kind(content: bytes, message: str) -> None:
    Path("recipe.yaml").write_bytes(content)
    with pytest.raises(InputError, match=message):
        parse_config(config_class("align"), ["--config", "recipe.yaml"])


@fuzzed(60)
@given(text=WORDS | st.from_regex(r"\A\s*\d{0,400}(\.\d*)?\s?[kKMGTib]{0,3}\Z"))
def test_sizes(text: str) -> None:
    size = judge(lambda: parse_size(text), InputError, ["memory_budget"])
    assert size is REFUSED or (isinstance(size, int) and 0 < size < 2**63)
