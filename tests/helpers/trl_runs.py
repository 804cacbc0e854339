"""Data sets of pairs and of candidates, and short runs of TRL's trainers on them."""

from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

WORDS = ["the", "film", "was", "good", "bad", "long", "plot", "and", "but", "very", "fine", "dull", "great"]
SILENT = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}


def pairs(n: int = 8) -> Dataset:
    draw = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=draw).tolist())

    return Dataset.from_list(
        [{"prompt": text(3 + i % 4) + " ", "chosen": text(2 + i % 3), "rejected": text(1 + i % 5)} for i in range(n)]
    )


def candidates(n: int = 8, k: int = 3) -> Dataset:
    rows = pairs(n * k).to_list()
    return Dataset.from_list(
        [
            {
                "prompt": rows[i * k]["prompt"],
                "completions": [row["chosen"] for row in rows[i * k : i * k + k]],
                "rewards": [((i + j) % k) / 2 for j in range(k)],
            }
            for i in range(n)
        ]
    )


def run(trainer_class: type, config: Any, model: str, data: Dataset, **options: Any) -> tuple[list[dict], dict]:
    """The log of every step, and the weights at the end."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = trainer_class(policy, args=config, train_dataset=data, processing_class=tokenizer, **options)
    trainer.train()
    weights = {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    return [entry for entry in trainer.state.log_history if "loss" in entry], weights


def config(path: Path, kind: type = trl.DPOConfig, **options: Any) -> Any:
    # SGD: Adam divides by gradients, and makes as much of those that are rounding. TRL's default is bf16.
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "bf16": False,
        **SILENT,
        **options,
    }
    return kind(str(path), **settings)


def exact_logps(model: Any, tokenizer: Any, rows: Dataset) -> Tensor:
    """(G, K) in float64 from full logits, differentiable."""
    found = []
    for row in rows:
        start = len(tokenizer(row["prompt"])["input_ids"])
        for text in row["completions"]:
            ids = torch.tensor([tokenizer(row["prompt"] + text + "</s>")["input_ids"]])
            logps = torch.log_softmax(model(ids).logits[0, :-1], dim=-1)
            found.append(logps.gather(1, ids[0, 1:, None]).sum(1)[start - 1 :].sum())
    return torch.stack(found).view(len(rows), -1)
