"""The whole pipeline as one recipe, with every stage, on two processes; on one, and killed in the middle of stages."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from subprocesses import environment, run
from tiny_models import make_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from exo_fast.training.cli.command import STAGES

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


# Stages to kill, and what is there once they are in the middle of their work.
SIGNS = {
    "classifier": "classifier/settings.json",
    "sft": "sft/settings.json",
    "samples": "samples/.partial/train-*",
    "reward-model": "rm/settings.json",
    "rewards": "rewards/.partial/*",
    "exo-rw": "exo-rw/checkpoint-2/trainer_state.json",
    "logprobs": "logprobs/.partial/*",
    "evaluation": "evaluation/models/exo-rw/*/checkpoint-2/samples",
}


def prepare_directory(path: Path, model: str) -> Path:
    """A directory with a model `base`, raw data, a reward function and the recipe."""
    (path / "base").symlink_to(model)
    sft, texts = [], []
    for row in make_rows(20, candidates=2):
        best, worst = row["completions"] if row["rewards"][0] > row["rewards"][1] else row["completions"][::-1]
        sft.append({"prompt": row["prompt"], "chosen": best})
        texts += [{"text": best, "label": "pos"}, {"text": worst, "label": "neg"}]
    for name, rows in (("sft", sft), ("class", texts)):
        (path / "raw" / name).mkdir(parents=True)
        for split, part in (("train", rows[: len(rows) * 2 // 3]), ("test", rows[len(rows) * 2 // 3 :])):
            (path / "raw" / name / f"{split}.json").write_text(json.dumps(part))
    (path / "praise.py").write_text(PRAISE)
    (path / "recipe.yaml").write_text(RECIPE)
    return path


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "exo_fast.training.cli", "run", "recipe.yaml", *words]


def run_recipe(directory: Path, *words: str) -> None:
    done = run(command(*words), cwd=directory, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> Path:
    """The output of the recipe on one process."""
    directory = prepare_directory(tmp_path_factory.mktemp("undisturbed"), tiny_llama)
    run_recipe(directory)
    return directory / "out"


def check_output(output: Path, processes: int) -> None:
    """Every stage ran on so many processes and left what the next one and its users need."""
    records = json.loads((output / ".run" / "run.json").read_text())
    assert {entry["stage"] for entry in records["stages"]} == {name for name, stage in STAGES.items() if stage.config}
    assert json.loads((output / "sft" / "summary.json").read_text())["processes"] == processes
    samples = json.loads((output / "samples" / "test.json").read_text())
    assert all(len(row["completions"]) == 4 for row in samples)
    rewards = json.loads((output / "rewards" / "test.json").read_text())
    assert [row["completions"] for row in rewards] == [row["completions"] for row in samples]
    assert len(json.loads((output / "logprobs" / "test.json").read_text())) == len(samples)
    for loss in ("exo-rw", "dpo-rw", "exo-pref", "dpo-pref"):
        AutoModelForCausalLM.from_pretrained(output / loss)
    AutoModelForSequenceClassification.from_pretrained(output / "rm")
    assert "exo-rw" in json.loads((output / "evaluation" / "results.json").read_text())["finding"]
    assert (output / "evaluation" / "frontier.png").stat().st_size > 10_000


@pytest.mark.slow
def test_every_stage_in_one_recipe_and_none_twice(tmp_path: Path, tiny_llama: str) -> None:
    directory = prepare_directory(tmp_path, tiny_llama)
    run_recipe(directory, "--set", "processes=2")
    check_output(directory / "out", processes=2)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*.json") if ".run" not in path.parts}
    run_recipe(directory, "--set", "processes=2")
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.long
def test_every_stage_on_one_process(undisturbed: Path) -> None:
    check_output(undisturbed, processes=1)


@pytest.mark.long
def test_killed_in_eight_stages_it_ends_with_the_same_files(undisturbed: Path, tmp_path: Path, tiny_llama: str) -> None:
    directory = prepare_directory(tmp_path, tiny_llama)
    output = directory / "out"
    for stage, sign in SIGNS.items():
        with (directory / "log").open("w") as log:
            process = subprocess.Popen(command(), cwd=directory, env=environment(), stdout=log, stderr=log)
        try:
            while not any(output.glob(sign)):
                assert process.poll() is None, f"{stage}: {(directory / 'log').read_text()[-4000:]}"
                time.sleep(0.002)
        finally:
            process.kill()
            process.wait()
        state = json.loads((output / ".run" / f"{stage}.json").read_text())
        assert not state["done"], stage
    run_recipe(directory)

    # Below evaluation/models a run's directory is named after its whole path, which is another one here.
    data = [path.relative_to(undisturbed) for name in ("train.json", "test.json") for path in undisturbed.rglob(name)]
    data = [path for path in data if path.parts[:2] != ("evaluation", "models")]
    assert len(data) > 15
    assert "evaluation" in {path.parts[0] for path in data}  # the completions of all models, and their scores
    for path in data:
        assert (output / path).read_bytes() == (undisturbed / path).read_bytes(), path
    weights = [path.relative_to(undisturbed) for path in undisturbed.rglob("model.safetensors")]
    assert len(weights) > 7
    for path in weights:
        found, expected = load_file(output / path), load_file(undisturbed / path)
        assert all(torch.equal(found[name], expected[name]) for name in expected), path
