"""An ordinary DPO script of TRL, the same after `patch_trl()`, and with `ExoDPOTrainer` in place of its trainer.

    python -m exo_fast.benchmarks.trl.drop_in
    python -m exo_fast.benchmarks.trl.drop_in --markdown docs/trl.md     also rewrite the table of that page

The demo's 135M model on pairs of real text, K = 2 with a prompt of 192 tokens and completions of 64 (EOS among them),
four pairs a step, ten steps of DPO (`sigmoid`, beta 0.1) by AdamW in float32, with TRL's defaults otherwise: so with
activation checkpointing, and with the reference in the step, unless a case says otherwise. A case is a process of its
own. It notes the loss of every step; the seconds of a step, from the trainer's step-begin to its step-end (the median
without the first, which warms up and checks shared prompts); the seconds of the whole `train()` and the work before it
(log-probs of the reference, if they are precomputed); and the peak of its resident memory, in all and above the memory
with the policy and the reference loaded (also if the reference is freed later).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exo_fast.benchmarks.harness import process_memory, runner
from exo_fast.benchmarks.harness.tables import markdown, rewrite
from exo_fast.training import machine

PROMPT, COMPLETION = 192, 64
PAIRS, STEPS = 4, 10
LEARNING_RATE = 1e-5
CASES = {
    "TRL": "DPOTrainer, unmodified",
    "TRL, precomputed": "… with reference log-probs precomputed",
    "patched": "DPOTrainer after patch_trl()",
    "patched, no sharing": "… with share_prompts=False",
    "patched, precomputed": "… with reference log-probs precomputed",
    "ExoDPOTrainer": "ExoDPOTrainer, dpo-pref (precomputes the reference)",
    "ExoDPOTrainer, reference in the step": "… with the reference in the step",
}
HEADER = [
    "",
    "s a step",
    "TRL's / its",
    "train(), s",
    "peak, MB",
    "above the models, MB",
    "its / TRL's",
    "largest difference of a loss",
]
RESULTS = Path("benchmarks/results/trl_drop_in.json")


def make_pairs(tokenizer: Any, n: int) -> list[dict[str, str]]:
    """Make prompts and completions of exactly the fixed numbers of tokens, as texts cut from the demo's reviews."""
    from exo_fast.training import downloads

    reviews = downloads.get_reviews(downloads.cache_dir(), lambda *_, **__: None)
    ids = tokenizer("\n".join(review.text for review in reviews))["input_ids"]
    found, at = [], 0
    while len(found) < n:
        prompt, chosen, rejected = (ids[at + a : at + b] for a, b in ((0, 192), (192, 255), (400, 463)))
        texts = [tokenizer.decode(part) for part in (prompt, chosen, rejected)]
        lengths = [len(tokenizer(text)["input_ids"]) for text in (texts[0], texts[0] + texts[1], texts[0] + texts[2])]
        begins = all(tokenizer(texts[0] + text)["input_ids"][:PROMPT] == prompt for text in texts[1:])
        if lengths == [PROMPT, PROMPT + COMPLETION - 1, PROMPT + COMPLETION - 1] and begins:
            found.append(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
        at += 97
        if at + 463 > len(ids):
            raise ValueError(f"the reviews give {len(found)} pairs, not {n}: choose fewer --steps or --pairs")
    return found


def run(case: str, steps: int, pairs: int) -> dict[str, Any]:
    """Run one case in this process."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from transformers.utils import logging
    from trl import DPOConfig, DPOTrainer

    from exo_fast.training import downloads

    logging.disable_progress_bar()
    path = downloads.get_model(downloads.cache_dir(), lambda *_, **__: None)
    tokenizer = AutoTokenizer.from_pretrained(path)
    data = Dataset.from_list(make_pairs(tokenizer, steps * pairs))

    options: dict[str, Any] = {"loss_type": ["sigmoid"]}
    trainer_class, config_class = DPOTrainer, DPOConfig
    if case.startswith("patched"):
        from exo_fast.integrations.trl import patch_trl

        patch_trl(share_prompts="no sharing" not in case)
    if case.startswith("ExoDPOTrainer"):
        from exo_fast.integrations.trl import ExoDPOConfig, ExoDPOTrainer

        trainer_class, config_class, options = ExoDPOTrainer, ExoDPOConfig, {"loss_type": "dpo-pref"}
    if "precomputed" in case or "reference in the step" in case:
        options["precompute_ref_log_probs"] = "precomputed" in case

    seconds: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seconds.append(time.perf_counter() - self.begun)

    policy, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2))
    for model in (policy, reference):  # weights stay in the file until they are read
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    loaded = process_memory.resident_mb()
    process_memory.reset_peak()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = config_class(
            folder,
            per_device_train_batch_size=pairs,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        # With precomputed log-probs no trainer keeps a reference: the log-probs of the untrained policy are used.
        kept = None if arguments.precompute_ref_log_probs is not False else reference
        if kept is None:
            del reference
        trainer = trainer_class(
            policy, kept, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Watch()]
        )
        lengths = {len(row["prompt_ids"]) for row in trainer.train_dataset}
        assert lengths == {PROMPT}, lengths
        trainer.train()
    return {
        "case": case,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "seconds": statistics.median(seconds[1:]),
        "all_seconds": seconds,
        "train_seconds": time.perf_counter() - begun,
        "peak_mb": process_memory.peak_mb(),
        "above_mb": process_memory.peak_mb() - loaded,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Make the table of the results beside TRL's own."""
    base = next(row for row in rows if row["case"] == "TRL")
    lines = []
    for row in rows:
        apart = max(abs(a - b) for a, b in zip(row["losses"], base["losses"], strict=True))
        lines.append(
            [
                CASES[row["case"]],
                f"{row['seconds']:.1f}",
                f"{base['seconds'] / row['seconds']:.2f}",
                f"{row['train_seconds']:.0f}",
                f"{row['peak_mb']:,.0f}",
                f"{row['above_mb']:,.0f}",
                f"{row['above_mb'] / base['above_mb']:.2f}",
                "–" if row is base else f"{apart:.0e}",
            ]
        )
    return markdown(HEADER, lines)


def provenance(results: dict[str, Any]) -> str:
    """Return command, date, commit, machine and versions in one line."""
    versions = ", ".join(f"{name} {results['versions'][name]}" for name in ("torch", "transformers", "trl"))
    commit = [f"commit {results['commit']}"] if results["commit"] else []
    return " · ".join(
        [f"`{results['command']}`", results["date"][:10], *commit, runner.machine_line(results), versions]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="[%(default)s]")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="a step [%(default)s]")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--markdown", type=Path, metavar="PAGE", help="rewrite its table, between markers")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figures are kept [%(default)s]")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)  # run this case in this process
    options = parser.parse_args(argv)
    if options.one:
        print(json.dumps(run(options.one, options.steps, options.pairs)))
        return
    rows = []
    sizes = ["--steps", str(options.steps), "--pairs", str(options.pairs)]
    for case in options.only:
        words = [sys.executable, "-m", "exo_fast.benchmarks.trl.drop_in", "--one", case, *sizes]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{case}: {rows[-1]['seconds']:.1f} s a step, {rows[-1]['peak_mb']:,.0f} MB", flush=True)
    results = {**machine.describe(), "steps": options.steps, "pairs": options.pairs, "rows": rows}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(results, indent=1) + "\n")
    made = table(rows)
    print(made)
    if options.markdown:
        rewrite(options.markdown, "trl_drop_in", {"table": f"{made}\n\n{provenance(results)}"})


if __name__ == "__main__":
    main()
