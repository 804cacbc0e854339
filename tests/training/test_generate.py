"""Sampling: the right distribution, the same text whatever the batch, and errors that name the argument."""

import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from exo_fast.training.generate import _Draw, sample_completions, sample_tokens

PROMPTS = ["the film", "the plot was very long and", "good", "bad but great film and", "dull", "fine fine fine"]


@pytest.fixture(scope="module")
def model(tiny_llama: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def test_greedy_in_left_padded_batches_equals_one_prompt_at_a_time(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    together = sample_tokens(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=0, batch_size=4)
    for prompt, (ids,) in zip(PROMPTS, together, strict=True):
        context = tokenizer(prompt)["input_ids"]
        alone = []
        while len(alone) < 12 and tokenizer.eos_token_id not in alone:
            logits = model(torch.tensor([context + alone])).logits[0, -1]
            alone.append(logits.argmax().item())
        assert ids == alone, prompt


def test_neither_order_nor_batch_size_nor_number_changes_a_completion(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    options = {"max_new_tokens": 10, "seed": 3}
    four = sample_completions(model, tokenizer, PROMPTS, num_return=4, batch_size=24, **options)
    assert four == sample_completions(model, tokenizer, PROMPTS, num_return=4, batch_size=24, **options)
    backwards = sample_completions(model, tokenizer, PROMPTS[::-1], num_return=4, batch_size=4, **options)
    assert backwards[::-1] == four
    two = sample_completions(model, tokenizer, PROMPTS, num_return=2, batch_size=1, **options)
    assert two == [group[:2] for group in four]


def test_seeds_prompts_and_candidates_have_streams_of_their_own(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [
        text
        for seed in (0, 1)
        for group in sample_completions(model, tokenizer, PROMPTS, num_return=3, max_new_tokens=20, seed=seed)
        for text in group
    ]
    assert len(set(texts)) > 0.9 * len(texts)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 5, 1.0), (2.0, 0, 0.7)]
)
def test_samples_follow_the_models_distribution(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, temperature: float, top_k: int, top_p: float
) -> None:
    count = 4000
    (drawn,) = sample_tokens(
        model,
        tokenizer,
        ["the film"],
        num_return=count,
        max_new_tokens=1,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        batch_size=count,
    )
    logits = model(torch.tensor([tokenizer("the film")["input_ids"]])).logits[0, -1].detach().double() / temperature
    ordered, order = logits.softmax(0).sort(descending=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if top_k:
        keep[top_k:] = False
    if top_p < 1:
        keep &= ordered.cumsum(0) - ordered < top_p
    expected = torch.zeros_like(ordered).scatter(0, order, ordered * keep)
    expected = expected / expected.sum() * count
    observed = torch.bincount(torch.tensor(drawn).flatten(), minlength=len(expected)).double()
    assert observed[expected == 0].sum() == 0
    common = expected >= 5
    rest = expected[~common].sum()
    f_obs = [*observed[common].tolist(), *([observed[~common].sum().item()] if rest > 0 else [])]
    f_exp = [*expected[common].tolist(), *([rest.item()] if rest > 0 else [])]
    assert stats.chisquare(f_obs, f_exp).pvalue > 1e-4


def test_the_ends_of_the_unit_interval_draw_only_possible_tokens() -> None:
    scores = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).repeat(2, 1)
    uniforms = torch.tensor([[0.0], [1.0 - 2**-24]])
    chosen = _Draw(uniforms, prompt_length=3)(torch.zeros(2, 3, dtype=torch.long), scores).argmax(-1)
    assert chosen.tolist() == [1, 2]


def test_a_completion_stops_at_the_end_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    end = tokenizer.eos_token_id
    groups = sample_tokens(model, tokenizer, PROMPTS, num_return=8, max_new_tokens=30, batch_size=48)
    rows = [ids for group in groups for ids in group]
    ended = [ids for ids in rows if ids[-1] == end]
    assert ended
    assert all(end not in ids[:-1] for ids in rows)
    assert all(len(ids) == 30 for ids in rows if ids[-1] != end)
    texts = sample_completions(model, tokenizer, PROMPTS, num_return=8, max_new_tokens=30, batch_size=48)
    assert not any("</s>" in text for group in texts for text in group)


def test_global_random_state_and_training_mode_are_left_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = torch.random.get_rng_state()
    model.train()
    sample_tokens(model, tokenizer, PROMPTS[:2], max_new_tokens=3)
    assert model.training
    model.eval()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": "the film"}, "one string"),
        ({"prompts": ["good", ""]}, r"prompts\[1\] is ''"),
        ({"num_return": 0}, "num_return is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": -5}, "top_k is -5"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_errors_name_the_argument(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, changed: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample_tokens(model, tokenizer, **{"prompts": PROMPTS, "max_new_tokens": 2, **changed})
