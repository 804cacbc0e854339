"""A tiny random Llama with its own tokenizer, and data to align it on, as functions and as fixtures: no network, a few
milliseconds a step."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, BloomConfig, LlamaConfig, PreTrainedTokenizerFast, set_seed
from transformers.models.auto import AutoModelForCausalLM

WORDS = ("the", "film", "was", "good", "bad", "long", "plot", "and", "but", "very", "fine", "dull", "great")
SPECIAL = ("<unk>", "<s>", "</s>")


def make_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Words and the space between them as tokens; with `bos` it puts <s> before every text."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, " ", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def bare_tokenizer() -> PreTrainedTokenizerFast:
    """One that adds nothing to a text."""
    return make_tokenizer(bos=False)


def save_model(config: Any, tokenizer: PreTrainedTokenizerFast, directory: Path) -> str:
    set_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    """The directory of a two-layer Llama (tied head, weights large enough to have opinions) and its tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    return save_model(config, tokenizer, tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def tiny_bloom(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    """The directory of a two-layer Bloom, whose ALiBi cannot share prompts."""
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)
    return save_model(config, tokenizer, tmp_path_factory.mktemp("tiny_bloom"))


def make_rows(count: int, candidates: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose reward counts words of praise, plus a little for the place, so that there are no ties."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    rows = []
    for _ in range(count):
        completions = [words(2, 7) for _ in range(candidates)]
        praise = [sum(word in ("good", "great", "fine") for word in text.split()) for text in completions]
        rewards = [count + 0.01 * k for k, count in enumerate(praise)]
        rows.append({"prompt": words(1, 6), "completions": completions, "rewards": rewards})
    return rows


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """train.json (16 prompts) and test.json (5 prompts), 4 candidates each."""
    directory = tmp_path_factory.mktemp("data")
    (directory / "train.json").write_text(json.dumps(make_rows(16)))
    (directory / "test.json").write_text(json.dumps(make_rows(5, seed=1)))
    return str(directory)


@pytest.fixture
def settings(tiny_llama: str, data_directory: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`settings(**overrides)`: AlignConfig fields of a run of 8 steps that takes well under a second."""

    def with_overrides(**overrides: Any) -> dict[str, Any]:
        return {
            "model_name_or_path": tiny_llama,
            "data": data_directory,
            "max_seq_len": 64,
            "max_gen_len": 16,
            "loss_type": "exo-rw",
            "learning_rate": 3e-3,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "output_dir": str(tmp_path / "run"),
            "reference_cache_dir": str(tmp_path / "cache"),
            **overrides,
        }

    return with_overrides


@pytest.fixture(scope="session")
def reward_model(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a one-logit classifier on the tiny Llama, with a head that has opinions."""
    from exo_fast.training.data.texts import pad_with_eos
    from exo_fast.training.models.scorer import load_scalar_model

    directory = tmp_path_factory.mktemp("reward_model")
    set_seed(0)
    model = load_scalar_model(tiny_llama, dtype=torch.float32, new_head=True)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(directory)
    pad_with_eos(AutoTokenizer.from_pretrained(tiny_llama)).save_pretrained(directory)
    return str(directory)
