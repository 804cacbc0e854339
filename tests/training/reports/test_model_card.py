"""The model card of a training: valid metadata, what was done and with what, and nothing that is not known."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from tiny_models import make_rows
from transformers import AutoModelForCausalLM
from tree import ROOT

from exo_fast.training.arguments import parse_config
from exo_fast.training.reports import model_card
from exo_fast.training.stages.align import AlignConfig, align
from exo_fast.training.stages.classifier import ClassifierConfig, classifier
from exo_fast.training.stages.reward_model import RewardModelConfig, reward_model
from exo_fast.training.stages.sft import SftConfig, sft

Settings = Callable[..., dict[str, Any]]
ROWS = make_rows(10)
STAGES = {
    "sft": (SftConfig, sft, [{"prompt": r["prompt"], "chosen": r["completions"][0]} for r in ROWS]),
    "reward-model": (
        RewardModelConfig,
        reward_model,
        [{"prompt": r["prompt"], "chosen": r["completions"][0] + " a", "rejected": r["completions"][1]} for r in ROWS],
    ),
    "classifier": (ClassifierConfig, classifier, [{"text": r["prompt"], "label": i % 2} for i, r in enumerate(ROWS)]),
}


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    """The summary of an alignment, as far as a card reads it."""
    return {
        "stage": "align",
        "config": {
            "model_name_or_path": "org/base",
            "ref_name_or_path": None,
            "data": "hh/rw:raw",
            "loss_type": "exo-rw",
            "beta_pi": 0.2,
            "beta_r": 0.3,
            "label_smoothing": 0.0,
            "hub_token": "<HUB_TOKEN>",
            "output_dir": "/home/me/secret/run",
        },
        "changed": ["beta_pi", "hub_token", "output_dir"],
        "steps": 3,
        "train_seconds": 1.0,
        "device": "cpu",
    }


def test_a_card_of_an_alignment(settings: Settings, tmp_path: Path) -> None:
    options = settings(num_train_epochs=1, engine="torch", beta_pi=0.25)
    align(AlignConfig(**options))
    path = Path(options["output_dir"], "README.md")
    card = ModelCard.load(path)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["exo_fast", "align", "exo-rw", "arxiv:2402.00856"],
    }
    digest = hashlib.sha256(Path(options["data"], "train.json").read_bytes()).hexdigest()
    assert re.search(rf"\| train \| .*train\.json \| 16 \| [\d,]+ \| {digest} \|", card.content)
    assert "β_π = 0.25. EXO minimises the reverse KL" in card.content
    assert str(tmp_path) not in card.content
    history = json.loads(path.with_name("trainer_state.json").read_text())["log_history"]
    last = [entry["eval_loss"] for entry in history if "eval_loss" in entry][-1]
    assert f"{last:.4g} |" in card.content
    # The recipe is one that the stage takes, and says what was set.
    recipe = path.with_name("recipe.yaml")
    recipe.write_text(card.content.partition("```yaml\n")[2].partition("```")[0])
    words = [f"--{name}={options[name]}" for name in ("model_name_or_path", "data")]
    config = parse_config(AlignConfig, ["--config", str(recipe), *words], prog="exo-fast align")
    assert (config.beta_pi, config.loss_type, config.max_gen_len) == (0.25, "exo-rw", 16)
    fields = yaml.safe_load(recipe.read_text())
    assert {"beta_pi", "loss_type", "learning_rate", "data"} <= fields.keys()
    assert not {"disable_tqdm", "lora_r", "seed"} & fields.keys()


def test_adapters_name_their_base_and_load_as_the_card_says(settings: Settings) -> None:
    options = settings(num_train_epochs=1, engine="torch", lora_r=2)
    align(AlignConfig(**options))
    card = ModelCard.load(Path(options["output_dir"], "README.md"))
    assert card.data.library_name == "peft"
    assert "lora" in card.data.tags
    code = re.search(r"```python\n(.*?)```", card.content, re.DOTALL)[1].replace('"run"', repr(options["output_dir"]))
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["model"].peft_config
    base = AutoModelForCausalLM.from_pretrained(options["model_name_or_path"])
    assert found["model"].config.vocab_size == base.config.vocab_size == len(found["tokenizer"])


@pytest.mark.parametrize("stage", STAGES)
def test_every_training_stage_leaves_a_card(stage: str, tiny_llama: str, tmp_path: Path) -> None:
    config_class, run, rows = STAGES[stage]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    output = tmp_path / "run"
    options = {"model_name_or_path": tiny_llama, "data": str(tmp_path), "output_dir": str(output), "engine": "torch"}
    options |= {"max_seq_len": 64, "num_train_epochs": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    run(config_class(**options, disable_tqdm=True, **({"max_gen_len": 16} if stage == "sft" else {})))
    card = ModelCard.load(output / "README.md")
    assert card.data.pipeline_tag == ("text-generation" if stage == "sft" else "text-classification")
    assert stage in card.data.tags
    assert model_card.METHODS[stage] in card.content
    assert "bibtex" not in card.content  # of what is not the paper's
    assert (output / "report.html").is_file()
    assert json.loads((output / "samples.json").read_text())["rows"]


def test_metadata_claims_what_is_known(summary: dict[str, Any], tiny_llama: str, tmp_path: Path) -> None:
    known = model_card.metadata(summary, adapter=True).to_dict()
    assert known["base_model"] == "org/base"
    assert known["base_model_relation"] == "adapter"
    assert known["datasets"] == ["Anthropic/hh-rlhf"]
    assert "license" not in known
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    local = {**summary, "config": {**summary["config"], "model_name_or_path": str(tmp_path / "base"), "data": "x"}}
    known = model_card.metadata(local, adapter=False).to_dict()
    assert known["license"] == "apache-2.0"
    assert not {"base_model", "datasets"} & known.keys()


def test_paths_and_tokens_of_this_machine_are_not_told(summary: dict[str, Any]) -> None:
    body = str(model_card.card(summary, [], "a|b<script>", adapter=False))
    assert "/home/me" not in body
    assert "TOKEN" not in body
    assert "output_dir: run" in body
    assert "<script>" not in body


@pytest.mark.parametrize("loss_type", ["exo-pref", "exo-rw", "dpo-pref", "dpo-rw"])
def test_the_method_says_what_was_minimised(summary: dict[str, Any], loss_type: str) -> None:
    config = {**summary["config"], "loss_type": loss_type, "label_smoothing": 0.001, "ref_name_or_path": "/x/ref"}
    said = model_card.method(config, "align")
    assert ("reverse KL" in said) == loss_type.startswith("exo")
    assert ("ε = 0.001" in said) == loss_type.endswith("pref")
    assert ("β_r = 0.3" in said) == loss_type.endswith("rw")
    assert "The reference is `ref`" in said


def test_the_citation_is_the_readme_s() -> None:
    assert model_card.CITATION in (ROOT / "README.md").read_text(encoding="utf-8")
