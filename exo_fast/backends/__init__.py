"""Which implementation runs: `reference` (full logits), `torch` (chunked) or `triton` (fused kernels)."""

from torch import Tensor

BACKENDS = ("auto", "reference", "torch", "triton")


def choose(backend: str, hidden: Tensor) -> str:
    """The backend a call runs on. `auto` is `torch`, on every device, until the Triton kernels are in."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known; choose one of {', '.join(BACKENDS)}")
    if backend == "triton":
        raise ValueError(
            f"backend='triton' is not available in this version (hidden is on {hidden.device}); "
            "use backend='torch', which runs on every device, or leave backend='auto'"
        )
    return "torch" if backend == "auto" else backend
