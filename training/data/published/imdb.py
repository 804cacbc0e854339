"""imdb/sft, imdb/class (and imdb/pref, imdb/rw once they are made): the Large Movie Review Dataset.

PATH is the folder aclImdb as its archive unpacks it: {train,test}/{pos,neg}/*.txt, one review in a file. `<br />` is a
line break, and white space at the end is cut off. As in the original:

- imdb/class: {"text", "label"}, the positive reviews first;
- imdb/sft: the first `prefix_tokens` tokens are the prompt, the rest is chosen. The test split is shuffled with seed 42
  and alternates between positive and negative.

Files are taken in the order of their names; the original takes the order of os.listdir, which differs from disk to
disk, so its shuffled test split is another on every machine and this one is not. If a token ends in the middle of a
character, the whole character belongs to the prompt: prompt and chosen together are always the review. A review with no
more tokens than the prompt is left out of imdb/sft.
"""

import random
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, ClassVar

from exo_fast.data.fields import BadField
from exo_fast.training.data.json_rows import MAX_ROW_BYTES
from exo_fast.training.data.places import Place
from exo_fast.training.data.registry import Drop, RawDataset, register
from exo_fast.training.errors import InputError

TEST_SEED = 42
LABELS = ("pos", "neg")


@register("imdb/sft")
@register("imdb/class")
@register("imdb/pref")
@register("imdb/rw")
class Imdb(RawDataset):
    """Reviews and their sentiment."""

    default_options: ClassVar[dict[str, Any]] = {"prefix_tokens": 10}

    def splits(self) -> list[str]:
        """Return the splits that have folders of reviews, or else files of records."""
        return [split for split in ("train", "test") if self._is_raw(split)] or super().splits()

    def rows(self, split: str) -> Any:
        """Return the files of reviews, in their order; or the records that are there already."""
        if not self._is_raw(split):
            return super().rows(split)
        if self.kind in ("pref", "rw"):
            raise InputError(
                f"{self}: reviews are not preferences; sample from a model with `exo-fast generate`, and label the "
                "samples with `exo-fast score` (recipes/imdb.yaml does both), then name its output."
            )
        if self.kind == "sft":
            self._check_tokenizer()
        files: list[list[Path]] = []
        for label in LABELS:
            folder = self.path / split / label
            files.append(sorted(folder.glob("*.txt")))
            if not files[-1]:
                raise InputError(f"{folder}: no reviews (*.txt) there; {split}/pos and {split}/neg are needed.")
        if self.kind == "sft" and split == "test":
            shuffle = random.Random(TEST_SEED).shuffle
            for reviews in files:
                shuffle(reviews)
            ordered = [path for path in chain.from_iterable(zip_longest(*files)) if path is not None]
        else:
            ordered = [path for reviews in files for path in reviews]
        return [(Place(str(path), row, 1), path) for row, path in enumerate(ordered)]

    def to_record(self, row: Any) -> dict[str, Any]:
        """Return the record of the review in the file `row`."""
        if not isinstance(row, Path):
            raise BadField("(the whole row)", row, f"neither a review nor a record of imdb/{self.kind}.")
        try:
            if not row.is_file() or row.stat().st_size > MAX_ROW_BYTES:
                raise BadField("text", row.name, f"no file, or one of more than {MAX_ROW_BYTES >> 20} MiB; remove it.")
            text = row.read_text(encoding="utf-8").rstrip().replace("<br />", "\n")
        except UnicodeDecodeError as error:
            raise BadField("text", row.read_bytes(), f"not UTF-8 text (byte {error.start}).") from error
        except OSError as error:
            raise BadField("text", row.name, f"the file cannot be read: {error.strerror}.") from error
        if not text:
            raise BadField("text", text, "the review is empty; remove the file.")
        if self.kind == "class":
            return {"text": text, "label": row.parent.name}
        count = self.options["prefix_tokens"]
        ends = self.tokenizer(
            text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
        end = ends[count - 1][1] if len(ends) > count else len(text)
        if end == len(text):
            raise Drop(f"no more than {count} tokens")
        return {"prompt": text[:end], "chosen": text[end:]}

    def _is_raw(self, split: str) -> bool:
        return any((self.path / split / label).is_dir() for label in LABELS)

    def _check_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise InputError(
                f"{self}: its prompts are the first {self.options['prefix_tokens']} tokens of reviews, so a tokenizer "
                "is needed; run `exo-fast prepare --tokenizer MODEL` once, and name its output."
            )
        if not self.tokenizer.is_fast:
            raise InputError(
                f"{self}: the tokenizer {self.tokenizer.name_or_path!r} does not tell where a token ends in the text; "
                "one with a tokenizer.json is needed."
            )
