"""`exo-fast generate`, and sampling completions from a language model.

Every completion has a random stream of its own, keyed by (seed, prompt, candidate number): the same prompt
gets the same uniform numbers wherever it stands in the list and whichever process samples it, so a resumed or
re-sharded run repeats itself. One uniform number per token, turned into a token through the inverse of the
cumulative distribution, is also what makes it fast: `torch.multinomial` draws one exponential per vocabulary
entry, which took 30-40% of the sampling time of a 135M model on a CPU.

The model runs inside `transformers`' own `generate`: the draw is a logits processor that leaves a single
finite score, which greedy decoding then picks.

Only tokens that exist are drawn. A model's vocabulary may be larger than its tokenizer's (embeddings padded to a round
number, ids left out), and an id without a token is no text: such ids are masked before everything else, so completions
are drawn from the model's softmax renormalised over the others. (`exo-fast logprobs` gives log-probs under the model's
own softmax, over all ids.)
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from exo_fast.data.tokens import RowTokenizer
from exo_fast.positions import length_rules, start_anew
from exo_fast.training.config import _field, temperature_problem
from exo_fast.training.data.examples import load_prompts
from exo_fast.training.errors import InputError, RunError
from exo_fast.training.inference import (
    InferenceConfig,
    check_model_name,
    digest,
    encode_prompts,
    find_splits,
    from_main,
    json_digest,
    load_model,
    load_tokenizer,
    start_processes,
)
from exo_fast.training.loading import check_fits_model, from_pretrained, is_adapter, merge_advice, model_config
from exo_fast.training.precision import matmul_precision
from exo_fast.training.resumable import ResumableRun

DEFAULT_RETURN_NUM = 4
SMALLEST_SHARE = 1e-6  # a smaller top_p keeps one token: the most likely one has more in every vocabulary there is
Sampler = Callable[[list[str], list[list[int]]], list[list[list[int]]]]  # prompts and their ids -> ids of completions


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Raises ValueError for an argument out of range, named with its value."""

    return_num: int = 1  # completions of each prompt
    max_new_tokens: int = 64
    temperature: float = 1.0  # divides the logits; 0 takes the most likely token (greedy)
    top_k: int = 0  # keep only the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps all
    seed: int = 0  # of the random streams; the global random state is neither read nor changed

    def __post_init__(self) -> None:
        for name in ("return_num", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.temperature != 0 and (problem := temperature_problem(self.temperature)) is not None:
            raise ValueError(f"temperature is {self.temperature}; 0 (greedy), or {problem}")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; 0 (the whole vocabulary) or a positive number is needed")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; a number above 0 and at most 1 is needed")
        if self.greedy and self.return_num > 1:
            raise ValueError(
                f"return_num is {self.return_num}; {self.greedy} takes the most likely token and so gives the same "
                "completion each time: it needs return_num=1"
            )

    @property
    def greedy(self) -> str:
        """The field, with its value, that leaves nothing to chance; empty where tokens are drawn."""
        fields = {
            "temperature": self.temperature == 0,
            "top_k": self.top_k == 1,
            "top_p": self.top_p < SMALLEST_SHARE,
        }
        return next((f"{name}={getattr(self, name)}" for name, is_greedy in fields.items() if is_greedy), "")


class _TokensThatExist(LogitsProcessor):
    """Masks ids that no token has, and notes whether what the model says is finite."""

    def __init__(self, without_token: Tensor):
        self.without_token = without_token  # (n,) int64, ids
        self.finite: Tensor | bool = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.finite = torch.isfinite(scores.amax(dim=-1)).all() & self.finite  # NaN where any is
        return scores.index_fill(-1, self.without_token, -torch.inf) if len(self.without_token) else scores


class _Draw(LogitsProcessor):
    """Sample from softmax(scores) with the uniform numbers given: a row per sequence, a column per step."""

    def __init__(self, uniforms: Tensor, prompt_length: int):
        self.uniforms = uniforms  # (B, max_new_tokens) float32 in [0, 1)
        self.prompt_length = prompt_length  # T of the padded prompts: the step is the length minus this

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # scores (B, V). The running sum is not normalised: the draw is scaled by its last column instead.
        cumulative = torch.softmax(scores, dim=-1, dtype=torch.float32).cumsum(dim=-1)
        total = cumulative[:, -1:]
        draw = self.uniforms[:, input_ids.shape[1] - self.prompt_length, None] * total
        # Strictly below the total, so that the entry found is one where the sum grows: never a masked token.
        draw = torch.minimum(draw, torch.nextafter(total, torch.zeros_like(total)))
        # Of scores that are not finite it finds no entry, which `sample_batch` says when the batch is done.
        chosen = torch.searchsorted(cumulative, draw, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def _stream_key(seed: int, prompt: str, candidate: int) -> bytes:
    return hashlib.sha256(f"{seed}\x00{candidate}\x00{prompt}".encode()).digest()[:16]


def _uniforms(seed: int, prompt: str, candidate: int, count: int) -> np.ndarray:
    """(count,) float32 in [0, 1): the stream of one candidate of one prompt."""
    key = int.from_bytes(_stream_key(seed, prompt, candidate), "little")
    return np.random.Generator(np.random.Philox(key=key)).random(count, np.float32)


def plan_batches(
    lengths: Sequence[int], return_num: int, batch_size: int, *, of_one_length: bool = False
) -> list[list[int]]:
    """Prompt indices, longest first, so that a batch pads little and the largest batch comes first.

    `of_one_length`: only prompts of the same length in a batch, for a model whose rotary embedding depends on the
    longest one (`exo_fast.positions`): all its rows are then of one length at every step.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    step = max(1, batch_size // return_num)
    runs = [order]
    if of_one_length:
        runs = [list(run) for _, run in itertools.groupby(order, key=lambda index: lengths[index])]
    return [run[start : start + step] for run in runs for start in range(0, len(run), step)]


def end_tokens(generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that end a completion: those the model names, and those that training puts at the end: the tokenizer's
    EOS and what its chat template ends the assistant's turn with."""
    end = generation_config.eos_token_id
    return {*([end] if isinstance(end, int) else end or ()), *RowTokenizer(tokenizer).ends}


def ids_without_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """The ids below `vocab_size`, the model's, that the tokenizer has no token for, in order."""
    return sorted(set(range(vocab_size)).difference(tokenizer.get_vocab().values()))


@contextmanager
def _nothing_shipped(model: PreTrainedModel) -> Iterator[None]:
    """Without the defaults that a model ships with (repetition_penalty, min_new_tokens): `generate` takes them for all
    that a configuration leaves open, and the draw would be from another distribution than the model's."""
    shipped, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = shipped


@torch.no_grad()
def sample_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    encoded: Sequence[list[int]],
    sampling: Sampling,
    batch_size: int,
    without_token: Sequence[int],
) -> list[list[list[int]]]:
    """One batch of `sample_tokens`: as many completions run together as `batch_size` allows.

    `encoded[i]` is what the model reads of `prompts[i]`, whose text only seeds its streams. The model is in eval
    mode. `without_token` are ids that are never drawn (`ids_without_token`). Returns for each prompt `return_num` lists
    of 1 … max_new_tokens ids. Raises RunError where the model's logits are not finite.

    Where the model's rotary embedding depends on the longest text (`exo_fast.positions`), prompts of one length are
    needed, and a completion is then what transformers' own generation gives of its prompt alone.
    """
    ends = end_tokens(model.generation_config, tokenizer)
    pad = next((token for token in (tokenizer.pad_token_id, *sorted(ends)) if token is not None), 0)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=pad
    )
    existing = _TokensThatExist(torch.tensor(without_token, dtype=torch.int64, device=model.device))
    warpers = [existing, *_warpers(sampling)]
    width = max(map(len, encoded))
    rows = [(index, candidate) for index in range(len(prompts)) for candidate in range(sampling.return_num)]
    found: list[list[list[int]]] = [[] for _ in prompts]
    for first in range(0, len(rows), batch_size):  # more than once where one prompt has more completions than that
        some = rows[first : first + batch_size]
        # Left padding: the next token of every row stands in the same column.
        input_ids = torch.tensor([[pad] * (width - len(encoded[i])) + encoded[i] for i, _ in some])
        mask = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i, _ in some])
        processors = LogitsProcessorList(warpers)
        if sampling.temperature > 0:
            uniforms = np.stack([_uniforms(sampling.seed, prompts[i], k, sampling.max_new_tokens) for i, k in some])
            processors.append(_Draw(torch.from_numpy(uniforms).to(model.device), width))
        if length_rules(model.config):
            start_anew(model)
        with _nothing_shipped(model):
            output = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                logits_processor=processors,
            )
        if not bool(existing.finite):
            raise RunError(
                "the model's logits are not finite (NaN or infinite), so nothing can be sampled: its weights may be "
                "damaged, or overflow in the dtype that it runs in."
            )
        for (index, _), ids in zip(some, output[:, width:].tolist(), strict=True):
            stop = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
            found[index].append(ids[:stop])
    return found


def _warpers(sampling: Sampling) -> list[LogitsProcessor]:
    """What changes the distribution before the draw; nothing for greedy decoding, which they would not change."""
    if sampling.temperature == 0:
        return []
    warpers: list[LogitsProcessor] = []
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


def sample_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    return_num: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 128,
    progress: str | None = None,
) -> list[list[list[int]]]:
    """Sample token ids: for each prompt, in the order given, `return_num` lists of 1 … max_new_tokens ids.

    A list that ended by itself ends with the end-of-sequence token it drew; one that was cut does not. The
    same prompt given twice gets the same completions twice: ask for more with `return_num`. Ids that the tokenizer has
    no token for are never drawn.

    Args:
        temperature: divides the logits; 0 takes the most likely token (greedy), and needs return_num=1.
        top_k: keep only the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps all.
        seed: of the random streams; the global random state is neither read nor changed.
        batch_size: sequences (not prompts) that run together.
        progress: words before the progress bar, None for no bar.

    Raises:
        ValueError: an argument out of range, named with its value; several greedy completions of a prompt.
        RunError: the model's logits are not finite.
    """
    sampling = Sampling(return_num, max_new_tokens, temperature, top_k, top_p, seed)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; at least 1 is needed")
    if isinstance(prompts, str):
        raise ValueError("prompts is one string; a list of strings is needed: put it in a list")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"prompts[{index}] is {prompt!r}; a non-empty string is needed")
    encoded = RowTokenizer(tokenizer).prompts(prompts)
    for index, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"prompts[{index}] is {prompts[index]!r}, which gives no token; give it some text")
    without_token = ids_without_token(tokenizer, model.config.get_text_config().vocab_size)
    was_training = model.training
    model.eval()
    found: list[list[list[int]]] = [[] for _ in prompts]
    with tqdm(total=len(prompts) * return_num, desc=progress, unit="seq", disable=progress is None) as bar:
        of_one_length = bool(length_rules(model.config))
        for batch in plan_batches(list(map(len, encoded)), return_num, batch_size, of_one_length=of_one_length):
            some = [prompts[i] for i in batch], [encoded[i] for i in batch]
            groups = sample_batch(model, tokenizer, *some, sampling, batch_size, without_token)
            for index, group in zip(batch, groups, strict=True):
                found[index] = group
            bar.update(len(batch) * return_num)
    model.train(was_training)
    return found


def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    return_num: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 128,
    progress: str | None = None,
) -> list[list[str]]:
    """`sample_tokens`, decoded without special tokens: for each prompt, `return_num` strings."""
    tokens = sample_tokens(
        model,
        tokenizer,
        prompts,
        return_num=return_num,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    return [[tokenizer.decode(ids, skip_special_tokens=True) for ids in group] for group in tokens]


# The stage


@dataclass
class GenerateConfig(InferenceConfig):
    """`exo-fast generate`: fields of every inference stage, and how to sample."""

    model_name_or_path: str | None = _field(None, "The model to sample from: a directory (a LoRA adapter's too) or a "
                                                  "Hub name.")  # fmt: skip
    return_num: int | None = _field(
        None, "Completions of each prompt. Default: 4, or 1 where nothing is left to chance (temperature 0, top_k 1)."
    )
    temperature: float = _field(1.0, "Divides the logits; 0 takes the most likely token.")
    top_k: int = _field(0, "Sample from the k most likely tokens only; 0: from all.")
    top_p: float = _field(1.0, "Sample from the fewest tokens whose probability reaches top_p only; 1: from all.")
    max_new_tokens: int = _field(256, "Longest completion, in tokens with EOS.")
    max_seq_len: int = _field(
        512, "Longest prompt plus completion, in tokens: prompts are cut on the left to max_seq_len - max_new_tokens."
    )
    seed: int = _field(0, "Of the random streams: each prompt and candidate has its own.")
    engine: Literal["transformers", "vllm"] = _field("transformers", "vllm: sample with vLLM (installed apart, GPU).")

    field_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "model": ("model_name_or_path", *InferenceConfig.model_fields),
        "data": InferenceConfig.data_fields,
        "sampling": ("return_num", "temperature", "top_k", "top_p", "max_new_tokens", "max_seq_len", "seed"),
        "speed and memory": ("engine", *InferenceConfig.speed_fields),
    }
    description: ClassVar[str] = """\
Sample completions of prompts from a model.

Reads rows with a prompt (other fields are ignored, and a prompt that comes again is left out) and writes prompt,
completions and completion_ids, the token ids that were drawn. A completion depends on the model, the settings, its
prompt and its number alone: an interrupted run continues when the same command is given again, on any number of
processes, and ends with the same text. Ids that the tokenizer has no token for are never drawn."""
    examples: ClassVar[str] = """\
examples:
  exo-fast generate --model_name_or_path models/sft --data data/sft --output_dir data/samples
  exo-fast generate --model_name_or_path models/sft --data data/sft --split test --prompt_num 512 --output_dir data/s512
  exo-fast generate --model_name_or_path runs/align --data data/sft --temperature 0.8 --top_p 0.95 --output_dir data/p95
  torchrun --nproc-per-node 2 -m exo_fast.training.cli generate --config generate.yaml
"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_model_name(self)
        self._need(
            self.max_seq_len > self.max_new_tokens,
            "max_seq_len",
            f"must be larger than max_new_tokens={self.max_new_tokens}, so that some of the prompt fits.",
        )
        try:
            if self.return_num is None:
                self.return_num = 1 if self._sampling(1).greedy else DEFAULT_RETURN_NUM
            _ = self.sampling
        except ValueError as error:
            raise InputError(f"{error}.") from error

    @property
    def sampling(self) -> Sampling:
        """The fields that say how to draw."""
        return self._sampling(self.return_num)

    def _sampling(self, return_num: int) -> Sampling:
        return Sampling(return_num, self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.seed)


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Sample `config.return_num` completions of every prompt of `config.data`, each once, into `config.output_dir`.

    Writes {"prompt", "completions", "completion_ids"} rows to train.json and test.json, and summary.json, which is
    also returned. Raises InputError for settings, data or models that cannot work, before any sampling.
    """
    state = start_processes(config)
    if config.engine == "vllm":
        _check_vllm(config, state.num_processes)
    tokenizer = load_tokenizer(config, config.model_name_or_path)
    room = config.max_seq_len - config.max_new_tokens
    prompts, encoded = {}, {}
    for split, source in find_splits(config).items():
        prompts[split] = config.first(load_prompts(source, tokenizer=tokenizer))
        encoded[split] = encode_prompts(tokenizer, prompts[split], [room] * len(prompts[split]))
        for index, (ids, _) in enumerate(encoded[split]):
            if not ids:
                raise InputError(f"{source}, prompt {index}, {prompts[split][index]!r}: no tokens; give it some text.")
    ids = [row for rows in encoded.values() for row, _ in rows]
    check_fits_model(
        config,
        config.model_name_or_path,
        longest=max(map(len, ids)) + config.max_new_tokens,
        largest_id=max(map(max, ids)),
    )
    rules = length_rules(model_config(config, config.model_name_or_path))
    identity = {
        "stage": "generate",
        "model": from_main(digest(config.model_name_or_path) if state.is_main_process else None, state),
        "prompts": {split: json_digest(texts) for split, texts in prompts.items()},
        **asdict(config.sampling),
        "max_seq_len": config.max_seq_len,
        "engine": config.engine,
        **({"batches": "of one length"} if rules else {}),
        **config.numerics(),
    }
    run = ResumableRun(config.output_dir, identity, state)
    if (summary := run.finished([f"{split}.json" for split in prompts])) is not None:
        return summary

    sampler = functools.cache(lambda: _make_sampler(config, tokenizer))  # nothing is loaded when nothing is left to do
    files, counts = {}, {}
    for split, texts in prompts.items():
        ids = [row for row, _ in encoded[split]]
        batches = plan_batches(list(map(len, ids)), config.return_num, config.batch_size, of_one_length=bool(rules))

        def compute(index: int, texts: list[str] = texts, ids: list[list[int]] = ids, batches=batches) -> Any:
            return sampler()([texts[i] for i in batches[index]], [ids[i] for i in batches[index]])

        with matmul_precision(config.matmul_precision, state.device.type):
            values = run.compute(
                split,
                [len(batch) * config.return_num for batch in batches],
                compute,
                description=f"sampling ({split})",
                unit="seq",
                progress=not config.disable_tqdm,
                prepare=sampler,
            )
        drawn = dict(zip((i for batch in batches for i in batch), (group for v in values for group in v), strict=True))
        files[f"{split}.json"] = [
            {
                "prompt": text,
                "completions": [tokenizer.decode(row, skip_special_tokens=True) for row in drawn[i]],
                "completion_ids": drawn[i],
            }
            for i, text in enumerate(texts)
        ]
        cut = sum(lost > 0 for _, lost in encoded[split])
        counts[split] = _count(files[f"{split}.json"], cut, config.max_new_tokens)
    summary = run.finish(files, {"model": config.model_name_or_path, "data": config.data, "counts": counts})
    if state.is_main_process:
        for split, count in counts.items():
            print(f"{split}: " + ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in count.items()))
        print(f"the samples are in {config.output_dir}", flush=True)
    return summary


def _count(rows: list[dict[str, Any]], cut_prompts: int, max_new_tokens: int) -> dict[str, int]:
    lengths = [len(ids) for row in rows for ids in row["completion_ids"]]
    return {
        "prompts": len(rows),
        "cut_prompts": cut_prompts,
        "completions": len(lengths),
        "completions_of_full_length": sum(length == max_new_tokens for length in lengths),
        "empty_completions": sum(not text for row in rows for text in row["completions"]),
        "tokens": sum(lengths),
    }


def _make_sampler(config: GenerateConfig, tokenizer: PreTrainedTokenizerBase) -> Sampler:
    if config.engine == "vllm":
        return _vllm_sampler(config, tokenizer)
    model = load_model(config, config.model_name_or_path, sampling=True)
    without_token = ids_without_token(tokenizer, model.config.get_text_config().vocab_size)

    def sample(prompts: list[str], encoded: list[list[int]]) -> list[list[list[int]]]:
        return sample_batch(model, tokenizer, prompts, encoded, config.sampling, config.batch_size, without_token)

    return sample


def _check_vllm(config: GenerateConfig, num_processes: int) -> None:
    problem = None
    if importlib.util.find_spec("vllm") is None:
        problem = "vLLM is not installed; pip install vllm."
    elif config.use_cpu:
        problem = "needs a GPU."
    elif num_processes > 1:
        problem = "vLLM starts processes of its own; run this stage without a launcher."
    elif is_adapter(config.model_name_or_path):
        problem = f"needs a whole model; merge the adapter first: {merge_advice(config.model_name_or_path)}"
    config._need(problem is None, "engine", problem or "")


def _vllm_sampler(config: GenerateConfig, tokenizer: PreTrainedTokenizerBase) -> Sampler:
    """Sampling by vLLM on one GPU.

    Every request has a seed of its own, made of the same (seed, prompt, candidate) as the streams here, but the
    numbers drawn from it are vLLM's: the text differs from that of engine=transformers, and vLLM does not promise
    the same text when other requests run beside it or on another version or GPU. Not covered by the tests, which have
    no GPU, beyond what is handed to vLLM and taken from it.
    """
    from vllm import LLM, SamplingParams

    try:
        generation_config = GenerationConfig.from_pretrained(config.model_name_or_path)
    except OSError:
        generation_config = GenerationConfig()
    ends = sorted(end_tokens(generation_config, tokenizer))
    shape = from_pretrained(AutoConfig, config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    vocab_size = shape.get_text_config().vocab_size
    masked = {}
    if ids_without_token(tokenizer, vocab_size):
        masked["allowed_token_ids"] = sorted(id for id in set(tokenizer.get_vocab().values()) if id < vocab_size)
    model = LLM(
        model=config.model_name_or_path,
        dtype="bfloat16" if config.bf16 else "float32",
        max_model_len=config.max_seq_len,
        trust_remote_code=config.trust_remote_code,
        generation_config="vllm",  # defaults that a model ships with must not join in unseen
        seed=config.seed,
    )

    def sample(prompts: list[str], encoded: list[list[int]]) -> list[list[list[int]]]:
        rows = [(index, candidate) for index in range(len(prompts)) for candidate in range(config.return_num)]
        requests = [{"prompt_token_ids": encoded[index]} for index, _ in rows]
        params = [
            SamplingParams(
                temperature=config.temperature,
                top_k=config.top_k or -1,
                top_p=config.top_p,
                max_tokens=config.max_new_tokens,
                seed=int.from_bytes(_stream_key(config.seed, prompts[index], candidate)[:4], "little"),
                stop_token_ids=ends,
                **masked,
            )
            for index, candidate in rows
        ]
        found: list[list[list[int]]] = [[] for _ in prompts]
        for (index, _), answer in zip(rows, model.generate(requests, params, use_tqdm=False), strict=True):
            found[index].append(list(answer.outputs[0].token_ids))
        return found

    return sample
