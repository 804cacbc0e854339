"""kernels/tuned: tables as they are written and read, faults in them, and what the kernels take from them."""

import json
from pathlib import Path

import pytest

from exo_fast.kernels import linear_logprobs_backward, linear_logsumexp, tuned
from exo_fast.kernels.launch import Config
from exo_fast.kernels.targets import TARGETS
from exo_fast.kernels.tuned import Row, Schedule, Scratch, Table

SM_90 = TARGETS["sm_90"]
SOURCE = {"kind": "measurement", "card": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-12-01",
          "command": "make gpu-first"}  # fmt: skip
SPACE = linear_logsumexp.configs(SM_90, "bf16")
ROWS = (
    Row("linear_logsumexp", "bf16", False, 1023, SPACE[1]),
    Row("linear_logsumexp", "bf16", False, None, SPACE[2]),
    Row("linear_logsumexp", "bf16", True, None, SPACE[0]),
    Row("linear_logprobs_backward", "fp32", False, None, linear_logprobs_backward.configs(SM_90, "fp32")[1]),
)
SCHEDULES = (Schedule("bf16", 4095, "kept"), Schedule("bf16", None, "chunked"), Schedule("fp16", None, "fused"))
TABLE = Table("sm_90", SOURCE, ROWS, SCHEDULES, Scratch(0.25, 2**33))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder of tables that come before the shipped ones."""
    monkeypatch.setenv(tuned.OWN_TABLES, str(tmp_path))
    tuned.table.cache_clear()
    yield tmp_path
    tuned.table.cache_clear()


def test_a_written_table_is_read_and_used(own: Path) -> None:
    tuned.write_table(own / "sm_90.json", TABLE)
    found = tuned.table("sm_90")
    assert (found.source, found.rows, found.schedules, found.scratch) == (SOURCE, ROWS, SCHEDULES, TABLE.scratch)
    assert tuned.table("sm_90") is found  # read once
    for width, store, want in ((1, False, 1), (1023, False, 1), (1024, False, 2), (10**6, False, 2), (1, True, 0)):
        assert linear_logsumexp.config(SM_90, "bf16", width, store) == SPACE[want]
    assert [found.schedule("bf16", width) for width in (4095, 4096)] == ["kept", "chunked"]
    assert found.schedule("fp16", 1) == "fused"
    assert linear_logprobs_backward.config(SM_90, "fp32", 64) == ROWS[3].config
    assert [path.name for path in own.iterdir()] == ["sm_90.json"]


def test_without_a_row_the_rule_counts(own: Path) -> None:
    tuned.write_table(own / "sm_90.json", Table("sm_90", SOURCE, (), ()))
    for width in (1, 2047, 2048):
        for dtype in ("bf16", "fp32"):
            for target in (SM_90, TARGETS["gfx1100"]):  # gfx1100 has no table at all
                want = linear_logsumexp.configs(target, dtype)[0 if width >= 2048 else 1]
                assert linear_logsumexp.config(target, dtype, width) == want
    assert linear_logprobs_backward.config(SM_90, "bf16", 9) == linear_logprobs_backward.configs(SM_90, "bf16")[0]
    assert tuned.table("sm_90").schedule("bf16", 9) is None
    assert tuned.table("gfx1100") is None


def test_the_choice_between_two_widths_is_the_nearer_by_ratio() -> None:
    assert tuned.ranges({1024: "a", 4096: "b"}) == [(2048, "a"), (None, "b")]
    assert tuned.ranges({4096: "a", 512: "a", 1024: "a"}) == [(None, "a")]
    assert tuned.ranges({256: "a", 1024: "b", 4096: "a"}) == [(512, "a"), (2048, "b"), (None, "a")]


def test_budgets_are_powers_of_two_of_the_card() -> None:
    gib = 2**30
    for card, want in ((79.25, 4), (79.1, 4), (139.8, 4), (191.7, 4), (47.4, 2), (39.4, 2), (23.6, 1), (15.7, 0.5)):
        assert tuned.SCRATCH.budget(int(card * gib)) == want * gib
    assert Scratch(0.125, 8 * gib).budget(80 * gib) == 8 * gib


def changed(**parts) -> dict:
    """Return a right table as JSON holds it, with other parts."""
    blocks = {"BLOCK_N": 128, "BLOCK_V": 256, "BLOCK_D": 64, "PIECE": 64}
    row = {"kernel": "linear_logsumexp", "dtype": "bf16", "store": False, "up_to": None, "blocks": blocks}
    rows = [{**row, "warps": 8, "stages": 3}]
    whole = {"format": 1, "target": "sm_90", "source": SOURCE, "scratch": {"share": 0.0625, "most": 2**32}}
    whole |= {"kernels": rows, "schedules": [{"dtype": "bf16", "up_to": None, "schedule": "kept"}]}
    for name, value in parts.items():
        if name in whole:
            whole[name] = value
        else:
            rows[0][name] = value
    return whole


FAULTS = [
    ("{", "Expecting property name"),
    (b"\xff\xfe\xff", "decode"),
    ("[]", "the table is []: give an object"),
    ({"format": 1}, "the table: kernels is missing"),
    (changed(format=2), "format is 2, and this version reads 1"),
    (changed(source={"kind": "guess"}), "source: kind is 'guess': give one of prediction, measurement"),
    (changed(source={**SOURCE, "card": ""}), "source: card is '': give a text"),
    (changed(source={k: v for k, v in SOURCE.items() if k != "triton"}), "source: triton is missing"),
    (changed(scratch={"share": 2, "most": 1}), "scratch: share is 2: give a number above 0 and at most 1"),
    (changed(scratch={"share": 0.5, "most": 0}), "scratch: most is 0: give a whole number above 0"),
    (changed(kernels={}), "kernels is {}: give a list"),
    (changed(kernel="merge"), r"kernels[0]: kernel is 'merge': give one of linear_logsumexp, linear_logprobs_backward"),
    (changed(dtype="fp8"), "kernels[0]: dtype is 'fp8'"),
    (changed(store=1), "kernels[0]: store is 1: give false, or true for linear_logsumexp"),
    (changed(up_to=0), "kernels[0]: up_to is 0: give a whole number above 0"),
    (changed(up_to=99), "kernels: the last row of linear_logsumexp bf16 False must have up_to null"),
    (changed(warps=True), "kernels[0]: warps is True"),
    (changed(stages=2.5), "kernels[0]: stages is 2.5"),
    (changed(blocks={"BLOCK_N": 1}), "kernels[0]: blocks: BLOCK_D is missing, BLOCK_V is missing, PIECE is missing"),
    (changed(colour="red"), "kernels[0]: colour is unknown"),
    (changed(kernels=2 * changed()["kernels"]), "must have up_to null, and no other: they are [None, None]"),
    (
        changed(schedules=[{"dtype": "fp32", "up_to": None, "schedule": "kept"}]),
        "schedules[0]: schedule is 'kept': give one of chunked, fused",
    ),
    (
        changed(schedules=[{"dtype": "bf16", "up_to": up_to, "schedule": "kept"} for up_to in (9, 9, None)]),
        "schedules: up_to of bf16 must ascend: they are [9, 9, None]",
    ),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_a_fault_is_named_with_its_file(own: Path, fault: str | bytes | dict, message: str) -> None:
    path = own / "sm_90.json"
    text = json.dumps(fault) if isinstance(fault, dict) else fault
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:  # noqa: PT011
        linear_logsumexp.config(SM_90, "bf16", 64)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_a_configuration_outside_the_space_is_refused(own: Path) -> None:
    far = Config({"BLOCK_N": 512, "BLOCK_V": 512, "BLOCK_D": 64, "PIECE": 512}, 8, 4)
    tuned.write_table(
        own / "sm_90.json", Table("sm_90", SOURCE, (Row("linear_logsumexp", "bf16", False, None, far),), ())
    )
    with pytest.raises(ValueError, match=r"sm_90.json: 512x512x64x512 w8 s4 is not in the tuning space of linear_lo"):
        linear_logsumexp.config(SM_90, "bf16", 64)


def test_a_table_of_another_target_or_no_folder_is_refused(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.write_table(own / "sm_80.json", TABLE)
    with pytest.raises(ValueError, match=r"sm_80.json: the table is of sm_90: rename it to sm_90.json"):
        tuned.table("sm_80")
    monkeypatch.setenv(tuned.OWN_TABLES, str(own / "gone"))
    with pytest.raises(ValueError, match=r"EXO_FAST_TUNED=.*gone is no folder"):
        tuned.table("sm_120")


def test_a_wrong_table_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "sm_90.json"
    with pytest.raises(ValueError, match="the last row of linear_logsumexp bf16 False must have up_to null"):
        tuned.write_table(path, Table("sm_90", SOURCE, ROWS[:1], ()))
    assert not path.exists()


def shipped() -> list[Path]:
    return sorted(tuned.FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
def test_every_shipped_row_is_in_its_space_and_fits(path: Path) -> None:
    target = TARGETS[path.stem]
    found = tuned.read_table(path)
    assert found.target == target.name
    for row in found.rows:
        kernel = {"linear_logsumexp": linear_logsumexp, "linear_logprobs_backward": linear_logprobs_backward}[
            row.kernel
        ]
        assert row.config in kernel.configs(target, row.dtype)
        if kernel is linear_logsumexp:
            size = 4 if row.dtype == "fp32" else 2
            assert linear_logsumexp.shared_memory(row.config, target, size) <= target.shared_memory


def test_tables_are_shipped_for_the_targets_that_a_model_knows() -> None:
    assert {path.stem for path in shipped()} == {"sm_80", "sm_90", "sm_100", "gfx942"}


def test_choices_on_both_sides_of_a_boundary() -> None:
    """Predicted tables. One that a card measured has other boundaries: give it these of its own."""
    small, large = (128, 128, 64, 32), (128, 256, 64, 64)
    for dtype, store in (("bf16", False), ("bf16", True), ("fp16", False)):
        for width, want in ((1, small), (724, small), (725, large), (4096, large)):
            config = linear_logsumexp.config(SM_90, dtype, width, store)
            assert tuple(config.constants.values()) == want
    for target, last in (("sm_100", 2896), ("gfx942", 5792)):
        found = [tuned.table(target).schedule("bf16", width) for width in (1, last, last + 1, 10**5)]
        assert found == ["kept", "kept", "chunked", "chunked"]
    for target in ("sm_80", "sm_90"):
        assert tuned.table(target).schedule("bf16", 10**5) == "kept"
    assert tuned.table("sm_90").schedule("fp32", 4096) is None
