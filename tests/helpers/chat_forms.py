"""Real chat templates, each with a small tokenizer that treats text as the real one does.

The templates are files that TRL ships, and Mistral's public [INST] form. The tokenizers have the real ones' special
tokens, ends of turn, pre-tokenization and use of BOS. Their few merges cross a boundary between the template's text and
people's text (line breaks, spaces before a line break, full stops), so that a prompt may end inside a token.
"""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
# Each is a token, and so is each of its beginnings: "\n\n\n" makes "\n\n" one too.
PIECES = ("\n\n\n", " \n\n", ".\n\n", ">\n\n", "]\n\n", "]The", "]  ", "   ", '{"', '"}', "```", "assistant",
          "user", "system", "model", "the", " the", " film", " was", "good", " good", "The", "think", " thought",
          "tool")  # fmt: skip


@dataclass(frozen=True)
class Form:
    """A template, its model's special tokens, and the parts that its conversations may hold."""

    template: str  # TRL's file, or the template itself
    bos: str | None
    eos: str
    end_of_turn: str
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()  # added tokens that are not special
    sentencepiece: str | None = None  # how Metaspace puts a space before a text; None: byte-level BPE
    system: bool = True
    alternating: bool = False  # refuses two messages of the assistant in a row
    reasoning: bool = False
    tools: bool = False


_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CALLS = ("<tool_call>", "</tool_call>")
FORMS = {
    "chatml": Form("qwen2_5", None, "<|im_end|>", "<|im_end|>", _QWEN, _CALLS),
    "llama-3": Form("llama3", "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", _LLAMA),
    "gemma": Form(
        "gemma", "<bos>", "<eos>", "<end_of_turn>", ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        sentencepiece="never", system=False, alternating=True,
    ),
    "mistral": Form(
        MISTRAL, "<s>", "</s>", "</s>", ("<s>", "</s>"), sentencepiece="first", system=False, alternating=True
    ),
    "qwen3-thinking": Form(
        "qwen3", None, "<|im_end|>", "<|im_end|>", _QWEN, ("<think>", "</think>", *_CALLS), reasoning=True, tools=True
    ),
    "qwen2.5-tools": Form("qwen2_5", None, "<|im_end|>", "<|im_end|>", _QWEN, _CALLS, tools=True),
    "llama-3.1-tools": Form(
        "llama3_1", "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", (*_LLAMA, "<|eom_id|>", "<|python_tag|>"),
        tools=True,
    ),
}  # fmt: skip


def template_of(form: Form) -> str:
    """The template's text. Needs TRL for all but Mistral's, without importing it."""
    if "{{" in form.template:
        return form.template
    (place,) = find_spec("trl").submodule_search_locations
    return (Path(place) / "chat_templates" / f"{form.template}.jinja").read_text()


@cache
def chat_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a form, with its template; the same on every call, so nobody may change it."""
    tokenizer = bare_tokenizer(name)
    tokenizer.chat_template = template_of(FORMS[name])
    return tokenizer


def bare_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a form without a template, a new one on every call."""
    form = FORMS[name]
    tokenizer = _byte_level() if form.sentencepiece is None else _sentencepiece(form.sentencepiece)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in form.special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in form.plain])
    if form.bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{form.bos} $A", special_tokens=[(form.bos, tokenizer.token_to_id(form.bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=form.bos, eos_token=form.eos)


def _merges(pieces: list[str]) -> list[tuple[str, str]]:
    """Return the merges from left to right, in the order in which they come first."""
    return list(dict.fromkeys((piece[:i], piece[i]) for piece in pieces for i in range(1, len(piece))))


def _bpe(alphabet: list[str], pieces: list[str], **options: object) -> Tokenizer:
    merges = _merges(pieces)
    words = dict.fromkeys([*alphabet, *(a + b for a, b in merges)])
    return Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges, **options))


def _byte_level() -> Tokenizer:
    """Make a tokenizer like Llama 3's and Qwen's."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = ["".join(part for part, _ in byte_level.pre_tokenize_str(piece)) for piece in PIECES]
    tokenizer = _bpe(sorted(pre_tokenizers.ByteLevel.alphabet()), spelled)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(GPT4_SPLIT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(prepend: str) -> Tokenizer:
    """Make a tokenizer like Mistral's (a space before a text) or Gemma's (no space): no splitting, and bytes for
    characters without a token."""
    spelled = [piece.replace(" ", "▁") for piece in PIECES]
    letters = [chr(i) for i in range(33, 127)] + ["▁", "\n"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = _bpe(["<unk>", *bytes_, *letters], spelled, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    if prepend == "never":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    return tokenizer
