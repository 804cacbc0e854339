"""Two processes over gloo give what one process gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import yaml
from safetensors.torch import load_file

from exo_fast.training.stages.align import AlignConfig, align


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
    forked.run("align", "--config", tmp_path / "recipe.yaml", processes=2)

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
