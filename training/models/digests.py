"""Hashes of models, tokenizers and settings: the keys of cached results."""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from exo_fast.training.models.loading import adapter_base, is_adapter

TOKENIZER_PATTERNS = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json",
                      "generation_config.json")  # fmt: skip
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")


def digest(name_or_path: str) -> str:
    """Return the SHA-256 of a model's weights, configuration and tokenizer, and of an adapter's base.

    A model of the Hub is known by its commit, which fixes all of them: its weights may not have been downloaded yet.
    """
    directory = Path(name_or_path)
    if not directory.is_dir():
        commit = Path(cached_file(name_or_path, "config.json")).parent.name
        return hashlib.sha256(f"{name_or_path} {commit}".encode()).hexdigest()
    whole = hashlib.sha256(model_digest(name_or_path).encode())
    for path in sorted({path for pattern in TOKENIZER_PATTERNS for path in directory.glob(pattern) if path.is_file()}):
        whole.update(f"{path.name} {path.stat().st_size}\n".encode())
        whole.update(path.read_bytes())
    if is_adapter(name_or_path):
        whole.update(digest(adapter_base(name_or_path)).encode())
    return whole.hexdigest()


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def model_digest(name_or_path: str) -> str:
    """Return the SHA-256 of the names and content of a model's weight and configuration files, local or of the Hub."""
    directory = Path(name_or_path)
    if not directory.is_dir():
        directory = Path(cached_file(name_or_path, "config.json")).parent
    digest = hashlib.sha256()
    for path in sorted({path for pattern in WEIGHT_PATTERNS for path in directory.glob(pattern)}):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)  # continues the same digest
    return digest.hexdigest()
