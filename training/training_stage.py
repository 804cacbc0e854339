"""What the training stages have in common: `begin`, the loading of models, `training_scope`, and `train`.

A stage (align, sft, reward_model, classifier) reads from top to bottom as: begin, read data, load the tokenizer and the
model, build a module and a trainer, train. The same command given again finishes what was interrupted: the settings
that decide the result are kept in the output directory, so that continuing and mistaking are told apart.
"""

import datetime
import hashlib
import json
import math
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from exo_fast.data.examples import Example
from exo_fast.data.selection import LeftOut
from exo_fast.head import read_head
from exo_fast.training import checkpoints, html_report, locks, machine, model_card, processes, publish, run_facts
from exo_fast.training.assets import write_file
from exo_fast.training.config import CausalConfig, TrainConfig, _default
from exo_fast.training.data.groups import GroupDataset, tokenize
from exo_fast.training.data.records import Source, find_source
from exo_fast.training.deepspeed import pickle_plainly, start_on_cpu
from exo_fast.training.errors import InputError, RunError, Stopped, nearest
from exo_fast.training.loading import SCALAR_TASK, check_fits_model, from_pretrained, refuse_adapter
from exo_fast.training.precision import matmul_precision
from exo_fast.training.trainer import StageTrainer

logger = logging.get_logger(__name__)
VERSIONS = ("exo_fast", "torch", "transformers", "accelerate", "deepspeed", "peft", "datasets")
SETTINGS = "settings.json"
# Fields that say where, how fast or how loud a run is, and not what it gives.
INCIDENTAL = {"output_dir", "resume_from_checkpoint", "reference_cache_dir", "use_cpu", "local_rank", "report_to"}
INCIDENTAL |= {
    "disable_tqdm",
    "log_level",
    "log_level_replica",
    "logging_first_step",
    "deepspeed",
    "project",
    "run_name",
    "non_finite",
    "save_total_limit",
    "long_sequence",  # the fields it sets are settings themselves
    "tiled_mlp",
}
# In whose place the settings have their product, the global batch: how it is cut decides nothing.
CUT = {"per_device_train_batch_size", "gradient_accumulation_steps", "sequence_parallel"}
INCIDENTAL_PREFIXES = ("hub_", "push_to_hub", "dataloader_", "logging_", "trackio_")
DECISIVE = {"dataloader_drop_last"}  # for all that


# Starting, continuing, or having finished


def begin(config: TrainConfig) -> tuple[str | None, dict[str, Any] | None]:
    """Seed everything, and say what `config.output_dir` holds: (checkpoint to continue from, finished summary).

    Both None: start anew. Raises InputError, before any work, for a directory that another run's results are in.
    """
    set_seed(config.seed)
    output = Path(config.output_dir)
    locks.hold(output)
    if config.process_index == 0:
        publish.warn_of_logging_dir(config.report_to)
    checkpoint, summary = _found(config)
    if config.process_index == 0:
        if summary is not None:
            print(f"{config.output_dir}: this run is finished; nothing to do", flush=True)
        elif checkpoint is not None:
            print(f"continuing from {checkpoint}", flush=True)
        if config.push_to_hub and summary is None:
            publish.create_repository(config)
    processes.wait()  # before the first process writes what the others look for
    if summary is not None:
        finish(config, summary, anew=False)
        locks.release(output)
    elif config.process_index == 0:
        (output / "summary.json").unlink(missing_ok=True)
        write_file(output, SETTINGS, (json.dumps(settings_of(config), indent=1) + "\n").encode())
    return checkpoint, summary


def _found(config: TrainConfig) -> tuple[str | None, dict[str, Any] | None]:
    output = Path(config.output_dir)
    wish = (config.resume_from_checkpoint or "same").lower()
    if wish in ("auto", "true"):
        last = checkpoints.newest(output)
        if wish == "true" and last is None:
            raise InputError(
                f"resume_from_checkpoint={config.resume_from_checkpoint!r}: no checkpoint in output_dir="
                f"{config.output_dir!r} can be continued from; use auto to start anew where there is none."
            )
        return _as_text(last), None
    if wish not in ("same", "false"):
        _check_named(config.resume_from_checkpoint)
        return config.resume_from_checkpoint, None
    finished, there = (output / "summary.json").is_file(), checkpoints.numbered(output)
    if not finished and not there:
        return None, None
    if wish == "same" and (output / SETTINGS).is_file():
        now = settings_of(config)
        # What an earlier version had no field for is as it was then: at its default.
        unknown = {field.name: _default(field) for field in fields(config) if field.init and field.name in now}
        differences = _differences({**unknown, **json.loads((output / SETTINGS).read_text())}, now)
        if not differences:
            if finished:
                return None, json.loads((output / "summary.json").read_text())
            last = checkpoints.newest(output)
            if last is None and not config.save_only_model:  # such a run begins anew
                raise InputError(
                    f"output_dir={config.output_dir!r}: not one of its {len(there)} checkpoints can be continued from "
                    "(see the warnings); remove them to start anew, or choose another output_dir."
                )
            return _as_text(last), None
        problem = f"holds an earlier run with other settings ({differences})"
    else:
        problem = "holds an earlier run"
    advice = "choose another output_dir, or remove this one"
    if there:
        advice += "; or continue from its last checkpoint with these settings: --resume_from_checkpoint auto"
    raise InputError(f"output_dir={config.output_dir!r}: {problem}; {advice}.")


def _as_text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _check_named(checkpoint: str) -> None:
    """Raises InputError for a checkpoint that the user named and that cannot be continued from."""
    fix = "name a whole checkpoint-N directory, or use true or auto."
    if not Path(checkpoint).is_dir():
        raise InputError(f"resume_from_checkpoint={checkpoint!r}: no such directory; {fix}")
    try:
        facts = checkpoints.read(Path(checkpoint))
    except checkpoints.Damaged as error:
        raise InputError(f"resume_from_checkpoint={checkpoint!r}: {error}; {fix}") from error
    if not facts.resumable:
        raise InputError(f"resume_from_checkpoint={checkpoint!r}: it holds a model alone (save_only_model); {fix}")


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """The fields that decide a run's result, as JSON would give them back."""
    values = {
        name: value
        for name, value in config.to_dict().items()
        if name in DECISIVE or not (name in INCIDENTAL | CUT or name.startswith(INCIDENTAL_PREFIXES))
    }
    for name in ("data", "eval_data"):  # one file, by whatever path
        if values[name] is not None and Path(values[name]).expanduser().exists():
            values[name] = str(Path(values[name]).expanduser().resolve())
    if config.engine == "torch":
        values["zero_stage"] = None  # whose default follows the number of processes
    values["global batch"] = config.global_batch
    for name in ("data", "eval_data", *config.model_fields):
        values[f"files of {name}"] = _files_digest(values[name])
    return json.loads(json.dumps(values, default=str))


def _files_digest(path: str | None) -> str | None:
    """A hash over names, sizes and times of a file or of the files of a directory; None for what is not here.

    Not over their content, which for a model is read in minutes: it is to notice an input that was made anew.
    """
    if path is None or not (place := Path(path).expanduser()).exists():
        return None
    files = sorted(file for file in place.iterdir() if file.is_file()) if place.is_dir() else [place]
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    return ", ".join(f"{name}: {before.get(name)!r} then, {now.get(name)!r} now" for name in names[:5])


# Data


def find_splits(config: TrainConfig) -> dict[str, Source]:
    """The data to train on and, where there is any, to evaluate on: {"train": …, "eval": …}."""
    sources = {"train": find_source(config.data, "train")}
    if sources["train"] is None:
        raise InputError(f"data={config.data!r}: the directory holds no train.json, train.jsonl or train.parquet.")
    if config.eval_data is not None:
        held_out = find_source(config.eval_data, "eval") or find_source(config.eval_data, "train")
        if held_out is None:
            raise InputError(f"eval_data={config.eval_data!r}: the directory holds no test.json, .jsonl or .parquet.")
        sources["eval"] = held_out
    elif not Path(config.data).expanduser().is_file():
        held_out = find_source(config.data, "eval")
        if held_out is not None:
            sources["eval"] = held_out
    if "eval" not in sources:
        for name, value in (("load_best_model_at_end", True), ("save_strategy", "best")):
            if getattr(config, name) == value:
                raise InputError(f"{name}={value!r}: needs held-out data; set eval_data, or put test.json beside.")
        config.eval_strategy, config.do_eval, config.eval_on_start = IntervalStrategy.NO, False, False
    return sources


def table(rows: list[tuple[str, list[Any]]]) -> str:
    """Aligned lines: a name, and a cell for each split."""
    return "\n".join(
        f"{name:<32}" + "".join(f"{cell:>14,}" if isinstance(cell, int) else f"{cell:>14}" for cell in cells)
        for name, cells in rows
    )


def load_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model to train, which must be a whole one."""
    refuse_adapter(config.model_name_or_path)
    return from_pretrained(AutoTokenizer, config.model_name_or_path, trust_remote_code=config.trust_remote_code)


def tokenize_splits(
    config: CausalConfig,
    examples: dict[str, list[Example]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_contrastive: int | None,
    left_out: dict[str, LeftOut] | None = None,
    **judged: Any,
) -> dict[str, GroupDataset]:
    """The rows of each split as tokenised groups (`data.groups.tokenize`, which takes `judged`). Raises InputError
    where the model cannot take them."""
    datasets = {
        name: tokenize(
            rows,
            tokenizer,
            num_contrastive=num_contrastive,
            max_seq_len=config.max_seq_len,
            max_gen_len=config.max_gen_len,
            left_out=left_out[name] if left_out else None,
            **judged,
            description=f"tokenising ({name})",
            progress=config.process_index == 0 and not config.disable_tqdm,
        )
        for name, rows in examples.items()
    }
    check_batches(config, len(datasets["train"]))
    check_fits_model(
        config,
        config.model_name_or_path,
        longest=max(data.counts.longest_sequence for data in datasets.values()),
        largest_id=max(int(max(data.prompt_ids.max(), data.completion_ids.max())) for data in datasets.values()),
    )
    return datasets


def check_batches(config: TrainConfig, rows: int) -> None:
    """Raises InputError where dataloader_drop_last leaves none of the training data's rows."""
    if config.dataloader_drop_last and rows < config.global_batch:
        parts = (
            (config.per_device_train_batch_size, "per_device_train_batch_size"),
            (config.gradient_accumulation_steps, "gradient_accumulation_steps"),
            (config.data_parallel_size, "processes"),
        )
        product = " x ".join(f"{number} {name}" for number, name in parts if number > 1)
        raise InputError(
            f"dataloader_drop_last=True: {rows} rows make no whole batch of {config.global_batch} ({product}), so "
            "nothing would be trained on; leave dataloader_drop_last out, or make the batch smaller."
        )


# Models


def load_causal_lm(config: TrainConfig, name_or_path: str) -> nn.Module:
    """A causal LM in the dtype the engine trains, with a head that the fused losses can read."""
    model = from_pretrained(AutoModelForCausalLM, name_or_path, **model_options(config))
    try:
        read_head(model)
    except ValueError as error:
        raise InputError(f"{name_or_path}: {error}") from error
    if config.disable_dropout:
        switch_off_dropout(model)
    return model


def model_options(config: TrainConfig) -> dict[str, Any]:
    """Options of from_pretrained. DeepSpeed keeps float32 copies of bf16 weights; autocast does not."""
    attention = {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}
    bf16 = config.bf16 and config.engine == "deepspeed"
    dtype = torch.bfloat16 if bf16 else torch.float32
    return {"dtype": dtype, "trust_remote_code": config.trust_remote_code, **attention}


def switch_off_dropout(model: nn.Module) -> None:
    """Dropout layers, and the rates that attention modules hand to a function; the model's config stays as it is."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def check_lora(config: TrainConfig, task_type: str) -> None:
    """Raises InputError where `add_lora` would fail, or would not do what `config` says; reads no weights."""
    if config.lora_r == 0:
        return
    shape = from_pretrained(AutoConfig, config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    options = {"trust_remote_code": config.trust_remote_code}
    kind = AutoModelForCausalLM
    if task_type == SCALAR_TASK:
        kind, shape.num_labels = AutoModelForSequenceClassification, 1
    try:
        with torch.device("meta"):
            model = kind.from_config(shape, **options)
    except Exception:  # what is wrong with it is said where it is loaded
        return
    names = [name for name, _ in model.named_modules()]
    for target in [] if adapts_all_linear(config) else config.lora_target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            last = {name.rpartition(".")[2] for name in names} - {""}
            raise InputError(
                f"lora_target_modules={config.lora_target_modules!r}: no module of {config.model_name_or_path!r} is "
                f"called {target!r} (names are taken as they are, not as patterns)"
                f"{nearest(target, sorted(name for name in last if not name.isdigit()))}"
            )
    with torch.random.fork_rng(devices=[]):  # so that the adapters that are trained start as without this
        adapted = add_lora(config, model, task_type)
    head = adapted.get_base_model().get_output_embeddings()
    if task_type != SCALAR_TASK and hasattr(head, "base_layer"):
        raise InputError(
            f"lora_target_modules={config.lora_target_modules!r}: one of them is the head, whose weight the fused loss "
            "reads without adapters; leave it out (without lora_target_modules every linear layer but the head is "
            "adapted)."
        )


def adapts_all_linear(config: TrainConfig) -> bool:
    """Whether every linear layer but the head gets adapters."""
    return config.lora_target_modules in (None, [], ["all-linear"])


def add_lora(config: TrainConfig, model: nn.Module, task_type: str) -> nn.Module:
    """`model` with the adapters that `config` asks for; `task_type` is one of PEFT's (CAUSAL_LM, SEQ_CLS)."""
    if config.lora_r == 0:
        return model
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if adapts_all_linear(config) else config.lora_target_modules,
        task_type=task_type,
    )
    try:
        with warnings.catch_warnings():
            # An adapter on the embedding of a tied model is merged without the head (`loading.merge_adapter`).
            warnings.filterwarnings("ignore", message=r"Model (has|with) `tie_word_embeddings=True`")
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing")
            return get_peft_model(model, lora)
    except ValueError as error:
        raise InputError(f"lora_target_modules={config.lora_target_modules!r}: {error}") from error


# Surroundings


@contextmanager
def training_scope(config: TrainConfig) -> Iterator[None]:
    """The precision of products and DeepSpeed's global configuration, for this run and no later one; at its end the
    output directory is given back."""
    precision = matmul_precision(config.matmul_precision, config.device.type)
    try:
        with precision, _deepspeed_scope(config), run_facts.heard_warnings() as config.warnings:
            yield
    finally:
        locks.release(Path(config.output_dir))


@contextmanager
def _deepspeed_scope(config: TrainConfig) -> Iterator[None]:
    """transformers' global DeepSpeed configuration (ZeRO-3 loads weights in shards), for this run and no later one."""
    if config.engine == "deepspeed":
        set_hf_deepspeed_config(config.hf_deepspeed_config)
        pickle_plainly()
        if config.device.type == "cpu":
            start_on_cpu()
    else:
        unset_hf_deepspeed_config()
    with warnings.catch_warnings():
        # Names that torch and transformers changed and DeepSpeed and PEFT still use, in every step.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing")
        try:
            yield
        finally:
            unset_hf_deepspeed_config()


def train(
    trainer: StageTrainer,
    config: TrainConfig,
    checkpoint: str | None,
    *,
    about: Callable[[], dict[str, Any]],
    closing: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """Train (from `checkpoint`), save, evaluate, and write summary.json; returns the summary.

    `about()` gives the stage's own entries of the summary, and `closing(summary)` a line or more for the terminal.
    Raises Stopped after a SIGTERM, when a checkpoint is saved, and RunError where training cannot go on.
    """
    trainer.check_room()
    with trainer.watch.signals():
        output = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.watch.stopping:
        step, steps = trainer.state.global_step, trainer.state.max_steps
        place = Path(config.output_dir, f"checkpoint-{step}")
        raise Stopped(f"stopped by SIGTERM after step {step} of {steps}; {place} is saved; the same command continues.")
    trainer.save_model()
    # The model that is saved, which with load_best_model_at_end is not the one that was evaluated last.
    if trainer.eval_dataset is not None and (config.load_best_model_at_end or not trainer.is_evaluated()):
        trainer.evaluate()
    _or_warn("trainer_state.json", trainer.save_state)
    summary = {
        "stage": config.stage,
        "config": config.to_dict(),
        "changed": config.changed,
        "versions": {name: version(name) for name in VERSIONS} | {"python": platform.python_version()},
        "device": str(config.device),
        "processes": config.world_size,
        **about(),
        "resumed_from": checkpoint,
        "steps": trainer.state.global_step,
        "steps_left_out": trainer.watch.skipped,
        "metrics": _first_and_last(trainer.state.log_history),
        "train_seconds": round(output.metrics["train_runtime"], 3),
        "total_seconds": round(time.time() - config.started, 3),
        **trainer.throughput(),
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": run_facts.command_line(),
        "warnings": config.warnings,
    }
    samples = _or_warn("samples", lambda: run_facts.take_samples(trainer))  # a collective call
    if config.process_index == 0:
        ran = machine.describe()
        summary |= {"machine": ran["machine"], "commit": ran["commit"]}
        summary["data_files"] = _or_warn("data_files", lambda: run_facts.data_files(find_splits(config))) or {}
        if samples is not None:
            _or_warn(run_facts.SAMPLES, lambda: run_facts.write_samples(Path(config.output_dir), samples))
        content = json.dumps(summary, indent=2, default=str) + "\n"
        try:
            write_file(Path(config.output_dir), "summary.json", content.encode())  # it says that the run is finished
        except OSError as error:
            raise RunError(
                f"the training is finished and the model saved in {config.output_dir}, but summary.json could not be "
                f"written there: {error.strerror or error}."
            ) from error
        seconds = summary["train_seconds"]
        print(f"{summary['steps']} steps in {seconds:.0f} s; the model is in {config.output_dir}", flush=True)
        print(closing(summary), flush=True)
    finish(config, summary, anew=True)
    return summary


def _or_warn(what: str, value: Callable[[], Any]) -> Any:
    """Result of `value`; None, and a warning, where it fails: the model is saved already."""
    try:
        return value()
    except Exception as error:
        logger.warning(f"{what}: not written, removed, or in the report: {type(error).__name__}: {error}")
        return None


def finish(config: TrainConfig, summary: dict[str, Any], *, anew: bool) -> None:
    """Leave README.md (the model card), report.html and the scheduled checkpoints in the output directory of a finished
    run, and publish what is to be published; a collective call.

    Pages that are there are replaced when the run was made `anew`, and else left alone: people edit cards. A page that
    cannot be made is a warning. Raises RunError, in every process, for an upload that failed.
    """
    problem = None
    if config.process_index == 0:
        _or_warn("checkpoints of stops", lambda: checkpoints.remove_unscheduled(Path(config.output_dir)))
        _write_pages(Path(config.output_dir), anew)
        if config.push_to_hub and not publish.is_done(config, summary):
            problem = _publish(config, summary)
    if (problem := processes.from_first(problem)) is not None:
        raise RunError(problem)


def _write_pages(output: Path, anew: bool) -> None:
    for name, write in ((model_card.NAME, model_card.write), (html_report.NAME, html_report.write)):
        if (output / name).exists() and not anew:
            continue
        try:
            write(output)
        except Exception as error:
            logger.warning(f"{output / name} was not written: {type(error).__name__}: {error}")
        else:
            if name == html_report.NAME:
                print(f"the report is {output / name}", flush=True)


def _publish(config: TrainConfig, summary: dict[str, Any]) -> str | None:
    """Upload the model, and note it in the summary; returns what went wrong."""
    output = Path(config.output_dir)
    try:
        summary["hub"] = publish.push(config, output, f"{config.stage}: the model after {summary['steps']} steps")
    except Exception as error:
        return (
            f"the training is finished and saved in {output}, but was not uploaded: {publish.one_line(error)}. The "
            "same command tries again."
        )
    content = json.dumps(summary, indent=2, default=str) + "\n"
    write_file(output, "summary.json", content.encode())
    print(f"published as {summary['hub']['repository']}", flush=True)
    return None


def losses_line(summary: dict[str, Any], name: str) -> str:
    """ "train: loss 1.2 -> 0.9" of one split of a summary."""
    entries, key = summary["metrics"][name], "eval_loss" if name == "eval" else "loss"
    return f"{name}: loss {entries['first'][key]:.4f} -> {entries['last'][key]:.4f}"


def perplexity(loss: float) -> float:
    """exp of a mean loss per token in nats; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def _first_and_last(history: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The first and last entries of the log that hold training metrics, and evaluation metrics."""
    found = {}
    for name, key in (("train", "loss"), ("eval", "eval_loss")):
        entries = [entry for entry in history if key in entry]
        if entries:
            found[name] = {"first": entries[0], "last": entries[-1]}
    return found


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
