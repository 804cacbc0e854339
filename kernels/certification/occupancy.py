"""The number of programs of a kernel that one multiprocessor holds at once: from registers, shared memory, threads and,
on sm_100, tensor memory, by the allocation rules of the vendors' guides.

NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and `cuda_occupancy.h` of the
toolkit (a warp takes its registers from one of four files, in steps of 8 a thread; each program costs 1 KiB of shared
memory beside its own). AMD: CDNA3 and RDNA3 instruction set guides and LLVM's AMDGPU usage guide (512 and 1536 vector
registers a lane and SIMD, in steps of 8 and 24; a gfx1100 program runs on a pair of compute units).
"""

from dataclasses import dataclass

from exo_fast.kernels.targets import Target

TENSOR_MEMORY = 512  # columns of a multiprocessor of sm_100; handed out in powers of two from 32


@dataclass(frozen=True)
class Multiprocessor:
    """The units of allocation. One program runs on `units` multiprocessors of `targets.py`, which share all units."""

    files: int  # register files of `units` multiprocessors
    granule: int  # a thread's registers are allocated in multiples of this
    programs: int  # resident at most
    shared_granule: int  # bytes
    shared_reserved: int = 0  # bytes the system takes for each program
    units: int = 1


_NVIDIA = Multiprocessor(files=4, granule=8, programs=32, shared_granule=128, shared_reserved=1024)
MULTIPROCESSORS = {
    "sm_80": _NVIDIA,
    "sm_90": _NVIDIA,
    "sm_100": _NVIDIA,
    "sm_120": Multiprocessor(files=4, granule=8, programs=24, shared_granule=128, shared_reserved=1024),
    "gfx942": Multiprocessor(files=4, granule=8, programs=16, shared_granule=512),
    "gfx1100": Multiprocessor(files=4, granule=24, programs=32, shared_granule=512, units=2),
}


@dataclass(frozen=True)
class Occupancy:
    programs: int  # resident together; 0 when one program alone does not fit
    fraction: float  # of the warps that could be resident
    limit: str  # the first limit reached: registers, shared memory, tensor memory, warps or programs


def occupancy(target: Target, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> Occupancy:
    """Return the resident programs of `warps` warps, each thread with `registers`, each program with `shared` bytes and
    `tensor_memory` columns."""
    rules = MULTIPROCESSORS[target.name]
    max_warps = target.max_warps * rules.units
    file = target.registers * rules.units // rules.files
    warps_of_file = file // (_up(max(registers, 1), rules.granule) * target.warp_size)
    limits = {
        "warps": max_warps // warps,
        "programs": rules.programs,
        "registers": min(warps_of_file * rules.files, max_warps) // warps,
        "shared memory": target.shared_memory_sm
        * rules.units
        // max(_up(shared, rules.shared_granule) + rules.shared_reserved, 1),
    }
    if tensor_memory:
        limits["tensor memory"] = TENSOR_MEMORY // tensor_memory
    limit = min(limits, key=limits.__getitem__)
    programs = limits[limit]
    return Occupancy(programs, programs * warps / max_warps, limit)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
