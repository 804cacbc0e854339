"""The preset for long rows, and MLPs in pieces."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from exo_fast.training.errors import InputError
from exo_fast.training.models.tiled_mlp import TILE_TOKENS, tile_mlps
from exo_fast.training.stages.align import AlignConfig, align, preset_line
from exo_fast.training.trainer import compat

CHECKPOINTING = "activation_checkpointing" if compat.ACTIVATION_CHECKPOINTING else "gradient_checkpointing"

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "llama": transformers.LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=1),
    "phi3": transformers.Phi3Config(**SIZES, intermediate_size=64, num_key_value_heads=1, pad_token_id=0),
    "gpt2": transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
}
SET = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "tiled_mlp": True}


def make_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(MODELS[name])).double().train()


def loss_of(model: torch.nn.Module, tokens: int) -> torch.Tensor:
    ids = torch.arange(2 * tokens).view(2, tokens) % 40
    return model(input_ids=ids).logits.square().mean()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tokens", [17, 3])  # 4 pieces; with fewer tokens than pieces some are empty
def test_mlps_in_pieces_give_the_same_gradients(name: str, checkpointing: bool, tokens: int) -> None:
    whole = make_model(name)
    tiled = copy.deepcopy(whole)
    if checkpointing:
        tiled.gradient_checkpointing_enable()
    assert tile_mlps(tiled, max_seq_len=4 * TILE_TOKENS) == 4
    expected, found = loss_of(whole, tokens), loss_of(tiled, tokens)
    expected.backward()
    found.backward()
    torch.testing.assert_close(found, expected)
    for (parameter, right), (label, _) in zip(
        zip(tiled.parameters(), whole.parameters(), strict=True), whole.named_parameters(), strict=True
    ):
        torch.testing.assert_close(parameter.grad, right.grad, msg=lambda text, n=label: f"{n}: {text}")


def test_what_an_mlp_keeps_is_its_input() -> None:
    """The bytes that its forward leaves for the backward pass."""

    def kept(module: torch.nn.Module) -> int:
        storages: dict[int, int] = {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            module(hidden)
        return sum(size for place, size in storages.items() if place not in weights)

    model = make_model("llama")
    mlp = model.model.layers[0].mlp
    hidden = torch.randn(1, 64, 16, dtype=torch.float64, requires_grad=True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in mlp.parameters()}
    untiled = kept(mlp)
    tile_mlps(model, max_seq_len=4 * TILE_TOKENS)
    tiled = kept(mlp)
    assert untiled >= hidden.nbytes + 3 * 4 * hidden.nbytes  # three activations of the intermediate size
    assert tiled <= 1.1 * hidden.nbytes  # and a few numbers for each piece


def test_only_the_model_that_is_given_is_tiled() -> None:
    tile_mlps(make_model("llama"), max_seq_len=TILE_TOKENS)
    assert "forward" not in vars(make_model("llama").model.layers[0].mlp)


def test_a_mixture_of_experts_is_not_tiled() -> None:
    config = transformers.MixtralConfig(**SIZES, intermediate_size=32, num_key_value_heads=1, num_local_experts=2)
    with pytest.raises(InputError, match=r"MixtralForCausalLM has no MLPs .* set --tiled_mlp false"):
        tile_mlps(AutoModelForCausalLM.from_config(config), max_seq_len=TILE_TOKENS)


# The preset


Settings = Callable[..., dict[str, Any]]


def config(settings: Settings, **options: Any) -> AlignConfig:
    """A configuration in which nothing that the preset is about is named, but for `options`."""
    named = {name: value for name, value in settings().items() if name not in SET}
    return AlignConfig(**{**named, **options})


def test_what_the_preset_sets(settings: Settings) -> None:
    plain, long = config(settings), config(settings, long_sequence=True)
    names = [*SET, CHECKPOINTING]
    assert [getattr(plain, name) or 0 for name in names] == [8, 8, 0, 0]
    assert [getattr(long, name) for name in names] == [1, 1, True, True]
    assert (plain.preset, long.preset) == ({}, {**SET, "gradient_checkpointing": True})
    # On a CPU activations are where offloading would put them, and sdpa works by parts there.
    assert long.attn_implementation is None
    assert not getattr(long, "activation_checkpointing_kwargs", None)
    assert preset_line(long.preset) == (
        "long_sequence: per_device_train_batch_size 1, per_device_eval_batch_size 1, tiled_mlp True, "
        "gradient_checkpointing True"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("per_device_train_batch_size", 8),  # the value that it has without the preset
        ("per_device_eval_batch_size", 3),
        ("tiled_mlp", False),
        ("gradient_checkpointing", False),
        (CHECKPOINTING, False),
    ],
)
def test_a_named_field_overrides_the_preset(settings: Settings, name: str, value: Any) -> None:
    found = config(settings, long_sequence=True, **{name: value})
    assert getattr(found, CHECKPOINTING if "checkpointing" in name else name) == value
    one_field = {"gradient_checkpointing", CHECKPOINTING}  # by two names
    assert found.preset.keys() == {*SET, "gradient_checkpointing"} - (one_field if name in one_field else {name})


def test_a_run_with_the_preset_equals_one_without(settings: Settings, tmp_path: Any, capsys: Any) -> None:
    common = {"max_steps": 3, "engine": "torch", "max_seq_len": 100}
    batch = {"per_device_train_batch_size": 4}
    plain = align(config(settings, **common, **batch, output_dir=str(tmp_path / "plain")))
    assert "long_sequence" not in capsys.readouterr().out
    long = align(config(settings, **common, **batch, long_sequence=True, output_dir=str(tmp_path / "long")))
    assert "long_sequence: per_device_eval_batch_size 1, tiled_mlp True, gradient" in capsys.readouterr().out
    for split in ("train", "eval"):
        for name, value in plain["metrics"][split]["last"].items():
            if "loss" in name or "kl" in name or name == "grad_norm":
                assert long["metrics"][split]["last"][name] == pytest.approx(value, abs=1e-4), name
