"""Conversion of people's rows to token ids: one way, for every stage and for the trainers of other libraries.

    row of any accepted form
      → forms.py           the fields of this library: prompt, completions, rewards; chosen, rejected; messages
      → conversations.py   messages become text through the chat template, and the assistant's words are marked
      → examples.py        a checked Example: prompt, candidates, rewards
      → tokens.py          token ids, as inference sees them
      → selection.py       which candidates make a group, and which groups teach nothing

No module here reads a file or imports torch. Faults are `fields.BadField`, a ValueError with field, value and fix.
"""
