"""The README's example runs as it stands."""

import re
from pathlib import Path

import torch

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_example_runs_and_has_gradients() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    names: dict = {}
    exec(block, names)
    assert torch.isfinite(names["loss"])
    assert names["policy_logps"].shape == (2, 4)
    assert names["hidden"].grad.abs().sum() > 0
    assert names["weight"].grad.abs().sum() > 0
