"""A tiny random Llama with its own tokenizer, and data to align it on: no network, a few milliseconds a step."""

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BloomConfig, LlamaConfig, PreTrainedTokenizerFast, set_seed
from transformers.models.auto import AutoModelForCausalLM

WORDS = (
    "the film was good bad long short plot actor scene and but very really quite fine dull great poor".split()
)
SPECIAL = ["<unk>", "<s>", "</s>"]


def make_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Words and single characters; with `bos` it puts <s> before every text."""
    characters = [chr(c) for c in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    """The directory of a two-layer Llama (tied head) and its tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    return save_model(config, tokenizer, tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def tiny_bloom(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    config = BloomConfig(
        vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return save_model(config, tokenizer, tmp_path_factory.mktemp("tiny_bloom"))


def save_model(config: object, tokenizer: PreTrainedTokenizerFast, directory: Path) -> str:
    set_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def make_rows(count: int, candidates: int = 4, seed: int = 0) -> list[dict[str, object]]:
    """Rows whose reward is how many words of praise a completion has, plus a little, so that there are no ties."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        completions = [" ".join(rng.choices(WORDS, k=rng.randint(2, 7))) for _ in range(candidates)]
        rewards = [
            sum(word in ("good", "great", "fine") for word in text.split()) + 0.01 * k
            for k, text in enumerate(completions)
        ]
        rows.append(
            {
                "prompt": "the " + " ".join(rng.choices(WORDS, k=rng.randint(1, 6))),
                "completions": completions,
                "rewards": rewards,
            }
        )
    return rows


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """train.json (16 prompts) and test.json (6 prompts), 4 candidates each."""
    directory = tmp_path_factory.mktemp("data")
    (directory / "train.json").write_text(json.dumps(make_rows(16)))
    (directory / "test.json").write_text(json.dumps(make_rows(6, seed=1)))
    return str(directory)
