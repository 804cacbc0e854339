"""The tiny Llama and tokenizer of the training tests, for trainers that are not ours."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "exo_fast_training_conftest", Path(__file__).parents[1] / "training" / "conftest.py"
)
_training = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_training)

keep_environment = _training.keep_environment
tokenizer = _training.tokenizer
tiny_llama = _training.tiny_llama
make_tokenizer = _training.make_tokenizer
