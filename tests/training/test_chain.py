"""The whole pipeline as one recipe, with every stage, on one process and on two."""

import json
import sys
from pathlib import Path

import pytest
from conftest import make_rows
from killing import run
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from exo_fast.training.cli import STAGES

RECIPE = """
variables: {output: out, processes: 1}
defaults: {report_to: none, disable_tqdm: true, use_cpu: true, max_seq_len: 64, learning_rate: 0.003, logging_steps: 2}
stages:
  - name: prepare
    stage: prepare
    options: {data: "custom/sft:raw/sft", output_dir: "${output}/data"}
  - name: class-data
    stage: prepare
    options: {data: "custom/class:raw/class", output_dir: "${output}/class"}
  - name: classifier
    stage: classifier
    processes: ${processes}
    options: {model_name_or_path: base, data: "${output}/class", output_dir: "${output}/classifier",
              num_train_epochs: 3}
  - name: sft
    stage: sft
    processes: ${processes}
    options: {model_name_or_path: base, data: "${output}/data", output_dir: "${output}/sft", max_gen_len: 16,
              per_device_train_batch_size: 4}
  - name: samples
    stage: generate
    processes: ${processes}
    options: {model_name_or_path: "${output}/sft", data: "${output}/data", output_dir: "${output}/samples",
              return_num: 4, max_new_tokens: 8, batch_size: 8}
  - name: preferences
    stage: score
    processes: ${processes}
    options: {classifier: "${output}/classifier", mode: label-pref, data: "${output}/samples",
              output_dir: "${output}/preferences", batch_size: 8}
  - name: reward-model
    stage: reward-model
    processes: ${processes}
    options: {model_name_or_path: "${output}/sft", data: "${output}/preferences", output_dir: "${output}/rm",
              per_device_train_batch_size: 4}
  - name: rewards
    stage: score
    processes: ${processes}
    options: {reward_model: "${output}/rm", mode: label, data: "${output}/samples", output_dir: "${output}/rewards",
              batch_size: 8}
  - name: preferences-as-rewards
    stage: pref-to-rw
    options: {data: "${output}/preferences", output_dir: "${output}/p2r"}
  - name: ${loss}
    stage: align
    processes: ${processes}
    for: {loss: [exo-rw, dpo-rw]}
    options: &align {model_name_or_path: "${output}/sft", data: "${output}/rewards", output_dir: "${output}/${loss}",
                     reference_cache_dir: "${output}/reference", loss_type: "${loss}", max_gen_len: 8,
                     per_device_train_batch_size: 2, save_strategy: steps, save_steps: 2, zero_stage: 2}
  - name: ${loss}
    stage: align
    processes: ${processes}
    for: {loss: [exo-pref, dpo-pref]}
    options: {<<: *align, data: "${output}/p2r"}
  - name: logprobs
    stage: logprobs
    processes: ${processes}
    options: {model_name_or_path: "${output}/exo-rw", data: "${output}/samples", output_dir: "${output}/logprobs",
              max_gen_len: 8}
  - name: mean-reward
    stage: score
    processes: ${processes}
    options: {function: "praise:count", mode: eval, data: "${output}/samples", output_dir: "${output}/mean"}
  - name: evaluation
    stage: evaluate
    processes: ${processes}
    options: {policies: ["exo-rw=${output}/exo-rw", "dpo-rw=${output}/dpo-rw"], reference: "${output}/sft",
              classifier: "${output}/classifier", data: "${output}/data", return_num: 2, max_new_tokens: 8,
              output_dir: "${output}/evaluation"}
"""
PRAISE = """
def count(prompts, completions):
    return [completion.count("g") for completion in completions]
"""


@pytest.fixture
def directory(tmp_path: Path, tiny_llama: str) -> Path:
    """A directory with a model `base`, raw data, a reward function and the recipe."""
    (tmp_path / "base").symlink_to(tiny_llama)
    sft, texts = [], []
    for row in make_rows(20, candidates=2):
        best, worst = row["completions"] if row["rewards"][0] > row["rewards"][1] else row["completions"][::-1]
        sft.append({"prompt": row["prompt"], "chosen": best})
        texts += [{"text": best, "label": "pos"}, {"text": worst, "label": "neg"}]
    for name, rows in (("sft", sft), ("class", texts)):
        (tmp_path / "raw" / name).mkdir(parents=True)
        for split, part in (("train", rows[: len(rows) * 2 // 3]), ("test", rows[len(rows) * 2 // 3 :])):
            (tmp_path / "raw" / name / f"{split}.json").write_text(json.dumps(part))
    (tmp_path / "praise.py").write_text(
        "def count(prompts, completions):\n    return [c.count('g') for c in completions]\n"
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def run_recipe(directory: Path, *words: str) -> str:
    done = run(
        [sys.executable, "-m", "exo_fast.training.cli", "run", "recipe.yaml", *words], cwd=directory, timeout=900
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_every_stage_in_one_recipe(directory: Path, processes: int) -> None:
    run_recipe(directory, "--set", f"processes={processes}")
    output = directory / "out"
    records = json.loads((output / ".run" / "run.json").read_text())
    assert {entry["stage"] for entry in records["stages"]} == STAGES.keys() - {"run", "recipes", "demo"}
    assert [entry["state"] for entry in records["stages"]] == ["done now"] * 16
    assert json.loads((output / "sft" / "summary.json").read_text())["processes"] == processes
    samples = json.loads((output / "samples" / "test.json").read_text())
    assert all(len(row["completions"]) == 4 for row in samples)
    rewards = json.loads((output / "rewards" / "test.json").read_text())
    assert [row["completions"] for row in rewards] == [row["completions"] for row in samples]
    assert len(json.loads((output / "logprobs" / "test.json").read_text())) == len(samples)
    for loss in ("exo-rw", "dpo-rw", "exo-pref", "dpo-pref"):
        AutoModelForCausalLM.from_pretrained(output / loss)
    AutoModelForSequenceClassification.from_pretrained(output / "rm")
    results = json.loads((output / "evaluation" / "results.json").read_text())
    assert "exo-rw" in results["finding"]
    assert (output / "evaluation" / "frontier.png").stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.json") if ".run" not in path.parts}
    run_recipe(directory, "--set", f"processes={processes}")  # nothing is done twice
    assert {path: path.stat().st_mtime_ns for path in before} == before
