"""The step that trains: the module that `exo-fast align` trains, in bf16, on a small Llama of random weights.

It needs transformers and not the stage's other packages (accelerate, datasets), so that it runs where only the loss is
used. Each batch has other lengths, as real ones have: FlexAttention that compiled a program for each would show here.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import random
import statistics
import time
from typing import Any

import torch

from exo_fast.benchmarks.gpu.plan import Cases, Run, Unavailable
from exo_fast.benchmarks.methods import problems

OURS, FULL = "exo_fast", "full-logits-cached"
GROUPS, CANDIDATES = 4, 4
LEARNING_RATE = 1e-5
SHORT = 8  # tokens: the first row of the search for the longest
SEARCH_SHARE = 0.15  # of the step's time, for each search


def align(run: Run) -> Cases:
    """Ten steps under SDPA and under FlexAttention, the same by full logits, and the longest row of each."""
    if importlib.util.find_spec("transformers") is None:
        raise Unavailable("transformers is not installed: pip install transformers")
    try:
        from exo_fast.benchmarks.methods import step_styles  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"the installed transformers does not have what training needs: {error}") from error
    for style, attention in ((OURS, "sdpa"), (OURS, "flex_attention"), (FULL, "sdpa")):
        yield f"{style}, {attention}", functools.partial(train, run, style, attention)
    for style, attention in ((OURS, "sdpa"), (FULL, "sdpa"), (OURS, "flex_attention")):
        yield f"longest, {style}, {attention}", functools.partial(longest, run, style, attention)


def models(run: Run, attention: str) -> tuple[Any, Any]:
    """Return a Llama of random weights, the same every time, and its copy, the reference."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**run.plan.model, tie_word_embeddings=False, attn_implementation=attention)
    policy = LlamaForCausalLM(config).to(run.plan.device, torch.bfloat16)
    return policy, copy.deepcopy(policy).requires_grad_(False)


def batch(run: Run, seed: int, groups: int, candidates: int, prompt: int, completion: int) -> Any:
    """Return a task of random tokens, whose best candidate is the first."""
    from exo_fast.benchmarks.methods.step_styles import Task
    from exo_fast.layout import Group

    draw = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(run.plan.model["vocab_size"]) for _ in range(count)]

    made = [Group(tokens(prompt), [tokens(completion) for _ in range(candidates)]) for _ in range(groups)]
    return Task(made, torch.arange(candidates, 0, -1).float().repeat(groups, 1))


def train(run: Run, style: str, attention: str) -> dict:
    """Return losses, times, tokens a second, the peak above the models and the programs compiled in each step."""
    from exo_fast.benchmarks.methods import step_styles

    policy, reference = models(run, attention)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE)
    draw, losses, seconds, compiled, counted = random.Random(0), [], [], [], 0
    peak = problems.Peak()
    for index in range(run.plan.steps):
        lengths = [draw.randint(run.plan.prompt // 3, run.plan.prompt) for _ in range(2)]
        task = batch(run, index, GROUPS, CANDIDATES, *lengths)
        graphs = programs()
        forward = step_styles.STYLES[style](policy, reference, task)
        problems.synchronize()
        begun = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(has_backward(run, attention)):
            loss = forward()
        if loss.requires_grad:
            loss.backward()
            optimizer.step()
        problems.synchronize()
        seconds.append(time.perf_counter() - begun)
        losses.append(loss.item())
        compiled.append(programs() - graphs)
        counted += task.completion_tokens if index else 0
    later = seconds[1:] or seconds
    return {
        "losses": losses, "seconds": statistics.median(later), "all_seconds": seconds, "peak_mb": round(peak.mb(), 1),
        "tokens_per_second": round(counted / sum(later), 1), "compiled": compiled,
        "wrong": not all(loss == loss and abs(loss) < float("inf") for loss in losses),
    }  # fmt: skip


def has_backward(run: Run, attention: str) -> bool:
    """Check whether gradients can be had: FlexAttention has no backward pass on a CPU, where a dry run is."""
    return run.plan.device != "cpu" or attention != "flex_attention"


def programs() -> int:
    """Return how many programs torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def longest(run: Run, style: str, attention: str) -> dict:
    """Double a pair's completions until a step does not fit, or the time is up; return the most tokens that fit in a
    row of prompt and both completions."""
    from exo_fast.benchmarks.methods import step_styles

    until = time.monotonic() + SEARCH_SHARE * run.seconds
    policy, reference = models(run, attention)
    found: dict[str, Any] = {"row_tokens": 0, "ended_by": "the largest that is tried"}
    length = SHORT if run.dry else 128 * SHORT
    while length <= run.plan.longest:
        policy.zero_grad(set_to_none=True)
        peak = problems.Peak()
        try:
            with torch.set_grad_enabled(has_backward(run, attention)):
                loss = step_styles.STYLES[style](policy, reference, batch(run, 0, 1, 2, SHORT, length))()
            if loss.requires_grad:
                loss.backward()
            problems.synchronize()
        except torch.OutOfMemoryError as error:
            found |= {"ended_by": "memory", "words": str(error).splitlines()[0][:200]}
            break
        found |= {"row_tokens": SHORT + 2 * length, "peak_mb": round(peak.mb(), 1)}
        if time.monotonic() > until:
            found["ended_by"] = "time"
            break
        length *= 2
    return found
