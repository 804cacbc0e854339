"""`apply_exo_fast` against the model it is applied to: the same loss and gradients, and nothing else changed.

Tolerances are those of float32 sums in another order (1e-5 relative), unless a test says otherwise.
"""

import copy
import inspect
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import forked
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from exo_fast import reference
from exo_fast.head import final_hidden, read_head
from exo_fast.integrations.transformers import apply_exo_fast, remove_exo_fast

IDS = torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(0))
LABELS = IDS.clone()
LABELS[0, :4] = LABELS[1, 7:] = -100
BATCH = {"input_ids": IDS, "labels": LABELS}


def loss_and_gradients(model: nn.Module, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(patched: nn.Module, own: nn.Module, *, rtol: float = 1e-5, **inputs: Any) -> None:
    """Equal losses, and gradients that differ by `rtol` of the largest entry of all."""
    loss, gradients = loss_and_gradients(patched, **inputs)
    own_loss, own_gradients = loss_and_gradients(own, **inputs)
    assert loss.dtype == own_loss.dtype or own.dtype == torch.float64
    torch.testing.assert_close(loss, own_loss, rtol=rtol, atol=0, check_dtype=False)
    assert gradients.keys() == own_gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in own_gradients.values())
    assert largest > 0
    for name, gradient in own_gradients.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=0, atol=rtol * largest, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.fixture
def own() -> PreTrainedModel:
    return families.tiny_model("llama")


@pytest.fixture
def patched() -> PreTrainedModel:
    return apply_exo_fast(families.tiny_model("llama"))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_every_family(family: str, training: bool) -> None:
    """Also with the router loss of a mixture of experts, and under dropout."""
    own = families.tiny_model(family).train(training)
    patched = apply_exo_fast(copy.deepcopy(own))
    router = {"output_router_logits": True} if hasattr(own, "router_aux_loss_coef") else {}
    assert_same_training(patched, own, **BATCH, **router)


INPUTS: dict[str, dict[str, Any]] = {
    "all-labels": {"labels": IDS},
    "padding": {"attention_mask": (torch.arange(11) < torch.tensor([[11], [7]])).long()},
    "number-of-items": {"num_items_in_batch": torch.tensor(37)},
    "number-of-items-int": {"num_items_in_batch": 37},
    "shift-labels": {"shift_labels": LABELS.roll(2, 1)},
    "shift-labels-and-items": {"shift_labels": LABELS.roll(2, 1), "num_items_in_batch": torch.tensor(37)},
    "ignore-index": {"labels": LABELS.clamp(min=0), "ignore_index": 0},
    "last-positions": {"labels": LABELS[:, -7:], "logits_to_keep": 7},
    "some-positions": {"labels": LABELS[:, 2:7], "logits_to_keep": torch.arange(2, 7)},
    "a-mask": {"labels": LABELS[IDS > 30], "logits_to_keep": IDS > 30},
    "embeddings": {"input_ids": None, "inputs_embeds": torch.randn(2, 11, 32)},
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs_mean_what_they_mean_to_the_model(case: str, own: PreTrainedModel, patched: PreTrainedModel) -> None:
    assert_same_training(patched, own, **{**BATCH, **INPUTS[case]})


def test_arguments_by_position(own: PreTrainedModel, patched: PreTrainedModel) -> None:
    mask = torch.ones_like(IDS)
    expected = own(IDS, mask, None, None, None, LABELS).loss
    torch.testing.assert_close(patched(IDS, mask, None, None, None, LABELS).loss, expected)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "cohere", "phi"])
def test_float64_against_the_definition(name: str) -> None:
    """To 1e-12: transformers' own loss would round the logits to float32."""
    model = families.tiny_model(name, dtype=torch.float64)
    logps = model(input_ids=IDS).logits[:, :-1].log_softmax(-1)
    targets = LABELS[:, 1:]
    token_logps = logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    expected = -token_logps[targets != -100].mean()
    expected.backward()
    expected_gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    loss, gradients = loss_and_gradients(apply_exo_fast(model), **BATCH)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    for parameter_name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[parameter_name], gradient, rtol=1e-10, atol=1e-12)


def test_the_lm_head_sees_no_row(patched: PreTrainedModel) -> None:
    rows = []
    patched.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[:2]))
    assert patched(**BATCH).logits is None
    patched(input_ids=IDS)
    assert rows == [(2, 0), (2, 11)]


def test_no_label_counts(own: PreTrainedModel, patched: PreTrainedModel) -> None:
    labels = torch.full_like(IDS, -100)
    assert own(input_ids=IDS, labels=labels).loss.isnan()
    assert patched(input_ids=IDS, labels=labels).loss.isnan()
    assert patched(input_ids=IDS, labels=labels, num_items_in_batch=5).loss == 0


def test_outputs_other_than_the_loss(own: PreTrainedModel, patched: PreTrainedModel) -> None:
    asked = {"output_hidden_states": True, "use_cache": True}
    expected, found = own(**BATCH, **asked), patched(**BATCH, **asked)
    assert list(found.keys()) == [key for key in expected if key != "logits"]
    torch.testing.assert_close(found.hidden_states, expected.hidden_states, rtol=0, atol=0)
    assert found.past_key_values.get_seq_length() == 11
    as_tuple = patched(**BATCH, **asked, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == 3
    torch.testing.assert_close(as_tuple[0], found.loss, rtol=0, atol=0)


def test_return_dict_of_the_config() -> None:
    """A model that heeds it; llama and its kin fail on it themselves."""
    model = apply_exo_fast(families.tiny_model("bloom"))
    model.config.return_dict = False
    loss, *_ = model(**BATCH)
    torch.testing.assert_close(loss, model(**BATCH, return_dict=True).loss, rtol=0, atol=0)


def test_router_outputs() -> None:
    own = families.tiny_model("mixtral")
    patched = apply_exo_fast(copy.deepcopy(own))
    expected, found = (model(**BATCH, output_router_logits=True) for model in (own, patched))
    torch.testing.assert_close(found.aux_loss, expected.aux_loss, rtol=0, atol=0)
    assert found.loss != patched(**BATCH, output_router_logits=False).loss


def test_without_labels_it_is_the_model(own: PreTrainedModel, patched: PreTrainedModel) -> None:
    torch.testing.assert_close(patched(input_ids=IDS).logits, own(input_ids=IDS).logits, rtol=0, atol=0)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(patched.generate(IDS, **options), own.generate(IDS, **options))
    with pytest.raises(ValueError, match="model_kwargs"):  # generate reads the signature
        patched.generate(IDS, **options, not_an_argument=1)


def test_logits_in_evaluation(own: PreTrainedModel) -> None:
    patched = apply_exo_fast(copy.deepcopy(own), eval_logits=True)
    expected, found = own(**BATCH), patched.eval()(**BATCH)
    torch.testing.assert_close((found.loss, found.logits), (expected.loss, expected.logits), rtol=0, atol=0)
    assert patched.train()(**BATCH).logits is None


@pytest.mark.parametrize(
    "options",
    [{"backend": "reference"}, {"memory_budget": 2000}, {"backend": "triton"}],
    ids=["reference", "budget", "triton"],
)
def test_options(options: dict[str, Any], own: PreTrainedModel) -> None:
    if options.get("backend") == "triton" and torch.cuda.is_available():
        pytest.skip("the model is on the CPU, where Triton runs in its interpreter; with a GPU tests do not choose it")
    assert_same_training(apply_exo_fast(copy.deepcopy(own), **options), own, **BATCH)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "bf16"])
def test_bfloat16(weights: torch.dtype) -> None:
    """The same to the precision of bf16, and nearer to the float32 loss of the same hidden states than the model's
    own, whose logits are rounded."""
    own = families.tiny_model("llama", dtype=weights)
    patched = apply_exo_fast(copy.deepcopy(own))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=weights == torch.float32):
        assert_same_training(patched, own, rtol=4e-2, **BATCH)
        hidden = own.model(input_ids=IDS).last_hidden_state
        own_loss, loss = own(**BATCH).loss, patched(**BATCH).loss
    logits = hidden.bfloat16().double() @ own.lm_head.weight.bfloat16().double().T
    exact = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())
    assert abs(loss - exact) < 1e-5 < abs(own_loss - exact)
    if weights == torch.float32:
        (gradient,) = torch.autograd.grad(loss, patched.lm_head.weight)
        assert not torch.equal(gradient, gradient.bfloat16().float()), "dW of float32 weights is not rounded"


STATES = ("falcon-mamba", "mamba", "mamba2")  # of float32 in a model of half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hidden_states_of_another_dtype_than_the_head(family: str, dtype: torch.dtype) -> None:
    """The loss of each family in half precision: that of the product that its own lm_head makes, but for rounding."""
    own = families.tiny_model(family, dtype=dtype)
    hidden = own.base_model(input_ids=IDS).last_hidden_state
    assert (hidden.dtype == torch.float32) == (family in STATES)
    head = read_head(own)
    exact = reference.linear_logprobs(
        hidden.to(dtype)[:, :-1], head.weight, LABELS[:, 1:], bias=head.bias, scale=head.scale, softcap=head.softcap
    )
    exact = -exact.sum() / (LABELS[:, 1:] != -100).sum()
    loss = apply_exo_fast(copy.deepcopy(own))(**BATCH).loss
    torch.testing.assert_close(loss, exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, own(**BATCH).loss.float(), rtol=2e-2, atol=0)


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "bf16"])
def test_gradients_of_states_of_another_dtype(name: str, weights: torch.dtype) -> None:
    own = families.tiny_model(name, dtype=weights)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=weights == torch.float32):
        assert_same_training(apply_exo_fast(copy.deepcopy(own)), own, rtol=4e-2, **BATCH)


def test_a_head_kept_in_float32_on_a_bf16_model() -> None:
    """As it is trained in full beside LoRA. Outside of autocast the model's own forward refuses this."""
    model = adapted(families.tiny_model("llama", dtype=torch.bfloat16), modules_to_save=["lm_head"])
    model.get_base_model().lm_head.modules_to_save["default"].float()
    head = read_head(model)
    hidden = final_hidden(model, input_ids=IDS)
    assert (head.weight.dtype, hidden.dtype) == (torch.float32, torch.bfloat16)
    logps = reference.linear_logprobs(hidden[:, :-1], head.weight, LABELS[:, 1:])
    loss = apply_exo_fast(model)(**BATCH).loss
    torch.testing.assert_close(loss, -logps.sum() / (LABELS[:, 1:] != -100).sum(), rtol=1e-5, atol=0)
    loss.backward()
    assert head.weight.grad.dtype == torch.float32
    assert head.weight.grad.abs().sum() > 0


def adapted(model: PreTrainedModel, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **options
    )
    return get_peft_model(model, config)


@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=["lora", "lora-and-head"])
@pytest.mark.parametrize("first", ["peft", "exo_fast"])
def test_peft(saved: list[str] | None, first: str) -> None:
    own = adapted(families.tiny_model("llama"), modules_to_save=saved)
    if first == "peft":
        patched = apply_exo_fast(adapted(families.tiny_model("llama"), modules_to_save=saved))
    else:
        patched = adapted(apply_exo_fast(families.tiny_model("llama")), modules_to_save=saved)
    for model in (own, patched):
        if saved:
            with torch.no_grad():
                model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    assert type(patched) is type(own)
    assert_same_training(patched, own, **BATCH)
    with own.disable_adapter(), patched.disable_adapter():
        torch.testing.assert_close(patched(**BATCH).loss, own(**BATCH).loss)
    assert patched.state_dict().keys() == own.state_dict().keys()
    remove_exo_fast(patched)
    torch.testing.assert_close(patched(**BATCH).logits, own(**BATCH).logits, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(own: PreTrainedModel, patched: PreTrainedModel, reentrant: bool) -> None:
    patched.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        patched.enable_input_require_grads()
    assert_same_training(patched.train(), own.train(), **BATCH)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_compile(name: str) -> None:
    own = families.tiny_model(name)
    patched = apply_exo_fast(copy.deepcopy(own))
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    loss = compiled(**BATCH, num_items_in_batch=torch.tensor(7)).loss
    loss.backward()
    expected, gradients = loss_and_gradients(own, **BATCH, num_items_in_batch=torch.tensor(7))
    torch.testing.assert_close(loss, expected)
    for parameter_name, parameter in patched.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[parameter_name], rtol=1e-4, atol=1e-5)
    assert patched._exo_fast.hidden is None


def test_ddp(own: PreTrainedModel, patched: PreTrainedModel) -> None:
    """One process. The second step shows that all parameters took part in the first: DDP refuses it otherwise."""
    began = not dist.is_initialized()  # a training in this process before may have
    if began:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(patched)
        for _ in range(2):
            loss = parallel(**BATCH).loss
            loss.backward()
    finally:
        if began:
            dist.destroy_process_group()
    expected, gradients = loss_and_gradients(own, **BATCH)
    torch.testing.assert_close(loss.detach(), expected)
    for name, parameter in patched.named_parameters():
        torch.testing.assert_close(parameter.grad / 2, gradients[name], rtol=1e-4, atol=1e-5)


class Texts(torch.utils.data.Dataset):
    """Sequences of 4 to 12 tokens, in which a part carries no label."""

    def __len__(self) -> int:
        return 18

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(3, 61, (12,), generator=torch.Generator().manual_seed(i))
        labels = torch.where(torch.arange(12) < 4 + i % 9, ids, -100)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def make_trainer(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options.pop("arguments", {}),
    )
    return Trainer(model, arguments, train_dataset=Texts(), eval_dataset=Texts(), **options)


def test_trainer_with_accumulation(own: PreTrainedModel, patched: PreTrainedModel, tmp_path: Path) -> None:
    """Nine steps of three micro-batches with different numbers of labels: losses, evaluation and weights."""
    losses = []
    for model in (own, patched):
        trainer = make_trainer(model, tmp_path)
        assert trainer.model_accepts_loss_kwargs
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        losses[-1].append(trainer.evaluate()["eval_loss"])
    assert len(losses[0]) == 10
    assert losses[0][8] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for parameter, expected in zip(patched.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-3)  # Adam, at a learning rate of 1e-2


def test_trainer_metrics_need_eval_logits(own: PreTrainedModel, tmp_path: Path) -> None:
    def accuracy(prediction: Any) -> dict[str, float]:
        found, labels = prediction.predictions[:, :-1].argmax(-1), prediction.label_ids[:, 1:]
        return {"accuracy": (found == labels)[labels != -100].mean()}

    patched = apply_exo_fast(copy.deepcopy(own), eval_logits=True)
    expected, found = (make_trainer(model, tmp_path, compute_metrics=accuracy).evaluate() for model in (own, patched))
    assert found["eval_accuracy"] == expected["eval_accuracy"]
    assert found["eval_loss"] == expected["eval_loss"]


def test_accelerate_wraps_and_unwraps(own: PreTrainedModel, patched: PreTrainedModel) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer of another test may have settled it
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare_model(patched)
    output = prepared(**BATCH)
    assert output.logits is None
    torch.testing.assert_close(output.loss, own(**BATCH).loss, rtol=2e-2, atol=0)
    with pytest.raises(ValueError, match=r"wrapped after apply_exo_fast.*keep_fp32_wrapper=False"):
        remove_exo_fast(prepared)
    model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert model(**BATCH).logits is None
    remove_exo_fast(model)
    torch.testing.assert_close(model(**BATCH).logits, own(**BATCH).logits, rtol=0, atol=0)


def test_a_forward_that_was_replaced_before(own: PreTrainedModel) -> None:
    """As accelerate's hooks do for a model that is spread over devices."""
    calls = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs.keys())
        return type(own).forward(own, *args, **kwargs)

    expected = own(**BATCH).loss
    own.forward = spy
    torch.testing.assert_close(apply_exo_fast(own)(**BATCH).loss, expected)
    assert len(calls) == 1
    assert remove_exo_fast(own).forward is spy


def test_undo(own: PreTrainedModel) -> None:
    model = copy.deepcopy(own)
    for _ in range(2):  # the second time with other options: they replace the first
        assert apply_exo_fast(model, memory_budget=10**6) is model
        assert apply_exo_fast(model) is model
        assert model._exo_fast.options["memory_budget"] is None
        assert len(model.model._forward_hooks) == 1
        assert remove_exo_fast(model) is model
        assert vars(model).keys() == vars(own).keys()
        assert not model.model._forward_hooks
        assert model.forward.__func__ is type(model).forward
    assert remove_exo_fast(model) is model
    torch.testing.assert_close(model(**BATCH).logits, own(**BATCH).logits, rtol=0, atol=0)


def test_an_error_in_the_forward_leaves_nothing_behind(patched: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 61\)"):
        patched(input_ids=IDS, labels=LABELS + 61)
    with pytest.raises(TypeError):
        patched(input_ids="text", labels=LABELS)
    assert not patched._exo_fast.keeping
    assert patched._exo_fast.hidden is None
    assert patched(input_ids=IDS).logits.shape == (2, 11, 61)


def test_only_the_instance_is_patched(own: PreTrainedModel, patched: PreTrainedModel) -> None:
    assert inspect.signature(patched.forward) == inspect.signature(own.forward)
    assert patched.forward.__doc__ == own.forward.__doc__
    assert own(**BATCH).logits is not None
    assert type(patched).forward is type(own).forward


def test_what_is_saved_does_not_change(own: PreTrainedModel, patched: PreTrainedModel, tmp_path: Path) -> None:
    assert patched.state_dict().keys() == own.state_dict().keys()
    for model, name in ((own, "own"), (patched, "patched")):
        model.save_pretrained(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "own").iterdir())
    assert "model.safetensors" in files
    assert files == sorted(path.name for path in (tmp_path / "patched").iterdir())
    for name in files:
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes()


def test_a_deep_copy_is_patched_and_separate(patched: PreTrainedModel) -> None:
    other = copy.deepcopy(patched)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert other(**BATCH).logits is None
    torch.testing.assert_close(other(**BATCH).loss.item(), torch.tensor(61.0).log().item())
    remove_exo_fast(other)
    assert other(**BATCH).logits is not None
    assert patched(**BATCH).logits is None


def test_a_pickle_comes_back_as_it_was_before(own: PreTrainedModel, patched: PreTrainedModel) -> None:
    saved = io.BytesIO()
    torch.save(patched, saved)
    saved.seek(0)
    for model in (pickle.loads(pickle.dumps(patched)), torch.load(saved, weights_only=False)):
        torch.testing.assert_close(model(**BATCH).logits, own(**BATCH).logits, rtol=0, atol=0)
        assert apply_exo_fast(model)(**BATCH).logits is None
        assert len(model.model._forward_hooks) == 1


@pytest.fixture
def unchanged(own: PreTrainedModel) -> Iterator[PreTrainedModel]:
    before = dict(vars(own))
    yield own
    assert vars(own).keys() == before.keys()
    assert not own.model._forward_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [({"backend": "cuda"}, "backend='cuda' is not known"), ({"memory_budget": 0}, "memory_budget must be a positive")],
    ids=["backend", "budget"],
)
def test_wrong_options(unchanged: PreTrainedModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_exo_fast(unchanged, **options)


def test_another_loss_is_not_replaced(own: PreTrainedModel) -> None:
    own.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    with pytest.raises(ValueError, match=r"the loss of this LlamaForCausalLM is .*lambda"):
        apply_exo_fast(own)
    own.loss_function = ForCausalLMLoss
    assert apply_exo_fast(own)(**BATCH).logits is None


def test_unknown_models_are_refused(own: PreTrainedModel) -> None:
    model = families.random_model("hyperclovax", **families.LLAMA)
    with pytest.raises(ValueError, match=r"'hyperclovax'.*Known types"):
        apply_exo_fast(model)
    assert "forward" not in vars(model)
    with pytest.raises(ValueError, match=r"a transformers causal LM.*got Linear"):
        apply_exo_fast(nn.Linear(2, 2))
    on_head = get_peft_model(copy.deepcopy(own), LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="the lm_head is under an adapter"):
        apply_exo_fast(on_head)
    prompts = get_peft_model(own, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="PROMPT_TUNING puts learned tokens"):
        apply_exo_fast(prompts)


ZERO3 = """
from exo_fast.training.processes import ensure_launcher_environment
ensure_launcher_environment()
import deepspeed, torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from exo_fast.integrations.transformers import apply_exo_fast

sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
keep = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")  # what a model this small is below
zero = {"stage": 3, **{f"stage3_{name}": 0 for name in keep}}
settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
ids = torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(0))
for case in ("untied", "tied", "checkpointed", "lora"):
    losses = []
    for patch in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2, tie_word_embeddings=case == "tied"))
        if case == "checkpointed":
            model.gradient_checkpointing_enable()
        if case == "lora":
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
        if patch:
            apply_exo_fast(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=True)
        head = model.get_output_embeddings()
        head = head.modules_to_save["default"] if case == "lora" else head
        assert head.weight.numel() == 0, head.weight.shape
        losses.append([])
        for _ in range(3):
            output = engine(input_ids=ids, labels=ids)
            assert (output.logits is None) == patch
            engine.backward(output.loss)
            engine.step()
            losses[-1].append(output.loss.item())
        with torch.no_grad():
            engine.eval()
            losses[-1].append(engine(input_ids=ids, labels=ids).loss.item())
        assert head.weight.numel() == 0, "the head was not let go"
        engine.destroy()
    assert losses[0][0] > losses[0][-1], losses
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0)
    print(case, losses[1])
"""


FSDP2 = """
import os
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from exo_fast.integrations.transformers import apply_exo_fast

dist.init_process_group("gloo")
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
ids = torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(dist.get_rank()))
for own_group in (False, True):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2)))
    own, patched = models
    apply_exo_fast(patched)
    for module in (*patched.model.layers, *([patched.lm_head] if own_group else []), patched):
        fully_shard(module, mesh=mesh)
    if own_group:
        try:
            patched(input_ids=ids, labels=ids)
        except ValueError as error:
            assert "ranks differ in the targets" in str(error), error
            print("refused", flush=True)
        continue
    loss, expected = (model(input_ids=ids, labels=ids).loss for model in (patched, own))
    (loss + expected).backward()
    torch.testing.assert_close(loss, expected)
    for parameter, whole in zip(patched.parameters(), own.parameters(), strict=True):
        dist.all_reduce(whole.grad)
        torch.testing.assert_close(parameter.grad.full_tensor(), whole.grad / 2, rtol=1e-4, atol=1e-6)
    print("equal", flush=True)
dist.barrier()
os._exit(0)  # a thread of gloo may still hold a tensor, and aborts when it asks a closing interpreter for its lock
"""


@pytest.mark.slow
def test_fsdp2(tmp_path: Path) -> None:
    """Two processes with different texts: the averaged gradients, or a refusal where the head is in pieces."""
    script = tmp_path / "fsdp2.py"
    script.write_text(FSDP2)
    printed = forked.run(script, processes=2)
    assert (printed.count("equal"), printed.count("refused")) == (2, 2)


@pytest.mark.slow
def test_zero3(tmp_path: Path) -> None:
    """One process whose parameters are partitioned all the same: DeepSpeed gathers the head for the loss."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    script = tmp_path / "zero3.py"
    script.write_text(ZERO3)
    printed = forked.run(script)
    for case in ("untied", "tied", "checkpointed", "lora"):
        assert f"{case} [" in printed
