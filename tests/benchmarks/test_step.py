"""The styles that the suite `step` compares compute one loss and gradient; its cases and ratios are what they say."""

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, set_seed

from exo_fast.benchmarks.methods import step_styles as styles
from exo_fast.benchmarks.methods import step_truth
from exo_fast.benchmarks.suites import step
from exo_fast.layout import Group
from exo_fast.training import machine


def make_models(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A tiny random Llama, and another with other weights as its reference."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    models = []
    for seed in (0, 1):
        set_seed(seed)
        models.append(AutoModelForCausalLM.from_config(config).to(dtype))
    return models[0], models[1]


def make_task(candidates: int) -> styles.Task:
    ids = torch.randint(3, 97, (8, 20), generator=torch.Generator().manual_seed(0)).tolist()
    groups = [
        Group(ids[first][:12], [row[12:] for row in ids[first : first + candidates]])
        for first in range(0, 8, candidates)
    ]
    return styles.Task(groups, torch.arange(8).view(-1, candidates).roll(1, 1).float())


@pytest.mark.parametrize("candidates", [2, 4])
@pytest.mark.parametrize("name", styles.STYLES)
def test_style_gives_the_loss_and_gradient_of_float64(name: str, candidates: int) -> None:
    task = make_task(candidates)
    loss, gradient = step_truth.truth(*make_models(torch.float64), task)
    assert gradient.norm > 1
    policy, reference = make_models(torch.float64)
    with step_truth.true_float64():
        exact = styles.run(styles.STYLES[name](policy, reference, task), policy, steps=1)
    assert exact.loss == pytest.approx(loss, rel=1e-12)
    assert exact.gradient.error(gradient) < 1e-12
    policy, reference = make_models()
    measured = styles.run(styles.STYLES[name](policy, reference, task), policy, steps=2)
    assert len(measured.seconds) == 2
    assert 0 < abs(measured.loss - loss) / loss < 2e-6
    assert 0 < measured.gradient.error(gradient) < 1e-5


def test_float64_goes_through_no_float32() -> None:
    policy, reference = make_models(torch.float64)
    task = make_task(2)
    inside, _ = step_truth.truth(policy, reference, task)
    without_it = styles.run(styles.full_logits(policy, reference, task), policy, steps=1)
    assert 1e-10 < abs(without_it.loss - inside) < 1e-5  # transformers' norms are float32 of their own accord
    with pytest.raises(TypeError, match="float64 is needed"):
        step_truth.truth(*make_models(), task)


@pytest.fixture
def without_deepspeed() -> Iterator[None]:
    with styles.without_deepspeed():
        yield


@pytest.mark.usefixtures("without_deepspeed")
@pytest.mark.parametrize("name", styles.TRL_STYLES)
def test_trl_computes_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w1")
    task = make_task(2)
    loss, gradient = step_truth.truth(*make_models(torch.float64), task)
    policy, reference = make_models()
    weights = copy.deepcopy(policy.state_dict())
    if name not in styles.WITH_REFERENCE:  # it takes the reference's log-probs from the model that it is given
        policy.load_state_dict(reference.state_dict())
        reference = None
    measured = styles.run_trl(
        name, policy, reference, tokenizer, task, 2, tmp_path, before_training=lambda: policy.load_state_dict(weights)
    )
    assert len(measured.seconds) == 2
    assert measured.loss == pytest.approx(loss, rel=2e-6)
    assert measured.gradient.error(gradient) < 1e-5


def test_trl_is_refused_more_than_two_candidates(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    policy, reference = make_models()
    with pytest.raises(ValueError, match="compares 2 candidates; the task has 4"):
        styles.run_trl("trl", policy, reference, None, make_task(4), 1, tmp_path)


def test_error_of_a_gradient_counts_every_parameter_by_its_size() -> None:
    models = [torch.nn.Linear(100, 100), torch.nn.Linear(100, 100)]
    for model, value in zip(models, (1.0, 1.1), strict=True):
        model.weight.grad = torch.ones_like(model.weight)
        model.bias.grad = torch.full_like(model.bias, value)
    truth, other = map(styles.gradient_of, models)
    assert len(truth.entries) == styles.SAMPLES + 100
    assert truth.norm == pytest.approx(10100**0.5)
    assert truth.error(truth) == 0
    assert other.error(truth) == pytest.approx((100 * 0.01 / 10100) ** 0.5)


@pytest.mark.parametrize(("slow", "steps"), [(0.1, 3), (4.0, 2), (9.0, 1)])
def test_long_steps_are_timed_less_often(monkeypatch: pytest.MonkeyPatch, slow: float, steps: int) -> None:
    clock = [0.0]
    monkeypatch.setattr(styles.time, "perf_counter", lambda: clock[0])
    policy = torch.nn.Linear(2, 1)

    def forward() -> Tensor:
        clock[0] += slow
        return policy(torch.ones(2)).sum()

    assert styles.run(forward, policy).seconds == pytest.approx([slow] * steps)


def test_cases_are_the_grid_with_its_yardsticks() -> None:
    found = step.cases()
    names = [str(case) for case in found]
    assert len(set(names)) == len(names)
    assert {step.baseline(case) for case in found} <= set(names)
    ours = {(case.candidates, case.prompt) for case in found if (case.style, case.precision) == ("exo_fast", "bf16")}
    assert ours == {(2, 128), (2, 51), (4, 128), (8, 205), (8, 51)}
    assert all(case.candidates == 2 for case in found if case.style in styles.TRL_STYLES)
    assert {case.style for case in found} == {*styles.STYLES, *styles.TRL_STYLES}
    assert set(step.cases(quick=True)) < set(found)
    assert str(step.Case("trl", "bf16", 2, 51, 205)) == "step/trl/bf16/K2/51+205"
    assert step.baseline(step.Case("trl", "bf16", 2, 51, 205)) == "step/full-logits/bf16/K2/51+205"


def test_what_trl_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version", lambda package: None)
    assert "pip install trl" in step.impossible(step.Case("trl", "bf16", 2, 51, 205))
    assert step.impossible(step.Case("original", "bf16", 2, 51, 205)) is None


@pytest.mark.parametrize(
    "case", [step.Case("exo_fast", "bf16", k, p, 256 - p) for k in (2, 8) for p in (51, 205)], ids=str
)
def test_task_has_the_lengths_it_promises(case: step.Case) -> None:
    task = step.make_task(list(range(8 * 256)), case)
    assert [len(group.prompt) for group in task.groups] == [case.prompt] * (8 // case.candidates)
    assert [len(ids) for group in task.groups for ids in group.completions] == [case.completion] * 8
    assert task.completion_tokens == 8 * case.completion
    used = [token for group in task.groups for ids in (group.prompt, *group.completions) for token in ids]
    assert len(set(used)) == len(used)
    short = task.shortened(8)
    assert {len(row) for row in short.rows} == {16}
    assert short.rewards.tolist() == task.rewards.tolist()


def test_tokens_are_kept_for_the_next_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reviews = [SimpleNamespace(text="some words of a review")] * 200
    monkeypatch.setattr("exo_fast.training.downloads.get_reviews", lambda cache, say: reviews)
    tokens = step.read_tokens(lambda text: {"input_ids": list(text.encode())}, tmp_path)
    assert len(tokens) >= 8 * 256
    assert step.read_tokens(None, tmp_path) == tokens


def test_truth_is_computed_once_for_all_styles_and_precisions_of_the_same_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loads = []
    monkeypatch.setattr(step, "load_model", lambda path, precision: make_models()[loads.append(precision) or 0])
    task = make_task(2)
    first = step.read_truth(step.Case("exo_fast", "fp32", 2, 12, 8), tmp_path, task, tmp_path)
    again = step.read_truth(step.Case("trl", "fp32+bf16", 2, 12, 8), tmp_path, task, tmp_path)
    assert loads == ["fp32", "fp32"]
    assert first[0] == again[0]
    assert again[1].error(first[1]) == 0
    step.read_truth(step.Case("trl", "bf16", 2, 12, 8), tmp_path, task, tmp_path)
    assert loads == ["fp32", "fp32", "bf16", "bf16"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-truth-bf16-K2-12+8.pt",
        "step-truth-fp32-K2-12+8.pt",
    ]


@pytest.mark.usefixtures("without_deepspeed")
@pytest.mark.parametrize("style", ["original", "exo_fast", "trl-cached"])
def test_a_case_is_measured(
    style: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    if style.startswith("trl"):
        pytest.importorskip("trl")
    monkeypatch.setattr("exo_fast.training.downloads.get_model", lambda cache, say: tmp_path)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda path: tiny_tokenizer)
    monkeypatch.setattr(step, "load_model", lambda path, precision: make_models()[0])
    monkeypatch.setattr(step, "read_tokens", lambda tokenizer, workdir: torch.arange(2048).remainder(90).tolist())
    row = step.measure(step.Case(style, "fp32", 2, 6, 4), tmp_path)
    assert row["seconds"] > 0
    assert row["tokens_per_second"] == pytest.approx(32 / row["seconds"], rel=0.05)
    assert row["errors"]["loss"] < 1e-5
    assert row["errors"]["gradient"] < 1e-4
    if style.startswith("trl"):
        return
    call, found = step.trial(step.Case(style, "fp32", 2, 6, 4), tmp_path)
    assert max(found["errors"].values()) < step.EXACT
    assert call().loss != row["loss"]  # a step further
    monkeypatch.setitem(styles.STYLES, style, lambda *args: lambda: 1.001 * styles.full_logits(*args)())
    with pytest.raises(AssertionError, match="computes something else"):
        step.trial(step.Case(style, "fp32", 2, 6, 4), tmp_path)


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w1")


def row(style: str, seconds: float, memory: float, precision: str = "bf16") -> dict:
    case = step.Case(style, precision, *step.CENTRE, 256 - step.CENTRE[1])
    return {"name": str(case), **vars(case), "seconds": seconds, "peak_mb": memory}


def test_summary_tells_ratios_and_what_each_part_gives() -> None:
    seconds = {"original": 16.0, "full-logits": 8.0, "full-logits-cached": 6.0, "exo_fast-unshared": 3.0}
    rows = [row(style, value, 100 * value) for style, value in seconds.items()]
    rows += [row("exo_fast", 2.0, 100.0), row("exo_fast-reference", 2.5, 110.0), row("full-logits", 9.0, 1.0, "fp32")]
    rows.append({**row("trl", 1.0, 1.0), "skipped": "not installed"})
    del rows[-1]["seconds"]
    found = step.summary(rows)
    problem = "bf16/K4/128+128"
    assert {"other": "original", "ours": "exo_fast", "problem": problem, "time": 8.0, "memory": 16.0} in found["ratios"]
    assert all(ratio["problem"] == problem and ratio["other"] != "trl" for ratio in found["ratios"])
    assert [(rung["part"], rung["gain"]) for rung in found["ladder"]] == [
        ("", 1.0),
        ("no padding", 2.0),
        ("cached reference", 1.333),
        ("fused head", 2.0),
        ("shared prompt", 1.5),
    ]
    assert found["without"] == {
        "shared prompt": {"time": 1.5, "memory": 3.0},
        "cached reference": {"time": 1.25, "memory": 1.1},
    }
    assert step.summary(rows[:2])["ladder"] == []


def test_noise_is_seeded_and_of_the_size_it_says() -> None:
    first, second = (make_models()[0] for _ in range(2))
    before = first.model.embed_tokens.weight.clone()
    step.add_noise(first)
    step.add_noise(second)
    assert torch.equal(first.model.embed_tokens.weight, second.model.embed_tokens.weight)
    change = (first.model.embed_tokens.weight - before).std() / before.square().mean().sqrt()
    assert change.item() == pytest.approx(step.NOISE, rel=0.1)
