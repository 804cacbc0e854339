"""Sampling and its stage: the right distribution, the same text whatever the batch, errors that name the argument."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from tiny_models import SPECIAL, WORDS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TopKLogitsWarper,
    TopPLogitsWarper,
    set_seed,
)

from exo_fast.training.errors import InputError, RunError
from exo_fast.training.inference.config import encode_prompts
from exo_fast.training.inference.sampling import _Draw, sample_tokens
from exo_fast.training.stages.generate import GenerateConfig, generate

Settings = Callable[..., dict[str, Any]]
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
    four = sample_tokens(model, tokenizer, PROMPTS, return_num=4, batch_size=24, **options)
    assert four == sample_tokens(model, tokenizer, PROMPTS, return_num=4, batch_size=24, **options)
    backwards = sample_tokens(model, tokenizer, PROMPTS[::-1], return_num=4, batch_size=4, **options)
    assert backwards[::-1] == four
    two = sample_tokens(model, tokenizer, PROMPTS, return_num=2, batch_size=1, **options)
    assert two == [group[:2] for group in four]


def test_seeds_prompts_and_candidates_have_streams_of_their_own(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [
        tokenizer.decode(ids)
        for seed in (0, 1)
        for group in sample_tokens(model, tokenizer, PROMPTS, return_num=3, max_new_tokens=20, seed=seed)
        for ids in group
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
        return_num=count,
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


# A vocabulary larger than the tokenizer's


def sparse_tokenizer() -> PreTrainedTokenizerFast:
    """The tests' words, with ids that nobody has between them."""
    ids = {word: 3 * i for i, word in enumerate((*SPECIAL, " ", *WORDS))}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def padded_model(tiny_llama: str) -> PreTrainedModel:
    """A Llama of 64 ids, for tokenizers of 17."""
    config = AutoConfig.from_pretrained(tiny_llama)
    config.vocab_size = 64
    set_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("sparse", [False, True], ids=["padded", "sparse"])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.6}, {"temperature": 0, "return_num": 1}],
    ids=lambda options: " ".join(options) or "plain",
)
def test_ids_without_a_token_are_never_drawn(
    padded_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], sparse: bool
) -> None:
    words = sparse_tokenizer() if sparse else tokenizer
    exist = sorted(words.get_vocab().values())
    assert len(exist) == 17
    assert words.get_vocab()["good"] == (21 if sparse else 7)
    count = options.get("return_num", 4000)
    (drawn,) = sample_tokens(
        padded_model, words, ["the film"], max_new_tokens=1, batch_size=count, **{"return_num": count, **options}
    )
    observed = torch.bincount(torch.tensor(drawn).flatten(), minlength=64).double()
    logits = padded_model(torch.tensor([words("the film")["input_ids"]])).logits[0, -1].detach().double()
    assert logits.argmax().item() not in exist or sparse  # one would have been drawn
    # The model's softmax renormalised over the tokens that exist, with transformers' own warpers on that.
    alone = logits[exist][None] / (options.get("temperature") or 1.0)
    if "top_k" in options:
        alone = TopKLogitsWarper(options["top_k"])(None, alone)
    if "top_p" in options:
        alone = TopPLogitsWarper(options["top_p"])(None, alone)
    if options.get("temperature") == 0:
        assert drawn == [[exist[alone.argmax().item()]]]
        return
    expected = torch.zeros(64, dtype=torch.float64).scatter(0, torch.tensor(exist), alone[0].softmax(-1) * count)
    assert observed[expected == 0].sum() == 0
    common = expected >= 5
    rest = [expected[~common].sum().item()] if expected[~common].sum() > 0 else []
    f_obs = [*observed[common].tolist(), *([observed[~common].sum().item()] if rest else [])]
    assert stats.chisquare(f_obs, [*expected[common].tolist(), *rest]).pvalue > 1e-4


def test_what_is_drawn_of_a_padded_vocabulary_is_what_the_tokenizer_reads(
    settings: Settings, padded_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    padded_model.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    config = GenerateConfig(**settings(model_name_or_path=str(tmp_path / "padded"), max_new_tokens=12))
    generate(config)
    ids = [token for row in read(config.output_dir) for drawn in row["completion_ids"] for token in drawn]
    assert len(ids) > 16
    assert max(ids) < len(tokenizer)


def test_logits_that_are_not_finite_are_said(
    tiny_llama: str, tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> None:
    damaged = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        damaged.model.norm.weight[0] = float("nan")
    for temperature in (0, 1):
        with pytest.raises(RunError, match="logits are not finite"):
            sample_tokens(damaged, tokenizer, PROMPTS, max_new_tokens=2, temperature=temperature)


# What is drawn


def test_a_completion_stops_at_the_end_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    end = tokenizer.eos_token_id
    groups = sample_tokens(model, tokenizer, PROMPTS, return_num=8, max_new_tokens=30, batch_size=48)
    rows = [ids for group in groups for ids in group]
    ended = [ids for ids in rows if ids[-1] == end]
    assert ended
    assert all(end not in ids[:-1] for ids in rows)
    assert all(len(ids) == 30 for ids in rows if ids[-1] != end)


def test_defaults_that_a_model_ships_with_change_nothing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"return_num": 4, "max_new_tokens": 12, "seed": 1}
    expected = sample_tokens(model, tokenizer, PROMPTS, **options)
    end = tokenizer.eos_token_id
    shipped = GenerationConfig(eos_token_id=end, repetition_penalty=5.0, min_new_tokens=12, suppress_tokens=[3])
    monkeypatch.setattr(model, "generation_config", shipped)
    assert sample_tokens(model, tokenizer, PROMPTS, **options) == expected
    assert model.generation_config is shipped


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
        ({"return_num": 0}, "return_num is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1e-40}, r"temperature is 1e-40; 0 \(greedy\), or a number from 1e-06 to 1e\+06 is needed"),
        ({"temperature": 1e40}, r"temperature is 1e\+40; 0 \(greedy\), or a number from 1e-06"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 0, "return_num": 2}, "return_num is 2; temperature=0 takes .* it needs return_num=1"),
        ({"top_k": 1, "return_num": 2}, "return_num is 2; top_k=1 takes .* it needs return_num=1"),
        ({"top_p": 1e-9, "return_num": 2}, "return_num is 2; top_p=1e-09 takes .* it needs return_num=1"),
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


# The stage


@pytest.fixture
def settings(tiny_llama: str, data_directory: str, tmp_path: Path) -> Settings:
    """`settings(**overrides)`: GenerateConfig fields for 16 + 5 prompts."""

    def with_overrides(**overrides: Any) -> dict[str, Any]:
        return {
            "model_name_or_path": tiny_llama,
            "data": data_directory,
            "output_dir": str(tmp_path / "samples"),
            "return_num": 2,
            "max_new_tokens": 6,
            "max_seq_len": 24,
            "batch_size": 4,
            "use_cpu": True,
            "disable_tqdm": True,
            **overrides,
        }

    return with_overrides


def read(directory: str | Path, split: str = "train") -> list[dict[str, Any]]:
    return json.loads(Path(directory, f"{split}.json").read_text())


def test_rows_hold_what_sample_tokens_draws(
    settings: Settings, tiny_llama: str, data_directory: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = GenerateConfig(**settings(temperature=0.7, top_k=9, seed=3))
    summary = generate(config)
    for split, count in (("train", 16), ("test", 5)):
        rows = read(config.output_dir, split)
        prompts = [row["prompt"] for row in read(data_directory, split)]
        assert [row["prompt"] for row in rows] == list(dict.fromkeys(prompts))
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager")
        expected = sample_tokens(
            model,
            tokenizer,
            [row["prompt"] for row in rows],
            return_num=2,
            max_new_tokens=6,
            temperature=0.7,
            top_k=9,
            seed=3,
            batch_size=7,
        )
        assert [row["completion_ids"] for row in rows] == expected
        for row in rows:
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in row["completion_ids"]]
            assert row["completions"] == texts
        counts = summary["counts"][split]
        assert counts["prompts"] == len(rows) <= count
        assert counts["completions"] == 2 * len(rows)
        assert counts["tokens"] == sum(len(ids) for group in expected for ids in group)
    assert json.loads(Path(config.output_dir, "summary.json").read_text()) == summary


def test_prompt_num_and_split(settings: Settings) -> None:
    config = GenerateConfig(**settings(prompt_num=3, split="test"))
    generate(config)
    assert len(read(config.output_dir, "test")) == 3
    assert not Path(config.output_dir, "train.json").exists()


def test_a_file_keeps_its_name(settings: Settings, data_directory: str) -> None:
    config = GenerateConfig(**settings(data=f"{data_directory}/test.json", return_num=1))
    assert list(generate(config)["counts"]) == ["test"]


def test_long_prompts_lose_their_beginning_and_keep_bos(
    tokenizer: PreTrainedTokenizerFast, bare_tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> None:
    ids = tokenizer("the film was good")["input_ids"]
    assert encode_prompts(tokenizer, ["the film was good"], [8]) == [(ids, 0)]
    assert encode_prompts(tokenizer, ["the film was good"], [4]) == [([ids[0], *ids[-3:]], 4)]
    assert encode_prompts(bare_tokenizer, ["the film was good"], [3]) == [(ids[-3:], 4)]
    summary = generate(GenerateConfig(**settings(max_seq_len=10, split="test")))
    assert summary["counts"]["test"]["cut_prompts"] > 0


def test_the_same_command_again_samples_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = generate(GenerateConfig(**settings()))
    monkeypatch.setattr("exo_fast.training.stages.generate.load_model", None)
    assert generate(GenerateConfig(**settings())) == summary
    assert "reusing" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"temperature was 1.0 and is now 0.5"):
        generate(GenerateConfig(**settings(temperature=0.5)))


@pytest.mark.parametrize(("options", "expected"), [({}, 4), ({"temperature": 0}, 1), ({"top_k": 1}, 1)])
def test_one_completion_where_nothing_is_left_to_chance(
    settings: Settings, options: dict[str, Any], expected: int
) -> None:
    assert GenerateConfig(**{**settings(**options), "return_num": None}).return_num == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": None}, "data=None: name the data"),
        ({"data": "nowhere"}, "nowhere: no such file"),
        ({"output_dir": None}, "output_dir=None"),
        ({"model_name_or_path": None}, "model_name_or_path=None"),
        ({"model_name_or_path": "./nowhere"}, "no such directory"),
        ({"model_name_or_path": str(Path(__file__).parent)}, "cannot be loaded as AutoTokenizer"),
        ({"return_num": 0}, "return_num is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1e-40}, r"temperature is 1e-40; 0 \(greedy\), or a number from 1e-06 to"),
        (
            {"temperature": 0, "return_num": 2, "model_name_or_path": "gpt2"},
            "temperature=0 takes .* needs return_num=1",
        ),
        ({"max_seq_len": 6}, "must be larger than max_new_tokens=6"),
        ({"max_seq_len": 400, "max_new_tokens": 300}, "positions for 128"),
        ({"prompt_num": 0}, "prompt_num=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"matmul_precision": "tf32"}, "matmul_precision='tf32': ieee or bf16"),
        ({"engine": "vllm"}, "engine='vllm': sampling by another library was taken out of exo_fast"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_errors_of_the_stage(settings: Settings, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(GenerateConfig(**settings(**changed)))
