"""Reading rows, and the messages about rows that cannot be used."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from exo_fast.data.selection import ALIKE, EQUAL, FEW, LeftOut
from exo_fast.training.data import arrow_rows, json_rows
from exo_fast.training.data.examples import (
    load_examples,
    load_pairs,
    load_prompts,
    load_samples,
    load_sft,
    load_texts,
)
from exo_fast.training.data.places import Source
from exo_fast.training.data.sources import find_source, read_records
from exo_fast.training.errors import InputError

GOOD = {"prompt": "a", "completions": ["b", "c", "d", "e"], "rewards": [0.0, 1, 2, 3]}


def load(path: Path, loss_type: str = "exo-rw", num_contrastive: int | None = None) -> list[Any]:
    return load_examples(Source(path), loss_type=loss_type, num_contrastive=num_contrastive)


def write(tmp_path: Path, rows: Any, name: str = "train.json") -> Path:
    path = tmp_path / name
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return path


def test_every_format_gives_the_same_examples(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "prompt": "x\u2028y", "extra": 1}]
    paths = {
        "list": write(tmp_path, json.dumps(rows, indent=2), "a.json"),
        "lines": write(tmp_path, "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n", "b.jsonl"),
        "lines in .json": write(tmp_path, "\n".join(map(json.dumps, rows)), "c.json"),
        "parquet": tmp_path / "d.parquet",
    }
    table = datasets.Dataset.from_list([{k: r[k] for k in GOOD} for r in rows])
    table.to_parquet(paths["parquet"])
    table.save_to_disk(tmp_path / "saved")
    expected = [(row["prompt"], row["completions"], [float(r) for r in row["rewards"]]) for row in rows]
    paths["compressed"] = tmp_path / "e.jsonl.gz"
    paths["compressed"].write_bytes(gzip.compress(paths["lines"].read_bytes()))
    for path in (*paths.values(), tmp_path / "saved"):
        assert [(e.prompt, e.completions, e.rewards) for e in load(path)] == expected
    # The place is the one that an editor shows.
    assert [(e.place.row, e.place.line) for e in load(paths["list"])] == [(0, 2), (1, 17)]
    assert [(e.place.row, e.place.line) for e in load(paths["lines"])] == [(0, 1), (1, 2)]
    assert str(load(paths["parquet"])[1].place).endswith("d.parquet, row 1")


def test_preferences_become_two_candidates(tmp_path: Path) -> None:
    (example,) = load(write(tmp_path, [{"prompt": "p", "chosen": "yes", "rejected": "no"}]), "dpo-pref")
    assert (example.completions, example.rewards) == (["yes", "no"], [1.0, 0.0])


BAD_ROWS = {
    "not an object": (["text"], "field `(the whole row)`, value 'text': an object"),
    "missing": ({"prompt": "a", "completions": ["b", "c"]}, "field `rewards`, value missing: the row has"),
    "misspelt": (
        {"prompt": "a", "completion": ["b", "c"], "rewards": [1, 2]},
        "`completions`, value missing: the row has prompt, completion, rewards (rename `completion`?)",
    ),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "field `rejected`, value missing"),
    "prompt not text": ({**GOOD, "prompt": 3}, "field `prompt`, value 3: a string is needed, not int"),
    "conversation": ({**GOOD, "prompt": [{"role": "user", "content": "hi"}]}, "apply_chat_template"),
    "messages": ({"messages": [{"role": "user", "content": "hi"}]}, "field `messages`, value [{'role'"),
    "completions not a list": ({**GOOD, "completions": "b"}, "value 'b': a list of strings is needed"),
    "completion not text": ({**GOOD, "completions": ["b", None, "d", "e"]}, "field `completions[1]`, value None"),
    "empty completion": ({**GOOD, "completions": ["b", "", "d", "e"]}, "field `completions[1]`, value '': an empty"),
    "empty chosen": ({"prompt": "a", "chosen": "", "rejected": "b"}, "field `chosen`, value ''"),
    "rewards not a list": ({**GOOD, "rewards": 1}, "one number per completion is needed: 4, not not a list"),
    "too few rewards": ({**GOOD, "rewards": [1, 2]}, "one number per completion is needed: 4, not 2 numbers"),
    "reward not a number": ({**GOOD, "rewards": [1, 2, "3", 4]}, "field `rewards[2]`, value '3': a number"),
    "reward nan": ({**GOOD, "rewards": [1, 2, 3, float("nan")]}, "field `rewards[3]`, value nan: a finite"),
    "reward beyond float32": ({**GOOD, "rewards": [1e39, 2, 3, 4]}, "field `rewards[0]`, value 1e+39: a finite"),
    "reward beyond any float": ({**GOOD, "rewards": [10**400, 2, 3, 4]}, "field `rewards[0]`, value 1000"),
    "ids not a list": ({**GOOD, "completion_ids": 3}, "field `completion_ids`, value 3: a list of token ids per"),
    "too few ids": ({**GOOD, "completion_ids": [[1]]}, "a list of token ids per completion is needed: 4"),
    "an id not a number": ({**GOOD, "completion_ids": [[1], [2], [True], [4]]}, "field `completion_ids[2]`, value [Tr"),
    "an id of 32 bits": (
        {**GOOD, "completion_ids": [[1], [2**31], [3], [4]]},
        "field `completion_ids[1]`, value [2147",
    ),
    "no ids": ({**GOOD, "completion_ids": [[1], [], [3], [4]]}, "field `completion_ids[1]`, value []: a list of token"),
    "one candidate": ({**GOOD, "completions": ["b"], "rewards": [1]}, "at least 2 candidates are needed, not 1"),
    "other number of candidates": (
        {"prompt": "a", "completions": ["b", "c", "d"], "rewards": [1, 2, 3]},
        "3 candidates where the rows before have 4",
    ),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_names_file_line_field_value_and_fix(tmp_path: Path, row: Any, message: str) -> None:
    row = row[0] if isinstance(row, list) else row
    path = write(tmp_path, "[" + ",\n".join(json.dumps(r) for r in (GOOD, row, GOOD)) + "]")
    with pytest.raises(InputError) as error:
        load(path)
    assert message in str(error.value)
    assert f"{path}, line 2 (row 1), field" in str(error.value)
    assert "1 of 3 rows" in str(error.value)


def test_a_group_has_a_limit(tmp_path: Path) -> None:
    row = {"prompt": "a", "completions": ["b"] * 5000, "rewards": list(range(5000))}
    path = write(tmp_path, [row])
    with pytest.raises(InputError, match="groups of 5000 candidates are too large, at most 4096"):
        load(path)
    assert len(load(path, num_contrastive=1000)[0].completions) == 5000


def test_ids_that_were_drawn_are_kept(tmp_path: Path) -> None:
    ids = [[5, 2], [6], [7], [2]]
    # The last model wrote nothing but EOS: with its id there is something to learn from.
    (example,) = load(write(tmp_path, [{**GOOD, "completions": ["b", "c", "d", ""], "completion_ids": ids}]))
    assert (example.completions[-1], example.completion_ids) == ("", ids)
    assert load(write(tmp_path, [{**GOOD, "completion_ids": None}]))[0].completion_ids is None


def test_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": "p", "chosen": "yes", "rejected": "no"},
        {"prompt": "p", "chosen": "yes", "rejected": "no", "completion_ids": [[7], [8, 9]]},
        {**GOOD, "rewards": [2, 5, -1, 5], "completion_ids": [[1], [2], [3], [4]]},
        {**GOOD, "rewards": [1, 1, 1, 1]},
        {"prompt": "p", "chosen": "yes", "rejected": "yes"},
    ]
    pairs = load_pairs(Source(write(tmp_path, rows)))
    assert [(pair.completions, pair.rewards, pair.completion_ids) for pair in pairs] == [
        (["yes", "no"], [1.0, 0.0], None),
        (["yes", "no"], [1.0, 0.0], [[7], [8, 9]]),
        (["c", "d"], [1.0, 0.0], [[2], [3]]),  # of equals the first
    ]
    said = capsys.readouterr().out
    assert f"train.json: 1 group left out: {EQUAL} ({tmp_path / 'train.json'}, line 1 (row 3))" in said
    assert f"train.json: 1 group left out: {ALIKE} ({tmp_path / 'train.json'}, line 1 (row 4))" in said
    with pytest.raises(InputError, match=r"no pair is left to learn from:\n.*the rewards of all candidates are equal"):
        load_pairs(Source(write(tmp_path, rows[3:])))
    with pytest.raises(InputError, match="at least 2 candidates are needed, not 1"):
        load_pairs(Source(write(tmp_path, [{"prompt": "a", "completions": ["b"], "rewards": [1]}])))


def test_sft(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "chosen": " b"},
        {"prompt": "a", "chosen": " c", "rejected": " d"},
        {"prompt": "a", "completion": " e"},
        {"text": "f g"},
    ]
    examples = load_sft(Source(write(tmp_path, rows)))
    assert [(e.prompt, e.completions, e.rewards) for e in examples] == [
        ("a", [" b"], [0.0]),
        ("a", [" c"], [0.0]),
        ("a", [" e"], [0.0]),
        ("", ["f g"], [0.0]),
    ]
    bad = [{"prompt": "a"}, {"prompt": "a", "chosen": ""}, GOOD, {"prompt": "a", "completion": 1}, {"chosen": "a"}]
    with pytest.raises(InputError) as error:
        load_sft(Source(write(tmp_path, bad)))
    for message in (
        "(row 0), field `chosen`, value missing",
        "(row 1), field `chosen`, value '': an empty completion",
        "(row 2), field `completions`, value ['b', 'c', 'd', 'e']: fine-tuning learns one completion of each prompt",
        "(row 3), field `completion`, value 1: a string",
        "(row 4), field `prompt`, value missing",
    ):
        assert message in str(error.value)


def test_samples(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completions": ["b", ""], "completion_ids": [[3, 2], [2]]},
        {"prompt": "a", "completions": ["b"], "rewards": [2]},
        {"prompt": "a", "chosen": "b", "rejected": ""},
        {"prompt": "a", "chosen": "b"},
    ]
    examples = load_samples(Source(write(tmp_path, rows)))
    assert [(e.completions, e.rewards, e.completion_ids) for e in examples] == [
        (["b", ""], [], [[3, 2], [2]]),
        (["b"], [2.0], None),
        (["b", ""], [], None),
        (["b"], [], None),
    ]
    with pytest.raises(InputError, match=r"field `completions`, value \[\]: at least one completion"):
        load_samples(Source(write(tmp_path, [{"prompt": "a", "completions": []}])))


def test_texts(tmp_path: Path) -> None:
    labels = ["pos", "neg", 1, 0, True, False]
    rows = [{"text": f"text {label}", "label": label} for label in labels]
    texts = load_texts(Source(write(tmp_path, rows)))
    assert [text.label for text in texts] == [1, 0, 1, 0, 1, 0]
    assert (texts[2].text, texts[2].place.row) == ("text 1", 2)
    for label in ("positive", 2, 1.0, ["pos"]):
        with pytest.raises(InputError, match=r'field `label`, value .*"pos" or "neg" is needed'):
            load_texts(Source(write(tmp_path, [{"text": "a", "label": label}])))
    with pytest.raises(InputError, match="field `label`, value missing"):
        load_texts(Source(write(tmp_path, [{"text": "a"}])))


def test_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": "b"}, {"prompt": "a", "chosen": "x"}, {**GOOD, "prompt": "b"}, {"prompt": "c", "rejected": 1}]
    assert load_prompts(Source(write(tmp_path, rows))) == ["b", "a", "c"]
    with pytest.raises(InputError, match="field `prompt`, value missing"):
        load_prompts(Source(write(tmp_path, [{"text": "a", "label": "pos"}])))


def test_only_the_first_ten_faults_are_shown(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load(write(tmp_path, [{**GOOD, "prompt": i} for i in range(25)]))
    assert "25 of 25 rows" in str(error.value)
    assert "value 9:" in str(error.value)
    assert "value 10:" not in str(error.value)
    assert "and 15 more" in str(error.value)


def test_rewards_are_numbers_of_any_kind(tmp_path: Path) -> None:
    (example,) = load(write(tmp_path, [{**GOOD, "rewards": [1, 2.5, True, False]}]))
    assert example.rewards == [1.0, 2.5, 1.0, 0.0]
    assert all(type(reward) is float for reward in example.rewards)


def test_rows_of_other_numbers_of_candidates(tmp_path: Path) -> None:
    two = {"prompt": "a", "completions": ["b", "c"], "rewards": [1, 2]}
    path = write(tmp_path, [GOOD, two, two])
    with pytest.raises(InputError, match=r"2 candidates where the rows before have 4.*num_contrastive: with 2 each"):
        load(path)
    assert len(load(path, num_contrastive=2)) == 3
    left_out = LeftOut()
    options = {"loss_type": "exo-rw", "num_contrastive": 3}
    assert len(load_examples(Source(path), left_out=left_out, **options)) == 1
    assert left_out.counts == {FEW: 2}
    assert left_out.places[FEW] == [f"{path}, line 1 (row 1)", f"{path}, line 1 (row 2)"]
    with pytest.raises(InputError, match="no row has num_contrastive=8 candidates"):
        load(path, num_contrastive=8)


def test_scores_of_a_pair_are_its_rewards_where_rewards_count(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "yes", "rejected": "no", "score_chosen": 8, "score_rejected": 4.5}
    path = write(tmp_path, [row])
    assert load(path, "exo-rw")[0].rewards == [8.0, 4.5]
    assert load(path, "exo-pref")[0].rewards == [1.0, 0.0]
    assert load_pairs(Source(path))[0].rewards == [1.0, 0.0]
    with pytest.raises(InputError, match="field `score_chosen`, value 'high': a number is needed"):
        load(write(tmp_path, [{**row, "score_chosen": "high"}]), "exo-rw")


BAD_FILES = {
    "empty list": ("[]", "no rows"),
    "empty file": ("", "no rows"),
    "broken list": ('[{"prompt": "a"},\n {"prompt": }]', "line 2: not valid JSON"),
    "unclosed list": ('[{"prompt": "a"}', "line 1: not valid JSON: a comma or ]"),
    "text after the list": ('[{"prompt": "a"}]\n{}', "line 2: text after"),
    "broken line": ('{"prompt": "a"}\nnonsense', "line 2: not valid JSON"),
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=r"train\.json.*") as error:
        load(write(tmp_path, text))
    assert message in str(error.value)


def test_unreadable_files(tmp_path: Path) -> None:
    latin = tmp_path / "latin.json"
    latin.write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        load(latin)
    with pytest.raises(InputError, match="not a readable parquet"):
        load(write(tmp_path, "text", "x.parquet"))
    with pytest.raises(InputError, match="no such file"):
        find_source(tmp_path / "missing", "train")
    with pytest.raises(InputError, match=r"unknown kind of file; one of \.json"):
        find_source(write(tmp_path, "a,b", "x.csv"), "train")


DEEP = 101 * "[" + 101 * "]"
BAD_LINES = {
    "half a surrogate pair": (r'{"prompt": "\ud83d"}', "half a surrogate pair"),
    "half of one in a name": (r'{"\uDE00": 1}', "half a surrogate pair"),
    "half of one after a backslash": (r'{"prompt": "\\ud83d\ude00"}', "half a surrogate pair"),
    "two first halves": (r'{"prompt": "\ud83d\ud83d\ude00"}', "half a surrogate pair"),
    "nested": ('{"prompt": ' + DEEP + "}", "nested deeper than 100 levels"),
    "nested without end": (100_000 * "[", "nested deeper than 100 levels"),
    "digits": ('{"rewards": [' + 5000 * "9" + "]}", "a number of thousands of digits"),
    "two rows": ("{} {}", "Extra data"),
}


@pytest.mark.parametrize(("row", "message"), BAD_LINES.values(), ids=BAD_LINES.keys())
@pytest.mark.parametrize("form", ["lines", "list"])
def test_json_that_python_cannot_use(tmp_path: Path, row: str, message: str, form: str) -> None:
    prompt = "\N{SLEEPING FACE}\\ud83d"  # a whole surrogate pair, and a backslash that begins no escape
    good = json.dumps({"prompt": prompt})
    assert load_prompts(Source(write(tmp_path, good))) == [prompt]
    if form == "list":
        message = "a comma or ] is needed" if message == "Extra data" else message
    path = write(tmp_path, f"[{good},\n{row}]" if form == "list" else f"{good}\n{row}\n", "x.json")
    with pytest.raises(InputError, match="not valid JSON: ") as error:
        load_prompts(Source(path))
    assert f"{path}, line 2" in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("block", [3, 4, 5, 64])
def test_a_list_is_read_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    hard = '\N{SLEEPING FACE} \\ "\u2028'
    rows = [{"é": [-12.5e-3, None, True]}, 1234567890, hard, [[], {}], -0.5, "", {"a": [[1]]}]
    monkeypatch.setattr(json_rows, "BLOCK_BYTES", block)
    for ascii_only in (True, False):
        text = json.dumps(rows, indent=1, ensure_ascii=ascii_only) + " \n"
        path = write(tmp_path, "\ufeff" + text)
        found = list(read_records(Source(path)))
        assert [record for _, record in found] == rows
        assert [place.line for place, _ in found[:3]] == [2, 9, 10]
    path.write_bytes(text.encode() + b"\xff")
    with pytest.raises(InputError, match=r"line \d+: not UTF-8 text \(byte") as error:
        list(read_records(Source(path)))
    assert f"byte {len(text.encode())}" in str(error.value)


ENDLESS = {
    "string": b'["' + 10_000 * b"a",
    "line": 10_000 * b"a",
    "list": b" \n[[" + 5_000 * b"1,",
    "number": b"[" + 4_000 * b"1",
}


@pytest.mark.parametrize("content", ENDLESS.values(), ids=ENDLESS.keys())
def test_a_row_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """A few bytes of gzip can hold any number of bytes."""
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(json_rows, "BLOCK_BYTES", 100)
    path = tmp_path / "train.json.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(InputError, match=r"train\.json\.gz, line \d: a row of more than"):
        list(read_records(Source(path)))


def test_what_a_saved_dataset_names_lies_in_its_folder(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([GOOD])
    for name in ("mine", "other"):
        datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / name)
    other = tmp_path / "other" / "train"
    assert load_prompts(find_source(tmp_path / "mine", "train")) == ["a"]
    state = tmp_path / "mine" / "train" / "state.json"
    settings = json.loads(state.read_text())
    for name in ("../../other/train/data-00000-of-00001.arrow", str(other / "data-00000-of-00001.arrow"), ".."):
        state.write_text(json.dumps({**settings, "_data_files": [{"filename": name}]}))
        with pytest.raises(InputError, match=r"state\.json: `_data_files` names .*, which is not inside the folder"):
            load_prompts(find_source(tmp_path / "mine", "train"))
    splits = tmp_path / "mine" / "dataset_dict.json"
    for content, message in (
        ('{"splits": ["../other/train"]}', "`splits` names '../other/train', which is not inside"),
        ('{"splits": 3}', "`splits` must be a list of names"),
        ("{", r"dataset_dict\.json, line 1: not valid JSON"),
    ):
        splits.write_text(content)
        with pytest.raises(InputError, match=message):
            find_source(tmp_path / "mine", "train")


def test_columns_of_files_are_not_opened(tmp_path: Path) -> None:
    features = datasets.Features({"prompt": datasets.Value("string"), "pictures": datasets.List(datasets.Image())})
    rows = [{"prompt": "a", "pictures": [{"path": "/etc/hostname", "bytes": None}]}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    assert [record for _, record in read_records(Source(tmp_path / "saved"))] == [{"prompt": "a"}]


def test_a_file_of_too_many_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_rows, "MAX_ROWS", 1)
    table = datasets.Dataset.from_list([GOOD, GOOD])
    table.to_parquet(tmp_path / "train.parquet")
    table.save_to_disk(tmp_path / "saved")
    for name in ("train.parquet", "saved"):
        with pytest.raises(InputError, match=f"{name}: says that it has 2 rows; at most 1"):
            load(tmp_path / name)


@pytest.mark.parametrize("name", ["~nosuchuser/x", "x" * 300, "loop", "a\0b"])
def test_what_cannot_be_a_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="cannot be a path"):
        find_source(name if name.startswith("~") else tmp_path / name, "train")


def test_splits_of_a_directory(tmp_path: Path) -> None:
    write(tmp_path, [GOOD], "train.jsonl")
    write(tmp_path, [GOOD], "validation.json")
    assert find_source(tmp_path, "train") == Source(tmp_path / "train.jsonl")
    assert find_source(tmp_path, "eval") == find_source(tmp_path, "test") == Source(tmp_path / "validation.json")
    write(tmp_path, [GOOD], "train.json")
    with pytest.raises(InputError, match=r"both train\.json and train\.jsonl"):
        find_source(tmp_path, "train")
    saved = tmp_path / "saved"
    table = datasets.Dataset.from_list([GOOD])
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(saved)
    assert find_source(saved, "eval") == Source(saved, "test")
    assert len(load_examples(find_source(saved, "eval"), loss_type="exo-rw", num_contrastive=None)) == 1
