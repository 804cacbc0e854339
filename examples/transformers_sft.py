"""Supervised fine-tuning with transformers.Trainer: one line takes the logits out of the model's loss.

python examples/transformers_sft.py
python examples/transformers_sft.py --model HuggingFaceTB/SmolLM2-135M --steps 10
"""

import tempfile

import torch
from small import arguments, load
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from exo_fast.integrations.transformers import apply_exo_fast

SONNET = """Shall I compare thee to a summer's day? Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May, And summer's lease hath all too short a date:
Sometime too hot the eye of heaven shines, And often is his gold complexion dimm'd;
And every fair from fair sometime declines, By chance, or nature's changing course untrimm'd:
But thy eternal summer shall not fade, Nor lose possession of that fair thou ow'st;
Nor shall death brag thou wander'st in his shade, When in eternal lines to time thou grow'st;
So long as men can breathe, or eyes can see, So long lives this, and this gives life to thee."""


def collate(rows):
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(ids, batch_first=True, padding_value=-100),
    }


args = arguments(__doc__)
model, encode = load(args.model)
apply_exo_fast(model)  # this line

with tempfile.TemporaryDirectory() as folder:
    settings = TrainingArguments(
        output_dir=folder,
        max_steps=args.steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=args.learning_rate,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    texts = [{"input_ids": encode(line)} for line in SONNET.splitlines()]
    Trainer(model, settings, data_collator=collate, train_dataset=texts).train()
