"""Two processes over gloo give what one process gives."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from exo_fast.training.stages.align import AlignConfig, align

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.slow
def test_two_processes_under_torchrun_equal_one(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """ZeRO-3: sharded loading, the head gathered in training and evaluation, consolidated saving.

    The held-out split (5 groups) does not divide into the batches, so the last one is padded with repeated groups.
    """
    single = settings(engine="torch", output_dir=str(tmp_path / "one"), reference_cache_dir=str(tmp_path / "cache1"))
    expected = align(AlignConfig(**single))
    double = settings(
        zero_stage=3,
        per_device_train_batch_size=2,
        output_dir=str(tmp_path / "two"),
        reference_cache_dir=str(tmp_path / "cache2"),
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(double))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    stage = ["-m", "exo_fast.training.cli", "align", "--config", str(tmp_path / "recipe.yaml")]
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    done = subprocess.run(
        [*launcher, *stage], capture_output=True, text=True, timeout=300, env={**environment, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    found = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert (found["processes"], found["steps"]) == (2, expected["steps"])
    for split, key in (("train", "loss"), ("eval", "eval_loss")):
        for when in ("first", "last"):
            right = expected["metrics"][split][when]
            for name in (key, key.replace("loss", "kl"), key.replace("loss", "group_accuracy")):
                assert found["metrics"][split][when][name] == pytest.approx(right[name], abs=1e-3), (split, when, name)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
