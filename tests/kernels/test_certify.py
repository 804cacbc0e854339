"""Certification: real compilation of planted kernels, the reading of machine code, and vendors' occupancy figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tree import HELPERS

pytest.importorskip("triton")

from exo_fast.kernels.certification import certify
from exo_fast.kernels.certification.disassembly import (
    Access,
    Instruction,
    amdgcn_access,
    in_loops,
    parse_amdgcn,
    parse_sass,
    products_off_tensor_cores,
    sass_access,
    scalar_accesses,
    wide_share,
)
from exo_fast.kernels.certification.occupancy import occupancy
from exo_fast.kernels.targets import TARGETS

PLANTED = HELPERS / "planted.py"
COMMAND = ("-m", "exo_fast.kernels.certification")
COMPILED = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"]


def run(*arguments: str, cache: Path) -> subprocess.CompletedProcess:
    """Python in a process of its own: here Triton was imported to interpret, and compiles nothing."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    kept |= {"TRITON_CACHE_DIR": str(cache / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cache, env=kept)


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess, dict, str]:
    """All planted kernels, certified once: the finished process, its JSON report, the page it wrote."""
    folder = tmp_path_factory.mktemp("certify")
    page = folder / "page.md"
    page.write_text(f"before\n{certify.MARKERS[0]}\nan old table\n{certify.MARKERS[1]}\nafter\n")
    done = run(
        *COMMAND,
        "--kernel",
        str(PLANTED),
        "--target",
        *reversed(COMPILED),
        "--jobs",
        "1",
        "--output",
        "out/report.json",
        "--markdown",
        "page.md",
        cache=folder,
    )
    return done, json.loads((folder / "out" / "report.json").read_text()), page.read_text()


def failures(report: dict) -> set[tuple[str, str, str, str]]:
    """(variant, target, config, claim) of every failed claim."""
    return {
        (row["variant"], row["target"], row["config"], failed["claim"])
        for row in report["rows"]
        for failed in row["failures"]
    }


def test_planted_faults_are_caught_and_nothing_else(certified):
    good, bad = "64x32 w4 s2", "128x64 w1 s5"
    assert failures(certified[1]) == {
        ("product", "sm_120", bad, "spills"),
        ("product", "sm_120", bad, "fits"),
        ("copy of every second", "sm_80", good, "wide"),
        ("copy of any address", "sm_80", good, "wide"),
        ("copy by many", "sm_80", " w32 s1", "wide"),  # a configuration of its own: two elements a thread
        ("copy of every second", "gfx942", good, "wide"),
        ("product without tensor cores", "sm_80", good, "products"),
        ("product by pointers", "sm_90", good, "descriptors"),
        ("walk in two loops", "sm_90", good, "flattened"),
        ("copy of a length of 64 bits", "sm_80", good, "launch"),
        ("sum by atomics", "sm_80", good, "atomics"),
        ("sum in two layouts", "sm_80", good, "ordered"),
        ("refused", "sm_80", good, "compiles"),
        ("crash", "sm_80", good, "compiles"),
    }


def test_every_failure_is_one_line_and_the_exit_code_says_so(certified):
    done, report, _ = certified
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert len(lines) == report["failures"] == sum(len(row["failures"]) for row in report["rows"])
    (line,) = (line for line in lines if "product without tensor cores" in line)
    assert line == (
        "FAILED products: planted/product without tensor cores sm_80 fp32 64x32 w4 s2 (default): "
        "found no tensor-core instruction; needed mma.sync (HMMA)"
    )
    (line,) = (line for line in lines if "copy of a length of 64 bits" in line)
    assert "n is declared i64, a multiple of 16 and launched as i32, a multiple of 16" in line
    assert "no block is that small" in next(line for line in lines if "planted/refused" in line)


@pytest.mark.parametrize(
    ("target", "instruction"),
    list(zip(COMPILED, ["HMMA", "HGMMA", "UTCHMMA", "HMMA", "v_mfma", "v_wmma"], strict=True)),
)
def test_facts_of_a_clean_product(certified, target, instruction):
    rows = [r for r in certified[1]["rows"] if (r["variant"], r["target"], r["default"]) == ("product", target, True)]
    assert len(rows) == (2 if target.startswith("gfx") else 1)  # any size, and under 2 GiB
    for row in rows:
        code = row["code"]
        assert row["failures"] == []
        assert all(name.startswith(instruction) for name in code["tensor_cores"])
        assert code["tensor_cores"]
        assert bool(code["tma"]) == TARGETS[target].descriptors
        assert 16 < code["registers"] <= TARGETS[target].max_registers
        assert row["tensor_memory"] == (64 if target == "sm_100" else 0)  # one column for each of BLOCK = 64
        assert row["shared_memory"] >= 2 * 64 * 32 * 2  # both operands
        assert 0 < row["occupancy"] <= 1


def test_passing_command_exits_zero_without_failures(tmp_path):
    done = run(*COMMAND, "--kernel", str(PLANTED), "--target", "gfx1100", "--jobs", "1", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "FAILED" not in done.stdout
    assert "2 binaries of 1 kernels for 1 targets" in done.stdout
    assert (tmp_path / "build" / "certification.json").exists()


def test_page_receives_the_table_between_its_markers(certified):
    done, _, page = certified
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "an old table" not in page
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(COMPILED)
    assert all(line in done.stdout for line in table)


def test_interpreter_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as stopped:
        certify.main([])
    assert stopped.value.code == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_unknown_kernel_is_named_with_the_known_ones(tmp_path):
    done = run(*COMMAND, "--kernel", "no_such_kernel", cache=tmp_path)
    assert done.returncode == 2
    assert "no_such_kernel" in done.stderr
    assert "group_loss" in done.stderr


def test_every_kernel_of_the_package_is_discovered():
    exporting = {
        path.stem for path in Path(certify.__file__).parents[1].glob("*.py") if "\ndef variants(" in path.read_text()
    }
    assert exporting
    assert set(certify.discover()) == exporting


def test_what_the_backend_launches_is_what_is_certified(tmp_path):
    done = run(str(PLANTED.with_name("launched.py")), "sm_90", "gfx942", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["sm_90", "gfx942"], done.stdout
    assert all("different launches of 13 kernels" in line for line in lines)


# Resident programs of one multiprocessor, from the vendors' tables. NVIDIA: 65,536 registers; a warp of 32 threads with
# r registers takes 32·r rounded up to 256, from one of four files of 16,384. AMD: the table of vector registers against
# waves in the CDNA3 guides, and 1,536 registers a lane and SIMD on gfx1100.
@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs", "limit"),
    [
        ("sm_80", 32, 0, 32, 2, "warps"),  # 2,048 threads
        ("sm_80", 16, 0, 1, 32, "programs"),
        ("sm_80", 64, 0, 8, 4, "registers"),
        ("sm_80", 65, 0, 8, 3, "registers"),  # 72 × 32: 7 warps of a file, 28 in all
        ("sm_80", 168, 0, 4, 3, "registers"),  # 3 warps of a file
        ("sm_80", 255, 0, 8, 1, "registers"),
        ("sm_80", 255, 0, 16, 0, "registers"),  # 512 × 255 registers do not fit at all
        ("sm_80", 32, 166912 // 2, 4, 1, "shared memory"),  # 83,456 + 1,024 of 167,936 bytes
        ("sm_80", 32, 82 * 1024 - 1024, 4, 2, "shared memory"),
        ("sm_80", 32, 166912, 4, 1, "shared memory"),  # 163 KiB, the most a program may have
        ("sm_90", 32, 227 * 1024, 4, 1, "shared memory"),
        ("sm_90", 32, 113 * 1024, 4, 2, "shared memory"),  # 2 × (113 + 1) = 228 KiB
        ("sm_120", 32, 0, 1, 24, "programs"),
        ("sm_120", 40, 0, 16, 3, "warps"),  # 1,536 threads
        ("gfx942", 64, 0, 4, 8, "warps"),
        ("gfx942", 65, 0, 4, 7, "registers"),
        ("gfx942", 96, 0, 4, 5, "registers"),
        ("gfx942", 128, 0, 4, 4, "registers"),
        ("gfx942", 168, 0, 4, 3, "registers"),
        ("gfx942", 256, 0, 4, 2, "registers"),
        ("gfx942", 257, 0, 4, 1, "registers"),
        ("gfx942", 32, 32768, 4, 2, "shared memory"),
        ("gfx1100", 96, 0, 4, 16, "warps"),  # 64 waves of a pair of compute units
        ("gfx1100", 97, 0, 4, 12, "registers"),  # 120 of 1,536: 12 waves on each of four SIMDs
        ("gfx1100", 256, 0, 4, 5, "registers"),
        ("gfx1100", 32, 65536, 4, 2, "shared memory"),  # 128 KiB of the pair
    ],
)
def test_occupancy_is_that_of_the_guides(target, registers, shared, warps, programs, limit):
    found = occupancy(TARGETS[target], registers, shared, warps)
    assert (found.programs, found.limit) == (programs, limit)
    units = 2 if target == "gfx1100" else 1
    assert found.fraction == programs * warps / (TARGETS[target].max_warps * units)


def test_occupancy_counts_tensor_memory():
    assert occupancy(TARGETS["sm_100"], 32, 0, 4, tensor_memory=256).limit == "tensor memory"
    assert occupancy(TARGETS["sm_100"], 32, 0, 4, tensor_memory=256).programs == 2


@pytest.mark.parametrize(
    ("access_of", "name", "expected"),
    [
        (sass_access, "LDG.E.128.CONSTANT", Access("load", 128)),
        (sass_access, "LDG.E.LTC128B", Access("load", 32)),  # a hint to the cache, not a width
        (sass_access, "LDG.E.ENL2.256", Access("load", 256)),
        (sass_access, "LDGSTS.E.BYPASS.LTC128B.64", Access("load", 64)),
        (sass_access, "STG.E.U16", Access("store", 16)),
        (sass_access, "STL.64", Access("local", 64)),
        (sass_access, "REDG.E.ADD.F32.FTZ.RN", Access("atomic", 32)),
        (sass_access, "LDS.128", None),  # shared memory
        (sass_access, "LDC.64", None),
        (amdgcn_access, "global_load_dwordx4", Access("load", 128)),
        (amdgcn_access, "buffer_load_b128", Access("load", 128)),
        (amdgcn_access, "global_load_d16_hi_b16", Access("load", 16)),
        (amdgcn_access, "global_load_ushort", Access("load", 16)),
        (amdgcn_access, "global_load_short_d16_hi", Access("load", 16)),
        (amdgcn_access, "buffer_store_byte", Access("store", 8)),
        (amdgcn_access, "global_load_u8", Access("load", 8)),
        (amdgcn_access, "flat_store_dword", Access("store", 32)),
        (amdgcn_access, "scratch_load_b64", Access("local", 64)),
        (amdgcn_access, "global_atomic_add_f32", Access("atomic", 32)),
        (amdgcn_access, "ds_read_b128", None),
        (amdgcn_access, "buffer_gl0_inv", None),
    ],
)
def test_access_of_an_instruction(access_of, name, expected):
    assert access_of(name) == expected


SASS = """
.text.kernel:
        /*0000*/                   LDG.E R1, [R2.64] ;
.L_x_1:
        /*0010*/              @!P0 BRA `(.L_x_2) ;
        /*0020*/                   LDG.E.128 R4, [R2.64] ;
        /*0030*/                   BRA.U UP0, `(.L_x_1) ;
        /*0040*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/                   STG.E [R2.64], R5 ;
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   CALL.REL.NOINC `($helper) ;
        /*0080*/                   BRA `(.L_x_3);
"""
AMDGCN = """
kernel:
\tglobal_load_dword v1, v[2:3], off
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\ts_cbranch_vccnz .LBB0_3
\tglobal_load_dwordx4 v[4:7], v[2:3], off
\ts_branch .LBB0_1
.LBB0_3:
\tglobal_store_dword v[2:3], v5, off
\ts_endpgm
\t.section .rodata
"""


@pytest.mark.parametrize(
    ("parse", "text", "looping"),
    [
        (parse_sass, SASS, ["BRA", "LDG.E.128", "BRA.U", "CALL.REL.NOINC", "BRA"]),
        (parse_amdgcn, AMDGCN, ["s_cbranch_vccnz", "global_load_dwordx4", "s_branch"]),
    ],
)
def test_loops_are_the_cycles_of_the_control_flow(parse, text, looping):
    instructions, labels = parse(text)
    assert [instructions[place].name for place in sorted(in_loops(instructions, labels))] == looping


def test_a_jump_back_alone_is_not_a_loop():
    # Compilers move seldom used code behind the end of the kernel, from where it jumps back.
    code = [
        Instruction("LDG"),
        Instruction("BRA", "cold"),
        Instruction("EXIT", falls=False),
        Instruction("BRA", "main", False),
    ]
    assert in_loops(code, {"main": 2, "cold": 3}) == set()


def test_wide_share_weighs_by_bytes():
    accesses = [Access("load", 128), Access("load", 128), Access("store", 64), Access("store", 32), Access("load", 32)]
    assert wide_share(accesses) == 256 / 384
    assert wide_share([]) == 1.0


def test_scalar_accesses_are_found_inside_and_outside_of_loops():
    ttgir = """
  tt.func public @k(%a: !tt.ptr<f32> {tt.divisibility = 16 : i32} loc("a"(#loc))) attributes {noinline = false} {
    %1 = tt.load %a : !tt.ptr<f32> loc(#loc)
    scf.for %i = %0 to %n step %c  : i32 {
      %2 = tt.load %b : !tt.ptr<i64> loc(#loc)
      scf.if %p {
        tt.store %c, %v {cache = 1 : i32} : !tt.ptr<bf16> loc(#loc)
      } else {
        %3 = tt.load %d, %m, %z : tensor<64x!tt.ptr<f32>, #blocked> loc(#loc)
      } loc(#loc)
    } loc(#loc)
    tt.store %e, %flag : !tt.ptr<i1>
  }
"""
    looping = {Access("load", 64): 1, Access("store", 16): 1}
    everywhere, inside = scalar_accesses(ttgir)
    assert +inside == looping
    assert everywhere == looping | {Access("load", 32): 1, Access("store", 8): 1}


def test_products_left_to_multiply_adds_are_counted():
    ttgir = """
#blocked = #ttg.blocked<{sizePerThread = [4, 4]}>
#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0}>
  %1 = tt.dot %a, %b, %c : tensor<64x32xf32, #ttg.dot_op<{opIdx = 0, parent = #mma}>> -> tensor<64x64xf32, #mma> loc(#l)
  %2 = tt.dot %a, %b, %c : tensor<64x32xf32, #ttg.dot_op<{opIdx = 0, parent = #blocked}>> -> tensor<64x64xf32, #blocked>
"""
    assert products_off_tensor_cores(ttgir, None) == 1
    assert products_off_tensor_cores(ttgir, "warp_group_dot") == 2
