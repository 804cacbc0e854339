"""`exo-fast generate`: sample completions from a language model.

Every completion has a random stream of its own, keyed by (seed, prompt, candidate number): the same prompt gets the
same uniform numbers anywhere in the list and in any process, so a resumed or re-sharded run repeats itself. One uniform
number per token, turned into a token through the inverse of the cumulative distribution, is also fast:
`torch.multinomial` draws one exponential per vocabulary entry, which took 30-40% of the sampling time of a 135M model
on a CPU.

The model runs inside `transformers`' own `generate`: the draw is a logits processor that leaves a single
finite score, which greedy decoding then picks.

Only tokens that exist are drawn. A model's vocabulary may be larger than its tokenizer's (embeddings padded to a round
number, ids left out), and an id without a token has no text. Such ids are masked first, so completions are drawn from
the model's softmax renormalised over the other ids. (`exo-fast logprobs` gives log-probs under the model's own softmax,
over all ids.)
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from exo_fast.positions import length_rules
from exo_fast.precision import matmul_precision
from exo_fast.training import processes
from exo_fast.training.data.examples import load_prompts
from exo_fast.training.data.sources import find_splits
from exo_fast.training.errors import InputError
from exo_fast.training.inference.config import InferenceConfig, encode_prompts, load_model
from exo_fast.training.inference.resumable import ResumableRun, plan_batches
from exo_fast.training.inference.sampling import Sampler, Sampling, ids_without_token, sample_batch
from exo_fast.training.models.digests import digest, json_digest
from exo_fast.training.models.loading import check_fits_model, load_tokenizer, model_config
from exo_fast.training.options import check_model_name, option

DEFAULT_RETURN_NUM = 4


# The stage


@dataclass
class GenerateConfig(InferenceConfig):
    """The fields of `exo-fast generate`: the fields of every inference stage, and how to sample."""

    model_name_or_path: str | None = option(None, "The model to sample from: a directory (a LoRA adapter's too) or a "
                                                  "Hub name.")  # fmt: skip
    return_num: int | None = option(
        None, "Completions of each prompt. Default: 4, or 1 where nothing is left to chance (temperature 0, top_k 1)."
    )
    temperature: float = option(1.0, "Divides the logits; 0 takes the most likely token.")
    top_k: int = option(0, "Sample from the k most likely tokens only; 0: from all.")
    top_p: float = option(1.0, "Sample from the fewest tokens whose probability reaches top_p only; 1: from all.")
    max_new_tokens: int = option(256, "Longest completion, in tokens with EOS.")
    max_seq_len: int = option(
        512, "Longest prompt plus completion, in tokens: prompts are cut on the left to max_seq_len - max_new_tokens."
    )
    seed: int = option(0, "Of the random streams: each prompt and candidate has its own.")
    engine: str = option("transformers", "The only one that there is; kept for recipes that name it.")

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
            self.engine == "transformers",
            "engine",
            "sampling by another library was taken out of exo_fast; leave engine out, and transformers samples.",
        )
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
        """Return the fields that say how to draw."""
        return self._sampling(self.return_num)

    def _sampling(self, return_num: int) -> Sampling:
        return Sampling(return_num, self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.seed)


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Sample `config.return_num` completions of every prompt of `config.data`, each once, into `config.output_dir`.

    Writes {"prompt", "completions", "completion_ids"} rows to train.json and test.json, and summary.json. Returns the
    summary. Raises InputError for settings, data or models that cannot work, before any sampling.
    """
    device = processes.start(on_cpu=config.use_cpu)
    tokenizer = load_tokenizer(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    room = config.max_seq_len - config.max_new_tokens
    prompts, encoded = {}, {}
    for split, source in find_splits(config.data, config.split).items():
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
        "model": processes.from_first(digest(config.model_name_or_path) if processes.index() == 0 else None),
        "prompts": {split: json_digest(texts) for split, texts in prompts.items()},
        **asdict(config.sampling),
        "max_seq_len": config.max_seq_len,
        "engine": config.engine,  # under the name that runs of earlier versions used
        **({"batches": "of one length"} if rules else {}),
        **config.numerics(),
    }
    run = ResumableRun(config.output_dir, identity)
    if (summary := run.finished([f"{split}.json" for split in prompts])) is not None:
        return summary

    sampler = functools.cache(lambda: _make_sampler(config, tokenizer))  # no model is loaded if no work is left
    files, counts = {}, {}
    for split, texts in prompts.items():
        ids = [row for row, _ in encoded[split]]
        sequences = [config.return_num] * len(ids)
        batches = plan_batches(list(map(len, ids)), sequences, config.batch_size, of_one_length=bool(rules))

        def compute(index: int, texts: list[str] = texts, ids: list[list[int]] = ids, batches=batches) -> Any:
            return sampler()([texts[i] for i in batches[index]], [ids[i] for i in batches[index]])

        with matmul_precision(config.matmul_precision, device.type):
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
    if processes.index() == 0:
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
    model = load_model(config, config.model_name_or_path, sampling=True)
    without_token = ids_without_token(tokenizer, model.config.get_text_config().vocab_size)

    def sample(prompts: list[str], encoded: list[list[int]]) -> list[list[list[int]]]:
        return sample_batch(model, tokenizer, prompts, encoded, config.sampling, config.batch_size, without_token)

    return sample
