"""One training step in the style of the original EXO repository, of plain full logits, of TRL, and ours.

    python -m exo_fast.benchmarks.step                          all cases, to benchmarks/results/step.json and a table
    python -m exo_fast.benchmarks.step --only exo_fast --steps 9
    python -m exo_fast.benchmarks.step --only original/bf16/K4 --output /tmp/step.json

The demo model (135M), 8 sequences of 192 prompt and 64 completion tokens from movie reviews, as 4 groups of K = 2 and
2 groups of K = 4, in

    fp32        float32 throughout
    fp32+bf16   float32 weights, matrix products in bf16 with float32 sums (torch.backends.mkldnn.matmul, CPU only)
    bf16        bf16 weights and activations

Each case runs in a process of its own, which reports the loss and gradient norm of the first step (untimed), the
median time of the others, and the peak of its resident memory above what it was with the models loaded. The policy is
the demo model with 1% of noise on its weights, so that log-ratios are not zero; the reference is the demo model.
`benchmarks/step_styles.py` says what each style does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from exo_fast.benchmarks import machine

SEQUENCES, PROMPT, COMPLETION = 8, 192, 64
NOISE = 0.01
PRECISIONS = ("fp32", "fp32+bf16", "bf16")
CANDIDATES = (2, 4)
OUTPUT = Path(__file__).parent / "results" / "step.json"
# Who is compared with whom: name of the ratio -> (slower style, ours, K).
COMPARISONS = {
    "original / exo_fast": ("original", "exo_fast", CANDIDATES),
    "original / exo_fast-reference": ("original", "exo_fast-reference", CANDIDATES),
    "full-logits / exo_fast": ("full-logits", "exo_fast", CANDIDATES),
    "full-logits-cached / exo_fast": ("full-logits-cached", "exo_fast", CANDIDATES),
    "full-logits / exo_fast-reference": ("full-logits", "exo_fast-reference", CANDIDATES),
    "trl / exo_fast": ("trl", "exo_fast", (2,)),
    "trl-plain / exo_fast": ("trl-plain", "exo_fast", (2,)),
    "trl-cached / exo_fast": ("trl-cached", "exo_fast", (2,)),
    "trl-plain / exo_fast-reference": ("trl-plain", "exo_fast-reference", (2,)),
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    style: str
    precision: str
    candidates: int

    def __str__(self) -> str:
        return f"{self.style}/{self.precision}/K{self.candidates}"


def all_cases() -> list[Case]:
    """Every case; TRL has none for K = 4, because its loss compares two."""
    from exo_fast.benchmarks.step_styles import STYLES, TRL_STYLES

    cases = [Case(s, p, k) for p in PRECISIONS for k in CANDIDATES for s in STYLES]
    return cases + [Case(s, p, 2) for p in PRECISIONS for s in TRL_STYLES]


def make_task(tokenizer, snippets: list[str], candidates: int):
    """Groups of PROMPT + COMPLETION real tokens: reviews laid end to end and cut. The same tokens for every K."""
    import torch

    from exo_fast.benchmarks.step_styles import Task
    from exo_fast.layout import Group

    groups = SEQUENCES // candidates
    needed = groups * PROMPT + SEQUENCES * COMPLETION
    tokens: list[int] = []
    for snippet in snippets:
        if len(tokens) >= needed:
            break
        tokens += tokenizer(snippet + "\n")["input_ids"]
    prompts = [tokens[i * PROMPT : (i + 1) * PROMPT] for i in range(groups)]
    rest = tokens[groups * PROMPT :]
    completions = [rest[i * COMPLETION : (i + 1) * COMPLETION] for i in range(SEQUENCES)]
    return Task(
        [Group(prompts[g], completions[g * candidates : (g + 1) * candidates]) for g in range(groups)],
        torch.arange(SEQUENCES).view(groups, candidates).flip(1).float(),
    )


def add_noise(model, relative: float = NOISE) -> None:
    """Change each weight matrix by seeded Gaussian noise of `relative` times its root mean square."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator) * relative
                parameter.add_((noise * parameter.float().square().mean().sqrt()).to(parameter.dtype))


def measure(case: Case, steps: int) -> dict:
    """Run one case in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from exo_fast.benchmarks import step_styles
    from exo_fast.training import assets

    logging.disable_progress_bar()
    cache = assets.cache_dir()
    path = assets.get_model(cache, _quiet)
    tokenizer = AutoTokenizer.from_pretrained(path)
    task = make_task(tokenizer, [s.text for s in assets.get_reviews(cache, _quiet)], case.candidates)
    if case.precision == "fp32+bf16":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    policy, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for _ in range(2))
    loaded = {}

    def models_are_loaded() -> None:
        loaded["mb"] = machine.resident_mb()
        machine.reset_peak()

    if case.style in step_styles.TRL_STYLES:
        if case.style in step_styles.WITHOUT_REFERENCE:
            reference = None

        def before_training() -> None:
            # Only now: the log-probs that TRL computes beforehand are those of the model it was given.
            add_noise(policy)
            models_are_loaded()

        with tempfile.TemporaryDirectory() as folder:
            measured = step_styles.run_trl(
                case.style,
                policy,
                reference,
                tokenizer,
                task,
                steps,
                Path(folder),
                before_training=before_training,
            )
    else:
        add_noise(policy)
        forward = step_styles.STYLES[case.style](policy, reference, task)
        if case.style in step_styles.WITHOUT_REFERENCE:
            del reference
        models_are_loaded()
        measured = step_styles.run(forward, policy, steps)
    return {
        **asdict(case),
        "loss": measured.loss,
        "grad_norm": measured.grad_norm,
        "seconds": round(statistics.median(measured.seconds), 4),
        "all_seconds": [round(value, 4) for value in measured.seconds],
        "peak_above_models_mb": round(machine.peak_mb() - loaded["mb"], 1),
        "peak_mb": round(machine.peak_mb(), 1),
    }


def _quiet(_: str) -> None:
    """In place of print: a worker's standard output is its result."""


def ratios(rows: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """{comparison: {"fp32/K2": {"time": …, "memory": …}}}, each the other's value over ours."""
    at = {(row["style"], row["precision"], row["candidates"]): row for row in rows}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, (other, ours, candidates) in COMPARISONS.items():
        for precision in PRECISIONS:
            for k in candidates:
                if (other, precision, k) in at and (ours, precision, k) in at:
                    a, b = at[other, precision, k], at[ours, precision, k]
                    found.setdefault(name, {})[f"{precision}/K{k}"] = {
                        "time": round(a["seconds"] / b["seconds"], 3),
                        "memory": round(a["peak_above_models_mb"] / b["peak_above_models_mb"], 3),
                    }
    return found


def agreement(rows: list[dict]) -> dict[str, dict[str, float]]:
    """{"fp32/K2": {"loss": …, "grad_norm": …}}: the largest relative difference between any two styles."""
    found = {}
    for precision in PRECISIONS:
        for k in CANDIDATES:
            same = [row for row in rows if (row["precision"], row["candidates"]) == (precision, k)]
            if len(same) > 1:
                values = {name: [row[name] for row in same] for name in ("loss", "grad_norm")}
                found[f"{precision}/K{k}"] = {name: (max(v) - min(v)) / max(map(abs, v)) for name, v in values.items()}
    return found


def table(rows: list[dict]) -> str:
    """The rows as aligned text."""
    head = f"{'style':<22}{'precision':<11}{'K':>2}{'s/step':>9}{'peak MB':>9}{'loss':>12}{'grad norm':>12}"
    lines = [head, "-" * len(head)]
    lines += [
        f"{r['style']:<22}{r['precision']:<11}{r['candidates']:>2}{r['seconds']:>9.3f}"
        f"{r['peak_above_models_mb']:>9.0f}{r['loss']:>12.6f}{r['grad_norm']:>12.5f}"
        for r in sorted(rows, key=lambda r: (PRECISIONS.index(r["precision"]), r["candidates"], -r["seconds"]))
    ]
    return "\n".join(lines)


def report(rows: list[dict]) -> str:
    """Table, ratios and agreement."""
    lines = [table(rows), "", f"{'other over ours':<36}{'case':<15}{'time':>7}{'memory':>9}"]
    for name, by_case in ratios(rows).items():
        for case, ratio in by_case.items():
            lines.append(f"{name:<36}{case:<15}{ratio['time']:>6.2f}×{ratio['memory']:>8.2f}×")
    lines += ["", "largest relative difference between styles"]
    for case, differences in agreement(rows).items():
        lines.append(f"{case:<15}loss {differences['loss']:.1e}   gradient norm {differences['grad_norm']:.1e}")
    return "\n".join(lines)


def run_apart(case: Case, steps: int) -> dict:
    """`measure` in a process of its own. Raises RuntimeError with its last words when it fails."""
    command = [sys.executable, "-m", "exo_fast.benchmarks.step", "--worker", json.dumps(asdict(case))]
    command += ["--steps", str(steps)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{case} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="cases whose name (style/precision/K…) begins so"
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each case [5]")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help=f"JSON to write; cases not run keep their rows [{OUTPUT.name}]"
    )
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: at least 1 is needed")
    if options.worker:
        print(json.dumps(measure(Case(**json.loads(options.worker)), options.steps)))
        return 0
    cases = [c for c in all_cases() if not options.only or any(str(c).startswith(text) for text in options.only)]
    if not cases:
        parser.error(f"--only {options.only}: no case begins so; --list shows them")
    if options.list:
        print("\n".join(map(str, cases)))
        return 0

    from tqdm import tqdm

    from exo_fast.training import assets

    assets.get_model(assets.cache_dir())
    rows = {str(case): None for case in all_cases()}
    if options.output.exists():
        rows.update(
            {
                str(Case(r["style"], r["precision"], r["candidates"])): r
                for r in json.loads(options.output.read_text())["rows"]
            }
        )
    with tqdm(cases, unit="case") as bar:
        for case in bar:
            bar.set_postfix_str(str(case))
            rows[str(case)] = run_apart(case, options.steps)
            done = [row for row in rows.values() if row]
            results = {
                **machine.describe(),
                "task": {"sequences": SEQUENCES, "prompt": PROMPT, "completion": COMPLETION, "policy_noise": NOISE},
                "ratios": ratios(done),
                "agreement": agreement(done),
                "rows": done,
            }
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(report(done))
    print(f"\nwritten to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
