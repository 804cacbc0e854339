"""The reported numbers, on a case small enough to do by hand."""

import math

import pytest
import torch

from exo_fast.metrics import GROUP_METRICS, group_metrics
from exo_fast.training.machine import peak_memory_mb


def test_hand_computed_case() -> None:
    policy = torch.tensor([[-10.0, -20.0, -30.0], [-5.0, -5.0, -8.0]])
    reference = torch.tensor([[-12.0, -19.0, -34.0], [-5.0, -5.0, -5.0]])
    rewards = torch.tensor([[0.5, 0.1, 0.9], [3.0, 2.0, 1.0]])
    metrics = dict(zip(GROUP_METRICS, group_metrics(policy, reference, rewards, beta_pi=0.5).T, strict=True))
    # r = 0.5 * [[2, -1, 4], [0, 0, -3]]; the best candidates are 2 and 0, the worst 1 and 2.
    assert metrics["rewards/chosen"].tolist() == [2.0, 0.0]
    assert metrics["rewards/rejected"].tolist() == [-0.5, -1.5]
    assert metrics["rewards/accuracies"].tolist() == [1.0, 1.0]
    assert metrics["rewards/margins"].tolist() == [2.5, 1.5]
    assert metrics["logps/chosen"].tolist() == [-30.0, -5.0]
    assert metrics["logps/rejected"].tolist() == [-20.0, -8.0]
    assert metrics["group_accuracy"].tolist() == [1.0, 0.5]  # in the second group two share the highest r
    assert metrics["kl"].tolist() == pytest.approx([-5 / 3, 1.0])
    weights = [math.exp(1.0), math.exp(-0.5), math.exp(2.0)]
    q = [weight / sum(weights) for weight in weights]
    assert metrics["entropy"][0].item() == pytest.approx(-sum(p * math.log(p) for p in q))


def test_several_best_or_worst_candidates_count_as_their_mean() -> None:
    policy = torch.tensor([[-10.0, -20.0, -30.0, -6.0], [-1.0, -2.0, -4.0, -3.0], [-1.0, -2.0, -3.0, -3.0]])
    rewards = torch.tensor([[8.0, 8.0, 7.0, 6.0], [9.0, 1.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    metrics = dict(zip(GROUP_METRICS, group_metrics(policy, policy + 1, rewards, beta_pi=1.0).T, strict=True))
    assert metrics["logps/chosen"].tolist() == [-15.0, -1.0, -2.25]
    assert metrics["logps/rejected"].tolist() == [-6.0, -3.0, -2.25]
    assert metrics["rewards/accuracies"].tolist() == [0.0, 0.0, 0.0]  # r is −1 everywhere
    assert metrics["group_accuracy"].tolist() == [0.5, 0.25, 1.0]  # by chance
    better = group_metrics(policy, policy - torch.tensor([0.0, 2.0, 1.0, 1.0]), rewards, beta_pi=1.0)
    assert dict(zip(GROUP_METRICS, better.T, strict=True))["group_accuracy"].tolist() == [1.0, 0.0, 1.0]


def test_an_untrained_policy_is_at_chance() -> None:
    logps = torch.full((2, 4), -3.0)
    metrics = group_metrics(logps, logps, torch.rand(2, 4), beta_pi=0.1).mean(0).tolist()
    found = dict(zip(GROUP_METRICS, metrics, strict=True))
    assert (found["group_accuracy"], found["kl"], found["rewards/accuracies"]) == (0.25, 0.0, 0.0)
    assert found["entropy"] == pytest.approx(math.log(4))


def test_peak_memory_is_in_megabytes() -> None:
    assert 50 < peak_memory_mb() < 100_000
