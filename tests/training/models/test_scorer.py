"""Scalar models: what we read is what plain transformers reads, at the last token before EOS."""

from pathlib import Path
from typing import Any

import chats
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.models.auto import AutoModelForCausalLM

from exo_fast.training.data.texts import encode, pad, pad_with_eos
from exo_fast.training.errors import InputError
from exo_fast.training.models.scorer import load_scalar_model, reads_at_end, scalars

TEXTS = ["the film was good", "bad", "the plot was very long and dull but great"]
EOS = 2
SMALL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": EOS, "initializer_range": 0.2}
CONFIGS = {
    "gpt2": lambda size: GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=64, **SMALL),
    "llama": lambda size: LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        **SMALL,
    ),
}


@pytest.fixture(params=CONFIGS)
def causal_lm(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """The directory of a causal LM whose tokenizer pads with another token than EOS, and on the left."""
    set_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[request.param](len(tokenizer))).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    other = AutoTokenizer.from_pretrained(tmp_path / "lm", pad_token="<unk>", padding_side="left")
    other.save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def load_new(directory: Path, seed: int = 0, **options: Any) -> torch.nn.Module:
    set_seed(seed)
    return load_scalar_model(str(directory), dtype=torch.float32, new_head=True, **options).eval()


@torch.no_grad()
def test_plain_transformers_gives_the_same_numbers(causal_lm: Path, tmp_path: Path) -> None:
    model, tokenizer = load_new(causal_lm), pad_with_eos(AutoTokenizer.from_pretrained(causal_lm))
    found = scalars(model, pad(encode(tokenizer, TEXTS, 64), model.config.pad_token_id))
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    plain_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")

    def logits(texts: list[str], **options: Any) -> torch.Tensor:
        return plain(**plain_tokenizer(texts, return_tensors="pt", **options)).logits[:, 0]

    assert found.dtype == torch.float32
    assert found.std() > 0.1  # of texts that differ
    one_by_one = torch.cat([logits([text]) for text in TEXTS])
    torch.testing.assert_close(found, one_by_one, atol=1e-5, rtol=0)
    torch.testing.assert_close(found, logits(TEXTS, padding=True), atol=1e-5, rtol=0)
    with_eos = [text + "</s>" for text in TEXTS]
    torch.testing.assert_close(found, logits(with_eos, padding=True), atol=1e-5, rtol=0)
    cut = scalars(model, pad(encode(tokenizer, TEXTS, 5), model.config.pad_token_id))
    torch.testing.assert_close(cut, logits(TEXTS, padding=True, truncation=True, max_length=5), atol=1e-5, rtol=0)
    assert not torch.allclose(cut[0], found[0], atol=1e-3)

    again = load_scalar_model(str(tmp_path / "saved"), dtype=torch.float32, new_head=False).eval()
    torch.testing.assert_close(scalars(again, pad(encode(tokenizer, TEXTS, 64), EOS)), found, atol=1e-7, rtol=0)


@torch.no_grad()
def test_it_is_read_at_the_last_token_before_eos(causal_lm: Path) -> None:
    model = load_new(causal_lm)
    ids = [[1, 5, 7, 6], [1, 9]]
    found = scalars(model, pad(ids, EOS))
    for row, number in zip(ids, found, strict=True):
        hidden = model.base_model(torch.tensor([[*row, EOS]])).last_hidden_state[0, len(row) - 1]
        torch.testing.assert_close(number, model.score(hidden)[0], atol=1e-5, rtol=0)


def test_encode(tokenizer: PreTrainedTokenizerFast, bare_tokenizer: PreTrainedTokenizerFast, tiny_llama: str) -> None:
    whole = [1, 4, 3, 5, 3, 6, 3, 7]  # <s>the film was good
    assert encode(tokenizer, ["the film was good", "the film was good</s></s>"], 64) == [whole, whole]
    assert encode(tokenizer, ["the film was good", "bad"], 5) == [[1, 3, 6, 3, 7], [1, 8]]
    assert encode(tokenizer, ["the film was good"], 1) == [[7]]
    assert encode(bare_tokenizer, ["the film was good</s>"], 5) == [whole[3:]]
    assert encode(tokenizer, [""], 5) == [[1]]
    assert encode(tokenizer, [], 5) == []
    with pytest.raises(InputError, match="no tokens"):
        encode(bare_tokenizer, ["bad", ""], 5)
    adding = AutoTokenizer.from_pretrained(tiny_llama)
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", EOS)]
    )
    assert adding("bad")["input_ids"] == [1, 8, EOS]
    assert encode(adding, ["bad", "the film was good"], 8) == [[1, 8], whole]


def test_pad() -> None:
    batch = pad([[1, 5, 7], [1]], 2)
    assert batch["input_ids"].tolist() == [[1, 5, 7], [1, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_new_head_is_seeded_and_an_old_one_is_kept(causal_lm: Path, tmp_path: Path) -> None:
    model = load_new(causal_lm, seed=1)
    body = AutoModelForCausalLM.from_pretrained(causal_lm).base_model.state_dict()
    assert all(torch.equal(body[name], value) for name, value in model.base_model.state_dict().items())
    assert torch.equal(model.score.weight, load_new(causal_lm, seed=1).score.weight)
    assert not torch.equal(model.score.weight, load_new(causal_lm, seed=2).score.weight)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_new(tmp_path / "saved", seed=2).score.weight, model.score.weight)


def test_errors(tiny_llama: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def load(path: object, new_head: bool = False) -> None:
        load_scalar_model(str(path), dtype=torch.float32, new_head=new_head)

    with pytest.raises(InputError, match=r"holds LlamaForCausalLM, where a sequence classifier with one logit"):
        load(tiny_llama)
    with pytest.raises(InputError, match="cannot be loaded"):
        load(tmp_path / "nowhere", new_head=True)
    AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=3).save_pretrained(tmp_path / "three")
    for new_head in (False, True):
        with pytest.raises(InputError, match="a classifier with 3 logits, where one is needed"):
            load(tmp_path / "three", new_head)
    bert = BertConfig(vocab_size=17, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_labels=1)
    AutoModelForSequenceClassification.from_config(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="BertForSequenceClassification does not read its number at the last token"):
        load(tmp_path / "bert")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="a LoRA adapter"):
        load(tmp_path / "adapter")
    bare = AutoTokenizer.from_pretrained(tiny_llama, eos_token=None)
    with pytest.raises(InputError, match="no EOS token"):
        pad_with_eos(bare)


def test_a_file_that_lacks_weights_is_refused(tiny_llama: str, tmp_path: Path) -> None:
    load_new(Path(tiny_llama)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for lost in ("model.norm.weight", "score.weight"):
        kept = {name: tensor for name, tensor in weights.items() if name != lost}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=rf"its files lack the weights {lost}\."):
            load_scalar_model(str(tmp_path), dtype=torch.float32, new_head=False)


def test_bos_comes_once_and_the_end_of_turn_is_not_read() -> None:
    tokenizer = pad_with_eos(chats.metaspace(chats.WITH_BOS))
    text = tokenizer.apply_chat_template([chats.user("hello"), chats.say("good")], tokenize=False)
    assert text.startswith("<s>")
    (ids,) = encode(tokenizer, [text.rstrip()], 64)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    other = chats.byte_level(chats.CHATML, "<|endoftext|>")
    assert (
        encode(other, ["good<|im_end|>"], 64) == encode(other, ["good"], 64) == encode(other, ["good<|endoftext|>"], 64)
    )


def test_a_model_that_is_read_at_the_end() -> None:
    """TRL ends a text with EOS, and a conversation with all that the template writes."""
    tokenizer = chats.byte_level(chats.CHATML, "<|endoftext|>")
    end = tokenizer.eos_token_id
    assert encode(tokenizer, ["good"], 64, at_end=True) == [[*encode(tokenizer, ["good"], 64)[0], end]]
    assert encode(tokenizer, ["good<|endoftext|>"], 64, at_end=True) == encode(tokenizer, ["good"], 64, at_end=True)
    messages = [chats.user("hello"), chats.say("good")]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.endswith("<|im_end|>\n")
    whole = [tokenizer.apply_chat_template(messages)["input_ids"]]
    assert encode(tokenizer, [text], 64, at_end=True) == whole
    # As stages write it: up to the end of turn; and as a model wrote it, whose end of turn is no text.
    assert encode(tokenizer, [text.removesuffix("\n")], 64, at_end=True) == whole
    assert encode(tokenizer, [text.removesuffix("<|im_end|>\n")], 64, at_end=True) == whole
    config = LlamaConfig(pad_token_id=end)
    assert not reads_at_end(config, tokenizer)
    assert reads_at_end(LlamaConfig(pad_token_id=end + 1), tokenizer)
    assert not reads_at_end(LlamaConfig(pad_token_id=None), tokenizer)
