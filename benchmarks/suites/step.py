"""One training step in the style of the original EXO repository, of plain full logits, of TRL, and ours.

    exo-fast bench step
    exo-fast bench step --only exo_fast/bf16/K4

The demo model (135M) trains on 8 sequences of 256 tokens from movie reviews: in groups of K = 2, 4 or 8 candidates,
with prompts of 205, 192, 128 or 51 tokens and the rest as completion, in

    fp32        float32 throughout
    fp32+bf16   float32 weights, matrix products in bf16 with float32 sums (torch.backends.mkldnn.matmul)
    bf16        bf16 weights and activations

The policy is the demo model with 1% of noise on its weights, so that log-ratios are not zero; the reference is the
demo model. A case gives the median time of its steps after a short batch that warms up (`step_styles` describes each
style), completion tokens a second, its peak memory above the memory with the models loaded (resident, or PyTorch's
count on a GPU), and the errors of the first step's loss and gradient against float64 of the same weights (`step_truth`,
on the CPU). TRL's styles run on the CPU only.

The gain of each part of ours is measured in two ways, because gains overlap: `LADDER` adds one part after another to
the original's step, and `WITHOUT` removes one part from ours.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exo_fast.benchmarks.harness import process_memory
from exo_fast.benchmarks.methods import problems
from exo_fast.training import machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from exo_fast.benchmarks.methods.step_styles import Gradient, Measured, Task

NAME = "step"
SEQUENCES, LENGTH = 8, 256
NOISE = 0.01
EXACT = 1e-10  # the relative error in float64 of a style that computes the same
TRL_STEPS = 1  # besides one that warms up
CENTRE = (4, 128)  # K, tokens of the prompt
GRID = ((2, 128), (2, 51), CENTRE, (8, 205), (8, 51))
LADDER = (  # (style, the part it adds to the style before)
    ("original", ""),
    ("full-logits", "no padding"),
    ("full-logits-cached", "cached reference"),
    ("exo_fast-unshared", "fused head"),
    ("exo_fast", "shared prompt"),
)
WITHOUT = {
    "shared prompt": "exo_fast-unshared",
    "fused head": "exo_fast-unfused",
    "cached reference": "exo_fast-reference",
}
# The comparisons, if both were measured: (the other, ours).
COMPARISONS = (
    ("original", "exo_fast"),
    ("original", "exo_fast-reference"),
    ("full-logits", "exo_fast"),
    ("full-logits", "exo_fast-reference"),
    ("full-logits-cached", "exo_fast"),
    ("trl", "exo_fast"),
    ("trl-plain", "exo_fast"),
    ("trl-plain", "exo_fast-reference"),
    ("trl-cached", "exo_fast"),
)


@dataclass(frozen=True)
class Case:
    """A style and its problem."""

    style: str
    precision: str
    candidates: int
    prompt: int
    completion: int

    def __str__(self) -> str:
        return f"step/{self.style}/{self.problem}"

    @property
    def problem(self) -> str:
        """Return the key that cases must share to be compared."""
        return f"{self.precision}/K{self.candidates}/{self.prompt}+{self.completion}"


def cases(quick: bool = False) -> list[Case]:
    """Return the cases, with cases of the same problem one after another, because they share the float64 run."""
    both = ("full-logits", "exo_fast")
    plan: list[tuple[str, int, int, tuple[str, ...]]] = []  # precision, K, prompt, styles
    corners = [(8, 205), (2, 51)]
    for candidates, prompt in corners if quick else GRID:
        styles = both
        if (candidates, prompt) == CENTRE:
            styles = (*dict.fromkeys([style for style, _ in LADDER] + list(WITHOUT.values())),)
        elif (candidates, prompt) in corners and not quick:
            styles = ("original", "full-logits", "full-logits-cached", "exo_fast", "exo_fast-reference")
        elif (candidates, prompt) == (2, 128):
            styles = (*both, "trl", "trl-plain", "trl-cached")
        plan.append(("bf16", candidates, prompt, styles))
    if not quick:
        plan.append(("fp32", 8, 205, ("original", *both)))
        plan.append(("fp32", 2, 192, (*both, "exo_fast-reference", "trl-plain")))
        plan.append(("fp32+bf16", *CENTRE, both))
    return [
        Case(style, precision, candidates, prompt, LENGTH - prompt)
        for precision, candidates, prompt, styles in plan
        for style in styles
    ]


def impossible(case: Case) -> str | None:
    """Return why a case cannot run: TRL's styles need TRL, and oneDNN's products a CPU."""
    if case.style.startswith("trl") and machine.version("trl") is None:
        return "TRL is not installed: pip install trl"
    if problems.device() == "cuda" and (case.style.startswith("trl") or case.precision == "fp32+bf16"):
        return "runs on a CPU only"
    return None


def baseline(case: Case) -> str:
    """Return the yardstick: full logits without padding, with the reference in the step."""
    return f"step/full-logits/{case.problem}"


def prepare() -> None:
    """Fetch the demo model and its reviews, once: their progress belongs on the terminal."""
    from exo_fast.training import downloads

    downloads.get_model(downloads.cache_dir())
    downloads.get_reviews(downloads.cache_dir())


# One case


def measure(case: Case, workdir: Path) -> dict:
    """Run one case in this process."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from exo_fast.benchmarks.methods import step_styles
    from exo_fast.precision import matmul_precision
    from exo_fast.training import downloads

    logging.disable_progress_bar()
    path = downloads.get_model(downloads.cache_dir(), _quiet)
    tokenizer = AutoTokenizer.from_pretrained(path)
    task = make_task(read_tokens(tokenizer, workdir), case)
    policy, reference = (load_model(path, case.precision) for _ in range(2))
    with matmul_precision("bf16" if case.precision == "fp32+bf16" else "ieee"):
        if case.style in step_styles.TRL_STYLES:
            measured, peak = _run_trl(case, policy, reference, tokenizer, task)
        else:
            measured, peak = _run(case, policy, reference, task)
    del policy, reference
    loss, gradient = read_truth(case, path, task, workdir)
    seconds = statistics.median(measured.seconds)
    return {
        "seconds": round(seconds, 4),
        "all_seconds": [round(value, 4) for value in measured.seconds],
        "tokens_per_second": round(task.completion_tokens / seconds, 1),
        "peak_mb": round(peak, 1),
        "loss": measured.loss,
        "gradient_norm": measured.gradient.norm,
        "errors": {"loss": abs(measured.loss - loss) / abs(loss), "gradient": measured.gradient.error(gradient)},
    }


def trial(case: Case, workdir: Path) -> tuple[Callable[[], object], dict]:
    """Make the contract's trial of a style that is not TRL's.

    In float64 the style must give the same loss and gradient as one sequence a row with full logits.
    """
    from transformers import AutoTokenizer

    from exo_fast.benchmarks.methods import step_styles, step_truth
    from exo_fast.training import downloads

    path, style = downloads.get_model(downloads.cache_dir(), _quiet), step_styles.STYLES[case.style]
    task = make_task(read_tokens(AutoTokenizer.from_pretrained(path), workdir), case)
    loss, gradient = read_truth(case, path, task, workdir)
    policy, reference = (load_model(path, case.precision) for _ in range(2))
    add_noise(policy)
    doubles = [copy.deepcopy(model).double() for model in (policy, reference)]
    with step_truth.true_float64():
        exact = step_styles.run(style(*doubles, task), doubles[0], steps=1)
    del doubles
    errors = {"loss": abs(exact.loss - loss) / abs(loss), "gradient": exact.gradient.error(gradient)}
    assert max(errors.values()) < EXACT, f"{case.style} computes something else: {errors}"
    policy, reference = policy.to(problems.device()), reference.to(problems.device())
    forward = style(policy, reference, task)
    step_styles.run(forward, policy, steps=1)
    return lambda: step_styles.run(forward, policy, steps=1), {"errors": errors, "tokens": task.completion_tokens}


def _run(case: Case, policy: PreTrainedModel, reference: PreTrainedModel, task: Task) -> tuple[Measured, float]:
    """Run the style; return its results and its peak above the loaded models in MB."""
    from exo_fast.benchmarks.methods import step_styles

    add_noise(policy)
    policy, reference = policy.to(problems.device()), reference.to(problems.device())
    # The original pads a short batch to the same length as a long one.
    warm_up = step_styles.STYLES["full-logits" if case.style == "original" else case.style]
    warm_up(policy, reference, task.shortened())().backward()
    policy.zero_grad(set_to_none=True)
    forward = step_styles.STYLES[case.style](policy, reference, task)
    if case.style not in step_styles.WITH_REFERENCE:
        reference.to("meta")
    peak = problems.Peak()
    measured = step_styles.run(forward, policy)
    return measured, peak.mb()


def _run_trl(
    case: Case,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
) -> tuple[Measured, float]:
    from exo_fast.benchmarks.methods import step_styles

    loaded = []

    def before_training() -> None:
        # Only now, because TRL computes its log-probs beforehand with the model it was given.
        add_noise(policy)
        loaded.append(process_memory.resident_mb())
        process_memory.reset_peak()

    if case.style not in step_styles.WITH_REFERENCE:
        reference = None
    with tempfile.TemporaryDirectory() as folder:
        measured = step_styles.run_trl(
            case.style, policy, reference, tokenizer, task, TRL_STEPS, Path(folder), before_training=before_training
        )
    return measured, process_memory.peak_mb() - loaded[0]


def _quiet(_: str) -> None:
    """Replace print: `prepare` has already printed the message."""


# The inputs of a case


def load_model(path: Path, precision: str) -> PreTrainedModel:
    """Load the demo model with weights in the dtype of `precision`."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def add_noise(model: PreTrainedModel, relative: float = NOISE) -> None:
    """Change each weight matrix by seeded Gaussian noise of `relative` times its root mean square."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator) * relative
                parameter.add_((noise * parameter.float().square().mean().sqrt()).to(parameter.dtype))


def read_tokens(tokenizer: PreTrainedTokenizerBase, workdir: Path) -> list[int]:
    """Read reviews laid end to end, as many tokens as the longest problem needs; kept in `workdir`."""
    from exo_fast.training import downloads

    path = workdir / "step-tokens.json"
    if path.exists():
        return json.loads(path.read_text())
    tokens: list[int] = []
    for snippet in downloads.get_reviews(downloads.cache_dir(), _quiet):
        tokens += tokenizer(snippet.text + "\n")["input_ids"]
        if len(tokens) >= SEQUENCES * LENGTH:
            break
    with _whole(path) as unfinished:
        unfinished.write_text(json.dumps(tokens))
    return tokens


def make_task(tokens: list[int], case: Case) -> Task:
    """Make groups of real tokens, cut from `tokens` one after another: first all prompts, then all completions."""
    import torch

    from exo_fast.benchmarks.methods.step_styles import Task
    from exo_fast.layout import Group

    groups = SEQUENCES // case.candidates
    lengths = [case.prompt] * groups + [case.completion] * SEQUENCES
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    pieces = [tokens[end - length : end] for length, end in zip(lengths, ends, strict=True)]
    prompts, completions = pieces[:groups], pieces[groups:]
    k = case.candidates
    return Task(
        [Group(prompts[g], completions[g * k : (g + 1) * k]) for g in range(groups)],
        torch.arange(SEQUENCES).view(groups, k).flip(1).float(),
    )


def read_truth(case: Case, path: Path, task: Task, workdir: Path) -> tuple[float, Gradient]:
    """Return loss and gradient in float64 for all cases with this problem's tokens and weights; kept in `workdir`."""
    import torch

    from exo_fast.benchmarks.methods import step_truth
    from exo_fast.benchmarks.methods.step_styles import Gradient

    weights = "bf16" if case.precision == "bf16" else "fp32"
    kept = workdir / f"step-truth-{weights}-K{case.candidates}-{case.prompt}+{case.completion}.pt"
    if not kept.exists():
        policy, reference = (load_model(path, case.precision) for _ in range(2))
        add_noise(policy)
        loss, gradient = step_truth.truth(policy.double(), reference.double(), task)
        with _whole(kept) as unfinished:
            torch.save({"loss": loss, **vars(gradient)}, unfinished)
    found = torch.load(kept)
    return found.pop("loss"), Gradient(**found)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Give a path to write to and rename it to `path` at the end, so that a stopped run leaves no half-written file."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    yield unfinished
    unfinished.replace(path)


# Results derived from the rows


def summary(rows: list[dict]) -> dict:
    """Return the ratios of time and memory, and the gain of each part of ours at the centre of the grid."""
    measured = [row for row in rows if "seconds" in row]
    return {"ratios": ratios(measured), "ladder": ladder(measured), "without": without(measured)}


def ratios(rows: list[dict]) -> list[dict]:
    """Return {other, ours, problem, time, memory}, other over ours, for each of COMPARISONS and each problem with
    both."""
    at = _by_problem(rows)
    return [
        {
            "other": other,
            "ours": ours,
            "problem": problem,
            "time": round(found[other]["seconds"] / found[ours]["seconds"], 3),
            "memory": round(found[other]["peak_mb"] / found[ours]["peak_mb"], 3),
        }
        for other, ours in COMPARISONS
        for problem, found in at.items()
        if other in found and ours in found
    ]


def ladder(rows: list[dict]) -> list[dict]:
    """Return {style, part, seconds, peak_mb, gain} from the original's step to ours. The gain is seconds before over
    after."""
    found = _by_problem(rows).get(_centre(), {})
    rungs = [(found[style], part) for style, part in LADDER if style in found]
    if len(rungs) < len(LADDER):
        return []
    before = [rungs[0][0], *(row for row, _ in rungs)]
    return [
        {
            "style": row["style"],
            "part": part,
            "seconds": row["seconds"],
            "peak_mb": row["peak_mb"],
            "gain": round(last["seconds"] / row["seconds"], 3),
        }
        for (row, part), last in zip(rungs, before, strict=False)
    ]


def without(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Return {part: {"time": …, "memory": …}}: our step without the part over our step."""
    found = _by_problem(rows).get(_centre(), {})
    return {
        part: {
            "time": round(found[style]["seconds"] / found["exo_fast"]["seconds"], 3),
            "memory": round(found[style]["peak_mb"] / found["exo_fast"]["peak_mb"], 3),
        }
        for part, style in WITHOUT.items()
        if style in found and "exo_fast" in found
    }


def _centre() -> str:
    candidates, prompt = CENTRE
    return Case("", "bf16", candidates, prompt, LENGTH - prompt).problem


def _by_problem(rows: list[dict]) -> dict[str, dict[str, dict]]:
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        case = Case(**{field: row[field] for field in Case.__dataclass_fields__})
        found.setdefault(case.problem, {})[case.style] = row
    return found
