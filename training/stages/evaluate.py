"""`exo-fast evaluate`: measure the gain of policies over the SFT model, and their distance from it.

The SFT model and every checkpoint of every policy complete the same held-out prompts from the same random numbers.
Each completion gets a reward (from the scorer), a log-prob under the model that wrote it and one under the SFT model.
The difference of the two is the log-ratio; its mean is KL(policy‖SFT). `frontier.py` compares them.

The stages `generate`, `logprobs` and `score` do the work, each in its own directory below output_dir. So an
evaluation that was killed continues, and adding a policy keeps the finished work. The SFT model and the scorer read
the completions of all models in one go, so each is loaded once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from exo_fast.training import machine, processes
from exo_fast.training.data.writing import to_json
from exo_fast.training.errors import InputError
from exo_fast.training.files import user_path, write_file
from exo_fast.training.inference.config import InferenceConfig
from exo_fast.training.inference.scorers import ScorerConfig
from exo_fast.training.models.digests import json_digest
from exo_fast.training.options import check_model_name, option, temperature_problem
from exo_fast.training.stages.generate import GenerateConfig, generate
from exo_fast.training.stages.logprobs import LogprobsConfig, logprobs
from exo_fast.training.stages.score import ScoreConfig, score

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
REFERENCE_LABEL = "SFT"
WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, ADAPTER_SAFE_WEIGHTS_NAME)
VERSIONS = ("exo_fast", "torch", "transformers")


@dataclass
class EvaluateConfig(ScorerConfig):
    """The fields of `exo-fast evaluate`: policies, the model to compare them with, and the scorer."""

    policies: list[str] | None = field(
        default=None,
        metadata={
            "help": "LABEL=DIRECTORY for each run: its checkpoints and its final model are evaluated. Runs with one "
            "label are seeds of the same thing."
        },
    )
    reference: str | None = option(None, "The SFT model, from which the policies started.")
    checkpoints: int = option(-1, "Evaluate so many models of each run, evenly spaced up to the last; -1: all.")
    split: Literal["train", "test"] = option("test", "The split whose prompts are used.")
    return_num: int = option(4, "Completions of each prompt.")
    temperature: float = option(1.0, "Sampling temperature; the log-probs are those at this temperature.")
    max_new_tokens: int = option(256, "Longest completion, in tokens with EOS.")
    max_seq_len: int = option(
        512,
        "Longest prompt plus completion, in tokens: prompts are cut on the left to max_seq_len - max_new_tokens; the "
        "reward model or classifier reads so much too.",
    )
    seed: int = option(0, "Of the random streams of sampling, and of the bootstrap.")

    field_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "models": ("policies", "reference", "checkpoints", *InferenceConfig.model_fields),
        "data": InferenceConfig.data_fields,
        "sampling": ("return_num", "temperature", "max_new_tokens", "max_seq_len", "seed"),
        "reward (one of three)": ScorerConfig.scorer_fields,
        "speed and memory": InferenceConfig.speed_fields,
    }
    description: ClassVar[str] = """\
Evaluate policies against the SFT model they started from: mean reward, win rate and KL(policy‖SFT) on held-out
prompts, for every checkpoint, with intervals; EXO against DPO at equal KL where both are there.

Writes report.md, frontier.png and results.json. The same command continues after an interruption."""
    examples: ClassVar[str] = """\
examples:
  exo-fast evaluate --policies exo-rw=runs/exo-rw --reference models/sft --data data/sft --reward_model models/rm \
--output_dir runs/evaluation
  exo-fast evaluate --policies exo-rw=runs/e0 exo-rw=runs/e1 dpo-rw=runs/d0 dpo-rw=runs/d1 --reference models/sft \
--data data/sft --prompt_num 512 --temperature 0.8 --reward_model models/rm --output_dir runs/evaluation
  exo-fast evaluate --config evaluate.yaml --function my_rewards:score
"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._need(bool(self.policies), "policies", "name the runs to evaluate, as LABEL=DIRECTORY.")
        for policy in self.policies:
            label, equals, path = policy.partition("=")
            if not equals or LABEL.fullmatch(label) is None or not path or label == REFERENCE_LABEL:
                raise InputError(
                    f"policies: {policy!r}: LABEL=DIRECTORY is needed, with a label of letters, digits and . _ + - "
                    f"that is not {REFERENCE_LABEL}."
                )
            if not user_path(path, "policies").is_dir():
                raise InputError(f"policies: {policy!r}: no such directory.")
        check_model_name(self, "reference")
        self._need(self.checkpoints == -1 or self.checkpoints >= 1, "checkpoints", "-1 (all) or at least 1 is needed.")
        self._need(self.return_num >= 1, "return_num", "at least 1 is needed.")
        problem = temperature_problem(self.temperature)
        self._need(problem is None, "temperature", f"{problem}: KL is between distributions.")
        self._need(
            self.max_seq_len > self.max_new_tokens >= 1,
            "max_seq_len",
            f"must be larger than max_new_tokens={self.max_new_tokens}, which must be at least 1.",
        )


@dataclass(frozen=True)
class Model:
    """A model to evaluate: one checkpoint of one run of a label, or the SFT model."""

    label: str
    seed: int  # number of the run among its label's runs
    step: int | None
    path: str
    place: Path  # below output_dir

    @property
    def title(self) -> str:
        """Return the model's name for people."""
        return self.label if self.label == REFERENCE_LABEL else f"{self.label}, run {self.seed}, step {self.step}"


def find_models(config: EvaluateConfig) -> list[Model]:
    """Find the SFT model and then, run by run, the checkpoints of each policy, its final model last.

    If the final model equals the last checkpoint, it is evaluated once. Raises InputError for a directory without
    models, and for a directory that is named twice.
    """
    models = [Model(REFERENCE_LABEL, 0, 0, config.reference, Path("models", REFERENCE_LABEL))]
    runs: dict[str, int] = {}
    seen: set[Path] = set()
    for policy in config.policies:
        label, _, name = policy.partition("=")
        folder = Path(name).expanduser()
        if folder.resolve() in seen:
            raise InputError(f"policies: {policy!r}: this directory is named twice.")
        seen.add(folder.resolve())
        seed = runs.setdefault(label, 0)
        runs[label] += 1
        found = _checkpoints(folder)
        if not found:
            raise InputError(
                f"policies: {policy!r}: neither the directory nor checkpoint-N in it holds a model (one of "
                f"{', '.join(WEIGHTS)})."
            )
        if 0 < config.checkpoints < len(found):
            places = np.linspace(len(found), 0, config.checkpoints, endpoint=False).round().astype(int) - 1
            found = [found[place] for place in sorted(set(places))]
        # Named after the run's path: the order of `policies` may change.
        run = f"{folder.resolve().name}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:6]}"
        for step, path in found:
            models.append(Model(label, seed, step, str(path), Path("models", label, run, _name_of(path, folder))))
    return models


def _checkpoints(folder: Path) -> list[tuple[int | None, Path]]:
    """Return (step, directory) of every model of a run, in order of training."""
    numbered = [
        (int(path.name.rpartition("-")[2]), path)
        for path in folder.glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdigit() and _has_weights(path)
    ]
    found: list[tuple[int | None, Path]] = sorted(numbered)
    if _has_weights(folder):
        step = _final_step(folder)
        found = [entry for entry in found if entry[0] != step]
        found.append((step, folder))
    return found


def _final_step(folder: Path) -> int | None:
    """Return the number of steps of the final model; None if the run does not record it."""
    state = folder / "trainer_state.json"
    if state.is_file() and _kept_the_best(folder):
        return json.loads(state.read_text(encoding="utf-8")).get("best_global_step")
    for name, key in (("summary.json", "steps"), ("trainer_state.json", "global_step")):
        if (folder / name).is_file():
            step = json.loads((folder / name).read_text(encoding="utf-8")).get(key)
            if step is not None:
                return int(step)
    return None


def _kept_the_best(folder: Path) -> bool:
    summary = folder / "summary.json"
    config = json.loads(summary.read_text(encoding="utf-8")).get("config", {}) if summary.is_file() else {}
    return bool(config.get("load_best_model_at_end"))


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in WEIGHTS)


def _name_of(path: Path, folder: Path) -> str:
    return "final" if path == folder else path.name


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate the policies of `config`; return the content of output_dir/results.json.

    Writes report.md, frontier.png and results.json, and their source data to models/ and together/. Raises InputError
    for settings, data or models that cannot work.
    """
    for module in ("matplotlib", "scipy"):
        if importlib.util.find_spec(module) is None:
            raise InputError(f"the report needs {module}: pip install 'exo_fast[demo]'.")
    models = find_models(config)
    output = Path(config.output_dir).expanduser()
    processes.start(on_cpu=config.use_cpu)
    clock = _Clock()
    rows: list[list[dict[str, Any]]] = []
    for number, model in enumerate(models, 1):
        if processes.index() == 0:
            print(f"[{number}/{len(models)}] {model.title}", flush=True)
        place = output / model.place
        with clock.time("sampling"):
            generate(_generate_config(config, model.path, place / "samples"))
        if model.label == REFERENCE_LABEL:
            rows.append(_read(place / "samples" / f"{config.split}.json"))
            if len(rows[0]) < 2:
                raise InputError(
                    f"data={config.data!r}: 1 prompt; intervals are over prompts, so 2 or more are needed."
                )
            continue
        with clock.time("log-probs under each policy"):
            logprobs(_logprobs_config(config, model.path, place / "samples", place / "logprobs"))
        rows.append(_read(place / "logprobs" / f"{config.split}.json"))

    together = [{key: row[key] for key in ("prompt", "completions", "completion_ids")} for part in rows for row in part]
    place = output / "together" / json_digest(together)[:12]
    if processes.index() == 0:
        write_file(place / "samples", f"{config.split}.json", to_json(together))
    processes.wait()
    if processes.index() == 0:
        print(f"the completions of all {len(models)} models, for the SFT model and the scorer", flush=True)
    with clock.time("log-probs under the SFT model"):
        logprobs(_logprobs_config(config, config.reference, place / "samples", place / "logprobs"))
    with clock.time("scoring"):
        score(_score_config(config, place / "samples", place / "scores"))
    results: dict[str, Any] = {}
    if processes.index() == 0:
        reference_logps = _read(place / "logprobs" / f"{config.split}.json")
        scored = _read(place / "scores" / f"{config.split}.json")
        results = _write_results(config, models, rows, reference_logps, scored, clock)
    processes.wait()
    return results


def _write_results(
    config: EvaluateConfig,
    models: list[Model],
    rows: list[list[dict[str, Any]]],
    reference_logps: list[dict[str, Any]],
    scored: list[dict[str, Any]],
    clock: _Clock,
) -> dict[str, Any]:
    # Imported here because they need matplotlib and scipy; a message asks for these if they are missing.
    from exo_fast.training.reports.evaluation import write_report
    from exo_fast.training.reports.frontier import Measurement

    measurements, completions, start = [], [], 0
    for model, part in zip(models, rows, strict=True):
        stop = start + len(part)
        rewards = _array(scored[start:stop], "rewards")
        log_ratios = np.zeros_like(rewards)
        if model.label != REFERENCE_LABEL:
            log_ratios = _array(part, "logprobs") - _array(reference_logps[start:stop], "logprobs")
        measurements.append(Measurement(model.label, model.seed, model.step, rewards, log_ratios, model.path))
        completions.append([row["completions"] for row in part])
        start = stop
    versions = {name: machine.version(name) for name in VERSIONS} | {"python": platform.python_version()}
    results = write_report(
        measurements[1:],
        measurements[0],
        Path(config.output_dir).expanduser(),
        prompts=[row["prompt"] for row in rows[0]],
        completions=completions,
        settings={name: getattr(config, name) for names in config.field_groups.values() for name in names},
        versions=versions,
        seconds=clock.seconds,
        seed=config.seed,
    )
    print(f"\n{results['finding']}\nthe report is {Path(config.output_dir, 'report.md')}", flush=True)
    return results


def _shared(config: EvaluateConfig) -> dict[str, Any]:
    names = (*InferenceConfig.model_fields, *InferenceConfig.speed_fields, "split")
    return {name: getattr(config, name) for name in names}


def _generate_config(config: EvaluateConfig, model: str, output_dir: Path) -> GenerateConfig:
    names = ("data", "prompt_num", "return_num", "temperature", "max_new_tokens", "max_seq_len", "seed")
    options = {name: getattr(config, name) for name in names}
    return GenerateConfig(model_name_or_path=model, output_dir=str(output_dir), **options, **_shared(config))


def _logprobs_config(config: EvaluateConfig, model: str, data: Path, output_dir: Path) -> LogprobsConfig:
    return LogprobsConfig(
        model_name_or_path=model,
        data=str(data),
        output_dir=str(output_dir),
        temperature=config.temperature,
        max_seq_len=config.max_seq_len,
        max_gen_len=config.max_new_tokens,
        **_shared(config),
    )


def _score_config(config: EvaluateConfig, data: Path, output_dir: Path) -> ScoreConfig:
    return ScoreConfig(
        **{name: getattr(config, name) for name in ScorerConfig.scorer_fields},
        max_seq_len=config.max_seq_len,
        mode="label",
        data=str(data),
        output_dir=str(output_dir),
        **_shared(config),
    )


def _read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))


def _array(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=np.float64)  # (P, S)


class _Clock:
    """A clock of the seconds for each kind of work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - begun, 3)
