"""benchmarks/roofline/tables.py: flops and bytes counted by hand, the claims of the docs, and their tables."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from tree import ROOT

from exo_fast.benchmarks.harness.tables import block
from exo_fast.benchmarks.roofline import model, nvidia, predict, tables
from exo_fast.kernels import linear_logsumexp, tuned

pytest.importorskip("nvMatmulHeuristics", reason="predictions need NVIDIA's model of products")
PAGES = [ROOT / "docs" / "gpu-analysis.md", ROOT / "docs" / "performance.md"]
N, D, V = 300, 512, 1000
BUDGET = tables.DEFAULT_BUDGET * model.MIB


@pytest.fixture
def small() -> model.Head:
    return model.Head("small", D, V)


def test_products_by_hand(small) -> None:
    flops = 307_200_000  # 2 · 300 · 512 · 1000
    logits = model.logits_product(small, N)
    assert logits.flops == flops
    assert logits.read == 2 * (300 * 512 + 1000 * 512)
    assert logits.written == logits.logits == 1_200_000
    hidden = model.hidden_product(small, N)
    assert (hidden.flops, hidden.read, hidden.written) == (flops, 600_000 + 1_024_000, 614_400)
    first, later = (model.weight_product(small, N, first=first) for first in (True, False))
    assert (first.flops, first.read, first.written) == (flops, 600_000 + 307_200, 2_048_000)
    assert later.read - first.read == 2_048_000  # the float32 sums come back


def test_linear_logsumexp_by_hand(small) -> None:
    board = model.BOARDS[1]
    plain, stored = (model.linear_logsumexp_launch(board, small, N, store=store) for store in (False, True))
    rows, columns = (model.default_config(board, D).constants[name] for name in ("BLOCK_N", "BLOCK_V"))
    assert plain.flops == 307_200_000
    assert plain.exponentials == 300_000
    assert plain.logits == 0  # no byte of logits
    assert plain.written == (12 * math.ceil(V / columns) + 16) * N  # a range for every block, then the statistics
    assert stored.logits == stored.written - plain.written == 600_000
    assert plain.cached == 1024 * math.ceil(N / rows) * math.ceil(V / columns) * (rows + columns)
    assert plain.read == 2 * (N + V) * D + 8 * N + 12 * math.ceil(V / columns) * N
    many = model.linear_logsumexp_launch(board, model.HEADS[0], 8192, store=False)
    walks = 8192 / (model.linear_logsumexp.GROUP * rows)
    assert walks > 1
    assert many.read == pytest.approx(8192 * (8192 + walks * 128256), rel=0.01)


def test_floor_is_the_slowest_resource() -> None:
    board = model.BOARDS[1]
    launch = model.Launch("x", "library", flops=989e12, read=3.35e12, written=3.35e12)
    assert model.floor(launch, board) == (2.0, "memory")
    assert model.predict(launch, board) == pytest.approx(2 / board.stream)
    cached = model.Launch("x", "stream", cached=board.l2)
    assert (model.floor(cached, board)[0], model.predict(cached, board)) == (1.0, 1 / model.L2)
    assert model.floor(replace(launch, exponentials=3 * board.exponentials), board) == (3.0, "exponentials")
    assert board.exponentials == pytest.approx(3.86e12, rel=0.01)  # FlashAttention-3 counts 3.9e12


@pytest.mark.parametrize(("schedule", "flops"), [("chunked", 6), ("kept", 6), ("recomputed", 8), ("fused", 10)])
def test_flops_of_schedules(schedule: str, flops: int) -> None:
    for head in model.HEADS:
        made = getattr(model, schedule)(model.BOARDS[1], head, 2048, 2**30)
        assert made.flops == pytest.approx(flops * 2048 * head.width * head.vocab, rel=1e-3)
        assert made.scratch < (2**30 if schedule != "fused" else 2**27)
        assert (made.logits == 0) == (schedule == "fused")


def test_bytes_of_schedules() -> None:
    """kept: U written once, read by two products; chunked: logits written, read twice, the gradient like U."""
    for head in model.HEADS:
        logits = 2048 * head.vocab
        of = {make: make(model.BOARDS[1], head, 2048, 2**34).logits / logits for make in model.SCHEDULES}
        assert of[model.kept] == pytest.approx(2 + 2 + 2)
        assert of[model.chunked] == pytest.approx(4 + 4 + 4 + 2 + 2 + 2)
        assert of[model.full_logits] == pytest.approx(42)


def test_more_work_and_lower_peaks_never_take_less() -> None:
    for board in model.BOARDS:
        slower = replace(board, library=board.library / 2, triton=board.triton / 2, stream=board.stream / 2)
        for make in model.SCHEDULES:
            for head in model.HEADS:
                times = [make(board, head, tokens, 2**30).seconds(board) for tokens in model.TOKENS]
                assert times == sorted(times)
                assert make(board, head, 2048, 2**30).seconds(slower) > times[0]
                work = 6 * 2048 * head.width * head.vocab
                assert times[0] > work / board.target.flops
            for launch in model.launches(board, model.HEADS[0], 2048):
                assert model.predict(launch, board) >= model.floor(launch, board)[0]


def test_budget_cuts_chunks_and_refuses_less_than_a_row(small) -> None:
    assert model.kept_row(small) == 2 * V + 6 * D
    assert model.chunked_row(small) == 6 * V + 6 * D
    assert model.rows_of_budget(100 * 5072, 5072, 250) == (3, 84)
    assert model.rows_of_budget(2**40, 5072, 250) == (1, 250)
    with pytest.raises(ValueError, match="--budget"):
        model.rows_of_budget(5071, 5072, 250)
    board = model.BOARDS[1]
    tight, ample = (model.kept(board, model.HEADS[2], 8192, mib * model.MIB) for mib in (256, 4096))
    assert tight.chunks > ample.chunks
    assert tight.bytes > ample.bytes  # dW's sums are read and written for every chunk
    sums = [model.weight_product(model.HEADS[0], rows, first=False) for rows in (900, 8192)]
    few, many = (model.predict(launch, board) / model.ceilings(launch, board)["products"] for launch in sums)
    assert few > 2.2  # of its flops at peak on H100
    assert many < 1.2
    assert model.rows_of_budget(300 * 5072, 5072, 700) == (3, 234)  # 300 rows fit, of which 256 are whole tiles


def test_even_share_is_where_both_take_as_long() -> None:
    board, head = model.BOARDS[1], model.HEADS[0]
    share = tables.even_share(board, head, 8192, BUDGET)
    assert 0 < share < 1
    assert tables.advantage(replace(board, triton=share), head, 8192, BUDGET) == pytest.approx(1, abs=1e-3)


def test_claims_of_the_docs() -> None:
    boards = tables.boards_of(json.loads(tables.OUTPUT.read_text())["resources"])
    for board in boards:
        for head in model.HEADS[1:]:  # D = 1024 and 640: kept, whatever the board
            assert 1.1 < tables.advantage(board, head, 8192, BUDGET) < 1.9
            assert tables.even_share(board, head, 8192, BUDGET) < 0.75 * board.library
        assert 0.9 < tables.advantage(board, model.HEADS[0], 8192, BUDGET) < 1.03  # D = 4096: about even
        for head in model.HEADS:
            fused, kept = (make(board, head, 8192, BUDGET).seconds(board) for make in (model.fused, model.kept))
            assert fused > 6 * kept
    for row in model.stream_traffic(boards[1], BUDGET):
        assert row["least"] / row["moved"] >= 0.9
    for row in tables.published_rows(boards):
        assert 0.7 < row["predicted_ms"] / row["published_ms"] < 1.1
    h100, b200 = boards[1:3]
    exponents = model.ceilings(model.linear_logsumexp_launch(b200, model.HEADS[2], 8192, store=False), b200)
    assert exponents["exponentials"] / exponents["products"] == pytest.approx(0.4, abs=0.01)
    for board, share in ((h100, 0.81), (b200, 0.54)):  # what L2 at its peak lets 128 × 256 and 128 × 128 tiles reach
        narrow = model.ceilings(model.linear_logsumexp_launch(board, model.HEADS[1], 8192, store=False), board)
        assert narrow["products"] / narrow["L2"] == pytest.approx(share, abs=0.01)
    with_loops = {(row["board"], *row["shape"][:2]): row["loops"] for row in tables.loop_rows(boards[1:2])}
    for shape, least, most in ((("H100", 8192, 4096), 0.04, 0.08), (("H100", 16384, 1024), 0.13, 0.24)):
        drained, flattened, hidden = (loop["kernel_ms"] for loop in with_loops[shape].values())
        assert 1 - flattened / drained == pytest.approx(least, abs=0.005)
        assert 1 - hidden / drained == pytest.approx(most, abs=0.005)
    block = model.linear_logprobs_backward.config(h100.target, "bf16", 4096).constants["BLOCK_OWN"]
    assert 8192 / block == 64
    for head in model.HEADS:
        assert all(
            model.floor(launch, board)[1] != "exponentials"
            for board in boards
            for launch in model.launches(board, head, 8192)
        )


def test_products_are_nvidias_on_nvidias_boards() -> None:
    """Figures that the package gives for an H200: 803 Tflop/s for logits at D = 4,096, 978 for dH in three splits."""
    logits, dh = (nvidia.product("H200_SXM", *tables.PRODUCTS[i]) for i in (0, 3))
    assert 2 * 8192 * 128256 * 4096 / logits.seconds == pytest.approx(803e12, rel=1e-3)
    assert (logits.tile, logits.stages, logits.splits) == ((256, 128, 64), 4, 1)
    assert 2 * 2731 * 1024 * 151936 / dh.seconds == pytest.approx(978e12, rel=1e-3)
    assert dh.splits == 3
    head = model.HEADS[0]
    launch = model.logits_product(head, 8192)
    for board in model.BOARDS[:3]:
        want = nvidia.product(board.heuristics, "logits", 8192, head.vocab, head.width).seconds
        assert model.predict(launch, board) == want
        shared = replace(board, heuristics=None)  # as for a board that the package does not know
        assert model.predict(launch, shared) == pytest.approx(
            launch.flops / board.target.flops / board.library / launch.fill
        )
    assert model.BOARDS[3].heuristics is None


def test_a_product_is_never_predicted_above_the_peak() -> None:
    """The package counts at the boost clock: 1,025 Tflop/s for this dH on an H100 with a peak of 989."""
    launch, h100 = model.hidden_product(model.HEADS[1], 8192), model.BOARDS[1]
    assert launch.flops / nvidia.product("H100_SXM", *launch.shape).seconds > h100.target.flops
    assert model.predict(launch, h100) == launch.flops / h100.target.flops


def test_a_flattened_loop_fills_its_pipeline_once() -> None:
    board, head = model.BOARDS[1], model.HEADS[1]
    for config in linear_logsumexp.configs(board.target, "bf16"):
        drained, flattened = (
            model.linear_logsumexp_launch(board, head, 8192, True, config, flattened) for flattened in (False, True)
        )
        assert drained.alone == flattened.alone == (model.programs_at_once(board, config) == 1)
        share = head.width / (head.width + (config.num_stages - 1) * config.constants["BLOCK_D"])
        assert flattened.fill == 1
        assert drained.fill == pytest.approx(share if drained.alone else 1)


def test_shipped_tables_are_what_the_command_predicts(tmp_path: Path) -> None:
    """A table of a card's own run would be left as it is."""
    boards = tables.boards_of(json.loads(tables.OUTPUT.read_text())["resources"])
    predict.write(tmp_path, "2026-12-01", boards)
    for path in sorted(tmp_path.glob("*.json")):
        found, made = tuned.read_table(tuned.FOLDER / path.name), tuned.read_table(path)
        if found.source["kind"] == "prediction":
            source = {**made.source, "date": found.source["date"]}
            assert replace(made, source=source, path=found.path) == found, f"run make roofline: {path.name}"
    source = {"kind": "measurement", "card": "a card", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-12-02",
              "command": "make gpu-first"}  # fmt: skip
    path = tmp_path / "sm_90.json"
    tuned.write_table(path, tuned.Table("sm_90", source, (), ()))
    before = path.read_bytes(), (tmp_path / "sm_80.json").read_bytes()
    lines = predict.write(tmp_path, "2026-12-03", boards)
    assert f"{path}: measured on a card, 2026-12-02: left as it is" in lines
    assert (path.read_bytes(), (tmp_path / "sm_80.json").read_bytes()) == before  # nor does a date change alone


def test_predictions_leave_the_rule_for_a_clear_gain_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    board = model.BOARDS[1]
    first, _, third, *_ = linear_logsumexp.configs(board.target, "bf16")
    for gain, want in ((0.99, first), (0.97, third)):
        times = {str(first): 1.0, str(third): gain}
        monkeypatch.setattr(model, "predict", lambda launch, board, times=times: times.get(str(launch), 2.0))
        monkeypatch.setattr(model, "linear_logsumexp_launch", lambda board, head, n, store, config: config)
        assert predict.fastest(board, 4096, store=True) == want


def test_command_writes_tables_plot_and_pages(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page = tmp_path / "page.md"
    empty = "<!-- roofline: tokens -->\n<!-- end -->\nbetween\n"
    page.write_text(f"before\n{empty}<!-- roofline: choice -->\nold\n<!-- end -->\nafter\n")
    certification = tmp_path / "certification.json"
    row = {"kernel": "k", "variant": "v", "target": "sm_90", "dtype": "bf16", "config": "c", "default": True}
    row["claims"] = ["wide"]
    row |= {"shared_memory": 2048, "programs": 2, "occupancy": 0.25, "code": {"registers": 168}}
    certification.write_text(json.dumps({"rows": [row, {**row, "default": False}, {**row, "target": "sm_120"}]}))
    arguments = ["--output", tmp_path / "out.json", "--plot", tmp_path / "plot.png", "--markdown", page]
    arguments += ["--certification", certification, "--tokens", "2048", "--triton", "0.5"]
    assert tables.main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out.json").read_text())
    made = tables.tables(results, 2048)
    assert all(table in printed for table in made.values())
    assert "| `k` | H100 | c | 168 | 2 | 2 | 25% |" in made["resources"]
    assert {board["triton"] for board in results["boards"]} == {0.5}
    filled = f"<!-- roofline: tokens -->\n{made['tokens']}\n<!-- end -->\nbetween\n"
    assert page.read_text() == f"before\n{filled}<!-- roofline: choice -->\n{made['choice']}\n<!-- end -->\nafter\n"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_certified_programs_decide_whether_an_epilogue_is_hidden() -> None:
    head = model.HEADS[2]
    config = str(model.default_config(model.BOARDS[1], head.width))
    row = {"kernel": "linear_logsumexp", "board": "H100", "config": config}
    times = []
    for programs in (1, 2):
        board = tables.boards_of([{**row, "programs": programs}, {**row, "programs": 2}])[1]
        launch = model.linear_logsumexp_launch(board, head, 8192, store=True)
        assert launch.alone == (programs == 1)
        times.append(model.predict(launch, board))
    assert times[0] > times[1]


def test_resources_are_kept_when_certification_is_missing(tmp_path: Path) -> None:
    missing, earlier = tmp_path / "certification.json", tmp_path / "roofline.json"
    assert tables.resources(missing, earlier) == ([], "missing: run make certify first")
    earlier.write_text(json.dumps({"resources": [{"kernel": "k"}]}))
    assert tables.resources(missing, earlier) == ([{"kernel": "k"}], "the last roofline.json")


@pytest.mark.parametrize("arguments", [["--triton", "1.5"], ["--budget", "0"]], ids=["share", "budget"])
def test_bad_arguments_name_the_fix(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        tables.main(arguments)
    assert "give a" in capsys.readouterr().err


def test_docs_show_what_the_command_prints() -> None:
    recorded = json.loads(tables.OUTPUT.read_text())
    found = recorded["resources"]
    made = tables.tables(tables.collect(tables.boards_of(found), tables.DEFAULT_BUDGET, found))
    assert tables.tables(recorded) == made, "run make roofline"
    shown = set()
    for page in PAGES:
        for name, table in made.items():
            match = block("roofline", name).search(page.read_text())
            if match:
                shown.add(name)
                assert match[2] == f"{table}\n", f"run make roofline: {page.name}, {name}"
    assert shown == set(made)
