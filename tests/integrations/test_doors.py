"""Every door gives a row the same token ids and the same log-prob: a table of doors × rows.

Doors: `align`, `logprobs`, `sft`, `score` (its function sees the text), and ExoDPOTrainer, whose rows have been through
Arrow. Rows: those that preference trainers are known to have read wrongly.
"""

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import chat_forms
import chats
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase, set_seed

pytest.importorskip("trl")

from exo_fast.data.tokens import Tokens
from exo_fast.integrations.trl import ExoDPOConfig, ExoDPOTrainer
from exo_fast.integrations.trl.candidates import CandidateRows
from exo_fast.training.data.examples import load_examples, load_prompts, load_samples, load_sft
from exo_fast.training.data.groups import tokenize
from exo_fast.training.data.places import Source
from exo_fast.training.errors import InputError
from exo_fast.training.inference.config import encode_prompts
from exo_fast.training.inference.log_probs import tokenize_rows
from exo_fast.training.stages.align import AlignConfig, align
from exo_fast.training.stages.logprobs import LogprobsConfig, logprobs
from exo_fast.training.stages.score import ScoreConfig, score

LENGTHS = {"max_seq_len": 1500, "max_gen_len": 500}


def say(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


USER = {"role": "user", "content": "hello"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TURNS = [say("good"), {"role": "user", "content": "tool call"}, say("long film")]
ROWS: dict[str, dict[str, Any]] = {
    "a pair": {"prompt": [USER], "chosen": [say("good")], "rejected": [say("long")]},
    "a call beside an answer": {"prompt": [USER], "chosen": [say("", tool_calls=[CALL])], "rejected": [say("good")]},
    "an answer that was begun": {
        "prompt": [USER, say("the film")],
        "completions": [[say(" was good")], [say(" was long")]],
        "rewards": [1, 0],
    },
    "line breaks at the boundary": {"prompt": [USER], "chosen": [say("\n\nthe film")], "rejected": [say("\nlong")]},
    "several turns": {"prompt": [USER], "completions": [TURNS, [say("x")]], "rewards": [True, False]},
    "results of tools": {
        "prompt": [USER],
        "completions": [[say("", tool_calls=[CALL]), {"role": "tool", "content": "3"}, say("good")], [say("x")]],
        "rewards": [1.0, 0.5],
    },
    "tools as text": {
        "prompt": [USER],
        "chosen": [say("good")],
        "rejected": [say("long")],
        "tools": '[{"name": "f", "parameters": {"a": {"type": "int"}}}]',
    },
    "ShareGPT's preference": {
        "conversations": [{"from": "human", "value": "hello"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "long"},
    },
    "Alpaca's preference": {"instruction": "hello", "input": "", "chosen": "good", "rejected": "long"},
    "text": {"prompt": "hello", "chosen": " world", "rejected": "\n\nfilm"},
    "text of which parts count": {
        "prompt": "hello",
        "completions": [" the film was good", " film"],
        "rewards": [1, 0],
        "completion_spans": [[[0, 9], [13, 18]], [[0, 5]]],
    },
}
TEMPLATES = ["CHATML", "THINKING", "MARKED", "OTHER_ENDS", "PLAIN", "ZEPHYR"]
NO_CALLS = {(name, template) for name in ("a call beside an answer", "results of tools") for template in TEMPLATES}
NO_CALLS -= {(name, "OTHER_ENDS") for name, _ in NO_CALLS} | {("a call beside an answer", "THINKING")}


def file_of(row: dict[str, Any], folder: Path) -> Source:
    (folder / "train.jsonl").write_text(json.dumps(row))
    return Source(folder / "train.jsonl")


def by_align(row: dict[str, Any], tokenizer: Any, folder: Path) -> Tokens:
    examples = load_examples(file_of(row, folder), loss_type="exo-rw", num_contrastive=None, tokenizer=tokenizer)
    group = tokenize(examples, tokenizer, num_contrastive=None, progress=False, **LENGTHS).group(0)
    return Tokens(group.prompt, group.completions, group.learned)


def by_logprobs(row: dict[str, Any], tokenizer: Any, folder: Path) -> Tokens:
    (found,) = tokenize_rows(load_samples(file_of(row, folder), tokenizer=tokenizer), tokenizer, **LENGTHS)
    return Tokens(found.group.prompt, found.group.completions, found.group.learned)


def by_trl(row: dict[str, Any], tokenizer: Any, folder: Path) -> Tokens:
    # A second row, with keys of its own, so that Arrow fills up the first one's with nulls.
    other = {**row, "tools": '[{"name": "g", "parameters": {"b": null}}]', "extra": {"only": "here"}}
    data = CandidateRows(tokenizer, "train", "exo-rw").prepared(Dataset.from_list([row, other]))
    marks = data[0]["candidate_masks"]
    return Tokens(data[0]["prompt_ids"], data[0]["candidate_ids"], None if all(map(all, marks)) else marks)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ROWS)
def test_every_door_gives_the_same_ids(name: str, template: str, tmp_path: Path) -> None:
    if (name, template) in NO_CALLS:
        with pytest.raises(InputError, match=r"writes nothing of what the assistant says|an empty completion"):
            by_align(ROWS[name], chats.byte_level(getattr(chats, template)), tmp_path)
        return
    make = chats.metaspace if template == "ZEPHYR" else chats.byte_level
    tokenizer = make(getattr(chats, template))
    found = [door(ROWS[name], tokenizer, tmp_path) for door in (by_align, by_logprobs, by_trl)]
    assert found[1] == found[0]
    assert found[2] == found[0]
    # The rows begin with the prompt of generate, unless a template writes less before some answer.
    source = file_of({key: value for key, value in ROWS[name].items() if key != "completions"}, tmp_path)
    ((asked, _),) = encode_prompts(tokenizer, load_prompts(source, tokenizer=tokenizer), [1500])
    assert asked[: len(found[0].prompt)] == found[0].prompt
    # Fine-tuning on the first candidate learns the tokens that count in it.
    first = ROWS[name].get("completions", [ROWS[name].get("chosen")])[0]
    if name not in ("text of which parts count", "a call beside an answer", "line breaks at the boundary"):
        row = {key: value for key, value in ROWS[name].items() if key not in ("completions", "rejected", "chosen")}
        (example,) = load_sft(file_of({**row, "chosen": first}, tmp_path), tokenizer=tokenizer)
        group = tokenize([example], tokenizer, num_contrastive=1, progress=False, **LENGTHS).group(0)
        assert group.prompt[: len(found[0].prompt)] == found[0].prompt
        assert (group.prompt + group.completions[0]) == found[0].prompt + found[0].candidates[0]


DOORS = {"align": by_align, "logprobs": by_logprobs, "ExoDPOTrainer": by_trl}
DRAWN = {
    "text": {"prompt": "hello", "completions": ["good", "long"], "rewards": [1, 0]},
    "a conversation": {"prompt": [USER], "completions": [[say("good")], [say("long")]], "rewards": [1, 0]},
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", DRAWN)
def test_ids_that_were_drawn_are_the_same_at_every_door(name: str, door: str, tmp_path: Path) -> None:
    """The first was ended by the model, the second cut short; and ids that another tokenizer drew are refused."""
    tokenizer = chats.byte_level(chats.CHATML)
    ended, cut, foreign = tokenizer(["good<|im_end|>", "long", "film"], add_special_tokens=False)["input_ids"]
    own = DOORS[door]({**DRAWN[name], "completion_ids": [ended, cut]}, tokenizer, tmp_path)
    assert own == Tokens(own.prompt, [ended, cut], None)
    with pytest.raises(ValueError, match=r"row .*field `completion_ids\[1\]`.*makes 'film' of it.*another model\?"):
        DOORS[door]({**DRAWN[name], "completion_ids": [ended, foreign]}, tokenizer, tmp_path)


def model_of(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    set_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def plain_logps(model: str, tokens: Tokens) -> list[float]:
    """Return log-probs by transformers' own logits, one sequence at a time."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    values = []
    for k, ids in enumerate(tokens.candidates):
        whole = torch.tensor([tokens.prompt + ids])
        logps = torch.log_softmax(loaded(whole).logits[0, :-1].double(), -1).gather(1, whole[0, 1:, None])[:, 0]
        marks = torch.tensor(tokens.learned[k] if tokens.learned else [True] * len(ids))
        values.append(logps[len(tokens.prompt) - 1 :][marks].sum().item())
    return values


SCORER = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from exo_fast.data.examples import Example
from exo_fast.data.tokens import RowTokenizer

MODEL = {model!r}

def logps(prompts, completions):
    model, rows = AutoModelForCausalLM.from_pretrained(MODEL), RowTokenizer(AutoTokenizer.from_pretrained(MODEL))
    examples = [Example(None, p, [c], [0.0]) for p, c in zip(prompts, completions, strict=True)]
    values = []
    for tokens in rows.tokens(examples):
        ids = torch.tensor([tokens.prompt + tokens.candidates[0]])
        found = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        values.append(found[len(tokens.prompt) - 1 :].sum().item())
    return values
"""
CHAT = {"prompt": [USER], "chosen": [say("The film was good.\n\nthe")], "rejected": [say("\n\n the film")]}


def doors_logps(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path, patch: Any) -> dict[str, Any]:
    """The sequence log-probs of the row's candidates by each door."""
    model = model_of(tokenizer, folder / "model")
    (folder / "data").mkdir()
    source = file_of(row, folder / "data")
    found: dict[str, Any] = {"plain": plain_logps(model, by_align(row, tokenizer, folder))}
    quiet = {"use_cpu": True, "disable_tqdm": True}
    options = {"model_name_or_path": model, "data": str(source.path), **LENGTHS, **quiet}
    logprobs(LogprobsConfig(**options, output_dir=str(folder / "logps")))
    found["logprobs"] = json.loads((folder / "logps" / "train.json").read_text())[0]["logprobs"]
    training = {"report_to": "none", "save_strategy": "no", "max_steps": 1, "logging_steps": 1, "learning_rate": 1e-3}
    summary = align(
        AlignConfig(
            **options,
            **training,
            loss_type="exo-rw",
            engine="torch",
            output_dir=str(folder / "run"),
            reference_cache_dir=str(folder / "cache"),
        )
    )
    log = summary["metrics"]["train"]["first"]
    found["align"] = [log["logps/chosen"], log["logps/rejected"]]
    arguments = ExoDPOConfig(
        str(folder / "trl"),
        loss_type="exo-rw",
        bf16=False,
        max_length=1500,
        **training,
        use_cpu=True,
        disable_tqdm=True,
    )
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trainer = ExoDPOTrainer(loaded, args=arguments, train_dataset=Dataset.from_list([row]), processing_class=tokenizer)
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "logps/chosen" in entry)
    found["ExoDPOTrainer"] = [log["logps/chosen"], log["logps/rejected"]]
    (folder / "doors_scorer.py").write_text(textwrap.dedent(SCORER.format(model=model)))
    patch.chdir(folder)
    patch.setattr(sys, "path", sys.path[:])
    patch.delitem(sys.modules, "doors_scorer", raising=False)
    scorer = {"function": "doors_scorer:logps", "tokenizer": model}
    score(ScoreConfig(**scorer, data=str(source.path), output_dir=str(folder / "scores"), **quiet))
    found["score"] = json.loads((folder / "scores" / "train.json").read_text())[0]["rewards"]
    return found


@pytest.mark.parametrize("form", ["chatml", "llama-3", "gemma", "mistral", "qwen3-thinking", "qwen2.5-tools"])
def test_every_door_gives_the_same_log_prob(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equality to 1e-4 nats in float32, on rows whose boundaries melt, with tools if the form has them."""
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]} if "tools" in form else {}
    found = doors_logps({**CHAT, **tools}, chat_forms.chat_tokenizer(form), tmp_path, monkeypatch)
    for door, values in found.items():
        assert values == pytest.approx(found["plain"], abs=1e-4), door
    assert abs(found["plain"][0] - found["plain"][1]) > 1


def test_every_door_leaves_out_the_words_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but score's function, which sees a text and no spans."""
    row = {"prompt": [USER], "completions": [TURNS, [say("x")]], "rewards": [1, 0]}
    found = doors_logps(row, chats.byte_level(chats.CHATML), tmp_path, monkeypatch)
    del found["score"]
    for door, values in found.items():
        assert values == pytest.approx(found["plain"], abs=1e-4), door
