"""Instructions of a compiled kernel, read from the machine code itself: SASS for NVIDIA, amdgcn assembly for AMD.

Nothing here compiles or judges: `certify.py` does. `cuobjdump` and `nvdisasm` come with Triton.
"""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import networkx
from triton import knobs

WIDE = 128  # bits of the widest access that every target has


class Instruction(NamedTuple):
    name: str  # mnemonic with its modifiers
    jump: str | None = None  # label it may jump to
    falls: bool = True  # the next instruction may follow it


class Access(NamedTuple):
    kind: str  # load and store (device memory), local (a thread's own memory: spills, stack), atomic
    bits: int  # moved for each thread


@dataclass
class Code:
    """Facts of one kernel's machine code. Access tables map bits per thread to a number of instructions."""

    registers: int  # of a thread; architectural and accumulation registers together
    local_memory: int  # bytes of a thread: spills and stack
    spilled: int  # NVIDIA: bytes moved to and from local memory; AMD: vector registers spilled
    spilled_scalars: int = 0  # AMD: scalar registers kept in lanes of vector registers
    local_accesses: int = 0
    atomics: int = 0
    tma: int = 0  # bulk copies issued by the copy engine
    tma_ahead: int = 0  # those outside loops: they fill a pipeline before its loop begins
    barriers_in_loops: int = 0  # NVIDIA: barriers initialised in a loop, of a pipeline that starts again in each turn
    tensor_cores: dict[str, int] = field(default_factory=dict)  # instruction -> count
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    loops: bool = False  # some device-memory access lies in a loop
    wide_share: float = 1.0  # share of the bytes moved in accesses of at least WIDE bits; see `wide_share`


def nvidia(cubin: bytes, ttgir: str) -> Code:
    """Read the facts of a cubin with one kernel, made from `ttgir`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path)
        # Dataflow analysis is off: it only annotates jumps and takes half the time.
        text = _tool(knobs.nvidia.nvdisasm.path, "-c", "-ndf", path)
    registers, stack, local = (max(map(int, re.findall(rf"\b{key}:(\d+)", usage))) for key in ("REG", "STACK", "LOCAL"))
    code = _inspect(
        ttgir, *parse_sass(text), sass_access, re.compile(r"UTC\w*MMA|HGMMA|[HIQO]MMA"), re.compile("UTMALDG|UBLKCP")
    )
    code.registers, code.local_memory = registers, stack + local
    return code


def amd(assembly: str, ttgir: str) -> Code:
    """Read the facts of amdgcn assembly with one kernel, made from `ttgir`."""

    def fact(key: str) -> int:
        found = re.search(rf"^\s*(?:- )?\.{key}:\s+(\d+)", assembly, re.MULTILINE)
        return int(found[1]) if found else 0

    instruction = re.compile("v_s?(mfma|wmma)")
    code = _inspect(ttgir, *parse_amdgcn(assembly), amdgcn_access, instruction, re.compile("tensor_load"))
    code.registers, code.local_memory = fact("vgpr_count"), fact("private_segment_fixed_size")
    code.spilled, code.spilled_scalars = fact("vgpr_spill_count"), fact("sgpr_spill_count")
    return code


def products_off_tensor_cores(ttgir: str, own_operation: str | None) -> int:
    """Count the products in Triton's last GPU dialect that are not on the target's tensor cores.

    A product the compiler could not place keeps its `tt.dot` and a blocked layout: loops of fused multiply-adds. If
    the target has an operation of its own (sm_90, sm_100), a `tt.dot` of any layout is a product that missed it.
    """
    placed = set(re.findall(r"^(#\w+) = #ttg\.(?:nvidia_mma|amd_mfma|amd_wmma)", ttgir, re.MULTILINE))
    results = re.findall(r"= tt\.dot .*-> tensor<[^#>]*(#\w+)", ttgir)
    return len(results) if own_operation else sum(result not in placed for result in results)


def parse_sass(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Parse instructions, and the place of each label among them, from `nvdisasm -c`."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(@\S+\s+)?([A-Z][\w.]*)(.*)", line):
            predicate, name, operands = found.groups()
            target = re.search(r"`\((\.L_\w+)\)", operands) if name.startswith("BRA") else None
            # `BRA.U UP0, label` has its predicate among the operands.
            always = predicate is None and (not target or operands.strip().startswith("`"))
            ends = name.startswith(("EXIT", "RET", "BRA"))
            instructions.append(Instruction(name, target and target[1], not (ends and always)))
    return instructions, labels


def parse_amdgcn(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Parse instructions, and the place of each label among them, from LLVM's assembly."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\t([a-z]\w+)\s*(\.LBB\w+)?", line):
            name, target = found.groups()
            instructions.append(Instruction(name, target, name not in ("s_branch", "s_endpgm", "s_setpc_b64")))
    return instructions, labels


@functools.cache
def sass_access(name: str) -> Access | None:
    base, *modifiers = name.split(".")
    kind = {
        "LDG": "load", "LD": "load", "LDGSTS": "load", "STG": "store", "ST": "store", "LDL": "local", "STL": "local",
        "ATOMG": "atomic", "ATOM": "atomic", "RED": "atomic", "REDG": "atomic",
    }.get(base)  # fmt: skip
    if kind is None:
        return None
    widths = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    return Access(kind, next((widths[m] for m in modifiers if m in widths), 32))


@functools.cache
def amdgcn_access(name: str) -> Access | None:
    found = re.match(r"(global|buffer|flat|scratch)_(load|store|atomic)_(\w+)", name)
    if not found:
        return None
    space, operation, form = found.groups()
    bits = 32
    if words := re.search(r"dwordx(\d)|b(\d+)$", form):
        bits = 32 * int(words[1]) if words[1] else int(words[2])
    elif narrow := re.search(r"[iu](8|16)$|(short)|(byte)", form):
        bits = int(narrow[1]) if narrow[1] else 16 if narrow[2] else 8
    return Access("local" if space == "scratch" else operation, bits)


def in_loops(instructions: list[Instruction], labels: dict[str, int]) -> set[int]:
    """Return the places of instructions that can run again without a new launch: cycles of the control flow."""
    starts = sorted({0, *labels.values(), *(i + 1 for i, x in enumerate(instructions) if x.jump or not x.falls)})
    block = {start: number for number, start in enumerate(starts)}
    graph = networkx.DiGraph()
    spans = [range(a, b) for a, b in zip(starts, [*starts[1:], len(instructions)], strict=True)]
    for number, span in enumerate(spans):
        last = instructions[span[-1]] if span else Instruction("")
        if last.falls and number + 1 < len(spans):
            graph.add_edge(number, number + 1)
        if last.jump in labels:
            graph.add_edge(number, block[labels[last.jump]])
    cycles = (c for c in networkx.strongly_connected_components(graph) if len(c) > 1)
    looping = set().union(*cycles, networkx.nodes_with_selfloops(graph))
    return {place for number in looping for place in spans[number]}


def scalar_accesses(ttgir: str) -> tuple[Counter[Access], Counter[Access]]:
    """Count accesses of a single address in Triton's last GPU dialect: in all, and in loops."""
    everywhere, looping = Counter(), Counter()
    depth, loops = 0, []  # depth of braces, and the depths at which open loops began
    for line in ttgir.splitlines():
        if re.search(r"\bscf\.(for|while)\b", line):
            loops.append(depth)
        depth += line.count("{") - line.count("}")
        while loops and depth <= loops[-1]:
            loops.pop()
        if found := re.search(r"\btt\.(load|store) .*: !tt\.ptr<[a-z]+(\d+)", line):
            access = Access(found[1], max(8, int(found[2])))
            everywhere[access] += 1
            looping[access] += bool(loops)
    return everywhere, looping


def unordered(ttgir: str) -> list[str]:
    """Return the arguments of a kernel that its loops store to and load from in different layouts.

    A thread sees its own stores. No barrier orders another thread's stores to device memory on every GPU (AMD's waits
    for shared memory alone), so a value must be loaded by the thread that stored it: in the same layout.
    """
    before: dict[str, str] = {}  # a value -> the first operand it is made from, back to an argument
    layouts: dict[str, dict[str, set[str]]] = {}
    depth, loops = 0, []
    for line in ttgir.splitlines():
        if re.search(r"\bscf\.(for|while)\b", line):
            loops.append(depth)
            before |= dict(re.findall(r"(%[\w-]+) = (%[\w-]+)", line))
        depth += line.count("{") - line.count("}")
        while loops and depth <= loops[-1]:
            loops.pop()
        access = re.search(r"\b(?:tt\.|amdg\.buffer_)(load|store) (.*?) : (.*)", line)
        if access and loops:
            kind, operands, types = access.groups()
            names = re.findall(r"%[\w-]+", operands)
            base = names[1] if kind == "store" and "buffer_store" in line else names[0]
            seen = set()
            while base in before and base not in seen:
                seen.add(base)
                base = before[base]
            found = re.findall(r"tensor<(\d+(?:x\d+)*)x[^,]*, (#\w+)>", types)
            if found:
                layouts.setdefault(base, {"load": set(), "store": set()})[kind].add(found[-1])
        elif made := re.match(r"\s*(%[\w-]+)(?::\d+)? = [\w.]+ (%[\w-]+)", line):
            before[made[1]] = made[2]
    both = {base: kinds for base, kinds in layouts.items() if kinds["load"] and kinds["store"]}
    return sorted(base for base, kinds in both.items() if len(kinds["load"] | kinds["store"]) > 1)


def wide_share(accesses: list[Access]) -> float:
    """Return the share of bytes (width × instructions) in accesses of at least WIDE bits; 1 if nothing is moved."""
    moved = sum(access.bits for access in accesses)
    return sum(access.bits for access in accesses if access.bits >= WIDE) / moved if moved else 1.0


def _inspect(
    ttgir: str,
    instructions: list[Instruction],
    labels: dict[str, int],
    access_of: Callable[[str], Access | None],
    tensor_core: re.Pattern,
    tma: re.Pattern,
) -> Code:
    names = [instruction.name for instruction in instructions]
    accesses = {place: access for place, name in enumerate(names) if (access := access_of(name))}
    device = {place: access for place, access in accesses.items() if access.kind in ("load", "store")}
    loops = in_loops(instructions, labels)
    looping = loops & device.keys()
    copies = [place for place, name in enumerate(names) if tma.match(name)]
    # A scalar is one address for all threads: it is subtracted by number and width before shares are formed.
    scalars = scalar_accesses(ttgir)[bool(looping)]
    tensors = Counter(device[place] for place in looping or device) - scalars
    local = [access for access in accesses.values() if access.kind == "local"]
    return Code(
        registers=0,
        local_memory=0,
        spilled=sum(access.bits // 8 for access in local),
        local_accesses=len(local),
        atomics=sum(access.kind == "atomic" for access in accesses.values()),
        tma=len(copies),
        tma_ahead=sum(place not in loops for place in copies),
        barriers_in_loops=sum(names[place].startswith("SYNCS.EXCH") for place in loops),
        tensor_cores=dict(Counter(name for name in names if tensor_core.match(name))),
        loads=dict(Counter(access.bits for access in device.values() if access.kind == "load")),
        stores=dict(Counter(access.bits for access in device.values() if access.kind == "store")),
        loops=bool(looping),
        wide_share=wide_share(list(tensors.elements())),
    )


def _tool(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
