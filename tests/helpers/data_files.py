"""A folder for hostile data files, and loading one with its errors judged."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fuzzing import REFUSED, judge
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from exo_fast.data.examples import MAX_ID, Example
from exo_fast.training.data.sources import find_source
from exo_fast.training.errors import InputError

WORDS = ("the", "film", "was", "good", "é")


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(("<unk>", "<s>", "</s>", " ", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    return tokenizer


@contextmanager
def folder() -> Iterator[Path]:
    """A new folder, and the files beside it."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name, "here")
        place.mkdir()
        yield place


def check_place(text: str) -> None:
    """A list of faulty rows names row and field of each."""
    if "rows cannot be used" in text:
        assert "row " in text, text
        assert "field `" in text, text


def load(place: Path, path: Path | str, loader: Callable[..., list[Any]], tokenizer: Any, split: str = "train") -> Any:
    """Return the rows that `loader` reads from `path`, checked; REFUSED if rightly so, None for a missing split."""

    def call() -> list[Any] | None:
        source = find_source(path, split)
        try:
            return None if source is None else loader(source, tokenizer=tokenizer)
        except InputError as error:
            check_place(str(error))
            raise

    rows = judge(call, InputError, [str(place)])
    if rows is REFUSED or rows is None:
        return rows
    assert rows
    for row in rows:
        texts = [row] if isinstance(row, str) else [row.text] if not isinstance(row, Example) else []
        if isinstance(row, Example):
            texts = [row.prompt, *row.completions]
            assert all(abs(reward) < 3.5e38 for reward in row.rewards)  # False for NaN
            assert all(0 <= i <= MAX_ID for ids in row.completion_ids or () for i in ids)
        for text in texts:
            text.encode()
    return rows
