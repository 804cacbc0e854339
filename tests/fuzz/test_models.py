"""Model and adapter directories that are damaged, lie, or carry pickles: loaded, or an InputError that names them.

No code in a file is ever run, and no weights are read from outside the directory.
"""

import json
import os
import pickle
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import JSON, REFUSED, damaged, fuzzed, judge, mutated
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from exo_fast.training.errors import InputError
from exo_fast.training.models.loading import adapter_base, from_pretrained

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Payload:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, the same in shards, and an adapter."""
    place = tmp_path_factory.mktemp("saved")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for name, size in (("whole", "1GB"), ("shards", "1KB")):
        model.save_pretrained(place / name, max_shard_size=size)
        tokenizer.save_pretrained(place / name)
    assert (place / "shards" / INDEX).is_file()
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(place / "adapter")
    return place


@contextmanager
def copied(saved: Path, name: str) -> Iterator[Path]:
    """A copy of one of the directories, and beside it the others and whatever a payload makes."""
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("whole", "shards", "adapter"):
            shutil.copytree(saved / kind, Path(folder, kind if kind != name else "here"))
        settings = Path(folder, "here" if name == "adapter" else "adapter", "adapter_config.json")
        settings.write_text(
            settings.read_text().replace('"base_model_name_or_path": ""', '"base_model_name_or_path": "x"')
        )
        content = {**json.loads(settings.read_text()), "base_model_name_or_path": str(saved / "whole")}
        settings.write_text(json.dumps(content))
        yield Path(folder, "here")
        assert not Path(folder, "marker").exists()


def load(auto_class: Any, path: Path) -> Any:
    return judge(lambda: from_pretrained(auto_class, str(path), trust_remote_code=False), InputError, [str(path)])


CONFIG_JUNK = JSON | st.sampled_from([2**40, 10**9, "llama", "gpt2", "x", {"x.py": "y"}, "../whole", 0, -1])
ESCAPES = st.sampled_from(
    ["../whole/model.safetensors", "/etc/passwd", "..", "", "a\0b", "./x", "a/b", "model.safetensors"]
)


@fuzzed(60)
@given(data=st.data(), name=st.sampled_from(["whole", "shards"]))
def test_models(saved: Path, data: st.DataObject, name: str) -> None:
    with copied(saved, name) as place:
        path = place / data.draw(st.sampled_from(sorted(os.listdir(place))))
        if path.suffix == ".json" and data.draw(st.integers(0, 3)):
            junk = (ESCAPES | JSON) if path.name == INDEX else CONFIG_JUNK
            path.write_text(json.dumps(data.draw(mutated(json.loads(path.read_text()), junk))))
        else:
            path.write_bytes(data.draw(damaged(path.read_bytes())))
        for auto_class in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
            load(auto_class, place)


@fuzzed(40)
@given(data=st.data())
def test_headers_of_safetensors(saved: Path, data: st.DataObject) -> None:
    with copied(saved, "whole") as place:
        content = (place / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        junk = st.sampled_from([2**63, 2**62, -1, 0, 10**30, [2**40, 2**40], "F64", "x"]) | JSON
        changed = json.dumps(data.draw(mutated(header, junk))).encode("utf-8", "surrogatepass")
        claimed = data.draw(st.sampled_from([len(changed), len(changed), 0, 2**40, 2**63, 2**64 - 1, len(changed) + 9]))
        (place / WEIGHTS).write_bytes(struct.pack("<Q", claimed) + changed + content[8 + length :])
        load(AutoModelForCausalLM, place)


@fuzzed(40)
@given(data=st.data())
def test_adapters(saved: Path, data: st.DataObject) -> None:
    with copied(saved, "adapter") as place:
        path = place / data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
        if path.suffix == ".json" and data.draw(st.integers(0, 3)):
            junk = JSON | st.sampled_from(["../whole", "/nowhere", "LORA", "XLORA", "~nosuchuser", "a\0b"])
            path.write_text(json.dumps(data.draw(mutated(json.loads(path.read_text()), junk))))
        else:
            path.write_bytes(data.draw(damaged(path.read_bytes())))
        judge(lambda: adapter_base(str(place)), InputError, [str(place)])


@pytest.mark.parametrize("name", ["whole", "adapter"])
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickles_are_not_read(saved: Path, name: str, how: str) -> None:
    with copied(saved, name) as place:
        safe, unsafe = ((WEIGHTS, "pytorch_model.bin"), ("adapter_model.safetensors", "adapter_model.bin"))[
            name == "adapter"
        ]
        (place / safe).unlink()
        with (place / unsafe).open("wb") as file:
            payload = Payload(place.parent / "marker")
            torch.save(payload, file) if how == "torch" else pickle.dump(payload, file)
        with pytest.raises(InputError, match=f"holds no {safe}; {unsafe} is a pickle, which could run anything"):
            adapter_base(str(place)) if name == "adapter" else load_or_raise(place)
        # Under the name of safetensors it is no readable file.
        (place / unsafe).rename(place / safe)
        with pytest.raises(InputError, match=f"{safe}: not a readable safetensors file"):
            adapter_base(str(place)) if name == "adapter" else load_or_raise(place)


def load_or_raise(place: Path) -> Any:
    return from_pretrained(AutoModelForCausalLM, str(place), trust_remote_code=False)


@pytest.mark.parametrize("where", ["../whole/model.safetensors", "{whole}/model.safetensors"])
def test_shards_lie_in_the_directory(saved: Path, where: str) -> None:
    with copied(saved, "shards") as place:
        index = json.loads((place / INDEX).read_text())
        weights = load_file(place.parent / "whole" / WEIGHTS)
        save_file({name: tensor + 1 for name, tensor in weights.items()}, place.parent / "whole" / WEIGHTS)
        name = where.format(whole=place.parent / "whole")
        (place / INDEX).write_text(json.dumps({**index, "weight_map": dict.fromkeys(index["weight_map"], name)}))
        with pytest.raises(InputError, match=r"index\.json: names .* which is no file of the directory"):
            load_or_raise(place)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; no model has more than 4,096"),
        ("config.json", {"text_config": {"n_routed_experts": 10**6}}, "n_routed_experts is 1000000"),
        ("config.json", {"hidden_size": 2**40}, "hidden_size is 1099511627776"),
        (INDEX, {"weight_map": []}, "has no `weight_map`"),
        ("tokenizer.json", None, r"tokenizer\.json, line 1: not valid JSON"),
    ],
    ids=["layers", "experts", "width", "no map", "no JSON"],
)
def test_what_is_said_of_a_broken_file(saved: Path, file: str, change: dict[str, Any] | None, message: str) -> None:
    with copied(saved, "shards") as place:
        path = place / file
        path.write_text("{" if change is None else json.dumps({**json.loads(path.read_text()), **change}))
        auto_class = AutoTokenizer if file == "tokenizer.json" else AutoModelForCausalLM
        with pytest.raises(InputError, match=message):
            from_pretrained(auto_class, str(place), trust_remote_code=False)


def test_an_untouched_copy_loads(saved: Path) -> None:
    for name in ("whole", "shards"):
        with copied(saved, name) as place:
            assert load(AutoModelForCausalLM, place) is not REFUSED
    with copied(saved, "adapter") as place:
        assert adapter_base(str(place)) == str(saved / "whole")
