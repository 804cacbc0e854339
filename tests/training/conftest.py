"""The tiny models of `tiny_models.py` as fixtures."""

from tiny_models import bare_tokenizer, data_directory, reward_model, settings, tiny_bloom, tiny_llama, tokenizer

__all__ = ["bare_tokenizer", "data_directory", "reward_model", "settings", "tiny_bloom", "tiny_llama", "tokenizer"]
