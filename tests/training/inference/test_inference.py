"""Loading models for inference."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from exo_fast.precision import matmul_precision
from exo_fast.training.data.sources import find_splits
from exo_fast.training.errors import InputError
from exo_fast.training.inference.config import InferenceConfig, load_model
from exo_fast.training.models.digests import digest
from exo_fast.training.models.loading import load_tokenizer
from exo_fast.training.options import resolve


def config(**overrides: Any) -> InferenceConfig:
    return InferenceConfig(**{"data": "data", "output_dir": "out", "use_cpu": True, **overrides})


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_a_lora_adapter_is_merged_into_its_base(tiny_llama: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), lora).eval()
    adapted.save_pretrained(tmp_path)
    path = str(tmp_path)
    ids = torch.tensor([[1, 4, 5, 6]])
    expected = adapted(ids).logits
    assert (expected - AutoModelForCausalLM.from_pretrained(tiny_llama)(ids).logits).abs().max() > 0.1
    torch.testing.assert_close(load_model(config(), path)(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert load_tokenizer(path).eos_token == "</s>"  # of the base
    assert digest(path) != digest(tiny_llama)

    adapter = tmp_path / "adapter_config.json"
    adapter.write_text(adapter.read_text().replace(tiny_llama, "/gone"))
    with pytest.raises(InputError, match="base model '/gone' is not there"):
        load_model(config(), path)


def test_attention_is_eager_for_sampling_on_a_cpu_unless_named(tiny_llama: str) -> None:
    def attention(**options: Any) -> str:
        sampling = options.pop("sampling")
        return load_model(config(**options), tiny_llama, sampling=sampling).config._attn_implementation

    assert attention(sampling=True) == "eager"
    assert attention(sampling=False) == "sdpa"
    assert attention(sampling=True, attn_implementation="sdpa") == "sdpa"


def test_digest_sees_weights_and_tokenizer(tiny_llama: str, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(Path(tiny_llama, name).read_bytes())
    before = digest(str(tmp_path))
    (tmp_path / "trainer_state.json").write_text("{}")
    assert digest(str(tmp_path)) == before
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b" ")
        assert digest(str(tmp_path)) != before
        before = digest(str(tmp_path))


def test_splits(tmp_path: Path) -> None:
    rows = json.dumps([{"prompt": "a"}])
    with pytest.raises(InputError, match="holds no train or test split"):
        find_splits(str(tmp_path), "all")
    (tmp_path / "test.json").write_text(rows)
    assert list(find_splits(str(tmp_path), "all")) == ["test"]
    with pytest.raises(InputError, match="holds no train split"):
        find_splits(str(tmp_path), "train")
    (tmp_path / "train.json").write_text(rows)
    (tmp_path / "mine.json").write_text(rows)
    assert list(find_splits(str(tmp_path), "all")) == ["train", "test"]
    for name, split, expected in (("mine", "all", "train"), ("mine", "test", "test"), ("test", "all", "test")):
        assert list(find_splits(str(tmp_path / f"{name}.json"), split)) == [expected]


def test_fast_is_what_the_device_has() -> None:
    assert (resolve("fast", on_cpu=True), resolve("fast", on_cpu=False), resolve("ieee", on_cpu=True)) == (
        "bf16",
        "tf32",
        "ieee",
    )
    with pytest.raises(InputError, match=r"ieee or bf16 is needed on CPU.*this run is on CUDA"):
        resolve("bf16", on_cpu=False)


def test_matmul_precision_is_put_back() -> None:
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    with matmul_precision("bf16"):
        assert backend.fp32_precision == "bf16"
    assert backend.fp32_precision == before
