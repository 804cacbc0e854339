"""The fused forward where parameters are in pieces: DeepSpeed ZeRO-3 as TRL runs it, and FSDP2, in two processes."""

import json
import textwrap
from pathlib import Path

import forked
import pytest
import torch

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'exo_fast[trl]'")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

WORDS = ["the", "film", "was", "good", "bad", "long", "plot", "and", "but", "very", "fine", "dull", "great"]
ROWS = [
    {
        "prompt": " ".join(WORDS[i % 5 : i % 5 + 4]) + " ",
        "chosen": " ".join(WORDS[i : i + 3]),
        "rejected": " ".join(WORDS[2 * i % 9 :][:2]),
    }
    for i in range(8)
]
SETTINGS = {
    "max_steps": 2, "learning_rate": 1e-2, "optim": "sgd", "bf16": False, "report_to": "none", "disable_tqdm": True,
    "use_cpu": True, "save_strategy": "no", "logging_steps": 1,
}  # fmt: skip

TRAINING = """
import json, sys
import deepspeed, torch
deepspeed.init_distributed(dist_backend="gloo")
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from exo_fast.integrations.trl import ExoDPOConfig, ExoDPOTrainer; from exo_fast.integrations.trl import patch_trl

model, output, rows, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
lora = {}
if sys.argv[5] == "lora":  # DDP, which walks through every output of the model in backward
    from peft import LoraConfig

    lora = {"peft_config": LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)}
else:
    settings["deepspeed"] = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
    }
patch_trl()
kind, trainer_class = (DPOConfig, DPOTrainer) if sys.argv[5] != "groups" else (ExoDPOConfig, ExoDPOTrainer)
if sys.argv[5] == "groups":
    settings |= {"loss_type": "dpo-pref"}
arguments = kind(output, per_device_train_batch_size=2, **settings)  # before the model: its weights come in pieces
trainer = trainer_class(
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
    args=arguments,
    train_dataset=Dataset.from_list(rows),
    processing_class=AutoTokenizer.from_pretrained(model),
    **lora,
)
assert not arguments.precompute_ref_log_probs  # the data is in the memory of each process
trainer.train()
if arguments.process_index == 0:
    log = [{k: entry[k] for k in ("loss", "grad_norm")} for entry in trainer.state.log_history if "loss" in entry]
    print("LOG " + json.dumps(log), flush=True)
"""

UNEVEN = """
import json, sys
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from exo_fast.integrations.trl import ExoDPOConfig, ExoDPOTrainer

model, output, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for count, accumulation, size in json.loads(sys.argv[4]):
    rows = Dataset.from_list(json.loads(sys.argv[5])[:count])
    arguments = ExoDPOConfig(
        output, per_device_train_batch_size=size, per_device_eval_batch_size=size,
        gradient_accumulation_steps=accumulation, **settings,
    )
    trainer = ExoDPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), args=arguments, train_dataset=rows,
        eval_dataset=rows, processing_class=AutoTokenizer.from_pretrained(model),
        compute_metrics=lambda given: {"mean": float(given.predictions.mean()), "rows": len(given.label_ids)},
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry] + [trainer.evaluate()]
    weights = sum((i + 1) * float(p.detach().double().sum()) for i, p in enumerate(trainer.model.parameters()))
    if arguments.process_index == 0:
        print("LOG " + json.dumps([*log, {"weights": weights}]), flush=True)
"""

SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
import trl.trainer.utils as utils
from exo_fast.integrations.trl.patch import fused_lm_head

dist.init_process_group("gloo")
rank = dist.get_rank()
options = {"memory_budget": None, "backend": "auto"}
ids = torch.randint(4, 17, (2, 2, 2, 9), generator=torch.Generator().manual_seed(0))  # batch, rank, row, token
ids[1, :, 1, :5] = ids[1, :, 0, :5]  # two rows of one prompt: in the first batch on rank 0 alone, then on both
ids[0, 0, 1, :5] = ids[0, 0, 0, :5]
labels = ids.clone()
labels[..., :5] = -100

def build():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    fused_lm_head(utils.add_fused_lm_head, True, options)(model, outputs=("log_probs", "entropy"))
    return model

plain, sharded = build(), build()
for i, l in zip(ids.flatten(0, 1), labels.flatten(0, 1)):
    plain(input_ids=i, labels=l, fused_lm_head=True).log_probs.sum().backward()
for layer in sharded.model.layers:
    fully_shard(layer)
fully_shard(sharded)
for i, l in zip(ids[:, rank], labels[:, rank]):
    sharded(input_ids=i, labels=l, fused_lm_head=True).log_probs.sum().backward()
for (name, a), b in zip(plain.named_parameters(), sharded.parameters(), strict=True):
    torch.testing.assert_close(b.grad.full_tensor() * 2, a.grad, atol=1e-5, rtol=1e-5, msg=name)  # FSDP's is a mean
print("EQUAL", flush=True)
dist.destroy_process_group()
"""


def run(script: str, folder: Path, *arguments: str, processes: int = 2) -> str:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    return forked.run(path, *arguments, processes=processes)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["patched", "groups", "lora"])
def test_two_processes_equal_trl_in_one(tmp_path: Path, tiny_llama: str, what: str) -> None:
    """ZeRO-3, patched and with the loss over candidates; DDP with LoRA."""
    from peft import LoraConfig

    lora = {"peft_config": LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)}
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32),
        args=trl.DPOConfig(str(tmp_path / "one"), per_device_train_batch_size=4, **SETTINGS),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
        **(lora if what == "lora" else {}),
    )
    trainer.train()
    expected = [entry for entry in trainer.state.log_history if "loss" in entry]
    output = run(TRAINING, tmp_path, tiny_llama, str(tmp_path / "two"), json.dumps(ROWS), json.dumps(SETTINGS), what)
    found = json.loads(next(line for line in output.splitlines() if line.startswith("LOG "))[4:])
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


# Groups, micro-batches a step, and groups of a micro-batch in each of two processes: the last process of the last
# micro-batch has a row less than the others, or none.
UNEVEN_CUTS = [(7, 1, 2), (5, 1, 2), (7, 2, 1), (9, 2, 2)]


@pytest.mark.slow
def test_uneven_batches_in_two_processes_equal_one(tmp_path: Path, tiny_llama: str) -> None:
    """Rows that accelerate repeats in the last batch count once: in steps, in logs, in the evaluation."""
    texts = [
        {
            "prompt": " ".join(WORDS[i % 5 : i % 5 + 1 + i % 4]) + " ",
            "completions": [" ".join([*WORDS[(i * k) % 9 :][: 2 + (i + k) % 3], WORDS[k]]) for k in (1, 2, 4)],
            "rewards": [0.3 * i % 1, 0.1 * i, 0.5],
        }
        for i in range(9)
    ]
    settings = SETTINGS | {
        "loss_type": "exo-rw", "max_steps": -1, "num_train_epochs": 1, "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant", "precompute_ref_log_probs": False, "learning_rate": 5e-2,
    }  # fmt: skip

    def logs(processes: int, cuts: list) -> list:
        given = json.dumps(settings), json.dumps(cuts), json.dumps(texts)
        output = run(UNEVEN, tmp_path, tiny_llama, str(tmp_path / "out"), *given, processes=processes)
        return [json.loads(line[4:]) for line in output.splitlines() if line.startswith("LOG ")]

    whole = logs(1, [(count, 1, 2 * accumulation * size) for count, accumulation, size in UNEVEN_CUTS])
    for cut, mine, right in zip(UNEVEN_CUTS, logs(2, UNEVEN_CUTS), whole, strict=True):
        assert len(mine) == len(right), cut
        for found, expected in zip(mine, right, strict=True):
            names = {n for n in expected if "per_second" not in n and "time" not in n and n != "epoch"}
            assert names <= found.keys()
            for name in names:
                assert found[name] == pytest.approx(expected[name], rel=2e-4, abs=2e-5), (cut, name)


@pytest.mark.slow
def test_fsdp2_gradients(tmp_path: Path, tiny_llama: str) -> None:
    assert run(SHARDED, tmp_path, tiny_llama).count("EQUAL") == 2
