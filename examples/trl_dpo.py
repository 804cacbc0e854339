"""TRL's DPO script with another trainer: exo-rw over K rated candidates of a prompt, in place of pairs.

python examples/trl_dpo.py
python examples/trl_dpo.py --model HuggingFaceTB/SmolLM2-135M --steps 10
"""

import tempfile

from datasets import Dataset
from small import RATED, arguments, load
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from exo_fast.integrations.trl import ExoDPOConfig, ExoDPOTrainer


def bytes_tokenizer():
    """Return a tokenizer for the tiny model, whose vocabulary is the bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    end = "Ā"  # how ByteLevel writes the byte 0, which no text has
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)


args = arguments(__doc__)
model, _ = load(args.model)
tokenizer = AutoTokenizer.from_pretrained(args.model) if args.model else bytes_tokenizer()
rows = [
    {"prompt": prompt, "completions": list(candidates), "rewards": list(candidates.values())}
    for prompt, candidates in RATED.items()
]

with tempfile.TemporaryDirectory() as folder:
    settings = ExoDPOConfig(
        output_dir=folder,
        loss_type="exo-rw",
        beta=0.1,
        beta_r=0.5,
        max_steps=args.steps,
        per_device_train_batch_size=4,  # prompts, with all their candidates
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    data = Dataset.from_list(rows)
    ExoDPOTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer).train()
