"""The examples run as a reader runs them, their loss goes down, and they stay short."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import families
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from tree import ROOT

EXAMPLES = ROOT / "examples"
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
STEPS = 6


def losses(name: str, *arguments: str) -> list[float]:
    """The losses that an example prints, as `loss 0.5` or, by transformers.Trainer, `'loss': '0.5'`."""
    launched = (*LAUNCHER_VARIABLES, *(key for key in os.environ if key.startswith("ACCELERATE_")))
    environment = {key: value for key, value in os.environ.items() if key not in launched}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(EXAMPLES / name), "--steps", str(STEPS), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [float(found) for found in re.findall(r"\bloss'?:? '?(\d+\.\d+)", done.stdout)]


@pytest.mark.parametrize(
    ("name", "needs", "falls_to"),
    [
        ("plain_pytorch.py", "transformers", 0.5),
        ("lightning_module.py", "lightning", 0.6),
        ("transformers_sft.py", "transformers", 0.95),
        ("trl_dpo.py", "trl", 0.5),
        pytest.param("deepspeed_engine.py", "deepspeed", 0.5, marks=pytest.mark.slow),
    ],
)
def test_the_loss_goes_down(name: str, needs: str, falls_to: float) -> None:
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    found = losses(name)
    assert len(found) == STEPS
    assert found[-1] < falls_to * found[0], found


def test_they_are_short_and_listed() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    files = list(EXAMPLES.glob("*.py"))
    assert len(files) >= 6
    for path in files:
        assert len(path.read_text().splitlines()) < 60, path.name
        assert f"[{path.name}]({path.name})" in readme


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """examples/small.py, which the examples import from their own folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "small", raising=False)
    return importlib.import_module("small")


def test_a_model_from_a_path(small: ModuleType, tmp_path: Path) -> None:
    words = ["<unk>", "The", "film", "was", "good"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path)
    saved: PreTrainedModel = families.tiny_model("llama", dtype=torch.bfloat16)
    saved.save_pretrained(tmp_path)
    model, encode = small.load(str(tmp_path))
    assert encode("The film was bad") == [1, 2, 3, 0]
    assert model.dtype == torch.float32
    torch.testing.assert_close(model.lm_head.weight, saved.lm_head.weight.float(), rtol=0, atol=0)


def test_help_and_defaults(
    small: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["example.py"])
    assert small.arguments("what it shows").learning_rate == 1e-3
    monkeypatch.setattr(sys, "argv", ["example.py", "--model", "a/path", "--steps", "3"])
    assert vars(small.arguments("what it shows")) == {"model": "a/path", "steps": 3, "learning_rate": 1e-5}
    monkeypatch.setattr(sys, "argv", ["example.py", "--help"])
    with pytest.raises(SystemExit) as exit_info:
        small.arguments("what it shows")
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert "what it shows" in printed
    assert "--model" in printed
