"""`read_head` and `final_hidden` against the logits of tiny random models, and through PEFT's wrappers."""

import families
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from exo_fast import reference
from exo_fast.head import KNOWN_HEADS, Head, final_hidden, read_head
from exo_fast.logprobs import linear_logprobs


@pytest.fixture
def input_ids() -> Tensor:
    return torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(0))


def logits(head: Head, hidden: Tensor) -> Tensor:
    return reference.logits(hidden, head.weight, head.bias, head.scale, head.softcap)


def test_logits_from_head_and_hidden_are_the_models_own(family: str, input_ids: Tensor):
    model = families.tiny_model(family)
    with torch.no_grad():
        hidden = final_hidden(model, input_ids=input_ids)
        expected = model(input_ids=input_ids).logits
    assert hidden.shape[:2] == input_ids.shape
    torch.testing.assert_close(logits(read_head(model), hidden), expected, rtol=1e-5, atol=1e-5)


def test_every_known_type_is_compared():
    assert set(KNOWN_HEADS) == {model_type for model_type, _ in families.FAMILIES.values()}


def test_facts():
    """Each fact where it is not the default, so that the comparison above rests on models that have them."""
    assert read_head(families.tiny_model("cohere")).scale == 0.3
    assert read_head(families.tiny_model("granite")).scale == 0.25
    assert read_head(families.tiny_model("gemma2")).softcap == 3.0
    assert read_head(families.tiny_model("gemma3")).softcap is None
    assert read_head(families.tiny_model("phi")).bias.shape == (61,)
    assert read_head(families.tiny_model("llama")).bias is None


def test_options_are_what_the_losses_take(input_ids: Tensor):
    """Keyword arguments of every fact, and with a temperature."""
    for family in ("cohere", "gemma2", "phi"):
        model = families.tiny_model(family)
        head = read_head(model)
        with torch.no_grad():
            hidden, expected = final_hidden(model, input_ids=input_ids), model(input_ids=input_ids).logits / 0.5
            found = linear_logprobs(hidden, head.weight, input_ids, **head.options(0.5))
        expected = expected.log_softmax(-1).gather(-1, input_ids[..., None])[..., 0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    group = object()
    assert Head(head.weight, scale=3.0, process_group=group).options(2.0) == {
        "bias": None,
        "scale": 1.5,
        "softcap": None,
        "process_group": group,
    }


def test_weight_is_the_parameter_itself(input_ids: Tensor):
    untied, tied = families.tiny_model("llama"), families.tiny_model("llama-tied")
    assert read_head(untied).weight is untied.lm_head.weight
    assert not read_head(untied).tied
    assert read_head(tied).weight is tied.model.embed_tokens.weight
    assert read_head(tied).tied
    logits(read_head(untied), final_hidden(untied, input_ids=input_ids)).square().sum().backward()
    assert untied.lm_head.weight.grad.abs().sum() > 0
    assert untied.model.embed_tokens.weight.grad.abs().sum() > 0


def test_unknown_type_is_named():
    model = families.random_model("hyperclovax", **families.LLAMA)
    with pytest.raises(ValueError, match=r"'hyperclovax'.*Known types: .*llama.*pass a Head\(weight, bias"):
        read_head(model)


def test_peft_adapters_stay_in_effect(input_ids: Tensor):
    base = families.tiny_model("qwen2")
    plain = final_hidden(base, input_ids=input_ids)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    with torch.no_grad():
        hidden = final_hidden(model, input_ids=input_ids)
        assert not torch.allclose(hidden, plain)
        torch.testing.assert_close(logits(read_head(model), hidden), model(input_ids=input_ids).logits)
        with model.disable_adapter():
            torch.testing.assert_close(final_hidden(model, input_ids=input_ids), plain)


def test_peft_head_trained_in_full(input_ids: Tensor):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(families.tiny_model("llama"), config).eval()
    trained = model.base_model.model.lm_head.modules_to_save["default"].weight
    original = model.base_model.model.lm_head.original_module.weight
    with torch.no_grad():
        trained.mul_(1.5)
        expected = model(input_ids=input_ids).logits
        assert read_head(model).weight is trained
        torch.testing.assert_close(logits(read_head(model), final_hidden(model, input_ids=input_ids)), expected)
        with model.disable_adapter():
            assert read_head(model).weight is original
            hidden = final_hidden(model, input_ids=input_ids)
            torch.testing.assert_close(logits(read_head(model), hidden), model(input_ids=input_ids).logits)


def test_head_under_lora_is_refused():
    model = get_peft_model(families.tiny_model("llama"), LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match=r"lm_head is under an adapter.*target_modules.*modules_to_save"):
        read_head(model)
    read_head(model.merge_and_unload())


def test_a_tied_head_under_lora_is_told_to_part_first():
    model = get_peft_model(families.tiny_model("llama-tied"), LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match=r"merge_and_unload; a head that is tied to the input embedding has to get a"):
        read_head(model)


def test_prompt_learning_is_refused(input_ids: Tensor):
    model = get_peft_model(
        families.tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match=r"PROMPT_TUNING puts learned tokens before the input.*LoRA"):
        final_hidden(model, input_ids=input_ids)


def test_a_wrapper_is_refused():
    with pytest.raises(ValueError, match=r"got Sequential.*\.module"):
        read_head(nn.Sequential(families.tiny_model("llama")))


def test_a_head_of_another_kind_is_refused():
    model = families.tiny_model("llama")
    model.lm_head = nn.Identity()
    with pytest.raises(ValueError, match=r"lm_head is a torch.nn.modules.linear.Identity.*unquantised"):
        read_head(model)


def test_a_model_without_a_body_of_its_own_is_refused(input_ids: Tensor):
    model = families.tiny_model("llama")
    type(model).base_model_prefix, prefix = "", type(model).base_model_prefix
    try:
        with pytest.raises(ValueError, match="LlamaForCausalLM has no base model apart from its lm_head"):
            final_hidden(model, input_ids=input_ids)
    finally:
        type(model).base_model_prefix = prefix


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_numbers_that_make_no_logits_are_refused(value: float):
    for family, name in (("cohere", "logit_scale"), ("granite", "logits_scaling")):
        model = families.tiny_model(family)
        setattr(model.config, name, value)
        with pytest.raises(ValueError, match=f"model type '{family}': its config has"):
            read_head(model)


def test_hidden_states_are_multiplied_in_the_dtype_of_the_weight(input_ids: Tensor):
    """Float32 states below a bf16 head, bf16 ones below a float32 head, whatever the bias is; autocast casts both."""
    for weight, states in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16,) * 2):
        head = Head(torch.randn(61, 32, dtype=weight), torch.randn(61))
        hidden = torch.randn(2, 11, 32, dtype=states)
        assert head.multiplied(hidden).dtype == weight
        with torch.autocast("cpu", torch.bfloat16):
            assert head.multiplied(hidden) is hidden
        found = linear_logprobs(head.multiplied(hidden), head.weight, input_ids, bias=head.bias)
        expected = logits(head, hidden.to(weight)).log_softmax(-1).gather(-1, input_ids[..., None])[..., 0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        if weight != states:
            with pytest.raises(ValueError, match=r"cast one of them, or call under torch\.autocast"):
                linear_logprobs(hidden, head.weight, input_ids)
