"""The GPUs the kernels are compiled, certified and predicted for: the limits of a launch, and the bounds on its time.

Limits come from the vendors' programming guides; peaks are dense rates of the named board's data sheet.
"""

import functools
from dataclasses import dataclass

import torch
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Target:
    """One architecture, with one board that has it."""

    name: str  # its name in certification: sm_90, gfx942, …
    board: str
    backend: str  # cuda or hip
    arch: int | str
    warp_size: int
    shared_memory: int  # bytes one program may use
    shared_memory_sm: int  # bytes of one multiprocessor (compute unit)
    registers: int  # 32-bit registers of one multiprocessor
    max_registers: int  # of one thread, before the compiler has to spill
    max_warps: int  # resident on one multiprocessor
    multiprocessors: int
    flops: float  # dense bf16 tensor-core rate, flop/s
    bandwidth: float  # of device memory, bytes/s
    descriptors: bool  # loads through tensor descriptors (TMA)

    @property
    def gpu(self) -> GPUTarget:
        return GPUTarget(self.backend, self.arch, self.warp_size)

    @property
    def float32_product(self) -> str:
        """The `input_precision` that keeps float32 operands exact to about 1e-6 on this target's tensor cores."""
        if self.backend == "cuda":
            return "tf32x3"
        return "ieee" if self.name.startswith("gfx9") else "bf16x6"


_TABLE = (
    # name, board, backend, arch, warp, smem, smem/SM, registers, /thread, warps, SMs, flop/s, bytes/s, descriptors
    Target("sm_80", "A100", "cuda", 80, 32, 166912, 167936, 65536, 255, 64, 108, 312e12, 2.04e12, False),
    Target("sm_90", "H100", "cuda", 90, 32, 232448, 233472, 65536, 255, 64, 132, 989e12, 3.35e12, True),
    Target("sm_100", "B200", "cuda", 100, 32, 232448, 233472, 65536, 255, 64, 148, 2250e12, 8.0e12, True),
    Target("sm_120", "RTX 5090", "cuda", 120, 32, 101376, 102400, 65536, 255, 48, 170, 209.5e12, 1.79e12, True),
    Target("gfx942", "MI300X", "hip", "gfx942", 64, 65536, 65536, 131072, 512, 32, 304, 1307e12, 5.3e12, False),
    Target("gfx1100", "RX 7900 XTX", "hip", "gfx1100", 32, 65536, 65536, 98304, 256, 32, 96, 123e12, 0.96e12, False),
)
TARGETS = {target.name: target for target in _TABLE}
NEAREST = {86: "sm_80", 87: "sm_80", 89: "sm_80", 103: "sm_100", 121: "sm_120"}


@functools.cache
def of_device(device: torch.device) -> Target:
    """Return the target of a torch device; a CPU (Triton's interpreter) is treated as an sm_90."""
    if device.type != "cuda":
        return TARGETS["sm_90"]
    if torch.version.hip:
        arch = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return TARGETS.get(arch, TARGETS["gfx942" if arch.startswith("gfx9") else "gfx1100"])
    major, minor = torch.cuda.get_device_capability(device)
    number = 10 * major + minor
    name = NEAREST.get(number, f"sm_{number}")
    return TARGETS.get(name, TARGETS["sm_80"])
