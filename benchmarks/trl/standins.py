"""Local stand-ins for the data sets and models that TRL's tests load from the hub, made by TRL's own scripts.

The data sets are the originals: `scripts/generate_zen_dataset.py` and its neighbours write them, with the upload
replaced by parquet files. The models have the originals' architectures (`scripts/generate_tiny_models`), also with
random weights. Their tokenizer is trained on the checkout's own text, so everything that counts its vocabulary is
smaller than on the hub. Models are stored as a hub cache, so that `transformers` finds them by name when offline.

    python -m exo_fast.benchmarks.trl.standins CHECKOUT HOME    HOME is the HF_HOME of the process that loads them
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

ORGANIZATION = "trl-internal-testing"
REVISION = "0" * 40  # for every model: a hub cache names its snapshots by commit
INDEX = "standins.json"  # in HOME: {"models": [names], "missing": {name: why}}
VOCABULARY = 2048
TEMPLATES = {"tiny-GptOssForCausalLM": ("gptoss.jinja", "<|return|>")}  # chat template and end of a turn
TEMPLATE = ("qwen2_5.jinja", "<|im_end|>")  # for all others
PADDING = "<|endoftext|>"
SIZES = {"tiny-Olmo3ForCausalLM": 100_278}  # its script names the padding token by number; unused tokens fill up
WITHOUT_PROCESSOR = "its image processor comes from the hub"


def build(checkout: Path, home: Path, wanted: str) -> None:
    """Make all stand-ins named in the text `wanted` below `home`. The index lists the failed ones with the reason."""
    sys.path.insert(0, str(checkout / "scripts"))
    names = sorted(set(re.findall(rf"{ORGANIZATION}/([\w.-]+)", wanted)))
    scripts = model_scripts(checkout)
    made, missing = [], {}
    for name in names:
        try:
            if name in scripts:
                _save_model(name, scripts[name], checkout, home)
            elif (checkout / "scripts" / f"{_generator(name)}.py").exists():
                _save_datasets(name, home)
            else:
                raise LookupError(WITHOUT_PROCESSOR)
            made.append(name)
        except Exception as error:  # one model that this transformers cannot build: the other tests still run
            missing[name] = f"{error}".strip().splitlines()[0]
    (home / INDEX).write_text(json.dumps({"made": made, "missing": missing}, indent=1))


def datasets_folder(home: Path, name: str, config: str) -> Path:
    """Return the folder of a configuration's splits, `<split>.parquet`."""
    return home / "standins" / name / config


def model_scripts(checkout: Path) -> dict[str, str]:
    """Return {name of a model on the hub: module below scripts/ that makes it} for the causal language models."""
    found = {}
    folder = checkout / "scripts" / "generate_tiny_models" / "for_causal_lm"
    for script in folder.glob("*_causal_lm*.py"):
        text = script.read_text()
        model = re.search(r"^model = (\w+)\(", text, re.M)
        pushed = re.search(r"^push_to_hub\(model, \w+, \w+((?:, \"[^\"]+\")+)\)", text, re.M)
        if model and pushed:
            prefix, *suffix = re.findall(r'"([^"]+)"', pushed[1])
            found["-".join([prefix, model[1], *suffix])] = f"generate_tiny_models.for_causal_lm.{script.stem}"
    return found


# Data sets


def _generator(name: str) -> str:
    return f"generate_{name.replace('-', '_')}_dataset"


def _save_datasets(name: str, home: Path) -> None:
    """Save every configuration of a data set. The script draws images at random; here the seed is fixed."""
    import numpy
    from datasets import DatasetDict

    def save(splits: DatasetDict, repo_id: str, config_name: str) -> None:
        folder = datasets_folder(home, name, config_name)
        folder.mkdir(parents=True)
        for split, rows in splits.items():
            rows.to_parquet(folder / f"{split}.parquet")

    DatasetDict.push_to_hub = save
    numpy.random.seed(0)
    script = importlib.import_module(_generator(name))
    script.main(test_size=0.1, push_to_hub=True, repo_id=f"{ORGANIZATION}/{name}")


# Models


def _save_model(name: str, module: str, checkout: Path, home: Path) -> None:
    """Run the script of a model with a local tokenizer, and write a snapshot to the hub cache, not an upload."""
    import transformers

    tokenizer = make_tokenizer(checkout, *TEMPLATES.get(name, TEMPLATE), size=SIZES.get(name, 0))
    repository = home / "hub" / f"models--{ORGANIZATION}--{name}"
    folder = repository / "snapshots" / REVISION

    def save(model: Any, tokenizer: Any, generation_config: Any, *_: str) -> None:
        for part in (model, tokenizer, generation_config):
            part.save_pretrained(folder)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(REVISION)

    common = importlib.import_module("generate_tiny_models._common")
    _replace(common, lambda *_, **__: None, "check_transformers_version", "check_dtype_pattern", "print_config_diff")
    _replace(common, save, "push_to_hub")
    transformers.AutoTokenizer.from_pretrained = lambda *_, **__: tokenizer
    transformers.GenerationConfig.from_pretrained = lambda *_, **__: transformers.GenerationConfig()
    transformers.set_seed(0)
    importlib.import_module(module)


def _replace(module: ModuleType, function: Callable, *names: str) -> None:
    for name in names:
        setattr(module, name, function)


def make_tokenizer(checkout: Path, template: str, end: str, size: int = 0) -> Any:
    """Train a byte-level BPE of VOCABULARY tokens on the texts of the data sets, with a chat template from TRL.

    `size`: fill the vocabulary up to this many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    chat = (checkout / "trl" / "chat_templates" / template).read_text()
    special = sorted({PADDING, end, *re.findall(r"<\|\w+\|>", chat)})
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = sorted((checkout / "scripts").glob("generate_*_dataset.py"))
    tokenizer.train_from_iterator([chat, *(path.read_text() for path in texts)], trainer)
    parts = json.loads(tokenizer.to_str())
    vocabulary = parts["model"]["vocab"]
    vocabulary.update({f"<unused {i}>": i for i in range(len(vocabulary), size)})
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=PADDING, chat_template=chat, padding_side="left"
    )


if __name__ == "__main__":
    checkout, home = map(Path, sys.argv[1:])
    build(checkout, home, (checkout / "tests" / "test_dpo_trainer.py").read_text())
