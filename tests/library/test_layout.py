"""Packed rows: their index lists, their masks against loops over the definition, and shared against unshared prompts on
every family that can share, log-probs and parameter gradients."""

import dataclasses
import random
import re
import shutil

import families
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig

from exo_fast.head import Head
from exo_fast.layout import Group, MaskPlan, Packed, check_sharing, from_padded, model_inputs, pack, plan_mask
from exo_fast.masks import KNOWN_SHARING
from exo_fast.packing import in_one_row

PLAIN = MaskPlan("llama", share=True)


def random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, 61) for _ in range(count)]


def make_groups(*shapes: tuple[int, list[int]], seed: int = 0) -> list[Group]:
    """Groups of random tokens from (prompt length, completion lengths)."""
    rng = random.Random(seed)
    return [Group(random_tokens(rng, p), [random_tokens(rng, c) for c in lengths]) for p, lengths in shapes]


# K of 2, 3 and 4, one-token prompts and completions, sequences longer and shorter than the families' window.
MIXED = make_groups((9, [7, 3]), (1, [12, 1, 5]), (6, [2, 9, 4, 11]), (4, [1, 1]), (2, [3, 3, 3]))
MIXED_ROW = 48  # room for several of these groups, and twice the positions the tiny models have


# --- pack -----------------------------------------------------------------------------------------------------------


def test_one_group_written_out():
    packed = pack([Group([11, 12, 13], [[21, 22], [31]])], row_length=8, pad_token_id=9)
    assert packed.input_ids.tolist() == [[11, 12, 13, 21, 22, 31]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert packed.group_ids.tolist() == [[0] * 6]
    assert packed.candidate_ids.tolist() == [[0, 0, 0, 1, 1, 2]]
    assert packed.source.tolist() == [2, 3, 2]
    assert packed.targets.tolist() == [21, 22, 31]
    assert packed.cu_seqlens.tolist() == [0, 2, 3]
    assert packed.cu_seqlens.dtype == packed.group_ids.dtype == torch.int32
    assert packed.share_prompt


def test_the_same_group_unshared():
    packed = pack([Group([11, 12, 13], [[21, 22], [31]])], share_prompt=False, pad_token_id=9)
    assert packed.input_ids.tolist() == [[11, 12, 13, 21, 22], [11, 12, 13, 31, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0]]
    assert packed.group_ids.tolist() == [[0] * 5, [1] * 4 + [-1]]
    assert packed.candidate_ids.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, -1]]
    assert packed.source.tolist() == [2, 3, 7]
    assert packed.targets.tolist() == [21, 22, 31]
    assert packed.cu_seqlens.tolist() == [0, 2, 3]
    assert not packed.share_prompt


def test_marked_tokens_alone_are_predicted():
    """Beside a group without marks, of which all count."""
    groups = [Group([11, 12], [[21, 22, 23], [31]], [[True, False, True], [True]]), Group([13], [[41, 42]])]
    shared = pack(groups, row_length=6)
    assert shared.input_ids.tolist() == [[11, 12, 21, 22, 23, 31], [13, 41, 42, 0, 0, 0]]
    assert shared.source.tolist() == [1, 3, 1, 6, 7]
    unshared = pack(groups, share_prompt=False)
    assert unshared.input_ids.tolist() == [[11, 12, 21, 22, 23], [11, 12, 31, 0, 0], [13, 41, 42, 0, 0]]
    assert unshared.source.tolist() == [1, 3, 6, 10, 11]
    for packed in (shared, unshared):
        assert packed.targets.tolist() == [21, 23, 31, 41, 42]
        assert packed.cu_seqlens.tolist() == [0, 2, 3, 5]


def test_some_candidates_of_a_group_keep_their_marks():
    group = Group([11], [[21, 22], [31], [41, 42]], [[True, False], [True], [False, True]])
    assert group.some([2, 0]) == Group([11], [[41, 42], [21, 22]], [[False, True], [True, False]])
    assert Group([11], [[21, 22], [31]]).some([1]) == Group([11], [[31]])


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_index_lists_lead_back_to_the_groups(seed: int, share_prompt: bool):
    """Walk from each target's source back through its own candidate and prompt: the text must be the group's."""
    rng = random.Random(seed)
    shapes = [(rng.randint(1, 9), [rng.randint(1, 9) for _ in range(rng.randint(1, 4))]) for _ in range(12)]
    groups = make_groups(*shapes, seed=seed)
    packed = pack(groups, share_prompt=share_prompt, row_length=70)
    tokens, positions = packed.input_ids.view(-1), packed.position_ids.view(-1)
    group_ids, candidates = packed.group_ids.view(-1), packed.candidate_ids.view(-1)
    row_of = torch.arange(len(tokens)) // packed.input_ids.shape[1]
    sequences = [(group.prompt, completion) for group in groups for completion in group.completions]
    assert len(packed.cu_seqlens) == len(sequences) + 1
    for s, (prompt, completion) in enumerate(sequences):
        span = slice(packed.cu_seqlens[s], packed.cu_seqlens[s + 1])
        assert packed.targets[span].tolist() == completion
        sources = packed.source[span]
        assert tokens[sources].tolist() == [prompt[-1], *completion[:-1]]
        assert positions[sources].tolist() == list(range(len(prompt) - 1, len(prompt) + len(completion) - 1))
        first = sources[0]
        in_prompt = (group_ids == group_ids[first]) & (row_of == row_of[first]) & (candidates == 0)
        assert tokens[in_prompt].tolist() == prompt
        assert positions[in_prompt].tolist() == list(range(len(prompt)))
        assert len({int(candidates[i]) for i in sources[1:]}) <= 1
    real = sum(group.tokens() for group in groups) if share_prompt else sum(len(p) + len(c) for p, c in sequences)
    assert int((group_ids >= 0).sum()) == real


def test_rows_are_filled_first_fit_decreasing():
    groups = make_groups((2, [3]), (2, [7]), (2, [1]), (2, [4]), (2, [2]))  # 5, 9, 3, 6, 4 tokens
    packed = pack(groups, row_length=10)
    in_row = [sorted(set(row.tolist()) - {-1}) for row in packed.group_ids]
    assert in_row == [[1], [3, 4], [0, 2]]
    assert packed.input_ids.shape == (3, 10)
    assert packed.targets.tolist() == [token for group in groups for c in group.completions for token in c]


def test_the_row_length_is_that_of_the_longest_group_by_default():
    packed = pack(make_groups((2, [3, 4]), (1, [2, 2]), (1, [1, 1])))
    assert packed.input_ids.shape == (2, 9)
    assert sorted(set(packed.group_ids[1].tolist())) == [-1, 1, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pack([]), "groups is empty"),
        (lambda: Group([], [[1]]), "Group.prompt is empty.*BOS or EOS"),
        (lambda: Group([1], []), "Group.completions is empty"),
        (lambda: Group([1], [[2], []]), r"Group.completions\[1\] is empty.*EOS"),
        (
            lambda: pack(make_groups((2, [3]), (4, [5, 6])), row_length=14),
            "group 1 has 15 tokens, more than row_length=14.*at least 15",
        ),
        (
            lambda: pack(make_groups((2, [3]), (4, [5, 6])), row_length=9, share_prompt=False),
            "sequence 2 has 10 tokens, more than row_length=9.*cut the sequence",
        ),
        (lambda: Group([1], [[2], [3, 4]], [[True], [True]]), r"learned must have one mark for each .*, got \[1, 1\]"),
        (lambda: Group([1], [[2], [3, 4]], [[True]]), r"Group.learned must have one mark .*, got \[1\]"),
        (lambda: Group([1], [[2]], [True]), r"Group.learned must have one mark .*, got \[None\]"),
        (lambda: Group([1], [[2]], True), r"Group.learned must have one mark .*, got \[None\]"),
        (
            lambda: Group([1], [[2], [3, 4]], [[True], [False, False]]),
            r"Group.learned\[1\] marks no token: at least one",
        ),
        (lambda: Group([1], [[2]], [[0]]), r"Group.learned\[0\] marks no token"),
    ],
)
def test_pack_errors(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


# --- ordinary padded batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("left", "right"), [(0, 3), (3, 0), (2, 1), (0, 0)])
def test_padded_rows_map_onto_the_same_lists(left: int, right: int):
    sequences = [(group.prompt, completion) for group in MIXED for completion in group.completions]
    longest = max(len(p) + len(c) for p, c in sequences)
    width = longest + left + right
    input_ids, mask = torch.zeros(len(sequences), width, dtype=torch.long), torch.zeros(len(sequences), width)
    for row, (prompt, completion) in enumerate(sequences):
        length = len(prompt) + len(completion)
        start = left if right or not left else width - length  # right-aligned where padding is on the left only
        input_ids[row, start : start + length] = torch.tensor(prompt + completion)
        mask[row, start : start + length] = 1
    source, targets, cu_seqlens = from_padded(input_ids, mask, torch.tensor([len(p) for p, _ in sequences]))
    packed = pack(MIXED)
    assert torch.equal(targets, packed.targets)
    assert torch.equal(cu_seqlens, packed.cu_seqlens)
    assert cu_seqlens.dtype == torch.int32
    assert torch.equal(input_ids.view(-1)[source], packed.input_ids.view(-1)[packed.source])
    assert torch.equal(input_ids.view(-1)[source + 1], targets)


@pytest.mark.parametrize(
    ("mask", "prompt_lens", "message"),
    [
        ([[1, 1, 1]], [1], r"\(2, 3\) and \(1, 3\)"),
        ([[1, 1, 1], [1, 1, 1]], [1], r"prompt_lens must be \(2,\)"),
        ([[1, 1, 1], [1, 0, 1]], [1, 1], "row 1 has a hole"),
        ([[1, 1, 1], [0, 0, 0]], [1, 1], r"row 1 has 0 tokens and prompt_lens\[1\]=1"),
        ([[1, 1, 0], [1, 1, 1]], [2, 1], r"row 0 has 2 tokens and prompt_lens\[0\]=2.*one completion token"),
        ([[1, 1, 1], [1, 1, 1]], [1, 0], r"row 1 has 3 tokens and prompt_lens\[1\]=0.*one prompt token"),
    ],
)
def test_from_padded_errors(mask: list[list[int]], prompt_lens: list[int], message: str):
    with pytest.raises(ValueError, match=message):
        from_padded(torch.ones(2, 3, dtype=torch.long), torch.tensor(mask), torch.tensor(prompt_lens))


# --- masks ------------------------------------------------------------------------------------------------------------


def sees(packed: Packed, b: int, i: int, j: int, window: int | None) -> bool:
    """The definition of design.md: same group, not later, in the prompt or in one's own candidate, in the window."""
    group, candidate, position = packed.group_ids[b], packed.candidate_ids[b], packed.position_ids[b]
    if group[i] != group[j] or j > i or candidate[j] not in (0, candidate[i]):
        return False
    return window is None or bool(position[i] - position[j] < window)


def inputs(packed: Packed, plan: MaskPlan, implementation: str = "sdpa", dtype: torch.dtype = torch.float32) -> dict:
    return model_inputs(packed, plan, dtype=dtype, device="cpu", attn_implementation=implementation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 4])
def test_dense_mask_is_the_definition(window: int | None, dtype: torch.dtype):
    packed = pack(MIXED, row_length=MIXED_ROW)
    plan = dataclasses.replace(PLAIN, kind="windowed" if window else "plain", window=window)
    mask = inputs(packed, plan, dtype=dtype)["attention_mask"]
    rows, length = packed.input_ids.shape
    assert mask.shape == (rows, 1, length, length)
    assert mask.dtype == dtype
    for b in range(rows):
        expected = [[sees(packed, b, i, j, window) for j in range(length)] for i in range(length)]
        assert ((mask[b, 0] == 0) == torch.tensor(expected)).all()
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(dtype).min}
    assert (mask == 0).any(-1).all(), "a row without any entry would be NaN after softmax"


@pytest.mark.parametrize("tokens", range(9, 18))
def test_dense_masks_have_the_strides_that_attention_on_a_gpu_asks_for(tokens: int):
    """PyTorch's memory-efficient attention takes a mask whose strides are multiples of 8 as it is; it copies others, in
    every layer."""
    packed = pack([Group([1, 2, 3], [[4], list(range(4, tokens))])])
    mask = inputs(packed, PLAIN, "eager")["attention_mask"]
    assert mask.shape == (1, 1, tokens, tokens)
    assert all(stride % 8 == 0 for stride in mask.stride()[:-1])
    assert mask.stride(-1) == 1
    query = torch.randn(1, 2, tokens, 16)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert torch.equal(attend(query, query, query, mask), attend(query, query, query, mask.contiguous()))


@pytest.mark.parametrize("share", [True, False])
def test_rows_end_to_end(share: bool):
    packed = pack(MIXED, row_length=MIXED_ROW if share else None, share_prompt=share)
    for multiple in (8, 128, 384):
        row = in_one_row(packed, multiple)
        length = row.input_ids.shape[1]
        assert len(row.input_ids) == 1
        assert length % multiple == 0
        assert length == max(2 * multiple, -(-packed.input_ids.numel() // multiple) * multiple)
        for name in ("input_ids", "position_ids", "group_ids", "candidate_ids"):
            assert torch.equal(getattr(row, name)[0, : packed.input_ids.numel()], getattr(packed, name).flatten())
        assert (row.group_ids[0, packed.input_ids.numel() :] == -1).all()
        assert row.source is packed.source
        assert torch.equal(in_one_row(row, multiple).input_ids, row.input_ids)


@pytest.mark.parametrize("window", [None, 4])
def test_block_mask_is_the_dense_mask(window: int | None):
    """The mask of the rows laid end to end, in whole blocks of 128 tokens."""
    create_mask = pytest.importorskip("torch.nn.attention.flex_attention").create_mask
    groups = make_groups((40, [90, 30, 60]), (70, [20, 80]), (9, [7, 3]))
    packed = pack(groups, row_length=250)
    plan = dataclasses.replace(PLAIN, kind="windowed" if window else "plain", window=window)
    dense = inputs(packed, plan)["attention_mask"][:, 0] == 0
    found = inputs(packed, plan, "flex_attention")
    rows, length = packed.input_ids.shape
    total = 512
    assert (rows, rows * length % 128) != (1, 0)
    assert found["input_ids"].shape == found["position_ids"].shape == (1, total)
    assert torch.equal(found["input_ids"][0, : rows * length].view(rows, length), packed.input_ids)
    want = torch.zeros(total, total, dtype=torch.bool)
    for row in range(rows):
        want[row * length : (row + 1) * length, row * length : (row + 1) * length] = dense[row]
    padding = nn.functional.pad(packed.group_ids.flatten(), (0, total - rows * length), value=-1) < 0
    want[padding] = torch.eye(total, dtype=torch.bool)[padding]
    block = found["attention_mask"]
    assert tuple(block.shape) == (1, 1, total, total)
    assert torch.equal(create_mask(block.mask_mod, 1, 1, total, total, device="cpu")[0, 0], want)
    # Blocks of 128 × 128 are kept exactly where an entry is.
    blocks = want.unfold(0, 128, 128).unfold(1, 128, 128).any(-1).any(-1)
    assert torch.equal(block.to_dense().bool()[0, 0], blocks)


def test_masks_by_layer_type():
    plan = plan_mask(families.tiny_model("gemma3").config)
    assert (plan.kind, plan.window) == ("by_layer", families.WINDOW)
    packed = pack(MIXED, row_length=MIXED_ROW)
    masks = inputs(packed, plan)["attention_mask"]
    assert masks.keys() == {"full_attention", "sliding_attention"}
    windowed = dataclasses.replace(PLAIN, kind="windowed", window=families.WINDOW)
    assert torch.equal(masks["full_attention"], inputs(packed, PLAIN)["attention_mask"])
    assert torch.equal(masks["sliding_attention"], inputs(packed, windowed)["attention_mask"])


def test_unshared_rows_come_with_a_plain_padding_mask():
    packed = pack(MIXED, share_prompt=False)
    found = inputs(packed, dataclasses.replace(PLAIN, share=False, reason="no"), "flash_attention_2")
    assert found.keys() == {"input_ids", "attention_mask"}
    lengths = [len(group.prompt) + len(c) for group in MIXED for c in group.completions]
    assert found["attention_mask"].sum(1).tolist() == lengths
    assert found["attention_mask"].tolist() == [[1] * n + [0] * (max(lengths) - n) for n in lengths]


def test_model_inputs_errors():
    packed = pack(MIXED)
    with pytest.raises(ValueError, match=r"model cannot: because.*share_prompt=False"):
        inputs(packed, dataclasses.replace(PLAIN, share=False, reason="because"))
    with pytest.raises(ValueError, match=r"attn_implementation='flash_attention_2'.*sdpa, eager, flex_attention"):
        inputs(packed, PLAIN, "flash_attention_2")


# --- shared against unshared ------------------------------------------------------------------------------------------


def test_shared_prompts_change_nothing(sharing_family: str):
    model = families.tiny_model(sharing_family)
    plan = plan_mask(model.config)
    assert plan.share
    assert plan.known
    packed = pack(MIXED, row_length=MIXED_ROW, by_length=plan.by_length)
    assert (packed.group_ids.max(1).values != packed.group_ids[:, 0]).any(), "several groups must be in a row"
    assert (packed.group_ids < 0).any(), "and one row must be padded"
    logps, gradients = families.logps_and_gradients(model, packed, plan)
    expected_logps, expected = families.logps_and_gradients(model, pack(MIXED, share_prompt=False), plan)
    families.assert_close(logps, expected_logps, 1e-5, "log-probs")
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name in gradients:
        # Relative to the largest of all: some (a key bias) are zero but for rounding.
        error = (gradients[name] - expected[name]).abs().max() / largest
        assert error <= 1e-5, f"gradient of {name} differs by {error:.1e} of the largest gradient"


def test_every_known_type_is_compared():
    assert set(KNOWN_SHARING) == {model_type for model_type, _ in families.SHARING.values()}


def test_families_with_windows_are_cut():
    """The comparison above rests on windows shorter than the sequences: with one more or no window it must fail."""
    windowed = [name for name in families.SHARING if plan_mask(families.tiny_model(name).config).window]
    assert {"mistral-window", "gemma2", "gemma3", "cohere2", "qwen2-window", "gpt_oss", "smollm3-window"} <= {*windowed}
    expected = pack(MIXED, share_prompt=False)
    for name in windowed:
        model = families.tiny_model(name)
        plan = plan_mask(model.config)
        packed = pack(MIXED, row_length=MIXED_ROW, by_length=plan.by_length)
        assert plan.window == families.WINDOW
        with torch.no_grad():
            unshared = families.token_logps(model, expected, plan)
            for window in (plan.window - 1, plan.window + 1, None):
                wrong = families.token_logps(model, packed, dataclasses.replace(plan, window=window))
                assert (wrong - unshared).abs().max() > 1e-2, f"{name} does not notice window={window}"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_sharing_in_half_precision_has_no_nan(implementation: str):
    for dtype in (torch.bfloat16, torch.float16):
        model = families.tiny_model("llama", dtype=dtype)
        model.set_attn_implementation(implementation)
        logps, gradients = families.logps_and_gradients(model, pack(MIXED, row_length=MIXED_ROW), PLAIN)
        assert logps.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="FlexAttention compiles C++ on CPU")
def test_shared_prompts_with_flex_attention():
    """A dict of BlockMasks through a model: Gemma-2 has two kinds of layer and caps its attention scores."""
    model = families.tiny_model("gemma2", head_dim=16)
    plan = plan_mask(model.config)
    with torch.no_grad():
        model.set_attn_implementation("eager")  # sdpa of transformers before 5.23 leaves the cap out
        expected = families.token_logps(model, pack(MIXED, share_prompt=False), plan)
        model.set_attn_implementation("flex_attention")
        assert plan_mask(model.config) == plan
        families.assert_close(families.token_logps(model, pack(MIXED, row_length=MIXED_ROW), plan), expected, 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="FlexAttention compiles C++ on CPU")
def test_batches_of_other_lengths_are_not_compiled_again(monkeypatch: pytest.MonkeyPatch):
    """FlexAttention and, as on CUDA, its masks: one program for all lengths, numbers of rows and windows. After eight
    programs torch compiles no more, and attention would run unfused, with all scores in memory."""
    from torch._dynamo.utils import counters

    from exo_fast import masks

    compiled = masks.block_mask_maker(True)
    monkeypatch.setattr(masks, "block_mask_maker", lambda on_gpu: compiled)
    torch.compiler.reset()
    counters.clear()
    model = families.tiny_model("gemma2", head_dim=16)
    plan = plan_mask(model.config)
    assert plan.window
    rng = random.Random(0)
    with torch.no_grad():
        for batch in range(30):
            sizes = [(rng.randint(1, 60), [rng.randint(1, 70) for _ in range(rng.randint(2, 4))]) for _ in range(3)]
            groups = make_groups(*sizes[: rng.randint(1, 3)], seed=batch)
            model.set_attn_implementation("flex_attention")
            rows = pack(groups, row_length=None if batch % 2 else 600)
            found = families.token_logps(model, rows, plan)
            if batch % 5 == 0:
                model.set_attn_implementation("eager")
                expected = families.token_logps(model, pack(groups, share_prompt=False), plan)
                families.assert_close(found, expected, 1e-5)
    assert counters["stats"]["unique_graphs"] <= 3
    assert not counters["unimplemented"]


# --- models that cannot share -----------------------------------------------------------------------------------------


def test_fallback_is_visible_and_right(refusing_family: str):
    """The plan says why not, and unshared rows give each sequence the log-probs it has on its own."""
    model = families.tiny_model(refusing_family)
    plan = plan_mask(model.config)
    assert not plan.share
    assert plan.model_type in plan.reason
    report = check_sharing(model, MIXED, plan)
    assert (report.ok, report.reason) == (False, plan.reason)
    with torch.no_grad():
        found = families.token_logps(model, pack(MIXED, share_prompt=False), plan)
        alone = []
        for group in MIXED:
            for completion in group.completions:
                logits = model(input_ids=torch.tensor([group.prompt + completion])).logits[
                    0, len(group.prompt) - 1 : -1
                ]
                logps = logits.float().log_softmax(-1)
                alone.append(logps.gather(1, torch.tensor(completion)[:, None])[:, 0])
    families.assert_close(found, torch.cat(alone), 1e-5)


@pytest.mark.parametrize(
    ("model_type", "entries", "reason"),
    [
        ("bloom", {}, "ALiBi"),
        ("mpt", {}, "ALiBi"),
        ("falcon", {"alibi": True}, "ALiBi"),
        ("mamba", {}, "layers of type (linear_attention|mamba): a state-space"),
        ("mamba2", {}, "state-space"),
        ("jamba", {}, "state-space"),
        ("qwen3_next", {}, "layers of type linear_attention"),
        ("rwkv", {}, "recurrent state"),
        ("llama4_text", {}, "chunked attention cuts its chunks on token indices"),
        ("deepseek_v32", {}, "layers of type (indexed|deepseek_sparse)_attention"),
        ("bart", {}, "encoder-decoder"),
        ("gpt2", {"add_cross_attention": True}, "encoder-decoder"),
        ("gemma3", {}, r"multimodal model \(vision_config"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "not causal"),
        ("lfm2", {}, "not among the tested types, and conv_L_cache=3"),
        ("gpt_neo", {}, "not among the tested types, and window_size=256"),
        ("afmoe", {"sliding_window": None}, "layers with a sliding window"),
        ("gptj", {}, "its attention is not the standard one"),
        ("roformer", {}, "takes no position_ids"),
        ("vit", {}, "no causal LM class"),
    ],
)
def test_refusals_give_their_reason(model_type: str, entries: dict, reason: str):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    if model_type == "gptj" and transformers.GPTJForCausalLM._supports_attention_backend:
        pytest.skip("it is the standard one from transformers 5.24 on")
    plan = plan_mask(CONFIG_MAPPING[model_type](**entries))
    assert not plan.share
    assert repr(model_type) in plan.reason
    assert re.search(reason, plan.reason), plan.reason


def test_flash_attention_is_refused():
    config = families.tiny_model("llama").config
    config._attn_implementation = "flash_attention_2"
    plan = plan_mask(config)
    assert not plan.share
    assert "'flash_attention_2' takes no ready-made mask" in plan.reason


# --- the numeric self-check -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "gpt_oss"])
def test_check_accepts_the_right_mask(name: str):
    model = families.tiny_model(name)
    report = check_sharing(model, MIXED, plan_mask(model.config))
    assert report.ok
    assert report.reason == ""
    assert report.token_rms < 1e-5
    assert report.sequence_max < 1e-4


def test_check_catches_a_wrong_mask():
    model = families.tiny_model("mistral-window")
    plan = plan_mask(model.config)
    for wrong in (dataclasses.replace(plan, window=plan.window + 1), PLAIN):
        report = check_sharing(model, MIXED, wrong)
        assert not report.ok
        assert report.token_rms > 0.01
        assert "different log-probs: rms" in report.reason


def test_check_catches_a_model_that_ignores_the_mask():
    """A forward that attends over the whole row, as one that drops a 4-D mask would: candidates see each other."""
    model = families.tiny_model("llama")
    body = model.model.forward

    def forget_mask(attention_mask: Tensor | None = None, **kwargs):
        return body(attention_mask=attention_mask if attention_mask.ndim == 2 else None, **kwargs)

    model.model.forward = forget_mask
    assert not check_sharing(model, MIXED, plan_mask(model.config)).ok


def test_check_catches_nan():
    model = families.tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    assert not check_sharing(model, MIXED, plan_mask(model.config)).ok


def test_check_in_half_precision():
    model = families.tiny_model("mistral-window", dtype=torch.bfloat16)
    plan = plan_mask(model.config)
    assert check_sharing(model, MIXED, plan).ok
    assert not check_sharing(model, MIXED, PLAIN).ok
    assert not check_sharing(model, MIXED, plan, atol=1e-6).ok


def test_check_leaves_the_model_and_the_settings_as_they_were():
    model = families.tiny_model("llama", attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    precisions = []
    model.model.register_forward_hook(lambda *_: precisions.append(torch.backends.mkldnn.matmul.fp32_precision))
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            report = check_sharing(model, MIXED, plan_mask(model.config))
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert report.ok, "dropout and autocast must be off inside"
    assert precisions == ["ieee", "ieee"]
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untested_type_is_tried(dtype: torch.dtype):
    """Helium is not on the list: standard attention, so the numbers decide, in float32 whatever the weights are."""
    model = families.random_model("helium", dtype=dtype, **families.LLAMA, head_dim=8)
    plan = plan_mask(model.config)
    assert (plan.share, plan.known) == (True, False)
    with pytest.raises(ValueError, match="'helium'"):
        check_sharing(model, MIXED, plan)
    report = check_sharing(model, MIXED, plan, head=Head(model.lm_head.weight))
    assert report.ok
    assert report.token_rms < 1e-5
    assert model.dtype == dtype


def test_an_untested_type_that_fails_is_reported():
    """BERT as a decoder-to-be attends both ways: unshared rows are not the causal ones of the packed row."""
    model = families.random_model("bert", **{**families.LLAMA, "max_position_embeddings": 64}, is_decoder=False)
    plan = plan_mask(model.config)
    assert (plan.share, plan.known) == (True, False)
    report = check_sharing(model, MIXED, plan, head=Head(model.cls.predictions.decoder.weight))
    assert not report.ok
    assert "different log-probs" in report.reason


def test_an_untested_type_that_raises_is_reported():
    model = families.tiny_model("mistral")
    by_layer = MaskPlan("mistral", share=True, kind="by_layer", layer_types=("full_attention",), known=False)
    report = check_sharing(model, MIXED, by_layer)
    assert not report.ok
    assert "does not take the mask" in report.reason
    with pytest.raises(Exception, match="dict"):
        check_sharing(model, MIXED, dataclasses.replace(by_layer, known=True))


def test_a_config_without_a_class_is_refused():
    class Unheard(PretrainedConfig):
        model_type = "unheard_of"

    assert "no causal LM class" in plan_mask(Unheard()).reason


BAD_IDS = {"word": "ab", "fraction": [0.5], "truth": [True], "none": [None], "lists": [[1], [2]], "size": [2**70]}


@pytest.mark.parametrize("ids", BAD_IDS.values(), ids=BAD_IDS.keys())
def test_pack_takes_token_ids_alone(ids: object):
    with pytest.raises(ValueError, match="groups: token ids must be whole numbers"):
        pack([Group(ids, [ids])])


def test_pack_names_what_is_no_group_or_number():
    with pytest.raises(ValueError, match=r"Group\.prompt must be a list, got int"):
        Group(3, [[1]])
    with pytest.raises(ValueError, match=r"Group.completions\[1\] must be a list, got int"):
        Group([3], [[1], 2])
    for groups in (None, "ab", [[1, [2]]]):
        with pytest.raises(ValueError, match="groups must be a list of Group"):
            pack(groups)
    with pytest.raises(ValueError, match="row_length must be a whole number"):
        pack([Group([1], [[2]])], row_length=8.5)
    with pytest.raises(ValueError, match="pad_token_id must be a whole number"):
        pack([Group([1], [[2]])], pad_token_id=None)


def test_from_padded_names_what_is_no_tensor_of_ids():
    good = {
        "input_ids": torch.arange(6).view(2, 3),
        "attention_mask": torch.ones(2, 3).T.contiguous().T,  # of other strides
        "prompt_lens": torch.tensor([1, 2]),
    }
    assert from_padded(**good)[1].tolist() == [1, 2, 5]
    for name, value, message in (
        ("input_ids", [[1, 2, 3]], "input_ids must be a tensor, got list"),
        ("input_ids", torch.rand(2, 3), "input_ids must be int64 or int32"),
        ("attention_mask", torch.ones(2, 3, dtype=torch.complex64), "attention_mask must be int64 or int32"),
        ("attention_mask", torch.ones(2, 3).to_sparse(), "attention_mask must be a dense tensor"),
        ("prompt_lens", torch.tensor([1.0, 2.0]), "prompt_lens must be int64 or int32"),
        ("prompt_lens", torch.ones(2, dtype=torch.int64, device="meta"), "prompt_lens is on the meta device"),
    ):
        with pytest.raises(ValueError, match=message):
            from_padded(**{**good, name: value})
    with pytest.raises(ValueError, match="each at least 1; got"):
        from_padded(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0), torch.tensor([1, 2]))
