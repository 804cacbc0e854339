"""Models that read one number from a text: reward models and classifiers.

Both are transformers' `AutoModelForSequenceClassification` with one logit, so `from_pretrained` loads a trained
one, and `model(**tokenizer(text)).logits` gives the same number without this package. Those classes read the
rightmost token that is not `config.pad_token_id`. EOS is made the padding token: the number is then read at
the last token before EOS, as in the original EXO code, whether or not a tokenizer or a caller ends the text
with EOS. Padding goes on the right, where no token that is read sees it.

TRL's RewardTrainer trains otherwise. Its padding is a token of its own. It ends every text with EOS (and every
conversation with all that the template writes) and reads the number there. We read such a model there too
(`reads_at_end`), because it was trained at no other token.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from exo_fast.masks import neighbours_hint
from exo_fast.positions import by_text, padded_texts
from exo_fast.training.data.texts import pad, pad_with_eos
from exo_fast.training.errors import InputError, not_its_own
from exo_fast.training.models.loading import from_pretrained, refuse_adapter

# Largest difference that sharing prompts, or other texts in the batch, may make to a number, over the numbers' root
# mean square. On a trained 135M model the right mask gave 2e-6 in float32, but 0.03 with bf16 products and 0.05 in
# bf16; a plain causal one 0.5. So rounded products can only show a gross fault, and do not suffice to share the
# prompts of an untested model type.
TOLERANCE, ROUNDED_TOLERANCE = 1e-3, 0.2
HEAD = "score"  # the head of classes that read the last token; classes that read elsewhere call it `classifier`


def load_scalar_model(
    name_or_path: str,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    new_head: bool,
) -> PreTrainedModel:
    """Load a sequence classifier with one logit, and set its `config.pad_token_id`.

    With `new_head` a causal LM gets a head drawn by transformers' initialisation from the current random state
    (`set_seed`); a one-logit classifier keeps the head it has, so that its training can go on. Without, raises
    InputError for anything but a one-logit classifier. Raises InputError if loading fails, and for a
    model that reads its number elsewhere than at the last token (BERT, say).
    """
    refuse_adapter(name_or_path)
    config = from_pretrained(AutoConfig, name_or_path, trust_remote_code=trust_remote_code)
    names = config.architectures or []
    is_classifier = any(name.endswith("ForSequenceClassification") for name in names)
    if is_classifier and config.num_labels != 1:
        raise InputError(f"{name_or_path!r}: a classifier with {config.num_labels} logits, where one is needed.")
    if not is_classifier and not new_head:
        raise InputError(
            f"{name_or_path!r}: holds {', '.join(names) or 'a model of no named kind'}, where a sequence classifier "
            "with one logit is needed, such as `exo-fast reward-model` and `exo-fast classifier` write."
        )
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    # transformers reports a head that is not in the file, which we expect. Any other missing weight is an error.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, info = from_pretrained(
            AutoModelForSequenceClassification,
            name_or_path,
            trust_remote_code=trust_remote_code,
            num_labels=1,
            dtype=dtype,
            output_loading_info=True,
            **attention,
        )
    finally:
        logging.set_verbosity(verbosity)
    if not isinstance(getattr(model, HEAD, None), nn.Linear):
        raise InputError(
            f"{name_or_path!r}: {type(model).__name__} does not read its number at the last token; a model made from "
            "a causal language model is needed."
        )
    missing = [key for key in info["missing_keys"] if is_classifier or not key.startswith(f"{HEAD}.")]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{name_or_path!r}: its files lack the weights {sorted(missing)[0]}{others}.")
    if not is_classifier or model.config.get_text_config().pad_token_id is None:
        tokenizer = from_pretrained(AutoTokenizer, name_or_path, trust_remote_code=trust_remote_code)
        padding = pad_with_eos(tokenizer).pad_token_id
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = padding
    return model


def reads_at_end(config: Any, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Check whether a one-logit classifier of this transformers config was trained to be read at the end of a text, EOS
    included. It was if its padding is not EOS: then EOS is a token like others."""
    padding = config.get_text_config().pad_token_id
    return padding is not None and padding != tokenizer.eos_token_id


def scalars(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return (B,) float32: the logit of each row of `pad`'s batch (on the model's device), as if the row were alone."""
    lengths, _ = padded_texts(batch["attention_mask"])
    with by_text(model, lengths):
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return output.logits.squeeze(-1).float()


@torch.no_grad()
def need_own_numbers(model: nn.Module, texts: Iterable[Sequence[int]], *, allowed: float = TOLERANCE) -> None:
    """Raise InputError if the number of the shortest of `texts` (token ids) beside the longest one differs from its
    number alone by more than `allowed` of their size. Checks only if `neighbours_hint` says it may. In eval mode."""
    hint = neighbours_hint(model.config)
    if not hint:
        return
    texts = sorted(texts, key=len)
    pair = [list(map(int, ids)) for ids in (texts[0], texts[-1])]
    padding = model.config.get_text_config().pad_token_id
    values = [
        scalars(model, {k: v.to(model.device) for k, v in pad(some, padding).items()}).double()
        for some in (pair[:1], pair)
    ]
    size = values[1].square().mean().sqrt().clamp(min=1e-12)
    difference = ((values[1][0] - values[0][0]).abs() / size).item()
    if not difference <= allowed:  # also for NaN
        numbers = f"{values[0][0]:.6g} alone and {values[1][0]:.6g} beside a longer one"
        found = f"{numbers}, where {allowed} of their size is allowed"
        raise not_its_own(model.config, hint, found)
