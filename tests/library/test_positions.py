"""Models whose rotary embedding depends on a text's length: each text gets transformers' numbers for it alone."""

import copy
import random
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from exo_fast import reference
from exo_fast.head import final_hidden
from exo_fast.layout import Group, MaskPlan, Packed, check_neighbours, check_sharing, model_inputs, pack, plan_mask
from exo_fast.masks import neighbours_hint
from exo_fast.positions import (
    LengthRule,
    by_text,
    length_class,
    length_rules,
    longest_text,
    packed_lengths,
    padded_texts,
    rope_hint,
    start_anew,
)

BY_LENGTH = ("gemma3-dynamic", "llama-dynamic", "phi3-longrope", "phimoe-longrope")
LIMIT = 12  # of these, in tokens


def make_groups(*shapes: tuple[int, list[int]]) -> list[Group]:
    """Groups of random tokens from (prompt length, completion lengths)."""
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, 61) for _ in range(count)]

    return [Group(tokens(prompt), list(map(tokens, lengths))) for prompt, lengths in shapes]


# Groups on one side of the limit and on the other, and some with candidates on both.
MIXED = make_groups((9, [7, 3]), (1, [12, 1, 5]), (6, [2, 9, 4, 11]), (4, [1, 1]), (2, [3, 3, 3]))
MIXED_ROW = 48
SEQUENCES = [(group.prompt, completion) for group in MIXED for completion in group.completions]


def inputs(packed: Packed, plan: MaskPlan, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return model_inputs(packed, plan, dtype=dtype, device="cpu", attn_implementation="sdpa")


def alone(make: Any, prompt: list[int], completion: list[int]) -> tuple[Tensor, nn.Module]:
    """transformers' own log-probs of a completion's tokens, by a model that has seen nothing before."""
    model = make()
    logps = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(1, torch.tensor(completion)[:, None])[:, 0], model


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("name", [*BY_LENGTH, "llama", "phi3"])
def test_log_probs_and_gradients_are_those_of_each_sequence_alone(name: str, share_prompt: bool):
    model = families.tiny_model(name)
    plan = plan_mask(model.config)
    assert bool(plan.by_length) == (name in BY_LENGTH)
    lengths = [len(prompt) + len(completion) for prompt, completion in SEQUENCES]
    assert min(lengths) < LIMIT < max(lengths)
    assert LIMIT in lengths, "the last of the short ones"
    packed = pack(MIXED, share_prompt=share_prompt, row_length=MIXED_ROW, by_length=plan.by_length)
    logps, gradients = families.logps_and_gradients(model, packed, plan)

    expected: dict[str, Tensor] = {}
    right = []
    for factor, sequence in zip(torch.linspace(-1, 1, len(SEQUENCES)), SEQUENCES, strict=True):
        values, single = alone(lambda: families.tiny_model(name), *sequence)
        (values.sum() * factor).backward()
        right.append(values.detach())
        for key, parameter in single.named_parameters():
            if parameter.grad is not None:
                expected[key] = expected.get(key, 0) + parameter.grad
    families.assert_close(logps, torch.cat(right), 1e-5, "log-probs")
    largest = max(gradient.abs().max() for gradient in expected.values())
    for key, gradient in gradients.items():
        assert (gradient - expected[key]).abs().max() <= 1e-5 * largest, key


@pytest.mark.parametrize("name", BY_LENGTH)
def test_these_models_do_depend_on_their_neighbours(name: str):
    """The tests here rest on models to which it matters: transformers' own forward, of rows of several lengths."""
    model = families.tiny_model(name)
    packed, plan = pack(MIXED, share_prompt=False), plan_mask(model.config)
    with torch.no_grad():
        ours, theirs = (
            families.token_logps(model, packed, plan),
            families.token_logps(model, packed, plan, text_lengths=None),
        )
    assert (theirs - ours).abs().max() > 1e-2


@pytest.mark.parametrize("name", BY_LENGTH)
def test_what_a_model_has_seen_before_does_not_matter(name: str):
    """Dynamic NTK keeps its longest frequencies, also for a text that is exactly as long as the original positions."""
    model = families.tiny_model(name)
    plan = plan_mask(model.config)
    groups = make_groups((4, [LIMIT - 4, LIMIT - 4]), (3, [LIMIT - 2, 2]))
    with torch.no_grad():
        expected = families.token_logps(model, pack(groups, by_length=plan.by_length), plan)
        model(input_ids=torch.randint(3, 61, (1, 23)))
        assert torch.equal(families.token_logps(model, pack(groups, by_length=plan.by_length), plan), expected)


def test_the_model_is_as_it_was_afterwards():
    model = families.tiny_model("llama-dynamic")
    ids = torch.randint(3, 61, (1, 20))
    expected = families.tiny_model("llama-dynamic")(input_ids=ids).logits
    families.token_logps(model, pack(MIXED, share_prompt=False), plan_mask(model.config))
    assert "forward" not in vars(model.model.rotary_emb)
    assert torch.equal(model(input_ids=ids).logits, expected)
    model.model.rotary_emb.forward = forward = model.model.rotary_emb.forward  # as a hook of accelerate's leaves it
    with pytest.raises(RuntimeError), by_text(model, torch.tensor([[20]])):
        raise RuntimeError
    assert vars(model.model.rotary_emb)["forward"] is forward


@pytest.mark.parametrize("name", ["llama-dynamic", "phi3-longrope"])
def test_checkpointing_gives_the_same_gradients(name: str):
    model = families.tiny_model(name)
    plan = plan_mask(model.config)
    packed = pack(MIXED, row_length=MIXED_ROW, by_length=plan.by_length)
    _, expected = families.logps_and_gradients(model, packed, plan)
    model.train()
    model.gradient_checkpointing_enable()
    _, found = families.logps_and_gradients(model, packed, plan)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, msg=key)


@pytest.mark.parametrize("name", BY_LENGTH)
def test_half_precision_and_autocast(name: str):
    for dtype in (torch.float32, torch.bfloat16):
        model = families.tiny_model(name, dtype=dtype)
        plan = plan_mask(model.config)
        long, short = make_groups((9, [9, 8])), make_groups((3, [4, 2]))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):

            def logps(groups: list[Group], model: nn.Module = model, plan: Any = plan) -> Tensor:
                packed = pack(groups, share_prompt=False, by_length=plan.by_length)
                hidden = final_hidden(model, **inputs(packed, plan, dtype=torch.bfloat16)).flatten(0, 1)[packed.source]
                return reference.linear_logprobs(hidden.float(), model.lm_head.weight.float(), packed.targets)

            families.assert_close(logps([*short, *long])[:6], logps(short), 0.05)


def test_the_check_of_shared_prompts_knows():
    for name in BY_LENGTH:
        model = families.tiny_model(name)
        report = check_sharing(model, MIXED, plan_mask(model.config))
        assert report.ok
        assert report.token_rms < 1e-5


# --- candidates that cannot share -------------------------------------------------------------------------------------


def test_candidates_share_a_prompt_with_those_of_their_class_alone():
    two, each = (LengthRule(6, each=False),), (LengthRule(6, each=True),)
    group = Group([1, 1, 1], [[2], [3, 3], [4] * 4, [5] * 5, [6, 6, 6], [7] * 5])
    assert pack([group]).group_ids.unique().tolist() == [0]
    packed = pack([group], by_length=two, row_length=50)
    assert packed.input_ids.tolist() == [
        [*[1, 1, 1], *[4] * 4, *[5] * 5, *[1, 1, 1], *[7] * 5, *[1, 1, 1], 2, 3, 3, *[1, 1, 1], 6, 6, 6]
    ]
    assert packed.targets.tolist() == [2, 3, 3, *[4] * 4, *[5] * 5, 6, 6, 6, *[7] * 5]
    assert packed.cu_seqlens.tolist() == [0, 1, 3, 7, 12, 15, 20]
    assert torch.equal(packed.input_ids.view(-1)[packed.source[packed.cu_seqlens[:-1].long()]], torch.ones(6).long())
    assert len(pack([group], by_length=each).group_ids.unique()) - 1 == 5  # [2], [3, 3] alone share


def test_rows_that_share_too_much_are_refused():
    plan = plan_mask(families.tiny_model("phi3-longrope").config)
    inputs(pack(make_groups((4, [3, 5]))), plan)
    inputs(pack(make_groups((4, [10, 9]))), plan)
    for groups in (make_groups((4, [3, 9])), make_groups((4, [3, 5]), (4, [9, 3]))):
        with pytest.raises(ValueError, match=r"some with it up to 12 tokens long.*by_length=plan\.by_length"):
            inputs(pack(groups), plan)
        inputs(pack(groups, by_length=plan.by_length), plan)
        inputs(pack(groups, share_prompt=False), plan)


# --- configurations ---------------------------------------------------------------------------------------------------

LONG = {"rope_type": "longrope", "long_factor": [2.0], "short_factor": [1.0]}
RULES = {
    "none": ({}, (), None),
    "static": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, (), 50),
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, (LengthRule(50, each=True),), 200),
    "longrope": (
        {"rope_parameters": {**LONG, "original_max_position_embeddings": 20}},
        (LengthRule(20, each=False),),
        50,
    ),
    "original length beside it": (
        {"rope_parameters": LONG, "original_max_position_embeddings": 30},
        (LengthRule(30, each=False),),
        50,
    ),
    "old names": ({"rope_scaling": {"type": "su", **LONG, "rope_type": "su"}}, (LengthRule(50, each=False),), 50),
    "old dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, (LengthRule(50, each=True),), 100),
    "by layer": (
        {"rope_parameters": {"a": {"rope_type": "default"}, "b": {"rope_type": "dynamic", "factor": 2.0}}},
        (LengthRule(50, each=True),),
        100,
    ),
    "two of them": (
        {"rope_parameters": {"a": {**LONG, "original_max_position_embeddings": 9}, "b": {"rope_type": "dynamic"}}},
        (LengthRule(9, each=False), LengthRule(50, each=True)),
        50,
    ),
    "scaled by length": (
        {"rope_parameters": {"rope_type": "linear", "long_mscale": 1.0, "original_max_position_embeddings": 8}},
        (LengthRule(8, each=False),),
        50,
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_what_a_config_says_of_length(name: str):
    entries, rules, longest = RULES[name]
    config = SimpleNamespace(model_type="llama", max_position_embeddings=50 if entries else None, **entries)
    assert length_rules(config) == rules
    assert longest_text(config) == longest
    assert bool(rope_hint(config)) == bool(rules)


def test_classes_of_lengths():
    rules = (LengthRule(3, each=False), LengthRule(5, each=True))
    classes = [length_class(rules, length) for length in range(1, 9)]
    assert classes == [(0, 5)] * 3 + [(1, 5)] * 2 + [(1, 6), (1, 7), (1, 8)]
    lengths = torch.arange(1, 9)
    for column, rule in enumerate(rules):
        assert rule.of(lengths).long().tolist() == [row[column] for row in classes]


def test_models_of_several_kinds_of_rotary_embedding_are_hinted_at():
    assert neighbours_hint(CONFIG_MAPPING["llama"]()) == ""
    odd = SimpleNamespace(model_type="llama", rope_parameters={"rope_type": "novel"})
    assert "'novel'" in neighbours_hint(odd)
    assert "code of its own" in neighbours_hint(SimpleNamespace(model_type="llama", auto_map={"AutoConfig": "a.B"}))
    assert "'mamba'" in neighbours_hint(CONFIG_MAPPING["mamba"]())


# --- lengths of texts -------------------------------------------------------------------------------------------------


def test_lengths_of_packed_texts():
    packed = pack([Group([1, 1], [[2], [3, 3, 3]]), Group([4], [[5]])], row_length=9)
    assert packed_lengths(packed.group_ids, packed.position_ids).tolist() == [[5] * 6 + [2, 2]]
    packed = pack([Group([1, 1], [[2], [3, 3, 3]])], share_prompt=False)
    assert packed_lengths(packed.group_ids, packed.position_ids).tolist() == [[3, 3, 3, 1, 1], [5] * 5]


def test_lengths_of_padded_texts():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    lengths, positions = padded_texts(mask)
    assert lengths[:, 0].tolist() == [3, 5, 2, 0]
    assert lengths.shape == mask.shape
    assert positions[:3].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 1, 2, 3]]


# --- the numeric check ------------------------------------------------------------------------------------------------


def test_the_check_of_neighbours():
    model = families.tiny_model("phi3-longrope")
    plan = plan_mask(model.config)
    short, long = make_groups((3, [4, 2]), (9, [9, 8]))

    @torch.no_grad()
    def ours(groups: list[Group], **changed: Any) -> Tensor:
        return families.token_logps(model, pack(groups, by_length=plan.by_length), plan, **changed)

    def theirs(groups: list[Group]) -> Tensor:
        return ours(groups, text_lengths=None)

    report = check_neighbours(ours, short, long, atol=1e-4)
    assert report.ok
    assert report.token_rms < 1e-5
    report = check_neighbours(theirs, short, long, atol=1e-4)
    assert not report.ok
    assert report.sequence_max > report.token_rms > 1e-3
    assert "a group has other log-probs beside a longer one than alone: rms" in report.reason


def test_a_rotary_embedding_that_is_not_found_is_an_error():
    model = families.tiny_model("llama-dynamic")

    class Turning(nn.Module):
        def forward(self, x: Tensor, positions: Tensor) -> None: ...

    model.model.rotary_emb = Turning()
    with pytest.raises(ValueError, match=r"a rotary embedding of type 'dynamic'.*is not known"):
        families.token_logps(model, pack(MIXED, share_prompt=False), plan_mask(model.config))


def test_a_rotary_embedding_that_checkpointing_runs_again_is_an_error():
    model = families.tiny_model("llama-dynamic")
    model.model.layers[0].self_attn.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    lengths = torch.full((1, 5), 5)
    with by_text(model, lengths):
        pass
    model.gradient_checkpointing_enable()
    with torch.no_grad(), by_text(model, lengths):
        pass
    with pytest.raises(ValueError, match="Switch gradient checkpointing off"), by_text(model, lengths):
        pass


def test_a_rotary_embedding_of_another_form_is_an_error():
    """One row for all positions, as of a module that averages: nobody could tell whose it is."""
    model = families.tiny_model("llama-dynamic")

    class RotaryMean(type(model.model.rotary_emb)):
        def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
            return tuple(part.mean(-2, keepdim=True) for part in super().forward(x, position_ids))

    model.model.rotary_emb = RotaryMean(model.config)
    with pytest.raises(ValueError, match=r"RotaryMean: its output is not \(…, T, d\), a row for each position"):
        families.token_logps(model, pack(MIXED, share_prompt=False), plan_mask(model.config))


def test_starting_anew():
    model, new = (families.tiny_model("gemma3-dynamic") for _ in range(2))
    ids = torch.randint(3, 61, (1, LIMIT))
    with torch.no_grad():
        expected = new(input_ids=ids).logits
        model(input_ids=torch.randint(3, 61, (1, 23)))
        assert not torch.allclose(model(input_ids=ids).logits, expected)
        start_anew(model)
        assert torch.equal(model(input_ids=ids).logits, expected)
