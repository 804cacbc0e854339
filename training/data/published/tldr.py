"""tldr/sft, tldr/pref, tldr/rw: Reddit posts and their summaries.

PATH holds train.jsonl and test.jsonl (.json and .jsonl.gz do too, and validation.* for test.*) of either

- the filtered TL;DR dataset (openai-tldr-filtered): {"subreddit", "title", "post", "summary"}, for tldr/sft; or
- the comparisons of summarize_from_feedback: {"info": {"subreddit", "title", "post"}, "summaries": [{"text"},
  {"text"}], "choice": 0 or 1}, for any kind: tldr/sft then has the chosen summaries.

As in the original, but two kinds of comparisons are left out: news articles (CNN/DM, in the validation split), which
have no subreddit and no post, and comparisons with an empty summary.
"""

from typing import Any

from exo_fast.data.fields import BadField
from exo_fast.training.data.registry import Drop, RawDataset, field_value, register, string_field


@register("tldr/sft")
@register("tldr/pref")
@register("tldr/rw")
class Tldr(RawDataset):
    """Posts, each with one or two summaries."""

    def to_record(self, row: Any) -> dict[str, Any]:
        """Return the record of a filtered row (for sft) or of a comparison."""
        if self.kind == "sft" and isinstance(row, dict) and "summaries" not in row:
            summary = string_field(row, "summary")
            if not summary.strip():
                raise Drop("empty summary")
            return {"prompt": _prompt(row), "chosen": summary}
        info = field_value(row, "info")
        if isinstance(info, dict) and info.get("post") is None and info.get("article") is not None:
            raise Drop("a news article, not a Reddit post")
        prompt = _prompt(row, "info")
        summaries = [string_field(row, "summaries", index, "text").strip() for index in (0, 1)]
        choice = field_value(row, "choice")
        if type(choice) is not int or choice not in (0, 1):
            raise BadField("choice", choice, "0 or 1 is needed, the index of the preferred summary.")
        if not all(summaries):
            raise Drop("empty summary")
        chosen, rejected = " " + summaries[choice], " " + summaries[1 - choice]
        return preference(self.kind, prompt, chosen, rejected)


def preference(kind: str, prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    """Return a preference as a record of kind "sft", "pref" or "rw" (with the original's rewards, 1 and 0)."""
    if kind == "sft":
        return {"prompt": prompt, "chosen": chosen}
    if kind == "rw":
        return {"prompt": prompt, "completions": [chosen, rejected], "rewards": [1, 0]}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _prompt(row: Any, *where: str) -> str:
    subreddit, title, post = (string_field(row, *where, name) for name in ("subreddit", "title", "post"))
    return f"SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR:"
