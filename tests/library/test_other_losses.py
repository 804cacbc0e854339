"""The losses of docs/other-losses.md, taken from the page, against their papers, TRL and Liger, and their memory."""

import functools
import inspect
import re

import families
import pytest
import torch

from exo_fast.benchmarks.equality import check
from exo_fast.benchmarks.equality.check import FAMILIES, LIMIT, LOSSES, PAGE, PARTS, differences, memory, snippets
from exo_fast.benchmarks.equality.formulas import Case, Problem, formula_cases
from exo_fast.benchmarks.harness import process_memory
from exo_fast.benchmarks.harness.tables import block
from exo_fast.reference import sequence_logps

FUNCTIONS = snippets()
LIBRARIES = [
    pytest.param(library, loss, id=f"{library.replace(' ', '-')}-{loss}_loss")
    for library, losses in {
        "Liger": ("dpo", "kto", "orpo", "simpo", "cpo", "grpo"),
        "TRL DPO": ("dpo", "ipo"),
        "TRL KTO": ("kto",),
        "TRL CPO": ("cpo", "simpo"),
        "TRL ORPO": ("orpo",),
        "TRL GRPO": ("grpo", "ppo"),
    }.items()
    for loss in losses
]


@functools.cache
def cases(family: str) -> list[Case]:
    """The cases of a family, made once: each of TRL's builds a trainer."""
    return list(FAMILIES[family][1](FUNCTIONS))


def of_loss(family: str, loss: str) -> list[Case]:
    found = [case for case in cases(family) if case.loss == loss]
    assert found
    return found


def assert_equal(case: Case, limit: float, dtype: torch.dtype = torch.float32) -> None:
    found = differences(case, FUNCTIONS[f"{case.loss}_loss"], dtype)
    assert all(found[part] <= limit for part in PARTS), f"{case.peer} {case.variant}: {found}"
    assert case.d_hidden.norm() > 1e-3
    assert case.d_weight.norm() > 1e-3


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss}_loss")
def test_is_the_papers_formula(loss: str) -> None:
    for case in of_loss("formulas", loss):
        assert_equal(case, 1e-12, torch.float64)
        assert_equal(case, LIMIT)


@pytest.mark.parametrize(("library", "loss"), LIBRARIES)
def test_is_the_librarys_loss(library: str, loss: str) -> None:
    if why := check.unavailable(library):
        pytest.skip(why)
    for case in of_loss(library, loss):
        assert_equal(case, LIMIT)
        if loss in ("ppo", "grpo"):
            assert_clips(case)


def assert_clips(case: Case) -> None:
    """Check that some tokens' ratios are clipped above, some below, and most are not."""
    targets, scale = case.arguments["targets"], case.arguments["scale"]
    scored = targets != -100
    logps = FUNCTIONS["frozen_logps"](case.hidden, case.weight, targets, scale=scale)
    ratio = (logps - case.arguments["old_logps"]).exp()[scored]
    advantages = case.arguments["advantages"].reshape(len(targets), -1).expand(targets.shape)[scored]
    assert 0 < ((ratio > 1.28) & (advantages > 0)).sum() < len(ratio) / 2
    assert 0 < ((ratio < 0.8) & (advantages < 0)).sum() < len(ratio) / 2


def test_every_loss_of_the_page_is_compared() -> None:
    assert {name for name in FUNCTIONS if name.endswith("_loss")} == {f"{x}_loss" for x in LOSSES} | {"packed_dpo_loss"}


def test_the_batch_can_tell_losses_apart() -> None:
    """Ratios are clipped on both sides, and a wrong option is far outside the limit."""
    for case in formula_cases(FUNCTIONS):
        if case.loss in ("ppo", "grpo"):
            assert_clips(case)
    wrong = {
        "dpo": {"beta": 0.31},
        "ipo": {"beta": 0.31},
        "kto": {"z0": torch.tensor(0.5), "weights": (1.0, 1.3)},
        "orpo": {"completion": Problem.make().with_prompts != -100},
        "simpo": {"gamma": 0.41},
        "cpo": {"alpha": 0.71},
        "ppo": {"epsilon": 0.21},
        "grpo": {"epsilon": (0.2, 0.3)},
    }
    for case in formula_cases(FUNCTIONS):
        changed = Case(**{**vars(case), "arguments": {**case.arguments, **wrong[case.loss]}})
        assert max(differences(changed, FUNCTIONS[f"{case.loss}_loss"]).values()) > 100 * LIMIT, case.loss


def test_the_baseline_of_trl_is_not_its_floor() -> None:
    if why := check.unavailable("TRL KTO"):
        pytest.skip(why)
    (case,) = of_loss("TRL KTO", "kto")
    assert case.arguments["z0"] > 0.1


def test_packed_rows_give_the_same() -> None:
    problem = Problem.make()
    arguments = problem.inputs(FUNCTIONS)["dpo"]
    padded = FUNCTIONS["dpo_loss"](problem.hidden, problem.weight, **arguments)
    scored = arguments["targets"] != -100
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), scored.sum(-1).cumsum(0)])
    packed = {**arguments, "targets": arguments["targets"][scored]}
    found = FUNCTIONS["packed_dpo_loss"](problem.hidden[scored], problem.weight, cu_seqlens=cu_seqlens, **packed)
    torch.testing.assert_close(found, padded)
    ones = torch.ones(int(scored.sum()))
    assert torch.equal(sequence_logps(ones, cu_seqlens), cu_seqlens.diff().float())  # the lengths, as the page says


def test_on_policy_grpo_is_the_policy_gradient() -> None:
    """Ratios are 1 without old log-probs, and their gradient is the log-probs' gradient."""
    problem = Problem.make()
    arguments = problem.inputs(FUNCTIONS)["grpo"]
    known = {**arguments, "old_logps": FUNCTIONS["frozen_logps"](problem.hidden, problem.weight, problem.targets)}
    for options in (arguments, known):
        del options["scale"]
    arguments["old_logps"] = None
    found, expected = (
        torch.func.grad(lambda h, o=options: FUNCTIONS["grpo_loss"](h, problem.weight, backend="reference", **o))(
            problem.hidden
        )
        for options in (arguments, known)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["llama", "cohere", "gemma2", "phimoe"])  # plain; a scale, a softcap, a bias
def test_hidden_states_and_head_of_a_model(name: str) -> None:
    model = families.tiny_model(name)
    ids = torch.randint(3, families.VOCAB, (4, 9), generator=torch.Generator().manual_seed(0))
    scored = torch.arange(9) >= torch.tensor([[3], [2], [4], [5]])
    targets = FUNCTIONS["next_token_targets"](ids, scored)
    hidden, weight, head = FUNCTIONS["hidden_and_head"](model, input_ids=ids)
    found = FUNCTIONS["frozen_logps"](hidden, weight, targets, **head).sum(-1)
    logps = model(input_ids=ids).logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, (logps * scored[:, 1:]).sum(-1), rtol=1e-5, atol=1e-5)


def test_functions_are_short() -> None:
    for loss in LOSSES:
        source = re.search(rf"^def {loss}_loss\(.*?(?=^```|\n\n\n)", PAGE.read_text(), flags=re.S | re.M)[0]
        assert 4 <= len(source.strip().splitlines()) <= 20, loss
        assert "head" in inspect.signature(FUNCTIONS[f"{loss}_loss"]).parameters


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss}_loss")
def test_no_loss_holds_full_logits(loss: str) -> None:
    tokens, vocab, budget = 1200, 16384, 8 << 20
    try:
        process_memory.reset_peak()
    except OSError as error:
        pytest.skip(f"the peak of a process cannot be measured here: {error}")
    row = next(memory(FUNCTIONS, tokens, vocab, budget, only=(loss,)))
    full_logits = tokens * vocab * 4 / 1e6
    assert row["full"] > full_logits
    assert row["ours"] < full_logits / 2


def test_the_page_shows_a_comparison_for_each_loss() -> None:
    page = PAGE.read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in block(check.LABEL, "equality").search(page)[2].splitlines()
        if line.startswith("| ")
    ][2:]
    for loss, name in LOSSES.items():
        peers = {peer.split(" ")[0] for shown, peer, *_ in rows if shown == name}
        assert peers >= {"full", "TRL"} | ({"Liger"} if loss not in ("ipo", "ppo") else set()), (
            f"{name}: make the table"
        )
    assert all(float(value) <= LIMIT for *_, value, d_hidden, d_weight in rows for value in (value, d_hidden, d_weight))
    held = block(check.LABEL, "memory").search(page)[2]
    assert all(f"| {name} |" in held for name in LOSSES.values())
