"""TRL's tests under another trainer: the command, on a checkout of three tests that this file writes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from exo_fast.benchmarks.harness.tables import block
from exo_fast.benchmarks.trl import drop_in as trl_drop_in
from exo_fast.benchmarks.trl import suite as trl_suite
from exo_fast.benchmarks.trl.standins import model_scripts
from exo_fast.training import machine
from exo_fast.training.errors import InputError

CHECKOUT = {
    "VERSION": "1.0.0\n",
    "tests/__init__.py": "",
    "tests/testing_utils.py": "from trl.import_utils import is_exo_fast_available, is_no_such_package_available\n",
    "tests/conftest.py": "",
    "trl/__init__.py": "raise ImportError('the installed one is meant')\n",
    "trl/chat_templates/qwen2_5.jinja": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    "scripts/generate_zen_dataset.py": """
from datasets import Dataset

def main(test_size, push_to_hub, repo_id):
    rows = {"prompt": ["a b", "c"] * 5, "chosen": [" d", " e f"] * 5, "rejected": [" g h", " i"] * 5}
    split = Dataset.from_dict(rows).train_test_split(test_size=test_size, shuffle=False)
    split.push_to_hub(repo_id, config_name="standard_preference")
""",
    "scripts/generate_tiny_models/__init__.py": "",
    "scripts/generate_tiny_models/for_causal_lm/__init__.py": "",
    "scripts/generate_tiny_models/_common.py": """
def check_transformers_version():
    raise RuntimeError("another version")

def push_to_hub(model, tokenizer, generation_config, prefix=None, suffix=None):
    raise RuntimeError("no hub")
""",
    "scripts/generate_tiny_models/for_causal_lm/qwen2_for_causal_lm_2_5.py": """
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from .._common import check_transformers_version, push_to_hub

check_transformers_version()
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2.5")
generation_config = GenerationConfig.from_pretrained("Qwen/Qwen2.5")
config = Qwen2Config(
    vocab_size=len(tokenizer.vocab), hidden_size=8, num_attention_heads=4, num_key_value_heads=2,
    num_hidden_layers=1, intermediate_size=16,
)
model = Qwen2ForCausalLM(config)
push_to_hub(model, tokenizer, generation_config, "tiny", "2.5")
""",
    "tests/test_dpo_trainer.py": """
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer
from .testing_utils import is_exo_fast_available, is_no_such_package_available

def test_train(tmp_path):
    assert is_exo_fast_available() and not is_no_such_package_available()
    data = load_dataset("trl-internal-testing/zen", "standard_preference", split="train")
    args = DPOConfig(str(tmp_path), max_steps=2, bf16=False, use_cpu=True, loss_type="sigmoid", report_to="none")
    DPOTrainer("trl-internal-testing/tiny-Qwen2ForCausalLM-2.5", args=args, train_dataset=data).train()

def test_default_loss():
    assert DPOConfig("out", bf16=False, use_cpu=True).loss_type == ["sigmoid"], "another default"

def test_images():
    DPOTrainer("trl-internal-testing/tiny-LlavaForConditionalGeneration")
""",
}


def write(folder: Path) -> Path:
    for name, text in CHECKOUT.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TRL itself and ours train on what the checkout's scripts make; ours has another default, and the record says so;
    a model that nothing makes is skipped with the reason."""
    checkout, output, page = write(tmp_path / "trl"), tmp_path / "new" / "results.json", tmp_path / "page.md"
    page.write_text("<!-- trl_suite: summary -->\nold\n<!-- end -->\n<!-- trl_suite: tests -->\n<!-- end -->\n")
    arguments = ["--trl_checkout", str(checkout), "--trainer", "trl", "ours"]
    status = trl_suite.main([*arguments, "--output", str(output), "--markdown", str(page)])
    results = json.loads(output.read_text())
    assert {(row["trainer"], row["test"]): row["outcome"] for row in results["rows"]} == {
        ("trl", "test_train"): "passed",
        ("trl", "test_default_loss"): "passed",
        ("trl", "test_images"): "skipped",
        ("ours", "test_train"): "passed",
        ("ours", "test_default_loss"): "failed",
        ("ours", "test_images"): "skipped",
    }
    assert status == 1
    rows = {(row["trainer"], row["test"]): row for row in results["rows"]}
    assert "another default" in rows["ours", "test_default_loss"]["why"]
    assert "its image processor comes from the hub" in rows["trl", "test_images"]["why"]
    (theirs,), (ours,) = (rows[trainer, "test_train"]["first_steps"] for trainer in ("trl", "ours"))
    assert theirs[0] == pytest.approx(math.log(2), rel=1e-5)
    assert theirs[1] > 0
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert results["checkout"] == "1.0.0"
    for name, made in (("summary", trl_suite.summary(results)), ("tests", trl_suite.tests_table(results))):
        assert block("trl_suite", name).search(page.read_text())[2] == f"{made}\n"
    assert str(tmp_path) not in page.read_text() + output.read_text()
    assert not list(checkout.rglob("__pycache__"))


def test_a_folder_that_is_no_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"no tests/test_dpo_trainer\.py in it"):
        trl_suite.run(tmp_path, ["trl"])
    assert trl_suite.main(["--trl_checkout", str(tmp_path)]) == 2
    assert "give a checkout of TRL's repository" in capsys.readouterr().err


def test_models_are_found_by_the_names_they_are_pushed_as(tmp_path: Path) -> None:
    module = "generate_tiny_models.for_causal_lm.qwen2_for_causal_lm_2_5"
    assert model_scripts(write(tmp_path)) == {"tiny-Qwen2ForCausalLM-2.5": module}


def row(trainer: str, test: str, outcome: str, why: str = "", *first_steps: list[float]) -> dict[str, Any]:
    return {"trainer": trainer, "test": test, "outcome": outcome, "why": why, "first_steps": list(first_steps)}


def test_what_is_lost_and_why() -> None:
    rows = [
        row("trl", "T::a[1]", "passed", "", [0.5, 2.0], [1.0, 1.0]),
        row("trl", "T::a[2]", "failed", "0 active drivers ([])"),
        row("trl", "T::b", "skipped", "no GPU"),
        row("ours", "T::a[1]", "passed", "", [0.5, 2.2], [0.99, 1.0]),
        row("ours", "T::a[2]", "failed", "0 active drivers ([])"),
        row("ours", "T::b", "skipped", "no GPU"),
    ]
    results = {"trainers": ["trl", "ours"], "rows": rows}
    assert trl_suite.lost(results, "ours") == []
    assert trl_suite.differences(results, "ours") == pytest.approx((0.01, 0.1))
    assert trl_suite.reasons(rows[1::3], ["trl", "ours"]) == ["the kernels of Liger need a GPU"]
    rows[3] = row("ours", "T::a[1]", "failed", "x | y")
    assert trl_suite.lost(results, "ours") == [rows[3]]
    assert trl_suite.differences(results, "ours") is None
    assert trl_suite.intended("ValueError: ld_alpha, use_weighting and f_divergence_type are not for loss_type=exo-rw")
    assert not trl_suite.intended("x | y")
    assert trl_suite.reasons([rows[0], rows[3]], ["trl", "ours"]) == ["ours: x \\| y"]


def test_the_page_shows_the_results() -> None:
    page = (machine.REPOSITORY / "docs" / "trl.md").read_text()
    suite = json.loads(trl_suite.OUTPUT.read_text())
    for name, made in (("summary", trl_suite.summary(suite)), ("tests", trl_suite.tests_table(suite))):
        assert block("trl_suite", name).search(page)[2] == f"{made}\n"
    drop_in = json.loads((machine.REPOSITORY / trl_drop_in.RESULTS).read_text())
    made = f"{trl_drop_in.table(drop_in['rows'])}\n\n{trl_drop_in.provenance(drop_in)}"
    assert block("trl_drop_in", "table").search(page)[2] == f"{made}\n"


def test_what_the_drop_in_promises() -> None:
    """The results on their machine: equal losses over ten steps, 1.5 and 2.5 times the speed, 0.6 of the memory."""
    results = json.loads((machine.REPOSITORY / trl_drop_in.RESULTS).read_text())
    rows = {row["case"]: row for row in results["rows"]}
    trl = rows["TRL"]
    for case, speed in (("patched", 1.5), ("ExoDPOTrainer", 2.5)):
        row = rows[case]
        assert len(row["losses"]) == 10
        assert max(abs(a - b) for a, b in zip(row["losses"], trl["losses"], strict=True)) < 1e-4
        assert trl["seconds"] / row["seconds"] >= speed
        assert row["above_mb"] / trl["above_mb"] <= 0.6
