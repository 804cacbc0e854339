"""The first example of every stage's --help works unchanged in a directory with the data it names."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from tiny_models import make_rows, save_model
from transformers import LlamaConfig, PreTrainedTokenizerFast
from tree import RAW

from exo_fast.training.cli.command import STAGES, main

# In an order in which each finds the output of earlier ones; the files that must be there afterwards.
MADE = {
    "recipes": None,
    "prepare": "data/hh/train.json",
    "pref-to-rw": "data/hh_p2r/train.json",
    "sft": "models/sft/model.safetensors",
    "generate": "data/samples/test.json",
    "classifier": "models/classifier/model.safetensors",
    "reward-model": "models/rm/model.safetensors",
    "score": "data/rw/train.json",
    "align": "runs/exo-rw/model.safetensors",
    "logprobs": "data/logprobs/test.json",
    "evaluate": "runs/evaluation/report.md",
    "run": "runs/mine/.run/pref-to-rw.json",
    "memory": None,
    "doctor": None,
    "completion": None,
}
NEEDS_DOWNLOADS = {"demo", "bench"}  # `make demo` and `make bench` run their examples
NEEDS_GPU = {"gpu"}  # tests/benchmarks/test_gpu.py runs it without one


def first_example(stage: str) -> str:
    """The first line below "examples:", without its comment."""
    entry = STAGES[stage]
    examples = entry.config_class().examples if entry.config else entry.code().EXAMPLES
    return examples.split("\n")[1].split("  #")[0].strip()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """models/base, and a few rows of data/sft, data/pref and data/class, raw HH files, and a recipe of one stage."""
    directory = tmp_path_factory.mktemp("examples")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        initializer_range=0.2,
    )
    save_model(config, tokenizer, directory / "models" / "base")
    kinds = {"sft": [], "pref": [], "class": []}
    for row in make_rows(12):
        best, worst = (row["completions"][k] for k in (row["rewards"].index(f(row["rewards"])) for f in (max, min)))
        kinds["sft"].append({"prompt": row["prompt"], "chosen": best})
        kinds["pref"].append({"prompt": row["prompt"], "chosen": best, "rejected": worst})
        kinds["class"] += [{"text": best, "label": "pos"}, {"text": worst, "label": "neg"}]
    for kind, rows in kinds.items():
        (directory / "data" / kind).mkdir(parents=True)
        for name, part in (("train", rows[:8]), ("test", rows[8:])):
            (directory / "data" / kind / f"{name}.json").write_text(json.dumps(part))
    shutil.copytree(RAW / "hh" / "helpful-base", directory / "hh-rlhf" / "helpful-base")
    (directory / "my.yaml").write_text(
        "variables: {output: runs/mine}\n"
        "stages:\n"
        "  - {name: pref-to-rw, stage: pref-to-rw, options: {data: data/pref, output_dir: '${output}/rw'}}\n"
    )
    return directory


@pytest.mark.parametrize("stage", MADE)
def test_the_first_example_works(
    directory: Path, stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(directory)
    program, *words = shlex.split(first_example(stage))
    assert (program, words[0]) == ("exo-fast", stage)
    assert main(words) == 0, capsys.readouterr().err
    if MADE[stage] is not None:
        assert Path(MADE[stage]).is_file()


@pytest.mark.parametrize("stage", MADE)
def test_help_shows_the_example(stage: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([stage, "--help"])
    assert stopped.value.code == 0
    assert first_example(stage) in capsys.readouterr().out


def test_no_stage_is_left_out() -> None:
    assert STAGES.keys() == MADE.keys() | NEEDS_DOWNLOADS | NEEDS_GPU
