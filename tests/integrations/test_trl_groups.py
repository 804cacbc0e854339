"""ExoDPOTrainer's numbers over candidates: means over groups, however batches are cut, and every option of TRL's."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'exo_fast[trl]'")

from accelerate.utils import concatenate
from datasets import Dataset
from device_work import OnDevice, on_device
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.utils import logging as transformers_logging
from trl_runs import candidates, config, exact_logps, pairs, run

from exo_fast import reference
from exo_fast.data.tokens import RowTokenizer
from exo_fast.integrations.trl import CandidateCollator, ExoDPOConfig, ExoDPOTrainer, tokenize_candidates
from exo_fast.integrations.trl.candidates import ROWS, host_rows
from exo_fast.metrics import GROUP_METRICS, group_metrics

EVERY = {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential", "max_grad_norm": 0.0}
EPOCH = {**EVERY, "max_steps": -1, "num_train_epochs": 1, "learning_rate": 5e-2, "lr_scheduler_type": "constant"}


def make(path: Path, model: str, rows: Dataset, *, policy: Any = None, **options: Any) -> ExoDPOTrainer:
    named = {name: options.pop(name) for name in ("eval_dataset", "compute_metrics", "peft_config") if name in options}
    policy = policy or AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = config(path, ExoDPOConfig, **{"loss_type": "exo-rw", **options})
    tokenizer = AutoTokenizer.from_pretrained(model)
    return ExoDPOTrainer(policy, args=settings, train_dataset=rows, processing_class=tokenizer, **named)


def exact_epoch(model: str, rows: Dataset, loss_type: str, steps: list[slice]) -> tuple[list[dict], dict]:
    """Plain gradient descent on the mean loss of each step's groups, in float64: logs of the steps, and weights."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ref_logps = exact_logps(policy, tokenizer, rows).detach()
    rewards = torch.tensor(rows["rewards"], dtype=torch.float64)
    log = []
    for step in steps:
        logps = exact_logps(policy, tokenizer, rows.select(range(len(rows))[step]))
        loss = reference.group_loss(logps, ref_logps[step], rewards[step], loss_type=loss_type).mean()
        policy.zero_grad()
        loss.backward()
        metrics = group_metrics(logps.detach(), ref_logps[step], rewards[step], 0.1).mean(0).tolist()
        log.append({"loss": float(loss), **dict(zip(GROUP_METRICS, metrics, strict=True))})
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter -= 5e-2 * parameter.grad
    return log, {name: value.detach() for name, value in policy.named_parameters()}


def assert_log(found: dict, right: dict, prefix: str = "") -> None:
    for name, value in right.items():
        name = prefix + ("group_entropy" if name == "entropy" else name)
        assert found[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name


@pytest.mark.parametrize("cut", [(4, 1), (2, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("loss_type", ["exo-rw", "dpo-pref"])
def test_a_step_is_the_mean_over_the_groups_of_its_global_batch(
    tmp_path: Path, tiny_llama: str, loss_type: str, cut: tuple[int, int]
) -> None:
    """Seven groups: the second step has three, in batches of two a two and a one."""
    rows = candidates(7)
    log, weights = exact_epoch(tiny_llama, rows, loss_type, [slice(0, 4), slice(4, 7)])
    options = {**EPOCH, "loss_type": loss_type, "label_smoothing": 1e-3 if loss_type == "dpo-pref" else None}
    cuts = {"per_device_train_batch_size": cut[0], "gradient_accumulation_steps": cut[1]}
    found, trained = run(ExoDPOTrainer, config(tmp_path, ExoDPOConfig, **options | cuts), tiny_llama, rows)
    for mine, right in zip(found, log, strict=True):
        assert_log(mine, right)
    for name, value in trained.items():
        torch.testing.assert_close(value.double(), weights[name], atol=2e-5, rtol=2e-5)


TIES: dict[str, tuple[list[int], str]] = {  # candidates of a group by their places in a row, all but the last the best
    "sampled twice": ([0, 0, 2], "error"),  # no tie: it counts twice
    "a tie that is shared": ([0, 1, 2], "share"),
}


@pytest.mark.parametrize("loss_type", ["exo-pref", "dpo-pref"])
@pytest.mark.parametrize("name", TIES)
def test_several_best_candidates_have_equal_shares(tmp_path: Path, tiny_llama: str, name: str, loss_type: str) -> None:
    """Two steps: in the first one all log-ratios are 0, and dpo's loss is log 3 whatever the target."""
    places, ties = TIES[name]
    rows = candidates(4).map(
        lambda row: {"completions": [row["completions"][k] for k in places], "rewards": [1.0, 1.0, 0.0]}
    )
    log, weights = exact_epoch(tiny_llama, rows, loss_type, [slice(0, 4)] * 2)
    single = rows.map(lambda row: {"rewards": [1.0, 0.0, 0.0]})
    if (name, loss_type) != ("sampled twice", "dpo-pref"):  # −Σ p log q is one number for the same candidate twice
        other, _ = exact_epoch(tiny_llama, single, loss_type, [slice(0, 4)] * 2)
        assert abs(log[1]["loss"] - other[1]["loss"]) > 1e-2  # or this test shows nothing
    options = {**EPOCH, "max_steps": 2, "loss_type": loss_type, "label_smoothing": 1e-3, "ties": ties}
    found, trained = run(ExoDPOTrainer, config(tmp_path, ExoDPOConfig, **options), tiny_llama, rows)
    for mine, right in zip(found, log, strict=True):
        assert_log(mine, right)
    for parameter, value in trained.items():
        torch.testing.assert_close(value.double(), weights[parameter], atol=2e-5, rtol=2e-5)


def test_ties_that_are_refused_or_left_out(tmp_path: Path, tiny_llama: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = candidates(4).map(
        lambda row, k: {"rewards": [1.0, 1.0, 0.0] if k % 2 else row["rewards"]}, with_indices=True
    )
    with pytest.raises(ValueError, match=r"row 1: .*different candidates share the highest reward"):
        make(tmp_path, tiny_llama, rows, loss_type="dpo-pref")
    transformers_logging.enable_propagation()
    dropped = make(tmp_path, tiny_llama, rows, loss_type="dpo-pref", ties="drop").train_dataset
    assert dropped["rewards"] == [row["rewards"] for row in candidates(4).select([0, 2])]
    said = "train dataset: 2 groups left out: different candidates share the highest reward"
    assert f"{said}, so none is preferred (row 1; row 3)" in caplog.text
    assert len(make(tmp_path, tiny_llama, rows, loss_type="dpo-rw").train_dataset) == 4


def test_a_log_of_several_steps_is_the_mean_over_their_groups(tmp_path: Path, tiny_llama: str) -> None:
    rows = candidates(7)
    first, second = exact_epoch(tiny_llama, rows, "exo-rw", [slice(0, 4), slice(4, 7)])[0]
    options = {**EPOCH, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 2}
    (found,), _ = run(ExoDPOTrainer, config(tmp_path, ExoDPOConfig, loss_type="exo-rw", **options), tiny_llama, rows)
    assert_log(found, {name: (4 * first[name] + 3 * second[name]) / 7 for name in first})
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    texts = [row["prompt"] + text + "</s>" for row in rows for text in row["completions"]]
    assert found["num_tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in texts)


@pytest.mark.parametrize("precomputed", [True, False])
def test_an_evaluation_is_the_mean_over_its_rows(tmp_path: Path, tiny_llama: str, precomputed: bool) -> None:
    """Seven rows in batches of any size; twice, as evaluations must not add up."""
    rows, found = candidates(7), {}
    for size in (1, 2, 3, 4, 7):
        options = {"per_device_eval_batch_size": size, "precompute_ref_log_probs": precomputed}
        trainer = make(tmp_path / str(size), tiny_llama, rows, eval_dataset=rows, **EPOCH, **options)
        with torch.no_grad():  # a policy that is not the reference any more
            trainer.model.model.embed_tokens.weight.mul_(1.05)
        first, again = trainer.evaluate(), trainer.evaluate()
        timed = ("runtime", "per_second", "preparation_time")
        found[size] = {name: value for name, value in again.items() if not name.endswith(timed)}
        assert found[size] == {name: first[name] for name in found[size]}
    for size, numbers in found.items():
        assert numbers == pytest.approx(found[7], abs=1e-6, rel=1e-6), size
    assert {"eval_loss", "eval_kl", "eval_group_accuracy", "eval_rewards/margins"} <= found[7].keys()
    policy = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
    tokenizer, rewards = AutoTokenizer.from_pretrained(tiny_llama), torch.tensor(rows["rewards"], dtype=torch.float64)
    with torch.no_grad():
        ref_logps = exact_logps(policy, tokenizer, rows)
        policy.model.embed_tokens.weight.mul_(1.05)
        logps = exact_logps(policy, tokenizer, rows)
    loss = reference.group_loss(logps, ref_logps, rewards, loss_type="exo-rw").mean()
    means = group_metrics(logps, ref_logps, rewards, 0.1).mean(0).tolist()
    assert_log(found[2], {"loss": float(loss), **dict(zip(GROUP_METRICS, means, strict=True))}, "eval_")


def test_several_evaluation_sets_have_numbers_of_their_own(tmp_path: Path, tiny_llama: str) -> None:
    parts = {"a": candidates(7).select(range(3)), "b": candidates(7).select(range(3, 7))}
    trainer = make(tmp_path, tiny_llama, candidates(4), eval_dataset=parts, per_device_eval_batch_size=2)
    whole, both = trainer.evaluate(candidates(7)), trainer.evaluate()
    for name in ("loss", "logps/chosen", "group_accuracy"):
        weighted = (3 * both[f"eval_a_{name}"] + 4 * both[f"eval_b_{name}"]) / 7
        assert weighted == pytest.approx(whole[f"eval_{name}"], rel=1e-6), name


def test_evaluation_in_training_leaves_the_training_averages_alone(tmp_path: Path, tiny_llama: str) -> None:
    rows = candidates(8)
    settings = {"loss_type": "exo-rw", **EPOCH, "logging_steps": 2}
    (plain,), _ = run(ExoDPOTrainer, config(tmp_path / "a", ExoDPOConfig, **settings), tiny_llama, rows)
    settings |= {"eval_strategy": "steps", "eval_steps": 1}
    (found,), _ = run(
        ExoDPOTrainer, config(tmp_path / "b", ExoDPOConfig, **settings), tiny_llama, rows, eval_dataset=candidates(3)
    )
    assert {name: found[name] for name in plain} == plain


def test_compute_metrics_is_given_log_probs_and_rewards_of_groups(tmp_path: Path, tiny_llama: str) -> None:
    seen = []

    def metrics(given: Any) -> dict[str, float]:
        seen.append(given)
        return {"mine": float((given.predictions.argmax(1) == given.label_ids.argmax(1)).mean())}

    rows = candidates(7)
    options = {"eval_dataset": rows, "per_device_eval_batch_size": 2, "compute_metrics": metrics}
    found = make(tmp_path, tiny_llama, rows, **options).evaluate()
    assert seen[0].predictions.shape == seen[0].label_ids.shape == (7, 3)
    assert seen[0].label_ids.tolist() == rows["rewards"]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
    exact = exact_logps(model, AutoTokenizer.from_pretrained(tiny_llama), rows).detach()
    torch.testing.assert_close(torch.tensor(seen[0].predictions).double(), exact, atol=1e-4, rtol=1e-5)
    assert 0 <= found["eval_mine"] <= 1


@pytest.mark.parametrize("scale", [int, bool], ids=["whole numbers", "booleans"])
def test_rewards_of_any_number_type(tmp_path: Path, tiny_llama: str, scale: type) -> None:
    whole = [[2, 0, 1], [5, 3, 4], [0, 1, 2]] if scale is int else [[True, False, False], [False, True, False]] * 2
    text = candidates(len(whole)).remove_columns("rewards")
    logs = []
    for kind in (scale, float):
        rows = text.add_column("rewards", [[kind(reward) for reward in row] for row in whole])
        assert rows.features["rewards"].feature.dtype.startswith(kind.__name__)
        for loss_type in ("exo-rw", "exo-pref"):
            settings = config(tmp_path / f"{kind}{loss_type}", ExoDPOConfig, loss_type=loss_type, max_steps=2)
            logs.append(run(ExoDPOTrainer, settings, tiny_llama, rows, eval_dataset=rows)[0])
    assert logs[0] == logs[2]
    assert logs[1] == logs[3]
    batch = CandidateCollator()([{"prompt_ids": [1], "candidate_ids": [[2], [3]], "rewards": [True, False]}])
    assert batch["rewards"].tolist() == [[1.0, 0.0]]
    assert batch["rewards"].dtype == torch.float32


def test_the_router_loss_of_experts(tmp_path: Path, tiny_llama: str) -> None:
    """Its share of a step goes by the groups of a micro-batch; the logged one is the mean over groups."""
    rows = candidates(3)
    logs = {}
    for name, options in (
        ("cut", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
        ("first", {"per_device_train_batch_size": 2}),
        ("second", {"per_device_train_batch_size": 1}),
    ):
        data = rows.select([2]) if name == "second" else rows.select([0, 1]) if name == "first" else rows
        model = families.tiny_model("qwen3_moe")
        model.config.output_router_logits = True
        options |= {"router_aux_loss_coef": 0.5, "max_steps": 1, "precompute_ref_log_probs": True}
        trainer = make(tmp_path / name, tiny_llama, data, policy=model, **{**EVERY, **options})
        assert trainer.aux_loss_enabled
        trainer.train()
        logs[name] = trainer.state.log_history[0]
    for name in ("loss", "aux_loss", "logps/chosen"):
        mean = (2 * logs["first"][name] + logs["second"][name]) / 3
        assert logs["cut"][name] == pytest.approx(mean, rel=1e-5), name


# Options --------------------------------------------------------------------------------------------------------------

LORA = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=0.5)

# Options that the loss over candidates would leave out or get wrong.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ld_alpha": ({"ld_alpha": 0.5}, r"ld_alpha=0\.5 is not for"),
    "use_weighting": ({"use_weighting": True}, "use_weighting=True is not for"),
    "f_divergence_type": ({"f_divergence_type": "js_divergence"}, "f_divergence_type='js_divergence' is not for"),
    "loss_weights": ({"loss_weights": [3.0]}, r"loss_weights=\[3\.0\] is not for"),
    "label_smoothing": ({"label_smoothing": 0.1}, r"label_smoothing=0\.1 is not for loss_type=\['exo-rw'\]"),
    "pad_token": ({"pad_token": "<unk>"}, "pad_token='<unk>' is not for .* set the tokenizer's pad_token"),
    "truncation_mode": ({"truncation_mode": "keep_middle"}, "truncation_mode='keep_middle' .* keep_start or keep_end"),
    "label_smoothing_factor": ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor=0\.1 .* over the vocabulary"),
    "include_for_metrics": ({"include_for_metrics": ["inputs"]}, "leave out 'inputs'"),
    "accelerator_config": ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True is not for"),
    "sync_ref_model": ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "cannot use `sync_ref_model=True`"),
    "router_aux_loss_coef": ({"router_aux_loss_coef": 0.1}, "is not a Mixture-of-Experts model"),
    "train_sampling_strategy": ({"train_sampling_strategy": "group_by_length"}, "length"),
}
# Options that change nothing in the numbers of a first step, and others that one need not name.
HARMLESS: dict[str, Any] = {
    "padding_free": True,  # TRL says that it is off
    "pad_to_multiple_of": 16,
    "precompute_ref_batch_size": 3,
    "precompute_ref_log_probs": False,
    "disable_dropout": False,  # this model has none
    "discopop_tau": 0.7,
    "f_alpha_divergence_coef": 0.7,
    "ref_model_mixup_alpha": 0.9,
    "ref_model_sync_steps": 3,
    "dataset_num_proc": 1,
    "trust_remote_code": True,
    "model_init_kwargs": {"dtype": "float32"},
    "remove_unused_columns": False,
    "gradient_checkpointing": False,
    "average_tokens_across_devices": False,
    "include_num_input_tokens_seen": "all",
    "eval_do_concat_batches": False,
}
# Options with a test of their own here or in test_trl.py; TRL's offloading of activations runs on accelerators only.
TESTED = {"loss_type", "beta", "label_smoothing", "max_length", "truncation_mode", "router_aux_loss_coef",
          "sync_ref_model", "precompute_ref_log_probs", "disable_dropout", "activation_offloading"}  # fmt: skip


def test_every_option_of_trl_has_been_thought_of() -> None:
    own = {field.name for field in dataclasses.fields(trl.DPOConfig)}
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert own - inherited - {"beta"} <= REFUSED.keys() | HARMLESS.keys() | TESTED
    assert REFUSED.keys() | HARMLESS.keys() | TESTED <= own


@pytest.mark.parametrize("option", REFUSED)
def test_options_that_would_be_left_out_are_refused(tmp_path: Path, tiny_llama: str, option: str) -> None:
    options, message = REFUSED[option]
    with pytest.raises(ValueError, match=message):
        make(tmp_path, tiny_llama, candidates(), **options).train()


def test_a_plain_config_is_checked_as_well(tmp_path: Path, tiny_llama: str) -> None:
    settings = config(tmp_path, loss_type=["exo-rw"], label_smoothing=0.2)
    with pytest.raises(ValueError, match=r"label_smoothing=0\.2 is not for"):
        run(ExoDPOTrainer, settings, tiny_llama, candidates())


@pytest.fixture(scope="module")
def first_step(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return {}


@pytest.mark.parametrize("option", HARMLESS)
def test_options_that_are_not_of_the_loss(
    tmp_path: Path, tiny_llama: str, first_step: dict[str, float], option: str
) -> None:
    names = ("loss", "grad_norm", "kl", "logps/rejected", "num_tokens")
    if not first_step:
        plain, _ = run(ExoDPOTrainer, config(tmp_path / "a", ExoDPOConfig, max_steps=2), tiny_llama, candidates())
        first_step.update(plain[1])
    settings = config(tmp_path / "b", ExoDPOConfig, max_steps=2, **{option: HARMLESS[option]})
    found, _ = run(ExoDPOTrainer, settings, tiny_llama, candidates())
    for name in names:
        assert found[1][name] == pytest.approx(first_step[name], rel=1e-4, abs=1e-5), name


def test_a_reference_that_follows_the_policy(tmp_path: Path, tiny_llama: str) -> None:
    """With the mixup at 1 and a step between, policy and reference are the same before each step."""
    follow = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1}
    moved, _ = run(ExoDPOTrainer, config(tmp_path / "a", ExoDPOConfig), tiny_llama, candidates())
    found, _ = run(ExoDPOTrainer, config(tmp_path / "b", ExoDPOConfig, **follow), tiny_llama, candidates())
    assert abs(moved[-1]["kl"]) > 1e-3
    assert all(abs(entry["kl"]) < 1e-5 for entry in found)


def test_noise_on_embeddings_goes_by_rows_that_are_not_shared(tmp_path: Path, tiny_llama: str) -> None:
    seen = []
    policy = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    policy.model.register_forward_pre_hook(
        lambda module, args, given: seen.append((module.training, len(given["input_ids"]))), with_kwargs=True
    )
    settings = {"neftune_noise_alpha": 5.0, "max_steps": 1, "gradient_checkpointing": False}
    trainer = make(tmp_path, tiny_llama, candidates(2), policy=policy, **settings)
    trainer.train()
    assert [rows for training, rows in seen if training] == [6]  # two groups of three rows each
    assert [rows for training, rows in seen if not training][-1] < 6  # the reference's own pass shares


def test_the_reference_has_no_dropout(tmp_path: Path, tiny_llama: str) -> None:
    """The reference of an adapter is the policy without it, which is in training mode in a step."""
    policy = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    policy.config.attention_dropout = 0.5
    for layer in policy.model.layers:
        layer.self_attn.attention_dropout = 0.5
    options = {"precompute_ref_log_probs": False, "disable_dropout": False, "peft_config": LORA}
    trainer = make(tmp_path, tiny_llama, candidates(), policy=policy, **options)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    found = []
    for training in (True, True, False):
        trainer.model.train(training)
        found.append(torch.cat([part.flatten() for part in trainer.compute_ref_log_probs(trainer.model, batch)]))
        assert trainer.model.training is training
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_rewards_and_log_probs_are_not_rounded_for_deepspeed(tmp_path: Path, tiny_llama: str) -> None:
    """The Trainer casts what is floating to the engine's dtype: bf16 keeps three digits of a log-prob."""
    trainer = make(tmp_path, tiny_llama, candidates())
    trainer.is_deepspeed_enabled = True
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    prepared = trainer._prepare_inputs(batch)
    assert {name: value.dtype for name, value in prepared.items()} == {k: v.dtype for k, v in batch.items()}


@pytest.mark.parametrize("change", ["dtype", "autocast", "attention", "config", "template", "tokenizer"])
def test_precomputed_log_probs_are_of_what_they_are_of(tmp_path: Path, tiny_llama: str, change: str) -> None:
    """The second run finds the first one's files, and must make its own."""
    rows = candidates(3)
    if change == "template":
        rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    rows.save_to_disk(tmp_path / "data")
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"

    def columns(changed: bool, where: str) -> Tensor:
        policy = AutoModelForCausalLM.from_pretrained(
            tiny_llama,
            dtype=torch.bfloat16 if changed and change == "dtype" else torch.float32,
            attn_implementation="eager" if changed and change == "attention" else "sdpa",
        )
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        if change == "template":
            tokenizer.chat_template = ("good " if changed else "") + template
        if changed and change == "tokenizer":
            tokenizer.add_special_tokens({"eos_token": "good"})
        if changed and change == "config":
            policy.config.rope_parameters = {**policy.config.rope_parameters, "rope_theta": 20.0}
            policy.model.rotary_emb = type(policy.model.rotary_emb)(policy.config)
        settings = config(
            tmp_path / where, ExoDPOConfig, loss_type="exo-rw", bf16=changed and change == "autocast", max_steps=1,
            precompute_ref_log_probs=True,
        )  # fmt: skip
        data = Dataset.load_from_disk(str(tmp_path / where))
        trainer = ExoDPOTrainer(policy, args=settings, train_dataset=data, processing_class=tokenizer)
        rejected = torch.tensor(trainer.train_dataset["ref_rejected_logps"])
        return torch.cat([torch.tensor(trainer.train_dataset["ref_chosen_logps"]).unsqueeze(1), rejected], dim=1)

    before, found = columns(False, "data"), columns(True, "data")
    rows.save_to_disk(tmp_path / "fresh")
    fresh = columns(True, "fresh")
    assert torch.equal(found, fresh)
    if change != "attention":
        assert not torch.allclose(found, before, atol=1e-4)
    assert torch.equal(columns(False, "data"), before)


def test_rows_of_token_ids(tmp_path: Path, tiny_llama: str) -> None:
    """The same numbers as of text, for the losses that TRL has for pairs too; and the same rules."""
    text = candidates(4)
    rows = RowTokenizer(AutoTokenizer.from_pretrained(tiny_llama))
    made = text.map(tokenize_candidates, fn_kwargs={"processing_class": rows}, remove_columns=["prompt", "completions"])
    logs = []
    for name, data in (("text", text), ("ids", made)):
        settings = config(tmp_path / name, ExoDPOConfig, loss_type="sigmoid", max_steps=2)
        logs.append(run(ExoDPOTrainer, settings, tiny_llama, data)[0])
    assert logs[0] == logs[1]
    tied = made.map(lambda row: {"rewards": [1.0, 1.0, 0.0]})
    with pytest.raises(ValueError, match=r"train dataset, row 0: .*different candidates share the highest reward"):
        make(tmp_path, tiny_llama, tied, loss_type="exo-pref")
    with pytest.raises(ValueError, match=r"eval dataset, row 0: .*different candidates share the highest reward"):
        make(tmp_path, tiny_llama, made, eval_dataset=tied, loss_type="exo-pref")


def test_data_that_was_prepared_is_evaluated_again(tmp_path: Path, tiny_llama: str) -> None:
    """With reference log-probs of another length, which do not stay."""
    rows = candidates(4)
    trainer = make(tmp_path, tiny_llama, rows, eval_dataset=rows)
    expected = trainer.evaluate()["eval_logps/rejected"]
    assert trainer.evaluate(trainer.eval_dataset)["eval_logps/rejected"] == pytest.approx(expected, rel=1e-6)
    known = trainer.eval_dataset.map(lambda row: {"ref_chosen_logps": row["ref_chosen_logps"] - 100})
    assert trainer.evaluate(known)["eval_kl"] == pytest.approx(0, abs=1e-5)


def test_pairs_of_ours_and_trls_do_not_share_a_file(tmp_path: Path, tiny_llama: str) -> None:
    pairs(4).save_to_disk(tmp_path / "data")
    shapes = []
    for loss_type in ("hinge", "dpo-rw"):
        data = Dataset.load_from_disk(str(tmp_path / "data"))
        trainer = make(tmp_path / loss_type, tiny_llama, data, loss_type=loss_type)
        shapes.append(torch.tensor(trainer.train_dataset["ref_rejected_logps"]).shape)
    assert shapes == [(4,), (4, 1)]


@pytest.mark.parametrize("share_prompts", [True, False], ids=["shared", "ordinary"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_step_waits_for_the_device(tmp_path: Path, tiny_llama: str, share_prompts: bool, accumulation: int) -> None:
    """The first batch is compared in both layouts, and the end of a training reads the loss; no step in between reads
    anything. A micro-batch had four reads. Those of transformers, in its forward of ordinary rows, are left out."""

    def reads(steps: int) -> int:
        trainer = make(
            tmp_path, tiny_llama, candidates(), share_prompts=share_prompts, max_steps=steps, logging_steps=1000,
            gradient_accumulation_steps=accumulation, logging_nan_inf_filter=False, gradient_checkpointing=False,
        )  # fmt: skip
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: on_device(collate(rows))
        OnDevice.reads.clear()
        trainer.train()
        return sum(OnDevice.reads.values()) - (0 if share_prompts else OnDevice.reads["__bool__"])

    assert reads(5) == reads(2)


def test_pinned_batches_are_copied_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate copies them, unless the user configures it; then the trainer finds them on the GPU."""
    from exo_fast.integrations.trl import trainer as module

    def non_blocking(**options: Any) -> bool:
        return config(tmp_path, ExoDPOConfig, **options).accelerator_config.non_blocking

    assert not non_blocking()
    monkeypatch.setattr(module, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True)))
    assert non_blocking()
    assert not non_blocking(dataloader_pin_memory=False)
    assert not non_blocking(accelerator_config={"non_blocking": False})


def test_a_stream_for_several_processes_has_tensors_alone(
    tmp_path: Path, tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate joins the batches of several processes, and cannot join arrays."""
    stream = make(tmp_path, tiny_llama, candidates().to_iterable_dataset())
    assert "host_rows" in next(iter(stream.get_train_dataloader()))
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    batch = next(iter(stream.get_train_dataloader()))
    assert all(isinstance(value, Tensor) for value in batch.values())
    joined = concatenate([batch, batch])
    assert len(joined["input_ids"]) == 2 * len(batch["input_ids"])
    assert torch.equal(torch.stack(host_rows(batch)), torch.stack([batch[name] for name in ROWS]))
