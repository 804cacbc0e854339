"""The definitions against the original implementation's own numbers, kept in tests/data/seed_losses.json (float64)."""

import json
import math

import pytest
import torch
from tree import SEED_LOSSES

from exo_fast import reference
from exo_fast.logprobs import linear_logprobs
from exo_fast.loss import linear_group_loss

CASES = json.loads(SEED_LOSSES.read_text())["cases"]
# The original's exo-pref has log-targets [0, −10], not normalised: the same as this ε but for a constant in the loss.
EPSILON = math.exp(-10) / (1 + math.exp(-10))


def padded_rows(case: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(source, targets, cu_seqlens) of the original's padded batch: position t predicts token t + 1."""
    source, targets, bounds = [], [], [0]
    width = len(case["input_ids"][0])
    for row, (ids, mask, prompt) in enumerate(
        zip(case["input_ids"], case["attention_mask"], case["prompt_lens"], strict=True)
    ):
        positions = [t for t in range(width - 1) if t + 1 >= prompt and mask[t + 1]]
        source += [row * width + t for t in positions]
        targets += [ids[t + 1] for t in positions]
        bounds.append(len(source))
    return torch.tensor(source), torch.tensor(targets), torch.tensor(bounds)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_original_losses_and_gradients(case: dict, backend: str) -> None:
    hidden = torch.tensor(case["policy_hidden"], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor(case["lm_head_weight"], dtype=torch.float64, requires_grad=True)
    ref_hidden = torch.tensor(case["reference_hidden"], dtype=torch.float64)
    rewards = torch.tensor(case["rewards"], dtype=torch.float64)
    source, targets, cu_seqlens = padded_rows(case)
    scale = 1 / case["temperature"]
    ref_logps = reference.sequence_logps(
        linear_logprobs(ref_hidden.flatten(0, 1)[source], weight.detach(), targets, scale=scale, backend=backend),
        cu_seqlens,
    ).view_as(rewards)
    smoothing = EPSILON if case["loss_type"] == "exo-pref" else 0.0
    loss, _ = linear_group_loss(
        hidden.flatten(0, 1)[source],
        weight,
        targets,
        cu_seqlens,
        ref_logps,
        rewards,
        loss_type=case["loss_type"],
        beta_pi=case["beta_pi"],
        beta_r=case["beta_r"],
        label_smoothing=smoothing,
        scale=scale,
        backend=backend,
    )
    loss.backward()
    constant = math.log1p(math.exp(-10)) if case["loss_type"] == "exo-pref" else 0.0
    assert loss.item() - constant == pytest.approx(case["loss"], abs=1e-9)
    assert hidden.grad.norm().item() == pytest.approx(case["grad_hidden_norm"], abs=1e-9)
    assert weight.grad.norm().item() == pytest.approx(case["grad_weight_norm"], abs=1e-9)
    torch.testing.assert_close(weight.grad, torch.tensor(case["grad_weight"], dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(hidden.grad, torch.tensor(case["grad_hidden"], dtype=torch.float64), atol=1e-9, rtol=0)


def test_targets_are_distributions_with_the_best_candidate_on_top() -> None:
    rewards = torch.tensor([[0.1, 2.0, -1.0, 0.3], [5.0, 1.0, 0.0, 4.0]], dtype=torch.float64)
    for loss_type, smoothing in (("exo-pref", 1e-3), ("dpo-pref", 0.0), ("exo-rw", 0.0), ("dpo-rw", 0.0)):
        p = reference.target_logps(rewards, loss_type, beta_r=0.5, label_smoothing=smoothing).exp()
        torch.testing.assert_close(p.sum(-1), torch.ones(2, dtype=torch.float64))
        assert p.argmax(-1).tolist() == [1, 0]
    preferred = reference.target_logps(rewards, "exo-pref", 0.5, 0.3).exp()
    torch.testing.assert_close(preferred[0], torch.tensor([0.1, 0.7, 0.1, 0.1], dtype=torch.float64))


@pytest.mark.parametrize(
    ("rewards", "smoothing", "target"),
    [
        ([8.0, 8.0, 7.0, 6.0], 0.2, [0.4, 0.4, 0.1, 0.1]),
        ([7.0, 8.0, 6.0, 8.0], 0.0, [0.0, 0.5, 0.0, 0.5]),
        ([5.0, 5.0, 5.0, 1.0], 0.1, [0.3, 0.3, 0.3, 0.1]),
        ([2.0, 2.0, 2.0, 2.0], 0.1, [0.25, 0.25, 0.25, 0.25]),
        ([2.0, 2.0], 0.0, [0.5, 0.5]),
        ([1.0, 1.0, 3.0], 0.5, [0.25, 0.25, 0.5]),
    ],
)
def test_tied_best_candidates_share_the_target(rewards: list, smoothing: float, target: list) -> None:
    for dtype in (torch.float64, torch.float32):
        found = reference.target_logps(torch.tensor([rewards], dtype=dtype), "dpo-pref", 0.1, smoothing).exp()
        torch.testing.assert_close(found, torch.tensor([target], dtype=dtype))


def test_reverse_and_forward_kl_vanish_at_the_target_and_only_there() -> None:
    rewards = torch.tensor([[0.3, -0.2, 0.9]], dtype=torch.float64)
    ref = torch.tensor([[-40.0, -30.0, -50.0]], dtype=torch.float64)
    at_target = ref + rewards / 0.5 / 0.2  # beta_pi · (s − s_ref) = reward / beta_r
    options = {"beta_pi": 0.2, "beta_r": 0.5, "label_smoothing": 0.0}
    assert reference.group_loss(at_target, ref, rewards, loss_type="exo-rw", **options).item() == pytest.approx(
        0, abs=1e-12
    )
    assert reference.group_loss(ref, ref, rewards, loss_type="exo-rw", **options).item() > 0.01
    p = torch.softmax(rewards / 0.5, -1)
    entropy = -(p * p.log()).sum().item()
    assert reference.group_loss(at_target, ref, rewards, loss_type="dpo-rw", **options).item() == pytest.approx(entropy)


def test_dpo_on_a_pair_is_the_sigmoid_loss() -> None:
    policy, ref = torch.tensor([[-20.0, -24.0]]), torch.tensor([[-21.0, -22.0]])
    loss = reference.group_loss(
        policy, ref, torch.tensor([[1.0, 0.0]]), loss_type="dpo-pref", beta_pi=0.3, label_smoothing=0.0
    )
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(torch.tensor([0.3 * 3.0])))
