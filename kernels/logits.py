"""The logits of a raw product, z = softcap(a + b) · scale, shared by every kernel that uses logits.

float32 throughout. `softcap` and `scale` arrive as float32 arguments; a head without a softcap is compiled without it.
"""

import triton
import triton.language as tl


@triton.jit
def capped(a, softcap):
    """Return softcap(a) = c·tanh(a/c) = c − 2c / (1 + exp(2a/c)); an exponential that overflows gives exactly c."""
    return softcap - (2.0 * softcap) / (1.0 + tl.exp(a * (2.0 / softcap)))


@triton.jit
def finish(a, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Turn a raw product (bias added) into logits."""
    if HAS_SOFTCAP:
        a = capped(a, softcap)
    return a * scale


@triton.jit
def slope(z, scale, softcap):
    """Return softcap′(a) = 1 − tanh²(a/c), from the finished logit z = c·tanh(a/c)·scale."""
    t = z * (1.0 / (softcap * scale))
    return 1.0 - t * t
