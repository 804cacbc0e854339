"""A head in slices of the vocabulary, on real gloo processes, against the whole head in one.

This file is also the script of the processes: four for the table of cases below (the ones of two ranks run twice, on
ranks 0 and 1 and on 2 and 3), two for real models. Each stores what it found, and the tests compare.
"""

import itertools
import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from exo_fast import reference
from exo_fast.backends import torch as chunked
from exo_fast.logprobs import linear_logprobs
from exo_fast.loss import linear_group_loss

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LOSS_TYPES = ("exo-pref", "exo-rw", "dpo-pref", "dpo-rw")
NAMES = ("hidden", "weight", "bias")
GRADIENT_ERROR = {FP64: 1e-12, FP32: 1e-6, FP16: 1e-3, BF16: 3e-3}

# Rows of the head on each rank. Blocks of the vocabulary have 32 columns here.
UNEVEN, ONE_ROW, BLOCKS = (40, 35), (74, 1), (10, 65)
FOUR, EMPTY = (5, 33, 20, 17), (1, 0, 74, 0)
PLAIN = {"slices": UNEVEN, "dtype": FP32, "shape": (23,), "bias": True, "need": NAMES}
BUDGETS = {"kept": None, "rows": 3000, "blocks": 1}

CASES: dict[str, dict[str, Any]] = {
    f"{budget}-{'x'.join(map(str, slices))}-{str(dtype)[6:]}": {
        **PLAIN, "slices": slices, "dtype": dtype, "options": {"memory_budget": BUDGETS[budget]},
    }
    for budget in BUDGETS
    for slices in (UNEVEN, ONE_ROW, BLOCKS, FOUR, EMPTY)
    for dtype in (FP64, FP32, BF16, FP16)
}  # fmt: skip
CASES |= {
    "plain": PLAIN | {"bias": False},
    "batch": PLAIN | {"shape": (3, 7)},
    "softcap": PLAIN | {"slices": FOUR, "options": {"scale": 1.3, "softcap": 6.0}},
    "softcap-blocks": PLAIN | {"options": {"scale": -0.7, "softcap": 3.0, "memory_budget": 1}},
    "ignored": PLAIN | {"slices": FOUR, "ignored": 3},
    "ignored-blocks": PLAIN | {"ignored": 2, "options": {"memory_budget": 1}},
    "all-ignored": PLAIN | {"slices": EMPTY, "ignored": 1},
    "no-rows": PLAIN | {"shape": (0,)},
    "autocast": PLAIN | {"autocast": True},
    "ruled-out-slice": PLAIN | {"need": ("hidden", "weight"), "ruled_out": slice(40, 75)},
    "ruled-out-first": PLAIN | {"slices": FOUR, "need": ("hidden", "weight"), "ruled_out": slice(0, 38)},
    "frozen-on-one-rank": PLAIN | {"frozen_rank": 0},
}
CASES |= {
    f"extreme-{str(dtype)[6:]}-{len(slices)}": PLAIN | {
        "slices": slices, "dtype": dtype, "extreme": True, "shape": (6,), "bias": False,
    }
    for dtype in (FP32, BF16)
    for slices in (UNEVEN, EMPTY)
}  # fmt: skip
CASES |= {
    f"need-{'+'.join(need) or 'none'}-{budget}": PLAIN | {"need": need, "options": {"memory_budget": BUDGETS[budget]}}
    for need in (("hidden",), ("weight",), ("bias",), ("weight", "bias"), ("hidden", "bias"), ())
    for budget in ("kept", "blocks")
}
CASES |= {
    f"{loss_type}-k{candidates}": PLAIN | {
        "slices": FOUR if candidates % 2 else UNEVEN, "loss_type": loss_type, "candidates": candidates,
        "shape": (41,), "options": {"memory_budget": BUDGETS["rows"], "scale": 0.7},
    }
    for loss_type in LOSS_TYPES
    for candidates in (2, 3, 4, 5)
}  # fmt: skip
CASES |= {
    f"{loss_type}-tied": PLAIN | {
        "slices": FOUR, "loss_type": loss_type, "candidates": 4, "shape": (41,), "options": {"ties": "share"},
        "rewards": [[8.0, 8.0, 7.0, 6.0], [1.0, 1.0, 1.0, 1.0]],
    }
    for loss_type in ("exo-pref", "dpo-pref")
}  # fmt: skip
CASES |= {
    f"group-{str(dtype)[6:]}": PLAIN | {"dtype": dtype, "loss_type": "exo-rw", "candidates": 2, "shape": (41,)}
    for dtype in (FP64, BF16)
}
CASES |= {
    f"triton-{name}-{str(dtype)[6:]}": PLAIN | {
        **change, "dtype": dtype, "options": {"backend": "triton", "memory_budget": budget, "softcap": softcap},
    }
    for name, budget, softcap, change in (
        ("whole", None, None, {"ignored": 4}),
        ("fused", 1, 6.0, {"slices": EMPTY}),
        ("group", None, None, {"loss_type": "exo-pref", "candidates": 3}),
        ("frozen", None, None, {"need": ("hidden",), "bias": False}),
    )
    for dtype in (FP32, BF16, FP16)
}  # fmt: skip
CASES["triton-extreme"] = PLAIN | {"extreme": True, "shape": (6,), "bias": False, "options": {"backend": "triton"}}


def problem(case: dict[str, Any]) -> dict[str, Tensor]:
    """The whole head, and everything that all ranks have; the same numbers wherever it is called."""
    g = torch.Generator().manual_seed(7)
    vocab, width, shape = sum(case["slices"]), 6, case["shape"]
    made = {"hidden": torch.randn(*shape, width, generator=g), "weight": torch.randn(vocab, width, generator=g)}
    made["targets"] = torch.randint(vocab, shape, generator=g)
    if case["bias"]:
        made["bias"] = torch.randn(vocab, generator=g)
    if "ruled_out" in case:
        made["bias"][case["ruled_out"]] = float("-inf")
        possible = made["bias"].isfinite().nonzero().squeeze(1)
        made["targets"] = possible[made["targets"] % len(possible)]
    if case.get("extreme"):  # logits of ±1e4: certain, impossible and ordinary targets
        # In steps of 2⁻³ and 2⁻⁷, so that products are exact in float32 whatever order a library adds them in: at 1e4
        # the last bit of a logit is 1e-3 of a probability.
        made["weight"] = (made["weight"] * 0.01 * 2**7).round() / 2**7
        made["weight"][:, 0] = torch.linspace(-100, 100, vocab).round()
        made["hidden"] = (made["hidden"] * 2**3).round() / 2**3
        made["hidden"][:, 0] = torch.tensor([100.0, -100.0, 100.0, -100.0, 2**-3, 2**-3])
        made["targets"] = torch.tensor([vocab - 1, 0, 0, vocab - 1, 3, 50])
    if "ignored" in case:
        made["targets"].view(-1)[:: case["ignored"]] = -100
    made = {name: value.to(case["dtype"]) if name in NAMES else value for name, value in made.items()}
    if "loss_type" in case:
        candidates, groups = case["candidates"], 2
        cuts = torch.randperm(shape[0] - 1, generator=g)[: groups * candidates - 1].add(1).sort().values.tolist()
        made["cu_seqlens"] = torch.tensor([0, *cuts, shape[0]])
        made["rewards"] = torch.randn(groups, candidates, generator=g)
        if "rewards" in case:
            made["rewards"] = torch.tensor(case["rewards"])
        # References that the policy is near: far from them the losses saturate.
        exact = {name: made[name].double() if name in NAMES else made[name] for name in (*NAMES, "targets")}
        scale = case.get("options", {}).get("scale", 1.0)
        tokens = reference.linear_logprobs(**exact, scale=scale, softcap=case.get("options", {}).get("softcap"))
        sums = reference.sequence_logps(tokens, made["cu_seqlens"]).view_as(made["rewards"])
        made["ref_logps"] = (sums + 3 * torch.randn(sums.shape, generator=g)).float()
    return made


def run(case: dict[str, Any], made: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Results and gradients of one call: of the whole head, or on a rank of its slice."""
    leaves = {name: made[name].detach().requires_grad_(name in case["need"]) for name in NAMES if name in made}
    options = {**case.get("options", {}), **options}
    with torch.autocast("cpu", torch.bfloat16) if case.get("autocast") else nullcontext():
        if "loss_type" in case:
            result, policy_logps = linear_group_loss(**{**made, **leaves}, loss_type=case["loss_type"], **options)
            found = {"result": result.detach(), "policy_logps": policy_logps}
            scalar = 2.5 * result
        else:
            result = linear_logprobs(**{**made, **leaves}, **options)
            found = {"result": result.detach()}
            upstream = torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view_as(result)
            scalar = (result * upstream).sum()
    if case["need"]:
        scalar.backward()
    else:
        assert not scalar.requires_grad
    return found | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def sliced(case: dict[str, Any], made: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    sizes = case["slices"]
    return {name: made[name].split(sizes)[rank] if name in ("weight", "bias") else made[name] for name in made}


# What the ranks do ----------------------------------------------------------------------------------------------------


def main(what: str, folder: Path) -> None:
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save({"cases": on_cases, "models": on_models}[what](folder), folder / f"{rank}.pt")
    dist.destroy_process_group()


def on_cases(folder: Path) -> dict[str, Any]:
    chunked.MIN_ROWS, chunked.BLOCK = 1, 32
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine, foreign = pairs if dist.get_rank() < 2 else reversed(pairs)
    found = {}
    for name, case in CASES.items():
        group = mine if len(case["slices"]) == 2 else dist.group.WORLD
        rank = dist.get_rank(group)
        local = sliced(case, problem(case), rank)
        if case.get("frozen_rank") == rank:
            case = case | {"need": ("hidden",)}
        found[name] = run(case, local, process_group=group)
        again = run(case, local, process_group=group)
        assert all(torch.equal(value, again[key]) for key, value in found[name].items()), f"{name}: other bits"
    return found | {"errors": errors(mine, foreign), "dtensors": dtensors()}


def raised(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def errors(group: dist.ProcessGroup, foreign: Any) -> dict[str, str]:
    """Calls that all ranks must refuse, with what they say."""
    rank, case = dist.get_rank(group), PLAIN
    good = sliced(case, problem(case), rank)
    few = {"hidden": good["hidden"][: 23 - rank], "targets": good["targets"][: 23 - rank]}
    narrow = {"hidden": good["hidden"][:, : 6 - rank], "weight": good["weight"][:, : 6 - rank]}
    grouped = problem(case | {"loss_type": "exo-rw", "candidates": 2})
    grouped = sliced(case, grouped, rank)

    def logprobs(**change: Any) -> str:
        return raised(lambda: linear_logprobs(**{**good, "process_group": group, **change}))

    return {
        "rows": logprobs(**few),
        "width": logprobs(**narrow),
        "targets": logprobs(targets=good["targets"].roll(rank)),
        "bytes": logprobs(hidden=good["hidden"].double()) if rank else logprobs(),
        "gradient": logprobs(hidden=good["hidden"].clone().requires_grad_(rank == 0)),
        "range": logprobs(targets=good["targets"].index_fill(0, torch.tensor([4]), 75)),
        "bias": logprobs(bias=torch.zeros(75)),
        "reference": logprobs(backend="reference"),
        "foreign": logprobs(process_group=foreign),
        "loss-rows": raised(
            lambda: linear_group_loss(**{**grouped, **few}, loss_type="exo-rw", process_group=group)
        ),
        "loss-range": raised(
            lambda: linear_group_loss(
                **{**grouped, "targets": grouped["targets"] + 75}, loss_type="exo-rw", process_group=group
            )
        ),
    }  # fmt: skip


def dtensors() -> dict[str, Any]:
    """Heads as tensor parallelism leaves them, on a mesh of all four ranks."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    found: dict[str, Any] = {}
    for vocab, placement, replicated in itertools.product((75, 5), (Shard(0), Replicate()), (False, True)):
        case = PLAIN | {"slices": (vocab,)}
        made = problem(case)
        placed = {name: distribute_tensor(made[name], mesh, [placement]) for name in ("weight", "bias")}
        if replicated:
            placed["hidden"] = distribute_tensor(made["hidden"], mesh, [Replicate()])
        got = run(case, made | placed)
        assert got["weight"].placements == got["bias"].placements == (placement,)
        assert isinstance(got["hidden"], DTensor) == replicated
        full = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in got.items()}
        found[f"{vocab}-{placement}-{replicated}"] = {"vocab": vocab, **full}

    case = PLAIN | {"shape": (24,)}
    made, sharded = problem(case), [Shard(0)]
    weight, bias = (distribute_tensor(made[name], mesh, sharded) for name in ("weight", "bias"))
    columns = distribute_tensor(made["weight"], mesh, [Shard(1)])
    rows = distribute_tensor(made["hidden"], mesh, sharded)
    two = distribute_tensor(made["weight"], square, [Replicate(), Shard(0)])
    plain, rest = made["bias"], {"hidden": made["hidden"], "targets": made["targets"]}
    found["errors"] = {
        "columns": raised(lambda: linear_logprobs(weight=columns, **rest)),
        "two": raised(lambda: linear_logprobs(weight=two, **rest)),
        "hidden": raised(lambda: linear_logprobs(weight=weight, **{**rest, "hidden": rows})),
        "bias": raised(lambda: linear_logprobs(weight=weight, bias=plain, **rest)),
        "plain": raised(lambda: linear_logprobs(weight=made["weight"], bias=bias, **rest)),
        "group": raised(lambda: linear_logprobs(weight=weight, **rest, process_group=dist.group.WORLD)),
        "reference": raised(lambda: linear_logprobs(weight=weight, **rest, backend="reference")),
    }
    return found


def on_models(folder: Path) -> dict[str, Any]:
    """A tiny Llama under the tensor parallelism of PyTorch, of transformers and of DeepSpeed: relative differences of
    loss and gradients from the same model in one piece."""
    from torch.distributed.tensor import Replicate, init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    from exo_fast.head import read_head

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}

    def llama(tied: bool = False) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=61, num_key_value_heads=2, tie_word_embeddings=tied, **sizes)
        return LlamaForCausalLM(config)

    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan = {f"model.layers.*.{name}": ColwiseParallel() for name in columns}
    plan |= {f"model.layers.*.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    split = parallelize_module(llama(), init_device_mesh("cpu", (2,)), plan)
    found: dict[str, Any] = {"torch": compared(split, llama(), split)}

    if dist.get_rank() == 0:
        llama().save_pretrained(folder / "llama")
    dist.barrier()
    split = LlamaForCausalLM.from_pretrained(folder / "llama", distributed_config=DistributedConfig(tp_size=2)).train()
    found["transformers"] = compared(split, llama(), split)

    import deepspeed

    def autotp(model: LlamaForCausalLM, **section: Any) -> Any:
        config = {"train_micro_batch_size_per_gpu": 1, "tensor_parallel": {"autotp_size": 2, **section}}
        parameters = [p for p in model.parameters() if p.requires_grad]
        return deepspeed.initialize(model=model, config=config, optimizer=torch.optim.SGD(parameters, 0.1))[0]

    for name, tied, section in (
        ("autotp", False, {}),
        ("autotp-vocab", False, {"vocab_parallel_lm_head": True}),
        ("autotp-tied", True, {"vocab_parallel_lm_head": True}),
        ("autotp-whole", True, {"vocab_parallel_lm_head": False}),
    ):
        engine = autotp(llama(tied), **section)
        found[name] = compared(engine.module, llama(tied), engine)
    rows = {"layer_specs": [{"patterns": [".*lm_head\\.weight$"], "partition_type": "row"}]}
    engine = autotp(llama(), partition_config=rows)
    found["autotp-rows"] = raised(lambda: read_head(engine.module))
    slice_only = read_head(autotp(llama()).module).weight
    rest = torch.randn(2, 16), torch.tensor([1, 2])
    found["autotp-slice"] = raised(lambda: linear_logprobs(rest[0], slice_only, rest[1]))
    return found


def compared(split: Any, whole: Any, runner: Any) -> dict[str, Any]:
    """Return the relative differences of `split`, whose backward `runner` may own, from `whole`, by name."""
    from exo_fast.head import final_hidden, read_head

    g = torch.Generator().manual_seed(1)
    batch = {"input_ids": torch.randint(61, (4, 9), generator=g)}
    targets = torch.randint(61, (32,), generator=g)
    groups = {"ref_logps": torch.randn(2, 2, generator=g) - 33, "rewards": torch.randn(2, 2, generator=g)}
    losses = {}
    for model in (split, whole):
        head = read_head(model)
        hidden = final_hidden(model, **batch)[:, :-1].flatten(0, 1)
        facts = {"bias": head.bias, "scale": head.scale, "softcap": head.softcap, "process_group": head.process_group}
        bounds = torch.arange(0, 33, 8)
        loss, _ = linear_group_loss(hidden, head.weight, targets, bounds, **groups, loss_type="exo-rw", **facts)
        runner.backward(loss) if model is split and hasattr(runner, "backward") else loss.backward()
        losses[model is split] = loss.detach()
    difference = {"loss": float(abs(losses[True] - losses[False]) / abs(losses[False]))}
    wanted, rank = dict(whole.named_parameters()), dist.get_rank()
    for name, parameter in split.named_parameters():
        want, got = wanted[name].grad, parameter.grad
        if hasattr(got, "full_tensor"):
            got = got.full_tensor()
        for dim in (0, 1):  # AutoTP's slices, of vocabulary, heads or intermediate size
            if got.dim() > dim and got.shape[dim] != want.shape[dim]:
                want = want.split([(want.shape[dim] + 1) // 2, want.shape[dim] // 2], dim)[rank]
        difference[name] = float((got - want).norm() / want.norm())
    return {"head": tuple(read_head(split).weight.shape), "difference": difference}


# What is compared -----------------------------------------------------------------------------------------------------


def found_by(what: str, world: int, folder: Path) -> list[dict[str, Any]]:
    """Return the findings of each of `world` processes."""
    forked.run(__file__, what, folder, processes=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return found_by("cases", 4, tmp_path_factory.mktemp("cases"))


def exactly(case: dict[str, Any], made: dict[str, Tensor]) -> dict[str, Tensor]:
    """The operands as the products see them, in float64."""
    rounded = ("hidden", "weight") if case.get("autocast") else ()
    made = {name: value.bfloat16() if name in rounded else value for name, value in made.items()}
    return {name: value.double() if name in NAMES else value for name, value in made.items()}


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("name", CASES)
def test_equals_the_whole_head(name: str, ranks: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "MIN_ROWS", 1)
    monkeypatch.setattr(chunked, "BLOCK", 32)
    case = CASES[name]
    made, world = problem(case), len(case["slices"])
    options = {"backend": "torch", "process_group": None}
    exact = run(case, exactly(case, made), **options)
    whole = run(case, made, **options)
    for first in range(0, 4, world):
        found = [rank[name] for rank in ranks[first : first + world]]
        for key, want in whole.items():
            parts = [rank[key] for rank in found if key in rank]
            assert {part.dtype for part in parts} == {want.dtype}
            if key not in ("weight", "bias"):
                assert len(parts) == world
                assert all(torch.equal(part, parts[0]) for part in parts), f"{key}: ranks differ"
            elif "frozen_rank" in case:
                assert len(parts) == world - 1
                parts.insert(case["frozen_rank"], want.split(case["slices"])[case["frozen_rank"]])
            got = torch.cat(parts) if key in ("weight", "bias") else parts[0]
            assert got.shape == want.shape
            if case.get("autocast") and key == "weight":
                assert not torch.equal(got, got.bfloat16().float()), "dW of float32 weights is not rounded"
            assert torch.isfinite(got).all()
            if key in ("result", "policy_logps"):
                torch.testing.assert_close(got, want, rtol=1e-6, atol=2e-6 if got.dtype == FP32 else 1e-12)
            elif case["dtype"] == FP32 and not case.get("autocast"):
                assert relative(got, want) <= GRADIENT_ERROR[FP32], key
            else:
                limit = GRADIENT_ERROR[BF16 if case.get("autocast") else case["dtype"]]
                assert relative(got, exact[key]) <= limit, key
        assert {key for rank in found for key in rank} == set(whole)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("budget", ["kept", "blocks"])
def test_shares_of_dh_are_not_rounded_before_they_are_added(
    budget: str, dtype: torch.dtype, ranks: list[dict[str, Any]]
) -> None:
    """dH is as near to float64 as that of the whole head; rounded shares would be 1.2 to 1.5 times as far."""
    for slices in (FOUR, UNEVEN):
        name = f"{budget}-{'x'.join(map(str, slices))}-{str(dtype)[6:]}"
        case = CASES[name]
        made = problem(case)
        exact = run(case, exactly(case, made))["hidden"]
        whole = relative(run(case, made)["hidden"], exact)
        assert relative(ranks[0][name]["hidden"], exact) <= 1.1 * whole


ERRORS = {
    "rows": r"process_group: its ranks differ in the number of values in hidden: \[138, 132\] by rank",
    "width": r"process_group: its ranks differ in the size of a row of weight: \[6, 5\] by rank",
    "targets": r"process_group: its ranks differ in the targets \(a checksum of them\)",
    "bytes": r"process_group: its ranks differ in the bytes of a value of hidden: \[4, 8\]",
    "gradient": r"process_group: its ranks differ in whether hidden needs a gradient: \[1, 0\]",
    "range": r"targets\[4\] \(flattened\) is 75; ids must lie in \[0, 75\)",
    "bias": r"bias must be \(V,\) = \((40|35),\).* got \(75,\)",
    "reference": "backend='reference' needs the whole weight, not a slice",
    "foreign": "process_group must be a torch.distributed.ProcessGroup, in which this rank is, or None",
    "loss-rows": r"process_group: its ranks differ in the number of values in hidden",
    "loss-range": r"targets\[0\] \(flattened\) is \d+; ids must lie in \[0, 75\)",
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_those_of_all_ranks(name: str, ranks: list[dict[str, Any]]) -> None:
    """All ranks refuse: a rank that refused alone would leave the others waiting."""
    for rank in ranks:
        assert re.search(ERRORS[name], rank["errors"][name])


def test_a_slice_without_its_group_is_refused() -> None:
    """As Megatron and DeepSpeed mark it; its own softmax would be a wrong number, and no error."""
    made = problem(PLAIN)
    weight = torch.nn.Parameter(made.pop("weight"))
    linear_logprobs(weight=weight, **made)
    weight.tensor_model_parallel = True
    with pytest.raises(ValueError, match=r"weight is marked tensor_model_parallel, .* pass the process_group"):
        linear_logprobs(weight=weight, **made)


DTENSOR_ERRORS = {
    "columns": r"weight must be a plain tensor, or a DTensor that is replicated, or sharded on dim 0 .* got .*Shard",
    "two": r"over a 1-D mesh, got .* on a 2-D mesh",
    "hidden": "hidden must be a plain tensor or a replicated DTensor",
    "bias": "bias must be placed as weight is, .* got a plain tensor",
    "plain": "bias must be placed as weight is, a plain tensor, got",
    "group": "weight is a DTensor, which has its own process group: leave process_group=None",
    "reference": "backend='reference' needs the whole weight, not a slice",
}


def test_dtensors_are_taken_as_they_are(ranks: list[dict[str, Any]]) -> None:
    """Sharded on dim 0 (of five rows a rank has none) or replicated; gradients of the same placements."""
    for rank in ranks:
        found = dict(rank["dtensors"])
        said = found.pop("errors")
        assert len(found) == 8
        for name, got in found.items():
            case = PLAIN | {"slices": (got.pop("vocab"),)}
            want = run(case, problem(case))
            assert set(got) == set(want)
            for key, value in want.items():
                assert relative(got[key], value) <= 1e-6, (name, key)
        for name, message in DTENSOR_ERRORS.items():
            assert re.search(message, said[name])


@pytest.mark.slow
def test_real_models_under_tensor_parallelism(tmp_path: Path) -> None:
    """PyTorch's, transformers', and DeepSpeed's, whose head is in slices (gathered, kept, tied), whole, or cut on D."""
    for rank, found in enumerate(found_by("models", 2, tmp_path)):
        rows = 31 - rank
        assert found["torch"]["head"] == found["transformers"]["head"] == (61, 16)  # DTensors
        heads = {"autotp": rows, "autotp-vocab": rows, "autotp-tied": rows, "autotp-whole": 61}
        for name, size in heads.items():
            assert found[name]["head"] == (size, 16)
        for name in ("torch", "transformers", *heads):
            worst = max(found[name]["difference"].items(), key=lambda item: item[1])
            assert worst[1] <= 2e-6, (name, worst)
        assert re.search(r"the lm_head is a deepspeed\.\S+Allreduce\S*, not a slice of the voc", found["autotp-rows"])
        assert "weight is marked tensor_model_parallel" in found["autotp-slice"]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
