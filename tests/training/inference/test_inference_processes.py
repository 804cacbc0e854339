"""generate, score and logprobs give the same bytes on one and on two processes, and when they were killed between."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import kill_halfway, run
from tiny_models import make_rows

from exo_fast.training.stages.generate import GenerateConfig, generate
from exo_fast.training.stages.logprobs import LogprobsConfig, logprobs
from exo_fast.training.stages.score import ScoreConfig, score

REWARDS = """
import time

def slow(prompts, completions):
    time.sleep(0.05)
    return [len(p) - len(c) + 0.1 for p, c in zip(prompts, completions)]
"""
STAGES = {"generate": (GenerateConfig, generate), "score": (ScoreConfig, score), "logprobs": (LogprobsConfig, logprobs)}
SCRIPT = """
import json
from importlib import import_module

for stage, settings in json.loads({jobs!r}):
    module = import_module("exo_fast.training.stages." + stage)
    getattr(module, stage)(getattr(module, stage.capitalize() + "Config")(**settings))
"""


@pytest.mark.slow
def test_one_and_two_processes_and_a_kill_give_the_same_bytes(
    tiny_llama: str, reward_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    Path("slow_rewards.py").write_text(REWARDS)
    Path("prompts.json").write_text(json.dumps(make_rows(150)))
    Path("rows.json").write_text(json.dumps(make_rows(20)))
    common = {"data": "rows.json", "use_cpu": True, "disable_tqdm": True, "batch_size": 3}
    model = {"model_name_or_path": tiny_llama, "max_seq_len": 48}
    sampling = {"data": "prompts.json", "max_new_tokens": 16, "return_num": 1, "batch_size": 1}
    settings: dict[str, tuple[str, dict[str, Any]]] = {
        "samples": ("generate", {**common, **model, **sampling}),
        "function": ("score", {**common, "function": "slow_rewards:slow"}),
        "model": ("score", {**common, "reward_model": reward_model}),
        "logprobs": ("logprobs", {**common, **model, "max_gen_len": 16}),
    }

    def script(*directories: str) -> Path:
        """One that runs the stage of each directory's name, `NAME-…`."""
        jobs = [(settings[d.split("-")[0]][0], {**settings[d.split("-")[0]][1], "output_dir": d}) for d in directories]
        path = tmp_path / f"{directories[0]}.py"
        path.write_text(SCRIPT.format(jobs=json.dumps(jobs)))
        return path

    killed = ["samples-killed", "function-killed"]
    for directory in killed:
        kill_halfway(script(directory), Path(directory))
    run(script(*(f"{name}-two" for name in settings), *killed), processes=2)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have
    try:
        for name, (stage, options) in settings.items():
            config, function = STAGES[stage]
            function(config(**options, output_dir=f"{name}-one"))
    finally:
        torch.set_num_threads(threads)
    for directory in (*(f"{name}-two" for name in settings), *killed):
        for name in ("train.json", "summary.json"):
            expected = Path(f"{directory.split('-')[0]}-one", name).read_bytes()
            assert Path(directory, name).read_bytes() == expected, (directory, name)
