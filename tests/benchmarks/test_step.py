"""The styles that the step benchmark compares compute one loss and one gradient; its ratios are what they say."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, set_seed

from exo_fast.benchmarks import step
from exo_fast.benchmarks import step_styles as styles
from exo_fast.layout import Group


def make_models() -> tuple[PreTrainedModel, PreTrainedModel]:
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
        models.append(AutoModelForCausalLM.from_config(config).float())
    return models[0], models[1]


def make_task(candidates: int):
    ids = torch.randint(3, 97, (8, 20), generator=torch.Generator().manual_seed(0)).tolist()
    groups = [
        Group(ids[first][:12], [row[12:] for row in ids[first : first + candidates]])
        for first in range(0, 8, candidates)
    ]
    return styles.Task(groups, torch.arange(8).view(-1, candidates).roll(1, 1).float())


@pytest.mark.parametrize("candidates", [2, 4])
def test_styles_agree_in_loss_and_gradient(candidates: int) -> None:
    found = {}
    for name, build in styles.STYLES.items():
        policy, reference = make_models()
        forward = build(policy, reference, make_task(candidates))
        measured = styles.run(forward, policy, steps=2)
        assert len(measured.seconds) == 2
        found[name] = (measured.loss, measured.grad_norm)
    expected = found["original"]
    assert expected[1] > 1e-3
    for name, values in found.items():
        assert values == pytest.approx(expected, rel=2e-5), name


@pytest.mark.parametrize("name", ["trl", "trl-plain", "trl-cached"])
def test_trl_computes_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w1")
    task = make_task(2)
    policy, reference = make_models()
    expected = styles.run(styles.original(policy, reference, task), policy, steps=1)
    policy, reference = make_models()
    weights = copy.deepcopy(policy.state_dict())
    if name == "trl-cached":  # it takes the reference's log-probs from the model that it is given
        policy.load_state_dict(reference.state_dict())
        reference = None
    measured = styles.run_trl(
        name, policy, reference, tokenizer, task, 2, tmp_path, before_training=lambda: policy.load_state_dict(weights)
    )
    assert len(measured.seconds) == 2
    assert (measured.loss, measured.grad_norm) == pytest.approx((expected.loss, expected.grad_norm), rel=2e-5)


def test_trl_is_refused_more_than_two_candidates(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    policy, reference = make_models()
    with pytest.raises(ValueError, match="compares 2 candidates; the task has 4"):
        styles.run_trl("trl", policy, reference, None, make_task(4), 1, tmp_path)


def row(style: str, seconds: float, memory: float, grad_norm: float = 2.0) -> dict:
    case = {"style": style, "precision": "fp32", "candidates": 4, "loss": 1.0, "grad_norm": grad_norm}
    return {**case, "seconds": seconds, "peak_above_models_mb": memory}


def test_ratios_are_the_others_over_ours() -> None:
    rows = [row("original", 10.0, 900.0), row("exo_fast", 2.0, 300.0, grad_norm=2.002)]
    assert step.ratios(rows) == {"original / exo_fast": {"fp32/K4": {"time": 5.0, "memory": 3.0}}}
    assert step.agreement(rows)["fp32/K4"] == {"loss": 0.0, "grad_norm": pytest.approx(1e-3, rel=0.01)}
    text = step.report(rows)
    assert "5.00×" in text
    assert "3.00×" in text


def test_cases_are_chosen_by_the_beginning_of_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(["--list", "--only", "exo_fast/bf16"]) == 0
    assert capsys.readouterr().out.split() == ["exo_fast/bf16/K2", "exo_fast/bf16/K4"]
    with pytest.raises(SystemExit):
        step.main(["--list", "--only", "nothing"])
    assert "no case begins so" in capsys.readouterr().err


def test_task_has_the_lengths_it_promises_and_noise_is_seeded() -> None:
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    task = step.make_task(tokenizer, ["some words of a review"] * 200, 4)
    assert [len(group.prompt) for group in task.groups] == [192, 192]
    assert {len(completion) for group in task.groups for completion in group.completions} == {64}
    first, second = (make_models()[0] for _ in range(2))
    before = first.model.embed_tokens.weight.clone()
    step.add_noise(first)
    step.add_noise(second)
    assert torch.equal(first.model.embed_tokens.weight, second.model.embed_tokens.weight)
    change = (first.model.embed_tokens.weight - before).std() / before.square().mean().sqrt()
    assert change.item() == pytest.approx(step.NOISE, rel=0.1)


def test_machine_is_described() -> None:
    found = json.loads(json.dumps(step.machine.describe()))
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["cores"] >= 1
