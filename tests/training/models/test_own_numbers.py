"""A text's numbers are its own in every stage, with models whose rotary embedding depends on a text's length.

The right numbers: an untrained policy is its own reference, so KL is 0; transformers' own forward of each text alone.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import WORDS, make_rows, save_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    MambaConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from exo_fast.training.data.texts import pad_with_eos
from exo_fast.training.errors import InputError
from exo_fast.training.inference.resumable import plan_batches
from exo_fast.training.inference.sampling import sample_tokens
from exo_fast.training.models.scorer import load_scalar_model
from exo_fast.training.stages.align import AlignConfig, align
from exo_fast.training.stages.classifier import ClassifierConfig, classifier
from exo_fast.training.stages.generate import GenerateConfig, generate
from exo_fast.training.stages.logprobs import LogprobsConfig, logprobs
from exo_fast.training.stages.reward_model import RewardModelConfig, reward_model
from exo_fast.training.stages.score import ScoreConfig, score
from exo_fast.training.stages.sft import SftConfig, sft

LIMIT = 24  # tokens, beyond which positions change
LOSSES = ("exo-pref", "exo-rw", "dpo-pref", "dpo-rw")
Run = Callable[..., dict[str, Any]]


def long_rows(count: int, candidates: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of sequences below LIMIT, above, and (as a word and a space are two tokens) on both sides of it."""
    rng = random.Random(seed)
    rows = make_rows(count, candidates, seed)
    for index, row in enumerate(rows):
        if index % 3:
            row["prompt"] = " ".join(rng.choices(WORDS, k=7 if index % 3 == 1 else 15))
    return rows


def make_model(kind: str, tokenizer: PreTrainedTokenizerFast, directory: Path) -> str:
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.3,
    }
    config: Any
    if kind == "dynamic":
        rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
        config = LlamaConfig(**shape, max_position_embeddings=LIMIT, rope_parameters=rope)
    else:
        factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        rope = {"rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 1.0, **factors}
        config = Phi3Config(
            **shape, max_position_embeddings=96, original_max_position_embeddings=LIMIT, rope_parameters=rope
        )
    return save_model(config, tokenizer, directory)


@pytest.fixture(scope="module", params=["dynamic", "longrope"])
def model(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> str:
    return make_model(request.param, tokenizer, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def dynamic(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model("dynamic", tokenizer, tmp_path_factory.mktemp("dynamic"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("long_data")
    (directory / "train.json").write_text(json.dumps(long_rows(9)))
    (directory / "test.json").write_text(json.dumps(long_rows(5, seed=1)))
    return str(directory)


@pytest.fixture
def untrained(settings: Callable[..., dict[str, Any]], data: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Fields of a training stage whose weights stay as they are."""

    def fields(name: str, **overrides: Any) -> dict[str, Any]:
        return settings(
            model_name_or_path=name,
            data=data,
            learning_rate=0.0,
            num_train_epochs=1,
            engine="torch",
            per_device_eval_batch_size=3,
            **overrides,
        )

    return fields


def history(config: AlignConfig, name: str) -> list[float]:
    state = json.loads(Path(config.output_dir, "trainer_state.json").read_text())
    return [entry[name] for entry in state["log_history"] if name in entry]


@pytest.mark.parametrize("share_prompt", ["auto", "off"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_untrained_policy_is_its_own_reference(
    model: str, untrained: Run, batch_size: int, share_prompt: str, tmp_path: Path
) -> None:
    for loss_type in LOSSES:
        config = AlignConfig(
            **untrained(
                model,
                loss_type=loss_type,
                per_device_train_batch_size=batch_size,
                share_prompt=share_prompt,
                output_dir=str(tmp_path / loss_type),
                reference_cache_dir=str(tmp_path / loss_type / "cache"),
            )
        )
        summary = align(config)
        assert summary["layout"]["share_prompt"] == (share_prompt == "auto")
        steps, evaluations = history(config, "kl"), history(config, "eval_kl")
        assert len(steps) == -(-9 // batch_size)
        assert evaluations
        assert max(map(abs, steps + evaluations)) <= 1e-5  # rounding of sums of 4 · 10 log-probs in float32


ENGINES = {
    "zero3": {"engine": "deepspeed", "zero_stage": 3, "gradient_checkpointing": True},
    "lora": {"lora_r": 4, "gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "other reference": {"ref_name_or_path": "copy"},
}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_untrained_policy_in_other_engines(model: str, untrained: Run, engine: str, tmp_path: Path) -> None:
    options = dict(ENGINES[engine])
    if "ref_name_or_path" in options:
        options["ref_name_or_path"] = str(shutil.copytree(model, tmp_path / "copy"))
    config = AlignConfig(**untrained(model) | {"per_device_train_batch_size": 2} | options)
    align(config)
    steps, evaluations = history(config, "kl"), history(config, "eval_kl")
    assert max(map(abs, steps + evaluations)) <= (0.05 if engine == "bf16" else 2e-5)


def test_references_of_before_are_not_used(model: str, untrained: Run, tmp_path: Path, monkeypatch: Any) -> None:
    """A cache that was filled when numbers still depended on the batch; and one of now is used."""
    from exo_fast.training.trainer import reference_logps

    keys = []
    key = reference_logps.cache_key

    def watched(dataset: Any, digest: str, **fields: Any) -> str:
        keys.append(fields)
        return key(dataset, digest, **fields)

    monkeypatch.setattr(reference_logps, "cache_key", watched)
    align(AlignConfig(**untrained(model)))
    assert all("by_length" in fields for fields in keys)
    again = align(AlignConfig(**untrained(model, output_dir=str(tmp_path / "again"))))
    assert again["reference_cache_hits"] == {"train": True, "eval": True}


def alone(name: str, prompt: list[int], completion: list[int], cls: Any = AutoModelForCausalLM) -> Tensor:
    """Return log-probs by transformers' own forward of one text, with a model that has seen nothing before."""
    loaded = cls.from_pretrained(name).eval()
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor([prompt + completion])).logits[0]
    if cls is AutoModelForSequenceClassification:
        return logits[0]
    logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(1, torch.tensor(completion)[:, None]).sum()


def test_log_probs_of_given_completions(model: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """More completions than go together, of lengths on both sides."""
    rows = long_rows(4, candidates=11)
    (tmp_path / "test.json").write_text(json.dumps(rows))
    found = []
    for batch_size in (1, 8, 64):
        output = tmp_path / f"out{batch_size}"
        logprobs(
            LogprobsConfig(
                model_name_or_path=model,
                data=str(tmp_path / "test.json"),
                output_dir=str(output),
                max_seq_len=64,
                max_gen_len=16,
                batch_size=batch_size,
                matmul_precision="ieee",
                use_cpu=True,
                disable_tqdm=True,
            )
        )
        found.append([row["logprobs"] for row in json.loads((output / "test.json").read_text())])
    lengths = set()
    for index, row in enumerate(rows):
        prompt = tokenizer(row["prompt"])["input_ids"]
        for k, text in enumerate(row["completions"]):
            completion = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            lengths.add(len(prompt) + len(completion) <= LIMIT)
            expected = alone(model, prompt, completion).item()
            assert [values[index][k] for values in found] == pytest.approx([expected] * 3, abs=2e-5)
    assert lengths == {True, False}


@pytest.mark.parametrize("stage", [sft, reward_model, classifier])
def test_losses_do_not_depend_on_the_batch(
    stage: Any, model: str, untrained: Run, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Held-out losses of one text a batch, where nothing is beside it, and of all in one."""
    data = tmp_path / "rows"
    data.mkdir()
    for split, seed in (("train", 0), ("test", 1)):
        rows = [
            {"prompt": row["prompt"], "chosen": row["completions"][0], "rejected": row["completions"][1]}
            for row in long_rows(9, seed=seed)
        ]
        if stage is classifier:
            rows = [{"text": f"{row['prompt']} {row['chosen']}", "label": i % 2} for i, row in enumerate(rows)]
        (data / f"{split}.json").write_text(json.dumps(rows))
    Config = {sft: SftConfig, reward_model: RewardModelConfig, classifier: ClassifierConfig}[stage]
    found = []
    for batch_size in (1, 9):
        fields = untrained(model, output_dir=str(tmp_path / str(batch_size)))
        for name in ("loss_type", "reference_cache_dir", *(() if stage is sft else ("max_gen_len",))):
            del fields[name]
        fields |= {"data": str(data), "per_device_eval_batch_size": batch_size, "per_device_train_batch_size": 9}
        summary = stage(Config(**fields))
        found.append((summary["metrics"]["eval"]["last"]["eval_loss"], summary["metrics"]["train"]["last"]["loss"]))
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    if stage is sft:
        tokens, total = 0, 0.0
        for row in long_rows(9, seed=1):
            completion = [
                *tokenizer(row["completions"][0], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id
            ]  # fmt: skip
            total -= alone(model, tokenizer(row["prompt"])["input_ids"], completion).item()
            tokens += len(completion)
        assert found[0][0] == pytest.approx(total / tokens, abs=1e-5)


def make_classifier(name: str, directory: Path) -> str:
    set_seed(0)
    scalar = load_scalar_model(name, dtype=torch.float32, new_head=True)
    torch.nn.init.normal_(scalar.score.weight)
    scalar.save_pretrained(directory)
    pad_with_eos(AutoTokenizer.from_pretrained(name)).save_pretrained(directory)
    return str(directory)


def test_scores_are_those_of_each_text_alone(model: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{name: row[name] for name in ("prompt", "completions")} for row in long_rows(6)]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    name = make_classifier(model, tmp_path / "classifier")
    fields = {"reward_model": name, "data": str(tmp_path / "test.json"), "max_seq_len": 64, "use_cpu": True}
    config = ScoreConfig(**fields, output_dir=str(tmp_path / "out"), batch_size=24, disable_tqdm=True)
    score(config)
    found = json.loads((tmp_path / "out" / "test.json").read_text())
    for row, scored in zip(rows, found, strict=True):
        ids = [tokenizer(row["prompt"] + text)["input_ids"] for text in row["completions"]]
        expected = [alone(name, text, [], AutoModelForSequenceClassification).item() for text in ids]
        assert scored["rewards"] == pytest.approx(expected, abs=2e-5)


# --- generate ---------------------------------------------------------------------------------------------------------


def test_batches_of_one_length() -> None:
    assert plan_batches([3, 5, 3, 3, 5], [2] * 5, 4) == [[1, 4], [0, 2], [3]]
    assert plan_batches([3, 5, 3, 4, 5], [2] * 5, 6) == [[1, 4, 3], [0, 2]]
    assert plan_batches([3, 5, 3, 4, 5], [2] * 5, 6, of_one_length=True) == [[1, 4], [3], [0, 2]]
    assert plan_batches([3, 3, 3], [1] * 3, 2, of_one_length=True) == [[0, 1], [2]]


def test_a_completion_does_not_depend_on_its_company(
    model: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Greedy: transformers' own generation of the prompt alone. Drawn: whatever is in the list, in any order."""
    prompts = ["the film was", "good bad long", "the plot was very long and dull but fine", " ".join(WORDS), "fine"]
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    greedy = sample_tokens(loaded, tokenizer, prompts, max_new_tokens=20, temperature=0, batch_size=8)
    for prompt, (ids,) in zip(prompts, greedy, strict=True):
        fresh = AutoModelForCausalLM.from_pretrained(model).eval()
        context = torch.tensor([tokenizer(prompt)["input_ids"]])
        options = {"attention_mask": torch.ones_like(context), "max_new_tokens": 20, "do_sample": False}
        assert ids == fresh.generate(context, **options)[0, context.shape[1] :].tolist()
    options = {"max_new_tokens": 20, "return_num": 3, "seed": 1}
    drawn = sample_tokens(loaded, tokenizer, prompts, batch_size=30, **options)
    assert drawn[::-1] == sample_tokens(loaded, tokenizer, prompts[::-1], batch_size=2, **options)

    (tmp_path / "test.json").write_text(json.dumps([{"prompt": prompt} for prompt in prompts]))
    fields = {"model_name_or_path": model, "data": str(tmp_path / "test.json"), "output_dir": str(tmp_path / "out")}
    config = GenerateConfig(**fields, **options, max_seq_len=60, batch_size=30, use_cpu=True, disable_tqdm=True)
    generate(config)
    assert [row["completion_ids"] for row in json.loads((tmp_path / "out" / "test.json").read_text())] == drawn


# --- hidden states of another dtype than the head ---------------------------------------------------------------------


def test_float32_states_in_a_bf16_model(
    untrained: Run, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, data: str
) -> None:
    """Mamba's final states are float32, whatever its weights are: DeepSpeed's engine has no autocast to cast them."""
    config = MambaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        initializer_range=0.3,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    name = save_model(config, tokenizer, tmp_path / "mamba")
    fields = untrained(name) | {"engine": "deepspeed", "bf16": True}
    summary = align(AlignConfig(**fields))
    assert abs(summary["metrics"]["train"]["last"]["kl"]) < 0.05  # bf16 rows of other lengths round otherwise

    bf16 = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).eval()
    rows = [{"prompt": row["prompt"], "chosen": row["completions"][0]} for row in long_rows(9)]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    (tmp_path / "train.json").write_text(json.dumps(rows))
    expected, tokens = [], 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = tokenizer(row["chosen"], add_special_tokens=False)["input_ids"]
        completion = [*completion, tokenizer.eos_token_id]
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            logps = bf16(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected.append(logps.gather(1, torch.tensor(completion)[:, None]).sum().item())
        tokens += len(completion)
    del fields["loss_type"], fields["reference_cache_dir"]
    summary = sft(SftConfig(**fields | {"data": str(tmp_path), "output_dir": str(tmp_path / "sft")}))
    assert summary["metrics"]["eval"]["last"]["eval_loss"] == pytest.approx(-sum(expected) / tokens, rel=5e-3)
    pairs = [{"prompt": row["prompt"], "completions": [row["chosen"]]} for row in rows]
    (tmp_path / "test.json").write_text(json.dumps(pairs))
    scored = LogprobsConfig(
        model_name_or_path=name,
        data=str(tmp_path / "test.json"),
        output_dir=str(tmp_path / "logprobs"),
        max_seq_len=64,
        max_gen_len=16,
        bf16=True,
        use_cpu=True,
        disable_tqdm=True,
    )
    logprobs(scored)
    found = [row["logprobs"][0] for row in json.loads((tmp_path / "logprobs" / "test.json").read_text())]
    assert found == pytest.approx(expected, rel=5e-3, abs=0.05)


# --- a model that does see its neighbours, and says so ----------------------------------------------------------------


@pytest.fixture
def by_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotary embedding that takes the length from the batch itself, where nobody can tell it another."""
    own = LlamaRotaryEmbedding.forward

    def forward(self: Any, x: Tensor, position_ids: Tensor) -> Any:
        return own(self, x, position_ids * x.shape[1])

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", forward)


@pytest.mark.usefixtures("by_the_batch")
def test_a_model_that_sees_its_neighbours_is_refused(dynamic: str, untrained: Run, data: str, tmp_path: Path) -> None:
    message = (
        r"model type 'llama': it has a rotary embedding of type 'dynamic'.*depends on the other texts of the batch"
    )
    log_prob = r"rms \S+ nats a token where 1\.0e-04 is allowed.*use another model"
    for share_prompt in ("auto", "off"):
        with pytest.raises(InputError, match=f"{message}.*{log_prob}"):
            align(AlignConfig(**untrained(dynamic, share_prompt=share_prompt)))
    fields = untrained(dynamic)
    del fields["loss_type"], fields["reference_cache_dir"]
    (tmp_path / "sft.json").write_text(
        json.dumps([{"prompt": row["prompt"], "chosen": row["completions"][0]} for row in long_rows(9)])
    )
    with pytest.raises(InputError, match=f"{message}.*{log_prob}"):
        sft(SftConfig(**fields | {"data": str(tmp_path / "sft.json")}))

    inference = {"data": data, "output_dir": str(tmp_path / "out"), "use_cpu": True, "disable_tqdm": True}
    with pytest.raises(InputError, match=f"{message}.*nats a token beside a longer one"):
        logprobs(LogprobsConfig(model_name_or_path=dynamic, max_seq_len=64, max_gen_len=16, **inference))
    reward = make_classifier(dynamic, tmp_path / "classifier")
    with pytest.raises(InputError, match=f"{message}.* alone and .* beside a longer one"):
        score(ScoreConfig(reward_model=reward, max_seq_len=64, matmul_precision="ieee", **inference))

    pairs = [
        {"prompt": row["prompt"], "chosen": row["completions"][0], "rejected": row["completions"][1]}
        for row in long_rows(9)
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    del fields["max_gen_len"]
    fields |= {"data": str(tmp_path / "pairs.json"), "output_dir": str(tmp_path / "reward")}
    with pytest.raises(InputError, match=f"{message}.* alone and .* beside a longer one"):
        reward_model(RewardModelConfig(**fields))
