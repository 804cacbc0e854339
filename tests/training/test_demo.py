"""`exo-fast demo` on a tiny random model: a recipe like any other, and the report of it."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from exo_fast.training import demo
from exo_fast.training.cli.command import STAGES, main
from exo_fast.training.errors import InputError
from exo_fast.training.pipeline import check, library, process, run
from exo_fast.training.pipeline.recipe import Recipe, read_recipe

WORDS = ("the", "film", "was", "good", "bad", "long", "plot", "and", "but", "very", "fine", "dull", "great")
PRAISE = """
def praise(prompts, completions):
    words = [text.split() for text in completions]
    return [sum(word in ("good", "great", "fine") for word in found) / max(len(found), 1) for found in words]
"""


def test_recipe_of_the_repository_is_valid() -> None:
    recipe = read_recipe(library.FOLDER / "demo.yaml", STAGES)
    stages = [{"name": stage.name, "stage": stage.stage, "options": stage.options} for stage in recipe.stages]
    assert check.check(process.CLI_MODULE, stages, recipe.defaults)["error"] is None
    assert recipe.stages[-1].needs == ["held-out", "policy"]  # what measures is never trained on
    assert recipe.variables["held_out"] >= 64


@pytest.fixture
def tiny_recipe(tiny_llama: str, tmp_path: Path) -> Path:
    """A copy of the recipe for a tiny model, and data and a reward in its language, which need no package index."""
    (tmp_path / "demo_rewards.py").write_text(PRAISE)
    rng = random.Random(0)
    for name, count in (("train", 64), ("test", 32)):
        rows = [{"prompt": " ".join(rng.choices(WORDS, k=4)), "chosen": " good"} for _ in range(count)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    text = (library.FOLDER / "demo.yaml").read_text(encoding="utf-8")
    recipe = yaml.safe_load(text.replace("${smollm2}", tiny_llama).replace("reviews/sft", f"custom/sft:{tmp_path}"))
    for stage in recipe["stages"]:
        stage["options"].pop("prompt_words", None)
    recipe["stages"][4]["options"] |= {"learning_rate": 0.01, "beta_pi": 0.5}
    recipe["defaults"] |= {"disable_tqdm": True, "use_cpu": True}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages run in this process, where `run` takes another for each: the training libraries take seconds to load."""

    def check_options(recipe: Recipe, cli_module: str) -> tuple[Any, Any]:
        stages = [{"name": stage.name, "stage": stage.stage, "options": stage.options} for stage in recipe.stages]
        found = check.check(cli_module, stages, recipe.defaults)
        assert found["error"] is None
        return found["fields"], found["missing"]

    monkeypatch.setattr(run, "_check_options", check_options)
    monkeypatch.setattr(run, "_run_process", lambda command, log, lock_fd: main(command[3:]))


@pytest.mark.usefixtures("in_process")
def test_demo_end_to_end(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--config", str(tiny_recipe), "--output", "run"]
    words += ["--set", "reward=demo_rewards:praise", "prompts=64", "held_out=32", "new_tokens=8", "prompt_words=4"]
    assert demo.main(words) == 0
    assert "the report is run/report.md, the model run/policy" in capsys.readouterr().out
    report = Path("run/report.md").read_text()
    assert "exo-rw gains reward" in report
    for name in re.findall(r"\]\(([\w/]+\.png)\)", report):
        assert Path("run", name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(re.findall(r"\.png\)", report)) == 2
    end = json.loads(Path("run/evaluation/results.json").read_text())["end_of_training"][0]
    assert end["gain_interval"][0] > 0
    assert end["kl_interval"][0] > 0
    AutoModelForCausalLM.from_pretrained("run/policy")
    AutoTokenizer.from_pretrained("run/policy")

    # The same again: nothing is computed. Another seed asks for another place.
    assert demo.main(words) == 0
    assert capsys.readouterr().out.count(": done before") == 6
    with pytest.raises(InputError, match="'prompts' is done, but seed was 0 and is now 1"):
        demo.main([*words, "--seed", "1"])


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        demo.main(["--help"])
    assert "exo-fast demo --seed 1" in capsys.readouterr().out
