"""What a head does to a raw product, z = softcap(a + b) · scale, shared by every kernel that meets logits.

float32 throughout. `softcap` and `scale` arrive as float32 arguments; a head without a softcap is compiled without it.
"""

import triton
import triton.language as tl


@triton.jit
def capped(a, softcap):
    """softcap(a) = c·tanh(a/c), by one exponential of a number that is never positive, so nothing overflows."""
    decay = tl.exp(-2.0 * tl.abs(a) / softcap)
    magnitude = softcap * (1.0 - decay) / (1.0 + decay)
    return tl.where(a < 0, -magnitude, magnitude)


@triton.jit
def finish(a, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Raw product (bias added) -> logits."""
    if HAS_SOFTCAP:
        a = capped(a, softcap)
    return a * scale


@triton.jit
def slope(z, scale, softcap):
    """softcap′(a) = 1 − tanh²(a/c), from the finished logit z = c·tanh(a/c)·scale."""
    t = z / (softcap * scale)
    return 1.0 - t * t
