"""hh/sft, hh/pref, hh/rw: Anthropic's helpful and harmless dialogues, as preferences between two last responses.

PATH holds train.jsonl and test.jsonl, also as .jsonl.gz: one of the folders of hh-rlhf, such as helpful-base. A row is
{"chosen", "rejected"}, two dialogues of turns that begin with "\\n\\nHuman: " or "\\n\\nAssistant: ". The prompt is the
turns that both share and "Assistant:"; chosen and rejected are the assistant's words in the first turn that differs.

As in the original: "Humans: " counts as "Human: "; a blank line inside a turn stays in it; "Human: " inside the first
paragraph of the assistant becomes a space; rows whose responses are the same, or one of which is empty, are left out.
Unlike the original: spaces before a response are stripped from both. The original strips them from the chosen alone, so
a space tells the two apart. And "Assistant:" with nothing after it in its paragraph begins a turn too; the original
stops at an assertion.
"""

from typing import Any

from exo_fast.data.fields import BadField
from exo_fast.training.data.published.tldr import preference
from exo_fast.training.data.registry import Drop, RawDataset, register, string_field
from exo_fast.training.errors import InputError

HUMAN = ("Human: ", "Humans: ")
ASSISTANT = "Assistant:"


@register("hh/sft")
@register("hh/pref")
@register("hh/rw")
class HelpfulHarmless(RawDataset):
    """Dialogues in pairs."""

    def splits(self) -> list[str]:
        """Return the splits, as RawDataset does. If only folders inside the folder have files, the error names them."""
        found = super().splits()
        inside = [folder for folder in sorted(self.path.glob("*/")) if (folder / "train.jsonl.gz").is_file()]
        if not found and inside:
            names = ", ".join(folder.name for folder in inside)
            raise InputError(f"{self}: holds no train.jsonl or test.jsonl itself; add one of its folders ({names}).")
        return found

    def to_record(self, row: Any) -> dict[str, Any]:
        """Return the record of two dialogues. Raises BadField for rows on which an assertion stops the original."""
        dialogues = {name: turns(name, string_field(row, name)) for name in ("chosen", "rejected")}
        pairs = list(zip(*dialogues.values(), strict=False))
        shared = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        if shared is None:
            raise Drop("same response")
        responses = {}
        for name, dialogue in dialogues.items():
            turn = dialogue[shared]
            if not turn.startswith(ASSISTANT):
                raise BadField(
                    name, turn, "the first turn that differs must be the assistant's; mend the dialogues or remove it."
                )
            responses[name] = turn.removeprefix(ASSISTANT)
        if not all(response.strip() for response in responses.values()):
            raise Drop("empty response")
        prompt = "\n\n".join([*dialogues["chosen"][:shared], ASSISTANT])
        return preference(self.kind, prompt, **responses)


def turns(name: str, dialogue: str) -> list[str]:
    """Return the turns of a dialogue, each from its "Human: " or "Assistant:" on. The text before the first turn
    (usually empty) comes first, so that joining all with blank lines gives the dialogue. `name` is for the error."""
    first, *paragraphs = dialogue.split("\n\n")
    if first:
        raise BadField(name, dialogue, 'a dialogue begins with a blank line, "\\n\\nHuman: …".')
    found = [""]
    for paragraph in paragraphs:
        if paragraph.startswith(HUMAN):
            found.append(paragraph.replace("Humans: ", "Human: "))
        elif paragraph == ASSISTANT or paragraph.startswith(ASSISTANT + " "):
            said = paragraph.replace("Human: ", " ").replace("Humans: ", " ").removeprefix(ASSISTANT)
            found.append(f"{ASSISTANT} {said.lstrip()}" if said else ASSISTANT)
        else:
            found[-1] += "\n\n" + paragraph
    return found
