"""The stages `prepare` and `pref-to-rw`: exact files, the same bytes again, and the commands of their help."""

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from tree import RAW

from exo_fast.training.cli.command import main
from exo_fast.training.errors import InputError
from exo_fast.training.stages.pref_to_rw import PrefToRwConfig, pref_to_rw
from exo_fast.training.stages.prepare import PrepareConfig, prepare
from exo_fast.version import __version__

HH = f"hh/pref:{RAW / 'hh' / 'helpful-base'}"


def run_prepare(data: str, output_dir: Path, **options: Any) -> dict[str, Any]:
    return prepare(PrepareConfig(data=data, output_dir=str(output_dir), disable_tqdm=True, **options))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run_prepare(HH, tmp_path / "out")
    first = content(tmp_path / "out")
    assert sorted(first) == ["summary.json", "test.json", "train.json"]
    assert (
        first["train.json"]
        .decode()
        .startswith(
            '[\n {\n  "prompt": "\\n\\nHuman: How do I boil an egg?\\n\\nAssistant: In water.\\n\\nHuman: How long?'
        )
    )
    assert "🥚" in first["train.json"].decode()
    assert first["train.json"].endswith(b" }\n]\n")
    assert len(json.loads(first["train.json"])) == 6
    assert summary == json.loads(first["summary.json"])
    assert summary["splits"] == {
        "train": {"rows": 6, "of": 6, "left_out": {"empty response": 1, "same response": 2}},
        "test": {"rows": 1, "of": 1, "left_out": {}},
    }
    assert (summary["config"]["data"], summary["version"]) == (HH, __version__)
    assert "train         6 rows  (left out: 1 empty response; 2 same response)" in capsys.readouterr().out
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    run_prepare(HH, tmp_path / "out")
    assert content(tmp_path / "out") == first
    # By their times a training knows that its files are the same when it continues.
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times
    # What a kill left behind is completed.
    (tmp_path / "out" / "test.json").unlink()
    (tmp_path / "out" / "summary.json").unlink()
    run_prepare(HH, tmp_path / "out")
    assert content(tmp_path / "out") == first
    # Prepared rows are the dataset's own.
    again = run_prepare(f"hh/pref:{tmp_path / 'out'}", tmp_path / "again")
    assert content(tmp_path / "again")["train.json"] == first["train.json"]
    assert again["splits"]["train"]["left_out"] == {}


def test_other_settings_do_not_overwrite(tmp_path: Path) -> None:
    run_prepare(HH, tmp_path)
    first = content(tmp_path)
    with pytest.raises(InputError, match=r"another train\.json \(limit was None and is now 2\); choose another"):
        run_prepare(HH, tmp_path, limit=2)
    assert content(tmp_path) == first
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(InputError, match=r"holds another train\.json; choose another"):
        run_prepare(HH, tmp_path, limit=2)


def test_limit_is_a_sample_in_order(tmp_path: Path) -> None:
    run_prepare(HH, tmp_path / "all")
    rows = json.loads((tmp_path / "all" / "train.json").read_text())
    samples = {}
    for seed in range(4):
        summary = run_prepare(HH, tmp_path / str(seed), limit=3, seed=seed)
        assert summary["splits"]["train"] == {
            "rows": 3, "of": 6, "left_out": {"empty response": 1, "same response": 2},
        }  # fmt: skip
        samples[seed] = [rows.index(row) for row in json.loads((tmp_path / str(seed) / "train.json").read_text())]
        assert samples[seed] == sorted(samples[seed])
    assert len({tuple(sample) for sample in samples.values()}) > 1


def test_imdb_needs_its_tokenizer(tmp_path: Path, tiny_llama: str) -> None:
    data = f"imdb/sft:{RAW / 'imdb' / 'aclImdb'}"
    summary = run_prepare(data, tmp_path, tokenizer=tiny_llama, prefix_tokens=3)
    rows = json.loads((tmp_path / "train.json").read_text())
    assert rows[0]["prompt"] == "A warm"  # two words and the space between them
    assert rows[0]["chosen"].startswith(" and quietly funny film about two brothers.\n\nIt earns")
    assert summary["splits"]["test"]["rows"] == 8
    with pytest.raises(InputError, match="a tokenizer is needed"):
        run_prepare(data, tmp_path / "other")
    with pytest.raises(InputError, match="cannot be loaded as AutoTokenizer"):
        run_prepare(data, tmp_path / "other", tokenizer=str(tmp_path))


def test_malformed_rows_can_be_skipped(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"chosen": 1}\n' + (RAW / "hh/helpful-base/train.jsonl").read_text("utf-8"))
    with pytest.raises(InputError, match=r"train\.jsonl, line 1 \(row 0\), field `chosen`, value 1.*"):
        run_prepare(f"hh/pref:{tmp_path}", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    summary = run_prepare(f"hh/pref:{tmp_path}", tmp_path / "out", skip_malformed=True)
    assert summary["splits"]["train"]["left_out"]["malformed"] == 1
    assert list(summary["splits"]) == ["train"]
    assert not (tmp_path / "out" / "test.json").exists()


def test_what_cannot_be_prepared(tmp_path: Path) -> None:
    for options, message in (
        ({"data": None, "output_dir": "x"}, "data=None: name NAME/KIND:PATH"),
        ({"data": HH}, "output_dir=None: name the directory"),
        (
            {"data": "/some/where", "output_dir": "x"},
            "data='/some/where': NAME/KIND:PATH is needed, with one of",
        ),
        ({"data": HH, "output_dir": "x", "limit": 0}, "limit=0: at least 1"),
        ({"data": HH, "output_dir": "x", "prefix_tokens": 0}, "prefix_tokens=0: at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            PrepareConfig(**options)
    with pytest.raises(InputError, match="prompt_words=3: the dataset hh/pref has no such option"):
        run_prepare(HH, tmp_path / "out", prompt_words=3)
    with pytest.raises(InputError, match="neither a train nor a test split"):
        run_prepare(f"custom/sft:{tmp_path}", tmp_path / "out")


def test_pref_to_rw(tmp_path: Path) -> None:
    run_prepare(HH, tmp_path / "pref")
    config = PrefToRwConfig(data=str(tmp_path / "pref"), output_dir=str(tmp_path / "rw"))
    summary = pref_to_rw(config)
    assert summary["splits"] == {
        "train": {"rows": 6, "left_out": {}, "left_out_rows": {}},
        "test": {"rows": 1, "left_out": {}, "left_out_rows": {}},
    }
    # As the original writes it, fields in that order.
    assert (tmp_path / "rw" / "test.json").read_text() == (
        '[\n {\n  "prompt": "\\n\\nHuman: How do I boil an egg?\\n\\nAssistant:",\n  "completions": [\n   " Gently.",\n'
        '   " Quickly."\n  ],\n  "rewards": [1, 0]\n }\n]\n'
    )
    first = content(tmp_path / "rw")
    pref_to_rw(config)
    assert content(tmp_path / "rw") == first
    # The registry gives the same at once.
    pref_to_rw(PrefToRwConfig(data=HH, output_dir=str(tmp_path / "direct")))
    assert content(tmp_path / "direct")["train.json"] == first["train.json"]
    only = pref_to_rw(PrefToRwConfig(data=HH, split="test", output_dir=str(tmp_path / "test")))
    assert only["splits"] == {"test": {"rows": 1, "left_out": {}, "left_out_rows": {}}}


def test_only_the_first_of_several_processes_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run_prepare(HH, tmp_path / "out")["splits"]["train"]["rows"] == 6
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [PrepareConfig, PrefToRwConfig])
def test_the_commands_of_the_help_work(config: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(RAW / "hh", tmp_path / "hh-rlhf")
    monkeypatch.chdir(tmp_path)
    if config is PrefToRwConfig:
        run_prepare(HH, Path("data/hh"))
    command = next(line for line in config.examples.splitlines() if "exo-fast" in line)
    assert main(shlex.split(command)[1:]) == 0
    written = Path(command.split()[-1])
    assert sorted(os.listdir(written)) == ["summary.json", "test.json", "train.json"]
