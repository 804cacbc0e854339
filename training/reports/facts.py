"""Facts of a run beside its metrics: its command line and data files, its warnings, and the trained model's numbers for
a few rows. report.html and the model card are made from them."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from exo_fast.training import files
from exo_fast.training.files import file_sha256
from exo_fast.training.models.modules import AlignModule

if TYPE_CHECKING:
    from exo_fast.training.data.places import Source
    from exo_fast.training.trainer.trainer import StageTrainer

SAMPLES = "samples.json"
SAMPLE_ROWS = 4
PROMPT_CHARACTERS, TEXT_CHARACTERS = 1000, 2000  # of a sample; prompts are cut on the left, texts on the right
MOST_WARNINGS = 50


def command_line() -> str | None:
    """Return the words that started this process, as a shell takes them; None if that was not exo_fast's command line.

    The value of an option called …token or …key is hidden.
    """
    script, words = Path(sys.argv[0]), sys.argv[1:]
    if script.name == "exo-fast":
        start = ["exo-fast"]
    elif script.parts[-3:] == ("training", "cli", "__main__.py"):
        start = ["python", "-m", "exo_fast.training.cli"]
    else:
        return None
    told: list[str] = []
    for word in words:
        name, equals, _ = word.partition("=")
        if told and _is_secret(told[-1]) and not word.startswith("--"):
            told.append("HIDDEN")
        else:
            told.append(f"{name}=HIDDEN" if equals and _is_secret(name) else word)
    return shlex.join([*start, *told])


def _is_secret(option: str) -> bool:
    return option.startswith("--") and option.replace("-", "_").endswith(("_token", "_key"))


def data_files(sources: dict[str, Source]) -> dict[str, dict[str, Any]]:
    """Return each split's name, and the number, bytes and sha256 of the files it is read from.

    A folder's hash is taken over its sorted lines of name and hash. Raw files of the registry are not hashed.
    """
    found = {}
    for split, source in sources.items():
        found[split] = {"name": str(source)}
        if source.raw is None:
            path, files = source.path.expanduser(), source.files
            lines = [f"{file.relative_to(path).as_posix()} {file_sha256(file)}" for file in files]
            together = hashlib.sha256("\n".join(lines).encode()).hexdigest()
            found[split] |= {
                "files": len(files),
                "bytes": sum(file.stat().st_size for file in files),
                "sha256": together if path.is_dir() else lines[0].split()[-1],
            }
    return found


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: dict[str, int] = {}  # how often each was given

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text in self.messages or len(self.messages) < MOST_WARNINGS:
            self.messages[text] = self.messages.get(text, 0) + 1
        if not self._is_shown(record) and logging.lastResort is not None:
            logging.lastResort.handle(record)  # Python uses it only if there is no other handler

    def _is_shown(self, record: logging.LogRecord) -> bool:
        """Check whether another handler gets the record."""
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False


@contextmanager
def heard_warnings() -> Iterator[dict[str, int]]:
    """Count the warnings that exo_fast and transformers log inside the block. They are still shown as usual."""
    listener = _Listener()
    loggers = [logging.getLogger(name) for name in ("exo_fast", "transformers")]
    for one in loggers:
        one.addHandler(listener)
    try:
        yield listener.messages
    finally:
        for one in loggers:
            one.removeHandler(listener)


@torch.no_grad()
def take_samples(trainer: StageTrainer) -> dict[str, Any]:
    """Return the first rows of the held-out data (or of the training data) and the trained model's numbers for them, a
    row at a time. All processes must call it.

    {"split": …, "rows": [{"prompt": text, "texts": [{"text": …, "numbers": {name: number}}, …]}, …]}
    """
    split = "train" if trainer.eval_dataset is None else "eval"
    dataset = trainer.train_dataset if split == "train" else trainer.eval_dataset
    module, device = trainer.model.eval(), trainer.args.device
    rows = []
    for index in range(min(SAMPLE_ROWS, len(dataset))):
        item = dataset[index]
        batch = trainer.data_collator([item])
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        with trainer.compute_loss_context_manager():
            if isinstance(module, AlignModule):
                policy_logps = module(only_logps=True, **batch)[0][0].float().cpu()
                rows.append(_group(item, policy_logps, trainer.processing_class))
            else:
                losses, metrics = module(**batch)
                numbers = dict(zip(module.metric_names, metrics[0].float().tolist(), strict=True))
                rows.append(_row(item, {"loss": losses[0].item(), **numbers}, trainer.processing_class))
    return {"split": split, "rows": rows}


def write_samples(folder: Path, samples: dict[str, Any]) -> None:
    """Write samples.json in one step."""
    files.write_file(folder, SAMPLES, (json.dumps(samples, indent=1, ensure_ascii=False) + "\n").encode())


def _group(item: dict[str, Any], policy_logps: Tensor, tokenizer: Any) -> dict[str, Any]:
    group, log_ratios = item["group"], policy_logps - item["ref_logps"]
    numbers = zip(item["rewards"].tolist(), log_ratios.tolist(), policy_logps.tolist(), strict=True)
    texts = [
        _text(tokenizer, ids, {"reward": reward, "log-ratio": ratio, "log-prob": logp})
        for ids, (reward, ratio, logp) in zip(group.completions, numbers, strict=True)
    ]
    return {"prompt": _prompt(tokenizer, group.prompt), "texts": texts}


def _row(item: dict[str, Any], numbers: dict[str, float], tokenizer: Any) -> dict[str, Any]:
    if "group" in item:  # supervised fine-tuning
        group = item["group"]
        texts = [_text(tokenizer, ids, {"loss, nats a token": numbers["loss"]}) for ids in group.completions]
        return {"prompt": _prompt(tokenizer, group.prompt), "texts": texts}
    if len(item["ids"]) == 1:  # a classifier
        text = _text(tokenizer, item["ids"][0], {"label": item["label"], "log-odds": numbers["log_odds"]})
        return {"prompt": "", "texts": [text]}
    chosen, rejected = item["ids"]
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    texts = [
        _text(tokenizer, ids[shared:], {f"reward, {name}": numbers[f"rewards/{name}"]})
        for name, ids in (("chosen", chosen), ("rejected", rejected))
    ]
    return {"prompt": _prompt(tokenizer, chosen[:shared]), "texts": texts}


def _prompt(tokenizer: Any, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return text if len(text) <= PROMPT_CHARACTERS else "…" + text[-PROMPT_CHARACTERS:]


def _text(tokenizer: Any, ids: list[int], numbers: dict[str, float]) -> dict[str, Any]:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    text = text if len(text) <= TEXT_CHARACTERS else text[:TEXT_CHARACTERS] + "…"
    return {"text": text, "numbers": {k: round(v, 6) if math.isfinite(v) else None for k, v in numbers.items()}}
