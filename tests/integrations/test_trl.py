"""TRL's trainers with and without the fused path: the same losses, metrics and weights."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import pytest
import torch

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'exo_fast[trl]'")

from datasets import Dataset, IterableDataset
from device_work import OnDevice, on_device
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging
from trl_runs import candidates, config, exact_logps, pairs, run

from exo_fast import reference
from exo_fast.integrations.trl import (
    ExoDPOConfig,
    ExoDPOTrainer,
    patch,
    patch_trl,
    tokenize_candidates,
    unpatch_trl,
)
from exo_fast.integrations.trl.shared_rows import share_rows


def difference(found: dict, expected: dict) -> float:
    """Largest difference of the weights."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in found)


@pytest.fixture(autouse=True)
def unpatched() -> Any:
    yield
    unpatch_trl()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
        {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5},
        {"loss_type": ["ipo"], "use_weighting": True},
        {"precompute_ref_log_probs": True},
        {"max_length": 14, "gradient_accumulation_steps": 2, "gradient_checkpointing": False},
        {"bf16": True},
    ],
    ids=["sigmoid", "exo_pair", "two losses", "weighted", "precomputed", "truncated", "bf16"],
)
def test_patched_dpo_gives_the_same_log_and_weights(tmp_path: Path, tiny_llama: str, options: dict) -> None:
    expected, weights = run(trl.DPOTrainer, config(tmp_path / "a", **options), tiny_llama, pairs())
    patch_trl()
    found, patched = run(trl.DPOTrainer, config(tmp_path / "b", **options), tiny_llama, pairs())
    tolerance = 2e-2 if options.get("bf16") else 2e-5
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name in theirs.keys() - {
            "epoch",
            "learning_rate",
            *(["rewards/accuracies"] if options.get("bf16") else []),
        }:
            assert mine[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), name
    assert difference(patched, weights) < (5e-3 if options.get("bf16") else 2e-5)


def test_prompts_are_shared_and_the_model_runs_fewer_tokens(tmp_path: Path, tiny_llama: str) -> None:
    seen = []

    class Counting(trl.DPOTrainer):
        def __init__(self, model: Any, **named: Any):
            model.model.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
            )
            super().__init__(model, **named)

    data = pairs(1)
    prompt, chosen, rejected = (len(data[0][name].split()) * 2 for name in ("prompt", "chosen", "rejected"))
    tokens = 1 + prompt + chosen + rejected  # <s>, words with a space after each, the last one's being </s>
    settings = {"max_steps": 1, "per_device_train_batch_size": 1, "gradient_checkpointing": False}
    patch_trl()
    run(Counting, config(tmp_path / "a", **settings), tiny_llama, data)
    assert seen[-1] == tokens
    patch_trl(share_prompts=False)
    run(Counting, config(tmp_path / "b", **settings), tiny_llama, data)
    assert seen[-1] == 2 * (1 + prompt + max(chosen, rejected))


def test_lora(tmp_path: Path, tiny_llama: str) -> None:
    from peft import LoraConfig

    lora = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}
    expected, weights = run(trl.DPOTrainer, config(tmp_path / "a"), tiny_llama, pairs(), **lora)
    patch_trl()
    found, patched = run(trl.DPOTrainer, config(tmp_path / "b"), tiny_llama, pairs(), **lora)
    assert [e["loss"] for e in found] == pytest.approx([e["loss"] for e in expected], rel=1e-5)
    assert difference(patched, weights) < 2e-5


def test_kto(tmp_path: Path, tiny_llama: str) -> None:
    rows = pairs(8).to_list()
    data = Dataset.from_list(
        [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(rows)]
    )
    settings = {"kind": trl.KTOConfig, "per_device_train_batch_size": 4}
    expected, weights = run(trl.KTOTrainer, config(tmp_path / "a", **settings), tiny_llama, data)
    patch_trl()
    found, patched = run(trl.KTOTrainer, config(tmp_path / "b", **settings), tiny_llama, data)
    assert [e["loss"] for e in found] == pytest.approx([e["loss"] for e in expected], rel=1e-5)
    assert difference(patched, weights) < 2e-5


def grpo(path: Path, model: str, name: str = "GRPO", **options: Any) -> tuple[list[dict], dict]:
    data = Dataset.from_list([{"prompt": row["prompt"]} for row in pairs(8)])

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text) % 7) for text in completions]

    settings = {"num_generations": 4, "max_completion_length": 6, "per_device_train_batch_size": 4, "beta": 0.1}
    arguments = config(path, getattr(trl, f"{name}Config"), max_steps=2, **settings, **options)
    return run(getattr(trl, f"{name}Trainer"), arguments, model, data, reward_funcs=reward)


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_online(tmp_path: Path, tiny_llama: str, name: str) -> None:
    expected, weights = grpo(tmp_path / "a", tiny_llama, name)
    patch_trl()
    found, patched = grpo(tmp_path / "b", tiny_llama, name)
    for mine, theirs in zip(found, expected, strict=True):
        for name in ("loss", "entropy", "reward", "kl", "completions/mean_length"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    assert difference(patched, weights) < 1e-4


def test_an_entropy_bonus_is_an_error_and_not_silently_left_out(tmp_path: Path, tiny_llama: str) -> None:
    patch_trl(trainers=["grpo"])
    with pytest.raises(RuntimeError, match="entropy_coef"):
        grpo(tmp_path, tiny_llama, entropy_coef=0.1)


def test_sft(tmp_path: Path, tiny_llama: str) -> None:
    data = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(8)])
    expected, weights = run(trl.SFTTrainer, config(tmp_path / "a", trl.SFTConfig), tiny_llama, data)
    patch_trl()
    found, patched = run(trl.SFTTrainer, config(tmp_path / "b", trl.SFTConfig), tiny_llama, data)
    for mine, theirs in zip(found, expected, strict=True):
        for name in ("loss", "entropy", "mean_token_accuracy"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert difference(patched, weights) < 2e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "cohere", "granite", "phi", "qwen3_moe", "opt"])
def test_the_forward_is_trls_over_families(model_type: str, side: str) -> None:
    """Every number that TRL reads off a model, and the gradients, on rows of one prompt that are padded on a side."""
    from trl.trainer.utils import add_fused_lm_head

    outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    draw = torch.Generator().manual_seed(1)
    prompt, lengths = 4, (5, 3, 4, 6)
    ids = torch.zeros(4, prompt + 6, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    shared = torch.randint(3, families.VOCAB, (2, prompt), generator=draw)
    for row, length in enumerate(lengths):
        start = 6 - length if side == "left" else 0
        completion = torch.randint(3, families.VOCAB, (length,), generator=draw)
        ids[row, start : start + prompt + length] = torch.cat([shared[row // 2], completion])
        mask[row, start : start + prompt + length] = 1
        labels[row, start + prompt : start + prompt + length] = completion
    labels[1, labels[1] >= 0] = torch.where(torch.arange(3) == 1, -100, labels[1, labels[1] >= 0])  # a tool's answer

    def numbers(fuse: Any) -> tuple[Any, dict]:
        model = families.tiny_model(model_type)
        fuse(model)
        out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        (out.loss + out.log_probs.square().sum()).backward()
        return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, gradients = numbers(lambda model: add_fused_lm_head(model, temperature=0.7, outputs=outputs))
    options = {"memory_budget": None, "backend": "auto"}
    ours = patch.fused_lm_head(add_fused_lm_head, True, options)
    found, found_gradients = numbers(lambda model: ours(model, temperature=0.7, outputs=outputs))
    for name in ("loss", *outputs, "label_mask"):
        torch.testing.assert_close(found[name], expected[name], atol=2e-5, rtol=2e-5, msg=lambda t, n=name: f"{n}: {t}")
    assert found_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            found_gradients[name], gradient, atol=1e-4, rtol=1e-3, msg=lambda t, n=name: f"{n}: {t}"
        )


@pytest.mark.parametrize(("implementation", "shares"), [("eager", False), ("sdpa", True)])
def test_a_dense_mask_that_costs_more_than_prompts_save_is_not_made(implementation: str, shares: bool) -> None:
    """Eight completions of 3 tokens behind one prompt token: a row of 25 tokens, in place of eight of 4."""
    from trl.trainer.utils import add_fused_lm_head

    model = families.tiny_model("llama")
    model.set_attn_implementation(implementation)
    patch.fused_lm_head(add_fused_lm_head, True, {"memory_budget": None, "backend": "auto"})(model)
    ids = torch.randint(3, families.VOCAB, (8, 4), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = 5
    labels = ids.masked_fill(torch.arange(4) == 0, -100)
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].shape), with_kwargs=True
    )
    found = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    assert seen[-1] == ((1, 25) if shares else (8, 4))
    exact = torch.log_softmax(model(ids).logits[:, :-1], dim=-1).gather(2, ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)


def test_tools_are_part_of_the_prompt(tiny_llama: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = (
        "{% if tools %}{{ tools[0]['name'] }} {% endif %}{% for m in messages %}{{ m['content'] }} {% endfor %}"
    )
    row = {"prompt": [{"role": "user", "content": "good"}], "completions": ["bad", "dull"], "rewards": [1.0, 0.0]}
    for tools in ([{"name": "film"}], '[{"name": "film"}]'):
        made = tokenize_candidates({**row, "tools": tools}, tokenizer)
        assert tokenizer.decode(made["prompt_ids"]).split()[-2:] == ["film", "good"]
    assert "film" not in tokenizer.decode(tokenize_candidates(row, tokenizer)["prompt_ids"])


def test_rows_of_a_group_keep_their_order() -> None:
    """Prompts that were cut to different lengths, A B A: sharing would pair rewards with other candidates."""
    ids = torch.tensor([[5, 6, 7, 8], [9, 6, 7, 8], [5, 6, 7, 4]])
    labels = ids.clone()
    labels[:, :2] = -100
    assert share_rows(ids, None, labels, candidates=3) is None
    assert share_rows(ids, None, labels).places.tolist() == [1, 2, 7, 8, 4, 5]
    for mask in (None, torch.ones_like(ids), torch.ones_like(ids).bool()):
        OnDevice.reads.clear()
        batch = on_device({"ids": ids, "mask": mask, "labels": labels})
        assert share_rows(*batch.values()).places.tolist() == [1, 2, 7, 8, 4, 5]
        assert OnDevice.reads == {"cpu": 1}  # of the batch, in one wait


def test_candidates_whose_prompts_are_cut_differently(tmp_path: Path, tiny_llama: str) -> None:
    settings = {"loss_type": "exo-rw", "max_length": 9, "truncation_mode": "keep_end", "max_steps": 2}
    found, _ = run(ExoDPOTrainer, config(tmp_path / "a", ExoDPOConfig, **settings), tiny_llama, candidates())
    plain = config(tmp_path / "b", ExoDPOConfig, share_prompts=False, **settings)
    expected, _ = run(ExoDPOTrainer, plain, tiny_llama, candidates())
    assert [e["loss"] for e in found] == pytest.approx([e["loss"] for e in expected], rel=1e-5)


def test_reference_log_probs_are_those_of_this_max_length(tmp_path: Path, tiny_llama: str) -> None:
    """TRL's cache lies beside data on a disk, under a name that does not know where rows were cut."""
    pairs().save_to_disk(tmp_path / "data")
    for length in (8, 14):
        settings = {"max_length": length, "truncation_mode": "keep_end", "max_steps": 1}
        data = Dataset.load_from_disk(tmp_path / "data")
        log, _ = run(ExoDPOTrainer, config(tmp_path / str(length), ExoDPOConfig, **settings), tiny_llama, data)
        assert log[0]["kl"] == pytest.approx(0, abs=1e-5)


def test_undo_and_settings(tiny_llama: str) -> None:
    from trl.trainer import dpo_trainer, kto_trainer

    before = dpo_trainer.add_fused_lm_head
    patch_trl(trainers=["dpo"])
    patch_trl(trainers=["dpo"], share_prompts=False)
    assert dpo_trainer.add_fused_lm_head is not before
    assert kto_trainer.add_fused_lm_head is before
    unpatch_trl()
    unpatch_trl()
    assert dpo_trainer.add_fused_lm_head is before
    with pytest.raises(ValueError, match="'ppo' is not one of dpo, kto, grpo, rloo, sft"):
        patch_trl(trainers=["ppo"])


@pytest.mark.parametrize("version", ["1.14.2", "1.17.0", "2.0.0"])
def test_another_version_of_trl_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(ImportError, match=rf"trl {version}: .* tested with 1\.15\.x, 1\.16\.x"):
        patch.check_version()


def test_a_model_that_is_not_known_keeps_trls_head(tmp_path: Path, tiny_llama: str, caplog: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.config.model_type = "something_new"
    patch_trl()
    from transformers.utils import logging

    logging.enable_propagation()
    trl.DPOTrainer(
        model,
        ref_model=AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32),
        args=config(tmp_path),
        train_dataset=pairs(),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
    )
    assert "keeps TRL's head: model type 'something_new'" in caplog.text


# ExoDPOTrainer --------------------------------------------------------------------------------------------------------


def test_pairs_by_our_loss_are_trls_exo_pair(tmp_path: Path, tiny_llama: str) -> None:
    theirs = config(tmp_path / "a", loss_type=["exo_pair"], label_smoothing=1e-3)
    expected, weights = run(trl.DPOTrainer, theirs, tiny_llama, pairs())
    found, ours = run(ExoDPOTrainer, config(tmp_path / "b", ExoDPOConfig), tiny_llama, pairs())
    for mine, other in zip(found, expected, strict=True):
        for name in ("loss", "rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    assert difference(ours, weights) < 2e-5


def test_pairs_by_trls_loss(tmp_path: Path, tiny_llama: str) -> None:
    expected, weights = run(trl.DPOTrainer, config(tmp_path / "a", loss_type=["hinge"]), tiny_llama, pairs())
    ours = config(tmp_path / "b", ExoDPOConfig, loss_type="hinge")
    assert ours.label_smoothing == 0.0
    found, weights_of_ours = run(ExoDPOTrainer, ours, tiny_llama, pairs())
    assert ours.precompute_ref_log_probs is True
    assert found[-1].keys() == expected[-1].keys()
    assert [e["loss"] for e in found] == pytest.approx([e["loss"] for e in expected], rel=1e-5)
    assert difference(weights_of_ours, weights) < 2e-5


@pytest.mark.parametrize("precomputed", [True, False])
@pytest.mark.parametrize("loss_type", ["exo-rw", "dpo-rw", "exo-pref", "sigmoid"])
def test_candidates(tmp_path: Path, tiny_llama: str, loss_type: str, precomputed: bool) -> None:
    """The first step's loss, gradient norm and metrics against full logits, and shared against ordinary rows."""
    data = candidates()
    settings = {
        "loss_type": loss_type,
        "precompute_ref_log_probs": precomputed,
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "max_grad_norm": 1e9,
    }
    log, weights = run(ExoDPOTrainer, config(tmp_path / "a", ExoDPOConfig, **settings), tiny_llama, data)
    unshared = config(tmp_path / "b", ExoDPOConfig, share_prompts=False, **settings)
    plain, plain_weights = run(ExoDPOTrainer, unshared, tiny_llama, data)
    assert [e["loss"] for e in log] == pytest.approx([e["loss"] for e in plain], rel=1e-5)
    assert difference(weights, plain_weights) < 2e-5

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    policy = exact_logps(model, tokenizer, data)
    ours = {"sigmoid": "dpo-pref"}.get(loss_type, loss_type)
    smoothing = 1e-3 if ours == "exo-pref" else 0.0
    rewards = torch.tensor(data["rewards"], dtype=torch.float64)
    loss = reference.group_loss(policy, policy.detach(), rewards, loss_type=ours, label_smoothing=smoothing).mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert log[0]["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert log[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    best = policy.gather(1, rewards.argmax(1, keepdim=True)).mean()
    assert log[0]["logps/chosen"] == pytest.approx(float(best), rel=1e-5)
    assert log[1]["kl"] != 0


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("name", ["mamba", "llama", "float32 head"])
def test_hidden_states_of_another_dtype_than_the_head(name: str, cast: bool) -> None:
    """Compare float32 states in a bf16 Mamba, and bf16 states below a float32 head: as the model's lm_head multiplies
    them, or all in float32 where TRL asks for that."""
    from trl.trainer.utils import add_fused_lm_head

    model = families.tiny_model("mamba" if name == "mamba" else "llama", dtype=torch.bfloat16)
    if name == "float32 head":
        model.lm_head.float()
    ids = torch.randint(3, families.VOCAB, (4, 9), generator=torch.Generator().manual_seed(2))
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    hidden = model.base_model(input_ids=ids).last_hidden_state[:, :-1]
    assert hidden.dtype == (torch.float32 if name == "mamba" else torch.bfloat16)
    operands = hidden if cast else hidden.to(model.lm_head.weight.dtype)
    expected = reference.linear_logprobs(operands, model.lm_head.weight, labels[:, 1:])

    ours = patch.fused_lm_head(add_fused_lm_head, True, {"memory_budget": None, "backend": "auto"})
    ours(model, cast_lm_head_to_fp32=cast)
    found = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    loss = {"loss_type": "exo-rw", "beta_pi": 0.1, "beta_r": 0.1, "label_smoothing": 0.0}
    host = {"labels": labels.numpy(), "input_ids": ids.numpy()}
    groups = {"host": host, "ref_logps": torch.zeros(2, 2), "rewards": torch.rand(2, 2), "loss": loss}
    plain = reference.linear_logprobs(hidden.to(model.lm_head.weight.dtype), model.lm_head.weight, labels[:, 1:])
    logps = model(input_ids=ids, fused_groups=groups).logits
    torch.testing.assert_close(logps, plain.sum(1).view(2, 2), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("cast", [False, True])
def test_a_slice_of_the_head_goes_with_its_group(cast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's AutoTP has the group beside the weight. Cast to float32, nothing else tells that it is a slice."""
    from trl.trainer.utils import add_fused_lm_head

    from exo_fast.integrations.trl import forward

    seen = []

    def refuse(*_: Any, process_group: Any, **__: Any) -> None:
        seen.append(process_group)
        raise RuntimeError("asked")

    for name in ("linear_logprobs", "linear_group_loss"):
        monkeypatch.setattr(forward, name, refuse)
    ids = torch.randint(3, families.VOCAB, (4, 9), generator=torch.Generator().manual_seed(2))
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    loss = {"loss_type": "exo-rw", "beta_pi": 0.1, "beta_r": 0.1, "label_smoothing": 0.0}
    host = {"labels": labels.numpy(), "input_ids": ids.numpy()}
    groups = {"host": host, "ref_logps": torch.zeros(2, 2), "rewards": torch.rand(2, 2), "loss": loss}
    ours = patch.fused_lm_head(add_fused_lm_head, False, {"memory_budget": None, "backend": "auto"})
    for outputs, asked in ((("log_probs",), {"labels": labels, "fused_lm_head": True}), ((), {"fused_groups": groups})):
        model = families.tiny_model("llama")
        ours(model, cast_lm_head_to_fp32=cast, outputs=outputs)
        model.lm_head.mp_group = group = object()
        with pytest.raises(RuntimeError, match="asked"):
            model(input_ids=ids, **asked)
        assert seen.pop() is group
    model = families.tiny_model("llama")
    ours(model, cast_lm_head_to_fp32=cast, outputs=("log_probs", "entropy"))
    model.lm_head.mp_group = object()
    with pytest.raises(ValueError, match="a slice of the head, and statistics are of the whole vocabulary"):
        model(input_ids=ids, labels=labels, fused_lm_head=True)


# --- positions that depend on a text's length: every row's numbers are those that it has alone ---

BY_LENGTH = ("gemma3-dynamic", "llama-dynamic", "phi3-longrope", "phimoe-longrope")  # beyond 12 tokens


@pytest.mark.parametrize("layout", ["left", "right", "both sides", "no mask", "positions", "two texts a row"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", BY_LENGTH)
def test_rows_are_run_as_each_alone(name: str, share: bool, layout: str) -> None:
    from trl.trainer.utils import add_fused_lm_head

    draw = torch.Generator().manual_seed(1)
    shared = torch.randint(3, families.VOCAB, (2, 4), generator=draw)
    # Two prompts of three rows, on both sides of the limit and on it, and what is behind a row's last label.
    lengths = (5, 8, 12, 3, 9, 8) if layout != "no mask" else (12,) * 6
    texts = [
        torch.cat([shared[row // 3], torch.randint(3, families.VOCAB, (length,), generator=draw)])
        for row, length in enumerate(lengths)
    ]
    if layout == "two texts a row":
        texts = [texts[0], texts[2]]
    width = 12 + 4 + (2 if layout == "both sides" else 0)
    rows = 1 if layout == "two texts a row" else len(texts)
    width = sum(map(len, texts)) if layout == "two texts a row" else width
    ids, mask = torch.zeros(rows, width, dtype=torch.long), torch.zeros(rows, width, dtype=torch.long)
    labels, positions = torch.full_like(ids, -100), torch.zeros_like(ids)
    places = []
    for row, text in enumerate(texts):
        start = {"left": width - len(text), "both sides": 1}.get(layout, 0)
        at, start = (0, len(texts[0]) * row) if layout == "two texts a row" else (row, start)
        span = slice(start, start + len(text))
        ids[at, span], mask[at, span], positions[at, span] = text, 1, torch.arange(len(text))
        stop = start + len(text) - (2 if row == 2 else 0)  # of one over the limit, labels end before it
        labels[at, start + 4 : stop] = ids[at, start + 4 : stop]
        places.append((at, start, stop - start))
    inputs: dict[str, Any] = {"input_ids": ids, "labels": labels}
    inputs |= {"positions": {"attention_mask": mask, "position_ids": positions}, "no mask": {}}.get(
        layout, {"position_ids": positions} if layout == "two texts a row" else {"attention_mask": mask}
    )
    model = families.tiny_model(name, attn_implementation="eager")
    patch.fused_lm_head(add_fused_lm_head, share, {"memory_budget": None, "backend": "auto"})(model)
    found = model(**inputs, fused_lm_head=True).log_probs
    for text, (at, start, length) in zip(texts, places, strict=True):
        with torch.no_grad():
            rows_of_text = families.tiny_model(name)(input_ids=text[None]).logits[0, :-1].log_softmax(-1)
        expected = rows_of_text.gather(1, text[1:, None]).squeeze(1)[3 : length - 1]
        torch.testing.assert_close(found[at, start + 3 : start + length - 1], expected, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("name", BY_LENGTH)
def test_an_untrained_policy_is_its_own_precomputed_reference(tokenizer: Any, tmp_path: Path, name: str) -> None:
    """References are computed in other batches, with other neighbours."""
    model = tmp_path / "model"
    quiet = {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0} if "phimoe" in name else {}  # drawn in training
    families.tiny_model(name, **quiet).save_pretrained(model)
    tokenizer.save_pretrained(model)
    data = candidates(7)
    sizes = {
        len(tokenizer(row["prompt"] + text + "</s>")["input_ids"]) > 12 for row in data for text in row["completions"]
    }
    assert sizes == {True, False}
    for batch_size in (1, 4):
        for share in (True, False):
            settings = {
                "learning_rate": 0.0,
                "per_device_train_batch_size": batch_size,
                "precompute_ref_batch_size": 3,
                "precompute_ref_log_probs": True,
                "max_steps": 3,
            }
            ours = config(tmp_path / "a", ExoDPOConfig, loss_type="exo-rw", share_prompts=share, **settings)
            log, _ = run(ExoDPOTrainer, ours, str(model), data)
            assert [entry["kl"] for entry in log] == pytest.approx([0.0] * 3, abs=1e-5)
            patch_trl(share_prompts=share)
            log, _ = run(trl.DPOTrainer, config(tmp_path / "b", **settings), str(model), pairs(7))
            unpatch_trl()
            assert [entry["rewards/margins"] for entry in log] == pytest.approx([0.0] * 3, abs=1e-5)


def test_candidates_in_evaluation_and_lora(tmp_path: Path, tiny_llama: str) -> None:
    from peft import LoraConfig

    arguments = config(tmp_path, ExoDPOConfig, loss_type="exo-rw", eval_strategy="steps", eval_steps=2)
    policy = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    trainer = ExoDPOTrainer(
        policy,
        args=arguments,
        train_dataset=candidates(),
        eval_dataset=candidates(4),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    before = trainer.evaluate()
    assert before["eval_kl"] == pytest.approx(0, abs=1e-5)
    trainer.train()
    after = trainer.evaluate(candidates(4))
    assert after["eval_loss"] != before["eval_loss"]
    assert {"eval_rewards/margins", "eval_group_accuracy", "eval_group_entropy"} <= after.keys()


def test_conversations_of_candidates(tmp_path: Path, tiny_llama: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    text = candidates(2)
    chat = text.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"].strip()}],
            "completions": [[{"role": "assistant", "content": c}] for c in row["completions"]],
        },
        remove_columns=["prompt", "completions"],
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    arguments = config(tmp_path, ExoDPOConfig, loss_type="exo-rw")
    trainer = ExoDPOTrainer(model, args=arguments, train_dataset=chat, processing_class=tokenizer)
    row = trainer.train_dataset[0]
    # BOS, which the tokenizer puts before a text, and EOS, as this template ends turns in plain text.
    assert tokenizer.decode(row["prompt_ids"]).split() == ["<s>", *text[0]["prompt"].split()]
    assert [tokenizer.decode(ids).replace("</s>", " </s>").split() for ids in row["candidate_ids"]] == [
        [*c.split(), "</s>"] for c in text[0]["completions"]
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [0.0, 1.0]}, "row 1: field `rewards`, value .0.0, 1.0.: one number per completion is needed: 3"),
        ({"rewards": [0.0, float("nan"), 1.0]}, "a finite float32 number is needed"),
        ({"rewards": [1.0, 1.0, 0.0]}, "different candidates share the highest reward.*ties=share"),
        (
            {"completions": ["good", "bad"], "rewards": [1.0, 0.0]},
            "row 1: field `completions`, value .'good', 'bad'.: 2 candidates where the rows before have 3",
        ),
        ({"prompt": None}, "row 1: field `prompt`, value missing.*Rows have: prompt, completions, rewards"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, tiny_llama: str, change: dict, message: str) -> None:
    rows = candidates(3).to_list()
    rows[1].update(change)
    with pytest.raises(ValueError, match=message):
        run(ExoDPOTrainer, config(tmp_path, ExoDPOConfig), tiny_llama, Dataset.from_list(rows))


@pytest.mark.parametrize("loss_type", ["exo-rw", "hinge"])
@pytest.mark.parametrize("split", ["train", "eval", "stream", "part"])
def test_a_data_set_without_rows_is_named(tmp_path: Path, tiny_llama: str, split: str, loss_type: str) -> None:
    data = pairs(2)
    empty = data.select([])
    if split == "stream":
        empty = IterableDataset.from_generator(lambda: iter(()))
    sets = {
        "eval": {"train_dataset": data, "eval_dataset": empty},
        "part": {"train_dataset": data, "eval_dataset": {"other": data, "part": empty}},
    }.get(split, {"train_dataset": empty})
    name = {"stream": "train"}.get(split, split)
    with pytest.raises(ValueError, match=f"^{name} dataset: no rows; at least one is needed"):
        ExoDPOTrainer(
            AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32),
            args=config(tmp_path, ExoDPOConfig, loss_type=loss_type),
            processing_class=AutoTokenizer.from_pretrained(tiny_llama),
            **sets,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "hinge"}, "is a loss of pairs"),
        ({"loss_type": ["exo-rw", "sft"]}, "give it alone"),
        ({"loss_type": "exo-rw", "ld_alpha": 0.5}, "ld_alpha"),
        ({"loss_type": "exo-rw", "loss_weights": [3.0]}, "loss_weights=\\[3.0\\]"),
        ({"loss_type": "exo-pref", "label_smoothing": 0.0}, "label_smoothing"),
        ({"loss_type": "exo-rw", "beta_r": 0.0}, "beta_r"),
        ({"loss_type": "exo-rw", "backend": "tritn"}, "'tritn'"),
        ({"loss_type": "exo-rw", "num_contrastive": 1}, "num_contrastive=1: at least 2 candidates are compared"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, tiny_llama: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(ExoDPOTrainer, config(tmp_path, ExoDPOConfig, **options), tiny_llama, candidates())


def test_importing_exo_fast_does_not_import_trl() -> None:
    code = "import sys, exo_fast.loss, exo_fast.integrations; assert not {'trl', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_whose_generation_config_cannot_be_saved_is_saved(tmp_path: Path, tiny_llama: str) -> None:
    """Sampling values without do_sample: transformers loads them, and refuses to save them."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.generation_config.temperature = 0.9
    arguments = config(tmp_path, ExoDPOConfig, loss_type="exo-rw", max_steps=1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    trainer = ExoDPOTrainer(model, args=arguments, train_dataset=candidates(2), processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").exists()
    assert GenerationConfig.from_pretrained(tmp_path / "saved").do_sample


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, tiny_llama: str, caplog: Any) -> None:
    rows = candidates(5).to_list()
    rows[1]["completions"] = [rows[1]["completions"][0]] * 3
    rows[3] = {"prompt": rows[3]["prompt"], "completions": rows[3]["completions"][:1], "rewards": [1.0]}
    rows[4] = {
        "prompt": rows[4]["prompt"],
        "completions": [*rows[4]["completions"], " long and dull"],
        "rewards": [*rows[4]["rewards"], 9.0],
    }
    data = Dataset.from_list(rows)
    transformers_logging.enable_propagation()

    def made(**options: Any) -> Any:
        settings = config(tmp_path, ExoDPOConfig, loss_type="exo-rw", num_contrastive=3, **options)
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        return ExoDPOTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer).train_dataset

    kept = made()
    assert len(kept) == 3
    assert all(len(ids) == 3 for ids in kept["candidate_ids"])
    assert kept[2]["rewards"] == sorted(kept[2]["rewards"], key=[*rows[4]["rewards"]].index)  # drawn, in order
    assert "train dataset: 1 group left out: all candidates of the group are the same tokens" in caplog.text
    assert "(row 1)" in caplog.text
    assert "train dataset: 1 group left out: fewer candidates than a group needs (row 3)" in caplog.text
    assert len(made(duplicates="keep")) == 4
    with pytest.raises(ValueError, match=r"train dataset, row 1: .*same tokens.*duplicates=drop leaves"):
        made(duplicates="error")
    for options in ({"duplicates": "some"}, {"ties": "no"}):
        with pytest.raises(ValueError, match=r"one of .* is needed"):
            ExoDPOConfig(str(tmp_path), bf16=False, use_cpu=True, **options)
