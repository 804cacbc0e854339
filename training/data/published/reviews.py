"""reviews/sft, reviews/class: the 10,605 movie-review snippets of the demo, rated by people. No path is needed: they
come from the package index, once (downloads.py).

A hash of a snippet's first SPLIT_WORDS words decides its split. So the split is the same in both kinds and in every
run, and no prompt is in two splits. reviews/sft asks for clean openings, each once; reviews/class takes them all.
"""

import hashlib
from pathlib import Path
from typing import Any, ClassVar

from exo_fast.data.fields import BadField
from exo_fast.training.data.places import Place
from exo_fast.training.data.registry import Drop, RawDataset, register
from exo_fast.training.downloads import Snippet, cache_dir, get_reviews, say_downloads
from exo_fast.training.errors import InputError

SPLIT_WORDS = 3
TEST_SHARE = 0.15


@register("reviews/sft")
@register("reviews/class")
class Reviews(RawDataset):
    """sft: {"prompt": the first `prompt_words` words, "chosen": the rest with the space before it}; class: {"text",
    "label", "rating"}, labelled by the sign of the rating, from -4 to 4."""

    needs_path: ClassVar[bool] = False
    default_options: ClassVar[dict[str, Any]] = {"prompt_words": 6}

    def __init__(self, name: str, path: Path | None, **options: Any):
        super().__init__(name, path, **options)
        words = self.options["prompt_words"]
        if words < SPLIT_WORDS:
            raise InputError(f"prompt_words={words}: at least {SPLIT_WORDS} are needed: they decide a review's split.")
        self._openings: set[str] = set()

    def splits(self) -> list[str]:
        """Return both splits; with a path, the splits of records written there."""
        return ["train", "test"] if self.path is None else super().splits()

    def rows(self, split: str) -> Any:
        """Return the snippets of the split, in the order in which they are published."""
        if self.path is not None:
            return super().rows(split)
        self._openings = set()
        snippets = get_reviews(cache_dir(), say=say_downloads)
        rows = [(Place("movieReviewSnippets_GroundTruth.txt", row), snippet) for row, snippet in enumerate(snippets)]
        return [(place, snippet) for place, snippet in rows if split_of(snippet.text) == split]

    def to_record(self, row: Any) -> dict[str, Any]:
        """Return the record of a snippet."""
        if not isinstance(row, Snippet):
            raise BadField("(the whole row)", row, f"neither a snippet nor a record of reviews/{self.kind}.")
        if self.kind == "class":
            if row.rating == 0:
                raise Drop("rating 0")
            return {"text": row.text, "label": "pos" if row.rating > 0 else "neg", "rating": row.rating}
        prompt = clean_opening(row.text, self.options["prompt_words"])
        if prompt is None:
            raise Drop("no clean opening, or too short")
        if prompt.casefold() in self._openings:
            raise Drop("opens as another does")
        self._openings.add(prompt.casefold())
        return {"prompt": prompt, "chosen": " ".join(row.text.split())[len(prompt) :]}


def split_of(text: str) -> str:
    """Return "test" for the snippets whose opening words hash into the lowest TEST_SHARE, "train" for the others."""
    opening = " ".join(text.casefold().split()[:SPLIT_WORDS])
    place = int.from_bytes(hashlib.sha256(opening.encode()).digest()[:8], "big") / 2**64
    return "test" if place < TEST_SHARE else "train"


def clean_opening(text: str, words: int) -> str | None:
    """Return the first `words` words of a review that goes on for at least as many again.

    None for a shorter one, and if the opening ends a sentence or holds an unclosed quotation or bracket: a model's
    continuation then has little to do with the review.
    """
    opening = text.split()[:words]
    if len(text.split()) < 2 * words or any(word[-1] in ".!?:;\"'" for word in opening):
        return None
    prompt = " ".join(opening)
    return None if any(mark in prompt for mark in '"()[]*') else prompt
