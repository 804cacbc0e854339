"""LoRA adapters on disk: recognise them, and merge them into their model."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from exo_fast.precision import true_float32
from exo_fast.training.errors import InputError
from exo_fast.training.models.loading import (
    ADAPTER,
    SCALAR_TASK,
    adapter_base,
    adapter_task,
    from_pretrained,
)

PROBED_TOKENS = 16
# Largest difference that merging an adapter may make, over the numbers' root mean square: rounding, by dtype.
MERGE_TOLERANCES = {torch.bfloat16: 0.05, torch.float16: 0.05}
MERGE_TOLERANCE = 1e-4


def merge_adapter(model: nn.Module, path: str) -> nn.Module:
    """Return `model`, the base of the adapter in the directory `path`, with the adapter merged into its weights.

    An adapter on the input embedding does not touch a head tied to it. So the head gets weights of its own before
    merging, and `config.tie_word_embeddings` becomes false, unless both are equal after it. Raises InputError for an
    adapter that does not fit, and if the merged model gives other numbers than the adapted one.
    """
    from peft import PeftModel

    base = getattr(model, "name_or_path", "")
    try:
        with warnings.catch_warnings():
            # PEFT still uses a name that transformers changed
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing")
            adapted = PeftModel.from_pretrained(model, path).eval()
            if not hasattr(adapted.base_model, "merge_and_unload"):
                kind = adapted.active_peft_config.peft_type.value
                raise InputError(f"{path!r}: a {kind} adapter, which adds to the input and cannot be merged.")
            expected = _probe(adapted)
            was_tied = _give_head_its_own_weights(adapted)
            merged = adapted.merge_and_unload()
    except InputError:
        raise
    except Exception as error:  # the file may hold anything
        reason = " ".join(str(error).split()) or type(error).__name__
        if "size mismatch" in reason:
            reason += (
                " Where the base's embeddings were resized before the adapter was trained, save the base after "
                f"resize_token_embeddings and name it as base_model_name_or_path in {Path(path, ADAPTER)}."
            )
        raise InputError(f"{path!r}: its adapter does not fit its base {base!r}: {reason}") from error
    if was_tied:
        _tie_where_equal(merged)
    found = _probe(merged)
    limit = MERGE_TOLERANCES.get(merged.dtype, MERGE_TOLERANCE)
    for what, before in expected.items():
        difference = _rms(found[what] - before) / max(_rms(before), 1e-30)
        if not difference <= limit:  # NaN too
            raise InputError(
                f"{path!r}: its adapter cannot be merged into its base {base!r}: the {what} of {len(before)} tokens "
                f"differ by {difference:.1e} of their size before and after, where {limit:.0e} is allowed in "
                f"{str(merged.dtype).removeprefix('torch.')}."
            )
    return merged


def save_merged(adapter: str, directory: str, *, trust_remote_code: bool = False) -> None:
    """Merge the adapter in the directory `adapter` into its base, and save a whole model and its tokenizer to
    `directory`. Raises InputError if loading or merging fails."""
    from exo_fast.training.models.saving import save_model

    base = adapter_base(adapter)
    kind, options = AutoModelForCausalLM, {}
    if adapter_task(adapter) == SCALAR_TASK:
        kind, options = AutoModelForSequenceClassification, {"num_labels": 1}
    model = from_pretrained(kind, base, trust_remote_code=trust_remote_code, dtype="auto", **options)
    source = adapter if any(Path(adapter).glob("tokenizer*")) else base
    tokenizer = from_pretrained(AutoTokenizer, source, trust_remote_code=trust_remote_code)
    if kind is AutoModelForSequenceClassification and model.config.get_text_config().pad_token_id is None:
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    save_model(merge_adapter(model, adapter), tokenizer, Path(directory))


@torch.no_grad()
def _probe(model: nn.Module) -> dict[str, Tensor]:
    """Return (T, ·) float64: the outputs of `model` for a few tokens, with the tokens that an adapter trains."""
    embedding = model.get_input_embeddings().weight
    ids = torch.linspace(0, embedding.shape[0] - 1, PROBED_TOKENS).long().unique()
    with true_float32():
        output = model(input_ids=ids[None].to(embedding.device), use_cache=False, output_hidden_states=True)
    numbers = {"logits": output.logits}
    if output.hidden_states is not None:
        numbers["hidden states"] = output.hidden_states[-1]
    return {what: value.double().cpu().flatten(0, -2) for what, value in numbers.items()}


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def _ends(model: nn.Module) -> list[nn.Module]:
    """Return the input embedding and the head without their adapters; an empty list if there is no head."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [] if None in ends else [_bare(layer) for layer in ends]


def _bare(layer: nn.Module) -> nn.Module:
    """Return a layer without the wrappers that PEFT puts around it."""
    for name in ("base_layer", "original_module"):
        if isinstance(getattr(layer, name, None), nn.Module):
            return _bare(getattr(layer, name))
    return layer


def _give_head_its_own_weights(adapted: nn.Module) -> bool:
    """Untie the head of a PeftModel from its input embedding. Return whether it was tied."""
    ends = _ends(adapted.get_base_model())
    if not ends or ends[0].weight is not ends[1].weight:
        return False
    ends[1].weight = nn.Parameter(ends[1].weight.detach().clone(), requires_grad=False)
    return True


def _tie_where_equal(merged: nn.Module) -> None:
    embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    equal = torch.equal(embedding.weight, head.weight)
    if equal:
        head.weight = embedding.weight
    merged.config.tie_word_embeddings = merged.config.get_text_config().tie_word_embeddings = equal
