"""Rows in parts give the loss, metrics, gradients and log-probs of rows in one piece.

The cases are run by one start of four processes (this file as a script): rows in 2 parts in two data-parallel pairs, or
in 4. Each process also runs the whole rows by itself and compares.
"""

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import families
import forked
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2ForCausalLM, NemotronForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from exo_fast.layout import Group, pack, plan_mask
from exo_fast.training.data.groups import GroupCollator, GroupDataset, TokenCounts
from exo_fast.training.errors import InputError
from exo_fast.training.models.modules import AlignModule
from exo_fast.training.models.sequence_parallel import SequenceParallel, divide, refusal
from exo_fast.training.models.sharing import settle_layout
from exo_fast.training.models.tiled_mlp import tile_mlps
from exo_fast.training.stages.align import AlignConfig, align
from exo_fast.training.trainer.reference_logps import compute

PROCESSES = 4
VOCAB = 50
LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
# (prompt, completions) lengths: two groups to a row beside one that fills it, and a row of few tokens.
LENGTHS = [(9, (5, 3, 8)), (2, (4, 1, 2)), (5, (2, 6, 3)), (3, (1, 1, 2)), (7, (7, 2, 5))]


@dataclass
class Case:
    parts: int
    model: dict[str, Any] = field(default_factory=lambda: LLAMA)
    kind: str = "Llama"
    dtype: torch.dtype = torch.float64
    share_prompt: bool = True
    lora: bool = False
    checkpointing: bool = False
    lengths: list[tuple[int, tuple[int, ...]]] = field(default_factory=lambda: LENGTHS)

    @property
    def tolerance(self) -> float:
        """The limits of the relative error of gradients, and of log-probs in nats."""
        return {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 0.1}[self.dtype]


THREE_HEADS = {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 24}
WINDOWED = {**LLAMA, "sliding_window": 4}
BY_LAYER = {**LLAMA, "sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LONGROPE = {
    **LLAMA,
    "original_max_position_embeddings": 12,
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 1.0, **FACTORS},
    "pad_token_id": 0,
}
DYNAMIC = {
    **LLAMA,
    "max_position_embeddings": 12,
    "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0},
}
UNTIED = {**LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": False}  # Phi's head has a bias
CASES = {
    "4 heads": Case(2),
    "3 heads of 1": Case(2, THREE_HEADS),
    "4 parts": Case(4),
    "4 parts, 5 heads": Case(4, {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 40}),
    "unshared": Case(2, THREE_HEADS, share_prompt=False),
    "window": Case(2, WINDOWED, "Mistral"),
    "windows by layer": Case(2, BY_LAYER | {"use_sliding_window": True}, "Qwen2"),
    "untied biased head": Case(2, UNTIED, "Phi"),
    "parts without a completion": Case(4, lengths=[(40, (1, 2, 1)), (9, (1, 1, 1)), (30, (2, 2, 2))]),
    "lora": Case(2, lora=True),
    "checkpoints and tiles": Case(2, checkpointing=True),
    "float32": Case(2, THREE_HEADS, dtype=torch.float32),
    "bfloat16": Case(2, dtype=torch.bfloat16),
    "longrope": Case(4, LONGROPE, "Phi3"),
    "longrope, unshared": Case(2, LONGROPE, "Phi3", share_prompt=False),
    "dynamic": Case(2, DYNAMIC),
}
MEASURED = ("loss", "metrics", "gradients", "evaluation", "reference log-probs", "reference pass")


# In each process


def make_model(case: Case) -> torch.nn.Module:
    torch.manual_seed(0)
    common = {"num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 128}
    config = getattr(transformers, f"{case.kind}Config")(
        **{**common, **case.model}, vocab_size=VOCAB, initializer_range=0.3
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(case.dtype)
    if case.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.to(case.dtype)
    return model


def make_module(case: Case, model: torch.nn.Module) -> AlignModule:
    return AlignModule(
        model,
        plan_mask(model.config),
        loss_type="exo-rw",
        beta_pi=0.5,
        beta_r=0.5,
        label_smoothing=0.0,
        temperature=0.8,
        memory_budget=None,
        backend="auto",
    )


def in_parts(case: Case, whole: AlignModule) -> AlignModule:
    """The same module, whose model runs this rank's part of each row."""
    module = make_module(case, copy.deepcopy(whole.policy))
    module.sequence = SequenceParallel(module.policy, case.parts)
    if case.checkpointing:
        module.gradient_checkpointing_enable()
        tile_mlps(module.policy, max_seq_len=4000)  # 4 pieces
    return module


def make_dataset(case: Case) -> GroupDataset:
    rng = np.random.default_rng(0)
    groups = [
        Group(rng.integers(VOCAB, size=prompt).tolist(), [rng.integers(VOCAB, size=n).tolist() for n in completions])
        for prompt, completions in case.lengths
    ]
    completions = [completion for group in groups for completion in group.completions]
    sizes = [[len(group.prompt) for group in groups], list(map(len, completions))]
    offsets = [np.concatenate([[0], np.cumsum(lengths)]) for lengths in sizes]
    dataset = GroupDataset(
        np.concatenate([group.prompt for group in groups]),
        offsets[0],
        np.concatenate(completions),
        offsets[1],
        torch.from_numpy(rng.normal(size=(len(groups), 3))).float(),
        TokenCounts(*[0, len(groups), 3, *[0] * 6]),
    )
    dataset.ref_logps = -torch.from_numpy(rng.uniform(5, 20, size=(len(groups), 3))).float()
    return dataset


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest value, or over 1."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def measure(case: Case) -> dict[str, float]:
    """The errors MEASURED, the largest over processes."""
    processes, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    plan = plan_mask(make_model(case).config)
    dataset = make_dataset(case)
    collate = GroupCollator(0, share_prompt=case.share_prompt, by_length=plan.by_length)
    teams = processes // case.parts
    shares = [list(range(len(dataset)))[team::teams] for team in range(teams)]  # of unequal sizes
    batches = [collate([dataset[index] for index in share]) for share in shares]
    mine = batches[rank // case.parts]
    whole = make_module(case, make_model(case))
    module = in_parts(case, whole)

    expected = [whole.train()(**batch) for batch in batches]
    sum(loss * len(share) / len(dataset) for (loss, _), share in zip(expected, shares, strict=True)).backward()
    loss, metrics = module.train()(**mine)
    # As the trainer does: every process counts, and gradients are averaged over all.
    counted = sum(len(share) * case.parts for share in shares)
    (loss * (len(shares[rank // case.parts]) * processes / counted)).backward()
    gradients, scale = 0.0, max(p.grad.abs().max() for p in whole.parameters() if p.grad is not None)
    for found, right in zip(module.parameters(), whole.parameters(), strict=True):
        assert (found.grad is None) == (right.grad is None)
        if right.grad is not None:
            torch.distributed.all_reduce(found.grad)
            gradients = max(gradients, float((found.grad / processes - right.grad).abs().max() / scale))

    with torch.no_grad():
        losses, found_metrics = module.eval()(**mine)
        right_losses, right_metrics = whole.eval()(**mine)
        (reference,) = module(reference=True, **mine)
        (right_reference,) = whole(reference=True, **mine)
        passed = compute(
            dataset,
            collate,
            lambda batch: module(reference=True, **batch)[0],
            batch_size=2,
            process_index=rank // case.parts,
            num_processes=teams,
            copies=case.parts,
            progress=False,
        )
        right_pass = compute(
            dataset, collate, lambda batch: whole(reference=True, **batch)[0], batch_size=2, progress=False
        )
    team = rank // case.parts
    errors = [
        error(loss.detach(), expected[team][0].detach()),
        error(metrics, expected[team][1]),
        gradients,
        max(error(losses, right_losses), error(found_metrics, right_metrics)),
        error(reference, right_reference),
        error(passed, right_pass),
    ]
    errors = torch.tensor(errors, dtype=torch.float64)
    torch.distributed.all_reduce(errors, op=torch.distributed.ReduceOp.MAX)
    return dict(zip(MEASURED, errors.tolist(), strict=True))


def settle(case: Case, **options: Any) -> dict[str, Any]:
    """Return the report of `settle_layout` on a module in parts, or the error it raises."""
    module = in_parts(case, make_module(case, make_model(case)))
    collate = GroupCollator(0)
    try:
        return settle_layout(module, make_dataset(case), collate, **options) | {"collate": collate.share_prompt}
    except InputError as problem:
        return {"error": str(problem)}


def check_families() -> dict[str, Any]:
    """Return a token's error (nats) for every family of `families.py` run in parts, or the reason of its refusal."""
    dataset = make_dataset(Case(2))
    groups = [dataset.group(index) for index in range(len(dataset))]
    found = {}
    for name in families.FAMILIES:
        module = make_module(Case(2), families.tiny_model(name))
        found[name] = refusal(module.config, 2)
        if found[name]:
            continue
        try:
            module.sequence = SequenceParallel(module.policy, 2)
        except InputError as problem:
            found[name] = str(problem)
        else:
            with torch.no_grad():
                found[name] = module(check=groups)[0].token_rms
    return found


def main(output: Path) -> None:
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(torch.distributed.get_rank())
    results = {name: measure(case) for name, case in CASES.items()}
    results["settle shared"] = settle(Case(2, THREE_HEADS, dtype=torch.float32), share_prompt=True)
    results["settle unshared"] = settle(Case(4, dtype=torch.float32), share_prompt=False)
    results["settle longrope"] = settle(Case(2, LONGROPE, "Phi3", dtype=torch.float32), share_prompt=True)
    # A rotary embedding that turns by how many tokens a rank sees.
    own = LlamaRotaryEmbedding.forward
    LlamaRotaryEmbedding.forward = lambda self, x, position_ids: own(self, x, position_ids * x.shape[1])
    results["settle wrong"] = settle(Case(2, dtype=torch.float32), share_prompt=False)
    LlamaRotaryEmbedding.forward = own
    results["families"] = check_families()
    if torch.distributed.get_rank() == 0:
        output.write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


# The tests


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("sequence_parallel") / "results.json"
    forked.run(__file__, output, processes=PROCESSES)
    return json.loads(output.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_parts_equal_the_whole(results: dict[str, Any], name: str) -> None:
    tolerance = CASES[name].tolerance
    # Metrics are computed in float32, and reference log-probs are kept in it.
    tolerances = dict.fromkeys(MEASURED, tolerance)
    tolerances |= dict.fromkeys(("metrics", "evaluation", "reference pass"), max(tolerance, 1e-6))
    for what, value in results[name].items():
        assert value <= tolerances[what], what


@pytest.mark.slow
def test_every_family_is_run_in_parts_or_refused(results: dict[str, Any]) -> None:
    reasons = {name: found for name, found in results["families"].items() if isinstance(found, str)}
    # These have attention of their own, or only eager, which depends on the version for two of them.
    own = {"falcon", "falcon-new", "stablelm"}
    if not Gemma2ForCausalLM._supports_sdpa:
        own.add("gemma2")
    if not NemotronForCausalLM._supports_attention_backend:
        own.add("nemotron")
    assert reasons.keys() == own | {"gpt_oss", "bloom", "falcon-alibi", "falcon-mamba", "mamba", "mamba2", "mpt"}
    assert all(value < 1e-5 for name, value in results["families"].items() if name not in reasons)


@pytest.mark.slow
def test_the_layout_is_settled_on_parts(results: dict[str, Any]) -> None:
    shared, unshared = results["settle shared"], results["settle unshared"]
    assert (shared["share_prompt"], shared["collate"], shared["reason"]) == (True, True, "")
    assert (unshared["share_prompt"], unshared["collate"], unshared["reason"]) == (False, False, "switched off")
    assert results["settle longrope"]["share_prompt"], "which comes after the check of neighbours too"
    assert max(shared["token_rms"], unshared["token_rms"], results["settle longrope"]["token_rms"]) < 1e-5


@pytest.mark.slow
def test_parts_that_do_not_make_the_row_are_an_error(results: dict[str, Any]) -> None:
    assert "sequence_parallel=2: this model cannot be run on parts of rows" in results["settle wrong"]["error"]


RUNS = """
import json

from exo_fast.training.stages.align import align
from exo_fast.training.stages.align import AlignConfig

for settings in json.loads({settings!r}):
    align(AlignConfig(**settings))
"""


@pytest.mark.slow
def test_runs_in_parts_equal_a_run_of_one_process(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """With `long_sequence`: checkpoints, tiled MLPs and batches of one, in training, evaluation and reference pass."""
    batches = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    expected = align(AlignConfig(**settings(**batches, engine="torch", output_dir=str(tmp_path / "one"))))
    stages = [
        settings(
            **{name: None if name.startswith("per_device") else value for name, value in batches.items()},
            long_sequence=True,
            sequence_parallel=2,
            zero_stage=stage,
            output_dir=str(tmp_path / f"zero{stage}"),
            reference_cache_dir=str(tmp_path / f"cache{stage}"),
        )
        for stage in (2, 3)
    ]
    (tmp_path / "runs.py").write_text(RUNS.format(settings=json.dumps(stages)))
    forked.run(tmp_path / "runs.py", processes=2)

    one = load_file(tmp_path / "one" / "model.safetensors")
    for folder in ("zero2", "zero3"):
        found = json.loads((tmp_path / folder / "summary.json").read_text())
        assert (found["processes"], found["steps"]) == (2, expected["steps"])
        for split, names in (("train", ("loss", "kl", "grad_norm", "entropy")), ("eval", ("eval_loss", "eval_kl"))):
            for when in ("first", "last"):
                right, values = expected["metrics"][split][when], found["metrics"][split][when]
                assert [values[name] for name in names] == pytest.approx([right[name] for name in names], abs=1e-3)
        for name, tensor in load_file(tmp_path / folder / "model.safetensors").items():
            torch.testing.assert_close(tensor, one[name], atol=2e-4, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    ("count", "parts", "lengths"), [(9, 2, [5, 4]), (4, 4, [1] * 4), (5, 4, [2, 1, 1, 1]), (8, 3, [3, 3, 2])]
)
def test_heads_are_divided_evenly_and_all(count: int, parts: int, lengths: list[int]) -> None:
    runs = divide(count, parts)
    assert [len(run) for run in runs] == lengths
    assert [head for run in runs for head in run] == list(range(count))


REFUSED = {
    "few heads": (LLAMA | {"kind": "Llama"}, 5, "4 attention heads, and each rank needs one"),
    "alibi": ({"kind": "Bloom"}, 2, "ALiBi"),
    "state": ({"kind": "Mamba"}, 2, "one candidate would see the one before it"),
    "own attention": ({"kind": "Falcon"}, 2, "not the standard one"),
    "sinks": ({"kind": "GptOss"}, 2, "sinks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_run_in_parts_are_refused_with_the_reason(name: str) -> None:
    options, parts, reason = REFUSED[name]
    options = dict(options)
    config = getattr(transformers, f"{options.pop('kind')}Config")(**options)
    assert reason in refusal(config, parts)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("size", [2, 3])
def test_parts_of_the_one_row_of_flex_attention(size: int, share: bool) -> None:
    """FlexAttention takes the rows end to end; each token that predicts is one rank's, and no token is lost."""
    groups = [Group(list(range(1, 40)), [[3] * 30, [4] * 50]), Group([5] * 70, [[6] * 9, [7] * 2, [8] * 61])]
    packed = pack(groups, share_prompt=share)
    plan = plan_mask(transformers.LlamaConfig(**LLAMA))
    found = {}
    for rank in range(size):
        part = object.__new__(SequenceParallel)
        part.size, part.rank, part.core = size, rank, "flex_attention"
        inputs, rows, tokens = part.part(packed, plan, dtype=torch.float32, device=torch.device("cpu"))
        length = inputs["input_ids"].shape[1] * size
        assert length % 128 == length % size == 0
        assert inputs["attention_mask"].shape[-2:] == (length, length)
        for name in ("input_ids", "position_ids"):
            seen = inputs[name].flatten()[rows]
            assert torch.equal(seen, getattr(packed, name).flatten()[packed.source][tokens])
        found |= dict.fromkeys(tokens.tolist(), rank)
    assert len(found) == len(packed.targets)


def test_models_that_can_are_not_refused() -> None:
    assert refusal(transformers.LlamaConfig(**LLAMA), 4) == ""
    assert refusal(transformers.MistralConfig(**WINDOWED), 2) == ""
    assert refusal(transformers.Phi3Config(**LONGROPE), 2) == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_parallel": 2}, "sequence_parallel=2: the number of processes, 1, must be a multiple of it"),
        ({"sequence_parallel": 0}, "sequence_parallel=0: at least 1 process"),
        (
            {"sequence_parallel": 2, "attn_implementation": "eager"},
            "attn_implementation='eager': sequence_parallel exchanges heads around one of sdpa, flex_attention",
        ),
    ],
)
def test_what_cannot_work_is_refused(
    settings: Callable[..., dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        AlignConfig(**settings(**options))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
