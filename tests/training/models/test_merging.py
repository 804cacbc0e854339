"""Adapters merged into their base: the same numbers, also where the head is tied to an embedding that was adapted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    PreTrainedTokenizerFast,
    set_seed,
)

from exo_fast.head import read_head
from exo_fast.training.errors import InputError
from exo_fast.training.inference.config import InferenceConfig, load_model
from exo_fast.training.models import merging
from exo_fast.training.models.merging import merge_adapter, save_merged
from exo_fast.training.stages.align import AlignConfig, align
from exo_fast.training.stages.logprobs import LogprobsConfig, logprobs

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:.*tie", "ignore:.*tied")
IDS = torch.tensor([[1, 4, 9, 6, 16, 0]])


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    """A GPT-2: its layers are Conv1D, whose weights lie the other way round, and its head is tied."""
    directory = tmp_path_factory.mktemp("tiny_gpt2")
    set_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def untied_llama(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> str:
    directory = tmp_path_factory.mktemp("untied_llama")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.2)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(directory)
    return str(directory)


def noisy(adapted: nn.Module) -> nn.Module:
    """Change every weight that training would change."""
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return adapted.eval()


# Base, options of the LoRA, and whether the head is the embedding after the merge.
ADAPTERS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "plain": ("tiny_llama", {"target_modules": ["q_proj", "v_proj"]}, True),
    "embedding of a tied model": ("tiny_llama", {"target_modules": ["q_proj", "embed_tokens"]}, False),
    "embedding of an untied model": ("untied_llama", {"target_modules": ["q_proj", "embed_tokens"]}, False),
    "tied by PEFT too": ("tiny_llama", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "head trained in full": ("tiny_llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    "embedding in full": ("tiny_llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "some tokens": ("tiny_llama", {"target_modules": ["q_proj"], "trainable_token_indices": [4, 9]}, True),
    "DoRA": ("tiny_llama", {"target_modules": "all-linear", "use_dora": True}, True),
    "DoRA on the embedding": ("tiny_llama", {"target_modules": ["embed_tokens"], "use_dora": True}, False),
    "rsLoRA": ("tiny_llama", {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3}, True),
    "Conv1D": ("tiny_gpt2", {"target_modules": ["c_attn", "c_proj"]}, True),
    "Conv1D and a tied embedding": ("tiny_gpt2", {"target_modules": ["c_attn", "wte"]}, False),
}


@pytest.mark.parametrize(("base", "lora", "tied"), ADAPTERS.values(), ids=ADAPTERS.keys())
def test_a_merged_model_is_the_adapted_one(
    request: pytest.FixtureRequest, tmp_path: Path, base: str, lora: dict[str, Any], tied: bool
) -> None:
    path = request.getfixturevalue(base)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(path)
    adapted = noisy(get_peft_model(plain, LoraConfig(r=4, task_type="CAUSAL_LM", **lora)))
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(IDS).logits
        unadapted = AutoModelForCausalLM.from_pretrained(path)(IDS).logits
    assert (expected - unadapted).abs().max() > 0.1
    merged = load_model(InferenceConfig(data="d", output_dir="o", use_cpu=True), str(tmp_path / "adapter"))
    save_merged(str(tmp_path / "adapter"), str(tmp_path / "whole"))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    for model in (merged, whole):
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, expected, atol=2e-5, rtol=1e-5)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
        assert model.config.tie_word_embeddings == tied
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").eos_token == "</s>"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_that_changes_numbers_is_refused(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    noisy(get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]))).save_pretrained(tmp_path)
    merged = merge_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype), str(tmp_path))
    assert merged.dtype == dtype
    monkeypatch.setattr(merging, "_give_head_its_own_weights", lambda adapted: False)  # as with PEFT alone
    with pytest.raises(InputError, match=r"cannot be merged into its base .*: the logits of 16 tokens differ by \d"):
        merge_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype), str(tmp_path))


@pytest.mark.parametrize("engine", [{"engine": "torch"}, {"zero_stage": 3}], ids=["torch", "ZeRO-3"])
def test_training_evaluates_what_the_merged_adapter_gives(
    settings: Any, data_directory: str, tmp_path: Path, engine: dict[str, Any]
) -> None:
    options = settings(**engine, lora_r=4, lora_target_modules=["q_proj", "embed_tokens"], learning_rate=3e-2)
    last = align(AlignConfig(**options))["metrics"]["eval"]["last"]
    folders = {"data": data_directory, "output_dir": str(tmp_path / "logps")}
    lengths = {"max_seq_len": 64, "max_gen_len": 16, "split": "test"}
    logprobs(LogprobsConfig(model_name_or_path=options["output_dir"], use_cpu=True, **folders, **lengths))
    rows = json.loads((tmp_path / "logps" / "test.json").read_text())
    data = json.loads(Path(data_directory, "test.json").read_text())
    best = [row["logprobs"][example["rewards"].index(max(example["rewards"]))]
            for row, example in zip(rows, data, strict=True)]  # fmt: skip
    assert sum(best) / len(best) == pytest.approx(last["eval_logps/chosen"], abs=1e-3)


@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_a_tied_head_is_read_as_the_adapted_model_uses_it(tiny_llama: str, target: str) -> None:
    """PEFT's forward does not see an adapter on the embedding in the head, in value and in gradient."""
    torch.manual_seed(0)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), LoraConfig(r=4, target_modules=[target]))
    noisy(adapted)
    output = adapted(IDS, output_hidden_states=True)
    hidden, head = output.hidden_states[-1], read_head(adapted)
    torch.testing.assert_close(hidden @ head.weight.T, output.logits)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(output.logits.logsumexp(-1).sum(), trained)
    again = adapted(IDS, output_hidden_states=True).hidden_states[-1]
    found = torch.autograd.grad((again @ read_head(adapted).weight.T).logsumexp(-1).sum(), trained)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


# What cannot be merged, or is given where it does not belong


def test_adapters_of_scalar_models(tiny_llama: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)
    base.config.pad_token_id = 2
    adapted = noisy(get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")))
    adapted.save_pretrained(tmp_path / "rm")
    with pytest.raises(InputError, match="an adapter of a reward model or a classifier, where one of a language model"):
        load_model(InferenceConfig(data="d", output_dir="o", use_cpu=True), str(tmp_path / "rm"))
    save_merged(str(tmp_path / "rm"), str(tmp_path / "whole"))
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(IDS).logits, adapted(IDS).logits, atol=1e-5, rtol=1e-5)


def test_the_command_in_the_message_merges(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: str
) -> None:
    torch.manual_seed(0)
    adapter = str(tmp_path / "adapter")
    noisy(get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), LoraConfig(r=2))).save_pretrained(adapter)
    with pytest.raises(InputError, match="a LoRA adapter, where a whole model is needed; merge it first: ") as refused:
        align(AlignConfig(**settings(model_name_or_path=adapter)))
    monkeypatch.chdir(tmp_path)
    exec(str(refused.value).partition('python -c "')[2].rpartition('"')[0])
    assert (tmp_path / "adapter-merged" / "model.safetensors").is_file()
    assert (
        align(AlignConfig(**settings(model_name_or_path=str(tmp_path / "adapter-merged"), max_steps=1)))["steps"] == 1
    )


def test_adapters_that_add_to_the_input(tiny_llama: str, tmp_path: Path) -> None:
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), prompts).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="a PROMPT_TUNING adapter, which adds to the input and cannot be merged"):
        merge_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), str(tmp_path))


def test_an_adapter_of_a_larger_vocabulary(tiny_llama: str, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    base.resize_token_embeddings(20)
    lora = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    noisy(get_peft_model(base, lora)).save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    message = r"does not fit its base .*\[20, 32\]\) from checkpoint.*resize_token_embeddings"
    with pytest.raises(InputError, match=message):
        merge_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    base.resize_token_embeddings(20)
    base.save_pretrained(tmp_path / "base")
    shutil.copy(Path(tiny_llama, "tokenizer.json"), tmp_path / "base")
    merge_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter"))
