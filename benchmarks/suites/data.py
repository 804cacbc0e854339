"""Suite `data`, the work around the model: rows read, tokenised and packed a second, and the stages of an epoch.

    exo-fast bench data
    exo-fast bench data --only epoch

read, tokenise and pack work on rows of movie reviews, K = 4 candidates each. They are compared with the least work on
the same rows: parse their JSON, give their texts to the tokenizer in one call, and make their ids into one tensor. An
epoch is a run of `exo-fast align` on DeepSpeed, from its configuration to the saved model (epoch_profile describes how
its stages are separated):

    epoch/demo    the demo's: 135M model, products in bf16, 8 groups of a short prompt and 4 × 24 tokens in a step
    epoch/long    the same model and 8 groups of 192 + 4 × 64 tokens in a step, which is more work for the model
    epoch/tiny    a model of two layers and 1,000 words, which takes almost no time: the rest is the overhead
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exo_fast.benchmarks.harness import process_memory
from exo_fast.training import machine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from exo_fast.benchmarks.methods.epoch_profile import Stage
    from exo_fast.training.data.groups import GroupDataset
    from exo_fast.training.stages.align import AlignConfig

NAME = "data"
CANDIDATES, BATCH = 4, 8
ROWS = 2000  # for read, tokenise and pack
REPEATS = 5


@dataclass(frozen=True)
class Epoch:
    """The training data of an epoch: `steps` of BATCH groups, cut to so many tokens."""

    model: str  # "demo" or "tiny"
    steps: int
    prompt: int
    completion: int


EPOCHS = {"demo": Epoch("demo", 10, 8, 24), "long": Epoch("demo", 4, 192, 64), "tiny": Epoch("tiny", 16, 8, 24)}


@dataclass(frozen=True)
class Case:
    """A case: read, tokenise, pack, or an epoch of EPOCHS."""

    part: str

    def __str__(self) -> str:
        return f"data/{self.part}"


def cases(quick: bool = False) -> list[Case]:
    """Return all cases; quick: without the epochs of the demo model."""
    epochs = ["tiny"] if quick else EPOCHS
    return [Case("read"), Case("tokenise"), Case("pack"), *(Case(f"epoch/{name}") for name in epochs)]


def impossible(case: Case) -> str | None:
    """Return why a case cannot run: epochs need DeepSpeed."""
    if case.part.startswith("epoch") and machine.version("deepspeed") is None:
        return "DeepSpeed is not installed: pip install deepspeed"
    return None


def prepare() -> None:
    """Fetch the demo model and its reviews, once: their progress belongs on the terminal."""
    from exo_fast.training import downloads

    downloads.get_model(downloads.cache_dir())
    downloads.get_reviews(downloads.cache_dir())


def measure(case: Case, workdir: Path) -> dict:
    """Run one case in this process."""
    model, tokenizer, words = _demo()
    before = process_memory.resident_mb()
    process_memory.reset_peak()
    if case.part.startswith("epoch/"):
        row = measure_epoch(case.part.removeprefix("epoch/"), model, words, workdir)
    else:
        row = measure_rows(case.part, tokenizer, words, workdir)
    return {**row, "peak_mb": round(process_memory.peak_mb() - before, 1)}


def trial(case: Case, workdir: Path) -> tuple[Callable[[], object], dict]:
    """Make the contract's trial. For rows, prove that the batches hold the tokens of their texts; for an epoch, that
    its stages add up to the whole.
    """
    model, tokenizer, words = _demo()
    if not case.part.startswith("epoch/"):
        rows = Rows(tokenizer, words, workdir)
        rows.prove()
        work, least = rows.work(case.part)
        return work, {"baseline_seconds": min(timed(least)), "examples": ROWS}

    def run() -> dict:
        return measure_epoch(case.part.removeprefix("epoch/"), model, words, Path(tempfile.mkdtemp(dir=workdir)))

    shares = sum(stage["share_of_run"] for stage in run()["stages"])
    assert abs(shares - 1) < 0.01, f"the stages take {shares:.0%} of the run"
    return run, {}


def _demo() -> tuple[Path, PreTrainedTokenizerBase, list[str]]:
    """Return the demo model, its tokenizer, and the words of the reviews."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from exo_fast.training import downloads

    logging.disable_progress_bar()
    model = downloads.get_model(downloads.cache_dir(), _quiet)
    words = " ".join(review.text for review in downloads.get_reviews(downloads.cache_dir(), _quiet)).split()
    return model, AutoTokenizer.from_pretrained(model), words


def _quiet(_: str) -> None:
    """Replace print: `prepare` has already printed the message."""


# Rows


def write_rows(path: Path, words: list[str], rows: int, prompt_words: int, completion_words: int) -> None:
    """Write `rows` prompts with CANDIDATES candidates and their rewards as JSON lines, made of consecutive words."""
    supply = itertools.cycle(words)

    def text(count: int) -> str:
        return " ".join(itertools.islice(supply, count))

    with path.open("w") as file:
        for row in range(rows):
            prompt = text(prompt_words)
            completions = [" " + text(completion_words) for _ in range(CANDIDATES)]
            rewards = [(row + k) % CANDIDATES / CANDIDATES for k in range(CANDIDATES)]
            file.write(json.dumps({"prompt": prompt, "completions": completions, "rewards": rewards}) + "\n")


class Rows:
    """ROWS rows and the work on them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, words: list[str], folder: Path):
        from exo_fast.training.data.groups import GroupCollator

        self.tokenizer, self.path = tokenizer, folder / "rows.jsonl"
        write_rows(self.path, words, ROWS, prompt_words=12, completion_words=20)
        self.examples = self.read()
        self.dataset = self.tokenise()
        self.collate = GroupCollator(tokenizer.eos_token_id)

    def work(self, part: str) -> tuple[Callable, Callable]:
        """Return the function of `part`, and the function that does the least work."""
        return {
            "read": (self.read, self.parse),
            "tokenise": (self.tokenise, self.encode),
            "pack": (self.pack, self.to_tensors),
        }[part]

    def read(self) -> list:
        """Read and check the rows."""
        from exo_fast.training.data.examples import load_examples
        from exo_fast.training.data.sources import find_source

        return load_examples(find_source(str(self.path), "train"), loss_type="exo-rw", num_contrastive=None)

    def parse(self) -> list:
        """Parse the rows' JSON only."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def tokenise(self) -> GroupDataset:
        """Turn the examples into groups of ids."""
        from exo_fast.training.data.groups import tokenize

        limits = {"max_seq_len": 512, "max_gen_len": 256}
        return tokenize(self.examples, self.tokenizer, num_contrastive=None, progress=False, **limits)

    def encode(self) -> list[list[int]]:
        """Tokenise all texts by one call of the tokenizer."""
        from exo_fast.data.tokens import RowTokenizer

        return RowTokenizer(self.tokenizer).encode([text for e in self.examples for text in (e.prompt, *e.completions)])

    def pack(self) -> list[dict]:
        """Pack the groups into batches of BATCH."""
        return [self.collate([self.dataset[i] for i in range(at, at + BATCH)]) for at in range(0, ROWS, BATCH)]

    def prove(self) -> None:
        """Raise AssertionError if a batch does not hold the tokens of its groups, or the groups not the words."""
        groups = [self.dataset.group(i) for i in range(BATCH)]
        expected = [ids for group in groups for candidate in group.completions for ids in candidate]
        assert self.pack()[0]["targets"].tolist() == expected
        text = self.tokenizer.decode(groups[0].completions[0], skip_special_tokens=True)
        assert text.split() == self.examples[0].completions[0].split()

    def to_tensors(self) -> list:
        """Make all ids into two tensors."""
        import torch

        return [torch.from_numpy(ids).long() for ids in (self.dataset.prompt_ids, self.dataset.completion_ids)]


def measure_rows(part: str, tokenizer: PreTrainedTokenizerBase, words: list[str], workdir: Path) -> dict:
    """Measure the seconds of ROWS rows, and of the least work on them."""
    rows = Rows(tokenizer, words, workdir)
    work, least = rows.work(part)
    seconds, floor = timed(work), timed(least)
    return {
        "seconds": statistics.median(seconds),
        "all_seconds": [round(value, 5) for value in seconds],
        "baseline_seconds": statistics.median(floor),
        "examples_per_second": round(ROWS / statistics.median(seconds)),
        "tokens_per_second": round(rows.dataset.counts.shared_tokens / statistics.median(seconds)),
    }


def timed(function: Callable) -> list[float]:
    """Measure the seconds of REPEATS calls."""
    seconds = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begun)
    return seconds


# Epochs


def measure_epoch(name: str, model: Path, words: list[str], workdir: Path) -> dict:
    """Measure the stages of a run, with their shares of the steps or of the run."""
    from exo_fast.benchmarks.methods import epoch_profile

    epoch = EPOCHS[name]
    if epoch.model == "tiny":
        model = save_tiny_model(words, workdir / "tiny")
    data = workdir / f"{name}.jsonl"
    # A word is a token or more: rows are cut to the requested lengths.
    write_rows(data, words, epoch.steps * BATCH, epoch.prompt, epoch.completion)
    stages = epoch_profile.profile(align_config(epoch, model, data, workdir / f"run-{name}"))
    loop = sum(stage.seconds for stage in stages if stage.when == epoch_profile.STEP)
    total = sum(stage.seconds for stage in stages)
    return {
        "seconds": round(loop, 4),
        "baseline_seconds": round(sum(s.seconds for s in stages if s.name in epoch_profile.MODEL), 4),
        "run_seconds": round(total, 4),
        "steps": epoch.steps,
        "prompt": epoch.prompt,
        "completion": epoch.completion,
        "stages": list(_table(stages, epoch.steps, loop, total)),
    }


def _table(stages: list[Stage], steps: int, loop: float, total: float) -> Iterator[dict]:
    from exo_fast.benchmarks.methods.epoch_profile import STEP

    for stage in stages:
        yield {
            "stage": stage.name,
            "when": stage.when,
            "seconds": round(stage.seconds, 4),
            "calls": stage.calls,
            "ms_per_step": round(1000 * stage.seconds / steps, 2) if stage.when == STEP else None,
            "share_of_steps": round(stage.seconds / loop, 4) if stage.when == STEP else None,
            "share_of_run": round(stage.seconds / total, 4),
        }


def align_config(epoch: Epoch, model: Path, data: Path, output: Path) -> AlignConfig:
    """Return the configuration of one epoch of `exo-fast align`, with the demo's loss and precision, and nothing kept
    from other runs."""
    from exo_fast.training.stages.align import AlignConfig

    return AlignConfig(
        model_name_or_path=str(model),
        data=str(data),
        output_dir=str(output),
        reference_cache_dir=str(output / "reference"),
        loss_type="exo-rw",
        matmul_precision="fast",
        per_device_train_batch_size=BATCH,
        max_seq_len=epoch.prompt + epoch.completion,
        max_gen_len=epoch.completion,
        logging_steps=4,
        use_cpu=True,
        disable_tqdm=True,
    )


def save_tiny_model(words: list[str], folder: Path) -> Path:
    """Save a Llama of two layers of width 64, and a tokenizer of the 1,000 most common `words`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, set_seed

    names = ["<unk>", "<eos>", *(word for word, _ in Counter(words).most_common(1000))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(names),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def summary(rows: list[dict]) -> dict:
    """Return {"over_5_percent": {epoch of the demo model: {stage not in MODEL: its share of the steps}}}."""
    from exo_fast.benchmarks.methods.epoch_profile import MODEL

    return {
        "over_5_percent": {
            row["part"]: {
                stage["stage"]: stage["share_of_steps"]
                for stage in row["stages"]
                if stage["stage"] not in MODEL and (stage["share_of_steps"] or 0) > 0.05
            }
            for row in rows
            if "stages" in row and row["part"] != "epoch/tiny"
        }
    }
