"""A batch of random tensors, and the losses of docs/other-losses.md on it as their papers write them.

They are computed sequence by sequence, on full logits in float64. Every implementation is compared with them, and they
need no library.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Functions = dict[str, Callable[..., Any]]  # the page's functions by name
BETA, GAMMA, ALPHA, EPSILON, KL_WEIGHT, TEMPERATURE = 0.3, 0.4, 0.7, (0.2, 0.28), 0.04, 0.7
KTO_WEIGHTS = (1.0, 1.3)
MAX_COMPLETION = 9  # Dr. GRPO divides by it
LENGTHS = ((0, 3, 9), (2, 4, 5), (1, 2, 1), (0, 3, 4), (2, 4, 8), (1, 2, 7))  # padding, prompt, completion
WINDOW_TOKENS = 37.0  # DAPO divides by the tokens of the global batch, not of this batch


@dataclass(frozen=True)
class Case:
    """A loss computed by a peer, and the arguments with which the page's function computes the same."""

    loss: str  # the page's function is `LOSS_loss`
    variant: str  # such as a loss_type; empty if there is only one
    peer: str  # the source of the value, in words
    hidden: Tensor  # (B, T, D)
    weight: Tensor  # (V, D)
    arguments: dict[str, Any]  # beside hidden and weight
    value: Tensor  # scalar
    d_hidden: Tensor  # (B, T, D)
    d_weight: Tensor  # (V, D)


def with_gradients(
    function: Callable[..., Any], hidden: Tensor, weight: Tensor, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the value of `function(hidden, weight, **arguments)`, which may be the first of a tuple, its dH and dW."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    value = function(hidden, weight, **arguments)
    value = value[0] if isinstance(value, tuple) else value
    return value.detach(), *torch.autograd.grad(value, (hidden, weight))


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def advantages_like(noise: Tensor) -> Tensor:
    """Make (B, T) advantages, good and bad sequences in turn. Their mean is not 0, or a loss could be 0, without a
    relative error."""
    return torch.tensor([2.0, -1.0]).repeat(len(noise) // 2)[:, None] + 0.3 * noise


# A batch of tensors


@dataclass(frozen=True)
class Problem:
    """Random tensors of a batch with prompts, padding on both sides and completions of unequal length.

    B sequences of T positions, the first half chosen: the page's and Liger's order. All in float32.
    """

    hidden: Tensor  # (B, T, D), like all hidden states here
    weight: Tensor  # (V, D)
    other_hidden: Tensor  # from the reference
    other_weight: Tensor
    old_hidden: Tensor  # from the policy that sampled: close to the policy, so that some ratios are clipped, not all
    targets: Tensor  # (B, T), −100 outside completions
    with_prompts: Tensor  # the same, with the prompts of the chosen half, for ORPO
    advantages: Tensor  # (B, T)

    @classmethod
    def make(cls, hidden_size: int = 24, vocab: int = 67, lengths: Sequence[tuple[int, int, int]] = LENGTHS) -> Problem:
        """Make six sequences of (padding, prompt, completion) tokens, padded on the right as well."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        rows, positions = len(lengths), max(map(sum, lengths)) + 1
        shape = (rows, positions, hidden_size)
        hidden, weight = normal(*shape), normal(vocab, hidden_size) * 1.5 / hidden_size**0.5
        tokens = torch.randint(vocab, (rows, positions), generator=generator)
        targets, with_prompts = torch.full_like(tokens, -100), torch.full_like(tokens, -100)
        for row, (padding, prompt, length) in enumerate(lengths):
            start, stop = padding + prompt, padding + prompt + length
            targets[row, start:stop] = tokens[row, start:stop]
            scored = slice(padding if row < rows // 2 else start, stop)
            with_prompts[row, scored] = tokens[row, scored]
        return cls(
            hidden,
            weight,
            other_hidden=hidden + 0.15 * normal(*shape),
            other_weight=weight + 0.1 * normal(vocab, hidden_size),
            old_hidden=hidden + 0.12 * normal(*shape),
            targets=targets,
            with_prompts=with_prompts,
            advantages=advantages_like(normal(rows, positions)),
        )

    def inputs(self, page: Functions) -> dict[str, dict[str, Any]]:
        """Return, by loss, the arguments of the page's function beside hidden and weight. The page's function computes
        frozen log-probs."""
        frozen = page["frozen_logps"]
        ref = frozen(self.other_hidden, self.other_weight, self.targets)
        tempered = {"scale": 1 / TEMPERATURE}
        old = frozen(self.old_hidden, self.weight, self.targets, **tempered)
        pairs = {"targets": self.targets, "beta": BETA}
        group = {
            "targets": self.targets,
            "advantages": self.advantages[:, 0],
            "old_logps": old,
            "ref_logps": frozen(self.other_hidden, self.other_weight, self.targets, **tempered),
            "beta": KL_WEIGHT,
            "epsilon": EPSILON,
            **tempered,
        }
        token = {"targets": self.targets, "advantages": self.advantages, "old_logps": old, "epsilon": 0.2, **tempered}
        return {
            "dpo": {**pairs, "ref_logps": ref.sum(-1)},
            "ipo": {**pairs, "ref_logps": ref.sum(-1)},
            "kto": {
                **pairs,
                "ref_logps": ref.sum(-1),
                "desirable": torch.tensor([True, True, False, True, False, False]),
                "z0": self.hidden.new_tensor(0.4),
                "weights": KTO_WEIGHTS,
            },
            "orpo": {**pairs, "targets": self.with_prompts, "completion": self.targets != -100},
            "simpo": {**pairs, "gamma": GAMMA},
            "cpo": {**pairs, "alpha": ALPHA},
            "ppo": token,
            "grpo": group,
        }


def grpo_variants(scored: Tensor) -> dict[str, dict[str, Any]]:
    """Return the arguments of GRPO's variants by the libraries' loss_type, for (B, T) bool of the tokens that count."""
    divisors = {"grpo": None, "bnpo": scored.sum(), "dapo": WINDOW_TOKENS, "dr_grpo": len(scored) * MAX_COMPLETION}
    plain = {name: {"per": divisor} for name, divisor in divisors.items()}
    return plain | {f"{name}, KL weighted": {**plain[name], "weigh_kl": True} for name in ("grpo", "dapo")}


# The papers' formulas, on the log-probs of each sequence's scored tokens and their positions in the row


def formula_cases(page: Functions) -> Iterator[Case]:
    """Make a case of every loss as its paper writes it, in float64 for float32 inputs."""
    problem = Problem.make()
    for loss, inputs in problem.inputs(page).items():
        variants = grpo_variants(problem.targets != -100) if loss == "grpo" else {"": {}}
        for variant, options in variants.items():
            given = {**inputs, **options}
            exact = {k: v.double() if is_float(v) else v for k, v in given.items()}
            result = with_gradients(
                functools.partial(formula, loss), problem.hidden.double(), problem.weight.double(), exact
            )
            yield Case(loss, variant, "full logits in float64", problem.hidden, problem.weight, given, *result)


def formula(
    loss: str, hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: float = 1.0, **options: Any
) -> Tensor:
    """Compute a loss as its paper writes it, from the arguments of the page's function."""
    logps = (hidden @ weight.T * scale).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    scored = [row != -100 for row in targets]
    return FORMULAS[loss]([row[keep] for row, keep in zip(logps, scored, strict=True)], scored, **options)


def _log_sigmoid(x: Tensor) -> Tensor:
    return -(1 + (-x).exp()).log()


def _pairs(values: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    half = len(values) // 2
    return list(zip(values[:half], values[half:], strict=True))


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


def _log_ratios(logps: list[Tensor], ref_logps: Tensor, lengths: bool = False) -> list[Tensor]:
    return [(row.sum() - ref) / (len(row) if lengths else 1) for row, ref in zip(logps, ref_logps, strict=True)]


def _dpo(logps: list[Tensor], _: list[Tensor], ref_logps: Tensor, beta: float) -> Tensor:
    return _mean([-_log_sigmoid(beta * (won - lost)) for won, lost in _pairs(_log_ratios(logps, ref_logps))])


def _ipo(logps: list[Tensor], _: list[Tensor], ref_logps: Tensor, beta: float) -> Tensor:
    return _mean(
        [(won - lost - 1 / (2 * beta)) ** 2 for won, lost in _pairs(_log_ratios(logps, ref_logps, lengths=True))]
    )


def _kto(
    logps: list[Tensor],
    _: list[Tensor],
    ref_logps: Tensor,
    desirable: Tensor,
    z0: Tensor,
    beta: float,
    weights: tuple[float, float],
) -> Tensor:
    losses = []
    for log_ratio, good in zip(_log_ratios(logps, ref_logps), desirable.tolist(), strict=True):
        gain = log_ratio - z0 if good else z0 - log_ratio
        losses.append(weights[0 if good else 1] * (1 - 1 / (1 + (-beta * gain).exp())))
    return _mean(losses)


def _orpo(logps: list[Tensor], scored: list[Tensor], completion: Tensor, beta: float) -> Tensor:
    odds = []
    for row, keep, of_completion in zip(logps, scored, completion, strict=True):
        p = row[of_completion[keep]].mean().exp()
        odds.append(p / (1 - p))
    nll = -torch.cat(logps[: len(logps) // 2]).mean()
    return nll - beta * _mean([_log_sigmoid((won / lost).log()) for won, lost in _pairs(odds)])


def _simpo(logps: list[Tensor], _: list[Tensor], beta: float, gamma: float) -> Tensor:
    return _mean([-_log_sigmoid(beta * won.mean() - beta * lost.mean() - gamma) for won, lost in _pairs(logps)])


def _cpo(logps: list[Tensor], _: list[Tensor], beta: float, alpha: float) -> Tensor:
    nll = -torch.cat(logps[: len(logps) // 2]).mean()
    return _mean([-_log_sigmoid(beta * (won.sum() - lost.sum())) for won, lost in _pairs(logps)]) + alpha * nll


def _clipped(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Return L^CLIP of a token without its sign: at most (1 + high)A for a good token, (1 − low)A for a bad one."""
    bound = (1 + high) * advantage if advantage > 0 else (1 - low) * advantage
    return torch.minimum(ratio * advantage, bound)


def _ppo(logps: list[Tensor], scored: list[Tensor], advantages: Tensor, old_logps: Tensor, epsilon: float) -> Tensor:
    gains = []
    for row, keep, advantage, old in zip(logps, scored, advantages, old_logps, strict=True):
        ratios = (row - old[keep]).exp()
        gains += [_clipped(r, a, epsilon, epsilon) for r, a in zip(ratios, advantage[keep], strict=True)]
    return -_mean(gains)


def _grpo(
    logps: list[Tensor],
    scored: list[Tensor],
    advantages: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor,
    beta: float,
    epsilon: tuple[float, float],
    per: Any,
    weigh_kl: bool = False,
) -> Tensor:
    sequences = []
    for row, keep, advantage, old, ref in zip(logps, scored, advantages, old_logps, ref_logps, strict=True):
        ratios = row.exp() / old[keep].exp()
        gains = torch.stack([_clipped(ratio, advantage, *epsilon) for ratio in ratios])
        ref_ratios = ref[keep].exp() / row.exp()
        kl = ref_ratios - ref_ratios.log() - 1
        sequences.append(gains - beta * (ratios * kl if weigh_kl else kl))
    if per is None:
        return -_mean([sequence.mean() for sequence in sequences])
    return -torch.cat(sequences).sum() / per


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "dpo": _dpo,
    "ipo": _ipo,
    "kto": _kto,
    "orpo": _orpo,
    "simpo": _simpo,
    "cpo": _cpo,
    "ppo": _ppo,
    "grpo": _grpo,
}
